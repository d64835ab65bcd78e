"""Runs on a disk that is full, protected, limited or broken for a while, against the same runs undisturbed.

    for finding in disk(Path("/tmp/disk"), seed=0):
        finding.name, finding.ok, finding.what          # "full at save 3, not even checked", True, ""

The disk is a small tmpfs in a mount namespace of its own, which goes when its process goes: this module starts itself
there, as `unshare -rm python -m torture.disk FOLDER SEED WHOLE`, and reads what that prints.
"""

import json
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torture.finding import Finding, refused
from torture.inside import Filler
from torture.kills import SHORT, SHORT_CHANGES, last_step, newest
from torture.runs import QUIET, ROOT, Forks, Home, differences, environment, halves, record, unlike

DISK = 4 << 20  # bytes
LITTLE = 600_000  # bytes that are less than tinyllm wants to see free, and more than it needs
CHECKPOINT = 70_000  # bytes that are less than it needs
SAVES = 6  # of a SHORT run
LONGER = SHORT | {"train.max_steps": 80, "train.save_interval": 7, "train.eval_interval": 20}
LONG = SHORT | {"train.max_steps": 700, "train.save_interval": 7, "train.eval_interval": 20}
FROM, TO = 15, 70  # steps of a LONGER run: more metrics than the page of memory that their file has already


def why_not() -> str:
    """Why there can be no disk of our own; '' if there can."""
    if not shutil.which("unshare"):
        return "no unshare"
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "disk", "/mnt"]
    found = subprocess.run(command, capture_output=True, text=True)
    return f"no mount namespace: {found.stderr.strip()}" if found.returncode else ""


def disk(folder: Path, seed: int = 0, whole: bool = True) -> Iterator[Finding]:
    """All experiments, or a few of each kind."""
    command = [
        "unshare",
        "-rm",
        sys.executable,
        "-m",
        "torture.disk",
        str(folder.absolute()),
        str(seed),
        str(int(whole)),
    ]
    process = subprocess.Popen(command, cwd=ROOT / "tests", env=environment(), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        yield Finding(**json.loads(line))
    assert process.wait() == 0


def main(folder: str, seed: str, whole: str) -> None:
    """In the namespace: do it, print it."""
    for finding in experiments(Path(folder), random.Random(seed), whole == "1"):
        print(json.dumps(asdict(finding)), flush=True)


def experiments(folder: Path, rng: random.Random, whole: bool) -> Iterator[Finding]:
    with Forks() as forks:
        lab, longer = Lab(folder, "short", SHORT, forks), Lab(folder, "longer", LONGER, forks)
        for number in range(1, SAVES + 1) if whole else ():
            yield lab.full_at_save(number, left=LITTLE, checked=False)
            yield lab.full_at_save(number, left=rng.randrange(CHECKPOINT), checked=True)
            yield lab.full_at_save(number, left=0, checked=True)
            yield lab.limited_at_save(number, size=rng.randrange(1, CHECKPOINT))
        if not whole:
            yield lab.full_at_save(2, left=LITTLE, checked=False)
            yield lab.full_at_save(SAVES, left=rng.randrange(CHECKPOINT), checked=True)
            yield lab.limited_at_save(3, size=rng.randrange(1, CHECKPOINT))
        yield longer.for_a_while("full", "fill_between", "no room for a checkpoint", "metrics.jsonl: cannot be written")
        yield longer.to_the_end("full", "fill_between", "no room for a checkpoint")
        if whole:
            yield longer.for_a_while("protected", "protect_between", "Permission denied")
            yield longer.to_the_end("protected", "protect_between", "Permission denied")
        yield lab.read_only()
        most = SHORT_CHANGES[2]
        for number in range(1, most) if whole else (8, 48, 65):
            yield lab.change_that_fails(number)
        if whole:
            long = Lab(folder, "long", LONG, forks)
            yield long.full_now_and_then(rng)
            yield long.metrics_limited()


class Lab:
    """A disk, a run that is to be trained on it, and the same run undisturbed."""

    def __init__(self, folder: Path, name: str, run: dict[str, Any], forks: Forks) -> None:
        self.folder, self.name, self.run, self.forks = folder, name, run, forks
        self.undisturbed = Home(folder / f"{name}, undisturbed", run, folder / "data")
        assert self.train(self.undisturbed) == 0, self.undisturbed.said()

    @contextmanager
    def disk(self) -> Iterator[Home]:
        home = Home(self.folder / self.name, self.run, self.folder / "data")
        with mounted(home.out):
            yield home
        home.delete()

    def full_at_save(self, number: int, left: int, checked: bool) -> Finding:
        name = f"full at save {number}, but for {left:,} bytes" + (", after the check" if checked else "")
        return self.one_save_fails(name, number, "fill_disk", left=left, checked=checked)

    def limited_at_save(self, number: int, size: int) -> Finding:
        return self.one_save_fails(f"no file above {size:,} bytes at save {number}", number, "limit_files", size=size)

    def one_save_fails(self, name: str, number: int, before: str, **given: Any) -> Finding:
        """The run goes on, warns, and loses nothing else."""
        with self.disk() as home:
            note = home.folder / "note.txt"
            code = self.train(home, before, number=number, folder=str(home.out), note=str(note), **given)
            saves = [line.split() for line in note.read_text().splitlines()]
            failed = [i for i, (_, _, event) in enumerate(saves, 1) if event != "Saved"]
            problems = self.finished(home, code, older=False)
            if failed != [number]:
                problems.append(f"not save {number} alone failed: {failed}")
            if home.said().count("the run goes on") != 1:
                problems.append("no warning, or several")
            return finding(name, home, problems)

    def for_a_while(self, what: str, before: str, *warned: str) -> Finding:
        """Saves fail, one after another; when they can be made again it is as if nothing had been."""
        with self.disk() as home:
            code = self.train(home, before, first=FROM, last=TO, folder=str(home.out))
            problems = self.finished(home, code, older=False)
            problems += [f"no warning: {words}" for words in (*warned, "the run goes on") if words not in home.said()]
            return finding(f"{what} for a while", home, problems)

    def to_the_end(self, what: str, before: str, told: str) -> Finding:
        """The run ends with an error; what was saved is whole, and goes on when there is room again."""
        with self.disk() as home:
            code = self.train(home, before, first=FROM, last=-1, folder=str(home.out))
            problems = [refused(code, home.said(), told, "resume")]
            problems += [f"{file} is not whole" for file in halves(home)]
            if newest(home) not in (7, 14):  # that of 14 may still have been under way
                problems.append(f"step {newest(home)} is the newest on the disk")
            Filler(str(home.out)).remove()
            home.out.chmod(0o700)
            problems += self.finished(home, self.forks.start(home, "resume", "out").wait())
            return finding(f"{what} to the end", home, problems)

    def read_only(self) -> Finding:
        """A run on a disk that has become read-only cannot go on, says so, and can when it is writable again."""
        with self.disk() as home:
            self.train(home, "die_before_change", number=30, folder=str(home.out), note=str(home.folder / "note.txt"))
            remount(home.out, "ro")
            problems = []
            for args in (("resume", "out"), ("train", "run.toml", *QUIET)):
                home.log.unlink()
                problems.append(refused(self.forks.start(home, *args).wait(), home.said(), "Read-only file system"))
            remount(home.out, "rw")
            problems += self.finished(home, self.forks.start(home, "resume", "out").wait())
            return finding("read-only", home, problems)

    def change_that_fails(self, number: int) -> Finding:
        """The n-th change to the folder fails: it is tried again, or the run ends with an error and can be resumed."""
        with self.disk() as home:
            note = home.folder / "note.txt"
            code = self.train(home, "fail_change", number=number, folder=str(home.out), note=str(note))
            what = note.read_text() if note.exists() else "none"
            problems = []
            if code == 2:
                problems.append(refused(code, home.said()))
                args = ("resume", "out") if newest(home) else ("train", "run.toml", *QUIET)
                code = self.forks.start(home, *args).wait()
            problems += self.finished(home, code, older=False)
            return finding(f"change {number} fails: {what}", home, problems)

    def full_now_and_then(self, rng: random.Random) -> Finding:
        """Somebody else fills the disk and empties it, at any moment, but for the end of the run."""
        stop, filled = threading.Event(), []

        def neighbour(home: Home) -> None:
            filler = Filler(str(home.out))
            while not stop.wait(rng.uniform(0, 0.05)) and last_step(home) < 600:
                if not newest(home):  # a run that cannot begin is refused, as it should be
                    continue
                filler.fill(rng.choice([0, rng.randrange(CHECKPOINT), LITTLE]))
                filled.append(1)
                stop.wait(rng.uniform(0, 0.05))
                filler.remove()

        with self.disk() as home:
            thread = threading.Thread(target=neighbour, args=[home])
            thread.start()
            try:
                code = self.train(home)
            finally:
                stop.set()
                thread.join()
            problems = self.finished(home, code, older=False)
            failed = home.said().count("the run goes on")
            return finding(f"full now and then: {len(filled)} times, {failed} saves failed", home, problems)

    def metrics_limited(self) -> Finding:
        """Checkpoints can be saved, but the metrics have grown too long for some quota: the run says so, and ends."""
        with self.disk() as home:
            code = self.train(home, "limit_from", first=100, size=90_000)
            problems = [] if code == 0 else [f"exit code {code}"]
            for name in ("ckpt.pt", "best.pt"):
                problems += unlike(record(home.out / name), record(self.undisturbed.out / name))
            said = home.said()
            for words in ("the lines are kept until it can", "its last lines are lost"):
                if said.count(words) != 1:
                    problems.append(f"said {said.count(words)} times: {words}")
            return finding("no file above 90,000 bytes, but longer metrics", home, problems)

    def train(self, home: Home, before: str = "", **given: Any) -> int | None:
        hook = {"before": f"torture.inside:{before}"} if before else {}
        return self.forks.start(home, "train", "run.toml", *QUIET, **hook, **given).wait()

    def finished(self, home: Home, code: int | None, older: bool = True) -> list[str]:
        """What is wrong with a run that should have finished as the undisturbed one has."""
        problems = [] if code == 0 else [f"exit code {code}: {home.said()[-500:]}"]
        return problems or differences(home, self.undisturbed, older)


def finding(name: str, home: Home, problems: list[str]) -> Finding:
    what = "; ".join(filter(None, problems))
    return Finding(name, not what, what and f"{what}; it said: {home.said()[-1000:]}")


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """A small disk on this folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "disk", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
