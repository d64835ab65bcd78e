"""A working folder, command lines to call in it, and what is wrong with the answers.

    with Home(folder) as home:                       # a run and its data, and files that are none
        outcome = home.run(Case(("config", "nowhere.toml")))
        outcome.fault                                # "" or one of FAULTS; `outcome.report()` tells how to see it again
        home.run_apart(case)                         # the same in a process of its own, which has little memory

A case is plain data: the arguments, and what is written before.
"""

import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

LIMIT = 20.0  # seconds for an answer; most come in milliseconds
MEMORY = 4 << 30  # bytes of address space for a process apart
FAULTS = {
    "traceback": "an exception that is no TinyLLMError came through, or a process was killed",
    "hang": f"no answer within {LIMIT:g} seconds",
    "exit code": "neither 0 nor 2, nor the 1 of a check that failed",
    "no message": "refused without a word",
    "output": "refused, with something on standard output",
    "written": "refused, with something written",
    "unnamed key": "refused for one bad key, and the message does not say which",
    "wrong line": "the message names another line than the key's",
    "other words": "another command refused the same config differently",
    "another config": "what `config` printed is not the same config when it is read",
}
TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(120))
BASE = """\
[data]
source = "a.txt"
tokenizer = "char"

[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16

[optim]
lr = 1e-3

[schedule]
warmup_steps = 2

[train]
max_steps = 4
batch_size = 2
eval_windows = 2

[runtime]
device = "cpu"
dtype = "float32"
threads = 1
"""


# ---- A case, and what came of it ----


@dataclass(frozen=True)
class Edit:
    """Damage to a file of the home: `share` says where, from 0 to 1."""

    kind: Literal["cut", "flip", "insert", "delete", "blank", "value"]
    share: float
    data: bytes = b""

    def __call__(self, content: bytes) -> bytes:
        at = int(self.share * len(content))
        match self.kind:
            case "cut":
                return content[:at]
            case "flip":
                return content[:at] + bytes(b ^ 1 for b in content[at : at + 1]) + content[at + 1 :]
            case "insert":
                return content[:at] + self.data + content[at:]
            case "delete":
                return content[:at] + content[at + 5 :]
            case "value":  # of a JSON, replaced
                found = list(re.finditer(rb"(?<=: )[^{\[,\n]+", content))
                where = found[int(self.share * len(found))] if found else None
                return content[: where.start()] + self.data + content[where.end() :] if where else self.data
            case _:
                return self.data


@dataclass(frozen=True)
class Case:
    """A command line, and the files that are written before it."""

    args: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    edits: dict[str, Edit] = field(default_factory=dict)
    stdin: bytes = b""
    key: str = ""  # the only one that may be wrong: a refusal must say it
    line: int = 0  # of the key in run.toml, if it is there; 0: not known
    then: tuple[str, ...] = ()  # a command that must refuse what this one refuses, in the same words


@dataclass(frozen=True)
class Outcome:
    """The answer to a case, and what is wrong with it."""

    case: Case
    code: int
    out: str
    err: str
    seconds: float
    crash: str = ""  # a traceback, or "hang"
    written: tuple[str, ...] = ()  # files and folders that are not as they were
    fault: str = ""  # one of FAULTS

    @property
    def ok(self) -> bool:
        return not self.fault

    @property
    def refused(self) -> bool:
        return self.code == 2

    def report(self) -> str:
        """All that one needs to see it again."""
        case = self.case
        parts = [
            f"{self.fault}: {FAULTS.get(self.fault, 'nothing is wrong')}",
            f"exit code {self.code} after {self.seconds:.1f} s; written: {', '.join(self.written) or 'nothing'}",
            f"arguments: {shortened(case.args)}",
            *(f"{name}: {shortened(content)}" for name, content in case.files.items()),
            *(f"{name}: {edit}" for name, edit in case.edits.items()),
            f"key: {shortened(case.key)}, line {case.line}" if case.key else "",
            f"then: {case.then}" if case.then else "",
            f"stdout: {shortened(self.out)}" if self.out else "",
            f"stderr: {shortened(self.err)}" if self.err else "",
            self.crash,
        ]
        return "\n".join(part for part in parts if part)


def shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) < 2000 else f"{text[:1200]} ... ({len(text):,} characters) ... {text[-600:]}"


def fault_of(outcome: Outcome) -> str:
    """What is wrong with an answer, "" for nothing."""
    case, err, code = outcome.case, outcome.err, outcome.code
    if outcome.crash == "hang":
        return "hang"
    if outcome.crash or "Traceback (most recent call last)" in err or code < 0:
        return "traceback"
    checks_failed = code == 1 and {"sanity", "train"} & set(case.args) and "fail" in outcome.out + err
    if code not in (0, 2) and not checks_failed:
        return "exit code"
    if code != 2:
        return ""
    if not re.search("error: |Error ─|Usage: ", outcome.out + err):
        return "no message"
    if outcome.out and "Usage: " not in outcome.out and "sanity" not in case.args:  # whose results come one by one
        return "output"
    if outcome.written:
        return "written"
    if case.key and case.key not in err:
        return "unnamed key"
    marker = f": {case.key}"
    lines = [line for line in err.splitlines() if marker in line and "run.toml:" in line.partition(marker)[0]]
    told = [line.partition(marker)[0].rpartition("run.toml:")[2] for line in lines]
    if case.key and case.line and any(number.isdigit() and int(number) != case.line for number in told):
        return "wrong line"
    return ""


# ---- The folder that it happens in ----


class Hang(BaseException):
    """It took too long."""


class Home:
    """A working folder with a run, its data and all kinds of files that are none of it; put back after each case."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder).resolve() / "home"  # `..` is ours too

    def __enter__(self) -> "Home":
        self.path.mkdir(parents=True, exist_ok=True)
        self.before = Path.cwd(), dict(os.environ), list(sys.path)
        os.chdir(self.path)
        os.environ |= {
            "TINYLLM_CACHE": str(self.path / "cache"),
            "TINYLLM_MIRROR": "http://127.0.0.1:9",  # nobody listens there
            "no_proxy": "*",
            "COLUMNS": "200",  # usage errors are wrapped
            "TERM": "dumb",
        }
        for name in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS"):
            os.environ.pop(name, None)
        self.furnish()
        self.contents = {name: self.content(self.path / name) for name in self.snapshot()}
        self.state = self.snapshot()
        return self

    def __exit__(self, *error: object) -> None:
        folder, environment, path = self.before
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path

    def furnish(self) -> None:
        """A run of four steps, and the files that are none."""
        files = {
            "a.txt": TEXT.encode(),
            "run.toml": BASE.encode(),
            "empty": b"",
            "empty.toml": b"",
            "empty.txt": b"",
            "photo": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
            "photo.txt": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
            "latin.toml": "# café\n".encode("latin-1"),
            "wide.toml": BASE.encode("utf-16"),
            "syntax.toml": b"[train\nmax_steps = 5",
            "good.jsonl": b'{"text": "one two three"}\n' * 60,
            "bad.jsonl": b'{"text": "one"}\n{"text": 5}\n',
            "deep.jsonl": b'{"text": ' + b"[" * 100_000,
            "digits.jsonl": b'{"text": ' + b"9" * 5000 + b"}\n",
            "list.json": b"[1, 2]",
            "deep.json": b"[" * 100_000,
            "folder/a.md": b"text",
            "bad/text.pt": b"not a checkpoint",
            "bad/zip.pt": b"PK\3\4" + bytes(100),
            "my_model.py": b"import torch\n\n\nclass Small(torch.nn.Module):\n    pass\n\n\nlegs = 4\n",
            "raises.py": b"raise ValueError('no')\n",
            "leaves.py": b"import sys\nsys.exit(3)\n",
            "nonsense.py": b"class A(:\n",
        }
        for name, content in files.items():
            write(self.path / name, content)
        with suppress(OSError):
            (self.path / "loop").symlink_to("loop")
            (self.path / "gone.toml").symlink_to("nowhere.toml")
            os.mkfifo(self.path / "pipe.txt")
        done = self.answer(Case(("train", "--no-sanity")))
        assert done.code == 0, done.report()

    def run(self, case: Case) -> Outcome:
        """The answer in this process; the home is then as it was."""
        outcome = self.run_once(case)
        if outcome.out.startswith("[data]") and not outcome.fault:
            again = self.run_once(Case(("config", "again.toml"), {"again.toml": outcome.out.encode()}))
            return outcome if again.out == outcome.out else replace(again, fault=again.fault or "another config")
        if not case.then or outcome.fault or not outcome.refused:
            return outcome
        other = self.run_once(replace(case, args=case.then))
        if not other.fault and (other.code, other.err) != (outcome.code, outcome.err):
            return replace(other, fault="other words")
        return other if other.fault else outcome

    def run_once(self, case: Case) -> Outcome:
        """The same for the case's own command alone."""
        with self.prepared(case):
            return self.judged(self.answer(case))

    def run_apart(self, case: Case, limit: float = 3 * LIMIT) -> Outcome:
        """The answer of a process of its own, which has little memory."""
        with self.prepared(case):
            return self.judged(self.answer_apart(case, limit))

    def judged(self, outcome: Outcome) -> Outcome:
        outcome = replace(outcome, written=self.written())
        return replace(outcome, fault=fault_of(outcome))

    def answer(self, case: Case) -> Outcome:
        """Call the console script's function as the script does."""
        from tinyllm.__main__ import main

        code, crash, started = 0, "", time.monotonic()
        streams = {name: io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for name, errors in ERRORS.items()}
        stdin = io.TextIOWrapper(io.BytesIO(case.stdin), "utf-8")
        with patched(sys, argv=["tinyllm", *case.args], stdin=stdin, **streams), alarm(LIMIT):
            try:
                main()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except KeyboardInterrupt:
                raise
            except Hang:
                crash = "hang"
            except BaseException:
                crash = "".join(traceback.format_exc())
            seconds = time.monotonic() - started
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        texts = []
        for stream in streams.values():
            stream.flush()
            texts.append(stream.buffer.getvalue().decode("utf-8", "replace"))
        return Outcome(case, code, *texts, seconds, crash)

    def answer_apart(self, case: Case, limit: float) -> Outcome:
        """Call the program; it is interrupted, then killed, when its time is up."""
        started, hung = time.monotonic(), ""
        command = [sys.executable, "-m", "tinyllm", *case.args]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # The environment has no PYTHONPATH of ours: the child imports what we import.
        here = os.environ | {"PYTHONPATH": str(Path(sys.modules["tinyllm"].__file__ or "").parents[1])}
        with subprocess.Popen(command, **pipes, env=here, preexec_fn=narrow, start_new_session=True) as child:
            try:
                out, err = child.communicate(case.stdin, limit)
            except subprocess.TimeoutExpired:
                hung = "hang"
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                out, err = child.communicate()
        texts = (text.decode("utf-8", "replace") for text in (out, err))
        return Outcome(case, child.returncode, *texts, time.monotonic() - started, hung)

    # ---- As it was before ----

    @contextmanager
    def prepared(self, case: Case) -> Iterator[None]:
        """The home with the case's files; afterwards as it was."""
        for name, content in case.files.items():
            write(self.path / name, content)
        for name, edit in case.edits.items():
            write(self.path / name, edit(self.contents.get(name) or b""))
        self.state = self.snapshot()
        try:
            yield
        finally:
            self.restore()

    def snapshot(self) -> dict[str, tuple[int, ...]]:
        """Each file and folder, with what changes when it is written; the caches are not the user's."""
        found = {}
        for folder, folders, files in os.walk(self.path):
            folders[:] = [name for name in folders if name not in ("cache", "__pycache__")]
            for name in (*folders, *files):
                path = os.path.join(folder, name)
                stat = os.lstat(path)
                times = () if os.path.isdir(path) else (stat.st_mtime_ns, stat.st_size, stat.st_ino)
                found[os.path.relpath(path, self.path)] = times
        return found

    def written(self) -> tuple[str, ...]:
        """What is not as it was, but for whole folders of prepared data: making them comes before much else."""
        now = self.snapshot()
        changed = sorted(name for name in {*now, *self.state} if now.get(name) != self.state.get(name))
        made = {name for name in changed if name not in self.state}
        whole = {name for name in made if f"{name}/meta.json" in made and f"{name}/train.bin" in made}
        above = {str(parent) for name in whole for parent in Path(name).parents}
        return tuple(name for name in changed if name not in whole | above and str(Path(name).parent) not in whole)

    def restore(self) -> None:
        """Make everything as it was at the beginning."""
        for name in sorted(self.snapshot(), reverse=True):
            path = self.path / name
            if name not in self.contents:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for name, content in self.contents.items():
            path = self.path / name
            if content is not None and (not path.is_file() or path.read_bytes() != content):
                write(path, content)
        shutil.rmtree(self.path / "cache", ignore_errors=True)

    @staticmethod
    def content(path: Path) -> bytes | None:
        return path.read_bytes() if path.is_file() and not path.is_symlink() else None


ERRORS = {"stdout": "strict", "stderr": "backslashreplace"}  # as Python opens them


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def narrow() -> None:
    """Little memory for this process, and none of it on the disk when it crashes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise Hang in here when the time is up, again and again if it is caught."""

    def ring(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
