"""Small runs, the processes that train them, and where two of them differ.

home = Home(folder, {"model.dropout": 0.1})             # folder/run.toml, and out/ when it has been trained
with Forks() as forks:
    process = forks.start(home, "train", "run.toml")    # or spawn(home, ...): the console script itself
    process.kill()
    process.wait(60)                                    # -9
differences(home.out, other.out)                        # ["ckpt.pt: model.head.weight", ...]
"""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w

ROOT = Path(__file__).parents[2]
LIMIT = 120.0  # seconds until a process is taken for lost
OLDER = re.compile(r"(ckpt|best)-\d+\.pt")
QUIET = ("--no-sanity", "--overwrite")

BASE = {
    "data.source": "tales",
    "data.tokenizer": "char",
    "data.tales_stories": 300,
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.block_size": 16,
    "optim.lr": 3e-3,
    "schedule.warmup_steps": 5,
    "train.max_steps": 300,
    "train.batch_size": 8,
    "train.eval_interval": 20,
    "train.eval_windows": 20,
    "train.save_interval": 7,
    "train.log_interval": 1,
    "runtime.device": "cpu",
    "runtime.dtype": "float32",
    "runtime.threads": 1,
}


def environment() -> dict[str, str]:
    """Ours, with this checkout in place of whatever is installed."""
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "NO_COLOR": "1", "COLUMNS": "200"}


class Home:
    """A folder with a run.toml, in which tinyllm is started: out/ is the run, log.txt what it has said."""

    def __init__(self, folder: Path, changes: dict[str, Any], data: Path) -> None:
        self.folder, self.out, self.log = folder, folder / "out", folder / "log.txt"
        values = BASE | changes | {"data.dir": str(data)}
        self.steps, self.eval_interval = values["train.max_steps"], values["train.eval_interval"]
        sections: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            section, _, key = name.partition(".")
            sections.setdefault(section, {})[key] = value
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.toml").write_text(tomli_w.dumps(sections))

    def said(self) -> str:
        """All that its processes have written, to either stream."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def files(self) -> list[str]:
        try:
            return sorted(os.listdir(self.out))
        except FileNotFoundError:
            return []

    def delete_run(self) -> None:
        shutil.rmtree(self.out)

    def delete(self) -> None:
        shutil.rmtree(self.folder)


# ---- Processes ----


class Process:
    """A tinyllm of `spawn` or `Forks.start`."""

    def __init__(self, pid: int, ended: Any) -> None:
        self.pid, self.ended, self.code = pid, ended, None

    def wait(self, seconds: float = LIMIT) -> int | None:
        """Its exit code, negative for a signal; None if it has not ended by then."""
        if self.code is None:
            self.code = self.ended(seconds)
        return self.code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; to one that has ended, none."""
        if self.code is None:
            os.kill(self.pid, number)


def spawn(home: Home, *args: str, log: Path | None = None) -> Process:
    """`tinyllm ARGS`, as a user starts it."""
    with open(log or home.log, "ab") as log:
        command = [sys.executable, "-m", "tinyllm", *args]
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, cwd=home.folder, env=environment(), **streams)

    def ended(seconds: float) -> int | None:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    return Process(process.pid, ended)


class Forks:
    """A server (see `server.py`) that forks one tinyllm at a time. A context manager; not for several threads."""

    def __init__(self) -> None:
        self.process: Process | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "torture.server"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.server = subprocess.Popen(command, cwd=ROOT / "tests", env=environment(), **pipes)
        assert self.line() == "ready"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        self.server.communicate(timeout=LIMIT)  # closes its input, which ends it

    def start(self, home: Home, *args: str, before: str = "", **given: Any) -> Process:
        """`tinyllm ARGS` in a process that calls `before` (module:function) first, with what is given."""
        if self.process and self.process.wait(0) is None:  # the last one hangs
            self.process.kill()
            self.process.wait()
        task = {"args": args, "cwd": str(home.folder), "log": str(home.log), "before": before, "given": given}
        print(json.dumps(task), file=self.server.stdin, flush=True)
        self.process = Process(int(self.line()), self.ended)
        return self.process

    def ended(self, seconds: float) -> int | None:
        ready, _, _ = select.select([self.server.stdout], [], [], seconds)
        return int(self.line()) if ready else None

    def line(self) -> str:
        return self.server.stdout.readline().strip()


# ---- What became of a run ----


def differences(ours: Home, undisturbed: Home, older: bool = True) -> list[str]:
    """What of a run is not, to the last bit, what it is in one that nobody disturbed; nothing but times may differ.

    Without the `older` checkpoints if wanted: which these are depends on which saves have failed.
    """
    here, there = ({n for n in home.files() if older or not OLDER.fullmatch(n)} for home in (ours, undisturbed))
    found = [f"{name}: in one of them only" for name in sorted(here ^ there)]
    for name in sorted(here & there):
        one, two = (home.out / name for home in (ours, undisturbed))
        if name.endswith(".pt"):
            found += [f"{name}: {place}" for place in unlike(record(one), record(two))]
        elif name == "metrics.jsonl":
            found += [f"{name}: {what}" for what in unlike(rows(ours), rows(undisturbed))]
        elif one.read_bytes() != two.read_bytes():
            found.append(f"{name}: another text")
    found += [f"{name}: not whole" for name in halves(ours)]
    return found + incomplete(ours)


def halves(home: Home) -> list[str]:
    """Checkpoints under their own names that are not whole; there must never be one."""
    from tinyllm.archive import is_whole

    return [name for name in home.files() if name.endswith(".pt") and not is_whole(home.out / name)]


def record(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds."""
    from tinyllm.checkpoint import load

    return vars(load(path))


def rows(home: Home) -> list[dict[str, Any]]:
    """The metrics without their times; a line that is torn is an error."""
    lines = (home.out / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def incomplete(home: Home) -> list[str]:
    """What is missing in the metrics of a finished run, or there more than once."""
    found = rows(home)
    steps = [row["step"] for row in found if row["event"] == "step"]
    evaluations = [row["step"] for row in found if row["event"] == "eval"]
    wanted = [step for step in range(home.steps + 1) if step % home.eval_interval == 0 or step == home.steps]
    problems = [] if steps == list(range(1, home.steps + 1)) else ["metrics.jsonl: not each step once, in order"]
    return problems + ([] if evaluations == wanted else ["metrics.jsonl: not each evaluation once, in order"])


def unlike(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two nested values are not the same to the last bit."""
    import torch

    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [d for key in keys for d in unlike(a.get(key), b.get(key), f"{place}.{key}".lstrip("."))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i in range(len(a)) for d in unlike(a[i], b[i], f"{place}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = (a.dtype, a.shape) == (b.dtype, b.shape) and as_bytes(a) == as_bytes(b)  # 0.0 is not -0.0
    else:
        same = type(a) is type(b) and repr(a) == repr(b)
    return [] if same else [place or "everything"]


def as_bytes(tensor: Any) -> bytes:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
