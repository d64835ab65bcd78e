"""How hard a validation split is before any model: the losses of counting, and how much of it was seen in training.

    *shares, baselines = compare(train, val, vocab_size=65)     # token arrays; the shares are how far it is
    baselines.bigram                                            # a model that learns must come below it

One pass over the training split in chunks, so that memory stays flat however long it is. NumPy only.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from tinyllm.process import usable_cores

CHUNK = 1 << 20  # tokens of the training split compared at once
HASHED = 1 << 16  # of them hashed at once: that stays in a core's cache
PAIRS = 1 << 24  # of the training split's pairs of tokens are counted, about
WINDOW = 64  # tokens; a power of two
PRIOR = 50.0  # tokens; see `compare`. Of 1 to 500 the best, or near it, by characters, BPE and GPT-2 alike


@dataclass(frozen=True)
class Baselines:
    """What counting the training split knows of the validation split."""

    unigram: float  # nats a token of the validation split, under the counts of the training split
    bigram: float  # the same, given the token before
    overlap: float  # share of the validation split's windows of 64 tokens that occur in the training split


def compare(train: np.ndarray, val: np.ndarray, vocab_size: int) -> Iterator[float | Baselines]:
    """The baselines of two token arrays, (tokens,) each; on the way, the shares (0 to 1) that are done.

    The bigram loss is that of the first 4 million tokens, which fixes it to three digits, by the pairs of 16 million
    training tokens or a little less, evenly spread.
    """
    pairs, pair_uses = np.unique(pair_codes(val[: 4 * CHUNK], vocab_size), return_counts=True)
    whole = len(val) // WINDOW * WINDOW
    chunks = [val[start : min(start + CHUNK, whole)] for start in range(0, whole, CHUNK)]
    rows = [window_hashes(chunk.reshape(-1, WINDOW))[:, 0] for chunk in chunks]
    hashes, hash_uses = np.unique(np.concatenate([np.empty(0, np.uint64), *rows]), return_counts=True)
    # Most windows of the training split are ruled out by the first 22 bits of their hash.
    maybe = np.zeros(1 << 22, dtype=bool)
    maybe[hashes >> np.uint64(42)] = True
    starts = range(0, len(train), CHUNK)
    counted = set(starts[:: -(-len(train) // PAIRS)])  # of a long text the pairs of every n-th chunk will do

    def look(start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of a chunk: the counts of its tokens, which pairs it has how often, which windows."""
        chunk = train[start : start + CHUNK + WINDOW - 1]
        codes, uses = np.empty(0, np.int64), np.empty(0, np.int64)
        if start in counted:
            codes, uses = np.unique(pair_codes(chunk[: CHUNK + 1], vocab_size), return_counts=True)
        at, found = positions(codes, pairs)
        parts = (window_hashes(chunk[first : first + HASHED + WINDOW - 1]) for first in range(0, len(chunk), HASHED))
        windows, _ = positions(np.concatenate([own[maybe[own >> np.uint64(42)]] for own in parts]), hashes)
        return np.bincount(chunk[:CHUNK], minlength=vocab_size), at, uses[found], windows

    counts, pair_counts = np.zeros(vocab_size, np.int64), np.zeros(len(pairs), np.int64)
    firsts, seen = np.zeros(vocab_size, np.int64), np.zeros(len(hashes), dtype=bool)
    with ThreadPoolExecutor(usable_cores()) as pool:  # NumPy lets other threads work meanwhile
        for start, (tokens, at, uses, windows) in zip(starts, pool.map(look, starts), strict=True):
            counts += tokens
            firsts += tokens if start in counted else 0
            pair_counts[at] += uses
            seen[windows] = True
            yield min(start + CHUNK, len(train)) / len(train)
    unigram = (counts + 1) / (counts.sum() + vocab_size)
    uses = np.bincount(val, minlength=vocab_size)
    unigram_loss = (uses * np.log(1 / unigram)).sum() / uses.sum()
    left, right = pairs // vocab_size, pairs % vocab_size
    # The unigram is the prior of each row (MacKay and Peto 1995): unseen pairs have a probability too.
    bigram = (pair_counts + PRIOR * unigram[right]) / (firsts[left] + PRIOR)
    bigram_loss = (pair_uses * np.log(1 / bigram)).sum() / max(pair_uses.sum(), 1)
    overlap = hash_uses[seen].sum() / max(hash_uses.sum(), 1)
    yield Baselines(float(unigram_loss), float(bigram_loss), float(overlap))


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
