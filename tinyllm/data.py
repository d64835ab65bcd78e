"""Token files and the batches drawn from them.

A token file is a 128-byte header (see `Header`) followed by token ids, little-endian uint16 or uint32.

    with TokenWriter("data/train.bin", vocab_size=65, tokenizer_hash=hash) as out:
        out.write([1, 2, 3], text_bytes=3)
    tokens, header = open_tokens("data/train.bin")          # memory-mapped: costs nothing until it is read
    ids_hash("data/train.bin") == header.ids_hash           # whether the ids are those that were written
    source = BatchSource(train=tokens, val=..., block_size=64, batch_size=12, seed=1337)
    inputs, targets = source.batch(step=0)                  # each (batch_size, block_size), int64

`batch(step)` is a pure function of (seed, step): there is no position to save and none to lose, batches can be
prepared ahead, and micro-batches are slices of the global batch. NumPy only; the engine turns arrays into tensors.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Semaphore, Thread
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from tinyllm.errors import DataError

MAGIC = b"tinyllm\n"
VERSION = 2  # 1 had no hash of the ids
# Magic, version, bytes a token, tokens, bytes of text, vocabulary, tokenizer's SHA-256, hash of the ids.
HEADER_FORMAT = "<8sIIQQI32s32s"
HEADER_SIZE = 128  # padded: room for later fields, and the ids stay aligned
PIECE = 1 << 20  # bytes of ids that have a SHA-256 of their own, so that several cores can look at a file
IGNORED = -100  # a target that does not count; torch's cross_entropy knows it by this number
DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
T = TypeVar("T")


@dataclass(frozen=True)
class Header:
    """What a token file says about itself."""

    count: int  # tokens
    text_bytes: int  # UTF-8 bytes of the text they stand for
    vocab_size: int
    tokenizer_hash: str  # SHA-256 of tokenizer.json, hexadecimal
    itemsize: int  # bytes a token: 2 up to 65,536 tokens in the vocabulary, else 4
    ids_hash: str  # SHA-256 of the SHA-256s of each MiB of ids, hexadecimal

    def pack(self) -> bytes:
        hashes = bytes.fromhex(self.tokenizer_hash), bytes.fromhex(self.ids_hash)
        fields = (self.itemsize, self.count, self.text_bytes, self.vocab_size, *hashes)
        return struct.pack(HEADER_FORMAT, MAGIC, VERSION, *fields).ljust(HEADER_SIZE, b"\0")


class TokenWriter:
    """Writes a token file beside its place and moves it there once it is whole. A context manager.

    An error removes what was written. A kill or Ctrl-C leaves it, and another writer can go on after what was synced:
    `done` are the count, text_bytes and ids_hash of then. Raises DataError when that is not what is there.
    """

    def __init__(
        self, path: str | Path, *, vocab_size: int, tokenizer_hash: str, done: tuple[int, int, str] | None = None
    ) -> None:
        self.path = Path(path)
        self.aside = self.path.with_name(self.path.name + ".tmp")
        self.vocab_size, self.tokenizer_hash = vocab_size, tokenizer_hash
        self.dtype = DTYPES[2 if vocab_size <= 1 << 16 else 4]
        self.done = done
        self.count = self.text_bytes = 0
        self.hashes: list[bytes] = []  # of the pieces written
        self.rest = b""  # of the ids written, not yet a piece

    def __enter__(self) -> Self:
        if self.done is None:
            self.file = open(self.aside, "wb")
            self.file.write(bytes(HEADER_SIZE))
        else:
            if not self.aside.exists():  # it was whole, and moved
                os.replace(self.path, self.aside)
            self.file = open(self.aside, "r+b")
            try:
                self.take_over(*self.done)
            except BaseException:
                self.file.close()
                raise
        return self

    def take_over(self, count: int, text_bytes: int, ids_hash: str) -> None:
        """Go on after what another writer has synced."""
        self.count, self.text_bytes = count, text_bytes
        self.file.truncate(HEADER_SIZE + count * self.dtype.itemsize)
        self.file.seek(HEADER_SIZE)
        while len(piece := self.file.read(PIECE)) == PIECE:
            self.hashes.append(hashlib.sha256(piece).digest())
        self.rest = piece
        if self.header.ids_hash != ids_hash:
            fix = "prepare again, which begins anew"
            raise DataError("damaged: it is not what was written", where=str(self.aside), fix=fix)

    def write(self, ids: Sequence[int] | np.ndarray, text_bytes: int) -> None:
        """Append ids, which stand for `text_bytes` bytes of text. Raises DataError for an id out of range."""
        array = np.asarray(ids)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            what = f"token ids {array.min()} to {array.max()} do not fit the vocabulary of {self.vocab_size}"
            raise DataError(what, where=str(self.path))
        written = array.astype(self.dtype).tobytes()
        self.file.write(written)
        # Of what is meant, not of what the disk has made of it.
        self.rest += written
        end = len(self.rest) // PIECE * PIECE
        self.hashes += [hashlib.sha256(self.rest[first : first + PIECE]).digest() for first in range(0, end, PIECE)]
        self.rest = self.rest[end:]
        self.count += array.size
        self.text_bytes += text_bytes

    def sync(self) -> None:
        """Have on the disk what has been written so far."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.file.seek(0)
                self.file.write(self.header.pack())
                self.sync()
            self.file.close()
            if kind is None:
                os.replace(self.aside, self.path)
        except Exception:  # a full disk: what is written is of no use
            self.aside.unlink(missing_ok=True)
            raise
        finally:
            self.file.close()
        if kind is not None and issubclass(kind, Exception):
            self.aside.unlink(missing_ok=True)

    @property
    def header(self) -> Header:
        """What the file says of itself, of what has been written so far."""
        hashes = [*self.hashes, hashlib.sha256(self.rest).digest()] if self.rest else self.hashes
        ids_hash = hashlib.sha256(b"".join(hashes)).hexdigest()
        itemsize = self.dtype.itemsize
        return Header(self.count, self.text_bytes, self.vocab_size, self.tokenizer_hash, itemsize, ids_hash)


def read_header(path: str | Path) -> Header:
    """The header of a token file, checked against the file's size. Raises DataError."""
    where, again = str(path), "prepare the data again: `tinyllm prepare run.toml --force`"
    try:
        with open(path, "rb") as file:
            head = file.read(HEADER_SIZE)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise DataError("no such token file", where=where, fix="`tinyllm prepare run.toml` makes it") from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=where) from None
    if len(head) < HEADER_SIZE or not head.startswith(MAGIC):
        raise DataError("not a token file of tinyllm", where=where, fix=again)
    _, version, itemsize, count, text_bytes, vocab_size, *hashes = struct.unpack_from(HEADER_FORMAT, head)
    if version != VERSION:
        what = f"token file of version {version}; this tinyllm reads version {VERSION}"
        raise DataError(what, where=where, fix=again)
    header = Header(count, text_bytes, vocab_size, hashes[0].hex(), itemsize, hashes[1].hex())
    if itemsize not in DTYPES or head != header.pack():  # something where nothing is written
        raise DataError("damaged: its header is not one that we write", where=where, fix=again)
    if size != HEADER_SIZE + count * itemsize:
        what = f"the header says {count:,} tokens, the file holds {(size - HEADER_SIZE) / itemsize:,.1f}"
        raise DataError(what, where=where, fix=again)
    return header


def ids_hash(path: str | Path) -> str:
    """The hash of the ids that are in a token file, whatever its header says. Raises DataError when it cannot be read.

    Reads all of them, on all cores: two take 0.1 s for 100 MB.
    """

    def hash_of(first: int) -> bytes:
        with open(path, "rb") as file:  # a disk that fails is an error here; under a memory map it is a crash
            file.seek(first)
            return hashlib.sha256(file.read(PIECE)).digest()

    try:
        with ThreadPoolExecutor() as pool:
            hashes = b"".join(pool.map(hash_of, range(HEADER_SIZE, os.stat(path).st_size, PIECE)))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return hashlib.sha256(hashes).hexdigest()


def open_tokens(path: str | Path) -> tuple[np.ndarray, Header]:
    """The ids of a token file as a read-only memory map, (count,), and its header. Raises DataError."""
    header = read_header(path)
    if header.count == 0:
        return np.empty(0, DTYPES[header.itemsize]), header
    return np.memmap(path, DTYPES[header.itemsize], "r", HEADER_SIZE, (header.count,)), header


class BatchSource:
    """Batches of windows of two token arrays.

    Windows lie end to end; with `end_token`, the id that ends a document, each begins where a document does (or, in a
    long one, block_size tokens on), so that a token is predicted from its own document, not from the rest of another.
    Raises DataError when a split is too short for one window, or has no document ends though `end_token` is given.
    """

    def __init__(
        self,
        *,
        train: np.ndarray,
        val: np.ndarray,
        block_size: int,
        batch_size: int,
        seed: int,
        end_token: int | None = None,
        where: str = "",
    ) -> None:
        self.splits = {"train": train, "val": val}
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        for name, tokens in self.splits.items():
            if len(tokens) <= block_size:
                what = (
                    f"the {name} split has {len(tokens):,} tokens; one window needs block_size + 1 = {block_size + 1:,}"
                )
                fix = f"more text, another data.val_fraction, or model.block_size below {max(len(tokens), 2):,}"
                raise DataError(what, where=where, fix=fix)
        # Found once: the documents of a large split are many, and every evaluation asks for them.
        self.documents: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.starts: np.ndarray | None = None
        if end_token is not None:
            if not len(document_ends(train, end_token)):
                fix = "set train.align_documents = false"
                raise DataError("train.align_documents is set, but no document's end is marked", where=where, fix=fix)
            self.documents = {name: document_windows(t, end_token, block_size) for name, t in self.splits.items()}
            starts, _ = self.documents["train"]
            self.starts = starts[starts < len(train) - block_size]  # the others are cut off by the split's end

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The global batch of a step: inputs and targets, each (batch_size, block_size), int64.

        An epoch reads each window once, in random order; the next one cuts the text at another offset. All of it
        follows from (seed, step) alone: sequence k of the run is window permuted(k mod n) of epoch k div n.
        """
        tokens, size = self.splits["train"], self.block_size
        # One window less than fit end to end, so that the offset has room to differ.
        n_windows = max((len(tokens) - 1) // size - 1, 1) if self.starts is None else len(self.starts)
        epochs, places = np.divmod(step * self.batch_size + np.arange(self.batch_size), n_windows)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs):
            key = splitmix64(np.array([self.seed, epoch], np.uint64))
            rows = epochs == epoch
            shuffled = permuted(places[rows], n_windows, key)
            if self.starts is None:
                room = len(tokens) - n_windows * size
                starts[rows] = shuffled * size + int(mixed(key[0], key[1]) % np.uint64(room))
            else:
                starts[rows] = self.starts[shuffled]
        return windows(tokens, starts, size)

    def eval_batches(self, split: str, n_windows: int, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Windows of a split that are the same at each call, in batches of at most `rows`.

        `n_windows` evenly spread ones, or, for 0, as many as the validation split has; the training split is read at as
        many places, so that the two losses compare. Over the whole split each target is predicted once: where a window
        reaches beyond its document or the split's end, its targets are IGNORED.
        """
        total = self.count_windows(split)
        count = min(n_windows or self.count_windows("val"), total)
        chosen = np.arange(count) * total // count
        for first in range(0, count, rows):
            starts, lengths = self.places(split, chosen[first : first + rows])
            yield windows(self.splits[split], starts, self.block_size, lengths)

    def count_windows(self, split: str) -> int:
        """How many windows a whole split has, the shorter ones included."""
        if self.documents:
            return len(self.documents[split][0])
        return -(-(len(self.splits[split]) - 1) // self.block_size)

    def places(self, split: str, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where windows of a whole split start, and how many targets each has, by their numbers; all (k,), int64."""
        if self.documents:
            starts, lengths = self.documents[split]
            return starts[numbers], lengths[numbers]
        starts = numbers * self.block_size
        return starts, np.minimum(self.block_size, len(self.splits[split]) - 1 - starts)


def document_windows(tokens: np.ndarray, end_token: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts of windows that begin with a document, and the targets each has; both (windows,), int64.

    A window starts on the end of the document before, whose target is the first token of its own. A document of more
    than `size` tokens goes on in further windows.
    """
    bounds = np.unique(np.concatenate([[0], document_ends(tokens, end_token), [len(tokens) - 1]]))
    pieces = -(-np.diff(bounds) // size)
    first_piece = np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(bounds[:-1], pieces) + (np.arange(pieces.sum()) - first_piece) * size
    return starts, np.minimum(size, np.repeat(bounds[1:], pieces) - starts)


def document_ends(tokens: np.ndarray, end_token: int) -> np.ndarray:
    """Where documents end, (ends,), int64."""
    parts = range(0, len(tokens), 1 << 24)  # a memory map is read part by part
    return np.concatenate([np.flatnonzero(tokens[first : first + (1 << 24)] == end_token) + first for first in parts])


def permuted(index: np.ndarray, n: int, key: np.ndarray) -> np.ndarray:
    """Where a random permutation of range(n), chosen by key (2,), uint64, sends each index; both (k,), int64.

    A Feistel network shuffles the numbers below a power of four that is not below n; an index that it sends beyond n
    goes through it again ("cycle walking", Black & Rogaway 2002). So a place in the shuffle costs the same at any n,
    and no memory.
    """
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = index.astype(np.uint64)
    todo = np.ones(len(result), bool)
    while todo.any():
        left, right = result[todo] >> half, result[todo] & mask
        for number in range(6):
            left, right = right, left ^ (mixed(right + (np.uint64(number) << half), key[0], key[1]) & mask)
        result[todo] = left << half | right
        todo = result >= n
    return result.astype(np.int64)


def mixed(*values: np.ndarray) -> np.ndarray:
    """One well-mixed uint64 of several."""
    state = np.uint64(0)
    for value in values:
        state = splitmix64(value ^ state)
    return state


def splitmix64(x: np.ndarray) -> np.ndarray:
    """A well-mixed 64-bit function of each element, uint64 (Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def windows(
    tokens: np.ndarray, starts: np.ndarray, size: int, lengths: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, each (len(starts), size), int64: targets are the inputs one token on. The one shift.

    With `lengths` (len(starts),) the targets from there on are IGNORED, and a window may reach beyond the array's end.
    """
    places = starts[:, None] + np.arange(size + 1)
    if lengths is None:
        rows = tokens[places].astype(np.int64)
        return rows[:, :-1], rows[:, 1:]
    rows = tokens[np.minimum(places, len(tokens) - 1)].astype(np.int64)
    return rows[:, :-1], np.where(np.arange(size) < lengths[:, None], rows[:, 1:], IGNORED)


def prefetch(
    make: Callable[[int], T], first: int, last: int, ahead: int, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[T]:
    """make(first), ..., make(last - 1), the next `ahead` of them prepared by a background thread.

    Ends when asked to stop while it waits for one: a file may be on a disk that hangs. The thread is then left behind;
    it keeps nobody from ending.
    """
    if ahead == 0:
        yield from map(make, range(first, last))
        return
    made: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
    asked_for, left = Semaphore(ahead + 1), Event()

    def work() -> None:
        for index in range(first, last):
            asked_for.acquire()
            if left.is_set():
                return
            try:
                made.put((make(index), None))
            except BaseException as error:
                made.put((None, error))
                return

    thread = Thread(target=work, name="tinyllm-batches", daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            if (batch := next_of(made, should_stop)) is None:
                return
            value, error = batch
            if error:
                raise error
            yield value
            asked_for.release()
    finally:
        left.set()
        asked_for.release()
        thread.join(1.0)


def next_of(queue: "SimpleQueue[T]", should_stop: Callable[[], bool]) -> T | None:
    """The next value of a queue; None if asked to stop before there is one."""
    while True:
        try:
            return queue.get(timeout=0.2)
        except Empty:
            if should_stop():
                return None
