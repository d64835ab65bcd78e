"""Checkpoints: everything that a run needs to go on, or to speak, in one file.

    save("out/ckpt.pt", Checkpoint(step=100, model=model.state_dict(), ...))
    checkpoint = load("out/ckpt.pt")
    found = find("out", LATEST)                      # the newest of a folder that is whole, and what was passed over

`archive.py` knows how such a file is written and read: whole or not at all, and without running anything in it. Here is
what it holds, and what that must be before anybody builds a model from it.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm import archive, custom
from tinyllm.config import ModelConfig, RunConfig, check
from tinyllm.errors import CheckpointError, typed
from tinyllm.model import GPT

FORMAT = "tinyllm checkpoint"
VERSION = 3  # 2 had no seal, and the first version of the fields below
LATEST, BEST = "ckpt.pt", "best.pt"
LARGEST_TABLES = 1 << 26  # bytes
NAME = re.compile(r"(ckpt|best)(-\d+)?\.pt")  # ckpt-250.pt: the one before, of step 250
NONE_IS_WHOLE = "no whole checkpoint is here: take a copy from elsewhere, or train from the start"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` optimizer steps, and what gives it meaning."""

    step: int
    best_val_loss: float  # nats a token, of the evaluations before this step; infinity before the first
    config: dict[str, Any]  # the resolved run config
    vocab_size: int  # rows of the embedding
    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]  # by parameter name
    tokenizer: str  # tokenizer.json
    data: dict[str, Any]  # what the token files were made of
    model_source: str = ""  # SHA-256 of the file with the class of config.model.class, which is not in here
    environment: dict[str, str] = field(default_factory=dict)  # what the numbers depend on beside all this
    recent_losses: list[float] = field(default_factory=list)  # by which a spike is told
    changes: list[dict[str, Any]] = field(default_factory=list)  # what was changed on the way: step, what, from, to


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write the file atomically. Raises CheckpointError when it cannot be written; the old file is then untouched."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        archive.write(path, as_record(checkpoint), checkpoint.step)
    except OSError as error:
        fix = "free some space or make the folder writable; what was saved before is still there"
        raise CheckpointError(f"cannot save the checkpoint: {error.strerror}", where=str(path), fix=fix) from None


def as_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the file holds."""
    return {"format": FORMAT, "version": VERSION} | {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint, its tensors on the CPU. Raises CheckpointError; runs no code from the file."""
    where = str(path)
    if Path(path).is_dir():
        raise CheckpointError("is a folder", where=where, fix=f"name the file, e.g. {Path(path) / LATEST}")
    record, sealed = archive.read(path)
    if record.pop("format", None) != FORMAT:
        raise CheckpointError("not a tinyllm checkpoint", where=where)
    version = record.pop("version", None)
    if version not in (2, VERSION):
        what = f"a checkpoint of version {version}; this tinyllm reads 2 and {VERSION}"
        raise CheckpointError(what, where=where, fix="use the tinyllm that wrote it, or train from the start")
    if version == 2:
        record = upgraded(record)
    elif not sealed:
        raise CheckpointError("damaged: its seal, the file's last bytes, is missing", where=where)
    refuse_other_fields(record, where)
    return Checkpoint(**record)


def upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """The record of version 2 as one of version 3."""
    versions = record.pop("versions", {})
    record.pop("val_loss", None)
    if isinstance(record.get("model"), dict):
        record["model"] = dict(record["model"])  # torch's own kind of dictionary until then
    return record | {"environment": versions, "recent_losses": [], "changes": []}


KINDS: dict[str, type] = {
    "step": int,
    "best_val_loss": float,
    "config": dict,
    "vocab_size": int,
    "model": dict,
    "optimizer": dict,
    "tokenizer": str,
    "data": dict,
    "model_source": str,
    "environment": dict,
    "recent_losses": list,
    "changes": list,
}
ELEMENTS: dict[str, type] = {
    "model": Tensor, "optimizer": dict, "environment": str, "recent_losses": float, "changes": dict
}  # fmt: skip


def refuse_other_fields(record: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError unless a record has the fields of a Checkpoint, each of its kind."""
    if record.keys() != KINDS.keys():
        missing = ", ".join(sorted(KINDS.keys() ^ record.keys()))
        raise CheckpointError(f"a damaged checkpoint: these parts are missing or unknown: {missing}", where=where)
    for name, value, kind in of_another_kind(record):
        what = f"a damaged checkpoint: {name} is a {type(value).__name__}, not a {kind.__name__}"
        raise CheckpointError(what, where=where)
    if record["step"] < 0 or record["vocab_size"] < 1:
        what = f"a damaged checkpoint: step {record['step']}, vocabulary {record['vocab_size']}"
        raise CheckpointError(what, where=where)


def of_another_kind(record: Mapping[str, Any]) -> Iterator[tuple[str, Any, type]]:
    """Each value that is not of the kind it must be: its name, itself, the kind."""
    for name, kind in KINDS.items():
        value = record[name]
        if type(value) is not kind:
            yield name, value, kind
        elif name in ELEMENTS:
            parts = value.items() if kind is dict else enumerate(value)
            yield from ((f"{name}.{key}", v, ELEMENTS[name]) for key, v in parts if type(v) is not ELEMENTS[name])


# ---- The checkpoints of a folder ----


@dataclass(frozen=True)
class Found:
    """A checkpoint that could be read."""

    path: Path
    checkpoint: Checkpoint
    passed_over: tuple[CheckpointError, ...] = ()  # better ones, that could not


def find(path: str | Path, wanted: str = BEST) -> Found:
    """Load the file itself, or of a folder the best (or latest) checkpoint that is whole. Raises CheckpointError.

    For BEST the best one, the best one before it, then the latest; for LATEST the one of the highest step.
    """
    path = Path(path)
    if not path.is_dir():
        return Found(path, load_or_point(path))
    present = checkpoints(path)
    if not present:
        fix = "`tinyllm train run.toml` makes one, or name the file"
        raise CheckpointError(f"no {BEST} or {LATEST} in this folder", where=f"{path}/", fix=fix)
    if wanted == BEST:
        present.sort(key=lambda file: (not file.name.startswith("best"), file.name not in (BEST, LATEST)))
    errors = []
    for file in present:
        try:
            return Found(file, load(file), tuple(errors))
        except CheckpointError as error:
            errors.append(error)
    listed = "".join(f"\n  {Path(error.where).name}: {error.what}" for error in errors)
    raise CheckpointError(f"no checkpoint in this folder can be read:{listed}", where=f"{path}/", fix=NONE_IS_WHOLE)


def load_or_point(path: Path) -> Checkpoint:
    """Load a file; if it cannot be read, the error names the newest good one beside it, if there is one."""
    try:
        return load(path)
    except CheckpointError as error:
        whole = (file for file in checkpoints(path.parent) if file != path and archive.is_whole(file))
        fix = error.fix or NONE_IS_WHOLE
        if file := next(whole, None):
            fix = f"the newest good one beside it: {typed(file)}, of step {archive.sealed_step(file):,}"
        raise CheckpointError(error.what, where=error.where, fix=fix) from None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by what their seals and names say: the newest first, the latest before the best.

    Without a seal, because it is of an older version or cut off, the latest comes first: it was there to be it. The
    best comes last then, since nobody knows how old it is.
    """

    def age(path: Path) -> tuple[float, bool, bool]:
        step = archive.sealed_step(path)
        if step is None:
            number = re.search(r"-(\d+)", path.name)
            step = int(number[1]) if number else math.inf if path.name == LATEST else -1
        return step, path.name == LATEST, path.name.startswith("ckpt")

    try:
        found = [path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_file()]
    except OSError:
        return []
    return sorted(found, key=age, reverse=True)


def newest_step(folder: Path) -> int:
    """The highest step of a folder's checkpoints, by their seals; 0 for none."""
    return max((archive.sealed_step(path) or 0 for path in checkpoints(folder)), default=0)


def bytes_held(folder: Path) -> int:
    """Bytes that a folder's checkpoints take; the latest and the best are often two names of one file.

    One may go while we look: another process may be training there.
    """
    sizes: dict[tuple[int, int], int] = {}
    for path in checkpoints(folder):
        with suppress(FileNotFoundError):
            file = path.stat()
            sizes[file.st_dev, file.st_ino] = file.st_size
    return sum(sizes.values())


# ---- From a checkpoint to a model ----


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


def check_sizes(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise CheckpointError unless the weights are those of the GPT that the config describes. Takes no memory.

    A config of a few bytes can ask for a model of any size; its weights must be in the file. A class of one's own is
    asked for its tensors when it is built (`load_weights`).
    """
    if config.class_:
        return
    weights = checkpoint.model
    if config.n_layer > len(weights):
        what = f"the config says {config.n_layer:,} layers, the checkpoint holds {len(weights):,} tensors"
        raise CheckpointError(f"the checkpoint's weights do not fit its config: {what}")
    try:
        with torch.device("meta"):  # shapes without values
            model = GPT(config, checkpoint.vocab_size)
    except RuntimeError:  # more bytes than 64 bits can count
        what = f"no machine holds a model of n_embd = {config.n_embd:,} and block_size = {config.block_size:,}"
        raise CheckpointError(f"the checkpoint's weights do not fit its config: {what}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | weights.keys()):
        here = tuple(weights[name].shape) if name in weights else "not in the file"
        if (asked := wanted.get(name, "not in the model")) != here:
            what = f"{name} is {here}, and must be {asked}"
            raise CheckpointError(f"the checkpoint's weights do not fit its config: {what}")
    tables = sum(buffer.nbytes for buffer in model.buffers())  # of rotary positions, made for block_size
    if tables > LARGEST_TABLES + archive.nbytes(weights):
        what = f"block_size = {config.block_size:,} takes {tables:,} bytes for positions alone"
        raise CheckpointError(f"the checkpoint's weights do not fit its config: {what}")


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into a model, strictly. Raises CheckpointError naming what does not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise CheckpointError(f"the checkpoint's weights do not fit its config: {reason}") from None
