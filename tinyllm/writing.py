"""Pieces of text to token files, on all cores; who is cut short goes on where it was.

    done = read_journal(folder, made_of)                     # of one that was killed here; None: begin
    parts = encoded(pieces, encoder, end, source, skip=done.batches)
    for event in write_tokens(parts, folder, ...):           # Progress; returns the Done of the end
        ...

Every few seconds the ids written so far are synced and the journal, a small file beside them, says how far that is. The
same text gives the same pieces again, so those that are done are skipped and the rest is written after them: the files
end up the same, bit by bit.
"""

import json
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.data import TokenWriter
from tinyllm.download import Progress
from tinyllm.encoding import Encoder
from tinyllm.files import write_text
from tinyllm.numbers import size_of
from tinyllm.process import usable_cores
from tinyllm.sources import Piece
from tinyllm.tokenizer import digest

BATCH = 1 << 19  # characters tokenized at once; by characters that takes about 100 bytes of memory each
JOURNAL, TOKENIZER = "journal.json", "tokenizer.json"
INTERVAL = 5.0  # seconds between two entries in the journal


@dataclass(frozen=True)
class Split:
    """The size of a split. `text_bytes` are UTF-8. Each document's end is one more token, without text."""

    tokens: int = 0
    text_bytes: int = 0
    characters: int = 0
    documents: int = 0
    ids_hash: str = ""  # as in the file's header


@dataclass(frozen=True)
class Done:
    """How far the token files have come."""

    tokenizer_hash: str  # SHA-256 of tokenizer.json
    train: Split = Split()
    val: Split = Split()
    log_prob: float | None = 0.0  # of the validation split's texts, nats; None for texts of which nobody knows it
    batches: int = 0


def read_journal(folder: Path, made_of: dict[str, Any]) -> Done | None:
    """How far a preparation of the same had come in this folder; None for one that cannot go on."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        entry = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        whole = entry.pop("sha256") == digest(json.dumps(entry))
        done = Done(**entry["done"] | {name: Split(**entry["done"][name]) for name in ("train", "val")})
        tokenizer_hash = digest((folder / TOKENIZER).read_text(encoding="utf-8"))
        if whole and entry["made_of"] == made_of and tokenizer_hash == done.tokenizer_hash:
            return done
    return None


def write_journal(folder: Path, made_of: dict[str, Any], done: Done) -> None:
    entry = {"made_of": made_of, "done": asdict(done)}
    write_text(folder / JOURNAL, json.dumps(entry | {"sha256": digest(json.dumps(entry))}))


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


def encoded(
    parts: Iterator[tuple[str, Piece]], encoder: Encoder, end: int | None, source: str, skip: int = 0
) -> Iterator[tuple[str, list[Piece], np.ndarray]]:
    """Pieces of one split together with their ids, in order; a few batches ahead are encoded, on all cores.

    The first `skip` batches are left out.
    """
    mark = np.array([] if end is None else [end], dtype=np.uint32)

    def ids_of(batch: list[Piece]) -> np.ndarray:
        rows = encoder([piece.text for piece in batch], source)
        return np.concatenate([ids for row, piece in zip(rows, batch, strict=True) for ids in (row, mark[: piece.end])])

    cores = usable_cores()
    waiting: deque[tuple[str, list[Piece], Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(cores, "tinyllm-encoding") as pool:
        for split, batch in islice(batches(parts), skip, None):
            waiting.append((split, batch, pool.submit(ids_of, batch)))
            if len(waiting) > 2 * cores:
                split, batch, future = waiting.popleft()
                yield split, batch, future.result()
        for split, batch, future in waiting:
            yield split, batch, future.result()


def write_tokens(
    parts: Iterator[tuple[str, list[Piece], np.ndarray]],
    folder: Path,
    made_of: dict[str, Any],
    done: Done,
    *,
    vocab_size: int,
    total: int,
) -> Generator[Progress, None, Done]:
    """Write train.bin and val.bin, after what is `done`, of `total` bytes of text.

    Raises DataError for ids out of range, or if what is done is not there.
    """
    before = {"train": done.train, "val": done.val}
    characters = {name: split.characters for name, split in before.items()}
    documents = {name: split.documents for name, split in before.items()}
    log_prob, count, noted = done.log_prob, done.batches, time.monotonic()
    there = done.train.text_bytes + done.val.text_bytes
    doing = f"writing tokens, after the first {size_of(there)}" if there else "writing tokens"
    with ExitStack() as files:
        writers = {
            name: files.enter_context(
                TokenWriter(
                    folder / f"{name}.bin",
                    vocab_size=vocab_size,
                    tokenizer_hash=done.tokenizer_hash,
                    done=(split.tokens, split.text_bytes, split.ids_hash) if done.batches else None,
                )
            )
            for name, split in before.items()
        }

        def so_far() -> Done:
            sizes = {
                name: Split(out.count, out.text_bytes, characters[name], documents[name], out.header.ids_hash)
                for name, out in writers.items()
            }
            return replace(done, **sizes, log_prob=log_prob, batches=count)

        def note() -> None:
            for writer in writers.values():
                writer.sync()
            write_journal(folder, made_of, so_far())

        for split, batch, ids in parts:
            writers[split].write(ids, sum(len(piece.text.encode()) for piece in batch))
            characters[split] += sum(len(piece.text) for piece in batch)
            documents[split] += sum(piece.end for piece in batch)
            for piece in batch if split == "val" else ():
                log_prob = None if log_prob is None or piece.log_prob is None else log_prob + piece.log_prob
            count += 1
            if time.monotonic() - noted >= INTERVAL:
                note()
                noted = time.monotonic()
            yield Progress(doing, sum(out.text_bytes for out in writers.values()), total)
        note()
    return so_far()
