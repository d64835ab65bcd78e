"""The learning rate as a pure function of the step: linear warmup, then a decay. No state, so none to save.

    learning_rate(0, config)        # 1.0e-05: step 0 is the first update, and no update has rate zero
    factor(step, config)            # the same as a share of the peak, for parameter groups with other peaks
    for mark in landmarks(config):  # peak 99 0.001 / end of warmup 100 0.001 / minimum 1999 0.0001
        print(mark.name, mark.step, mark.rate)

Steps are optimizer steps, counted from 0. The curve is that of nanoGPT's `get_lr`, with the warmup as the
tutorials after it write it: (step + 1) / warmup_steps where nanoGPT has (step + 1) / (warmup_steps + 1).
"""

import math
from dataclasses import dataclass

from tinyllm.config import RunConfig


@dataclass(frozen=True)
class Landmark:
    """A step of the schedule that is worth naming, and its learning rate."""

    name: str  # peak, end of warmup, minimum, last step
    step: int
    rate: float


def factor(step: int, config: RunConfig) -> float:
    """The rate of step `step` as a share of the peak, at most 1; each parameter group has its own peak.

    With w = schedule.warmup_steps, d = config.decay_steps and p = (step - w) / (d - w):

    - warmup, step < w: (step + 1) / w, so step w - 1 is the first at the peak, and step w still is;
    - cosine: m + (1 - m) (1 + cos(pi p)) / 2, m = optim.min_lr / optim.lr (Loshchilov & Hutter 2017, eq. 5);
    - linear: m + (1 - m) (1 - p);
    - constant: 1; optim.min_lr and schedule.decay_steps play no part.

    m is reached at step d and kept from there on. The default d = train.max_steps is one past the last step,
    so such a run ends a hair above its minimum: kept so, to be comparable with nanoGPT and the tutorials. No
    step has rate 0, unless optim.min_lr = 0 and d < train.max_steps ask for it. Steps are not negative.
    """
    assert step >= 0, f"steps count from 0, got {step}"
    warmup, kind = config.schedule.warmup_steps, config.schedule.kind
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / (config.decay_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if kind == "cosine" else 1 - progress
    lowest = config.optim.min_lr / config.optim.lr
    return lowest + (1 - lowest) * shape


def learning_rate(step: int, config: RunConfig) -> float:
    """The learning rate of optimizer step `step`, for the groups whose peak is optim.lr. See `factor`."""
    return config.optim.lr * factor(step, config)


def landmarks(config: RunConfig) -> list[Landmark]:
    """The points of the run worth marking, in the order of their steps; all of them are steps the run takes.

    `peak`: the first step with the highest rate. `end of warmup`: the first step after the warmup, if any and
    the run gets there. `minimum`: the first step with the lowest rate; `last step` in its place when nothing
    decays, or the decay outlasts the run.
    """
    warmup, last = config.schedule.warmup_steps, config.train.max_steps - 1
    decays = config.schedule.kind != "constant" and config.decay_steps <= config.train.max_steps
    steps = [("peak", min(max(warmup - 1, 0), last))]
    if 0 < warmup <= last:
        steps.append(("end of warmup", warmup))
    steps.append(("minimum", min(config.decay_steps, last)) if decays else ("last step", last))
    return [Landmark(name, step, learning_rate(step, config)) for name, step in steps]
