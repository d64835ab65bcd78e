"""Mistakes in the data, the tokenizer and the batches."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np

from planted.bug import bug
from tinyllm.data import HEADER_SIZE, ids_hash, open_tokens, read_header
from tinyllm.prepare import write_meta
from tinyllm.tokenizer import digest, end_of_text, from_json, token_bytes


def rewrite(path: Path, change, *, counted: bool = False, hashed: bool = True) -> None:
    """Replace the ids of a token file by `change` of them, with their hash, as a script of one's own would write them.

    `counted`: what is written about them is true of the new ones. `hashed`: false for a file that was damaged later.
    """
    ids = np.array(open_tokens(path)[0])
    head, new = bytearray(path.read_bytes()[:HEADER_SIZE]), change(ids).astype(ids.dtype)
    if counted:
        tokenizer = from_json((path.parent / "tokenizer.json").read_text())
        text_bytes = int(token_bytes(tokenizer)[new].sum())
        struct.pack_into("<Q", head, 24, text_bytes)
        meta = json.loads((path.parent / "meta.json").read_text())
        documents = int((new == end_of_text(tokenizer)).sum())
        meta["report"][path.stem] |= {"text_bytes": text_bytes, "characters": text_bytes, "documents": documents}
        write_meta(path.parent, meta)
    path.write_bytes(head + new.tobytes())
    if hashed:
        header = replace(read_header(path), ids_hash=ids_hash(path))
        path.write_bytes(header.pack() + new.tobytes())
        meta = json.loads((path.parent / "meta.json").read_text())
        meta["report"][path.stem]["ids_hash"] = header.ids_hash
        write_meta(path.parent, meta)


def swap_bytes(folder: Path) -> None:
    for name in ("train.bin", "val.bin"):
        rewrite(folder / name, lambda ids: ids.byteswap())


def half_empty(folder: Path) -> None:
    rewrite(folder / "train.bin", lambda ids: np.where(np.arange(len(ids)) < len(ids) // 2, ids, 0))


def one_token(folder: Path) -> None:
    rewrite(folder / "train.bin", lambda ids: np.full_like(ids, 7))


def repeats_itself(folder: Path) -> None:
    rewrite(folder / "train.bin", lambda ids: np.resize(ids[: len(ids) // 20], len(ids)), counted=True)


def validation_from_training(folder: Path) -> None:
    training = np.array(open_tokens(folder / "train.bin")[0])
    rewrite(folder / "val.bin", lambda ids: training[1000 : 1000 + len(ids)], counted=True)


def half_of_validation_from_training(folder: Path) -> None:
    training = np.array(open_tokens(folder / "train.bin")[0])
    half = len(open_tokens(folder / "val.bin")[0]) // 2
    rewrite(folder / "val.bin", lambda ids: np.concatenate([ids[:half], training[: len(ids) - half]]), counted=True)


def another_language(folder: Path) -> None:
    """A validation split whose letters are used as another language uses them."""
    end = end_of_text(from_json((folder / "tokenizer.json").read_text()))
    rewrite(folder / "val.bin", lambda ids: np.where(ids == end, end, (ids * 7 + 3) % end), counted=True)


def shuffled_tokens(folder: Path) -> None:
    rewrite(folder / "train.bin", lambda ids: np.random.default_rng(0).permutation(ids))


def shuffled_validation(folder: Path) -> None:
    rewrite(folder / "val.bin", lambda ids: np.random.default_rng(0).permutation(ids))


def shuffled_later(folder: Path) -> None:
    def later(ids):
        half = len(ids) // 2
        return np.concatenate([ids[:half], np.random.default_rng(0).permutation(ids[half:])])

    rewrite(folder / "train.bin", later, hashed=False)


def one_flipped_bit(folder: Path) -> None:
    rewrite(folder / "val.bin", lambda ids: ids ^ (np.arange(len(ids)) == len(ids) // 2), hashed=False)


def other_ids(folder: Path) -> None:
    """Put the vocabulary of tokenizer.json into another order."""
    made = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = made["model"]["vocab"]
    made["model"]["vocab"] = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(made, ensure_ascii=False))


def tokenizer_replaced(folder: Path) -> None:
    other_ids(folder)


def tokenizer_retrained(folder: Path) -> None:
    """As a script of one's own does it: all hashes are those of the new tokenizer, the ids those of the old one."""
    other_ids(folder)
    new = digest((folder / "tokenizer.json").read_text())
    meta = json.loads((folder / "meta.json").read_text())
    old = meta["report"]["tokenizer_hash"]
    write_meta(folder, json.loads(json.dumps(meta).replace(old, new)))
    for name in ("train.bin", "val.bin"):
        path = folder / name
        path.write_bytes(path.read_bytes().replace(bytes.fromhex(old), bytes.fromhex(new), 1))


BUGS = [
    # ---- Files ----
    bug(
        "byte order",
        "token files written on a machine that stores the high byte first",
        "token ids",
        damage=swap_bytes,
    ),
    bug(
        "token file half empty",
        "the file was laid out in full, and the tokenizing died in the middle",
        ("token ids", "tokenizer", "splits alike"),
        damage=half_empty,
    ),
    bug(
        "one repeated token",
        "a loop that writes the same chunk, or <unk> for everything",
        ("token ids", "tokenizer", "splits alike"),
        damage=one_token,
    ),
    bug(
        "the same files again and again",
        "a glob that matches the copies, too",
        "repetition",
        damage=repeats_itself,
        warns=True,
    ),
    bug(
        "validation cut from the training text",
        "split with the wrong end of the slice",
        "overlap",
        damage=validation_from_training,
    ),
    bug(
        "half of the validation in the training text",
        "documents that occur twice, split at random",
        "overlap",
        damage=half_of_validation_from_training,
    ),
    bug(
        "sorted data",
        "not shuffled before the split: what is held out is in another language",
        "splits alike",
        damage=another_language,
        warns=True,
    ),
    bug(
        "tokens shuffled, not documents",
        "rng.shuffle(ids)",
        ("tokenizer", "splits alike"),
        damage=shuffled_tokens,
    ),
    bug(
        "validation tokens shuffled",
        "a script of one's own for the second split",
        "as prepared",
        damage=shuffled_validation,
    ),
    bug(
        "the second half of the tokens shuffled",
        "damaged from the middle on",
        "refused",
        damage=shuffled_later,
    ),
    bug(
        "one bit of the validation flipped",
        "a disk that is about to fail",
        "refused",
        damage=one_flipped_bit,
    ),
    bug(
        "tokenizer replaced",
        "a tokenizer.json copied over the one that made the token files",
        "refused",
        damage=tokenizer_replaced,
    ),
    bug(
        "tokenizer retrained after prepare",
        "the same by a script that keeps the hashes in order",
        "tokenizer",
        damage=tokenizer_retrained,
    ),
    bug(
        "ids wrap in a type too small",
        "uint8 for a vocabulary of 512, or uint16 for one of 100,000",
        "tokenizer",
        ("data.py", "array.astype(self.dtype).tobytes()", 'array.astype("u1").astype(self.dtype).tobytes()'),
        set=("data.tokenizer=bpe", "data.vocab_size=512"),
        prepares=True,
    ),
    bug(
        "no end of text between documents",
        "the mark is announced, and forgotten where documents are joined",
        ("tokenizer", "token ids", "split sizes"),
        ("writing.py", "for ids in (row, mark[: piece.end])]", "for ids in (row,)]"),
        prepares=True,
    ),
    bug(
        "line breaks lost",
        "text.split() and ' '.join() on the way",
        "tokenizer",
        ("writing.py", "[piece.text for piece in batch]", '[piece.text.replace("\\n", "") for piece in batch]'),
        prepares=True,
    ),
    bug(
        "another text encoded than read",
        "lower() before encoding, not before anything else",
        "tokenizer",
        ("writing.py", "[piece.text for piece in batch]", "[piece.text.lower() for piece in batch]"),
        prepares=True,
    ),
    # ---- The vocabulary ----
    bug(
        "vocabulary off by one",
        "the largest id taken for the size",
        "token ids",
        ("engine.py", "or self.data.vocab_size\n", "or self.data.vocab_size - 1\n"),
    ),
    # ---- Batches ----
    bug(
        "targets not shifted",
        "y = x: the model learns to copy",
        "batches",
        ("data.py", "return rows[:, :-1], rows[:, 1:]", "return rows[:, :-1], rows[:, :-1]"),
    ),
    bug(
        "targets shifted twice",
        "once in the slice and once more",
        "batches",
        ("data.py", "np.arange(size + 1)\n", "np.arange(size + 2)\n"),
        (
            "data.py",
            "return rows[:, :-1], rows[:, 1:]",
            "return rows[:, :-2], rows[:, 2:]",
        ),
        ("data.py", "return rows[:, :-1], np.where(np.arange(size)", "return rows[:, :-2], np.where(np.arange(size)"),
        ("data.py", "lengths[:, None], rows[:, 1:], IGNORED", "lengths[:, None], rows[:, 2:], IGNORED"),
    ),
    bug(
        "inputs and targets swapped",
        "the model predicts the past from the future",
        "batches",
        ("data.py", "return rows[:, :-1], rows[:, 1:]", "return rows[:, 1:], rows[:, :-1]"),
    ),
    bug(
        "header read as tokens",
        "np.fromfile without an offset",
        "batches",
        ("data.py", '"r", HEADER_SIZE, (header.count,)', '"r", 0, (header.count,)'),
    ),
    bug(
        "the same batch at every step",
        "the loader is made anew in the loop",
        "batches",
        ("data.py", "np.divmod(step * self.batch_size + np", "np.divmod(0 * self.batch_size + np"),
    ),
    bug(
        "batches that overlap",
        "the position advances by one, not by the batch",
        "batches",
        ("data.py", "np.divmod(step * self.batch_size + np", "np.divmod(step + np"),
    ),
    bug(
        "the same row in all of a batch",
        "expand() where there should be different windows",
        "batches",
        ("data.py", "batch_size + np.arange(self.batch_size)", "batch_size + 0 * np.arange(self.batch_size)"),
    ),
    bug(
        "no shuffling",
        "shuffle=False was for debugging",
        "batches",
        ("data.py", "shuffled = permuted(places[rows], n_windows, key)", "shuffled = places[rows]"),
    ),
    bug(
        "the same order every epoch",
        "the sampler's set_epoch() is never called",
        "batches",
        ("data.py", "np.array([self.seed, epoch], np.uint64)", "np.array([self.seed, 0], np.uint64)"),
    ),
    bug(
        "a tenth of the data",
        "a subset for debugging, still there",
        "batches",
        (
            "data.py",
            "n_windows = max((len(tokens) - 1) // size - 1, 1)",
            "n_windows = max(len(tokens) // size // 10, 1)",
        ),
    ),
    bug(
        "training on the validation split",
        "the wrong file name",
        "batches",
        (
            "engine.py",
            'train=open_tokens(Path(data.dir) / "train.bin")',
            'train=open_tokens(Path(data.dir) / "val.bin")',
        ),
    ),
    bug(
        "validating on the training split",
        "the wrong file name",
        ("evaluation", "batches"),
        ("engine.py", 'val=open_tokens(Path(data.dir) / "val.bin")', 'val=open_tokens(Path(data.dir) / "train.bin")'),
    ),
    bug(
        "batches from a global generator",
        "np.random without a seed",
        ("batches", "repeatable"),
        ("data.py", "np.array([self.seed, epoch], np.uint64)", "np.array([np.random.randint(9**9), epoch], np.uint64)"),
    ),
    bug(
        "one buffer for all batches",
        "the array given out last time is written again while it waits",
        ("batches", "repeatable"),
        (
            "data.py",
            "        return windows(tokens, starts, size)\n",
            "        new = windows(tokens, starts, size)\n"
            '        self.buffer = getattr(self, "buffer", new)\n'
            "        self.buffer[0][:], self.buffer[1][:] = new\n"
            "        return self.buffer\n",
        ),
    ),
]
