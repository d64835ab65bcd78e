"""The run under test, and the instruments that the checks share.

    subject = Subject(run)
    state = subject.state()                       # fresh weights, dropout off, float32: nothing random is left
    with watched(state) as updates:
        train_step(subject.exact, state, subject.batch)
    updates[0].grad, updates[0].lr                # what the optimizer was given, tensor by tensor

Reference values never come from the code that they are to check: windows are read from the token files, the loss is
written out in float64, the schedule and AdamW are closed forms.
"""

import copy
import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm.baselines import Baselines, compare
from tinyllm.config import RunConfig
from tinyllm.data import HEADER_SIZE, IGNORED, read_header
from tinyllm.engine import Run, TrainState, new_state
from tinyllm.optim import build_optimizers
from tinyllm.sanity.measure import Cost, measure

ROWS = 4  # sequences in the batch of a check: few are enough, but rows must be able to mix
TOKENS = 16, 128  # its length, at least and at most
COMPARED = 1 << 24  # tokens of a split that are compared with the other
BATCH_FLOPS = 1e10  # that a step on it may take; a large model gets a short batch


class Subject:
    """A run, with what several checks need of it made once."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def exact(self) -> Run:
        """The run without anything that is random or rounded on purpose: no dropout, float32, no compiler."""
        changes = {"model": {"dropout": 0.0, "attn_dropout": 0.0}, "runtime": {"dtype": "float32", "compile": False}}
        return variant(self.run, changes)

    @cached_property
    def fresh(self) -> nn.Module:
        """The model as a run starts with it, but for dropout. Not to be changed: `state()` gives copies."""
        return stilled(new_state(self.exact).model)

    def state(self, run: Run | None = None, *, woken: bool = False) -> TrainState:
        """A copy of the fresh model, with optimizers of its own (for `run`'s config)."""
        model = copy.deepcopy(self.fresh)
        if woken:
            wake(model)
        return TrainState(model, build_optimizers(model, (run or self.exact).config.optim))

    @cached_property
    def own(self) -> nn.Module:
        """The model as a run starts with it, dropout and all. Not to be changed either."""
        return new_state(self.run).model

    def own_state(self, run: Run) -> TrainState:
        """A copy of that, woken, with optimizers of its own."""
        model = wake(copy.deepcopy(self.own))
        return TrainState(model, build_optimizers(model, run.config.optim))

    @cached_property
    def woken(self) -> nn.Module:
        """The fresh model with random weights of natural size everywhere: what starts at zero hides nothing."""
        return wake(copy.deepcopy(self.fresh)).eval()

    @cached_property
    def tokens(self) -> dict[str, np.ndarray]:
        """Both token files, (tokens,), memory-mapped here and not by `data.py`."""
        return {name: token_file(Path(self.run.data.dir) / f"{name}.bin") for name in ("train", "val")}

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """How often each id occurs in both files, (highest id + 1,), int64."""
        return {name: occurrences(tokens) for name, tokens in self.tokens.items()}

    @cached_property
    def comparison(self) -> Baselines:
        """How hard the validation split is, and how much of it is in training: of the first COMPARED tokens of each."""
        size = max(len(counts) for counts in self.counts.values())
        *_, found = compare(self.tokens["train"][:COMPARED], self.tokens["val"][:COMPARED], size)
        assert isinstance(found, Baselines)
        return found

    @cached_property
    def batch(self) -> tuple[np.ndarray, np.ndarray]:
        """A small real batch, read from the training file: inputs and targets, each (ROWS, T), int64."""
        weights = sum(p.numel() for p in self.fresh.parameters())
        affordable = int(BATCH_FLOPS / (6 * weights * ROWS))
        return self.windows(
            "train", ROWS, min(self.run.config.model.block_size, max(TOKENS[0], min(affordable, TOKENS[1])))
        )

    def windows(self, split: str, rows: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Evenly spread windows of a token file: inputs and targets, each (rows, size), int64."""
        tokens = self.tokens[split]
        starts = np.linspace(0, len(tokens) - size - 1, rows).astype(np.int64)
        both = tokens[starts[:, None] + np.arange(size + 1)].astype(np.int64)
        # An id that does not fit is a finding of `token ids`, and should not crash the checks after it.
        both = np.minimum(both, self.run.vocab_size - 1)
        return both[:, :-1], both[:, 1:]

    def loss(self, model: nn.Module) -> float:
        """The model's mean cross-entropy on the batch."""
        inputs, targets = (self.tensor(array) for array in self.batch)
        return float(cross_entropy(logits_of(model, inputs), targets))

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.run.runtime.device)

    @cached_property
    def cost(self) -> Cost:
        """What the run needs, measured by a process of its own: up to a minute or so."""
        return measure(self.run.config)


def variant(run: Run, changes: Mapping[str, Mapping[str, Any]]) -> Run:
    """The run with some values of its config changed (section to key to value)."""
    sections = {name: getattr(run.config, name).model_copy(update=dict(new)) for name, new in changes.items()}
    config: RunConfig = run.config.model_copy(update=sections)
    runtime = replace(run.runtime, dtype=getattr(torch, config.runtime.dtype))
    return replace(run, config=config, runtime=runtime)


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
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


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
        torch.manual_seed(0)
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
        torch.manual_seed(0)
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
    after: Tensor | None = None
    muon: bool = False


@contextmanager
def watched(state: TrainState) -> Iterator[list[Update]]:
    """Record each update that the optimizers make, by hooks on their `step`."""
    updates: list[Update] = []
    handles = [handle for optimizer in state.optimizers for handle in watch(optimizer, state.model, updates)]
    try:
        yield updates
    finally:
        for handle in handles:
            handle.remove()


def watch(optimizer: torch.optim.Optimizer, model: nn.Module, updates: list[Update]) -> tuple[Any, Any]:
    """Hooks that add the optimizer's updates to the list."""
    names = {id(p): name for name, p in model.named_parameters()}
    steps = itertools.count()
    current: list[tuple[Tensor, Update]] = []

    def before(*_: Any) -> None:
        step = next(steps)
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = names.get(id(p), "a tensor that is not the model's")
                grad = None if p.grad is None else p.grad.detach().clone()
                muon = isinstance(optimizer, torch.optim.Muon)
                update = Update(name, step, group["lr"], group["weight_decay"], grad, p.detach().clone(), muon=muon)
                current.append((p, update))
                updates.append(update)

    def after(*_: Any) -> None:
        for p, update in current:
            update.after = p.detach().clone()
        current.clear()

    return optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)


def joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """All tensors in one vector, float64, in the order of their names."""
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def unnumbered(name: str) -> str:
    """A parameter's name without its places in lists: the same for all blocks of a stack."""
    return ".".join(part for part in name.split(".") if not part.isdigit())
