"""Where text comes from: `data.source` becomes a stream of pieces of text.

    config = DataConfig(source="books/")                    # or tales, shakespeare, a glob, a URL ...
    files = inputs(config)                                  # what to read; `download` gets what is not there
    for piece in pieces(config, files):
        piece.text, piece.end                               # a document, or part of one; does it end here?

A line of .jsonl is a document, and so is what lies between two `data.separator`s of a .txt. A .txt without
any is unmarked: no document ends in it, unless it is read together with marked files. Long texts come in
parts, so that memory stays flat. Text must be UTF-8, and is: nothing is replaced or skipped silently.
`extent` and `divided` cut the stream into the training and the validation split.
"""

import codecs
import difflib
import glob
import hashlib
import json
import os
import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tinyllm.config import DataConfig
from tinyllm.download import Meter, Progress, cache_path, fetch
from tinyllm.errors import DataError

BLOCK = 1 << 20  # bytes a read
REPORT = 1 << 19  # bytes of text between two reports of progress
PART = 1 << 16  # characters a part of a long text: small enough that a few of them keep every core busy
SUFFIXES = (".txt", ".jsonl")
NAMED = {
    "shakespeare": (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "tinyshakespeare.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "tinystories": (
        "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt",
        "TinyStoriesV2-GPT4-train.txt",
        None,  # its authors give no checksum; ours is recorded when the data is prepared
    ),
}


class Piece(NamedTuple):
    """Some text, in order. `end`: a document ends with it. `log_prob`: in nats, for a story of `tales`."""

    text: str
    end: bool
    log_prob: float | None = None


@dataclass(frozen=True)
class Input:
    """A file to read. One that comes from a URL may not be there yet."""

    name: str  # the path as the user would write it, `shakespeare`, or the URL
    path: Path
    url: str = ""
    sha256: str | None = None


def inputs(config: DataConfig) -> tuple[Input, ...]:
    """The files of `data.source`, in order; none for `tales`. Uses no network. Raises DataError."""
    source = config.source
    if source == "tales":
        return ()
    if source in NAMED:
        url, name, sha256 = NAMED[source]
        return (Input(source, cache_path(name), url, sha256),)
    if re.match("https?://", source):
        try:
            path = urlsplit(source).path
        except ValueError as error:
            raise DataError(f"not a URL: {error}", where=source) from None
        # Two sites may both have an input.txt.
        suffix = ".jsonl" if PurePosixPath(path).suffix == ".jsonl" else ".txt"
        return (Input(source, cache_path(hashlib.sha256(source.encode()).hexdigest()[:16] + suffix), source),)
    return tuple(Input(path.as_posix(), path) for path in local_files(source))


def files_in(folder: Path) -> Iterator[Path]:
    """The .txt and .jsonl files in it and in its folders. Raises DataError for one that cannot be looked into."""

    def told(error: OSError) -> None:
        fix = "let it be read, or name what is to be read by a glob, e.g. 'texts/*.txt'"
        raise DataError(f"cannot be read: {error.strerror}", where=str(error.filename), fix=fix)

    for inside, _, names in os.walk(folder, onerror=told):
        for path in (Path(inside, name) for name in names):
            if path.suffix in SUFFIXES and path.is_file():
                yield path


def local_files(source: str) -> list[Path]:
    """The .txt and .jsonl files a path, folder or glob means, sorted. Raises DataError if it means none."""
    path = Path(os.path.expanduser(source))  # of an unknown user, Path.expanduser raises
    if path.is_dir():
        found = sorted(files_in(path))
        if not found:
            raise DataError("no .txt or .jsonl file in this folder", where=source)
        return found
    if path.exists():
        found = [path]
    elif glob.has_magic(source):
        found = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        if not found:
            raise DataError("no file matches this pattern", where=source)
    else:
        near = difflib.get_close_matches(source, ["tales", *NAMED], 1)
        fix = f"did you mean {near[0]!r}?" if near else ""
        fix = fix or "data.source is `tales`, `shakespeare`, `tinystories`, or a path, folder, glob or URL"
        raise DataError("no such file or folder", where=source, fix=fix)
    for file in found:
        if file.suffix not in SUFFIXES:
            fix = "plain text goes into a .txt, a JSON object a line into a .jsonl"
            raise DataError("not a .txt or .jsonl file", where=str(file), fix=fix)
    return found


def stats(files: Iterable[Input], known: dict[str, Any], meter: Meter | None = None) -> dict[str, Any]:
    """Size, time of change (ns) and SHA-256 of each file by name. Raises DataError if one cannot be read.

    A file whose size and time are as `known`, an earlier result of this, is not read again; one that is gone
    is reported as it was known.
    """
    found, meter = {}, meter or Meter()
    for file in files:
        old = known.get(file.name)
        if old and not file.path.exists():
            found[file.name] = old
            continue
        stat = status(file)
        if old and (old["size"], old["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
            found[file.name] = old
            continue
        sha256 = hashlib.sha256()
        for block in read_blocks(file):
            sha256.update(block)
            meter.update(len(block))
        found[file.name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256.hexdigest()}
    return found


def status(file: Input) -> os.stat_result:
    """Size and times of a file. Raises DataError."""
    try:
        return file.path.stat()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=file.name) from None


def download(file: Input, meter: Meter) -> None:
    """Make sure that a file from the web is in the cache. Raises DataError."""
    if file.url:
        fetch(file.url, file.path.name, file.sha256, mirror=file.name in NAMED, meter=meter)


def pieces(config: DataConfig, files: tuple[Input, ...]) -> Iterator[Piece]:
    """All of the text, in order. Raises DataError naming the file and the place of what cannot be read."""
    if config.source == "tales":
        from tinyllm.tales import stories

        for story in stories(config.tales_stories, config.tales_seed):
            yield Piece(story.text, True, story.log_prob)
        return
    marked = [is_marked(file, config) for file in files]
    for file, own_marks in zip(files, marked, strict=True):
        if file.path.suffix == ".jsonl":
            yield from read_jsonl(file, config.text_key)
        else:
            separator = config.separator if own_marks else ""
            yield from split_text(read_text(file), separator, documents=any(marked))


def is_marked(file: Input, config: DataConfig) -> bool:
    """Whether a file says where its documents end: a .jsonl does, and a .txt with the separator in it."""
    if file.path.suffix == ".jsonl" or not config.separator:
        return file.path.suffix == ".jsonl"
    separator, tail = config.separator.encode(), b""
    for block in read_blocks(file):
        if separator in tail + block:
            return True
        tail = block[-len(separator) :]  # it may lie across two blocks
    return False


def read_blocks(file: Input) -> Iterator[bytes]:
    """The bytes of a file. Raises DataError if it cannot be read or is empty."""
    try:
        if file.path.exists() and not (file.path.is_file() or file.path.is_dir()):  # /dev/zero has no end
            raise DataError("not a regular file", where=file.name, fix="it is read more than once: save it as a file")
        with open(file.path, "rb") as handle:
            block = handle.read(BLOCK)
            if not block:
                raise DataError("this file is empty", where=file.name, fix="remove it, or put text into it")
            while block:
                yield block
                block = handle.read(BLOCK)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=file.name) from None


def read_text(file: Input) -> Iterator[str]:
    """A .txt in blocks, line ends as they are, no byte order mark. Raises DataError if it is not UTF-8."""
    decoder, before = codecs.getincrementaldecoder("utf-8-sig")(), 0
    blocks = read_blocks(file)
    while True:
        block = next(blocks, b"")
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise not_text(file.name, f"byte {before - waiting + error.start:,}") from None
        if "\0" in text:
            raise DataError("a binary file: it has NUL characters", where=file.name, fix="data.source takes text")
        if not block:
            return
        before += len(block)
        yield text


def not_text(where: str, place: str) -> DataError:
    return DataError(f"not UTF-8 text at {place}", where=where, fix="`iconv -f OLD -t UTF-8` converts a text file")


def split_text(blocks: Iterator[str], separator: str, *, documents: bool) -> Iterator[Piece]:
    """The documents between separators, or for '' the whole text, which ends one document if `documents`.

    Newlines around a separator belong to it; a document without text is none. Long ones come in parts.
    """
    text, last = "", ""  # `last` waits until it is known whether the document ends with it
    for block in blocks:
        text += block
        if separator:
            *whole, text = text.split(separator)
            for document in whole:
                yield from end_document(last, document.strip("\r\n") if not last else document.rstrip("\r\n"))
                last = ""
        start = 0
        while len(text) - start > 2 * PART:
            if last:
                yield Piece(last, False)
            end = cut(text, start + PART, start)
            part, start = text[start:end], end
            last = part if last or not separator else part.lstrip("\r\n")
        text = text[start:]
    if separator:
        text = text.rstrip("\r\n") if last else text.strip("\r\n")
    if documents:
        yield from end_document(last, text)
    else:
        yield from (Piece(part, False) for part in (last, text) if part)


def end_document(last: str, text: str) -> Iterator[Piece]:
    """The rest of a document: the part that waited, and what came after it."""
    if last and text:
        yield Piece(last, False)
    if text or last:
        yield Piece(text or last, True)


def cut(text: str, wanted: int, start: int = 0) -> int:
    """A place after `start`, at or before `wanted`, to cut a longer text in two without changing its tokens.

    Between a letter or digit and the white space after it. GPT-2's words (and those of its heirs) never go
    across such a place, so the ids of the two halves are the ids of the whole; at a line start not always.
    """
    for at in range(wanted, start, -1):
        if text[at].isspace() and text[at - 1].isalnum():
            return at
    return wanted


def read_jsonl(file: Input, key: str) -> Iterator[Piece]:
    """A document a line. Raises DataError naming the line."""
    found, number, tail = False, 0, b""
    for block in read_blocks(file):
        *lines, tail = (tail + block).split(b"\n")
        for line in lines:
            number += 1
            if text := json_text(line, key, f"{file.name}:{number}"):
                found = True
                yield Piece(text, True)
    if text := json_text(tail, key, f"{file.name}:{number + 1}"):
        found = True
        yield Piece(text, True)
    if not found:
        raise DataError("no line of this file has any text", where=file.name)


def json_text(line: bytes, key: str, where: str) -> str:
    """The text of a line, '' for a blank one. Raises DataError."""
    if not line.strip():
        return ""
    try:
        record = json.loads(line.decode("utf-8-sig"))
        text = record[key]
        text.encode()
    except UnicodeDecodeError as error:
        raise not_text(where, f"byte {error.start} of the line") from None
    except UnicodeEncodeError:
        raise DataError(f"{key!r} has half a surrogate pair (\\ud800 to \\udfff) in it", where=where) from None
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}", where=where) from None
    except (ValueError, RecursionError):
        raise DataError("JSON with a number of thousands of digits, or nested too deeply", where=where) from None
    except KeyError:
        has = ", ".join(map(repr, list(record)[:8])) or "none"
        raise DataError(f"no key {key!r}; it has {has}", where=where, fix="set data.text_key") from None
    except (TypeError, AttributeError):
        what = f"not an object with text under {key!r}"
        raise DataError(what, where=where, fix=f'a line is like {{"{key}": "Once upon a time ..."}}') from None
    return text


# ---- The two splits ----


@dataclass(frozen=True)
class Extent:
    """How long the text is, and where its validation split begins."""

    characters: int
    text_bytes: int  # UTF-8
    marked: bool  # documents are marked in it
    train_documents: int  # after so many validation begins; 0: after so many characters
    train_characters: int = 0


def extent(config: DataConfig, files: tuple[Input, ...]) -> Generator[Progress, None, Extent]:
    """How long the text is, and where to divide it. Reads all of it. Raises DataError."""
    documents = characters = text_bytes = 0
    total, shown = sum(status(file).st_size for file in files), 0
    marked = False
    for piece in pieces(config, files):
        documents += piece.end
        characters += len(piece.text)
        text_bytes += len(piece.text.encode())
        marked = marked or piece.end
        if text_bytes - shown >= REPORT:
            shown = text_bytes
            yield Progress("reading", text_bytes, total)
    train = int(documents * (1 - config.val_fraction))
    if documents > 1:
        return Extent(characters, text_bytes, True, min(max(train, 1), documents - 1))
    train = int(characters * (1 - config.val_fraction))  # as nanoGPT does
    if not 0 < train < characters:
        what = f"{characters:,} characters cannot be divided by data.val_fraction = {config.val_fraction}"
        raise DataError(what, where=config.source, fix="more text, or another data.val_fraction")
    return Extent(characters, text_bytes, marked, 0, train)


def divided(config: DataConfig, files: tuple[Input, ...], extent: Extent) -> Iterator[tuple[str, Piece]]:
    """Each piece of text with the name of its split; the one across the boundary is cut in two."""
    documents = characters = 0
    for piece in pieces(config, files):
        if extent.train_documents:
            yield ("train" if documents < extent.train_documents else "val"), piece
        else:
            train = min(max(extent.train_characters - characters, 0), len(piece.text))
            if train:
                yield "train", Piece(piece.text[:train], piece.end and train == len(piece.text))
            if train < len(piece.text):
                yield "val", Piece(piece.text[train:], piece.end)
        documents += piece.end
        characters += len(piece.text)
