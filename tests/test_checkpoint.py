"""Checkpoints: what goes in comes out, a kill leaves a whole file, and no file runs code."""

import io
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from tinyllm import archive
from tinyllm import checkpoint as ckpt
from tinyllm.checkpoint import BEST, LATEST, Checkpoint, find, load, save
from tinyllm.config import RunConfig, check, to_dict
from tinyllm.errors import CheckpointError

ROOT = Path(ckpt.__file__).parents[1]


def example(step=3, size=8):
    generator = torch.Generator().manual_seed(step)
    weights = {
        "wte": torch.randn(size, 4, generator=generator),
        "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(step),
    }
    moments = {name: {"step": torch.tensor(3.0), "exp_avg": w.float() * 2, "lr": 1e-3} for name, w in weights.items()}
    return Checkpoint(
        step=step,
        best_val_loss=math.inf,
        config=to_dict(RunConfig()),
        vocab_size=size,
        model=weights,
        optimizer=moments,
        tokenizer='{"é": "日本"}',
        data={"train": "abc", "n": 5, "entropy": None},
        model_source="5e1f",
        environment={"torch": "2.13"},
        recent_losses=[2.5, math.inf],
        changes=[{"step": 2, "what": "torch", "from": "2.12", "to": "2.13"}],
    )


def same(a, b):
    """Equal to the last bit, types included."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def record(**changes):
    """What a checkpoint's file holds, as torch.save takes it."""
    checkpoint = example()
    held = {"format": "tinyllm checkpoint", "version": 2}
    held |= {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    return {key: value for key, value in (held | changes).items() if value is not KeyError}


def assert_refused(path):
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert error.value.where == str(path)
    assert "\n" not in error.value.what
    return error.value.what


# ---- Round trip ----


def test_round_trip(tmp_path):
    before = example()
    save(tmp_path / "new" / "folder" / "ckpt.pt", before)
    after = load(tmp_path / "new" / "folder" / "ckpt.pt")
    for f in fields(Checkpoint):
        assert same(getattr(before, f.name), getattr(after, f.name)), f.name
    assert check(after.config) == RunConfig()
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["ckpt.pt"]


def test_shared_tensors_are_saved_once(tmp_path):
    """Tied embeddings."""
    shared = torch.zeros(100_000)
    save(tmp_path / "a.pt", replace(example(), model={"wte": shared, "head": shared}))
    assert (tmp_path / "a.pt").stat().st_size < 500_000
    weights = load(tmp_path / "a.pt").model
    assert weights["wte"].data_ptr() == weights["head"].data_ptr()


def test_the_weights_must_fit_the_model(tmp_path):
    model = torch.nn.Linear(3, 2)
    weights = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    ckpt.load_weights(model, weights)
    assert torch.equal(model.weight, torch.ones(2, 3))
    for wrong, named in (
        ({"weight": torch.ones(2, 3)}, "bias"),
        (weights | {"extra": torch.ones(1)}, "extra"),
        (weights | {"weight": torch.ones(2, 4)}, r"torch.Size\(\[2, 4\]\)"),
    ):
        with pytest.raises(CheckpointError, match=f"do not fit its config: .*{named}"):
            ckpt.load_weights(model, wrong)


# ---- Atomic ----


def test_a_kill_leaves_a_whole_file(tmp_path):
    """A real process saves again and again and is killed at some moment: what is there can always be loaded."""
    code = (
        "import sys, torch; from dataclasses import replace\n"
        "from tests.test_checkpoint import example; from tinyllm.checkpoint import save\n"
        "torch.set_num_threads(1); step = int(sys.argv[2]); base = example(size=100_000)\n"
        "while True:\n"
        "    step += 1\n"
        "    save(sys.argv[1], replace(base, step=step, model={'w': torch.full((300_000,), step)}))\n"
        "    print(step, flush=True)\n"
    )
    path, rng, step, torn = tmp_path / "ckpt.pt", random.Random(2), 0, 0
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parents[1]}"}
    for turn in range(4):
        command = [sys.executable, "-c", code, str(path), str(step)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
            process.stdout.readline()
            # Half of the kills are timed by chance; the others come in the middle of a write.
            time.sleep(rng.uniform(0, 0.03))
            while turn % 2 and process.poll() is None and not path.with_name("ckpt.pt.tmp").exists():
                pass
            process.send_signal(signal.SIGKILL)
            said = [int(line) for line in process.stdout.read().split()]
        torn += path.with_name("ckpt.pt.tmp").exists()
        checkpoint = load(path)
        assert checkpoint.step > step
        assert checkpoint.step >= max(said, default=0), "what was reported as saved is there"
        assert torch.equal(checkpoint.model["w"], torch.full((300_000,), checkpoint.step))
        step = checkpoint.step
    assert torn, "no kill came in the middle of a write: this proves nothing"
    save(path, example())
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"], "the next save clears up"


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "ckpt.pt"
    save(path, example())
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="cannot save the checkpoint: it holds a function"):
        save(path, replace(example(), data={"file": lambda: None}))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_full_disk(tmp_path):
    """A limit on the size of a file is reported by the system as a full disk would be."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "ckpt.pt"
    save(path, example())
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot save the checkpoint: ") as error:
            save(path, example(size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "free some space" in error.value.fix
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "ckpt.pt").mkdir()
    for path, reason in (
        (tmp_path / "file" / "ckpt.pt", "File exists"),
        (tmp_path / "file" / "deeper" / "ckpt.pt", "Not a directory"),
        (tmp_path / "ckpt.pt", "Is a directory"),
    ):
        with pytest.raises(CheckpointError) as error:
            save(path, example())
        assert error.value.what == f"cannot save the checkpoint: {reason}"
        assert error.value.where == str(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["ckpt.pt", "file"]


# ---- Files that are none ----


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_a_payload_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(marker))).close()
    assert marker.exists(), "the payload works"
    marker.unlink()
    torch.save(record(data=Payload(marker)), tmp_path / "a.pt")
    said = assert_refused(tmp_path / "a.pt")
    assert said.endswith("open', and could run code; nothing of it was run"), "what it asks for is named"
    torch.save(record(data=Payload(marker)), tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Payload(marker)))
    (tmp_path / "d.pt").write_bytes(pickle.dumps(Payload(marker), protocol=0))
    for name in "bc":
        assert assert_refused(tmp_path / f"{name}.pt") == "not a tinyllm checkpoint: a pickle, which could run code"
    assert assert_refused(tmp_path / "d.pt") == "not a tinyllm checkpoint: not a file of torch.save"
    assert not marker.exists()


def zipped(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n",
        b'{"a": 1}',
        b"[train]\nmax_steps = 3\n",
        bytes(1000),
        b"\x1f\x8b\x08",
    ],
    ids=["empty", "text", "json", "toml", "zeros", "gzip"],
)
def test_files_of_another_kind(tmp_path, content, recwarn):
    (tmp_path / "a.pt").write_bytes(content)
    assert assert_refused(tmp_path / "a.pt") == "not a tinyllm checkpoint: not a file of torch.save"
    assert not recwarn.list


def test_zip_files_of_another_kind(tmp_path):
    for content in (zipped(), zipped(a="x"), zipped(**{"archive/data.pkl": "x"})):
        (tmp_path / "a.pt").write_bytes(content)
        assert assert_refused(tmp_path / "a.pt").startswith(
            ("not a checkpoint, or a damaged one (", "not a tinyllm checkpoint")
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"w": torch.ones(2)}, "iter_num": 5}, "not a tinyllm checkpoint"),  # nanoGPT's
        (torch.ones(3), "not a tinyllm checkpoint"),
        ([1, 2], "not a tinyllm checkpoint"),
        (record(format="other"), "not a tinyllm checkpoint"),
        (record(version=1), "a checkpoint of version 1; this tinyllm reads 2 and 3"),
        (record(version=KeyError), "a checkpoint of version None; this tinyllm reads 2 and 3"),
        (record(version=3), "damaged: its seal, the file's last bytes, is missing"),
        (
            record(step=KeyError, tokenizer=KeyError),
            "a damaged checkpoint: these parts are missing or unknown: step, tokenizer",
        ),
        (record(more=1), "a damaged checkpoint: these parts are missing or unknown: more"),
    ],
)
def test_torch_files_that_are_no_checkpoint(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    assert assert_refused(tmp_path / "a.pt") == message


def test_the_record_above_is_a_checkpoint(tmp_path):
    torch.save(record(), tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").step == 3


def test_truncated_anywhere(tmp_path):
    path = tmp_path / "ckpt.pt"
    save(path, example())
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 97), 1, 3, 4, 5, len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert_refused(path)


def test_damaged_bits_are_noticed(tmp_path):
    """Not one flipped bit of the file gets through, wherever it is; the torture flips thousands."""
    path = tmp_path / "ckpt.pt"
    save(path, example(size=500))
    whole, rng = path.read_bytes(), random.Random(4)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert_refused(path)
    weights = whole.index(example(size=500).model["wte"].numpy().tobytes())
    path.write_bytes(whole[:weights] + bytes([whole[weights] ^ 1]) + whole[weights + 1 :])
    assert assert_refused(path) == "damaged: it is not what was sealed (another SHA-256)"


def test_version_2_is_read(tmp_path):
    """It had no seal; the zip file's own checksums tell what is damaged."""
    now = example()
    held = record(version=2, environment=KeyError, recent_losses=KeyError, changes=KeyError)
    held["model"] = OrderedDict(held["model"])  # as Module.state_dict gives it
    torch.save(held | {"val_loss": 2.5, "versions": {"torch": "2.13"}}, tmp_path / "a.pt")
    before = load(tmp_path / "a.pt")
    for f in fields(Checkpoint):
        if f.name not in ("recent_losses", "changes"):
            assert same(getattr(before, f.name), getattr(now, f.name)), f.name
    assert before.recent_losses == before.changes == []
    content = (tmp_path / "a.pt").read_bytes()
    weights = content.index(now.model["wte"].numpy().tobytes())
    (tmp_path / "a.pt").write_bytes(content[:weights] + bytes([content[weights] ^ 1]) + content[weights + 1 :])
    assert "has another checksum" in assert_refused(tmp_path / "a.pt")


def test_another_version_asks_for_the_tinyllm_that_wrote_it(tmp_path):
    archive.write(tmp_path / "ckpt.pt", record(version=9), step=3)
    for read in (load, find):
        with pytest.raises(CheckpointError, match="of version 9; this tinyllm reads 2 and 3") as error:
            read(tmp_path / "ckpt.pt")
        assert error.value.fix == "use the tinyllm that wrote it, or train from the start"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("step", "3", "step is a str, not a int"),
        ("step", True, "step is a bool, not a int"),
        ("step", -1, "step -1, vocabulary 8"),
        ("vocab_size", 0, "step 3, vocabulary 0"),
        ("best_val_loss", 2, "best_val_loss is a int, not a float"),
        ("model", [], "model is a list, not a dict"),
        ("model", {"wte": 1.0}, "model.wte is a float, not a Tensor"),
        ("optimizer", {"wte": torch.ones(1)}, "optimizer.wte is a Tensor, not a dict"),
        ("recent_losses", [1], "recent_losses.0 is a int, not a float"),
        ("tokenizer", None, "tokenizer is a NoneType, not a str"),
        ("changes", [[]], "changes.0 is a list, not a dict"),
    ],
)
def test_fields_of_another_kind(tmp_path, field, value, message):
    archive.write(tmp_path / "a.pt", record(**{"version": 3, field: value}), step=3)
    assert assert_refused(tmp_path / "a.pt") == f"a damaged checkpoint: {message}"


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint") as error:
        load(tmp_path / "ckpt.pt")
    assert "tinyllm train" in error.value.fix
    with pytest.raises(CheckpointError, match="is a folder") as error:
        load(tmp_path)
    assert str(tmp_path / "ckpt.pt") in error.value.fix
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be read: Not a directory"):
        load(tmp_path / "file" / "ckpt.pt")


# ---- Finding one ----


def test_find_prefers_the_best_then_the_latest(tmp_path):
    with pytest.raises(CheckpointError, match=r"no best\.pt or ckpt\.pt in this folder") as error:
        find(tmp_path)
    assert error.value.where == f"{tmp_path}/"
    (tmp_path / "best.pt").mkdir()  # not a file
    (tmp_path / "ckpt.pt.tmp").write_text("of a save that was killed")
    with pytest.raises(CheckpointError):
        find(tmp_path)
    (tmp_path / "best.pt").rmdir()
    steps = {"best-1.pt": 1, "best.pt": 2, "ckpt-4.pt": 4, "ckpt.pt": 5}
    for name, step in steps.items():
        save(tmp_path / name, example(step))
    orders = {BEST: ["best.pt", "best-1.pt", "ckpt.pt", "ckpt-4.pt"]}
    orders[LATEST] = ["ckpt.pt", "ckpt-4.pt", "best.pt", "best-1.pt"]
    for wanted, order in orders.items():
        contents = {name: (tmp_path / name).read_bytes() for name in order}
        for number, name in enumerate(order):
            found = find(str(tmp_path), wanted)
            assert (found.path, found.checkpoint.step) == (tmp_path / name, steps[name])
            assert [error.where for error in found.passed_over] == [str(tmp_path / other) for other in order[:number]]
            damaged = bytearray(contents[name])
            damaged[len(damaged) // 2] ^= 1
            (tmp_path / name).write_bytes(damaged)
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
    assert find(tmp_path / "ckpt-4.pt").checkpoint.step == 4


def test_a_damaged_file_points_to_the_newest_good_one(tmp_path):
    for name, step in {"best.pt": 2, "ckpt-4.pt": 4, "ckpt.pt": 5}.items():
        save(tmp_path / name, example(step))
    (tmp_path / "ckpt.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError) as error:
        find(tmp_path / "ckpt.pt")
    assert error.value.where == str(tmp_path / "ckpt.pt")
    assert error.value.fix == f"the newest good one beside it: {tmp_path}/ckpt-4.pt, of step 4"
    (tmp_path / "ckpt-4.pt").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        find(tmp_path / "ckpt.pt")
    assert error.value.fix.endswith("best.pt, of step 2")
    (tmp_path / "metrics.jsonl").write_bytes(b"{}")
    with pytest.raises(CheckpointError) as error:
        find(tmp_path / "metrics.jsonl")
    assert error.value.fix.endswith("best.pt, of step 2")
    (tmp_path / "best.pt").write_bytes(b"")
    for path in (tmp_path / "ckpt.pt", tmp_path):
        with pytest.raises(CheckpointError) as error:
            find(path)
        assert error.value.fix == "no whole checkpoint is here: take a copy from elsewhere, or train from the start"
