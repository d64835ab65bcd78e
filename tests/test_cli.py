"""The command line as a user meets it: real processes of the installed script, their output, exit codes and files."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch

import tinyllm
from tinyllm.archive import is_whole
from tinyllm.config import load, to_toml
from tinyllm.examples import read_example
from tinyllm.process import Interrupted, stop_on_signals

SCRIPT = Path(sys.executable).with_name("tinyllm")
TINYLLM = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "tinyllm"]
FOLDER = ["best-N.pt", "best.pt", "ckpt-375.pt", "ckpt.pt", "metrics.jsonl", "run.toml"]  # of the whole run
posix = pytest.mark.skipif(os.name != "posix", reason="signals and pseudo-terminals of POSIX")
TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(300))
CONFIG = """
[data]
source = "a.txt"
tokenizer = "char"
[model]
n_layer = 1
n_head = 2
n_embd = 32
block_size = 32
dropout = 0.1
[optim]
lr = 1e-2
min_lr = 1e-3
[schedule]
warmup_steps = 5
[train]
max_steps = 400
batch_size = 16
micro_batch_size = 4
eval_interval = 25
eval_windows = 4
save_interval = 25
log_interval = 1
[runtime]
device = "cpu"
dtype = "float32"
loops = "off"
threads = 1
"""


def environment(**changes):
    """The environment without what changes our output, and with `changes`."""
    ours = ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES", "TERMINAL_WIDTH", "GITHUB_ACTIONS")
    return {k: v for k, v in os.environ.items() if k not in ours} | {"PYTHONIOENCODING": "utf-8"} | changes


def start(*args, cwd, env=None, **options):
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*TINYLLM, *args], cwd=cwd, env=environment(**env or {}), **options)


def tiny(*args, cwd, code=0, text="", **env):
    """Run to the end, expect this exit code and no traceback; what went to (standard output, standard error)."""
    process = start(*args, cwd=cwd, env=env, stdin=subprocess.PIPE)
    out, err = (stream.decode() for stream in process.communicate(text.encode(), timeout=100))
    assert "Traceback" not in err, err
    assert process.returncode == code, (out, err)
    return out, err


def metrics(folder):
    """The rows of a run, without their times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("time") > 0 for row in rows)
    return rows


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text and a config; a run trained without a stop is in out/, its output in out.txt, err.txt."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "a.txt").write_text(TEXT)
    (folder / "run.toml").write_text(CONFIG)
    out, err = tiny("train", cwd=folder)
    (folder / "out.txt").write_text(out)
    (folder / "err.txt").write_text(err)
    return folder


# ---- Help, version, layout ----


def test_the_script_and_the_module_are_the_same_program(tmp_path):
    version = f"tinyllm {tinyllm.__version__}\n"
    assert tiny("--version", cwd=tmp_path) == (version, "")
    module = subprocess.run([sys.executable, "-m", "tinyllm", "--version"], capture_output=True, text=True, check=True)
    assert module.stdout == version


def test_garbage_is_looked_for_again_after_an_import():
    """But not in what was imported; nor does an import that fails leave the search switched off."""
    code = """
import gc, json, weakref
from tinyllm.process import importing
said = {}
with importing():
    import decimal
    said["meanwhile"] = gc.isenabled()
said["after"], said["frozen"] = gc.isenabled(), gc.get_freeze_count()
try:
    with importing():
        import no_such_module
except ModuleNotFoundError:
    said["after a failure"] = gc.isenabled()
class Ring: pass
ring = Ring()
ring.self, gone = ring, weakref.ref(ring)
del ring
gc.collect()
print(json.dumps(said | {"found": gone() is None}))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    said = json.loads(found.stdout)
    assert said.pop("frozen") > 1000
    assert said == {"meanwhile": False, "after": True, "after a failure": True, "found": True}


def test_help_is_instant_and_names_every_command(tmp_path):
    """Instant: what takes its time to be imported is not."""
    code = (
        "import sys; from tinyllm.cli import main; sys.argv[1:] = ['--help']\ntry: main()\nfinally: print(*sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    commands = ("new", "config", "prepare", "sanity", "plot-lr", "train", "resume", "eval", "sample")
    assert all(f" {name} " in found.stdout for name in commands)
    assert "quickstart" in found.stdout, "how to begin"
    assert not {"torch", "numpy", "matplotlib", "tokenizers"} & set(found.stdout.split("\n")[-2].split())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("new", ["--out"]),
        ("config", ["--set", "--schema"]),
        ("prepare", ["--set", "--force"]),
        ("sanity", ["--set", "--only", "--skip", "--quick", "--list", "--json", "--out"]),
        ("plot-lr", ["--set", "--out"]),
        ("train", ["--set", "--overwrite", "--no-sanity"]),
        ("resume", ["--set", "newest that is whole"]),
        ("eval", ["--set", "--windows"]),
        ("sample", ["--prompt", "--prompt-file", "--temperature", "--top-k", "--top-p", "--seed", "--device"]),
    ],
)
def test_each_command_explains_its_options(command, words, tmp_path):
    out, err = tiny(command, "-h", cwd=tmp_path)
    assert not [word for word in words if word not in out]
    assert err == ""


def test_without_arguments_it_shows_the_help(tmp_path):
    """As a usage error: a script that forgot its command should stop."""
    out, err = tiny(cwd=tmp_path, code=2)
    assert "Usage: tinyllm" in out + err


# ---- new, config, plot-lr: results on standard output and nothing else there ----


def test_new(tmp_path):
    listed, _ = tiny("new", cwd=tmp_path)
    assert "quickstart" in listed
    assert "shakespeare-char" in listed
    assert tiny("new", "quickstart", cwd=tmp_path) == (read_example("quickstart"), "")
    out, err = tiny("new", "quickstart", "-o", "my run.toml", cwd=tmp_path)
    here = read_example("quickstart").replace("quickstart.toml", "'my run.toml'")
    assert (tmp_path / "my run.toml").read_text() == here
    assert out == ""
    assert "tinyllm sanity 'my run.toml'" in err, "a command that can be pasted"
    (tmp_path / "my run.toml").write_text("mine")
    out, err = tiny("new", "quickstart", "-o", "my run.toml", cwd=tmp_path, code=2)
    assert "my run.toml: is there already" in err
    assert (tmp_path / "my run.toml").read_text() == "mine"


def test_config_prints_what_the_run_will_be(home, tmp_path):
    out, err = tiny(
        "config", str(home / "run.toml"), "--set", "optim.lr=0.5", "--set", "model.recipe=modern", cwd=tmp_path
    )
    values = tomllib.loads(out)
    assert err == ""
    assert values["optim"]["lr"] == 0.5
    assert values["model"]["norm"] == "rmsnorm", "the recipe's"
    assert values["optim"]["eps"] == 1e-8, "a default"
    (tmp_path / "again.toml").write_text(out)
    assert to_toml(load(tmp_path / "again.toml")) == out
    schema = json.loads(tiny("config", "--schema", cwd=tmp_path)[0])
    assert schema["$defs"]["OptimConfig"]["properties"]["lr"]["default"] == 1e-3


def test_plot_lr_draws_in_the_terminal_and_in_files(home, tmp_path):
    config = str(home / "run.toml")
    out, err = tiny("plot-lr", config, cwd=tmp_path)
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80
    assert {"end of warmup", "peak", "minimum"} <= set(re.findall("end of warmup|peak|minimum", out))
    assert re.search(r" 0\.01 at 5 +0\.01 at 4 +1\.00e-03 at 399$", out, re.M)
    ascii_only, _ = tiny("plot-lr", config, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert ascii_only.isascii()
    assert "?" not in ascii_only
    for name, magic in (("lr.png", b"\x89PNG"), ("lr.svg", b"<?xml")):
        out, err = tiny("plot-lr", config, "-o", name, cwd=tmp_path)
        assert (out, err) == ("", f"wrote {name}\n")
        assert (tmp_path / name).read_bytes().startswith(magic)


# ---- prepare, sanity ----


def test_prepare_says_what_the_data_is_and_does_nothing_twice(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, newline="")
    (tmp_path / "run.toml").write_text(CONFIG)
    out, err = tiny("prepare", cwd=tmp_path)
    cut = int(len(TEXT) * 0.9)
    assert re.search(rf"training +{cut:,} +{cut:,}", out)
    assert f"vocabulary {len(set(TEXT))}" in out
    assert "writing tokens" in err
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
    again, err = tiny("prepare", cwd=tmp_path)
    assert again == out
    assert "nothing changed" in err
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()} == before
    _, err = tiny("prepare", "--force", cwd=tmp_path)
    assert "prepared again: forced" in err
    _, err = tiny("prepare", "--set", "data.val_fraction=0.2", cwd=tmp_path)
    assert "data.val_fraction: 0.1 -> 0.2" in err


def test_sanity_passes_a_good_run_and_fails_a_bad_one(home):
    out, _ = tiny("sanity", cwd=home)
    assert re.search(r"^✓ overfit one batch", out, re.M)
    assert re.search(r"^\d+ passed.* in \d+\.\d s$", out, re.M)
    assert "failed" not in out
    bad = ("--set", "optim.lr=50", "--set", "optim.grad_clip=0", "--set", "schedule.warmup_steps=0")
    out, _ = tiny("sanity", *bad, cwd=home, code=1, PYTHONIOENCODING="ascii")
    assert re.search(r"^x peak rate", out, re.M)
    assert re.search(r"^ +expected .*\n +diagnosis .*\n +fix ", out, re.M)
    assert re.search(r"\d failed", out)
    assert [re.sub(r"best-\d+", "best-N", name) for name in files(home / "out")] == FOLDER, "the run is not touched"


# ---- train ----


def test_train_tells_results_from_progress(home):
    out, err = (home / "out.txt").read_text(), (home / "err.txt").read_text()
    rows = metrics(home / "out")
    last = rows[-1]
    assert (last["event"], last["step"]) == ("eval", 400)
    assert f"validation loss {last['val_loss']:.4f} nats" in out
    assert "step" not in out
    assert "\x1b" not in out + err
    assert "\r" not in out + err
    table = re.findall(r"^ +(\d+)  +(\d\.\d{4})  +(\d\.\d{4}) ", err, re.M)
    evaluations = [row for row in rows if row["event"] == "eval"]
    assert [(int(s), t, v) for s, t, v in table] == [
        (row["step"], f"{row['train_loss']:.4f}", f"{row['val_loss']:.4f}") for row in evaluations
    ]
    assert "cpu, float32, 1 threads" in err
    assert "now try: tinyllm sample" in err


def test_train_leaves_a_complete_folder(home):
    assert [re.sub(r"best-\d+", "best-N", name) for name in files(home / "out")] == FOLDER
    assert files(home / "data") == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    rows = metrics(home / "out")
    assert [row["step"] for row in rows if row["event"] == "step"] == list(range(1, 401))
    assert [row["step"] for row in rows if row["event"] == "eval"] == list(range(0, 401, 25))
    assert load(home / "out" / "run.toml") == load(home / "run.toml")
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.5, "it learns"
    assert torch.load(home / "out" / "ckpt.pt", weights_only=True)["step"] == 400


def wait_for_step(folder, step, process):
    """Wait until the run's metrics have this step."""
    path, end = folder / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < end:
        found = re.findall(rb'"step": (\d+)', path.read_bytes()) if path.exists() else ()
        if found and int(found[-1]) >= step:
            return
        assert process.poll() is None, process.returncode
        time.sleep(0.005)
    raise TimeoutError(f"step {step}")


@pytest.fixture(scope="module")
def interrupted(home):
    """The run of `home` once more, stopped by each signal, killed, and resumed: its folder, and each stop's output."""
    folder, stops = home / "stopped" / "a run", []
    args, step = ("train", "--set", f"train.out_dir={folder}"), 30
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        process = start(*args, cwd=home)
        wait_for_step(folder, step, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        saved = torch.load(folder / "ckpt.pt", weights_only=True)["step"]
        stops.append((number, process.returncode, out.decode(), err.decode(), saved))
        args, step = ("resume", str(folder / "ckpt.pt")), saved + 30
    tiny(*args, cwd=home)
    return folder, stops


@posix
def test_a_signal_saves_and_says_how_to_go_on(interrupted):
    folder, stops = interrupted
    for number, code, out, err, saved in stops[:3]:
        assert code == 128 + number
        assert out == ""
        assert f"stopped at step {saved:,}; it is saved, go on with: tinyllm resume '{folder}'" in err
        assert "Traceback" not in err
    assert [code for _, code, *_ in stops] == [130, 143, 129, -9]
    assert 0 < stops[0][4] < stops[1][4] < stops[2][4] <= stops[3][4] < 400, "each stop was in the middle"


@posix
def test_a_run_that_was_stopped_and_killed_is_the_run_that_never_was(home, interrupted):
    folder, _ = interrupted
    assert metrics(folder) == metrics(home / "out")
    for name in ("ckpt.pt", "best.pt"):
        assert same(weights(folder / name), weights(home / "out" / name))
    assert files(folder) == files(home / "out"), "nothing half-written is left"


@posix
def test_a_second_signal_is_not_caught():
    """Here in this process, because elsewhere it might come after the save."""
    before = signal.getsignal(signal.SIGTERM)
    said = []
    with stop_on_signals(said.append) as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop(), stop.signal) == (True, signal.SIGINT)
        assert "again to quit at once" in said[0]
        assert signal.getsignal(signal.SIGTERM) is before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@posix
def test_a_signal_before_anybody_asks_ends_it_at_once():
    """Nobody asks whether to stop while torch compiles; and there is nothing to save."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), stop_on_signals(print) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@posix
@pytest.mark.parametrize("wait", [0.0, 0.05])
def test_ctrl_c_twice_quits_and_leaves_nothing_half_written(home, tmp_path, wait):
    process = start("train", "--set", f"train.out_dir={tmp_path}/out", cwd=home)
    wait_for_step(tmp_path / "out", 30, process)
    process.send_signal(signal.SIGINT)
    time.sleep(wait)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)  # the latter on the way out
    assert b"Traceback" not in err
    left = [name for name in files(tmp_path / "out") if not name.endswith(".tmp")]  # it may be killed in a save
    assert {"best.pt", "ckpt.pt", "metrics.jsonl", "run.toml"} <= {*left}
    for name in left:
        if name.endswith(".pt"):
            assert is_whole(tmp_path / "out" / name)
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] >= 25


@posix
def test_ctrl_c_saves_though_the_reader_of_the_progress_is_gone(home, tmp_path):
    """Ctrl-C in `tinyllm train 2>&1 | tee log` ends tee, too, and before us."""
    process = start("train", "--set", f"train.out_dir={tmp_path}/out", cwd=home)
    process.stderr.close()
    wait_for_step(tmp_path / "out", 30, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert 30 <= torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] < 400


@posix
@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_a_signal_that_it_was_started_to_ignore_does_not_stop_it(home, tmp_path, name):
    """`nohup tinyllm train &`, and the terminal is closed; `tinyllm train &` in a script, and Ctrl-C is pressed."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    process = start("train", "--set", f"train.out_dir={tmp_path}/out", cwd=home)
    signal.signal(number, before)
    wait_for_step(tmp_path / "out", 30, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert metrics(tmp_path / "out") == metrics(home / "out")


def test_a_run_is_not_overwritten_by_accident(home, tmp_path):
    shutil.copytree(home / "out", tmp_path / "out")
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    args = ("train", "--set", f"train.out_dir={tmp_path}/out")
    _, err = tiny(*args, cwd=home, code=2)
    assert f"{tmp_path}/out/: already holds a run" in err
    assert all(way in err for way in (f"`tinyllm resume {tmp_path}/out`", "--overwrite", "train.out_dir=..."))
    # That the new run cannot start is found before the old one is deleted.
    _, err = tiny(*args, "--overwrite", "--set", "model.vocab_size=3", cwd=home, code=2)
    assert "model.vocab_size" in err
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_overwrite_starts_anew(home, tmp_path):
    shutil.copytree(home / "out", tmp_path / "out")
    short = ("--set", "train.max_steps=10", "--set", f"train.out_dir={tmp_path}/out")
    tiny("train", "--overwrite", *short, cwd=home)
    assert [row["step"] for row in metrics(tmp_path / "out") if row["event"] == "step"] == list(range(1, 11))
    assert torch.load(tmp_path / "out" / "best.pt", weights_only=True)["step"] == 10


@posix
def test_only_one_training_at_a_time_in_a_folder(home, tmp_path):
    place = ("--set", f"train.out_dir={tmp_path}/out", "--set", "train.max_steps=100000")
    first = start("train", *place, cwd=home)
    try:
        wait_for_step(tmp_path / "out", 30, first)  # the first checkpoint was at 25
        for args in (("train", "--overwrite", *place), ("resume", f"{tmp_path}/out/ckpt.pt")):
            _, err = tiny(*args, cwd=home, code=2)
            assert "another tinyllm is training in this folder" in err
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    steps = [row["step"] for row in metrics(tmp_path / "out") if row["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1)), "nobody else wrote there"


def test_resume_says_that_there_is_no_more_to_do_and_how_to_do_more(home, tmp_path):
    shutil.copytree(home / "out", tmp_path / "out")
    place = ("--set", f"data.dir={home / 'data'}")
    (tmp_path / "a.txt").write_text(TEXT)
    _, err = tiny("resume", *place, cwd=tmp_path)
    (more,) = re.findall(r"all 400 steps of this run are made; for more of them: (.*)", err)
    more = shlex.split(more.replace("max_steps=...", "max_steps=402"))
    _, err = tiny("resume", *place, *more, cwd=tmp_path)
    assert re.search(r"^ +402 .* +\d", err, re.MULTILINE)
    assert "are made" not in err


def test_resume_says_that_later_steps_are_made_again(home, tmp_path):
    shutil.copytree(home / "out", tmp_path / "out")
    (tmp_path / "a.txt").write_text(TEXT)
    (before,) = (path for path in (tmp_path / "out").glob("ckpt-*.pt"))
    step = int(before.stem.partition("-")[2])
    _, err = tiny("resume", f"out/{before.name}", "--set", f"data.dir={home / 'data'}", cwd=tmp_path)
    assert f"out/ has come to step 400: what comes after {step} is made again, in its place" in err
    assert same(weights(tmp_path / "out/ckpt.pt"), weights(home / "out/ckpt.pt"))


def test_a_run_can_be_moved(home, tmp_path):
    """The folder of the checkpoint is the run's; only the data must be found."""
    shutil.copytree(home / "out", tmp_path / "elsewhere")
    (tmp_path / "a.txt").write_text(TEXT)
    out, err = tiny("resume", "elsewhere/ckpt.pt", "--set", f"data.dir={home / 'data'}", cwd=tmp_path)
    assert "elsewhere/ goes on at step 400" in err
    assert "validation loss" in out
    assert files(tmp_path) == ["a.txt", "elsewhere"]


# ---- In a terminal ----


def in_terminal(*args, cwd, columns=80, **env):
    """What the command writes to a terminal of this width, and its exit code."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = start(*args, cwd=cwd, env={"TERM": "xterm-256color"} | env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    chunks: list[bytes] = []

    def read():
        try:
            while chunk := os.read(ours, 1 << 16):
                chunks.append(chunk)
        except OSError:  # on Linux that is how a pseudo-terminal ends
            pass

    reader = threading.Thread(target=read)
    reader.start()
    code = process.wait(100)
    reader.join()
    os.close(ours)
    return b"".join(chunks).decode(), code


@posix
@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_terminal_that_is_closed_takes_no_step_with_it(home, tmp_path, handler):
    """It sends SIGHUP, and what is written to it fails: the run is saved, or goes on if SIGHUP is ignored."""
    import pty

    ours, theirs = pty.openpty()
    terminal = {"env": {"TERM": "xterm-256color"}, "stdin": theirs, "stdout": subprocess.DEVNULL, "stderr": theirs}
    before = signal.signal(signal.SIGHUP, handler)
    process = start("train", "--set", f"train.out_dir={tmp_path}/out", cwd=home, **terminal)
    signal.signal(signal.SIGHUP, before)
    os.close(theirs)
    rows = tmp_path / "out" / "metrics.jsonl"
    while not rows.exists() or b'"step": 30,' not in rows.read_bytes():
        os.read(ours, 1 << 16)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == (0 if handler == signal.SIG_IGN else 128 + signal.SIGHUP)
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"]
    assert metrics(tmp_path / "out") == [row for row in metrics(home / "out") if row["step"] <= saved]
    assert saved == 400 if handler == signal.SIG_IGN else 30 <= saved < 400


@posix
def test_a_terminal_gets_a_live_line(home, tmp_path):
    short = ("--set", "train.max_steps=50", "--set", f"train.out_dir={tmp_path}/out")
    screen, code = in_terminal("train", *short, cwd=home)
    assert code == 0
    live = re.findall(r"(\d+)/50 ", re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", screen))
    assert len(set(live)) > 20, "redrawn as the steps come"
    assert re.search(r"loss \d\.\d+ norm \d+\.\d\d lr \d\.\de-\d\d \S+ [kM]?tok/s 0:00:\d\d left", screen)
    assert "\x1b[2K" in screen, "in place"
    assert re.search("\x1b\\[(\\d;)*3\\d", screen), "in colour"
    assert screen.rstrip().splitlines()[-1].find("tinyllm sample") > 0, "and gone in the end"
    assert "\x1b[?25h" in screen, "the cursor is back"


@posix
def test_no_colour_where_none_is_wanted(home, tmp_path):
    colour = "\x1b\\[[0-9;]*(3|4|9|10)[0-7][;m]"
    assert re.search(colour, in_terminal("plot-lr", cwd=home)[0])
    assert not re.search(colour, in_terminal("plot-lr", cwd=home, NO_COLOR="1")[0])
    short = ("--set", "train.max_steps=20", "--set", f"train.out_dir={tmp_path}/out")
    screen, code = in_terminal("train", *short, cwd=home, TERM="dumb")
    assert code == 0
    assert "\x1b" not in screen, "a dumb terminal understands none"


@posix
def test_a_narrow_terminal(home, tmp_path):
    """Nothing that is redrawn may wrap: it would not be wiped out."""
    short = ("--set", "train.max_steps=20", "--set", f"train.out_dir={tmp_path}/out")
    screen, code = in_terminal("train", *short, cwd=home, columns=40)
    assert code == 0
    lines = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", screen).replace("\r", "\n").splitlines()
    live = [line for line in lines if "/20 " in line]
    assert live
    assert max(map(len, live)) <= 40


# ---- eval, sample ----


def test_eval_measures_what_training_measured(home):
    out, err = tiny("eval", "out/ckpt.pt", "--windows", "4", cwd=home)
    last = metrics(home / "out")[-1]
    for split in ("train", "val"):
        assert re.search(rf"^{split} +loss {last[f'{split}_loss']:.4f} nats", out, re.M)
    assert err == ""
    whole, _ = tiny("eval", cwd=home)
    tokens = len(TEXT) - int(len(TEXT) * 0.9)
    assert f"{tokens - 1:,} tokens of val" in whole, "all of the validation split"


def test_sample_says_the_same_with_the_same_seed(home):
    args = ("sample", "--prompt", "Line 7", "--max-new-tokens", "30", "--temperature", "3")
    one, err = tiny(*args, cwd=home)
    assert one.startswith("Line 7")
    assert len(one) == len("Line 7") + 30 + 1
    assert one.endswith("\n")
    assert err == f"out/best.pt, step {torch.load(home / 'out/best.pt', weights_only=True)['step']}\n"
    assert tiny(*args, cwd=home)[0] == one
    assert tiny(*args, "--seed", "7", cwd=home)[0] != one
    three, _ = tiny(*args, "-n", "3", cwd=home)
    first, second, third = three.split("---\n")
    assert first == one, "however many are asked for"
    assert all(text.startswith("Line 7") for text in (second, third))
    assert len({first, second, third}) == 3


def test_sample_reads_its_prompt_from_a_file_or_a_pipe(home, tmp_path):
    (tmp_path / "prompt.txt").write_text("Line 3: the quick\n")
    args = ("sample", "--max-new-tokens", "20", "--temperature", "0", "-c", str(home / "out" / "ckpt.pt"))
    from_file, _ = tiny(*args, "--prompt-file", "prompt.txt", cwd=tmp_path)
    from_pipe, _ = tiny(*args, "--prompt", "-", cwd=tmp_path, text="Line 3: the quick\n")
    assert from_file == from_pipe
    assert from_file.startswith("Line 3: the quick\n")


@posix
@pytest.mark.parametrize(
    "command", ["sample --max-new-tokens 300 | head -c 20", "config | true", "plot-lr 2>&1 | true"]
)
def test_a_reader_that_leaves_is_no_error(home, command):
    line = f"{' '.join(TINYLLM)} {command}; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", line], cwd=home, env=environment(), capture_output=True, text=True)
    assert found.returncode == 128 + signal.SIGPIPE
    assert len(found.stdout) == (20 if "head" in command else 0)
    assert [line for line in found.stderr.splitlines() if not line.startswith("out/best.pt")] == []


@posix
def test_closed_streams_are_no_error(home):
    """As daemons and `>&-` leave them."""
    line = f"{' '.join(TINYLLM)} sample --max-new-tokens 5 --prompt - <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", line], cwd=home, env=environment()).returncode == 0


def test_text_that_the_terminal_cannot_show_is_no_error(tmp_path):
    (tmp_path / "a.txt").write_text("äöüß ÄÖÜ\n" * 400, encoding="utf-8")
    (tmp_path / "run.toml").write_text(CONFIG)
    small = [arg for value in ("train.max_steps=6", "schedule.warmup_steps=2") for arg in ("--set", value)]
    tiny("train", "--no-sanity", *small, cwd=tmp_path, PYTHONIOENCODING="ascii")  # the text repeats itself
    out, _ = tiny("sample", "--max-new-tokens", "30", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert out.isascii()
    assert "?" in out
