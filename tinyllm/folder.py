"""The run's folder: who may write there, what is in it, and what may change in a run that goes on.

refuse("out", overwrite=False)                     # a folder that holds a run, or cannot be written to
with claimed("out"):                               # by one process at a time
    clear("out")                                   # of the run it held
    write_config(config)                           # out/run.toml, every value spelled out
config, found = reopen("out", overrides)           # to go on with it
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tinyllm.checkpoint import BEST, LATEST, Found, checkpoints, find, run_config
from tinyllm.config import RunConfig, apply_overrides, check, to_toml
from tinyllm.errors import ConfigError, RunError, typed
from tinyllm.files import locked, write_text
from tinyllm.metrics import METRICS

CONFIG = "run.toml"


def refuse(out_dir: str, overwrite: bool) -> None:
    """Raise RunError when a new run cannot have this folder: it holds one already, or cannot be written to.

    Leaves everything as it is: much can go wrong before the first step, and must not cost the user the old run.
    """
    folder = Path(out_dir)
    present = run_files(folder)
    if present and not overwrite:
        goes_on = f"`tinyllm resume {typed(folder)}` goes on, " if folder / LATEST in present else ""
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
    older = [path for path in checkpoints(folder) if path.name not in (LATEST, BEST)]
    return [*(folder / name for name in (LATEST, BEST, METRICS) if (folder / name).exists()), *sorted(older)]


def clear(out_dir: str) -> None:
    """Delete the run that the folder holds, if any."""
    for path in run_files(Path(out_dir)):
        path.unlink()


@contextmanager
def claimed(out_dir: str) -> Iterator[None]:
    """Keep other trainings out of the folder, which is made when it is missing. Raises RunError when one is there.

    What a process that was killed had begun to write is deleted. Where the system or the file system cannot lock a
    folder, nothing is checked.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder) as got:
        if got is False:
            fix = "wait for it or stop it, or choose another folder: --set train.out_dir=..."
            raise RunError("another tinyllm is training in this folder", where=f"{folder}/", fix=fix)
        for name in (CONFIG, METRICS, LATEST, BEST):
            for path in folder.glob(f"{Path(name).stem}*.tmp"):
                path.unlink()
        yield


def keep_config(path: Path, config: RunConfig) -> None:
    """Raise ConfigError if the run's own run.toml would overwrite the user's, comments and all."""
    resolved = Path(config.train.out_dir) / CONFIG
    if resolved.exists() and resolved.samefile(path) and path.read_text(encoding="utf-8-sig") != to_toml(config):
        fix = "another train.out_dir, or another name than run.toml"
        raise ConfigError("the run would overwrite this file with its resolved config", where=str(path), fix=fix)


def write_config(config: RunConfig) -> Path:
    """Keep the resolved config beside the checkpoints."""
    path = Path(config.train.out_dir) / CONFIG
    replace_text(path, to_toml(config))
    return path


# What may differ from the checkpoint's config: none of these changes what a step computes, but for device and dtype,
# which change the rounding; model.class, by which the user says which code is meant; skip_spikes, which tells what to
# do about a step that went wrong; and how long the run is, as long as its schedule stays (see `reopen`).
MAY_CHANGE = (
    "data.dir",
    "train.eval_interval",
    "train.save_interval",
    "train.save_minutes",
    "train.keep",
    "train.log_interval",
    "train.skip_spikes",
    "train.max_steps",
    "schedule.decay_steps",
    "runtime.",
    "model.class",
)


def reopen(
    path: Path, overrides: Sequence[str], wanted: str = LATEST, may_change: tuple[str, ...] = MAY_CHANGE
) -> tuple[RunConfig, Found]:
    """A checkpoint and its run's config, which from now on lives in the checkpoint's folder.

    `wanted`: which one of a folder (see `checkpoint.find`). Raises CheckpointError, and ConfigError for an override of
    something that makes the run what it is.
    """
    for key in (f"{section}.{name}" for section, table in apply_overrides({}, overrides).items() for name in table):
        if not key.startswith(may_change):
            may = ", ".join(name + "*" if name.endswith(".") else name for name in may_change)
            fix = f"may change: {may}; for anything else start a new run with `tinyllm train`"
            raise ConfigError("cannot change in a run that goes on", where=f"--set {key}", fix=fix)
    found = find(path, wanted)
    config = run_config(found.checkpoint, overrides, where=str(found.path))
    if overrides:
        refuse_other_schedule(check(found.checkpoint.config), config, found.checkpoint.step)
    here = config.train.model_copy(update={"out_dir": str(found.path.parent)})
    return config.model_copy(update={"train": here}), found


def refuse_other_schedule(old: RunConfig, new: RunConfig, step: int) -> None:
    """Raise ConfigError when the steps that a run has done would have had another learning rate."""
    if new.schedule.kind != "constant" and new.decay_steps != old.decay_steps:
        what = f"the learning rate would decay over {new.decay_steps:,} steps, and has so far over {old.decay_steps:,}"
        fix = f"add --set schedule.decay_steps={old.decay_steps}; steps after it are made at optim.min_lr"
        raise ConfigError(what, where="train.max_steps", fix=fix)
    if new.train.max_steps < step:
        what = f"{new.train.max_steps:,} is below the {step:,} steps that the run has done"
        raise ConfigError(what, where="train.max_steps", fix="a number above it, or an earlier checkpoint")


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one. Raises RunError."""
    try:
        write_text(path, text)
    except OSError as error:
        raise RunError(f"cannot be written: {error.strerror}", where=str(path)) from None
