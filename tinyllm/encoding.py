"""Texts to token ids at full speed, the same ids as `tokenizer.encode` gives: for gigabytes.

    encode = Encoder(tokenizer)                        # several threads may use it at once
    encode(["Once upon a time", "The end"])            # one array of ids each, uint32

A byte-level BPE that cuts words as GPT-2 does goes through tiktoken, where its ids are sure to be the same (see
`as_tiktoken`): that is ten times as fast as the tokenizers library. Characters and bytes go through a table, and all
others through the library.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from tinyllm.tokenizer import (
    END_OF_TEXT,
    byte_symbols,
    library,
    of_symbols,
    refuse_unknown,
    text_lengths,
    to_json,
    token_bytes,
)

Encode = Callable[[str], np.ndarray]
CUT = "\0"  # put into a text where `with_cuts` says; no .txt has one
# GPT-2's words (Radford et al. 2019, `encoder.py`) but for its look-ahead, with which a pattern takes twice the time.
WORDS = r"\x00|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}\x00]+|\s+"
GPT2_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPECIALTIES = ("dropout", "unk_token", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
NO_CHARACTER = np.uint32(0xFFFFFFFF)
WHITE = (*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000)
IS_WHITE = np.zeros(max(WHITE) + 2, bool)  # the last row is for all that lie beyond
IS_WHITE[list(WHITE)] = True


class Encoder:
    """A tokenizer as a function of texts. Raises TokenizerError for a character that it has no token for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.sizes = tokenizer, token_bytes(tokenizer)
        self.quick = self.quickest()

    def __call__(self, texts: Sequence[str], where: str = "") -> list[np.ndarray]:
        """The ids of each text, (tokens,) uint32."""
        lengths = text_lengths(texts)
        rows = [self.quick(text) for text in texts] if self.quick else self.by_library(texts, where)
        for text, row, length in zip(texts, rows, lengths, strict=True):
            # Every byte of the text is in a token; if not, it may be that a foreign tokenizer normalises.
            if self.sizes.take(row, mode="clip").sum() != length:
                refuse_unknown(self.tokenizer, text, where)
        return rows

    def by_library(self, texts: Sequence[str], where: str) -> list[np.ndarray]:
        with library("the text cannot be tokenized", where):
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def quickest(self) -> Encode | None:
        """The quickest way that gives the same ids; None for the library itself."""
        parts = json.loads(to_json(self.tokenizer))
        model = parts["model"]
        if parts["normalizer"] or model["type"] != "BPE" or any(model.get(name) for name in SPECIALTIES):
            return None
        if not all(token["special"] for token in parts["added_tokens"]):  # they are found in a text before all else
            return None
        return as_tiktoken(self.tokenizer, parts) if model["merges"] else as_table(parts)


def as_table(parts: dict[str, Any]) -> Encode | None:
    """The tokens of single characters or bytes, as a table; None for any other tokenizer."""
    added = {token["content"] for token in parts["added_tokens"]}
    ids = {token: id for token, id in parts["model"]["vocab"].items() if token not in added}
    if parts["pre_tokenizer"] == GPT2_WORDS | {"use_regex": False} and ids.keys() == set(byte_symbols()):
        of_bytes = np.array([ids[symbol] for symbol in byte_symbols()], np.uint32)
        return lambda text: of_bytes[np.frombuffer(text.encode(), np.uint8)]
    if parts["pre_tokenizer"] or not ids or any(len(token) != 1 for token in ids):
        return None
    of_characters = np.full(max(map(ord, ids)) + 2, NO_CHARACTER)  # the last row is for all that lie beyond
    of_characters[list(map(ord, ids))] = list(ids.values())

    def encode(text: str) -> np.ndarray:
        row = of_characters.take(np.frombuffer(text.encode("utf-32-le"), "<u4"), mode="clip")
        return row[row != NO_CHARACTER]  # dropped without a word, as by the library; the caller counts

    return encode


def as_tiktoken(tokenizer: Tokenizer, parts: dict[str, Any]) -> Encode | None:
    """tiktoken's encoder of a byte-level BPE; None where its ids might be others.

    tiktoken joins the two neighbours whose joined bytes are the token of the lowest id, the library those of the
    earliest merge. That is the same if ids are in the order of the merges, and if each token, alone, becomes itself:
    then whatever comes to lie between the two ends of a token in a text has been joined as in that token alone, so
    that its last two parts are those of its merge.
    """
    model, added = parts["model"], {token["content"]: token["id"] for token in parts["added_tokens"]}
    if parts["pre_tokenizer"] != GPT2_WORDS:
        return None
    symbols = set(byte_symbols())
    vocab = {token: id for token, id in model["vocab"].items() if token not in added}
    merged = [vocab.get("".join(merge), -1) for merge in model["merges"]]
    if not symbols <= vocab.keys() or min(merged, default=0) < 0 or merged != sorted(set(merged)):
        return None
    singles = {vocab[symbol] for symbol in symbols}
    if {*singles, *merged} != set(vocab.values()) or len(singles) + len(merged) != len(vocab):
        return None
    if any([t.id for t in tokenizer.model.tokenize(token)] != [id] for token, id in vocab.items()):
        return None
    import tiktoken

    ranks = {of_symbols(token): id for token, id in vocab.items()}
    # Never allowed, so that its name is text. With no special token tiktoken finds the empty one at each character.
    special = {END_OF_TEXT: max(vocab.values()) + 1}
    encoding = tiktoken.Encoding("tinyllm", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)
    cut = ranks[CUT.encode()]

    def encode(text: str) -> np.ndarray:
        with library("the text cannot be tokenized"):
            if CUT in text:
                return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)
            row = encoding.encode_to_numpy(with_cuts(text), disallowed_special=())
        return row[row != cut]

    return encode


def with_cuts(text: str) -> str:
    """`text` with a CUT before the last of several white spaces, if something follows: it belongs to what follows.

    GPT-2's pattern says so as `\\s+(?!\\S)`.
    """
    characters = np.frombuffer(text.encode("utf-32-le"), "<u4")
    white = IS_WHITE.take(characters, mode="clip")
    last = np.flatnonzero(white[:-2] & white[1:-1] & ~white[2:]) + 1
    return np.insert(characters, last, ord(CUT)).tobytes().decode("utf-32-le") if len(last) else text
