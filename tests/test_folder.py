"""The run's folder: never two runs in one, no metric lost or told twice, and nothing changed in a run that goes on."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinyllm.checkpoint import Checkpoint, save
from tinyllm.config import check, load, to_dict
from tinyllm.errors import CheckpointError, ConfigError, RunError
from tinyllm.events import Evaluated, Evaluation, Finished, Note, Saved, StepDone, Stopped
from tinyllm.folder import claimed, clear, read_metrics, record, refuse, reopen, trim_metrics, write_config

CONFIG = check({"model": {"n_layer": 2}, "optim": {"betas": [0.8, 0.99]}, "data": {"separator": 'a "b"\n\u00e9'}})


def checkpoint(folder, name="ckpt.pt", config=CONFIG):
    held = Checkpoint(
        step=5,
        best_val_loss=1.5,
        config=to_dict(config),
        vocab_size=9,
        model={"w": torch.ones(2)},
        optimizer={},
        tokenizer="{}",
        data={},
    )
    save(folder / name, held)
    return folder / name


# ---- Whose folder it is ----


@pytest.mark.parametrize(
    ("present", "fix"),
    [
        (["ckpt.pt", "best.pt", "metrics.jsonl"], "`tinyllm resume {out}/ckpt.pt` goes on, --overwrite deletes it"),
        (["best.pt"], "--overwrite deletes it"),
        (["metrics.jsonl"], "--overwrite deletes it"),
    ],
)
def test_a_folder_that_holds_a_run_is_refused_unless_told(tmp_path, present, fix):
    before = {name: name for name in [*present, "notes.txt", "run.toml"]}
    for name in before:
        (tmp_path / name).write_text(name)
    with pytest.raises(RunError) as error:
        refuse(str(tmp_path), overwrite=False)
    assert error.value.what == f"already holds a run ({', '.join(present)})"
    assert error.value.fix.startswith(fix.format(out=tmp_path))
    refuse(str(tmp_path), overwrite=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before, "so far nothing is deleted"
    clear(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "run.toml"}, "what is not ours stays"
    refuse(str(tmp_path), overwrite=False)


def test_a_new_folder_is_free_and_others_files_are_no_run(tmp_path):
    refuse(str(tmp_path / "a" / "b"), overwrite=False)
    assert not (tmp_path / "a").exists(), "asking leaves nothing behind"
    (tmp_path / "notes.txt").write_text("mine")
    refuse(str(tmp_path), overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_place_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for out, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "out", "Not a directory")):
        with pytest.raises(RunError) as error:
            refuse(str(out), overwrite=True)
        assert error.value.what == f"cannot be written to: {reason}"
        assert error.value.where == f"{out}/"
    config = check({"train": {"out_dir": str(tmp_path / "file")}})
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        write_config(config)
    assert (tmp_path / "file").read_text() == "x"


def test_one_training_at_a_time(tmp_path):
    """Between two processes; and whoever is killed does not keep the folder."""
    pytest.importorskip("fcntl")
    out = tmp_path / "out"
    code = (
        "import sys, time; from tinyllm.folder import claimed\n"
        "with claimed(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(RunError, match="another tinyllm is training in this folder") as error, claimed(str(out)):
            pass
        assert error.value.where == f"{out}/"
        other.kill()
    for _ in range(2):  # an error inside gives it back, too
        with pytest.raises(ZeroDivisionError), claimed(str(out)):
            raise ZeroDivisionError
    assert not [*out.iterdir()]


def test_the_resolved_config_reads_back(tmp_path):
    config = check(to_dict(CONFIG), [f"train.out_dir={json.dumps(str(tmp_path))}"])
    path = write_config(config)
    assert path == tmp_path / "run.toml"
    assert load(path) == config
    changed = check(to_dict(config), ["train.seed=7"])
    write_config(changed)
    assert load(path) == changed
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]


# ---- Metrics ----

EVALUATED = Evaluated(10, Evaluation(2.0, 99, 1.25), Evaluation(3.0, 98, 1.5), is_best=True)
EVENTS = [
    Note("hello"),
    StepDone(10, 2.5, 0.75, 1e-3),
    Saved(10, Path("ckpt.pt")),
    EVALUATED,
    StepDone(20, 2.25, 0.5, 1e-4),
    Finished(20, Evaluation(3.0, 98, 1.5), 3.0),
    Stopped(20),
]
ROWS = [
    {"event": "step", "step": 10, "loss": 2.5, "grad_norm": 0.75, "lr": 1e-3},
    {
        "event": "eval",
        "step": 10,
        "train_loss": 2.0,
        "val_loss": 3.0,
        "train_bits_per_byte": 1.25,
        "val_bits_per_byte": 1.5,
    },
    {"event": "step", "step": 20, "loss": 2.25, "grad_norm": 0.5, "lr": 1e-4},
]


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def test_each_event_passes_and_its_row_is_there_at_once(tmp_path):
    seen = []
    for event in record(EVENTS, str(tmp_path)):
        seen.append(event)
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        expected = sum(isinstance(e, StepDone | Evaluated) for e in seen)
        assert len(rows) == expected, "a kill after this event must not lose it"
    assert seen == EVENTS
    rows = read_metrics(str(tmp_path))
    assert without_time(rows) == ROWS
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    assert abs(times[0] - os.stat(tmp_path / "metrics.jsonl").st_mtime) < 60
    list(record(EVENTS[:2], str(tmp_path)))
    assert without_time(read_metrics(str(tmp_path))) == [*ROWS, ROWS[0]], "rows are appended"


def test_a_loss_that_is_no_number_reads_back(tmp_path):
    list(record([StepDone(1, math.nan, math.inf, 0.1)], str(tmp_path)))
    (row,) = read_metrics(str(tmp_path))
    assert math.isnan(row["loss"])
    assert row["grad_norm"] == math.inf


def test_no_metrics_yet(tmp_path):
    assert read_metrics(str(tmp_path)) == []
    trim_metrics(str(tmp_path), 5)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("whole", [0, 1, 2])
@pytest.mark.parametrize("torn", [b'{"event": "st', b"{", b"\0" * 40, b'{"event": "step", "loss": "\xe2\x82'])
def test_a_line_torn_by_a_crash(tmp_path, whole, torn):
    """Wherever the crash was: the rows before it are read, and those after the resume too."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in ROWS[:whole]).encode() + torn)
    assert read_metrics(str(tmp_path)) == ROWS[:whole]
    trim_metrics(str(tmp_path), 20)
    list(record(EVENTS[4:5], str(tmp_path)))
    assert without_time(read_metrics(str(tmp_path))) == [*ROWS[:whole], ROWS[2]]
    assert len(path.read_bytes().splitlines()) == whole + 1


def rows_at(*places):
    return [{"event": event, "step": step} for event, step in places]


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (0, []),
        (5, rows_at(("eval", 0))),
        (10, rows_at(("eval", 0), ("step", 10))),  # the checkpoint at 10 is older than the evaluation at 10
        (15, rows_at(("eval", 0), ("step", 10), ("eval", 10))),
        (20, rows_at(("eval", 0), ("step", 10), ("eval", 10), ("step", 20))),
        (99, rows_at(("eval", 0), ("step", 10), ("eval", 10), ("step", 20), ("eval", 20))),
    ],
)
def test_what_is_reported_again_is_forgotten(tmp_path, step, kept):
    rows = rows_at(("eval", 0), ("step", 10), ("eval", 10), ("step", 20), ("eval", 20))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trim_metrics(str(tmp_path), step)
    assert read_metrics(str(tmp_path)) == kept
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---- Going on ----


@pytest.mark.parametrize("name", ["out", "runs \u00e9 \U0001f999 'x' \"y\""])
def test_a_run_goes_on_where_its_checkpoint_is_now(tmp_path, name):
    """Also in a folder that was moved, whatever it is called."""
    path = checkpoint(tmp_path / name)
    for given in (path, tmp_path / name):
        config, held = reopen(given, [])
        assert held.step == 5
        assert config.train.out_dir == str(tmp_path / name)
        assert check(to_dict(config), ["train.out_dir=out"]) == check(to_dict(CONFIG), ["train.out_dir=out"])
        assert config.model_dump(exclude={"train"}) == CONFIG.model_dump(exclude={"train"})
        write_config(config)
        assert load(tmp_path / name / "run.toml") == config


def test_the_folder_means_the_latest_checkpoint(tmp_path):
    checkpoint(tmp_path, "best.pt")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        reopen(tmp_path, [])
    checkpoint(tmp_path, "ckpt.pt", check(to_dict(CONFIG), ["train.seed=77"]))
    assert reopen(tmp_path, [])[0].train.seed == 77
    assert reopen(tmp_path / "best.pt", [])[0].train.seed == 1337


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.dir=elsewhere", "elsewhere"),
        ("train.eval_interval=7", 7),
        ("train.save_interval=8", 8),
        (" train.log_interval = 9", 9),
        ("runtime.device=cpu", "cpu"),
        ("runtime.dtype=float32", "float32"),
        ("runtime.threads=1", 1),
        ("runtime.prefetch=0", 0),
        ("runtime.compile=true", True),
    ],
)
def test_what_may_change(tmp_path, override, value):
    section, key = override.partition("=")[0].strip().split(".")
    config, _ = reopen(checkpoint(tmp_path), [override])
    assert getattr(getattr(config, section), key) == value


def test_nothing_else_may_change(tmp_path):
    path = checkpoint(tmp_path)
    may = {"data.dir", "train.eval_interval", "train.save_interval", "train.log_interval", "model.class"}
    for section, keys in to_dict(CONFIG).items():
        for key, value in keys.items():
            name = f"{section}.{key}"
            if name in may or section == "runtime":
                continue
            with pytest.raises(ConfigError, match="cannot change in a run that goes on") as error:
                reopen(path, ["train.log_interval=3", f"{name}={json.dumps(value)}"])
            assert error.value.where == f"--set {name}"
            assert "train.eval_interval" in error.value.fix


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.log_interval=0", "--set train.log_interval = 0: must be greater than 0"),
        ("train.eval_intervals=3", "--set train.eval_intervals = 3: unknown key; did you mean train.eval_interval?"),
        ("runtime.devise=cpu", '--set runtime.devise = "cpu": unknown key; did you mean runtime.device?'),
    ],
)
def test_a_change_must_be_valid(tmp_path, override, message):
    with pytest.raises(ConfigError) as error:
        reopen(checkpoint(tmp_path), [override])
    assert str(error.value) == message
