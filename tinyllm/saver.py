"""Saves checkpoints while the run goes on, and keeps the ones before.

    with Saver("out", keep=2) as saver:
        saver.save(checkpoint)            # copies it and returns; a thread writes it
        saver.keep_best(checkpoint)       # what was just saved is the best so far
        for event in saver.events():      # Saved, or SaveFailed: the run goes on, the last good file is still there
            ...
        for event in saver.finish():      # waits
            ...

`ckpt.pt` is the latest, `ckpt-250.pt` the one before it, of step 250; with `best.pt` and `best-250.pt` it is the same.
So there is always another file to go on from, if one is damaged. Files are linked to a second name rather than written
twice, and take their name when they are whole and on the disk.
"""

import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor

from tinyllm import archive
from tinyllm.checkpoint import BEST, LATEST, NAME, Checkpoint, bytes_held, save
from tinyllm.errors import CheckpointError, RunError
from tinyllm.events import Saved, SaveFailed
from tinyllm.files import sync_folder
from tinyllm.numbers import amount

SLACK = 1 << 20  # bytes of a checkpoint that are not tensors, at most, beside its tokenizer


class Saver:
    """The checkpoints of one run. A context manager, to be used by one thread."""

    def __init__(self, folder: str | Path, keep: int) -> None:
        self.folder, self.keep = Path(folder), keep
        latest = self.folder / LATEST
        # A damaged file is not worth keeping as the one before.
        self.step = archive.sealed_step(latest) if archive.is_whole(latest) else None  # of the last save that was one
        self.best_step: int | None = None  # of the last that was kept as the best
        self.failure = ""  # why the last save that failed did
        self.written: dict[str, int] = {}  # what the thread knows to be whole: name to step
        self.last_time = time.monotonic()
        self.pool = ThreadPoolExecutor(1, "tinyllm-saves")
        self.waiting: deque[Future[Saved | SaveFailed]] = deque()
        if self.step is not None:
            self.prune(latest, self.step)  # a kill may have come between the last save and this

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.pool.shutdown()  # what was begun is finished, even when the run has failed

    def save(self, checkpoint: Checkpoint) -> None:
        """Make it the latest. Waits for the save before it, so that there is never more than one copy in memory."""
        wait(self.waiting)
        self.waiting.append(self.pool.submit(self.write, LATEST, copied(checkpoint)))
        self.step, self.last_time = checkpoint.step, time.monotonic()

    def keep_best(self, checkpoint: Checkpoint) -> None:
        """Make it the best. It is the latest, unless that could not be saved: then another try is made."""
        wait(self.waiting)
        self.best_step = checkpoint.step
        if archive.sealed_step(self.folder / LATEST) == checkpoint.step:
            self.waiting.append(self.pool.submit(self.link_best, checkpoint.step))
        else:
            self.waiting.append(self.pool.submit(self.write, BEST, copied(checkpoint)))

    def events(self) -> Iterator[Saved | SaveFailed]:
        """What has been done since the last call. An error that is a mistake of ours is raised here."""
        while self.waiting and self.waiting[0].done():
            event = self.waiting.popleft().result()
            if isinstance(event, SaveFailed):
                self.failure = event.reason
                self.step = None if (event.path.name, event.step) == (LATEST, self.step) else self.step
                self.best_step = None if event.path.name == BEST else self.best_step
            yield event

    def finish(self) -> Iterator[Saved | SaveFailed]:
        """Wait for everything, and tell of it."""
        wait(self.waiting)
        yield from self.events()

    @property
    def minutes(self) -> float:
        """Since the last save, or the beginning."""
        return (time.monotonic() - self.last_time) / 60

    # ---- In the thread ----

    def write(self, name: str, checkpoint: Checkpoint) -> Saved | SaveFailed:
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            refuse_useless(checkpoint)
            check_room(self.folder, checkpoint)
            self.keep_old(path, checkpoint.step)
            save(path, checkpoint)
            self.written[name] = checkpoint.step
            self.prune(path, checkpoint.step)
        except CheckpointError as error:
            return SaveFailed(checkpoint.step, path, error.what)
        except OSError as error:
            return SaveFailed(checkpoint.step, path, f"cannot save the checkpoint: {error.strerror}")
        return Saved(checkpoint.step, path)

    def link_best(self, step: int) -> Saved | SaveFailed:
        path = self.folder / BEST
        try:
            self.keep_old(path, step)
            link(self.folder / LATEST, path, copy=self.keep == 1)  # never both in one file alone
            self.written[BEST] = step
            self.prune(path, step)
        except OSError as error:
            return SaveFailed(step, path, f"cannot save the checkpoint: {error.strerror}")
        return Saved(step, path)

    def keep_old(self, path: Path, step: int) -> None:
        """Give the file that is about to be replaced another name, if it is worth it."""
        old = archive.sealed_step(path)
        if self.keep == 1 or old is None or old >= step:
            return
        if self.written.get(path.name) == old or archive.is_whole(path):
            link(path, numbered(path, old))

    def prune(self, path: Path, step: int) -> None:
        """Delete the older files of this name but for the newest that are kept; what cannot be deleted stays."""
        kind = path.name.removesuffix(".pt")
        with suppress(OSError):
            found = [p for p in self.folder.iterdir() if NAME.fullmatch(p.name) and p.name.startswith(f"{kind}-")]
            steps = sorted((int(p.name.removeprefix(f"{kind}-").removesuffix(".pt")) for p in found), reverse=True)
            kept = [old for old in steps if old < step][: self.keep - 1]
            for old in set(steps) - set(kept):
                numbered(path, old).unlink(missing_ok=True)


def numbered(path: Path, step: int) -> Path:
    """out/ckpt.pt as out/ckpt-250.pt."""
    return path.with_name(f"{path.stem}-{step}{path.suffix}")


def link(old: Path, new: Path, copy: bool = False) -> None:
    """Give a file a second name, in place of whatever has that; or copy it, as where files can have one name only."""
    aside = new.with_name(new.name + ".tmp")
    try:
        aside.unlink(missing_ok=True)
        with suppress(OSError):
            if not copy:
                os.link(old, aside)
        if not aside.exists():
            shutil.copyfile(old, aside)
            with open(aside, "rb") as file:
                os.fsync(file.fileno())
        os.replace(aside, new)
        sync_folder(new.parent)
    finally:
        with suppress(OSError):  # two names of one file: a rename of one to the other does nothing
            aside.unlink()


def copied(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its tensors copied to the CPU, so that training may go on; shared ones stay shared."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copy(part) for key, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        # Both the place in memory and what is seen of it: two views of one tensor are two.
        key = (value.data_ptr() or id(value), value.dtype, value.shape, value.stride())
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]

    return replace(checkpoint, **{f.name: copy(getattr(checkpoint, f.name)) for f in fields(checkpoint)})


def refuse_useless(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for weights that are not finite: they must not take the place of good ones.

    By NumPy: a torch operation would give this thread threads of its own, which stay, and OpenMP lets those of the
    training wait less patiently when there are more threads than cores.
    """
    states = {f"optimizer.{name}.{key}": v for name, s in checkpoint.optimizer.items() for key, v in s.items()}
    for name, tensor in (checkpoint.model | states).items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not np.isfinite(tensor.float().numpy()).all():
            raise CheckpointError(f"not worth saving: {name} is not finite")


def check_room_for_two(out_dir: str | Path, tensors: int) -> None:
    """Raise RunError when the disk cannot hold two checkpoints of so many bytes: one is written beside the other."""
    folder = Path(out_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free + bytes_held(folder)
    if free < 2 * tensors:
        what = f"no room for checkpoints: two take {amount(2 * tensors, 'B')}, and {amount(free, 'B')} are free"
        raise RunError(what, where=f"{folder}/", fix="free some space, or another disk: --set train.out_dir=...")


def check_room(folder: Path, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError when the disk has no room for the file, before anything is written."""
    needed = archive.nbytes(vars(checkpoint)) + len(checkpoint.tokenizer) + SLACK
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"no room for a checkpoint: it takes {amount(needed, 'B')}, and {amount(free, 'B')} are free"
        raise CheckpointError(what, where=f"{folder}/", fix="free some space; what was saved before is still there")
