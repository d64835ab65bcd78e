"""Text to tokens: `data.source` becomes tokenizer.json, train.bin, val.bin and meta.json in `data.dir`.

    for event in prepare(config.data):
        ...                                      # Progress, again and again; the last event is Prepared
    prepared = open_prepared(config.data)        # what a run starts from; refuses what does not fit

`meta.json` holds the fingerprint, all that determines the result: the settings that matter and each input's
SHA-256. Preparing again does nothing while it is the same, and says what changed when it is not. New files
are made aside and take the place of the old ones all together, so that a kill leaves one or the other, and what was
made so far, from which the next `prepare` of the same goes on (see `writing.py`).

It also holds the hash of each of the files, and of itself: one that is damaged, or of another preparation, is refused.
Ids of more than a gigabyte are not read for that whenever they are opened, but by `tinyllm prepare` and `sanity` only.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tinyllm.baselines import Baselines, compare
from tinyllm.config import DataConfig
from tinyllm.data import HEADER_SIZE, Header, ids_hash, open_tokens, read_header
from tinyllm.download import Meter, Progress, watched
from tinyllm.encoding import Encoder
from tinyllm.errors import DataError
from tinyllm.files import locked, write_text
from tinyllm.sources import Extent, Input, divided, download, extent, inputs, stats
from tinyllm.tokenizer import KINDS, build, digest, end_of_text, from_json, to_json
from tinyllm.writing import JOURNAL, Done, Split, encoded, read_journal, write_journal, write_tokens

VERSION = 2  # of meta.json and of what is done here: a change of either prepares everything again
FILES = ("tokenizer.json", "train.bin", "val.bin", "meta.json")  # in the order they are moved
ASIDE, READY = ".preparing-", ".prepared"
READ_AT_ONCE = 1 << 30  # bytes of a token file up to which it is read whenever it is opened, to see if it is whole


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
            prepared, changes = reopen(config, thorough=True)
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
        text, known = yield from looked_at(config)
        made_of = {"version": VERSION, **fingerprint(config, known)}
        folder.mkdir(parents=True, exist_ok=True)
        finish_move(folder)
        with ExitStack() as until_done:
            with locked(folder, wait=True):  # nobody takes the new folder, not yet locked, for a leftover
                aside = None if force else until_done.enter_context(unfinished(folder, made_of))
                remove_leftovers(folder)
                if aside is None:
                    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=folder))
                    until_done.enter_context(locked(aside))
            try:
                prepared = yield from write_all(config, aside, text, known, made_of)
                publish(aside, folder)
            except BaseException as error:
                # Who prepares the same again goes on from what a kill, or Ctrl-C, has left.
                if isinstance(error, Exception) or read_journal(aside, made_of) is None:
                    shutil.rmtree(aside, ignore_errors=True)
                    if not any(folder.iterdir()):
                        folder.rmdir()
                raise
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
        other = "from something else" if prepared else "by another version of tinyllm"
        what = f"the data was prepared {other}:\n  " + "\n  ".join(changes)
        fix = "`tinyllm prepare run.toml` prepares it again; another data.dir keeps this one too"
        raise DataError(what, where=str(Path(config.dir) / "meta.json"), fix=fix)
    return prepared


def reopen(config: DataConfig, thorough: bool = False) -> tuple[Prepared | None, list[str]]:
    """What is in `data.dir`, and how config and inputs differ from what made it. Raises DataError.

    `thorough`: look at all the ids of a large file too.
    """
    folder = Path(config.dir)
    where, again = str(folder / "meta.json"), "`tinyllm prepare run.toml --force` prepares the data again"
    try:
        finish_move(folder)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["version"] != VERSION:
            return None, [f"format: {meta['version']} -> {VERSION}"]
        if meta.pop("sha256") != digest(json.dumps(meta)):
            raise ValueError("another SHA-256")
        tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
        report, files = meta["report"], meta["files"]
        report |= {"dir": config.dir, "tokenizer_json": tokenizer_json, "fingerprint": meta["fingerprint"]}
        report |= {split: Split(**report[split]) for split in ("train", "val")}
        prepared = Prepared(**report)
    except FileNotFoundError as error:
        missing = Path(error.filename)
        fix = "`tinyllm prepare run.toml` makes it" if missing.name == "meta.json" else again
        raise DataError("no prepared data: there is no such file", where=str(missing), fix=fix) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=where, fix=again) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"damaged: {type(error).__name__}: {error}", where=where, fix=again) from None
    if digest(tokenizer_json) != prepared.tokenizer_hash:
        what = "it has been changed since the data was prepared"
        raise DataError(what, where=str(folder / "tokenizer.json"), fix=again)
    for name, split in (("train.bin", prepared.train), ("val.bin", prepared.val)):
        path = folder / name
        header = read_header(path)
        of_split = split.tokens, split.text_bytes, prepared.vocab_size, prepared.tokenizer_hash
        if header != Header(*of_split, header.itemsize, split.ids_hash):
            raise DataError("it belongs to another preparation", where=str(path), fix=again)
        is_small = path.stat().st_size <= HEADER_SIZE + READ_AT_ONCE
        if (thorough or is_small) and ids_hash(path) != header.ids_hash:
            raise DataError("damaged: its ids are not those that were written", where=str(path), fix=again)
    # The config may be that of a stranger's checkpoint, and name any file or folder: look only at what was read then.
    before = {key: value for key, value in prepared.fingerprint.items() if not key.startswith("file ")}
    changes = differences(before, settings_of(config))
    return prepared, changes or differences(prepared.fingerprint, fingerprint(config, files))


# ---- The fingerprint ----


def fingerprint(config: DataConfig, known: dict[str, Any]) -> dict[str, Any]:
    """All that determines the result, flat. `known`: what `stats` said last time. Raises DataError.

    What is gone has not changed: prepared data can be used where its sources are not, on another machine say.
    """
    try:
        files = read_files(config)
    except DataError:
        if not known:
            raise
        files = None
    now = known if files is None else stats(files, known)
    texts = {name: f"{file['size']} bytes, {file['sha256'][:16]}" for name, file in now.items()}
    # A name is shown in errors, and a key of the checkpoint.
    shown = {name if name.isprintable() else ascii(name): text for name, text in texts.items()}
    return settings_of(config) | {f"file {name}": text for name, text in shown.items()}


def settings_of(config: DataConfig) -> dict[str, Any]:
    """The part of the fingerprint that is in the config; no file is looked at."""
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
    return settings


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for each difference of two fingerprints."""

    def shown(settings: dict[str, Any], key: str) -> str:
        return json.dumps(settings[key], ensure_ascii=False) if key in settings else "none"

    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {shown(old, key)} -> {shown(new, key)}" for key in keys]


def read_files(config: DataConfig) -> list[Input]:
    """Every file the result depends on: the text's, and the tokenizer's when that is one."""
    own = () if config.tokenizer in KINDS else (Input(config.tokenizer, Path(os.path.expanduser(config.tokenizer))),)
    return [*inputs(config), *own]


# ---- Making the files ----


def looked_at(config: DataConfig) -> Generator[Progress, None, tuple[Extent, dict[str, Any]]]:
    """How long the text is, and what `stats` says of the inputs: both read all of it, at once. Raises DataError."""
    meter = Meter()
    with ThreadPoolExecutor(1, "tinyllm-hashing") as pool:
        known = pool.submit(stats, read_files(config), {}, meter)
        try:
            text = yield from extent(config, inputs(config))
            return text, known.result()
        finally:
            meter.stopped = True


def write_all(
    config: DataConfig, folder: Path, text: Extent, known: dict[str, Any], made_of: dict[str, Any]
) -> Generator[Progress, None, Prepared]:
    """Make all four files in `folder`, or what is missing of them. `known`: what `stats` says of the inputs."""
    files = inputs(config)

    def texts(meter: Meter) -> Iterator[str]:
        meter.total = text.text_bytes
        for split, piece in divided(config, files, text):
            meter.update(len(piece.text.encode()))
            # A BPE learns from the training split only. Characters come from all of the text: no figure is
            # better for it, and the validation split would not be encodable if it had a character of its own.
            if split == "train" or config.tokenizer != "bpe":
                yield piece.text

    def work(meter: Meter) -> Tokenizer:
        return build(config.tokenizer, texts(meter), vocab_size=config.vocab_size, documents=text.marked)

    if done := read_journal(folder, made_of):
        tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
        tokenizer = from_json(tokenizer_json)
    else:
        tokenizer = yield from watched(f"{'training' if config.tokenizer == 'bpe' else 'making'} the tokenizer", work)
        tokenizer_json = to_json(tokenizer)
        write_text(folder / "tokenizer.json", tokenizer_json)
        write_journal(folder, made_of, done := Done(digest(tokenizer_json)))
    encoder, end = Encoder(tokenizer), end_of_text(tokenizer)
    vocab_size = len(encoder.sizes)
    parts = encoded(divided(config, files, text), encoder, end, config.source, skip=done.batches)
    done = yield from write_tokens(parts, folder, made_of, done, vocab_size=vocab_size, total=text.text_bytes)
    if done.train.characters + done.val.characters != text.characters:
        raise DataError("the text changed while it was being read", where=config.source, fix="prepare again")
    for part in compare(open_tokens(folder / "train.bin")[0], open_tokens(folder / "val.bin")[0], vocab_size):
        if isinstance(part, Baselines):
            baselines = part
        else:
            yield Progress("comparing the splits", int(text.text_bytes * part), text.text_bytes)
    prepared = Prepared(
        dir=config.dir,
        source=config.source,
        tokenizer=config.tokenizer,
        vocab_size=vocab_size,
        tokenizer_json=tokenizer_json,
        tokenizer_hash=done.tokenizer_hash,
        train=done.train,
        val=done.val,
        unigram_entropy=baselines.unigram,
        bigram_entropy=baselines.bigram,
        overlap=baselines.overlap,
        entropy=None if done.log_prob is None else -done.log_prob / done.val.tokens,
        fingerprint=fingerprint(config, known),
    )
    report = asdict(prepared)
    for elsewhere in ("dir", "tokenizer_json", "fingerprint", "reasons"):
        del report[elsewhere]
    write_meta(folder, {"version": VERSION, "fingerprint": prepared.fingerprint, "files": known, "report": report})
    (folder / JOURNAL).unlink()
    return prepared


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, with the hash of all that it says."""
    meta = {key: value for key, value in meta.items() if key != "sha256"}
    sealed = meta | {"sha256": digest(json.dumps(meta))}
    write_text(folder / "meta.json", json.dumps(sealed, indent=1, ensure_ascii=False) + "\n")


# ---- Putting the files into their place ----


def publish(aside: Path, folder: Path) -> None:
    """Put the files made in `aside` into `folder`. Once `aside` has its new name they are what counts.

    Moving four files is not one act, but renaming their folder is; if the moves are cut short, whoever opens
    the data next does the rest. Of two that are done at the same time one waits for the other.
    """
    with locked(folder, wait=True):
        finish_move(folder)
        os.replace(aside, folder / READY)
        finish_move(folder)


def finish_move(folder: Path) -> None:
    """Do what is left of a `publish`."""
    ready = folder / READY
    if not ready.is_dir():
        return
    for name in FILES:
        with suppress(FileNotFoundError):  # moved already, before a kill or by somebody else who opens the data now
            os.replace(ready / name, folder / name)
    with suppress(FileNotFoundError):
        ready.rmdir()


@contextmanager
def unfinished(folder: Path, made_of: dict[str, Any]) -> Iterator[Path | None]:
    """The locked folder of a `prepare` of the same that was cut short, whose journal can be read; None for none."""
    for old in folder.glob(ASIDE + "*"):
        with locked(old) as free:
            if free and read_journal(old, made_of):
                yield old
                return
    yield None


def remove_leftovers(folder: Path) -> None:
    """Remove what killed `prepare`s left: folders that nobody has locked.

    Where that cannot be known, those in which nothing has been written for an hour.
    """
    for old in folder.glob(ASIDE + "*"):
        with locked(old) as free:
            if free is None:
                times = [path.stat().st_mtime for path in (old, *old.glob("*")) if path.exists()]
                free = time.time() - max(times, default=time.time()) > 3600
            if free:
                shutil.rmtree(old, ignore_errors=True)
