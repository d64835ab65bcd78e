"""Runs that are asked to stop, wherever they are, against the same runs undisturbed.

    for finding in signals(Path("/tmp/signals")):
        finding.name, finding.ok, finding.what          # "SIGTERM in an evaluation", True, "ended after 0.3 s"

And two tinyllms that want the same folder.
"""

import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from torture.finding import Finding, refused
from torture.kills import SHORT, newest
from torture.runs import QUIET, Forks, Home, differences, spawn

SOON = 10.0  # seconds; most of it is Python's own end, on a machine that has other things to do
PLACES = {  # how often it is passed before the signal comes
    "start": 1,
    "first moment": 1,
    "step": 8,
    "evaluation": 5,  # the first of the third evaluation
    "save": 2,
    "hanging batch": 9,
}
COMPILED = {"compilation": 1}
NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def signals(folder: Path, whole: bool = True) -> Iterator[Finding]:
    """Each signal at each place, and two processes in one folder; or each place once."""
    undisturbed = Home(folder / "undisturbed", SHORT, folder / "data")
    with Forks() as forks:
        assert forks.start(undisturbed, "train", *QUIET).wait() == 0, undisturbed.said()
        for i, (place, times) in enumerate(PLACES.items()):
            for number in NUMBERS if whole else NUMBERS[i % 3 : i % 3 + 1]:
                yield stopped(
                    place, times, number, Home(folder / "stopped", SHORT, folder / "data"), undisturbed, forks
                )
        if whole:
            yield two_in_one_folder(folder, forks)
            if not why_not():
                yield stopped_compiling(folder, forks)


def why_not() -> str:
    """Why nothing can be compiled; '' if it can."""
    return "" if shutil.which("c++") else "no C++ compiler"


def stopped_compiling(folder: Path, forks: Forks) -> Finding:
    run = SHORT | {"runtime.compile": True}
    undisturbed = Home(folder / "compiled, undisturbed", run, folder / "data")
    assert forks.start(undisturbed, "train", *QUIET).wait() == 0, undisturbed.said()
    home = Home(folder / "compiled", run, folder / "data")
    return stopped("compilation", 1, signal.SIGTERM, home, undisturbed, forks)


def stopped(place: str, times: int, number: int, home: Home, undisturbed: Home, forks: Forks) -> Finding:
    """It ends soon, says so with its exit code and in words, and what goes on is what never was stopped."""
    note, problems = home.folder / "note.txt", []
    given = {"place": place, "number": number, "times": times, "note": str(note)}
    process = forks.start(home, "train", "run.toml", *QUIET, before="torture.inside:signal_at", **given)
    code, ended = process.wait(), time.time()
    took = ended - float(note.read_text()) if note.exists() else -1.0
    # Before the run has begun there is nothing to finish: it may end as any process does.
    codes = (128 + number, -number) if place == "start" else (128 + number,)
    if code not in codes:
        problems.append(f"exit code {code}")
    if not 0 <= took < SOON:
        problems.append(f"ended after {took:.1f} s")
    told = re.search(r"stopped at step ([\d,]+); it is saved|stopped before the first step", home.said())
    if place != "start" and not told:
        problems.append("does not say so")
    elif told and int((told[1] or "0").replace(",", "")) != newest(home):
        problems.append(f"says {told[0]!r}, but step {newest(home)} is")
    if code is None:
        process.kill()
        process.wait()
    said = home.said()
    again = ("resume", "out") if newest(home) else ("train", "run.toml", *QUIET)
    if forks.start(home, *again).wait() != 0:
        problems.append("does not go on")
    else:
        problems += differences(home, undisturbed)
    home.delete()
    name = f"{signal.Signals(number).name} at {place}"
    what = "; ".join(problems)
    return Finding(name, not problems, f"{what}; it said: {said[-1000:]}" if problems else f"ended after {took:.1f} s")


def two_in_one_folder(folder: Path, forks: Forks) -> Finding:
    """The second is refused while the first lives, and goes on as soon as the first is dead."""
    home = Home(folder / "two", SHORT | {"train.max_steps": 100_000}, folder / "data")
    first, problems = spawn(home, "train", "run.toml", *QUIET, log=home.folder / "first.txt"), []
    end = time.monotonic() + 60
    while not newest(home) and time.monotonic() < end:
        time.sleep(0.01)
    for args in (("resume", "out"), ("train", "run.toml", *QUIET)):
        home.log.unlink(missing_ok=True)
        code = forks.start(home, *args).wait(20)
        problems.append(refused(code, home.said(), "another tinyllm is training in this folder"))
    if first.wait(0) is not None:
        problems.append(f"the first has ended: {first.code}")
    first.kill()
    first.wait()
    shorter = (f"train.max_steps={newest(home) + 100}", f"schedule.decay_steps={home.steps}")
    if forks.start(home, "resume", "out", *(word for value in shorter for word in ("--set", value))).wait() != 0:
        problems.append("the second cannot go on after the first")
    what = "; ".join(filter(None, problems))
    return Finding("two in one folder", not what, what and f"{what}; it said: {home.said()[-1000:]}")
