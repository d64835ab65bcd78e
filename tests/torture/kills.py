"""Runs that are killed, again and again, against the same runs undisturbed.

    for killed in kills(200, seed=0, folder=Path("/tmp/kills")):
        killed.run, killed.falls, killed.lost           # "muon, modern", ["between saves", ...], []

A tinyllm is killed at a moment drawn at random and resumed, or begun anew if nothing was saved yet, until it has
finished. The moments are of five kinds: some time after the start; some lines of metrics later; when a checkpoint is
seen to be written; right before the n-th change to the folder, be it a rename, a link, a deletion or a file that is
opened; and in the middle of a write, after n bytes of it. All but the last are SIGKILL. Most of the processes are
forked (see `server.py`), about every tenth is the console script.
"""

import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torture.runs import LIMIT, QUIET, Forks, Home, Process, differences, halves, spawn

RUNS = {
    "adamw": {},
    "dropout, accumulation": {"model.dropout": 0.2, "train.micro_batch_size": 2},
    "muon, modern": {"optim.name": "muon", "model.recipe": "modern"},
    "bfloat16, dropout": {"runtime.dtype": "bfloat16", "model.dropout": 0.1},
    "keep 1": {"train.keep": 1, "train.eval_interval": 10},
    "documents, keep 3": {"train.align_documents": True, "model.attn_dropout": 0.1, "train.keep": 3},
}
A_RUN = 14  # kills, so that every kind of run gets its share
SHORT = {"train.max_steps": 12, "train.save_interval": 3, "train.eval_interval": 4, "schedule.warmup_steps": 2}
SHORT_CHANGES = {1: 40, 2: 70}  # that it makes to its folder, at most, by train.keep
SCRIPTS = 0.2  # of those kills that come from outside: a tenth of all
KINDS = {"time": 3, "metrics": 3, "seen saving": 4, "before a change": 7, "after bytes": 1}  # how often each
INSIDE = ("before a change", "after bytes")  # the forked process does it itself
PLACES = (
    "before the first step", "between saves", "during a save of the latest", "during a save of the best",
    "while the folder was made ready", "at the end",
)  # fmt: skip


@dataclass
class Killed:
    """A run that was killed over and over."""

    run: str
    kinds: list[str] = field(default_factory=list)  # how the moment of each kill was chosen
    falls: list[str] = field(default_factory=list)  # where it fell, of PLACES
    scripts: int = 0  # kills of the console script
    lost: list[str] = field(default_factory=list)  # what is not as it must be
    seconds: float = 0.0


def kills(
    count: int, seed: int, folder: Path, lanes: int = 2, names: tuple[str, ...] = tuple(RUNS), steps: int = 300
) -> Iterator[Killed]:
    """Kill so often, in all the runs of these names, at moments drawn at random."""
    runs = {name: RUNS[name] | {"train.max_steps": steps} for name in names}
    rounds = max(len(names), -(-count // A_RUN))

    def one(forks: Forks, whole: dict[str, Home], number: int) -> Killed:
        name = names[number % len(names)]
        share = count // rounds + (number < count % rounds)
        home = Home(folder / f"killed {number}", runs[name], folder / "data")
        return torture(name, home, whole[name], share, random.Random(f"{seed} {number}"), forks)

    yield from side_by_side(one, range(rounds), runs, folder, lanes)


def every_change(folder: Path, lanes: int = 2, stride: int = 1) -> Iterator[Killed]:
    """Kill a short run right before its first change to its folder, before its second, and so on to the last."""
    runs = {f"short, keep {keep}": SHORT | {"train.keep": keep} for keep in SHORT_CHANGES}

    def one(forks: Forks, whole: dict[str, Home], task: tuple[str, int]) -> Killed:
        name, number = task
        home = Home(folder / f"{name}, change {number}", runs[name], folder / "data")
        return kill_before(name, number, home, whole[name], forks)

    ranges = zip(runs, SHORT_CHANGES.values(), strict=True)
    tasks = [(name, number) for name, most in ranges for number in (*range(1, most, stride), most)]
    last = dict.fromkeys(runs)
    for killed in side_by_side(one, tasks, runs, folder, lanes):
        last[killed.run] = killed
        yield killed
    assert not any(killed.kinds for killed in last.values()), "there are more changes than SHORT_CHANGES"


def while_preparing(folder: Path) -> Iterator[Killed]:
    """Kill `train` right before each change to the folder of the data, of which there is none yet, and train again."""
    undisturbed = Home(folder / "undisturbed", SHORT, Path("data"))
    with Forks() as forks:
        assert forks.start(undisturbed, "train", *QUIET).wait() == 0, undisturbed.said()
        for number in range(1, 100):
            killed, started = Killed("preparation"), time.monotonic()
            home = Home(folder / f"change {number}", SHORT, Path("data"))
            hook = die_before(home, number) | {"folder": str(home.folder / "data")}
            if forks.start(home, "train", *QUIET, **hook).wait() == 0:
                return
            killed.kinds.append((home.folder / "note.txt").read_text())
            killed.falls.append("while the data was prepared")
            if forks.start(home, "train", *QUIET).wait() != 0:
                killed.lost.append(home.said()[-500:])
            names = {path.name for each in (home, undisturbed) for path in (each.folder / "data").iterdir()}
            one, two = ({name: bytes_of(each.folder / "data" / name) for name in names} for each in (home, undisturbed))
            killed.lost += [f"data/{name}" for name in sorted(names) if one[name] != two[name]]
            killed.lost += killed.lost or differences(home, undisturbed)
            killed.seconds = time.monotonic() - started
            yield killed


def bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def side_by_side(
    one: Callable[..., Killed], tasks: Iterable[Any], runs: dict[str, dict], folder: Path, lanes: int
) -> Iterator[Killed]:
    """one(forks, the undisturbed runs by name, task) for each task, `lanes` of them at a time."""
    with ExitStack() as stack:
        idle: SimpleQueue[Forks] = SimpleQueue()
        for _ in range(lanes):
            idle.put(stack.enter_context(Forks()))
        pool = stack.enter_context(ThreadPoolExecutor(lanes))

        def with_forks(do: Callable[..., Any], *args: Any) -> Any:
            forks = idle.get()
            try:
                return do(forks, *args)
            finally:
                idle.put(forks)

        def undisturbed(forks: Forks, name: str) -> Home:
            home = Home(folder / f"undisturbed {name}", runs[name], folder / "data")
            assert forks.start(home, "train", *QUIET).wait() == 0, home.said()
            return home

        with_forks(prepare, Home(folder / "prepared", {}, folder / "data"))
        whole = dict(zip(runs, pool.map(lambda name: with_forks(undisturbed, name), runs), strict=True))
        yield from pool.map(lambda task: with_forks(one, whole, task), tasks)


def prepare(forks: Forks, home: Home) -> None:
    assert forks.start(home, "prepare").wait() == 0, home.said()


def torture(name: str, home: Home, undisturbed: Home, count: int, rng: random.Random, forks: Forks) -> Killed:
    """Kill the run `count` times, or more than one such run if it has finished before; then let it finish."""
    killed, started = Killed(name), time.monotonic()
    while not killed.lost:
        plan = None if len(killed.kinds) >= count else rng.choices(list(KINDS), list(KINDS.values()))[0]
        script = plan not in (None, *INSIDE) and rng.random() < SCRIPTS
        began = Beginning(metrics_of(home), newest(home))
        process = begin(spawn if script else forks.start, home, **planned(home, plan, rng))
        if plan and plan not in INSIDE:
            wait_for_moment(home, plan, rng, process, slow=script)
            process.kill()
        code = process.wait()
        if code == 0:
            killed.lost += differences(home, undisturbed)
            if len(killed.kinds) >= count:
                break
            home.delete_run()
        elif plan and code is not None and code < 0:
            killed.kinds.append(plan)
            killed.falls.append(where_it_fell(home, began))
            killed.scripts += script
            killed.lost += [f"{file}: not whole after a kill" for file in halves(home)]
        else:
            killed.lost.append(f"exit code {code}: {home.said()[-500:]}")
    killed.seconds = time.monotonic() - started
    return killed


def kill_before(name: str, number: int, home: Home, undisturbed: Home, forks: Forks) -> Killed:
    """Kill the run right before a certain change to its folder, and let it finish."""
    killed, started = Killed(name), time.monotonic()
    began = Beginning(metrics_of(home), newest(home))
    if begin(forks.start, home, **die_before(home, number)).wait() != 0:
        killed.kinds.append((home.folder / "note.txt").read_text())
        killed.falls.append(where_it_fell(home, began))
        killed.lost += [f"{file}: not whole after a kill" for file in halves(home)]
        (home.out / "ckpt-1.pt.tmp").write_text("left by one who was killed, long ago")
        if begin(forks.start, home).wait() != 0:
            killed.lost.append(home.said()[-500:])
    killed.lost += killed.lost or differences(home, undisturbed)
    home.delete()
    killed.seconds = time.monotonic() - started
    return killed


def begin(start: Callable[..., Process], home: Home, **before: Any) -> Process:
    """Resume the run, or train it if nothing was saved, as somebody would who has seen it die."""
    args = ("resume", "out") if newest(home) else ("train", "run.toml", *QUIET)
    return start(home, *args, **before)


def planned(home: Home, plan: str | None, rng: random.Random) -> dict[str, Any]:
    """What the process is to do to itself."""
    if plan == "before a change":
        return die_before(home, rng.randint(1, 60))
    if plan == "after bytes":
        return {"before": "torture.inside:die_after_bytes", "size": rng.randint(1, 90_000)}
    return {}


def die_before(home: Home, number: int) -> dict[str, Any]:
    note = str(home.folder / "note.txt")
    return {"before": "torture.inside:die_before_change", "number": number, "folder": str(home.out), "note": note}


def wait_for_moment(home: Home, plan: str, rng: random.Random, process: Process, slow: bool) -> None:
    """Return when the process is to be killed, or when it has ended."""
    end = time.monotonic() + LIMIT
    if plan == "time":
        process.wait(rng.uniform(0, 6.0 if slow else 0.8))
        return
    seen, wanted, last = 0, rng.randint(1, 25), metrics_of(home)
    while process.wait(0.0002) is None and time.monotonic() < end:
        if plan == "metrics" and (size := metrics_of(home)) != last:
            seen, last = seen + 1, size
        elif plan == "seen saving":
            seen += any(name.endswith(".pt.tmp") for name in home.files())
        if seen >= wanted:
            break
    process.wait(rng.choice([0.0, rng.uniform(0, 0.003)]))


@dataclass(frozen=True)
class Beginning:
    """What a process found when it began."""

    metrics: tuple[int, int]
    saved: int  # the newest step


def newest(home: Home) -> int:
    """The newest step that was saved; 0 if none was."""
    from tinyllm.archive import sealed_step

    return max((sealed_step(home.out / name) or 0 for name in home.files() if name.endswith(".pt")), default=0)


def metrics_of(home: Home) -> tuple[int, int]:
    """Which file the metrics are, and how long; it is another one each time a run goes on."""
    try:
        found = os.stat(home.out / "metrics.jsonl")
    except FileNotFoundError:
        return 0, 0
    return found.st_ino, found.st_size


def where_it_fell(home: Home, began: "Beginning") -> str:
    """Which of PLACES, by what the dead left."""
    aside = [name for name in home.files() if name.endswith(".tmp")]
    if any(name.startswith(("run", "metrics")) for name in aside):
        return "while the folder was made ready"
    if any(name.startswith("best") for name in aside):
        return "during a save of the best"
    if aside:
        return "during a save of the latest"
    step = last_step(home)
    if metrics_of(home) == began.metrics or step <= began.saved:
        return "before the first step"
    return "at the end" if step == home.steps else "between saves"


def last_step(home: Home) -> int:
    """The last step that the metrics tell of."""
    path = home.out / "metrics.jsonl"
    found = re.findall(rb'"event": "step", "step": (\d+),', path.read_bytes()) if path.exists() else ()
    return int(found[-1]) if found else 0
