"""The metrics of a run: one JSON object a line, each step and evaluation once, however often the run was killed.

    for event in record(train(run, state), "out"):     # appends to out/metrics.jsonl as it goes
        ...
    trim("out", step)                                  # before a run goes on from `step`
    read("out")                                        # [{"event": "step", "step": 10, "loss": ...}, ...]

A line is `{"event": "step", "step": 10, "loss": ..., "grad_norm": ..., "lr": ..., "time": ...}` or
`{"event": "eval", "step": 250, "train_loss": ..., "val_loss": ..., ...}`; a step whose loss is a spike says so, and
whether it was skipped. Two runs of one config differ in `time` alone.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tinyllm.errors import RunError
from tinyllm.events import Evaluated, Event, Note, Saving, StepDone
from tinyllm.files import write_text

METRICS = "metrics.jsonl"


class Lines:
    """A file that lines are appended to. What a full disk does not take is kept, and written when it does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115
        self.waiting = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def append(self, line: str) -> OSError | None:
        """Write the line, and those that wait. Returns what was in the way; the file then ends with a whole line."""
        self.waiting += line.encode() + b"\n" if line else b""
        written, failure = 0, None
        try:
            while written < len(self.waiting):
                written += self.file.write(self.waiting[written:])
        except OSError as error:
            failure = error
            torn = written - (self.waiting.rfind(b"\n", 0, written) + 1)
            with suppress(OSError):
                self.file.truncate(self.file.seek(0, os.SEEK_END) - torn)
                written -= torn
        self.waiting = self.waiting[written:]
        return failure

    def sync(self) -> OSError | None:
        """Have what was written survive a power cut."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            return error
        return None


def record(events: Iterable[Event], out_dir: str) -> Iterator[Event]:
    """Pass the events on, appending steps and evaluations to the metrics. A Note tells when they cannot be written."""
    failed = False
    with Lines(Path(out_dir) / METRICS) as lines:
        for event in events:
            row = as_row(event)
            if row or isinstance(event, Saving):
                error = lines.append(json.dumps(row | {"time": round(time.time(), 3)}) if row else "")
                if isinstance(event, Saving):  # before the checkpoint is on the disk: no step before it may be missing
                    error = error or lines.sync()
                if error and not failed:
                    yield Note(f"{lines.path}: cannot be written ({error.strerror}); the lines are kept until it can")
                failed = bool(error)
            yield event
        if error := lines.append(""):
            count = lines.waiting.count(b"\n")
            yield Note(
                f"{lines.path}: cannot be written ({error.strerror}); its last lines are lost, {count:,} of them"
            )


def as_row(event: Event) -> dict[str, Any] | None:
    """The metrics of an event; None for one that has none. What is not finite, which JSON does not know, is null."""
    match event:
        case StepDone():
            row = {"event": "step", "step": event.step, "loss": event.loss, "grad_norm": event.grad_norm}
            row |= {"lr": event.lr} | ({"spike": True, "skipped": event.skipped} if event.is_odd else {})
        case Evaluated():
            row = {"event": "eval", "step": event.step}
            parts = {"train": event.train, "val": event.val}
            row |= {f"{name}_loss": part.loss for name, part in parts.items()}
            row |= {f"{name}_bits_per_byte": part.bits_per_byte for name, part in parts.items()}
        case _:
            return None
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def read(out_dir: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics; a last line torn by a crash is left out."""
    path, rows = Path(out_dir) / METRICS, []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def trim(out_dir: str, step: int) -> None:
    """Forget what a run that goes on from `step` will report again: later steps, and evaluations from there on.

    Raises RunError when the file cannot be written.
    """
    path = Path(out_dir) / METRICS
    kept = [row for row in read(out_dir) if row["step"] < step or (row["step"] == step and row["event"] == "step")]
    try:
        if path.exists():  # without rows too: the next one must not be appended to a torn line
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path)) from None
