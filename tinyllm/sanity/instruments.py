"""The instruments of the checks: what they change, watch, and compare with.

    with watched(state) as updates:               # what the optimizers were given, and what they did, tensor by tensor
        train_step(run, state, batch)
    with called(state.model) as calls:            # which modules ran, on what, in which mode
        train_step(run, state, batch)
    wake(model)                                   # random weights of natural size: what starts at zero hides nothing
    cross_entropy(logits, targets)                # references, written out
    apart(found, right), relative(found - right, right)   # how far from the reference, as a share of it

Reference values never come from the code that they are to check: here windows are read from the token files and the
loss is written out in float64, elsewhere the schedule and AdamW are closed forms and the GPT is written out once more.
"""

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm.config import RunConfig
from tinyllm.data import HEADER_SIZE, IGNORED, read_header
from tinyllm.engine import Run, TrainState
from tinyllm.optim import AdamW, Muon
from tinyllm.runtime import seed_torch


def variant(run: Run, changes: Mapping[str, Mapping[str, Any]]) -> Run:
    """The run with some values of its config changed (section to key to value), and batches to match."""
    sections = {name: getattr(run.config, name).model_copy(update=dict(new)) for name, new in changes.items()}
    config: RunConfig = run.config.model_copy(update=sections)
    runtime = replace(run.runtime, dtype=getattr(torch, config.runtime.dtype))
    source = copy.copy(run.source)
    source.batch_size, source.block_size = config.train.batch_size, config.model.block_size
    return replace(run, config=config, runtime=runtime, source=source)


def token_file(path: Path) -> np.ndarray:
    """The ids of a token file, (tokens,)."""
    header = read_header(path)
    return np.memmap(path, f"<u{header.itemsize}", "r", HEADER_SIZE, (header.count,))


def occurrences(tokens: np.ndarray) -> np.ndarray:
    """How often each id occurs, read part by part."""
    counts = np.zeros(0, np.int64)
    for first in range(0, len(tokens), 1 << 24):
        part = np.bincount(tokens[first : first + (1 << 24)], minlength=len(counts))
        part[: len(counts)] += counts
        counts = part
    return counts


def stilled(model: nn.Module) -> nn.Module:
    """The model with its dropout modules off; a model of the user's own may have some that no config reaches."""
    for module in dropouts(model):
        module.p = 0.0
    return model


def dropouts(model: nn.Module) -> list[nn.modules.dropout._DropoutNd]:
    """The dropout modules in it, of torch's kinds."""
    return [module for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]


@torch.no_grad()
def wake(model: nn.Module) -> nn.Module:
    """Give every trained tensor a random value of natural size (see `Subject.woken`).

    Matrices get normal(0, 1 / columns), so that activations keep their size; vectors move a tenth away from where they
    are, gains from one and biases from zero. Drawn on the CPU from a generator of its own.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not (parameter.requires_grad and parameter.is_floating_point()):
            continue
        noise = torch.empty(parameter.shape).normal_(generator=generator).to(parameter)
        if parameter.dim() >= 2:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.1 * noise)
    return model


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) without autograd. Whatever the model draws, it draws the same each time."""
    with torch.no_grad(), torch.random.fork_rng():
        seed_torch(0)
        random.seed(0)  # `sanity` gives these two their states back
        np.random.seed(0)
        return model(tokens)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] over the targets that count, written out in float64."""
    logits = logits.double()
    chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    counted = targets != IGNORED
    return (logits.logsumexp(-1) - chosen)[counted].mean()


def reference_gradients(model: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Gradient of the mean cross-entropy of a batch, by parameter name; zero where there is none."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.random.fork_rng():
        seed_torch(0)
        loss = cross_entropy(model(inputs), targets)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


@dataclass
class Update:
    """What one optimizer step did to one tensor."""

    name: str
    step: int  # counted from 0 within the watch
    lr: float
    weight_decay: float
    grad: Tensor | None  # as the optimizer got it
    before: Tensor
    after: Tensor | None = None  # None if nothing was moved
    muon: bool = False


@contextmanager
def watched(state: TrainState, *, hold: bool = False) -> Iterator[list[Update]]:
    """Record each update that the optimizers make, by a `step` in place of theirs that calls it.

    `hold`: that does not, where what they are given is all that matters; Muon's step costs more than all before it.
    """
    updates: list[Update] = []
    optimizers = list(state.optimizers)
    for optimizer in optimizers:
        watch(optimizer, state.model, updates, hold)
    try:
        yield updates
    finally:
        for optimizer in optimizers:
            del optimizer.step  # and the class's own is there again


def watch(optimizer: AdamW | Muon, model: nn.Module, updates: list[Update], hold: bool) -> None:
    """Have the optimizer's steps add its updates to the list, and move nothing if they are to `hold`."""
    names = {id(p): name for name, p in model.named_parameters()}
    steps, real_step = itertools.count(), optimizer.step

    def watched_step() -> None:
        step, current = next(steps), []
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = names.get(id(p), "a tensor that is not the model's")
                grad = None if p.grad is None else p.grad.detach().clone()
                muon = isinstance(optimizer, Muon)
                update = Update(name, step, group["lr"], group["weight_decay"], grad, p.detach().clone(), muon=muon)
                current.append((p, update))
                updates.append(update)
        if hold:
            return
        real_step()
        for p, update in current:
            update.after = p.detach().clone()

    optimizer.step = watched_step


@dataclass(frozen=True)
class Call:
    """A module's turn in a forward pass."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    output: Any
    training: bool  # the module's mode
    grad: bool  # whether gradients were recorded


@contextmanager
def called(model: nn.Module) -> Iterator[list[Call]]:
    """Record each call of the model and of the modules in it, as they end."""
    calls: list[Call] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            given = output.detach() if isinstance(output, Tensor) else output
            calls.append(Call(name, module, args, given, module.training, torch.is_grad_enabled()))

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def calls_of(model: nn.Module, tokens: Tensor) -> list[Call]:
    """The calls of one forward pass."""
    with called(model) as calls:
        logits_of(model, tokens)
    return calls


def joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """All tensors in one vector, float64, in the order of their names."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def apart(found: Tensor, right: Tensor) -> float:
    """Distance of two vectors as a share of the second's length."""
    return float((found - right).norm() / right.norm().clamp(min=1e-30))


def relative(difference: Tensor, reference: Tensor) -> float:
    """The largest absolute difference as a share of the reference's standard deviation."""
    return float(difference.abs().max() / reference.std().clamp(min=1e-12))


def unnumbered(name: str) -> str:
    """A parameter's name without its places in lists: the same for all blocks of a stack."""
    return ".".join(part for part in name.split(".") if not part.isdigit())
