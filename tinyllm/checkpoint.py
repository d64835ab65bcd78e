"""Checkpoints: one file with everything a run needs to go on, or to speak.

    save(path, Checkpoint(step=100, model=model.state_dict(), ...))
    checkpoint = load("out/ckpt.pt")

Tensors and plain Python values only, read with `weights_only=True`: opening a stranger's checkpoint runs no code.
A file is written aside, synced, then renamed, so that a crash leaves the old one or the new one, never a half.
"""

import os
import pickle
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm import custom
from tinyllm.config import RunConfig, check
from tinyllm.errors import CheckpointError
from tinyllm.files import sync_folder

FORMAT = "tinyllm checkpoint"
VERSION = 2
LATEST, BEST = "ckpt.pt", "best.pt"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` optimizer steps, and what gives it meaning."""

    step: int
    best_val_loss: float  # nats a token; infinity before the first evaluation
    config: dict[str, Any]  # the resolved run config
    vocab_size: int  # rows of the embedding
    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]  # by parameter name
    tokenizer: str  # tokenizer.json
    data: dict[str, Any]  # what the token files were made of
    val_loss: float | None = None  # of these very weights, where it was measured
    model_source: str = ""  # SHA-256 of the file with the class of config.model.class, which is not in here
    versions: dict[str, str] = field(default_factory=lambda: {"torch": str(torch.__version__)})


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write the file atomically. Raises CheckpointError when it cannot be written; the old file is then untouched."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    record = {"format": FORMAT, "version": VERSION} | {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            torch.save(record, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        fix = "free some space or make the folder writable; what was saved before is still there"
        raise CheckpointError(f"cannot save the checkpoint: {reason}", where=str(path), fix=fix) from None
    finally:
        with suppress(OSError):  # where the folder is not even a folder
            aside.unlink()


def load(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint, its tensors onto `device`. Raises CheckpointError; runs no code from the file."""
    where = str(path)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\3\4"  # torch would take anything else for an old pickle
    except FileNotFoundError:
        fix = "`tinyllm train run.toml` makes one in its train.out_dir"
        raise CheckpointError("no such checkpoint", where=where, fix=fix) from None
    except IsADirectoryError:
        raise CheckpointError("is a folder", where=where, fix=f"name the file, e.g. {Path(path) / LATEST}") from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=where) from None
    if not is_zip:
        raise CheckpointError("not a tinyllm checkpoint: not a file of torch.save", where=where)
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look at the checksums
                raise zipfile.BadZipFile(f"{damaged} has another checksum")
        record = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        what = "not a tinyllm checkpoint: it holds more than tensors and plain values, and nothing of it was run"
        raise CheckpointError(what, where=where) from None
    except MemoryError:
        raise
    except Exception as error:  # there is hardly one that a damaged file cannot cause
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"not a checkpoint, or a damaged one ({reason})", where=where) from None
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
        raise CheckpointError("not a tinyllm checkpoint", where=where)
    if (version := record.pop("version", None)) != VERSION:
        raise CheckpointError(f"a checkpoint of version {version}; this tinyllm reads version {VERSION}", where=where)
    names = {f.name for f in fields(Checkpoint)}
    if record.keys() != names:
        missing = ", ".join(sorted(names ^ record.keys()))
        raise CheckpointError(f"a damaged checkpoint: these parts are missing or unknown: {missing}", where=where)
    return Checkpoint(**record)


def find(path: str | Path) -> Path:
    """The file itself, or in a folder the best checkpoint, then the latest. Raises CheckpointError."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in (BEST, LATEST):
        if (path / name).is_file():
            return path / name
    fix = "`tinyllm train run.toml` makes one, or name the file with --checkpoint"
    raise CheckpointError(f"no {BEST} or {LATEST} in this folder", where=f"{path}/", fix=fix)


def run_config(
    checkpoint: Checkpoint, overrides: Sequence[str] = (), where: str = "the checkpoint's config"
) -> RunConfig:
    """The run config that a checkpoint holds. Raises ConfigError, and CheckpointError for code not to be trusted.

    A class of one's own is named in there, and is run when the model is built: it must be a file of the current
    directory that has not changed (see `custom.trust`), unless an override of model.class says to run it.
    """
    config = check(checkpoint.config, overrides, where=where)
    is_named = any(override.partition("=")[0].strip() == "model.class" for override in overrides)
    if config.model.class_ and not is_named:
        custom.trust(config.model.class_, checkpoint.model_source, where)
    return config


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into a model, strictly. Raises CheckpointError naming what does not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(f"the checkpoint's weights do not fit its config: {reason}") from None
