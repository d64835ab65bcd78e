"""Preparing data: the splits, the figures against slow references, and what happens when it is cut short."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tinyllm import baselines, sources, writing
from tinyllm import prepare as prep
from tinyllm.config import DataConfig
from tinyllm.data import open_tokens, read_header
from tinyllm.errors import DataError, TokenizerError
from tinyllm.prepare import Prepared, Progress, is_prepared, open_prepared
from tinyllm.tokenizer import decode, digest, end_of_text, from_json

DATA = Path(__file__).parents[2] / "shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there")
TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(300))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a text in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path


def config(source="a.txt", tokenizer="char", **settings):
    return DataConfig(source=source, dir="data", tokenizer=tokenizer, **settings)


def run(config, **options):
    """The Prepared, after checking the events before it."""
    *progress, last = prep.prepare(config, **options)
    assert isinstance(last, Prepared)
    assert all(isinstance(p, Progress) for p in progress)
    return last


def tokens(split):
    return open_tokens(Path("data") / f"{split}.bin")[0]


def state():
    """Every file of data/, with its content and time."""
    files = [p for p in Path("data").rglob("*") if p.is_file()] if Path("data").exists() else []
    return {p.as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


# ---- The splits ----


@needs_data
def test_tiny_shakespeare_by_characters(here):
    (here / "a.txt").write_bytes((DATA / "tinyshakespeare.txt").read_bytes())
    start = time.perf_counter()
    prepared = run(config())
    assert time.perf_counter() - start < 5  # about 0.5 s on two cores
    assert (prepared.train.tokens, prepared.val.tokens) == (1_003_854, 111_540)
    text = (here / "a.txt").read_text()
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    expected = np.array([stoi[c] for c in text], dtype=np.uint16)
    np.testing.assert_array_equal(tokens("train"), expected[:1_003_854])
    np.testing.assert_array_equal(tokens("val"), expected[1_003_854:])
    assert prepared.unigram_entropy == pytest.approx(3.347, abs=0.001)
    assert prepared.bigram_entropy == pytest.approx(2.484, abs=0.005)
    assert (prepared.overlap, prepared.entropy, prepared.bytes_per_token) == (0, None, 1)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_every_character_is_in_one_split(here, tokenizer):
    text = TEXT + "é日本\r\n  \U0001f600" * 20
    (here / "a.txt").write_bytes(text.encode())
    prepared = run(config(tokenizer=tokenizer, vocab_size=300, val_fraction=0.25))
    tokenizer = from_json(prepared.tokenizer_json)
    at = int(len(text) * 0.75)
    for split, part in (("train", text[:at]), ("val", text[at:])):
        size = getattr(prepared, split)
        assert decode(tokenizer, tokens(split).tolist()) == part
        assert (size.characters, size.text_bytes, size.documents) == (len(part), len(part.encode()), 0)
        assert size.tokens == len(tokens(split))
        header = read_header(f"data/{split}.bin")
        assert header.text_bytes == size.text_bytes
        assert header.tokenizer_hash == prepared.tokenizer_hash == digest(Path("data/tokenizer.json").read_text())
        assert header.vocab_size == prepared.vocab_size


def test_documents_are_divided_whole_and_each_is_ended(here, monkeypatch):
    monkeypatch.setattr(writing, "BATCH", 50)
    stories = [f"story {i}" + " and on" * (i % 7) for i in range(30)]
    (here / "a.txt").write_text("\n<|endoftext|>\n".join(stories))
    prepared = run(config(val_fraction=0.2))
    end = end_of_text(from_json(prepared.tokenizer_json))
    for split, part in (("train", stories[:24]), ("val", stories[24:])):
        whole = tokens(split)
        assert whole[-1] == end
        rows = np.split(whole[:-1], np.flatnonzero(whole[:-1] == end))
        read = [decode(from_json(prepared.tokenizer_json), row.tolist()) for row in rows]
        assert read == part
        assert getattr(prepared, split).documents == len(part)
        assert getattr(prepared, split).tokens == len("".join(part)) + len(part)
    for fraction, expected in ((0.001, (29, 1)), (0.999, (1, 29))):
        prepared = run(config(val_fraction=fraction))
        assert (prepared.train.documents, prepared.val.documents) == expected


def test_a_single_document_is_cut_inside(here):
    (here / "a.jsonl").write_text(json.dumps({"text": "0123456789"}))
    prepared = run(config("a.jsonl", val_fraction=0.3))
    assert tokens("train").tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert tokens("val").tolist() == [7, 8, 9, 10]
    assert (prepared.train.documents, prepared.val.documents) == (0, 1)


def test_too_short_to_divide(here):
    (here / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"1 characters cannot be divided by data\.val_fraction = 0\.1"):
        run(config())
    assert not Path("data").exists()


def test_the_bpe_has_not_seen_the_validation_split(here):
    (here / "a.txt").write_text(TEXT + "zqzqzq" * 300)
    prepared = run(config(tokenizer="bpe", vocab_size=300))
    assert not [token for token in from_json(prepared.tokenizer_json).get_vocab() if "zq" in token]


def test_tales_have_a_known_entropy(here):
    pytest.importorskip("tinyllm.tales")
    from tinyllm.tales import stories

    prepared = run(config("tales", "bpe", tales_stories=300, tales_seed=5, vocab_size=500))
    held_out = [*stories(300, 5)][270:]
    assert prepared.val.documents == 30
    assert prepared.val.characters == sum(len(s.text) for s in held_out)
    assert prepared.entropy == pytest.approx(-sum(s.log_prob for s in held_out) / len(tokens("val")))
    assert 0 < prepared.entropy < prepared.bigram_entropy < prepared.unigram_entropy
    single = run(config("tales", "bpe", tales_stories=1, vocab_size=257))
    assert single.entropy is None  # of a part of a story it is not known


# ---- The figures ----


def figures(train, val, vocab_size):
    *shares, last = baselines.compare(np.array(train, np.uint32), np.array(val, np.uint32), vocab_size)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    return last.unigram, last.bigram, last.overlap


@pytest.mark.parametrize("vocab_size", [5, 70_000])
def test_losses_and_overlap_against_slow_counting(monkeypatch, vocab_size):
    monkeypatch.setattr(baselines, "CHUNK", 128)  # so that windows and pairs lie across chunks
    monkeypatch.setattr(baselines, "HASHED", 32)
    rng = np.random.default_rng(3)
    train, other = vocab_size - 1 - rng.integers(0, 5, 3000) ** 2 // 5, rng.integers(0, vocab_size, 66)
    # 127 is the last place of a chunk: its window is the one that goes farthest into the next.
    val = np.concatenate([train[127:191], other[:64], train[1001:1065], train[1:65], other[64:]])
    unigram, bigram, overlap = figures(train, val, vocab_size)

    counts = Counter(train.tolist())
    p = {t: (counts[t] + 1) / (len(train) + vocab_size) for t in range(vocab_size)}
    assert unigram == pytest.approx(-sum(math.log(p[t]) for t in val.tolist()) / len(val))
    pairs = Counter(zip(train.tolist(), train[1:].tolist(), strict=False))
    k, scored = baselines.PRIOR, list(zip(val.tolist(), val[1:].tolist(), strict=False))
    assert len(scored) <= 4 * baselines.CHUNK
    losses = [-math.log((pairs[a, b] + k * p[b]) / (counts[a] + k)) for a, b in scored]
    assert bigram == pytest.approx(sum(losses) / len(losses))
    seen = {tuple(train[i : i + 64].tolist()) for i in range(len(train) - 63)}
    windows = [tuple(val[i : i + 64].tolist()) for i in range(0, len(val) - 63, 64)]
    assert overlap == sum(w in seen for w in windows) / len(windows) == 0.75


def test_the_pairs_of_a_long_text_are_those_of_every_nth_chunk(monkeypatch):
    monkeypatch.setattr(baselines, "CHUNK", 128)
    monkeypatch.setattr(baselines, "PAIRS", 1000)
    rng = np.random.default_rng(5)
    train, val = rng.integers(0, 9, 2950) * rng.integers(0, 2, 2950), rng.integers(0, 9, 200)
    _, bigram, _ = figures(train, val, 9)

    counted = [train[start : start + 129].tolist() for start in range(0, 2950, 3 * 128)]  # and what follows each
    firsts = Counter(token for chunk in counted for token in chunk[:128])
    pairs = Counter(pair for chunk in counted for pair in itertools.pairwise(chunk))
    counts = Counter(train.tolist())
    p, k = {t: (counts[t] + 1) / (len(train) + 9) for t in range(9)}, baselines.PRIOR
    losses = [-math.log((pairs[a, b] + k * p[b]) / (firsts[a] + k)) for a, b in itertools.pairwise(val.tolist())]
    assert bigram == pytest.approx(sum(losses) / len(losses))


def test_figures_by_hand():
    """Train aabb: p(a) = p(b) = 3/6. Val ab: the pair (a, b) occurs once after two a's."""
    unigram, bigram, overlap = figures([0, 0, 1, 1], [0, 1], 2)
    assert unigram == pytest.approx(math.log(2))
    assert bigram == pytest.approx(-math.log((1 + baselines.PRIOR / 2) / (2 + baselines.PRIOR)))
    assert overlap == 0


def test_a_text_of_one_token_has_a_loss_of_zero_and_not_of_minus_zero():
    assert f"{figures([0] * 9, [0] * 5, 1)[0]:.3f}" == "0.000"


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_validation_text_inside_the_training_text_is_found(here, copies):
    rng = random.Random(1)
    lines = ["".join(rng.choices("abcdefgh", k=63)) + "\n" for _ in range(100)]
    (here / "a.txt").write_text("".join(lines[:90] + lines[:copies] + lines[90 + copies :]))
    assert run(config()).overlap == copies / 10


# ---- Prepared once ----


def test_nothing_changed_nothing_done(here):
    first = run(config())
    assert first.reasons == ("new",)
    before = state()
    assert set(before) == {f"data/{name}" for name in prep.FILES}
    events = list(prep.prepare(config()))
    assert len(events) == 1
    assert events[0].reasons == ()
    assert open_prepared(config()) == events[0]
    os.utime("a.txt")  # another time, the same content
    assert run(config()).reasons == ()
    assert run(config(vocab_size=999)).reasons == ()  # only a BPE's size is chosen
    assert state() == before
    again = run(config(), force=True)
    assert again.reasons == ("forced",)
    assert {k: v[0] for k, v in state().items() if "meta" not in k} == {
        k: v[0] for k, v in before.items() if "meta" not in k
    }


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"val_fraction": 0.2}, "data.val_fraction: 0.1 -> 0.2"),
        ({"tokenizer": "byte"}, 'data.tokenizer: "bpe" -> "byte"'),
        ({"vocab_size": 280}, "data.vocab_size: 270 -> 280"),
        ({"separator": "Line 7"}, 'data.separator: "<|endoftext|>" -> "Line 7"'),
        ({"separator": "null"}, 'data.separator: "<|endoftext|>" -> "null"'),
        ({"source": "b.txt"}, 'data.source: "a.txt" -> "b.txt"'),
        ({"source": "tales", "tales_stories": 50}, "data.tales_stories: none -> 50"),
    ],
)
def test_each_changed_setting_is_named(here, changed, reason):
    shutil.copy("a.txt", "b.txt")
    old = {"tokenizer": "bpe", "vocab_size": 270}
    run(config(**old))
    before = state()
    with pytest.raises(DataError) as error:
        open_prepared(config(**old | changed))
    assert reason in str(error.value)
    assert "`tinyllm prepare run.toml` prepares it again" in error.value.fix
    assert state() == before
    assert reason in run(config(**old | changed)).reasons
    open_prepared(config(**old | changed))


def test_changed_files_are_named(here):
    Path("texts").mkdir()
    Path("texts/a.txt").write_text(TEXT)
    run(config("texts"))
    Path("texts/b.txt").write_text("more\n")
    reason = 'file texts/b.txt: none -> "5 bytes, '
    assert run(config("texts")).reasons[0].startswith(reason)
    Path("texts/b.txt").write_text("less\n")  # as long as before
    with pytest.raises(DataError, match=r"file texts/b\.txt"):
        open_prepared(config("texts"))
    assert len(run(config("texts")).reasons) == 1
    Path("texts/b.txt").unlink()
    assert run(config("texts")).reasons[0].endswith("-> none")


def test_prepared_data_can_be_used_without_its_sources(here):
    run(config())
    Path("a.txt").unlink()
    open_prepared(config())
    assert run(config()).reasons == ()
    with pytest.raises(DataError, match=r"a\.txt: no such file"):
        run(config(), force=True)
    open_prepared(config())


def test_an_emptied_source_is_not_a_missing_one(here):
    run(config())
    Path("a.txt").write_text("")
    with pytest.raises(DataError, match=r"a\.txt: this file is empty"):
        open_prepared(config())


def test_a_tokenizer_file_is_part_of_the_fingerprint(here):
    run(config())
    shutil.copy("data/tokenizer.json", "mine.json")
    mine = config(tokenizer="mine.json")
    assert "data.tokenizer" in run(mine).reasons[0]
    Path("mine.json").write_text(Path("mine.json").read_text() + "\n")
    with pytest.raises(DataError, match=r"file mine\.json"):
        open_prepared(mine)
    run(mine)
    Path("mine.json").unlink()
    open_prepared(mine)
    with pytest.raises(TokenizerError, match="no such tokenizer"):
        run(config(tokenizer="bqe"))


def test_a_character_that_the_tokenizer_lacks_is_named(here):
    run(config())
    shutil.copy("data/tokenizer.json", "mine.json")
    before = state()
    Path("a.txt").write_text(TEXT * 20 + "so na\u00efve!")
    with pytest.raises(TokenizerError) as error:
        run(config(tokenizer="mine.json"))
    assert error.value.what == "no token for the character '\u00ef' (U+00EF)"
    assert error.value.where == "a.txt in '401 lazy dogs.\\nso na\u00efve!'"
    assert state() == before


# ---- Damage ----


def damage_tokenizer():
    Path("data/tokenizer.json").write_text(Path("data/tokenizer.json").read_text() + " ")


def damage_pair():
    shutil.copy("data/train.bin", "data/val.bin")


def damage_meta():
    text = Path("data/meta.json").read_text()
    Path("data/meta.json").write_text(text.replace('"unigram_entropy": ', '"unigram_entropy": 1'))


def flip(name, at):
    data = bytearray(Path(name).read_bytes())
    data[at] ^= 1
    Path(name).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda: Path("data/meta.json").unlink(), "meta.json: no prepared data"),
        (lambda: Path("data/meta.json").write_text("{"), "meta.json: damaged"),
        (lambda: Path("data/meta.json").write_text("[" * 100_000), "meta.json: damaged"),
        (lambda: Path("data/meta.json").write_text('{"version": 2}'), "meta.json: damaged: KeyError"),
        (
            lambda: Path("data/meta.json").write_text('{"version": 1}'),
            "by another version of tinyllm:\n  format: 1 -> 2",
        ),
        (damage_meta, "meta.json: damaged: ValueError: another SHA-256"),
        (lambda: Path("data/tokenizer.json").unlink(), "tokenizer.json: no prepared data"),
        (lambda: Path("data/val.bin").unlink(), "val.bin: no such token file"),
        (lambda: Path("data/train.bin").write_bytes(b"x"), "train.bin: not a token file"),
        (damage_tokenizer, "tokenizer.json: it has been changed"),
        (damage_pair, "val.bin: it belongs to another preparation"),
        (lambda: flip("data/val.bin", 24), "val.bin: it belongs to another preparation"),  # bytes of text
        (lambda: flip("data/val.bin", 40), "val.bin: it belongs to another preparation"),  # the tokenizer's hash
        (lambda: flip("data/val.bin", 70), "val.bin: it belongs to another preparation"),  # the hash of the ids
        (lambda: flip("data/train.bin", 128), "train.bin: damaged: its ids are not those that were written"),
        (lambda: flip("data/val.bin", -2), "val.bin: damaged: its ids are not those that were written"),
    ],
)
def test_damage_is_named_and_repaired(here, damage, message):
    run(config())
    damage()
    with pytest.raises(DataError) as error:
        open_prepared(config())
    assert message in str(error.value)
    assert "tinyllm prepare run.toml" in error.value.fix
    assert run(config()).reasons != ()
    open_prepared(config())


def test_a_file_of_the_same_size_from_another_preparation(here):
    """The same settings, tokenizer and sizes, another text: the headers alone tell."""
    run(config(tokenizer="byte"))
    old = Path("data/train.bin").read_bytes()
    Path("a.txt").write_text(TEXT.replace("quick", "slow_"))
    run(config(tokenizer="byte"))
    assert len(old) == Path("data/train.bin").stat().st_size
    Path("data/train.bin").write_bytes(old)
    with pytest.raises(DataError, match=r"train\.bin: it belongs to another preparation"):
        open_prepared(config(tokenizer="byte"))


def test_large_files_are_read_by_prepare_alone(here, monkeypatch):
    monkeypatch.setattr(prep, "READ_AT_ONCE", 100)
    run(config())
    flip("data/train.bin", 1000)
    open_prepared(config())
    assert run(config()).reasons == ("data/train.bin: damaged: its ids are not those that were written",)


def test_is_prepared(here):
    assert not is_prepared(config())
    run(config())
    assert is_prepared(config())


# ---- Cut short ----


@pytest.mark.parametrize("had_one", [False, True])
@pytest.mark.parametrize("stage", ["reading", "writing tokens", "comparing the splits"])
def test_an_interruption_leaves_the_old_state(here, monkeypatch, had_one, stage):
    """And beside it, once the tokenizer is there, what was made: the next one goes on from that."""
    monkeypatch.setattr(sources, "REPORT", 1000)
    if had_one:
        run(config())
    before = state()
    events = prep.prepare(config(val_fraction=0.3))
    while next(events).stage != stage:
        pass
    with pytest.raises(KeyboardInterrupt):
        events.throw(KeyboardInterrupt)
    left = {Path(name).parts[1] for name in state().keys() - before.keys()}
    assert len(left) == (0 if stage == "reading" else 1)
    assert all(name.startswith(prep.ASIDE) for name in left)
    assert before.items() <= state().items()
    assert Path("data").exists() == (had_one or stage != "reading")
    for event in prep.prepare(config(val_fraction=0.3)):  # a loop that is left early
        if event.stage == stage:
            break
    del event
    assert before.items() <= state().items()
    run(config(val_fraction=0.3))
    assert set(state()) == {f"data/{name}" for name in prep.FILES}


# ---- What was made before it was cut short ----


def words(count: int) -> str:
    rng = random.Random(7)
    return " ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(count))


def in_small_batches(monkeypatch) -> None:
    monkeypatch.setattr(writing, "BATCH", 500)
    monkeypatch.setattr(sources, "PART", 500)


def texts_encoded(monkeypatch) -> list[str]:
    """The texts that will have been encoded from now on."""
    real, texts = writing.Encoder.__call__, []

    def noted(self, rows, where):
        texts.extend(rows)
        return real(self, rows, where)

    monkeypatch.setattr(writing.Encoder, "__call__", noted)
    return texts


def cut_short(config: DataConfig, batches: int, monkeypatch) -> None:
    """Prepare until so many batches are written, then interrupt it; each is noted in the journal."""
    monkeypatch.setattr(writing, "INTERVAL", 0.0)
    in_small_batches(monkeypatch)
    events = prep.prepare(config)
    while batches:
        batches -= next(events).stage.startswith("writing tokens")
    with pytest.raises(KeyboardInterrupt):
        events.throw(KeyboardInterrupt)


@pytest.mark.parametrize("settings", [{"source": "a.txt", "tokenizer": "bpe", "vocab_size": 300}, {"source": "tales"}])
@pytest.mark.parametrize("batches", [1, 4, 19])
def test_it_goes_on_where_it_was_cut_short(here, monkeypatch, settings, batches):
    """To the same bits, with the same tokenizer, and what was encoded is not encoded again."""
    in_small_batches(monkeypatch)
    (here / "a.txt").write_text(words(3000))
    settings = {"tales_stories": 20, "val_fraction": 0.2, **settings}
    whole = run(DataConfig(dir="whole", **settings))
    own = DataConfig(dir="data", **settings)
    cut_short(own, batches, monkeypatch)
    texts = texts_encoded(monkeypatch)
    monkeypatch.setattr(prep, "build", lambda *args, **kwargs: pytest.fail("the tokenizer is there"))
    prepared = run(own)
    characters = prepared.train.characters + prepared.val.characters
    assert 0 < sum(map(len, texts)) <= characters - 400 * batches
    assert prepared == prep.replace(whole, dir="data")
    assert set(state()) == {f"data/{name}" for name in prep.FILES}
    for name in prep.FILES:
        assert Path("data", name).read_bytes() == Path("whole", name).read_bytes(), name


def test_kills_again_and_again_change_nothing(here):
    """Real processes, killed at any moment; each goes on from the one before, and the last one's files are the same."""
    (here / "a.txt").write_text(words(60_000))
    code = (
        "import sys, time; from tinyllm import sources, writing; from tinyllm.config import DataConfig\n"
        "from tinyllm.prepare import prepare\n"
        "writing.INTERVAL, writing.BATCH, sources.PART = 0.0, 2000, 2000\n"
        "for event in prepare(DataConfig(source='a.txt', dir=sys.argv[1], tokenizer='bpe', vocab_size=300)):\n"
        "    print(getattr(event, 'stage', 'done'), flush=True); time.sleep(0.001)"
    )
    env = os.environ | {"PYTHONPATH": str(Path(prep.__file__).parents[1])}

    def made(folder: str, most: int) -> bool:
        """Whether it came to its end before so many batches were written."""
        process = subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True, env=env)
        for line in process.stdout:
            most -= line.startswith("writing")
            if most < 0:
                process.kill()
        process.stdout.close()
        return process.wait() == 0

    rng, kills = random.Random(3), 0
    while not made("data", rng.randint(3, 25)):
        kills += 1
        assert len([*Path("data").glob(prep.ASIDE + "*")]) == 1
        assert kills < 100
    assert kills >= 4
    assert made("whole", 10**9)
    assert {path.name for path in Path("data").iterdir()} == set(prep.FILES)
    for name in prep.FILES:
        assert Path("data", name).read_bytes() == Path("whole", name).read_bytes(), name


@pytest.mark.parametrize("change", ["text", "settings", "force"])
def test_what_was_made_of_something_else_is_not_used(here, monkeypatch, change):
    cut_short(config(), 5, monkeypatch)
    if change == "text":
        (here / "a.txt").write_text(TEXT.upper())
    own = config(val_fraction=0.3) if change == "settings" else config()
    texts = texts_encoded(monkeypatch)
    run(own, force=change == "force")
    assert "".join(texts) == (here / "a.txt").read_text()
    assert set(state()) == {f"data/{name}" for name in prep.FILES}


@pytest.mark.parametrize("name", ["journal.json", "tokenizer.json", "train.bin.tmp"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_what_was_damaged_meanwhile_is_not_used(here, monkeypatch, name, damage):
    in_small_batches(monkeypatch)
    run(config())
    whole = {name: content for name, (content, _) in state().items()}
    shutil.rmtree("data")
    cut_short(config(), 5, monkeypatch)
    (path,) = Path("data").glob(f"{prep.ASIDE}*/{name}")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 3])
    else:
        path.write_bytes(content[:300] + bytes([content[300] ^ 1]) + content[301:])
    if name == "train.bin.tmp":
        with pytest.raises(DataError, match="No such file" if damage == "gone" else "it is not what was written"):
            run(config())
    run(config())
    assert {name: content for name, (content, _) in state().items()} == whole


def test_an_error_in_the_middle_leaves_the_old_state(here):
    run(config())
    before = state()
    Path("a.txt").write_bytes(TEXT.encode() + b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        run(config())
    assert state() == before


@pytest.mark.parametrize("moved", range(5))
def test_a_kill_between_the_moves_is_made_good(here, monkeypatch, moved):
    """After each of the renames in turn: either the old preparation is whole, or the new one."""
    run(config())
    new, calls, replace = config(val_fraction=0.3), [], os.replace

    def killed(source, target):
        if Path(source).suffix != ".tmp":  # those of TokenWriter
            calls.append(target)
            if len(calls) > moved:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(new)
    monkeypatch.setattr(os, "replace", replace)
    assert is_prepared(new)
    expected = config() if moved == 0 else new
    prepared = open_prepared(expected)
    assert prepared.fingerprint["data.val_fraction"] == expected.val_fraction
    assert set(state()) == {f"data/{name}" for name in prep.FILES}


def test_a_killed_process_leaves_the_old_state(here):
    run(config())
    before = state()
    code = (
        "from tinyllm.config import DataConfig; from tinyllm.prepare import prepare\n"
        "for event in prepare(DataConfig(source='a.txt', dir='data', tokenizer='byte')):\n"
        "    print(event.stage, flush=True); __import__('time').sleep(0.2 if 'writ' in event.stage else 0)"
    )
    root = Path(prep.__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("writing"):
            process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = [*Path("data").glob(prep.ASIDE + "*")]
    assert len(left) == 1
    open_prepared(config())
    run(config(), force=True)
    assert not [*Path("data").glob(".*")], "the leftover is removed"
    assert before.keys() == state().keys()


def test_two_at_once_do_not_disturb_each_other(here):
    """The folder of one that is at work stays, however old its files look; the last one's result counts."""
    slow = prep.prepare(config())
    while next(slow).stage != "writing tokens":
        pass
    (aside,) = Path("data").glob(prep.ASIDE + "*")
    for path in (*aside.iterdir(), aside):
        os.utime(path, (0, 0))
    quick = run(config(tokenizer="byte"))
    assert open_prepared(config(tokenizer="byte")).fingerprint == quick.fingerprint
    assert aside.exists()
    *_, last = slow
    assert isinstance(last, Prepared)
    assert open_prepared(config()).fingerprint == last.fingerprint
    assert set(state()) == {f"data/{name}" for name in prep.FILES}


def test_results_that_are_put_into_place_at_the_same_time_do_not_mix(here):
    """Four files each, by four who do nothing else: those that are there at the end are of one."""
    folder = Path("data")
    folder.mkdir()

    def put(who):
        for number in range(50):
            aside = folder / f"{prep.ASIDE}{who}-{number}"
            aside.mkdir()
            for name in prep.FILES:
                (aside / name).write_text(f"{who}-{number}")
            prep.publish(aside, folder)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(put, range(4))) == [None] * 4
    assert {path.name for path in folder.iterdir()} == set(prep.FILES)
    assert len({path.read_text() for path in folder.iterdir()}) == 1


def test_without_locks_a_leftover_is_removed_after_an_hour(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    left = Path("data") / (prep.ASIDE + "x")
    left.mkdir(parents=True)
    (left / "train.bin").write_bytes(b"")
    os.utime(left, (0, 0))
    run(config())
    assert left.exists(), "it could be another process at work"
    os.utime(left / "train.bin", (0, 0))
    os.utime(left, (0, 0))
    run(config(), force=True)
    assert not left.exists()


def test_a_folder_that_cannot_be_written(here):
    Path("data").write_text("a file is in the way")
    with pytest.raises(DataError, match="data: cannot be written: File exists"):
        run(config())


def test_text_that_changes_while_it_is_read(here, monkeypatch):
    monkeypatch.setattr(sources, "REPORT", 1000)
    events = prep.prepare(config(tokenizer="byte"))
    while next(events).stage != "reading":
        pass
    Path("a.txt").write_text(TEXT * 2)  # the first reading has its block already; the next has not
    with pytest.raises(DataError, match="changed while it was being read"):
        list(events)
    assert not Path("data").exists()


def test_importing_is_cheap():
    code = "import sys, tinyllm.prepare; print([m for m in ('torch', 'pooch', 'requests') if m in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(Path(prep.__file__).parents[1])}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=env) == "[]\n"


def test_two_who_open_the_data_finish_the_move_together(tmp_path, monkeypatch):
    """Each file is moved by one of them; to the other it is gone."""
    ready = tmp_path / prep.READY
    ready.mkdir()
    for name in prep.FILES:
        (ready / name).write_text(name)
    real = os.replace

    def somebody_else_was_faster(source, target):
        real(source, target)
        raise FileNotFoundError(2, "No such file or directory", str(source))

    monkeypatch.setattr(prep.os, "replace", somebody_else_was_faster)
    prep.finish_move(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(prep.FILES)
