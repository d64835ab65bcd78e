"""The run's folder: never two runs in one, and nothing changed unasked in a run that goes on."""

import json
import subprocess
import sys

import pytest
import torch

from tinyllm.checkpoint import Checkpoint, save
from tinyllm.config import check, load, to_dict
from tinyllm.errors import CheckpointError, ConfigError, RunError
from tinyllm.folder import claimed, clear, refuse, reopen, write_config

CONFIG = check({"model": {"n_layer": 2}, "optim": {"betas": [0.8, 0.99]}, "data": {"separator": 'a "b"\n\u00e9'}})


def checkpoint(folder, name="ckpt.pt", config=CONFIG, step=5):
    held = Checkpoint(
        step=step,
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
        (["ckpt.pt", "best.pt", "metrics.jsonl"], "`tinyllm resume {out}` goes on, --overwrite deletes it"),
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
    for name in ("ckpt.pt.tmp", "best-250.pt.tmp", "metrics.jsonl.tmp", "run.toml.tmp", "mine.tmp"):
        (out / name).write_text("of a process that was killed")
    with claimed(str(out)):
        assert [path.name for path in out.iterdir()] == ["mine.tmp"]


def test_the_resolved_config_reads_back(tmp_path):
    config = check(to_dict(CONFIG), [f"train.out_dir={json.dumps(str(tmp_path))}"])
    path = write_config(config)
    assert path == tmp_path / "run.toml"
    assert load(path) == config
    changed = check(to_dict(config), ["train.seed=7"])
    write_config(changed)
    assert load(path) == changed
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]


# ---- Going on ----


@pytest.mark.parametrize("name", ["out", "runs \u00e9 \U0001f999 'x' \"y\""])
def test_a_run_goes_on_where_its_checkpoint_is_now(tmp_path, name):
    """Also in a folder that was moved, whatever it is called."""
    path = checkpoint(tmp_path / name)
    for given in (path, tmp_path / name):
        config, found = reopen(given, [])
        assert (found.path, found.checkpoint.step) == (path, 5)
        assert config.train.out_dir == str(tmp_path / name)
        assert check(to_dict(config), ["train.out_dir=out"]) == check(to_dict(CONFIG), ["train.out_dir=out"])
        assert config.model_dump(exclude={"train"}) == CONFIG.model_dump(exclude={"train"})
        write_config(config)
        assert load(tmp_path / name / "run.toml") == config


def test_the_folder_means_the_newest_checkpoint_that_is_whole(tmp_path):
    """Whatever its name; what is damaged is told."""
    with pytest.raises(CheckpointError, match=r"no best\.pt or ckpt\.pt in this folder"):
        reopen(tmp_path, [])
    for step, name in enumerate(("best-1.pt", "best.pt", "ckpt-3.pt", "ckpt.pt"), start=1):
        checkpoint(tmp_path, name, check(to_dict(CONFIG), [f"train.seed={step}"]), step)
    damaged = []
    for name in ("ckpt.pt", "ckpt-3.pt", "best.pt", "best-1.pt"):
        config, found = reopen(tmp_path, [])
        assert found.path == tmp_path / name
        assert found.checkpoint.step == config.train.seed
        assert sorted(error.where for error in found.passed_over) == sorted(damaged)
        assert reopen(tmp_path / "best-1.pt", [])[0].train.seed == 1
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
        damaged.append(str(tmp_path / name))
    with pytest.raises(CheckpointError, match="no checkpoint in this folder can be read") as error:
        reopen(tmp_path, [])
    assert len(error.value.what.splitlines()) == 5


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["train.max_steps=4000", "schedule.decay_steps=2000"], ""),
        (["train.max_steps=4000"], "train.max_steps: the learning rate would decay over 4,000 steps"),
        (["schedule.decay_steps=1000"], "train.max_steps: the learning rate would decay over 1,000 steps"),
        (["train.max_steps=4", "schedule.decay_steps=2000"], "train.max_steps: 4 is below the 5 steps"),
        (["train.max_steps=5", "schedule.decay_steps=2000"], ""),
    ],
)
def test_a_run_may_become_longer_but_its_steps_stay_what_they_were(tmp_path, overrides, refused):
    if refused:
        with pytest.raises(ConfigError) as error:
            reopen(checkpoint(tmp_path), overrides)
        assert str(error.value).startswith(refused)
        return
    config, _ = reopen(checkpoint(tmp_path), overrides)
    assert config.decay_steps == CONFIG.decay_steps
    assert f"train.max_steps={config.train.max_steps}" == overrides[0]


def test_a_constant_rate_has_no_end_to_keep(tmp_path):
    constant = check(to_dict(CONFIG), ["schedule.kind=constant"])
    assert reopen(checkpoint(tmp_path, config=constant), ["train.max_steps=4000"])[0].train.max_steps == 4000


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.dir=elsewhere", "elsewhere"),
        ("train.eval_interval=7", 7),
        ("train.save_interval=8", 8),
        (" train.log_interval = 9", 9),
        ("train.save_minutes=2.5", 2.5),
        ("train.keep=5", 5),
        ("train.skip_spikes=true", True),
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


@pytest.mark.parametrize("override", ["nonsense", "a=b", "=", "train.log_interval"])
def test_an_override_that_is_none_is_told_as_such(tmp_path, override):
    with pytest.raises(ConfigError, match=f"cannot read '{override}'") as error:
        reopen(checkpoint(tmp_path), [override])
    assert error.value.where == "--set"


def test_nothing_else_may_change(tmp_path):
    path = checkpoint(tmp_path)
    may = {"data.dir", "model.class", "train.max_steps", "schedule.decay_steps", "train.skip_spikes", "train.keep"}
    may |= {"train.eval_interval", "train.save_interval", "train.save_minutes", "train.log_interval"}
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
