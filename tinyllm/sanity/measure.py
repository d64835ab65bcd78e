"""What a run needs, measured in a process of its own: memory, seconds a step, an evaluation, a save.

    cost = measure(run.config)
    cost.peak(cost.micro_batch_size), cost.room_bytes      # bytes at the run's own shape, and what there is
    cost.step_seconds, cost.eval_seconds, cost.save_seconds

The child does what `train` does, into a temporary folder: it opens the run, checks it, and drives the real training
loop for a few steps. It is a process of its own so that nothing counts but the run, and so that the system, short of
memory, ends it and not the caller. It reads one line of JSON from its standard input, which stays open: when that ends,
so has whoever asked, and the child tidies up and leaves. It answers with lines of JSON, each a few fields of `Cost`.
"""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyllm import errors
from tinyllm import runtime as rt
from tinyllm.config import RunConfig, check, to_dict
from tinyllm.engine import Run, TrainState, eval_rows, evaluate, new_state, open_run, train, train_step
from tinyllm.events import Note, Saved, StepDone
from tinyllm.sanity.instruments import variant
from tinyllm.sanity.result import raised

# The command line is imported for what it brings along: it is part of a run's memory and of its start.
CHILD = "import tinyllm.cli; from tinyllm.sanity.measure import main; main()"
TIMEOUT = 600.0  # seconds after which a child that hangs is ended
CHECKS_SECONDS = 5.0  # for the quick checks; of a large model not all of them
PATIENCE = 10.0  # seconds that a micro-batch may take; for larger ones we measure a smaller and extrapolate
WARM_UP, LEAST_STEPS = 2, 3  # steps before and within the measurement...
STEP_SECONDS = 3.0  # ...of which there are as many as fit into this
WHOLE_STEP = 3.0  # seconds up to which a step of several micro-batches is measured whole
ENDLESS = 1 << 30  # steps

Report = Callable[..., None]


@dataclass(frozen=True)
class Cost:
    """What the child saw, as far as it came; None where it did not."""

    micro_batch_size: int  # of the run
    fixed_bytes: int | None = None  # memory without activations: what is there before the model, and 16 bytes a weight
    room_bytes: int | None = None  # all that the run could have
    rungs: tuple[tuple[int, int], ...] = ()  # (sequences a micro-batch, peak bytes) of single steps, ascending
    whole: tuple[int, int] | None = None  # the same of the training loop, with evaluation, save and quick checks
    trying: int = 0  # sequences in the micro-batch that was measured last, or that ended it
    ended: str = ""  # how the child ended, if not as it should
    error: errors.TinyLLMError | None = None  # what stopped it, if it could say
    startup_seconds: float = 0.0  # from the start of the process to a model and opened data
    checks_seconds: float = 0.0  # of the quick checks before every training
    compile_seconds: float = 0.0
    step_seconds: float | None = None
    eval_seconds: float | None = None  # of one evaluation, both splits
    save_seconds: float | None = None
    matmul_rate: float | None = None  # FLOP/s of a large matrix product

    @property
    def fits(self) -> bool:
        """Whether the run's own micro-batches fit into the room, as far as that is known."""
        peak = self.peak(self.micro_batch_size)
        return peak is None or self.room_bytes is None or peak <= self.room_bytes

    def peak(self, sequences: int) -> int | None:
        """Peak memory with micro-batches of so many sequences, bytes: measured, or on the line through what was."""
        if self.fixed_bytes is None:
            return None
        line = [(0, self.fixed_bytes), *self.rungs]
        if self.whole and self.whole[0] > line[-1][0]:
            line.append(self.whole)
        if len(line) < 2:
            return self.fixed_bytes
        (a, low), (b, high) = line[-2:]
        size, peak = self.whole or line[-1]
        return max(round(peak + (high - low) / (b - a) * (sequences - size)), 0)


def measure(config: RunConfig, room_bytes: int | None = None) -> Cost:
    """Have a child measure the run; what goes wrong there is in the answer. `room_bytes` instead of what is free."""
    facts: dict[str, Any] = {"micro_batch_size": config.micro_batch_size}
    # Ours, so that it goes however the child ends.
    with tempfile.TemporaryDirectory(prefix="tinyllm-", ignore_cleanup_errors=True) as folder:
        for fact in answers({"config": to_dict(config), "folder": folder, "room_bytes": room_bytes}, Path(folder)):
            facts |= fact
    if "error" in facts:
        kind, what, where, fix = facts["error"]
        facts["error"] = getattr(errors, kind)(what, where=where, fix=fix)
    return Cost(**facts)


def answers(request: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """Start the child, pass on what it reports; at the end how it ended, if not as it should."""
    # The child imports what we do, whatever lies in the current folder (-P); what it compiles goes with its folder.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    surroundings = os.environ | {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    command, pipe = [sys.executable, "-P", "-c", CHILD], subprocess.PIPE
    with open(folder / "stderr", "w+", encoding="utf-8", errors="replace") as stderr:
        request["started"] = time.time()
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, env=surroundings, text=True)
        assert child.stdin
        assert child.stdout
        hung = threading.Timer(TIMEOUT, child.kill)
        hung.start()
        try:
            with suppress(BrokenPipeError):  # how it ended says more
                child.stdin.write(json.dumps(request) + "\n")
                child.stdin.flush()
            yield from map(json.loads, child.stdout)
            child.wait()
        finally:
            hung.cancel()
            child.kill()
            child.wait()
            child.stdout.close()
            with suppress(BrokenPipeError):
                child.stdin.close()
        if child.returncode:
            stderr.seek(0)
            yield {"ended": ending(child.returncode, stderr.read(), time.time() - request["started"])}


def ending(code: int, stderr: str, seconds: float) -> str:
    """How a process ended, for a person."""
    if seconds >= TIMEOUT:
        return f"not done after {seconds:.0f} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return (stderr.strip().splitlines() or [f"ended with exit code {code}"])[-1][:200]


# ---- The child ----


def main() -> None:
    """Answer one request (see the module)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asked; they end us
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a model prints is no answer

    def report(**facts: Any) -> None:
        answer.write(json.dumps(facts) + "\n")
        answer.flush()

    request = json.loads(sys.stdin.readline())
    threading.Thread(target=leave_with_parent, args=(request["folder"],), daemon=True).start()
    rt.first_to_go()
    try:
        observe(request, report)
    except errors.TinyLLMError as error:
        report(error=(type(error).__name__, error.what, error.where, error.fix))
    except Exception as error:
        if errors.is_out_of_memory(error):
            report(ended="out of memory")
            return
        report(error=("RunError", *raised(error), ""))


def leave_with_parent(folder: str) -> None:
    """End this process, and leave nothing, when nobody holds the other end of its standard input any more."""
    while os.read(0, 1024):  # not sys.stdin, whose lock a normal end would wait for
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def observe(request: dict[str, Any], report: Report) -> None:
    """Do what `train` does, a little of each, and report it."""
    run = open_run(check(request["config"]))
    device = run.runtime.device
    held, free = rt.peak_memory(device), rt.free_memory(device)
    state = new_state(run)
    report(startup_seconds=time.time() - request["started"])
    # Weights, gradients and AdamW's two averages, float32. Muon has one average: a lower bound is what we need.
    weights = sum(p.numel() for p in state.model.parameters())
    fixed = None if held is None else held + 4 * weights * (3 if run.config.optim.name == "muon" else 4)
    room = request["room_bytes"] or (None if held is None or free is None else held + free)
    report(room_bytes=room, fixed_bytes=fixed)

    cost = Cost(run.config.micro_batch_size, fixed, room)
    if not cost.fits:
        return
    # First, while memory is as small as it gets.
    size, seconds, rungs = climb(run, state, cost, report)
    if not replace(cost, rungs=tuple(rungs)).fits:
        return
    report(checks_seconds=quick_checks(run), trying=size)
    loop_over(run, state, size, seconds, Path(request["folder"]), report)
    report(eval_seconds=evaluation_seconds(run, state))  # with an optimizer's state it needs more memory than before
    if (peak := rt.peak_memory(device)) is not None:
        report(whole=(size, peak))
    report(matmul_rate=rt.matmul_rate(run.runtime))


def quick_checks(run: Run) -> float:
    """Perform the checks that every training begins with, or as many as a few seconds allow; seconds of all, about."""
    from tinyllm.sanity import CHECKS, sanity  # which import this module

    quick = [c for c in CHECKS if c.quick and c.name not in ("memory", "time")]  # those two would start us again
    start, seconds = time.perf_counter(), 0.0
    for done, _ in enumerate(sanity(run, quick), 1):
        seconds = time.perf_counter() - start
        if seconds > CHECKS_SECONDS:
            return seconds * len(quick) / done
    return seconds


def climb(run: Run, state: TrainState, cost: Cost, report: Report) -> tuple[int, float, list[tuple[int, int]]]:
    """The largest micro-batch, up to the run's own, that is sure to fit and quick; its seconds, about; and the rungs.

    From one sequence up by doubling, or at once to the goal where that needs less than half of the room. Whatever
    memory holds above `fixed` is taken to grow with the sequences: in truth part of it does not.
    """
    goal, size, fixed, room = cost.micro_batch_size, 1, cost.fixed_bytes or 0, cost.room_bytes or math.inf
    rungs: list[tuple[int, int]] = []
    while True:
        report(trying=size)
        few = variant(run, {"train": {"batch_size": size, "micro_batch_size": size}})
        for _ in range(2):  # the first is slow, and begins without an optimizer state
            start = time.perf_counter()
            state.step = 0
            train_step(few, state)
            seconds = time.perf_counter() - start
        peak = rt.peak_memory(run.runtime.device)
        rt.new_peak(run.runtime.device)
        rungs += [] if peak is None else [(size, peak)]
        report(rungs=rungs)
        after = next_size(goal, size, seconds, max((peak or 0) - fixed, 0), fixed, room)
        if after in (size, goal):
            return after, seconds * after / size, rungs
        size = after


def next_size(goal: int, size: int, seconds: float, grows: int, fixed: int, room: float) -> int:
    """The micro-batch to try after `size`, which took so many seconds and bytes; `size` where the next is too much."""

    def fine(sequences: int, share: float) -> bool:
        times = sequences / size
        return seconds * times <= PATIENCE and fixed + grows * times <= share * room

    twice = min(2 * size, goal)
    return goal if fine(goal, 0.5) else twice if fine(twice, 0.95) else size


def loop_over(run: Run, state: TrainState, size: int, seconds: float, folder: Path, report: Report) -> None:
    """Drive the training loop with micro-batches of `size`, which take about so many seconds; report what it costs.

    Of a long step two micro-batches are done: the time of the first is that of each of the others.
    """
    whole = size == run.config.micro_batch_size and seconds * run.config.accumulation_steps <= WHOLE_STEP
    parts = run.config.accumulation_steps if whole or run.config.train.batch_size == size else 2
    changes = {"out_dir": str(folder / "out"), "batch_size": parts * size, "micro_batch_size": size, "log_interval": 1}
    changes |= {"max_steps": ENDLESS, "eval_interval": ENDLESS, "save_interval": ENDLESS}
    few = variant(run, {"train": changes | {"eval_windows": count_windows(run, "val")[0]}})
    may_save = shutil.disk_usage(folder).free > 2 * 12 * sum(p.numel() for p in state.model.parameters())
    state.step = 0
    steps: list[float] = []  # seconds
    firsts: list[float] = []  # seconds of their first micro-batches
    stamps: list[float] = []  # when a micro-batch began
    mark = time.perf_counter()

    def enough() -> bool:
        run.runtime.synchronize()
        stamps.append(time.perf_counter())
        return len(steps) >= WARM_UP + LEAST_STEPS and sum(steps[WARM_UP:]) >= STEP_SECONDS

    with closing(train(few, state, enough)) as events:
        for event in events:
            now = time.perf_counter()
            match event:
                case Note():
                    report(compile_seconds=now - mark)
                case StepDone():
                    steps.append(now - mark)
                    firsts.append(stamps[1] - stamps[0] if parts > 1 else now - mark)
                    if not may_save and enough():
                        break
                case Saved():
                    report(save_seconds=now - mark)
            stamps.clear()
            mark = time.perf_counter()
    step, first = statistics.median(steps[WARM_UP:]), statistics.median(firsts[WARM_UP:])
    rest = step - parts * first
    report(step_seconds=first * run.config.train.batch_size / size + rest)


def count_windows(run: Run, split: str) -> tuple[int, int]:
    """Windows of a split to evaluate here, which are two forward passes and a half; and in a whole evaluation."""
    source = run.source
    count = min(run.config.train.eval_windows or source.count_windows("val"), source.count_windows(split))
    return min(count, 5 * eval_rows(run) // 2), count


def evaluation_seconds(run: Run, state: TrainState, at_least: float = 1.0) -> float:
    """Seconds of an evaluation of both splits, from a few windows of each."""
    total = 0.0
    for split in ("train", "val"):
        some, count = count_windows(run, split)
        times: list[float] = []
        while not times or sum(times) < at_least / 2:
            start = time.perf_counter()
            evaluate(run, state.model, split, some)
            times.append(time.perf_counter() - start)
        total += statistics.median(times) / some * count
    return total
