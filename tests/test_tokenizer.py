"""Tokenizers against independent references: tiktoken, nanoGPT's character table, Python's own UTF-8."""

import http.server
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tinyllm import tokenizer as tok
from tinyllm.download import fetch
from tinyllm.errors import DataError, TokenizerError

DATA = Path(__file__).parents[2] / "shared/data"
needs_data = pytest.mark.skipif(not (DATA / "gpt2").is_dir(), reason=f"{DATA} is not there")
R50K = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
HARD = (
    "  two spaces\n\tand a tab\r\nCRLF\n\n\n   trailing   \n"
    "I'll don't we've THEY'RE 'tis 3.14159 x=1_000;\n    def f(x):\n\treturn x  # ¿qué?\n"
    "日本語テキスト 한국어 中文。 e\u0301 \u1e69 \U0001f469\u200d\U0001f680 👍🏽"
    " \u00a0\u2003wide \ufeff \x00\x7f"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TINYLLM_MIRROR", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def gpt2(cache):
    shutil.copytree(DATA / "gpt2", cache / "gpt2")
    return tok.build("gpt2", (), vocab_size=0, documents=False)


@pytest.fixture
def mirror(cache, tmp_path, monkeypatch):
    """A web server on the loopback address that TINYLLM_MIRROR points to: its folder."""
    (tmp_path / "web").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "web")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TINYLLM_MIRROR", f"http://127.0.0.1:{server.server_port}/")
    yield tmp_path / "web"
    server.shutdown()
    server.server_close()


def build(kind, text="", vocab_size=0, documents=False):
    return tok.build(kind, [text], vocab_size=vocab_size, documents=documents)


# ---- GPT-2 ----


@needs_data
def test_gpt2_ids_are_tiktokens(gpt2, tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    files = str(DATA / "gpt2/vocab.bpe"), str(DATA / "gpt2/encoder.json")
    ranks = data_gym_to_mergeable_bpe_ranks(*files)
    special = {tok.END_OF_TEXT: 50256}
    reference = tiktoken.Encoding("gpt2", pat_str=R50K, mergeable_ranks=ranks, special_tokens=special)
    shakespeare = (DATA / "tinyshakespeare.txt").read_text()
    for text in (HARD, HARD * 3, f"a {tok.END_OF_TEXT} b", "\n" * 50 + " " * 99 + "x", shakespeare[:200_000]):
        assert tok.encode(gpt2, text) == reference.encode_ordinary(text)
    assert tok.end_of_text(gpt2) == 50256
    assert gpt2.get_vocab_size() == 50257
    expected = [len(reference.decode_single_token_bytes(i)) for i in range(50256)] + [0]
    assert tok.token_bytes(gpt2).tolist() == expected

    # Every assigned character was compared once, with no difference; unassigned ones depend on the Unicode
    # version that each library was built with.
    alphabet = st.characters(exclude_categories=["Cn", "Co", "Cs"])

    @settings(max_examples=100, deadline=None)
    @given(st.text(alphabet | st.sampled_from(" \n\t'"), max_size=40))
    def same(text):
        assert tok.encode(gpt2, text) == reference.encode_ordinary(text)

    same()


@needs_data
def test_gpt2_is_downloaded_once_and_checked(mirror, cache):
    place = mirror / "gpt-2/encodings/main"
    shutil.copytree(DATA / "gpt2", place)
    first = build("gpt2")
    shutil.rmtree(place)  # from now on only the cache has it
    assert tok.to_json(build("gpt2")) == tok.to_json(first)
    (cache / "gpt2/vocab.bpe").write_text("damaged")
    with pytest.raises(DataError, match="404") as error:
        build("gpt2")
    shutil.copytree(DATA / "gpt2", place)
    build("gpt2")
    assert str(cache / "gpt2/vocab.bpe") in error.value.fix
    assert tok.GPT2_FILES["vocab.bpe"] in error.value.fix
    assert error.value.where.endswith("/gpt-2/encodings/main/vocab.bpe")


def test_a_download_with_the_wrong_checksum_is_refused(mirror, cache):
    place = mirror / "gpt-2/encodings/main"
    place.mkdir(parents=True)
    (place / "encoder.json").write_text("<html>log in to the hotel network</html>")
    with pytest.raises(DataError, match="SHA-256 is not 196139668be6"):
        build("gpt2")
    assert not [*cache.rglob("*.*")], "a wrong file must not stay in the cache"


def test_no_network(cache, monkeypatch, capfd):
    logger = pytest.importorskip("pooch").get_logger()
    logger.setLevel("INFO")  # as it is when nobody has asked for silence
    monkeypatch.setattr(logger.handlers[0], "stream", sys.stderr)  # not setStream: it flushes the old one
    monkeypatch.setenv("TINYLLM_MIRROR", "http://127.0.0.1:1")
    with pytest.raises(DataError) as error:
        build("gpt2")
    assert error.value.where == "http://127.0.0.1:1/gpt-2/encodings/main/encoder.json"
    assert f"put the file at {cache / 'gpt2/encoder.json'} by hand" in error.value.fix
    assert error.value.what == "download failed: no connection to 127.0.0.1:1"
    assert capfd.readouterr() == ("", "")  # pooch logs to the terminal unless told not to


def test_the_server_goes_away_in_the_middle(cache, monkeypatch):
    class Cut(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            self.wfile.write(b"half of it")

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Cut)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TINYLLM_MIRROR", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(DataError, match="download failed"):  # without a checksum too
        fetch("https://example.org/stories.txt", "stories.txt")
    server.shutdown()
    server.server_close()
    assert not [*cache.rglob("*.*")]


# ---- Characters, bytes, BPE ----


@needs_data
def test_char_ids_are_nanogpts():
    text = (DATA / "tinyshakespeare.txt").read_text()
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}  # nanoGPT's data/shakespeare_char/prepare.py
    tokenizer = build("char", text)
    assert tokenizer.get_vocab_size() == len(stoi) == 65
    assert tok.encode(tokenizer, text) == [stoi[c] for c in text]
    assert tok.end_of_text(tokenizer) is None
    assert tok.end_of_text(build("char", text, documents=True)) == 65


def test_byte_ids_are_byte_values():
    tokenizer = build("byte", documents=True)
    assert tok.encode(tokenizer, HARD) == list(HARD.encode())
    assert tok.token_bytes(tokenizer).tolist() == [1] * 256 + [0]
    assert tok.end_of_text(tokenizer) == 256
    assert build("byte").get_vocab_size() == 256


def test_bpe_has_exactly_the_tokens_asked_for():
    tokenizer = build("bpe", "the cat sat on the mat, the cat sat " * 9, vocab_size=265)
    assert tokenizer.get_vocab_size() == 265
    assert tok.end_of_text(tokenizer) == 0
    assert len(tok.encode(tokenizer, "the cat")) < 7
    assert tok.decode(tokenizer, tok.encode(tokenizer, HARD)) == HARD  # it has every byte
    with pytest.raises(TokenizerError, match=r"vocab_size = 2000, but the text has .* for \d+ tokens only"):
        build("bpe", "the cat sat on the mat", vocab_size=2000)
    with pytest.raises(TokenizerError, match="are 257 already"):
        build("bpe", "the cat sat on the mat", vocab_size=100)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_round_trip(text):
    for kind in ("char", "byte", "bpe"):
        tokenizer = build(kind, text + "ab" * 9, vocab_size=258 if kind == "bpe" else 0, documents=True)
        again = tok.from_json(tok.to_json(tokenizer))
        for each in (tokenizer, again):
            ids = tok.encode(each, text)
            assert tok.decode(each, ids) == text
            assert tok.token_bytes(each)[ids].sum() == len(text.encode())
            emit = tok.stream(each)
            assert "".join(map(emit, ids)) == text


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_a_special_tokens_name_in_text_is_text(kind):
    text = f"before{tok.END_OF_TEXT}after " * 3
    tokenizer = tok.from_json(tok.to_json(build(kind, text, vocab_size=260, documents=True)))
    ids = tok.encode(tokenizer, text)
    assert tok.end_of_text(tokenizer) not in ids
    assert tok.decode(tokenizer, ids) == text
    assert tok.decode(tokenizer, [*ids, tok.end_of_text(tokenizer)]) == text  # special tokens are not shown


def test_streaming_waits_for_whole_characters():
    tokenizer = build("byte", documents=True)
    emit = tok.stream(tokenizer)
    assert [emit(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert emit(256) == ""
    assert [emit(0xFF), emit(ord("x"))] == ["\ufffd", "x"]  # bytes of an untrained model need not be UTF-8


# ---- What cannot be encoded, and foreign tokenizers ----


def test_an_unknown_character_is_named_with_its_place():
    tokenizer = build("char", "abc \n", documents=True)
    with pytest.raises(TokenizerError) as error:
        tok.encode(tokenizer, "abc\nab\u00e9c")
    assert error.value.what == "no token for the character '\u00e9' (U+00E9)"
    assert error.value.where == "line 2, column 3 (character 6) in 'abc\\nab\u00e9c'"
    assert "bpe" in error.value.fix
    for text, index in (("x", 0), ("ab<|endoftext|>", 2), ("abcx", 3)):
        with pytest.raises(TokenizerError) as error:
            tok.encode(tokenizer, text)
        assert f"(character {index})" in error.value.where
    with pytest.raises(TokenizerError, match="surrogate pair, character 2"):
        tok.encode(tokenizer, "ab\ud800")


def test_an_unknown_token_is_an_error_too():
    words = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "cat": 1, "the": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = tok.from_json(words.to_str())
    assert tok.encode(words, "the cat") == [2, 1]
    with pytest.raises(TokenizerError, match="character 'd'"):
        tok.encode(words, "the dog")


def test_sentencepiece_style_tokenizers_work():
    vocab = {token: i for i, token in enumerate(["<0xC3>", "<0xA9>", "\u2581", "a", "b", "\u2581a"])}
    model = models.BPE(vocab=vocab, merges=[("\u2581", "a")], byte_fallback=True)
    foreign = Tokenizer(model)
    foreign.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    foreign.decoder = decoders.Sequence(steps)
    foreign = tok.from_json(foreign.to_str())
    ids = tok.encode(foreign, "b a\u00e9")
    assert ids == [4, 5, 0, 1]
    assert tok.token_bytes(foreign).tolist() == [1, 1, 1, 1, 1, 2]
    assert "".join(map(tok.stream(foreign), ids)) == "b a\u00e9"


def test_a_tokenizer_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    with pytest.raises(TokenizerError, match="no such tokenizer, and no such file") as error:
        build(str(path))
    assert "`char`, `byte`, `bpe`, `gpt2`" in error.value.fix
    path.write_text("{}")
    with pytest.raises(TokenizerError, match=r"not a tokenizer\.json"):
        build(str(path))
    with pytest.raises(TokenizerError, match="/dev/zero: not a regular file"):
        build("/dev/zero")  # which has no end
    plain = build("char", "abc")
    plain.enable_truncation(2)  # a tokenizer.json can carry that along; it must not cut our text
    plain.enable_padding(length=9)
    path.write_text(tok.to_json(plain))
    assert tok.encode(build(str(path)), "abcabc") == [0, 1, 2, 0, 1, 2]
    with pytest.raises(TokenizerError, match="has no end-of-text token"):
        build(str(path), documents=True)


def test_digest_is_the_files_sha256(tmp_path):
    import hashlib

    text = tok.to_json(build("char", "aé"))
    (tmp_path / "tokenizer.json").write_bytes(text.encode())
    assert tok.digest(text) == hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert isinstance(tok.token_bytes(build("byte")), np.ndarray)
