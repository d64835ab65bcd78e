"""From data.source to pieces of text: what is read, in which order, and what is refused."""

import functools
import http.server
import json
import os
import random
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm import sources
from tinyllm.config import DataConfig
from tinyllm.download import Meter, Stopped
from tinyllm.errors import DataError
from tinyllm.sources import Piece, cut, download, inputs, pieces, split_text
from tinyllm.tokenizer import build, encode

DATA = Path(__file__).parents[2] / "shared/data"


def read(source, **settings):
    config = DataConfig(source=str(source), **settings)
    return list(pieces(config, inputs(config)))


def documents(source, **settings):
    """The texts of whole documents, whatever the parts they came in."""
    whole, rest = [], ""
    for piece in read(source, **settings):
        rest += piece.text
        if piece.end:
            whole.append(rest)
            rest = ""
    return whole, rest


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- Which files ----


def test_a_folder_that_cannot_be_looked_into_is_no_empty_one():
    """Or a run would learn from a part of its text. Root may look into any: so somebody else tries."""
    with tempfile.TemporaryDirectory() as top:  # which others may enter, unlike pytest's
        shut = Path(top, "shut")
        shut.mkdir()
        Path(top, "a.txt").write_text("some text")
        os.chmod(top, 0o755)
        shut.chmod(0)
        me = os.geteuid()
        try:
            if not me:
                os.seteuid(65534)
            with pytest.raises(DataError, match="cannot be read: Permission denied") as error:
                read(top)
        finally:
            os.seteuid(me)
            shut.chmod(0o700)
        assert error.value.where == str(shut)
        assert "glob" in error.value.fix


def test_a_folder_is_read_in_order_with_its_subfolders(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b.txt", "c.md", "d.bin"):
        write(tmp_path / name, name)
    assert "".join(p.text for p in read(tmp_path)) == "a/b.txta/z.txtb.txt"
    assert "".join(p.text for p in read(tmp_path / "**/*.txt")) == "a/b.txta/z.txtb.txt"
    assert not any(p.end for p in read(tmp_path)), "unmarked files are one text"


def test_unmarked_files_are_documents_among_marked_ones(tmp_path):
    write(tmp_path / "1.txt", "one\n")
    write(tmp_path / "2.jsonl", '{"text": "two"}\n')
    write(tmp_path / "3.txt", "three\n<|endoftext|>\nfour")
    assert documents(tmp_path) == (["one\n", "two", "three", "four"], "")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "nowhere.txt: no such file or folder"),
        ("shakespaere", "fix: did you mean 'shakespeare'?"),
        ("*.txt", "*.txt: no file matches this pattern"),
        ("empty", "empty: no .txt or .jsonl file in this folder"),
        ("book.pdf", "book.pdf: not a .txt or .jsonl file"),
    ],
)
def test_no_file(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "book.pdf", "%PDF")
    with pytest.raises(DataError) as error:
        inputs(DataConfig(source=source))
    assert message in str(error.value)


# ---- Text ----


def test_documents_of_a_txt(tmp_path):
    path = write(tmp_path / "a.txt", "\nfirst\n\nline\r\n<|endoftext|>\n\n<|endoftext|>\n  second <|endoftext|>\n")
    assert documents(path) == (["first\n\nline", "  second "], "")
    assert documents(path, separator="") == ([], path.read_bytes().decode())
    assert documents(path, separator="second")[0][1] == " <|endoftext|>"


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n\n", "THE END"])
def test_parts_and_blocks_change_nothing(tmp_path, monkeypatch, separator):
    rng = random.Random(7)
    words = ["the", " cat", "\n", "\n\n", " ", "é", "日本", "<|end", "THE", " END"]
    made = ["".join(rng.choices(words, k=rng.randrange(1, 300))) for _ in range(60)]
    path = write(tmp_path / "a.txt", separator.join(made))
    expected = [t for d in separator.join(made).split(separator) if (t := d.strip("\r\n"))]
    assert documents(path, separator=separator) == (expected, "")
    monkeypatch.setattr(sources, "BLOCK", 37)
    monkeypatch.setattr(sources, "PART", 40)
    assert len(read(path, separator=separator)) > len(expected)
    assert documents(path, separator=separator) == (expected, "")


def test_a_separator_across_two_reads_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK", 20)
    for n in range(1, 25):
        path = write(tmp_path / "a.txt", "x" * n + "<|endoftext|>" + "y" * 30)
        assert documents(path) == (["x" * n, "y" * 30], "")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab \n\r\t.,'é1", max_size=30), max_size=8))
def test_unmarked_parts_are_the_text(blocks):
    for documents_too in (False, True):
        parts = list(split_text(iter(blocks), "", documents=documents_too))
        assert "".join(p.text for p in parts) == "".join(blocks)
        assert all(p.text for p in parts)
        assert [p.end for p in parts] == [documents_too and i == len(parts) - 1 for i in range(len(parts))]


@pytest.mark.skipif(not (DATA / "gpt2").is_dir(), reason=f"{DATA} is not there")
def test_cutting_does_not_change_the_tokens(monkeypatch):
    monkeypatch.setenv("TINYLLM_CACHE", str(DATA))
    gpt2 = build("gpt2", (), vocab_size=0, documents=False)
    text = (DATA / "tinyshakespeare.txt").read_text()[:30_000].replace("\n\n", "\r\n\r\n \t")
    whole = encode(gpt2, text)
    for wanted in range(500, 900):
        at = cut(text, wanted)
        assert at > wanted - 50
        assert encode(gpt2, text[:at]) + encode(gpt2, text[at : at + 99]) == encode(gpt2, text[: at + 99])
    assert whole
    assert cut("x" * 100, 40) == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.txt: this file is empty"),
        (b"caf\xe9 au lait", "a.txt: not UTF-8 text at byte 3"),
        (b"x" * (1 << 20) + b"\xc3\xa9" * 9 + b"\xff", f"not UTF-8 text at byte {(1 << 20) + 18:,}"),
        (b"cut in a character \xe2\x82", "not UTF-8 text at byte 19"),
        ("utf 16".encode("utf-16"), "not UTF-8 text at byte 0"),
        (b"MZ\0\0\1", "a.txt: a binary file"),
    ],
)
def test_not_text(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", content)
    with pytest.raises(DataError) as error:
        read("a.txt")
    assert message in str(error.value)


def test_a_byte_order_mark_is_not_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == [Piece("hello", False)]
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}')) == [Piece("x", True)]


# ---- JSON lines ----


def test_jsonl(tmp_path, monkeypatch):
    texts = ["plain", "  tab\t\r\nand é 日本 \U0001f600", "<|endoftext|>", "x" * 3000]
    lines = "\n\n".join(json.dumps({"id": 1, "story": text}) for text in [*texts, ""])
    path = write(tmp_path / "a.jsonl", lines)
    assert read(path, text_key="story") == [Piece(text, True) for text in texts]
    monkeypatch.setattr(sources, "BLOCK", 11)
    assert read(path, text_key="story") == [Piece(text, True) for text in texts]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "x"', "a.jsonl:2: not JSON: Expecting ',' delimiter at column 13"),
        ('{"txt": "x", "id": 3}', "a.jsonl:2: no key 'text'; it has 'txt', 'id'\n  fix: set data.text_key"),
        ('{"text": 3}', "a.jsonl:2: not an object with text under 'text'"),
        ('["text"]', "a.jsonl:2: not an object with text under 'text'"),
        ('{"text": "\\ud800"}', "a.jsonl:2: 'text' has half a surrogate pair"),
        (b'{"text": "\xe9"}', "a.jsonl:2: not UTF-8 text at byte 10 of the line"),
        ('{"text": ' + "[" * 100_000, "a.jsonl:2: JSON with a number of thousands of digits, or nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "a.jsonl:2: JSON with a number of thousands of digits, or nested too deeply"),
    ],
)
def test_bad_lines_are_named(tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    line = line if isinstance(line, bytes) else line.encode()
    write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        read("a.jsonl")
    assert message in str(error.value)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")  # who reads that waits for who writes
    for path in (tmp_path / "pipe.txt", "/dev/zero"):
        with pytest.raises(DataError, match="not a regular file"):
            sources.stats([sources.Input("x", Path(path))], {})


def test_a_jsonl_without_text(tmp_path):
    with pytest.raises(DataError, match="no line of this file has any text"):
        read(write(tmp_path / "a.jsonl", "\n\n"))


# ---- The web ----


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A folder and the URL it is served under."""
    (tmp_path / "web").mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "web")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TINYLLM_MIRROR", raising=False)
    yield tmp_path / "web", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_url(web):
    folder, url = web
    write(folder / "stories.jsonl", '{"text": "from afar"}')
    write(folder / "page.html", "some text")
    for name, expected in (("stories.jsonl?raw=1", ("from afar", True)), ("page.html", ("some text", False))):
        config = DataConfig(source=f"{url}/{name}")
        (file,) = inputs(config)
        assert not file.path.exists()
        meter = Meter()
        download(file, meter)
        assert meter.done == meter.total == file.path.stat().st_size
        assert list(pieces(config, (file,))) == [Piece(*expected)]
    with pytest.raises(DataError, match="404"):
        download(inputs(DataConfig(source=f"{url}/nothing.txt"))[0], Meter())


def test_named_sources_come_from_the_mirror(web, monkeypatch):
    folder, url = web
    monkeypatch.setenv("TINYLLM_MIRROR", url)
    place = "datasets/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-train.txt"
    write(folder / place, "Once.\n<|endoftext|>\nTwice.\n<|endoftext|>\n")
    (file,) = inputs(DataConfig(source="tinystories"))
    download(file, Meter())
    assert documents("tinystories") == (["Once.", "Twice."], "")
    write(folder / "karpathy/char-rnn/master/data/tinyshakespeare/input.txt", "not Shakespeare")
    with pytest.raises(DataError, match="SHA-256 is not 86c4e6aa9db7"):
        download(inputs(DataConfig(source="shakespeare"))[0], Meter())


def test_a_download_that_nobody_waits_for_stops(web):
    folder, url = web
    write(folder / "big.txt", "x" * (1 << 20))
    (file,) = inputs(DataConfig(source=f"{url}/big.txt"))
    with pytest.raises(Stopped):
        download(file, Meter(stopped=True))
    assert not file.path.exists()
