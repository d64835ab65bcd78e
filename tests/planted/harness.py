"""`tinyllm sanity` on a copy of the package, in a process of its own.

    outcome = run_bug(bug, folder, data)
    outcome.fired()                     # ["causal mask", "formula"]

The processes are forked from a server that has imported torch but no tinyllm: importing takes longer than checking.
"""

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from planted.bug import PACKAGE, Bug, Edit, plant
from planted.child import child

# What a check costs should be known, but a bug is not found by it: these two measure the machine.
SKIPPED = ("memory", "time")
LIMIT = 180  # seconds until a process is taken for lost

# Everything that a bug could touch is on: dropout, accumulation, clipping, warmup and decay.
BASE = {
    "data.source": "tales",
    "data.tokenizer": "char",
    "data.tales_stories": 300,
    "model.n_layer": 2,
    "model.n_head": 4,
    "model.n_embd": 64,
    "model.block_size": 32,
    "model.dropout": 0.1,
    "optim.lr": 3e-3,
    "optim.min_lr": 3e-4,
    "schedule.warmup_steps": 10,
    "train.max_steps": 400,
    "train.batch_size": 8,
    "train.micro_batch_size": 4,
    "train.eval_interval": 100,
    "train.eval_windows": 60,
    "train.save_interval": 100,
    "runtime.device": "cpu",
    "runtime.dtype": "float32",
    "runtime.threads": 1,
}
CUSTOM = {"model.class": "my_model.py:MyGPT"}

context = multiprocessing.get_context("forkserver")
# torch._dynamo: the first optimizer of a process imports it, which takes two seconds.
context.set_forkserver_preload(
    ["torch", "torch._dynamo", "numpy", "pydantic", "tokenizers", "tomli_w", "typer", "rich.console"]
)


@dataclass(frozen=True)
class Outcome:
    """What `tinyllm sanity` said."""

    code: int | None  # its exit code; None if it had to be killed
    results: list[dict]
    output: str  # what it wrote to standard error
    seconds: float

    def fired(self, *, warnings: bool = True) -> list[str]:
        """The names of the checks that failed or, if wanted, warned, in their order; `refused` if none was made."""
        if not self.results:
            return ["refused" if self.code == 2 else "crashed"]
        wanted = ("fail", "warn") if warnings else ("fail",)
        return [result["name"] for result in self.results if result["verdict"] in wanted]

    def failed(self) -> list[str]:
        return self.fired(warnings=False)

    def said(self, name: str) -> str:
        """A check's finding in a line."""
        for r in self.results:
            if r["name"] == name:
                return f"{r['verdict']}: {r['measured']} (expected {r['expected']}) - {r['diagnosis']}"
        if self.results:
            return "no such finding"
        return self.output.strip().replace("\n", " | ")[-400:]


def compile_loops(folder: Path) -> None:
    """Have the loops compiled where copies are made from: each then compiles only what its bug changes."""
    folder.mkdir()
    settings = BASE | {"runtime.dtype": "bfloat16", "runtime.loops": "on"}
    (folder / "run.toml").write_text(toml(settings), encoding="utf-8")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from tinyllm.cli import main; main()"
    command = [sys.executable, "-P", "-c", code, str(PACKAGE.parent), "sanity", "run.toml"]
    for recipe in ("gpt2", "modern"):
        wanted = ["--set", f"model.recipe={recipe}", "--only", "training loops,fast sampling"]
        subprocess.run([*command, *wanted], cwd=folder, check=True, capture_output=True)


def first_finding(bug: Bug, outcome: Outcome) -> str:
    """The check that its user reads first."""
    return next(iter(outcome.fired(warnings=bug.warns)), "nothing")


def run_bug(bug: Bug, folder: Path, data: Path, *, whole: bool = True) -> Outcome:
    """`tinyllm sanity` with a bug, in the new folder `folder`; `data` is the healthy base's prepared data.

    If not the `whole`, then no further than to the check that should find it, which saves half of the time.
    """
    settings = BASE | (CUSTOM if bug.custom else {})
    if not bug.prepares and not any(override.startswith("data.") for override in bug.set):
        shutil.copytree(data, folder / "data")
        if bug.damage:
            bug.damage(folder / "data")
    return run(bug.edits, settings, bug.set, folder, until=() if whole else bug.caught_by)


def run(
    edits: tuple[Edit, ...], settings: dict, overrides: tuple[str, ...], folder: Path, until: tuple[str, ...] = ()
) -> Outcome:
    """`tinyllm sanity` with the package edited, in `folder`, which may hold prepared data."""
    folder.mkdir(parents=True, exist_ok=True)
    plant(edits, folder)
    (folder / "run.toml").write_text(toml(settings), encoding="utf-8")
    started = time.perf_counter()
    process = context.Process(target=child, args=(str(folder), overrides, SKIPPED, until))
    process.start()
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        process.join()
        code = None
    else:
        code = process.exitcode
    seconds = time.perf_counter() - started
    out, err = ((folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))
    try:
        results = json.loads(out)["results"]
    except (ValueError, KeyError, TypeError):
        results = []
    return Outcome(code, results, err or out, seconds)


def toml(settings: dict) -> str:
    """A run config from `section.key` to value."""
    sections: dict[str, dict] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return tomli_w.dumps(sections)
