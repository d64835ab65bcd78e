"""Tokenizers: characters, bytes, a byte-level BPE trained here, GPT-2's: one class, one tokenizer.json.

    tokenizer = build("char", [text], vocab_size=0, documents=False)
    ids = encode(tokenizer, "First Citizen")
    decode(tokenizer, ids)                      # "First Citizen"
    from_json(to_json(tokenizer))               # what a checkpoint keeps

Text goes in and comes out unchanged: nothing is normalised, no space is added. Text is only ever text: the
name of a special token inside it is spelled out, as `encode_ordinary` of tiktoken does, so that a document or
a prompt cannot smuggle in an end of text. Whoever joins documents puts `end_of_text(tokenizer)` after each.
"""

import base64
import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tinyllm.download import fetch
from tinyllm.errors import TokenizerError

KINDS = ("char", "byte", "bpe", "gpt2")
MOST_GROWTH = 4096  # times as long as it was may a text become on its way; real tokenizers' figures are below 200
LONGEST = 100  # characters of what a tokenizer puts into a text
END_OF_TEXT = "<|endoftext|>"
# What other makers' tokenizer.json call it.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<eos>", "<|im_end|>")
# Where a tokenizer changes texts, and by how many times its steps make them longer at most; others do not.
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
GROWTH = {"BertNormalizer": 3, "ByteLevel": 2, "NFD": 2, "NFKC": 4, "NFKD": 4, "Precompiled": 32}
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def build(kind: str, texts: Iterable[str], *, vocab_size: int, documents: bool) -> Tokenizer:
    """The tokenizer of a run. Raises TokenizerError, and DataError when GPT-2's files cannot be had.

    `char` has a token a character of `texts`, in code point order; `byte` the 256 bytes, each its own id;
    `bpe` is trained on `texts` and has exactly `vocab_size` tokens; `gpt2` and a path need no text.
    `documents`: texts will be followed by an end-of-text mark, so the tokenizer must have one.
    """
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    if kind == "char":
        characters = sorted(set().union(*texts))
        tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
        tokenizer.decoder = decoders.Fuse()
    elif kind == "byte":
        alphabet = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
        tokenizer = byte_level(models.BPE(vocab=alphabet, merges=[]), use_regex=False)
    elif kind == "gpt2":
        paths = [fetch(GPT2_URL + name, f"gpt2/{name}", sha256) for name, sha256 in GPT2_FILES.items()]
        tokenizer = byte_level(models.BPE.from_file(*map(str, paths)))
    else:
        return load(kind, documents=documents)
    if documents or kind == "gpt2":
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return as_text_only(tokenizer)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens: <|endoftext|>, the 256 bytes, merges inside words."""
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once teaches nothing
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        fix = f'more text, or data.vocab_size = {size}, or data.tokenizer = "byte"'
        what = f"data.vocab_size = {vocab_size}, but the text has repeated pieces for {size} tokens only"
        if size > vocab_size:
            what = f"data.vocab_size = {vocab_size}, but the 256 bytes and {END_OF_TEXT} are {size} already"
        raise TokenizerError(what, fix=fix)
    return as_text_only(tokenizer)


def load(path: str, *, documents: bool) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises TokenizerError."""
    try:
        file = Path(os.path.expanduser(path))
        if file.exists() and not (file.is_file() or file.is_dir()):  # /dev/zero has no end
            raise TokenizerError("not a regular file", where=path)
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        fix = "data.tokenizer is `char`, `byte`, `bpe`, `gpt2`, or the path of a tokenizer.json"
        raise TokenizerError("no such tokenizer, and no such file", where=path, fix=fix) from None
    except OSError as error:
        raise TokenizerError(f"cannot be read: {error.strerror}", where=path) from None
    except UnicodeDecodeError:
        raise TokenizerError("not a tokenizer.json: not UTF-8 text", where=path) from None
    tokenizer = from_json(text, where=path)
    if documents and end_of_text(tokenizer) is None:
        what = f"it has no end-of-text token ({', '.join(END_NAMES)}), and the text is a row of documents"
        raise TokenizerError(what, where=path, fix=f"add {END_OF_TEXT} to it as a special token")
    return tokenizer


def byte_level(model: models.Model, *, use_regex: bool = True) -> Tokenizer:
    """`model` on bytes, cut into words as GPT-2 does (or not at all)."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def as_text_only(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, taking all of a text as text. These settings are not part of tokenizer.json."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def to_json(tokenizer: Tokenizer) -> str:
    """The whole tokenizer as the text of a tokenizer.json."""
    return tokenizer.to_str()


def from_json(text: str, where: str = "") -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json. Raises TokenizerError."""
    refuse_growth(text, where)
    with library("not a tokenizer.json", where):
        return as_text_only(Tokenizer.from_str(text))


@contextmanager
def library(doing: str, where: str = "") -> Iterator[None]:
    """Turn what the tokenizers library raises into a TokenizerError: bare Exceptions and, where it panics, worse."""
    try:
        yield
    except BaseException as error:
        is_theirs = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if isinstance(error, TokenizerError | MemoryError) or not is_theirs:
            raise
        raise TokenizerError(f"{doing}: {error}", where=where) from None


def refuse_growth(text: str, where: str) -> None:
    """Raise TokenizerError for a tokenizer.json that could blow a short text up beyond all memory.

    One in a stranger's checkpoint can replace each character by two, forty times over.
    """
    made: Any = {}
    with suppress(ValueError, RecursionError):  # the library will say what is wrong
        made = json.loads(text)
    growth, todo = 1, [made.get(name) for name in PARTS] if isinstance(made, dict) else []
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            kind, put_in = (str(part.get(key, "")) for key in ("type", "content"))
            growth *= 1 + len(put_in) if kind == "Replace" else GROWTH.get(kind, 1)
            longest = max(len(str(part.get(key, ""))) for key in ("content", "prepend", "replacement", "prefix"))
            if growth > MOST_GROWTH or longest > LONGEST or lies(part.get("precompiled_charsmap")):
                raise TokenizerError("not a tokenizer to be trusted: it could take any memory", where=where)
            todo += part.values()
        elif isinstance(part, list):
            todo += part


def lies(charsmap: Any) -> bool:
    """Whether the table of a `Precompiled` normalizer, in base64, is shorter than it says; memory is taken for all."""
    if not isinstance(charsmap, str):
        return False
    try:
        head = base64.b64decode(charsmap[:8])
    except ValueError:
        return True
    return int.from_bytes(head[:4], "little") > len(charsmap)


def digest(json_text: str) -> str:
    """SHA-256 of a JSON text, hexadecimal: what a token file's header records of its tokenizer.json."""
    return hashlib.sha256(json_text.encode()).hexdigest()


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id that ends a document, or None when this tokenizer has none."""
    special = {token.content: id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return next((special[name] for name in END_NAMES if name in special), None)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text. Raises TokenizerError naming the first character there is no token for."""
    text_lengths([text])
    with library("the text cannot be tokenized"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    if decode(tokenizer, ids) != text:
        refuse_unknown(tokenizer, text)
    return ids


def text_lengths(texts: Sequence[str]) -> list[int]:
    """The UTF-8 bytes of each text. Raises TokenizerError for half a surrogate pair, which has none."""
    try:
        return [len(text.encode()) for text in texts]
    except UnicodeEncodeError as error:
        raise TokenizerError(f"not Unicode text: half a surrogate pair, character {error.start:,}") from None


def refuse_unknown(tokenizer: Tokenizer, text: str, where: str = "") -> None:
    """Raise TokenizerError for the first character of `text` that no token, or only `<unk>`, stands for.

    `where` is for a text that is part of something longer, in which its own lines say nothing.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
    if unknown in encoding.ids:
        index = encoding.offsets[encoding.ids.index(unknown)][0]
    else:
        characters = list(dict.fromkeys(text))
        alone = tokenizer.encode_batch_fast(characters, add_special_tokens=False)
        # A pre-tokenizer of words (BERT's) drops white space on purpose; that is its maker's business.
        words = tokenizer.pre_tokenizer is not None
        dropped = [c for c, e in zip(characters, alone, strict=True) if not e.ids and not (words and c.isspace())]
        if not dropped:
            return
        index = text.index(dropped[0])
    line, column = text.count("\n", 0, index) + 1, index - text.rfind("\n", 0, index)
    near = text[max(index - 20, 0) : index + 20]
    what = f"no token for the character {text[index]!r} (U+{ord(text[index]):04X})"
    where = where or f"line {line}, column {column} (character {index})"
    fix = 'leave it out, or prepare with data.tokenizer = "bpe" or "byte", which know every character'
    raise TokenizerError(what, where=f"{where} in {near!r}", fix=fix)


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids; special tokens are not shown, bytes that are not UTF-8 become U+FFFD."""
    with library("the tokens cannot be read"):
        return tokenizer.decode(list(ids), skip_special_tokens=True)


def stream(tokenizer: Tokenizer) -> Callable[[int], str]:
    """A function from each next id to the text it completes: '' for a special token or half a character."""
    table, decoder = vocabulary(tokenizer), codecs.getincrementaldecoder("utf-8")("replace")
    return lambda id: decoder.decode(table[id])


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each token stands for, (vocab_size,) int64; 0 for special tokens."""
    return np.array([len(token) for token in vocabulary(tokenizer)], dtype=np.int64)


def vocabulary(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of text each id stands for; empty for special tokens, the unknown one and unused ids.

    Raises TokenizerError for ids that go far beyond the number of tokens.
    """
    decoder = str(tokenizer.decoder)
    added = tokenizer.get_added_tokens_decoder()
    unknown = getattr(tokenizer.model, "unk_token", None)
    tokens = tokenizer.get_vocab(with_added_tokens=True)
    size = max(tokens.values(), default=-1) + 1
    if size > 2 * len(tokens) + 1000:
        what = f"not a tokenizer to be trusted: it has {len(tokens):,} tokens, and ids up to {size - 1:,}"
        raise TokenizerError(what)
    table = [b""] * size
    for token, id in tokens.items():
        if id in added:
            table[id] = b"" if added[id].special else token.encode()
        elif token == unknown:
            continue
        elif "ByteLevel" in decoder:
            table[id] = of_symbols(token) or token.encode()
        elif "ByteFallback" in decoder and re.fullmatch("<0x[0-9A-F]{2}>", token):
            table[id] = bytes.fromhex(token[3:5])
        else:  # SentencePiece writes a space as U+2581
            table[id] = (token.replace("\u2581", " ") if "\u2581" in decoder else token).encode()
    return table


def of_symbols(token: str) -> bytes:
    """The bytes that a token's characters stand for in a byte-level vocabulary; empty if one stands for none."""
    try:
        return token.translate(bytes_of_symbols()).encode("latin-1")
    except UnicodeEncodeError:
        return b""


@cache
def bytes_of_symbols() -> dict[int, int]:
    """The byte of each symbol, both as code points; one that is no byte for the bytes that stand for nothing."""
    return dict.fromkeys(range(256), 256) | {ord(symbol): byte for byte, symbol in enumerate(byte_symbols())}


def byte_symbols() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`).

    Printable bytes stand for themselves; the others, in order, are the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
