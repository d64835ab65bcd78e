"""What the engine reports: small frozen records, yielded by `engine.train`.

The progress display, the metrics file and the tests are all plain `for event in train(...)` loops over these.
"""

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Evaluation:
    """The model on fixed windows of one split, dropout off."""

    loss: float  # nats a token
    tokens: int
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # e^709 is the largest a float holds


@dataclass(frozen=True)
class StepDone:
    """An optimizer step, told at log boundaries or if it is odd. The loss is that of its batch, before the update."""

    step: int  # steps done, this one included
    loss: float  # nats a token
    grad_norm: float  # before clipping
    lr: float
    limit: float = math.inf  # a loss above it is a spike (see `engine.usual_limit`)
    skipped: bool = False  # the weights have not taken this step

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    @property
    def is_odd(self) -> bool:
        """Whether its loss is a spike, or not even finite."""
        return not (self.is_finite and self.loss <= self.limit)


@dataclass(frozen=True)
class Evaluated:
    """Both splits by the same estimator, after `step` steps."""

    step: int
    train: Evaluation
    val: Evaluation
    is_best: bool


@dataclass(frozen=True)
class Saving:
    """The state is being written; what has been reported so far belongs to it."""

    step: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True)
class SaveFailed:
    """A checkpoint could not be written. What was saved before is still there, and the run goes on."""

    step: int
    path: Path
    reason: str


@dataclass(frozen=True)
class Note:
    """Something the user should know."""

    text: str


@dataclass(frozen=True)
class Stopped:
    """The run was asked to stop; its state is saved."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The schedule is done."""

    step: int
    final: Evaluation  # of the validation split
    best_val_loss: float


Event = StepDone | Evaluated | Saving | Saved | SaveFailed | Note | Stopped | Finished
