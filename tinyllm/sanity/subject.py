"""The run under test, and what several checks need of it made once.

subject = Subject(run)
state = subject.state()                       # fresh weights, dropout off, float32: nothing random is left
train_step(subject.exact, state, subject.batch)
"""

import copy
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm.baselines import Baselines, compare
from tinyllm.engine import Run, TrainState, new_state
from tinyllm.model import GPT
from tinyllm.optim import build_optimizers
from tinyllm.sanity.instruments import cross_entropy, logits_of, occurrences, stilled, token_file, variant, wake
from tinyllm.sanity.measure import Cost, measure

ROWS = 4  # sequences in the batch of a check: few are enough, but rows must be able to mix
TOKENS = 16, 32  # its length, at least and at most: every start of a run waits for these steps
COMPARED = 1 << 24  # tokens of a split that are compared with the other
BATCH_FLOPS = 4e9  # that a step on it may take; a large model gets a short batch


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

    @cached_property
    def weights(self) -> int:
        """The model's parameters, each once."""
        return sum(p.numel() for p in self.fresh.parameters())

    @property
    def size(self) -> int:
        """Parameters by which to say what is usual: without a table of n-grams, of which each token reads few rows."""
        table = self.fresh.ngrams if isinstance(self.fresh, GPT) else None
        return self.weights - (0 if table is None else table.weight.numel())

    def state(self, run: Run | None = None, *, woken: bool = False) -> TrainState:
        """A copy of the fresh model, with optimizers of its own (for `run`'s config)."""
        model = copy.deepcopy(self.woken).train() if woken else copy.deepcopy(self.fresh)
        run = run or self.exact
        return TrainState(model, build_optimizers(model, run.config.optim, run.runtime.dtype))

    @cached_property
    def own(self) -> nn.Module:
        """The model as a run starts with it, dropout and all. Not to be changed either."""
        return new_state(self.run).model

    @cached_property
    def own_woken(self) -> nn.Module:
        """The same with random weights of natural size everywhere, like `woken`. Not to be changed either."""
        return wake(copy.deepcopy(self.own))

    def own_state(self, run: Run) -> TrainState:
        """A copy of that, with optimizers of its own."""
        model = copy.deepcopy(self.own_woken)
        return TrainState(model, build_optimizers(model, run.config.optim, run.runtime.dtype))

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
        affordable = int(BATCH_FLOPS / (6 * self.weights * ROWS))
        size = max(TOKENS[0], min(affordable, TOKENS[1]))
        return self.windows("train", ROWS, min(self.run.config.model.block_size, size))

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
