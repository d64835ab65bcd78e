"""The learning rate against values by hand, torch's schedulers, and what must hold for any config."""

import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.config import RunConfig, check
from tinyllm.schedule import factor, landmarks, learning_rate


def config(kind="cosine", warmup=4, decay=0, steps=20, lr=1e-3, min_lr=1e-4) -> RunConfig:
    return check(
        {
            "schedule": {"kind": kind, "warmup_steps": warmup, "decay_steps": decay},
            "optim": {"lr": lr, "min_lr": min_lr},
            "train": {"max_steps": steps},
        }
    )


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    decay = draw(st.integers(2, 3000))
    lr = draw(st.floats(1e-6, 1.0))
    return config(
        kind=draw(st.sampled_from(["cosine", "linear", "constant"])),
        warmup=draw(st.integers(0, decay - 1)),
        decay=decay,
        steps=draw(st.integers(1, 4000)),
        lr=lr,
        min_lr=lr * draw(st.floats(1e-3, 1.0)),
    )


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("cosine", 0, 2.5e-4),  # the first of four steps of warmup
        ("cosine", 3, 1e-3),
        ("cosine", 4, 1e-3),
        ("cosine", 8, 1e-4 + 9e-4 * (2 + math.sqrt(2)) / 4),  # a quarter of the way: cos 45 degrees
        ("cosine", 12, 5.5e-4),
        ("cosine", 20, 1e-4),
        ("cosine", 1000, 1e-4),
        ("linear", 2, 7.5e-4),
        ("linear", 4, 1e-3),
        ("linear", 8, 7.75e-4),
        ("linear", 12, 5.5e-4),
        ("linear", 20, 1e-4),
        ("linear", 21, 1e-4),
        ("constant", 1, 5e-4),
        ("constant", 4, 1e-3),
        ("constant", 1000, 1e-3),
    ],
)
def test_values_by_hand(kind: str, step: int, expected: float) -> None:
    assert learning_rate(step, config(kind)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_agrees_with_torch(kind: str) -> None:
    """Torch builds the same curve from a chain of stateful schedulers."""
    warmup, decay, lr, min_lr = 7, 60, 3e-3, 2e-4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    schedulers = torch.optim.lr_scheduler
    rise = schedulers.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    if kind == "cosine":
        fall = schedulers.CosineAnnealingLR(optimizer, T_max=decay - warmup, eta_min=min_lr)
    else:
        fall = schedulers.LinearLR(optimizer, 1.0, min_lr / lr, total_iters=decay - warmup)
    both = schedulers.SequentialLR(optimizer, [rise, fall], milestones=[warmup])
    ours = config(kind, warmup, decay, 60, lr, min_lr)
    for step in range(61):
        assert learning_rate(step, ours) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SequentialLR uses what torch itself deprecates
            both.step()


@given(configs())
def test_any_config(c: RunConfig) -> None:
    """Never zero, never above the peak, continuous where the warmup ends, and only down after that."""
    warmup, lr = c.schedule.warmup_steps, c.optim.lr
    rates = [learning_rate(step, c) for step in range(c.decay_steps + 3)]
    assert min(rates) > 0
    assert max(rates) == lr
    assert rates[max(0, warmup - 1)] == rates[warmup] == lr
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    assert rates[-1] == (lr if c.schedule.kind == "constant" else pytest.approx(c.optim.min_lr, rel=1e-12))
    steepest = math.pi / 2 / (c.decay_steps - warmup) * lr  # of a cosine, where it falls fastest
    assert c.schedule.kind != "cosine" or rates[warmup] - rates[warmup + 1] <= steepest * (1 + 1e-9)


@given(configs())
def test_landmarks_of_any_config(c: RunConfig) -> None:
    """Landmarks are steps of the run, with the rates those steps have, and are what their names say."""
    rates = [learning_rate(step, c) for step in range(c.train.max_steps)]
    marks = {mark.name: mark for mark in landmarks(c)}
    assert all(mark.rate == rates[mark.step] for mark in marks.values())
    assert [mark.step for mark in marks.values()] == sorted(mark.step for mark in marks.values())
    assert marks["peak"].step == rates.index(max(rates))
    assert ("minimum" in marks) != ("last step" in marks)
    assert "minimum" not in marks or marks["minimum"].rate <= min(rates[marks["peak"].step :]) * (1 + 1e-12)
    assert "last step" not in marks or marks["last step"].step == c.train.max_steps - 1
    assert ("end of warmup" in marks) == (0 < c.schedule.warmup_steps < c.train.max_steps)


def steps_of(c: RunConfig) -> list[tuple[str, int]]:
    return [(mark.name, mark.step) for mark in landmarks(c)]


def test_no_warmup_starts_at_the_peak() -> None:
    assert factor(0, config(warmup=0)) == 1.0
    assert steps_of(config(warmup=0)) == [("peak", 0), ("minimum", 19)]


def test_decay_ends_before_the_run() -> None:
    early = config(decay=10, min_lr=0.0)
    assert steps_of(early) == [("peak", 3), ("end of warmup", 4), ("minimum", 10)]
    assert [learning_rate(step, early) > 0 for step in (9, 10, 19)] == [True, False, False]


def test_decay_outlasts_the_run() -> None:
    late = config(decay=36)
    assert steps_of(late) == [("peak", 3), ("end of warmup", 4), ("last step", 19)]
    assert learning_rate(20, late) == pytest.approx(5.5e-4)  # half-way down where the run has ended


def test_warmup_outlasts_the_run() -> None:
    assert steps_of(config(warmup=30, decay=40)) == [("peak", 19), ("last step", 19)]


def test_last_update_is_a_hair_above_the_minimum() -> None:
    """The minimum belongs to step max_steps, one past the last update, as in nanoGPT."""
    c = config(warmup=100, steps=2000)
    assert 0 < learning_rate(1999, c) - 1e-4 < 1e-9
    assert learning_rate(2000, c) == pytest.approx(1e-4, rel=1e-12)


def test_constant_ignores_the_minimum_and_the_decay() -> None:
    c = config("constant", decay=1, min_lr=1.0)  # a minimum above the peak is no contradiction here
    assert {factor(step, c) for step in range(4, 20)} == {1.0}
    assert steps_of(c)[-1] == ("last step", 19)
