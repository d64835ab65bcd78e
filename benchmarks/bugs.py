"""Plants every bug and runs every healthy combination: what `tinyllm sanity` finds, misses, and wrongly suspects.

    just bugs                         # all of it: a quarter of an hour on two cores
    python benchmarks/bugs.py mask    # only what has `mask` in its name
    python benchmarks/bugs.py --first # three minutes: for each bug no check beyond the one that should find it
    python benchmarks/bugs.py --zoo   # the healthy runs alone; --bugs: the bugs alone

Prints a row for each bug: the checks that fired, in their order; [the expected], (a warning). Exits with 1 if a bug is
not diagnosed rightly first and nothing is known that excuses it (MISS), or if a check fails on a healthy run.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this checkout, whatever is installed

PROCESSES = 2


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="all of which a name has")
    parser.add_argument("--first", action="store_true")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--zoo", action="store_true")
    kinds.add_argument("--bugs", action="store_true")
    asked = parser.parse_args(arguments)
    # Here, since the children look at this file, too, and must not have imported tinyllm.
    from planted import healthy
    from planted.bugs import BUGS
    from planted.harness import BASE, compile_loops, run, run_bug

    started = time.monotonic()
    chosen, zoo = (
        [item for item in items if all(word in item.name for word in asked.words)] * (not left_out)
        for items, left_out in ((BUGS, asked.zoo), (healthy.RUNS, asked.bugs))
    )
    with tempfile.TemporaryDirectory(prefix="tinyllm-bugs-") as name, ThreadPoolExecutor(PROCESSES) as pool:
        folder = Path(name)
        compile_loops(folder / "loops")
        base = run((), BASE, (), folder / "base")
        if base.failed():
            print("the healthy base fails:", *(base.said(check) for check in base.failed()), sep="\n  ")
            return 1
        print(f"base: {len(base.results)} checks in {base.seconds:.0f} s\n", flush=True)

        def plant_one(numbered):
            number, bug = numbered
            return run_bug(bug, folder / f"bug-{number}", folder / "base" / "data", whole=not asked.first)

        missed = show_bugs(chosen, pool.map(plant_one, enumerate(chosen)))
        alarms = show_zoo(zoo, pool.map(lambda item: healthy.run_healthy(item, folder / "zoo"), zoo))
    found, excused = len(chosen) - len(missed), sum(bool(bug.missed) for bug in missed)
    print(f"\n{found} of {len(chosen)} bugs have the right diagnosis first ({found / max(len(chosen), 1):.1%})")
    print(f"{len(alarms)} false alarms in {len(zoo)} healthy runs")
    print(f"{time.monotonic() - started:.0f} s")
    return int(len(missed) > excused or bool(alarms))


def show_bugs(bugs, outcomes):
    """Print the matrix as it comes: each bug, the checks that fired, [in brackets] what should fire first."""
    from planted.harness import first_finding

    missed = []
    for bug, outcome in zip(bugs, outcomes, strict=True):
        first = first_finding(bug, outcome)
        right = first in bug.caught_by
        marks = [f"[{n}]" if n in bug.caught_by else n if n in outcome.failed() else f"({n})" for n in outcome.fired()]
        mark = "ok  " if right else "miss" if bug.missed else "MISS"
        print(f"{mark} {outcome.seconds:4.1f} s  {bug.name:45} {', '.join(marks) or '-'}")
        sys.stdout.flush()
        if not right:
            missed.append(bug)
            if bug.missed:
                print(f"         known: {bug.missed}")
                continue
            print(f"         expected {' or '.join(bug.caught_by)}, first {first}: {outcome.said(first)}")
            for name in bug.caught_by:
                print(f"         {name}: {outcome.said(name)[:300]}")
    return missed


def show_zoo(zoo, outcomes):
    alarms = []
    for item, outcome in zip(zoo, outcomes, strict=True):
        failed = outcome.failed()
        warned = [name for name in outcome.fired() if name not in failed]
        print(f"{'FAIL' if failed else 'ok  '} {outcome.seconds:4.1f} s  {item.name:60} {', '.join(warned)}")
        for name in failed:
            print(f"         {name}: {outcome.said(name)}")
        sys.stdout.flush()
        if failed:
            alarms.append(item)
    return alarms


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
