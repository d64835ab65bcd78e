"""Kills, fills, damages and deceives whole runs, and looks whether anything is lost.

    just torture                          # all of it: half an hour on two cores
    python benchmarks/torture.py kills --count 200
    python benchmarks/torture.py disk signals --seed 7

Prints a line a part, and below it what was lost, if anything was; exits with 1 then.

kills     runs killed at random moments, and before each change to their folder; resumed, and compared to the last bit
disk      runs on disks that are full, protected, limited or broken for a while
signals   runs that are asked to stop, wherever they are; two in one folder
damage    damaged checkpoints and token files
hostile   checkpoints made by somebody who means harm
fuzz      anything at all, to everything that reads
numbers   runs whose numbers go wrong
cost      what all this costs
"""

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this checkout, whatever is installed

COUNTS = {"kills": 200, "damage": 2000, "fuzz": 3000}
Part = tuple[str, list[str]]  # the figures, and what was lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="which; all if none is named")
    parser.add_argument("--count", type=int, help="how many kills, damaged files, examples")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    # Of a shell's background job the children, too, would never hear of Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    lost_any = False
    for name in options.parts or PARTS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"tinyllm-{name}-") as folder:
            figures, lost = PARTS[name](options.count or COUNTS.get(name, 0), options.seed, Path(folder))
        verdict = f"{len(lost)} LOST" if lost else "nothing lost"
        print(f"{name:9} {figures}: {verdict}, {time.monotonic() - started:.0f} s", flush=True)
        for what in lost:
            print(f"          {what}", flush=True)
        lost_any |= bool(lost)
    return int(lost_any)


def kills(count: int, seed: int, folder: Path) -> Part:
    from torture.kills import every_change, kills, while_preparing

    runs = list(kills(count, seed, folder / "random"))
    short = [*every_change(folder / "each"), *while_preparing(folder / "data")]
    places = Counter(place for run in [*runs, *short] for place in run.falls)
    where = ", ".join(f"{n} {place}" for place, n in places.most_common())
    scripts, each = (sum(numbers) for numbers in ((run.scripts for run in runs), (len(run.falls) for run in short)))
    figures = f"{places.total()} kills: {where}; {scripts} of the console script, "
    figures += f"{each} before each change to the folders of a short run"
    return figures, [f"{run.run}, {', '.join(run.kinds)}: {what}" for run in [*runs, *short] for what in run.lost]


def disk(_: int, seed: int, folder: Path) -> Part:
    from torture.disk import disk, why_not

    return (f"skipped, {why_not()}", []) if why_not() else summed(disk(folder, seed))


def signals(_: int, __: int, folder: Path) -> Part:
    from torture.signals import signals

    return summed(signals(folder))


def damage(count: int, seed: int, folder: Path) -> Part:
    from torture.damage import damage

    return summed(damage(count, seed, folder))


def hostile(_: int, __: int, folder: Path) -> Part:
    from torture.hostile import hostile

    return summed(hostile(folder))


def fuzz(count: int, seed: int, folder: Path) -> Part:
    from torture.fuzz import beyond, fuzz

    outcomes = [*fuzz(count, seed, folder / "home"), *beyond(folder / "beyond")]
    refused = sum(outcome.refused for outcome in outcomes)
    figures = f"{len(outcomes):,} configs, command lines and files, {refused:,} of them refused"
    return figures, [outcome.report() for outcome in outcomes if outcome.fault]


def numbers(_: int, __: int, folder: Path) -> Part:
    from torture.numbers import numbers

    return summed(numbers(folder))


def cost(_: int, __: int, folder: Path) -> Part:
    from torture.cost import cost

    findings = list(cost(folder))
    return "; ".join(f.what for f in findings), [f"{f.name}: {f.what}" for f in findings if not f.ok]


def summed(findings: Iterable) -> Part:
    """How many experiments, and those in which something was lost."""
    found = list(findings)
    return f"{len(found):,} experiments", [f"{f.name}: {f.what}" for f in found if not f.ok]


PARTS = {f.__name__: f for f in (kills, disk, signals, damage, hostile, fuzz, numbers, cost)}

if __name__ == "__main__":
    sys.exit(main())
