"""Text to tokens: `data.source` becomes tokenizer.json, train.bin, val.bin and meta.json in `data.dir`.

    for event in prepare(config.data):
        ...                                      # Progress, again and again; the last event is Prepared
    prepared = open_prepared(config.data)        # what a run starts from; refuses what does not fit

`meta.json` holds the fingerprint, all that determines the result: the settings that matter and each input's
SHA-256. Preparing again does nothing while it is the same, and says what changed when it is not. New files
are made aside and take the place of the old ones all together, so that a kill leaves one or the other.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from tinyllm.config import DataConfig
from tinyllm.data import TokenWriter, open_tokens, read_header
from tinyllm.errors import DataError
from tinyllm.sources import Input, Piece, download, inputs, pieces, stats
from tinyllm.tokenizer import (
    KINDS,
    Meter,
    build,
    digest,
    encode_batch,
    end_of_text,
    to_json,
    token_bytes,
)

VERSION = 1  # of meta.json and of what is done here: a change of either prepares everything again
FILES = ("tokenizer.json", "train.bin", "val.bin", "meta.json")  # in the order they are moved
ASIDE, READY = ".preparing-", ".prepared"
BATCH = 1 << 19  # characters tokenized at once; by characters that takes about 100 bytes of memory each
CHUNK = 1 << 20  # tokens of the training split compared at once
WINDOW = 64  # tokens; a power of two
PRIOR = 50.0  # tokens; see `compare`. Of 1 to 500 the best, or near it, by characters, BPE and GPT-2 alike
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far a stage is, in bytes of text. `total` is 0 while it is not known."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True)
class Split:
    """The size of a split. `text_bytes` are UTF-8. Each document's end is one more token, without text."""

    tokens: int
    text_bytes: int
    characters: int
    documents: int


@dataclass(frozen=True)
class Prepared:
    """Prepared data: what it is, what it was made from, and how hard it is to predict."""

    dir: str
    source: str
    tokenizer: str
    vocab_size: int
    tokenizer_json: str
    tokenizer_hash: str
    train: Split
    val: Split
    unigram_entropy: float  # nats a token of the validation split, under the counts of the training split
    bigram_entropy: float  # the same, given the token before; a model that learns must come below both
    overlap: float  # share of the validation split's windows of 64 tokens that occur in the training split
    entropy: float | None  # nats a token of the validation split under the grammar; for `tales` only
    fingerprint: dict[str, Any]
    reasons: tuple[str, ...] = ()  # why it was made (again); empty when it was there already

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text a token, over both splits."""
        return (self.train.text_bytes + self.val.text_bytes) / (self.train.tokens + self.val.tokens)


def prepare(config: DataConfig, *, force: bool = False) -> Iterator[Progress | Prepared]:
    """Prepare the data unless it is; the last event is Prepared. Raises DataError, TokenizerError."""
    changes = ["new"]
    if is_prepared(config):
        try:
            prepared, changes = reopen(config)
        except DataError as error:
            changes = [str(error).partition("\n")[0]]
        if not changes and not force:
            yield prepared
            return
    if config.tokenizer not in ("char", "byte", "bpe"):
        # It needs no text. If it cannot be had, that should be said before gigabytes are read.
        work = partial(build, config.tokenizer, (), vocab_size=0, documents=False)
        yield from watched("fetching the tokenizer", lambda meter: work())
    for file in inputs(config):
        yield from watched("downloading", partial(download, file))
    folder = Path(config.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        finish_move(folder)
        remove_leftovers(folder)
        aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=folder))
        try:
            prepared = yield from write_all(config, aside)
            publish(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
            if not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", where=str(error.filename or folder)) from None
    yield replace(prepared, reasons=tuple(changes or ["forced"]))


def is_prepared(config: DataConfig) -> bool:
    """Whether there is anything prepared in `data.dir` at all; it may not fit the config."""
    return (Path(config.dir) / "meta.json").is_file() or (Path(config.dir) / READY).is_dir()


def open_prepared(config: DataConfig) -> Prepared:
    """What `prepare` made for this config. Raises DataError if missing, damaged, or of another config."""
    prepared, changes = reopen(config)
    if changes:
        what = "the data was prepared from something else:\n  " + "\n  ".join(changes)
        fix = "`tinyllm prepare run.toml` prepares it again; another data.dir keeps this one too"
        raise DataError(what, where=str(Path(config.dir) / "meta.json"), fix=fix)
    return prepared


def reopen(config: DataConfig) -> tuple[Prepared | None, list[str]]:
    """What is in `data.dir`, and how config and inputs differ from what made it. Raises DataError."""
    folder = Path(config.dir)
    where, again = str(folder / "meta.json"), "`tinyllm prepare run.toml --force` prepares the data again"
    try:
        finish_move(folder)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["version"] != VERSION:
            return None, [f"format: {meta['version']} -> {VERSION}"]
        tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
        report, files = meta["report"], meta["files"]
        report |= {"dir": config.dir, "tokenizer_json": tokenizer_json, "fingerprint": meta["fingerprint"]}
        report |= {split: Split(**report[split]) for split in ("train", "val")}
        prepared = Prepared(**report)
    except FileNotFoundError as error:
        missing = Path(error.filename)
        fix = "`tinyllm prepare run.toml` makes it" if missing.name == "meta.json" else again
        raise DataError("no prepared data: there is no such file", where=str(missing), fix=fix) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"damaged: {error!r}", where=where, fix=again) from None
    if digest(tokenizer_json) != prepared.tokenizer_hash:
        what = "it has been changed since the data was prepared"
        raise DataError(what, where=str(folder / "tokenizer.json"), fix=again)
    for name, split in (("train.bin", prepared.train), ("val.bin", prepared.val)):
        header = read_header(folder / name)
        if (header.tokenizer_hash, header.count) != (prepared.tokenizer_hash, split.tokens):
            raise DataError("it belongs to another preparation", where=str(folder / name), fix=again)
    return prepared, differences(prepared.fingerprint, fingerprint(config, files))


# ---- The fingerprint ----


def fingerprint(config: DataConfig, known: dict[str, Any]) -> dict[str, Any]:
    """All that determines the result, flat. `known`: what `stats` said last time. Raises DataError.

    What is gone has not changed: prepared data can be used where its sources are not, on another machine say.
    """
    settings = {"data.source": config.source, "data.tokenizer": config.tokenizer}
    if config.tokenizer == "bpe":
        settings["data.vocab_size"] = config.vocab_size
    settings["data.val_fraction"] = config.val_fraction
    if config.source == "tales":
        from tinyllm.tales import stories

        grammar = "\n".join(story.text for story in stories(32)).encode()  # another grammar tells other stories
        settings |= {"data.tales_stories": config.tales_stories, "data.tales_seed": config.tales_seed}
        settings["grammar"] = hashlib.sha256(grammar).hexdigest()[:16]
    else:
        settings |= {"data.separator": config.separator, "data.text_key": config.text_key}
    try:
        files = read_files(config)
    except DataError:
        if not known:
            raise
        files = None
    now = known if files is None else stats(files, known)
    texts = {name: f"{file['size']} bytes, {file['sha256'][:16]}" for name, file in now.items()}
    return settings | {f"file {name}": text for name, text in texts.items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for each difference of two fingerprints."""

    def shown(settings: dict[str, Any], key: str) -> str:
        return json.dumps(settings[key], ensure_ascii=False) if key in settings else "none"

    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {shown(old, key)} -> {shown(new, key)}" for key in keys]


def read_files(config: DataConfig) -> list[Input]:
    """Every file the result depends on: the text's, and the tokenizer's when that is one."""
    own = () if config.tokenizer in KINDS else (Input(config.tokenizer, Path(config.tokenizer).expanduser()),)
    return [*inputs(config), *own]


# ---- Making the files ----


@dataclass(frozen=True)
class Boundary:
    """Where the validation split begins: after this many documents, or (when `documents` is 0) characters."""

    documents: int
    characters: int
    marked: bool  # documents are marked in the text


def write_all(config: DataConfig, folder: Path) -> Generator[Progress, None, Prepared]:
    """Make all four files in `folder`."""
    files, known = inputs(config), stats(read_files(config), {})
    boundary, characters, text_bytes = yield from find_boundary(config, files)

    def texts(meter: Meter) -> Iterator[str]:
        meter.total = text_bytes
        for split, piece in divided(config, files, boundary):
            meter.update(len(piece.text.encode()))
            # A BPE learns from the training split only. Characters come from all of the text: no figure is
            # better for it, and the validation split would not be encodable if it had a character of its own.
            if split == "train" or config.tokenizer != "bpe":
                yield piece.text

    def work(meter: Meter) -> Tokenizer:
        return build(config.tokenizer, texts(meter), vocab_size=config.vocab_size, documents=boundary.marked)

    tokenizer = yield from watched(f"{'training' if config.tokenizer == 'bpe' else 'making'} the tokenizer", work)
    parts = divided(config, files, boundary)
    splits, log_prob = yield from write_tokens(parts, tokenizer, folder, config.source, text_bytes)
    if splits["train"].characters + splits["val"].characters != characters:
        raise DataError("the text changed while it was being read", where=config.source, fix="prepare again")
    vocab_size = len(token_bytes(tokenizer))
    unigram, bigram, overlap = yield from compare(folder, vocab_size, text_bytes)
    prepared = Prepared(
        dir=config.dir,
        source=config.source,
        tokenizer=config.tokenizer,
        vocab_size=vocab_size,
        tokenizer_json=to_json(tokenizer),
        tokenizer_hash=digest(to_json(tokenizer)),
        train=splits["train"],
        val=splits["val"],
        unigram_entropy=unigram,
        bigram_entropy=bigram,
        overlap=overlap,
        entropy=None if log_prob is None else -log_prob / splits["val"].tokens,
        fingerprint=fingerprint(config, known),
    )
    write_text(folder / "tokenizer.json", prepared.tokenizer_json)
    report = asdict(prepared)
    for elsewhere in ("dir", "tokenizer_json", "fingerprint", "reasons"):
        del report[elsewhere]
    meta = {"version": VERSION, "fingerprint": prepared.fingerprint, "files": known, "report": report}
    write_text(folder / "meta.json", json.dumps(meta, indent=1, ensure_ascii=False) + "\n")
    return prepared


def find_boundary(config: DataConfig, files: tuple[Input, ...]) -> Generator[Progress, None, tuple[Boundary, int, int]]:
    """Where to divide the text; its characters and its UTF-8 bytes. Reads all of it. Raises DataError."""
    documents = characters = text_bytes = 0
    total, shown = sum(file.path.stat().st_size for file in files), 0
    marked = False
    for piece in pieces(config, files):
        documents += piece.end
        characters += len(piece.text)
        text_bytes += len(piece.text.encode())
        marked = marked or piece.end
        if text_bytes - shown >= BATCH:
            shown = text_bytes
            yield Progress("reading", text_bytes, total)
    train = int(documents * (1 - config.val_fraction))
    if documents > 1:
        return Boundary(min(max(train, 1), documents - 1), 0, True), characters, text_bytes
    train = int(characters * (1 - config.val_fraction))  # as nanoGPT does
    if not 0 < train < characters:
        what = f"{characters:,} characters cannot be divided by data.val_fraction = {config.val_fraction:g}"
        raise DataError(what, where=config.source, fix="more text, or a larger data.val_fraction")
    return Boundary(0, train, marked), characters, text_bytes


def divided(config: DataConfig, files: tuple[Input, ...], boundary: Boundary) -> Iterator[tuple[str, Piece]]:
    """Each piece of text with the name of its split; the one across the boundary is cut in two."""
    documents = characters = 0
    for piece in pieces(config, files):
        if boundary.documents:
            yield ("train" if documents < boundary.documents else "val"), piece
        else:
            train = min(max(boundary.characters - characters, 0), len(piece.text))
            if train:
                yield "train", Piece(piece.text[:train], piece.end and train == len(piece.text))
            if train < len(piece.text):
                yield "val", Piece(piece.text[train:], piece.end)
        documents += piece.end
        characters += len(piece.text)


def batches(parts: Iterator[tuple[str, Piece]]) -> Iterator[tuple[str, list[Piece]]]:
    """Pieces of one split together, some BATCH characters a time: work for every core, little memory."""
    name, batch, size = "train", [], 0
    for split, piece in parts:
        if batch and (size >= BATCH or split != name):
            yield name, batch
            batch, size = [], 0
        name = split
        batch.append(piece)
        size += len(piece.text)
    yield name, batch


def write_tokens(
    parts: Iterator[tuple[str, Piece]], tokenizer: Tokenizer, folder: Path, source: str, total: int
) -> Generator[Progress, None, tuple[dict[str, Split], float | None]]:
    """Write train.bin and val.bin. Returns their sizes, and the log-probability (nats) of the validation."""
    sizes, hash = token_bytes(tokenizer), digest(to_json(tokenizer))
    end = np.array([end_of_text(tokenizer)] if end_of_text(tokenizer) is not None else [], dtype=np.int64)
    characters, documents = {"train": 0, "val": 0}, {"train": 0, "val": 0}
    log_prob: float | None = 0.0
    with (
        TokenWriter(folder / "train.bin", vocab_size=len(sizes), tokenizer_hash=hash) as train,
        TokenWriter(folder / "val.bin", vocab_size=len(sizes), tokenizer_hash=hash) as val,
    ):
        writers = {"train": train, "val": val}
        for split, batch in batches(parts):
            rows = encode_batch(tokenizer, [piece.text for piece in batch], sizes, source)
            ids = [ids for row, piece in zip(rows, batch, strict=True) for ids in (row, end[: piece.end])]
            writers[split].write(np.concatenate(ids), sum(len(piece.text.encode()) for piece in batch))
            characters[split] += sum(len(piece.text) for piece in batch)
            documents[split] += sum(piece.end for piece in batch)
            for piece in batch if split == "val" else ():
                log_prob = None if log_prob is None or piece.log_prob is None else log_prob + piece.log_prob
            yield Progress("writing tokens", train.text_bytes + val.text_bytes, total)
    made = {s: Split(w.count, w.text_bytes, characters[s], documents[s]) for s, w in writers.items()}
    return made, log_prob


def watched(stage: str, work: Callable[[Meter], T]) -> Generator[Progress, None, T]:
    """Do `work` in a thread and report how far it is. It is told to stop when nobody listens any more."""
    meter = Meter()
    with ThreadPoolExecutor(1, "tinyllm-prepare") as pool:
        future = pool.submit(work, meter)
        try:
            while wait([future], timeout=0.1).not_done:
                yield Progress(stage, meter.done, meter.total)
            return future.result()
        finally:
            meter.stopped = True


# ---- How hard the validation split is ----


def compare(folder: Path, vocab_size: int, text_bytes: int) -> Generator[Progress, None, tuple[float, float, float]]:
    """Unigram and bigram loss (nats a token) and overlap of the validation split. One pass, bounded memory.

    The bigram loss is that of the first 4 million tokens, which fixes it to three digits.
    """
    train, val = open_tokens(folder / "train.bin")[0], open_tokens(folder / "val.bin")[0]
    pairs, pair_uses = np.unique(pair_codes(val[: 4 * CHUNK], vocab_size), return_counts=True)
    whole = len(val) // WINDOW * WINDOW
    chunks = [val[start : min(start + CHUNK, whole)] for start in range(0, whole, CHUNK)]
    rows = [window_hashes(chunk.reshape(-1, WINDOW))[:, 0] for chunk in chunks]
    hashes, hash_uses = np.unique(np.concatenate([np.empty(0, np.uint64), *rows]), return_counts=True)
    # Most windows of the training split are ruled out by the first 22 bits of their hash.
    maybe = np.zeros(1 << 22, dtype=bool)
    maybe[hashes >> np.uint64(42)] = True
    counts, pair_counts = np.zeros(vocab_size, np.int64), np.zeros(len(pairs), np.int64)
    seen = np.zeros(len(hashes), dtype=bool)
    for start in range(0, len(train), CHUNK):
        chunk = train[start : start + CHUNK + WINDOW - 1].astype(np.int64)
        counts += np.bincount(chunk[:CHUNK], minlength=vocab_size)
        codes, uses = np.unique(pair_codes(chunk[: CHUNK + 1], vocab_size), return_counts=True)
        at, found = positions(codes, pairs)
        pair_counts[at] += uses[found]
        own = window_hashes(chunk)
        seen[positions(own[maybe[own >> np.uint64(42)]], hashes)[0]] = True
        share = min(start + CHUNK, len(train)) / len(train)
        yield Progress("comparing the splits", int(text_bytes * share), text_bytes)
    unigram = (counts + 1) / (counts.sum() + vocab_size)
    uses = np.bincount(val, minlength=vocab_size)
    unigram_loss = -(uses * np.log(unigram)).sum() / uses.sum()
    left, right = pairs // vocab_size, pairs % vocab_size
    # The unigram is the prior of each row (MacKay and Peto 1995): unseen pairs have a probability too.
    bigram = (pair_counts + PRIOR * unigram[right]) / (counts[left] + PRIOR)
    bigram_loss = -(pair_uses * np.log(bigram)).sum() / max(pair_uses.sum(), 1)
    return float(unigram_loss), float(bigram_loss), float(hash_uses[seen].sum() / max(hash_uses.sum(), 1))


def pair_codes(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """A number for each two tokens in a row, (len(tokens) - 1,) int64."""
    tokens = tokens.astype(np.int64)
    return tokens[:-1] * vocab_size + tokens[1:]


def positions(values: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the sorted `table` those `values` are that are in it, and which of them that are (bool)."""
    at = np.searchsorted(table, values)
    found = at < len(table)
    found[found] = table[at[found]] == values[found]
    return at[found], found


def window_hashes(tokens: np.ndarray) -> np.ndarray:
    """A 64-bit polynomial hash of each WINDOW tokens along the last axis, (..., length - WINDOW + 1) uint64.

    By doubling: the hash of 2k tokens is that of the first k times base^k plus that of the next k.
    """
    hashes = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(29)
    base, width = 0xD1342543DE82EF95, 1
    while width < WINDOW:
        hashes = hashes[..., :-width] * np.uint64(base) + hashes[..., width:]
        base, width = base * base % (1 << 64), 2 * width
    return hashes


# ---- Putting the files into their place ----


def write_text(path: Path, text: str) -> None:
    """Write a file, down to the disk."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def publish(aside: Path, folder: Path) -> None:
    """Put the files made in `aside` into `folder`. Once `aside` has its new name they are what counts.

    Moving four files is not one act, but renaming their folder is; if the moves are cut short, whoever opens
    the data next does the rest.
    """
    os.replace(aside, folder / READY)
    finish_move(folder)


def finish_move(folder: Path) -> None:
    """Do what is left of a `publish`."""
    ready = folder / READY
    if not ready.is_dir():
        return
    for name in FILES:
        if (ready / name).exists():
            os.replace(ready / name, folder / name)
    ready.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed `prepare` left: folders in which nothing has been written for an hour."""
    for old in folder.glob(ASIDE + "*"):
        newest = max((path.stat().st_mtime for path in (old, *old.glob("*"))), default=0)
        if time.time() - newest > 3600:
            shutil.rmtree(old, ignore_errors=True)
