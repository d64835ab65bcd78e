"""The quick ways from text to ids against the tokenizers library, which is the definition of what they must give."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers

from tinyllm import tokenizer as tok
from tinyllm.encoding import WHITE, Encoder
from tinyllm.errors import TokenizerError
from tinyllm.tales import stories

DATA = Path(__file__).parents[2] / "shared/data"
needs_data = pytest.mark.skipif(not (DATA / "gpt2").is_dir(), reason=f"{DATA} is not there")
HARD = (
    "  two spaces\n\tand a tab\r\nCRLF\n\n\n   trailing   \n I'll don't we've THEY'RE 'tis x=1_000;\n",
    "日本語テキスト 한국어 e\u0301 \u1e69 \U0001f469\u200d\U0001f680 👍🏽 \u00a0\u2003wide \ufeff \x00\x7f",
    "<|endoftext|> is only text <|endoftext|>",
    "",
)
TALES = [story.text for story in stories(300, 0)]
ALPHABET = "ab "


def by_library(tokenizer: Tokenizer, texts) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def quick(encoder: Encoder, texts) -> list[list[int]]:
    assert encoder.quick
    rows = encoder(texts)
    assert all(row.dtype == np.uint32 for row in rows)
    return [row.tolist() for row in rows]


@pytest.mark.parametrize(("kind", "texts"), [("bpe", (*HARD, *TALES)), ("byte", HARD), ("char", TALES)])
@pytest.mark.parametrize("documents", [False, True])
def test_our_own_tokenizers_are_quick_and_right(kind, texts, documents):
    tokenizer = tok.build(kind, TALES, vocab_size=700, documents=documents)
    assert quick(Encoder(tokenizer), texts) == by_library(tokenizer, texts)


@needs_data
def test_gpt2(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path))
    shutil.copytree(DATA / "gpt2", tmp_path / "gpt2")
    tokenizer = tok.build("gpt2", (), vocab_size=0, documents=True)
    encoder, texts = Encoder(tokenizer), (*HARD, *TALES, *(c * 5000 for c in " \nax1!ß日"))
    assert quick(encoder, texts) == by_library(tokenizer, texts)

    @settings(deadline=None, max_examples=300)
    @given(st.text())
    def any_text(text):
        assert quick(encoder, [text]) == by_library(tokenizer, [text])

    @settings(deadline=None, max_examples=300)
    @given(st.text([*map(chr, WHITE), *"\x00\x1c\u180e\u200b\ufeffa1.'sé日"]))
    @example("a \u3000b")
    def any_white_space(text):
        assert quick(encoder, [text]) == by_library(tokenizer, [text])

    any_text()
    any_white_space()


def bpe(merges: list[tuple[str, str]], ids: list[int] | None = None) -> Tokenizer:
    """A byte-level BPE of these merges, whose tokens have ids in their order, or those given."""
    vocab = {symbol: byte for byte, symbol in enumerate(tok.byte_symbols())}
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    if ids:
        vocab |= dict(zip(["".join(pair) for pair in merges], ids, strict=True))
    return tok.as_text_only(tok.byte_level(models.BPE(vocab=vocab, merges=merges)))


@st.composite
def any_merges(draw) -> list[tuple[str, str]]:
    """Merges as no training would learn them: any two tokens in any order, the same token made in two ways."""
    parts, merges = list("ab"), []
    for _ in range(draw(st.integers(1, 9))):
        pair = draw(st.sampled_from(parts)), draw(st.sampled_from(parts))
        if pair not in merges:
            merges.append(pair)
            parts.append("".join(pair))
    return merges


@settings(deadline=None, max_examples=400)
@given(any_merges(), st.lists(st.text(ALPHABET, max_size=30), max_size=20))
@example([("a", "b"), ("b", "a"), ("ab", "a")], ["aba", "abab", "baba"])
def test_whatever_the_merges_it_is_right_or_left_to_the_library(merges, texts):
    tokenizer = bpe(merges)
    encoder = Encoder(tokenizer)
    assert [row.tolist() for row in encoder(texts)] == by_library(tokenizer, texts)


def test_what_is_left_to_the_library():
    plain = bpe([("a", "b"), ("ab", "a")])
    assert Encoder(plain).quick
    unreachable = bpe([("b", "a"), ("a", "b"), ("ab", "a")])  # "aba" becomes a, ba
    disordered = bpe([("a", "b"), ("b", "a")], ids=[257, 256])
    normalised = bpe([("a", "b")])
    normalised.normalizer = normalizers.NFC()
    whole_texts = bpe([("a", "b")])
    whole_texts.pre_tokenizer = None
    added = bpe([("a", "b")])
    added.add_tokens([AddedToken("abba")])
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    for tokenizer in (unreachable, disordered, normalised, whole_texts, added, words):
        assert Encoder(tokenizer).quick is None
    letters = tok.build("char", ["ab"], vocab_size=0, documents=False)
    for tokenizer in (plain, letters):
        for name, value in {"dropout": 0.1, "unk_token": "a", "continuing_subword_prefix": "b"}.items():
            parts = json.loads(tok.to_json(tokenizer))
            parts["model"][name] = value
            assert Encoder(Tokenizer.from_str(json.dumps(parts))).quick is None


def test_the_first_unknown_character_is_named():
    encoder = Encoder(tok.build("char", ["abc"], vocab_size=0, documents=False))
    for text in ("abcd", "ab\U0001f600"):
        with pytest.raises(TokenizerError, match="no token for the character"):
            encoder(["abc", text])
    with pytest.raises(TokenizerError, match="half a surrogate pair"):
        encoder(["\ud800"])
