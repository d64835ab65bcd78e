"""`tinyllm sanity` and the checks before `tinyllm train`, as a user and as a program meet them.

The checks here are made up, all but one: what the real ones find is for other tests. In-process where that is enough,
else in processes of their own that have the same checks.
"""

import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import tinyllm.sanity
from tinyllm import cli
from tinyllm.errors import RunError
from tinyllm.sanity.result import Check, Result, failed, passed, skipped, warned

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and pseudo-terminals of POSIX")
TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(200))
CONFIG = """
[data]
source = "a.txt"
tokenizer = "char"
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
dropout = 0.1
[schedule]
warmup_steps = 2
[train]
max_steps = 20
batch_size = 8
eval_interval = 10
eval_windows = 4
save_interval = 10
[runtime]
device = "cpu"
dtype = "float32"
threads = 1
"""
LONG = "the logits of position 3 change when the token at position 7 does, by 0.241, which is more than nothing"


def made(name: str, group: str, found: Result | Exception, quick: bool = True, seconds: float = 0.0) -> Check:
    """A check that finds this."""

    def function(subject) -> Result:
        time.sleep(seconds)
        if isinstance(found, Exception):
            raise found
        return found

    function.__module__ = f"tinyllm.sanity.{group}"
    return Check(name, f"what {name} would miss", function, quick)


GOOD = (
    made("token ids", "data", passed("ids up to 1,535", "below 1,536")),
    made("documents", "data", skipped("train.align_documents is off")),
    made("loss function", "arithmetic", passed(f"7.3365 ± 2e-7; {LONG}", "within 1e-5")),
    made("short run", "trainings", passed("7.3 to 4.2", curve=((0, 7.3), (1, math.nan), (2, 4.2))), quick=False),
)
WARNING = made("initial loss", "model", warned("8.912", "7.337 ± 0.15", "the logits are too wide", "a smaller init"))
FAILURE = made("causal mask", "model", failed(LONG, "no change", "a position sees the ones after it", "mask them"))
CRASH = made("crash", "step", ValueError("no\nway"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a text and a config, to be in."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "run.toml").write_text(CONFIG)
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(home, monkeypatch, capfd):
    """A function that runs the command with these checks; expects this exit code, returns what it wrote."""

    def run(*args, checks=GOOD, code=0):
        monkeypatch.setattr(tinyllm.sanity, "CHECKS", tuple(checks))
        monkeypatch.setattr(sys, "argv", ["tinyllm", *args])
        try:
            cli.main()
            found = 0
        except SystemExit as end:
            found = end.code or 0
        out, err = capfd.readouterr()
        assert found == code, (out, err)
        assert "Traceback" not in err
        return out, err

    return run


def shown(out: str) -> list[str]:
    """The names of the checks in the output, as far as they are good or slow."""
    names = "|".join([*(check.name for check in GOOD), "slow"])
    return re.findall(f"^[✓!✗–] ({names}) ", out, re.M)


def bare(text: str) -> str:
    return re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", text)


# ---- which checks ----


def test_names_are_separated_by_commas_or_given_one_by_one(tiny):
    for args in (("--only", "short run,token ids"), ("--only", "token ids", "--only", " short run ")):
        assert shown(tiny("sanity", *args)[0]) == ["token ids", "short run"], "in the order of the checks"
    assert shown(tiny("sanity", "--skip", "short run, token ids")[0]) == ["documents", "loss function"]
    assert shown(tiny("sanity", "--quick")[0]) == ["token ids", "documents", "loss function"]
    assert shown(tiny("sanity", "--quick", "--only", "short run")[0]) == ["short run"], "asked for by name"


def test_a_name_that_is_none_names_those_that_are(tiny, home):
    _, err = tiny("sanity", "--only", "token idz", code=2)
    assert "no check is called 'token idz'" in err
    assert "did you mean 'token ids'?" in err
    assert all(check.name in err for check in GOOD)
    _, err = tiny("sanity", "--skip", "nonsense", code=2)
    assert "did you mean" not in err
    _, err = tiny("sanity", "--only", "short run", "--skip", "short run", code=2)
    assert "no check is left" in err
    assert not (home / "data").exists(), "found before anything was done"


def test_the_list_says_what_each_catches(tiny, home):
    (home / "run.toml").unlink()  # not needed
    out, err = tiny("sanity", "--list")
    assert out == (
        "data\n"
        "  token ids      what token ids would miss\n"
        "  documents      what documents would miss\n"
        "arithmetic\n"
        "  loss function  what loss function would miss\n"
        "trainings\n"
        "  short run      what short run would miss  not in --quick\n"
        "4 checks, 3 of them in --quick\n"
    )
    assert err == ""


# ---- what is shown ----


def test_piped_it_is_a_line_each(tiny):
    out, _ = tiny("sanity", checks=(*GOOD, WARNING, FAILURE, CRASH), code=1)
    out, last = out.rstrip("\n").rsplit("\n", 1)
    assert re.fullmatch(r"3 passed, 1 to look at, 2 failed, 1 skipped in \d+\.\d s", last)
    assert re.sub(r"raised at .*", "raised at ...", out).splitlines() == [
        "data",
        "✓ token ids     ids up to 1,535  expected below 1,536",
        "– documents     train.align_documents is off",
        "arithmetic",
        f"✓ loss function 7.3365 ± 2e-7; {LONG}",
        "trainings",
        "✓ short run     7.3 to 4.2",
        "model",
        "! initial loss  8.912",
        "    expected  7.337 ± 0.15",
        "    diagnosis the logits are too wide",
        "    fix       a smaller init",
        f"✗ causal mask   {LONG}",
        "    expected  no change",
        "    diagnosis a position sees the ones after it",
        "    fix       mask them",
        "step",
        "✗ crash         ValueError: no",
        "    expected  no error",
        "    diagnosis raised at ...",
        "    fix       mend that line, then check again",
    ]


def test_warnings_and_skips_are_no_failures(tiny):
    assert "3 passed, 1 to look at, 1 skipped in" in tiny("sanity", checks=(*GOOD, WARNING))[0]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_in_a_terminal_lines_hang_and_never_reach_its_edge(tiny, monkeypatch, width):
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", str(width)), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    out, _ = tiny("sanity", checks=(*GOOD, WARNING, FAILURE), code=1)
    assert "\x1b[32m✓" in out
    assert "\x1b[1;31m✗" in out
    lines = bare(out).splitlines()
    assert max(map(len, lines)) <= width
    assert [line.rstrip() for line in lines] == lines
    first = next(n for n, line in enumerate(lines) if line.startswith("✗"))
    column = 16 if width > 40 else 4  # beside the name, or below it
    told = lines[first:] if width > 40 else lines[first + 1 :]
    told = told[: next(n for n, line in enumerate(told) if line.startswith("    expected"))]
    assert " ".join(line[column:] for line in told) == LONG
    assert all(not line[:column].strip() for line in told[1:])
    beside = "✓ token ids     ids up to 1,535  expected below 1,536"
    assert (beside in lines) == (width > 40), "what was expected only where it fits"


def test_no_colour_where_none_is_wanted(tiny, monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.setenv(name, "1")
    assert not re.search("\x1b\\[[0-9;]*3[0-7]", tiny("sanity")[0])


# ---- for programs ----


def strictly(text: str):
    """The document, by a parser that knows no NaN."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_json_is_one_strict_document(tiny):
    values = {
        "loss": math.nan,
        "all": [1, math.inf, np.float32(0.5)],
        "array": np.array([[1.0, -math.inf]]),
        "tensor": torch.tensor(3),
        7: {"names": ("a", "b"), "none": None, "type": torch.float32},
    }
    odd = made("odd", "model", passed("± \x1b[31m <b>", values=values, curve=((0, math.nan), (1, 2.5))))
    out, err = tiny("sanity", "--json", "--quick", "--skip", "documents", checks=(*GOOD, odd, FAILURE, CRASH), code=1)
    found = strictly(out)
    assert "writing tokens" in err, "progress is elsewhere"
    results = found.pop("results")
    assert found.pop("seconds") > 0
    assert found == {
        "tinyllm": tinyllm.__version__,
        "config": "run.toml",
        "quick": True,
        "verdict": "fail",
        "counts": {"pass": 3, "warn": 0, "fail": 2, "skip": 0},
    }
    keys = ["name", "verdict", "measured", "expected", "diagnosis", "fix", "values", "curve", "seconds"]
    assert all(list(result) == keys for result in results)
    assert [r["name"] for r in results] == ["token ids", "loss function", "odd", "causal mask", "crash"]
    assert results[2]["values"] == {
        "loss": None,
        "all": [1, None, 0.5],
        "array": [[1.0, None]],
        "tensor": 3,
        "7": {"names": ["a", "b"], "none": None, "type": "torch.float32"},
    }
    assert results[2]["curve"] == [[0, None], [1, 2.5]]
    assert strictly(tiny("sanity", "--json", checks=GOOD)[0])["verdict"] == "pass"


def test_json_is_alone_though_a_model_of_the_users_own_prints(tiny):
    def talks(subject) -> Result:
        print("hello from forward()")
        return passed("done")

    out, err = tiny("sanity", "--json", checks=[Check("talks", "", talks)])
    assert strictly(out)["verdict"] == "pass"
    assert "hello from forward()" in err


def test_a_check_that_stops_with_our_own_error_keeps_its_fix(tiny):
    error = RunError("the loss is nan", fix="a lower optim.lr")
    (result,) = strictly(tiny("sanity", "--json", checks=[made("crash", "loop", error)], code=1)[0])["results"]
    assert (result["measured"], result["fix"]) == ("the loss is nan", "a lower optim.lr")


# ---- a page to keep ----


def test_the_page_is_written_whatever_the_verdict(tiny, home):
    out, err = tiny("sanity", "--out", "page.html", checks=(*GOOD, FAILURE), code=1)
    assert "1 failed" in out
    assert err.endswith("wrote page.html\n")
    assert "causal mask" in (home / "page.html").read_text()
    out, _ = tiny("sanity", "--json", "-o", "page.md")
    assert strictly(out)["verdict"] == "pass"
    assert (home / "page.md").read_text().startswith("# run.toml\n")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("page.pdf", ["page.pdf", ".html", ".md"]),
        ("page", ["page", ".html", ".md"]),
        ("missing/page.html", ["missing/", "no such folder"]),
        ("folder.md", ["folder.md", "is a folder"]),
    ],
)
def test_a_page_that_cannot_be_written_is_refused_at_once(tiny, home, out, words):
    (home / "folder.md").mkdir()
    output, err = tiny("sanity", "--out", out, code=2)
    assert all(word in err for word in words)
    assert output == ""
    assert not (home / "data").exists(), "nothing was prepared, nothing checked"


# ---- before a training ----


def run_files(home):
    return {p.name: p.read_bytes() for p in (home / "out").iterdir()} if (home / "out").exists() else None


def test_train_says_in_one_line_that_all_is_well(tiny):
    out, err = tiny("train")
    assert re.search(r"^sanity: 2 quick checks passed in \d+\.\d s\n", err, re.M), "the quick ones"
    assert not re.search(r"^[✓!✗–] ", err, re.M)
    assert out.startswith("validation loss")


def test_train_tells_warnings_in_a_line_each_and_goes_on(tiny):
    _, err = tiny("train", checks=(*GOOD, WARNING))
    assert re.search(
        r"^sanity: 2 quick checks passed, 1 to look at in .*\n! initial loss: 8.912; a smaller init\n", err, re.M
    )


def test_train_refuses_with_the_whole_story_and_touches_nothing(tiny, home):
    out, err = tiny("train", checks=(*GOOD, FAILURE, CRASH), code=1)
    assert out == ""
    assert "quick checks passed, 2 failed in" in err
    assert f"✗ causal mask {LONG}\n    expected  no change\n    diagnosis a position" in err
    assert "error: out/: 2 checks failed; nothing was written\n" in err
    assert "fix: mend it, or train all the same with --no-sanity" in err
    assert run_files(home) is None
    tiny("train")
    before = run_files(home)
    assert "ckpt.pt" in before
    tiny("train", "--overwrite", checks=[FAILURE], code=1)
    assert run_files(home) == before, "the old run is deleted only when the new one begins"
    tiny("train", "--overwrite", "--no-sanity", "--set", "train.max_steps=30", checks=[FAILURE])
    assert run_files(home) != before


def test_a_run_that_goes_on_is_not_checked_again(tiny):
    tiny("train")
    _, err = tiny("resume", "out/ckpt.pt", checks=[FAILURE])
    assert "sanity" not in err


def test_the_checks_leave_no_trace_in_the_weights(tiny, home):
    """The real checks, and one that draws, seeds and trains as it likes; with dropout."""
    from tinyllm.engine import new_state, train_step

    def wild(subject) -> Result:
        torch.manual_seed(7)
        state = new_state(subject.run)
        for _ in range(3):
            train_step(subject.run, state)
        torch.rand(5)
        return passed("done")

    checks = (*tinyllm.sanity.CHECKS, Check("wild", "nothing", wild))
    tiny("train", "--no-sanity", checks=checks)
    plain = torch.load(home / "out" / "ckpt.pt", weights_only=True)["model"]
    _, err = tiny("train", "--overwrite", checks=checks)
    assert "sanity: " in err
    checked = torch.load(home / "out" / "ckpt.pt", weights_only=True)["model"]
    assert plain.keys() == checked.keys()
    assert all(torch.equal(plain[name], checked[name]) for name in plain)


# ---- in processes of their own ----

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import tinyllm.sanity
from test_sanity_cli import FAILURE, GOOD, made, passed
slow = made("slow", "cost", passed("done"), seconds=1.5)
tinyllm.sanity.CHECKS = {checks}
from tinyllm.cli import main
main()
"""


@pytest.fixture
def script(home):
    """A function that writes a tinyllm with such checks; the command that runs it."""

    def write(checks: str) -> list[str]:
        (home / "tiny.py").write_text(SCRIPT.format(tests=os.path.dirname(__file__), checks=checks))
        return [sys.executable, "tiny.py"]

    return write


@posix
@pytest.mark.parametrize("options", ["", "--json"])
def test_a_reader_that_leaves_is_no_error(script, options):
    command = f"{' '.join(script('GOOD * 400'))} sanity {options} | head -c 9; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True)
    assert found.returncode == 128 + 13
    assert len(found.stdout) == 9
    assert b"Traceback" not in found.stderr


def test_where_only_ascii_can_be_shown(script):
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env.pop("PYTHONIOENCODING", None)
    found = subprocess.run([*script("(*GOOD, FAILURE)"), "sanity"], capture_output=True, env=env)
    assert found.returncode == 1
    out = found.stdout.decode("ascii")
    assert "+ token ids     ids" in out
    assert "- documents     train" in out
    assert "7.3365 +- 2e-7" in out
    assert "x causal mask   the" in out
    assert "?" not in out


def in_terminal(command, columns, stdout=None):
    """What the command writes to a terminal of this width, and its exit code."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = os.environ | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(command, stdin=theirs, stdout=stdout or theirs, stderr=theirs, env=env)
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
@pytest.mark.parametrize("columns", [80, 20])
def test_a_live_line_says_which_check_is_running_and_goes_away(script, columns):
    screen, code = in_terminal([*script("(*GOOD, slow)"), "sanity"], columns)
    assert code == 0
    frames = re.findall(r"\r\x1b\[2K *(5 of 5 [^\r\n\x1b]*)", bare_colours(screen))
    assert 1 <= len(frames) <= 6, "it does not take the cores from the checks"
    assert frames[0].startswith("5 of 5  slow  ")
    assert max(map(len, frames)) < columns
    assert "\x1b[?25h" in screen, "the cursor is back"
    assert re.search(r"\n4 passed, 1 skipped", bare(screen).replace("\r", ""))
    assert not bare(screen).replace("\r", "").endswith("\n\n")


def bare_colours(text: str) -> str:
    return re.sub("\x1b\\[[0-9;]*m", "", text)


@posix
def test_the_live_line_keeps_out_of_a_file(script, home):
    with open(home / "out.txt", "wb") as file:
        screen, code = in_terminal([*script("(*GOOD, slow)"), "sanity", "--quick"], 80, stdout=file)
    assert code == 0
    assert "4 of 4  slow" in screen
    out = (home / "out.txt").read_text(encoding="utf-8")
    assert "\x1b" not in out
    assert shown(out) == ["token ids", "documents", "loss function", "slow"]


def test_a_wait_for_loops_to_be_compiled_is_told(home):
    command = [sys.executable, "-m", "tinyllm", "sanity", "--only", "fast sampling"]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(home / "loops")}
    told = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    assert ["compiling its loops" in process.stderr for process in told] == [True, False]
    assert [process.stdout.count("✓ fast sampling") for process in told] == [1, 1]
