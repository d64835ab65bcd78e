"""The run's folder: who may write there, the resolved config, and the metrics.

    refuse("out", overwrite=False)                     # a folder that holds a run, or cannot be written to
    with claimed("out"):                               # by one process at a time
        clear("out")                                   # of the run it held
        write_config(config)                           # out/run.toml, every value spelled out
        for event in record(train(run, state), "out"): # out/metrics.jsonl, one JSON object a line
            ...

A line of metrics is `{"event": "step", "step": 10, "loss": ..., "grad_norm": ..., "lr": ..., "time": ...}` or
`{"event": "eval", "step": 250, "train_loss": ..., "val_loss": ..., ...}`. Two runs of one config differ in `time`
alone.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tinyllm.checkpoint import BEST, LATEST, Checkpoint, load, run_config
from tinyllm.config import RunConfig, to_toml
from tinyllm.errors import ConfigError, RunError, typed
from tinyllm.events import Evaluated, Event, StepDone
from tinyllm.files import locked, write_text

CONFIG, METRICS = "run.toml", "metrics.jsonl"


def refuse(out_dir: str, overwrite: bool) -> None:
    """Raise RunError when a new run cannot have this folder: it holds one already, or cannot be written to.

    Leaves everything as it is: much can go wrong before the first step, and must not cost the user the old run.
    """
    folder = Path(out_dir)
    present = run_files(folder)
    if present and not overwrite:
        goes_on = f"`tinyllm resume {typed(folder / LATEST)}` goes on, " if folder / LATEST in present else ""
        fix = f"{goes_on}--overwrite deletes it and starts anew, --set train.out_dir=... keeps both"
        raise RunError(f"already holds a run ({', '.join(p.name for p in present)})", where=f"{folder}/", fix=fix)
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fix = "choose another folder: --set train.out_dir=..."
        raise RunError(f"cannot be written to: {error.strerror}", where=f"{folder}/", fix=fix) from None
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def run_files(folder: Path) -> list[Path]:
    """What of a run is in the folder."""
    return [folder / name for name in (LATEST, BEST, METRICS) if (folder / name).exists()]


def clear(out_dir: str) -> None:
    """Delete the run that the folder holds, if any."""
    for path in run_files(Path(out_dir)):
        path.unlink()


@contextmanager
def claimed(out_dir: str) -> Iterator[None]:
    """Keep other trainings out of the folder, which is made when it is missing. Raises RunError when one is there.

    Where the system or the file system cannot lock a folder, nothing is checked.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as got:
        if got is False:
            fix = "wait for it or stop it, or choose another folder: --set train.out_dir=..."
            raise RunError("another tinyllm is training in this folder", where=f"{folder}/", fix=fix)
        yield


def write_config(config: RunConfig) -> Path:
    """Keep the resolved config beside the checkpoints."""
    path = Path(config.train.out_dir) / CONFIG
    replace_text(path, to_toml(config))
    return path


# What may differ from the checkpoint's config: none of these changes what a step computes, but for device and dtype,
# which change the rounding, and model.class, by which the user says which code is meant.
MAY_CHANGE = ("data.dir", "train.eval_interval", "train.save_interval", "train.log_interval", "runtime.", "model.class")


def reopen(
    path: Path, overrides: Sequence[str], may_change: tuple[str, ...] = MAY_CHANGE
) -> tuple[RunConfig, Checkpoint]:
    """A checkpoint and its run's config, which from now on lives in the checkpoint's folder.

    Raises CheckpointError, and ConfigError for an override of something that makes the run what it is.
    """
    path = path / LATEST if path.is_dir() else path
    for override in overrides:
        key = override.partition("=")[0].strip()
        if not key.startswith(may_change):
            may = ", ".join(name + "*" if name.endswith(".") else name for name in may_change)
            fix = f"may change: {may}; for anything else start a new run with `tinyllm train`"
            raise ConfigError("cannot change in a run that goes on", where=f"--set {key}", fix=fix)
    checkpoint = load(path)
    config = run_config(checkpoint, overrides, where=str(path))
    here = config.train.model_copy(update={"out_dir": str(path.parent)})
    return config.model_copy(update={"train": here}), checkpoint


def record(events: Iterable[Event], out_dir: str) -> Iterator[Event]:
    """Pass the events on, appending steps and evaluations to the metrics."""
    with open(Path(out_dir) / METRICS, "a", encoding="utf-8") as file:
        for event in events:
            if row := as_row(event):
                file.write(json.dumps(row | {"time": round(time.time(), 3)}) + "\n")
                file.flush()
            yield event


def as_row(event: Event) -> dict[str, Any] | None:
    """The metrics of an event; None for one that has none."""
    match event:
        case StepDone():
            values = {"loss": event.loss, "grad_norm": event.grad_norm, "lr": event.lr}
            return {"event": "step", "step": event.step} | values
        case Evaluated():
            parts = {"train": event.train, "val": event.val}
            losses = {f"{name}_loss": part.loss for name, part in parts.items()}
            bits = {f"{name}_bits_per_byte": part.bits_per_byte for name, part in parts.items()}
            return {"event": "eval", "step": event.step} | losses | bits
    return None


def read_metrics(out_dir: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics; a last line torn by a crash is left out."""
    path, rows = Path(out_dir) / METRICS, []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


def trim_metrics(out_dir: str, step: int) -> None:
    """Forget what a run that goes on from `step` will report again: later steps, and evaluations from there on."""
    path, rows = Path(out_dir) / METRICS, read_metrics(out_dir)
    kept = [row for row in rows if row["step"] < step or (row["step"] == step and row["event"] == "step")]
    if path.exists():  # without rows too: the next one must not be appended to a torn line
        replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one. Raises RunError."""
    try:
        write_text(path, text)
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path)) from None
