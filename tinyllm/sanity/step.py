"""Checks of the step: the gradient that the optimizers are given, and that each of them takes it once.

They watch real steps from outside (`instruments.watched`) and compare what the optimizers were given with gradients of
their own.
"""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.engine import Run, TrainState, train_step
from tinyllm.errors import RunError
from tinyllm.optim import all_groups
from tinyllm.sanity.instruments import apart, cross_entropy, joined, reference_gradients, variant, watched
from tinyllm.sanity.result import Result, failed, listed, passed, skipped
from tinyllm.sanity.subject import ROWS, Subject

CLOSE = 1e-3  # relative; float32 sums in another order differ by 1e-6, a mistake by much more


def plain(subject: Subject, micro_batch_size: int = 0, grad_clip: float = 0.0, **optim: Any) -> Run:
    """The exact run with ROWS sequences a step, its micro-batches and its clipping as given, at a constant rate."""
    train = {"batch_size": ROWS, "micro_batch_size": micro_batch_size, "skip_spikes": False}
    schedule = {"kind": "constant", "warmup_steps": 0}
    return variant(subject.exact, {"train": train, "optim": {"grad_clip": grad_clip, **optim}, "schedule": schedule})


def held(state: TrainState) -> list[str]:
    """Names of the parameters that the optimizers hold."""
    return [name for group in all_groups(state.optimizers) for name in group["names"]]


def given(run: Run, state: TrainState, subject: Subject) -> tuple[Tensor, Any]:
    """One real step: the gradient that the optimizers were given, (parameters,) float64, and what the step reports."""
    with watched(state, hold=True) as updates:
        report = train_step(run, state, subject.batch)
    if set(held(state)) != {u.name for u in updates}:
        raise RunError("a step does not step all of its optimizers", fix="see `one step`")
    return joined({u.name: torch.zeros_like(u.before) if u.grad is None else u.grad for u in updates}), report


def wanted(state: TrainState, subject: Subject, rows: slice = slice(None)) -> Tensor:
    """The gradient of the mean cross-entropy of (some rows of) the batch, of what the optimizers hold."""
    state.model.train()
    inputs, targets = (subject.tensor(a[rows]) for a in subject.batch)
    gradients = reference_gradients(state.model, inputs, targets)
    return joined({name: gradients[name] for name in held(state)})


def one_step(subject: Subject) -> Result:
    """Each train_step is one step of each optimizer, and counts as one."""
    run, state = plain(subject, micro_batch_size=ROWS // 2), subject.state(plain(subject), woken=True)
    expected, fix = "one step of each optimizer", "step() on each optimizer, once, after the last micro-batch"
    for number in range(2):
        with watched(state, hold=True) as updates:
            train_step(run, state, subject.batch)
        steps = Counter(u.name for u in updates)
        if not updates:
            diagnosis = f"train_step {number} makes no step of the optimizers that the state holds"
            return failed("no step", expected, diagnosis, fix)
        if missing := sorted(set(held(state)) - steps.keys()):
            diagnosis = f"an optimizer is left out: {listed(missing)} are never stepped"
            return failed(f"{len(missing)} tensors are not stepped", expected, diagnosis, fix)
        if max(steps.values()) > 1:
            diagnosis = f"each train_step makes {max(steps.values())} optimizer steps"
            return failed(f"{max(steps.values())} steps in one", expected, diagnosis, fix)
        if state.step != number + 1:
            diagnosis = "the schedule, the batches and the saves go by state.step"
            return failed(f"step {state.step} after {number + 1}", f"{number + 1}", diagnosis, "state.step += 1")
    return passed("one step of each optimizer, two times", expected)


def gradient(subject: Subject) -> Result:
    """What the optimizer gets is the gradient of the mean cross-entropy of the batch; what is reported is its loss."""
    run, state = plain(subject), subject.state(plain(subject), woken=True)
    right = wanted(state, subject)
    loss_before = subject.loss(state.model)
    found, report = given(run, state, subject)
    expected = "the gradient of the mean cross-entropy"
    ratio, error = float(found @ right / (right @ right)), apart(found, right)
    measured = f"{error:.1e} apart"
    if not error < CLOSE:
        diagnosis = "the optimizer is given another gradient than that of the batch's mean cross-entropy"
        fix = "look at loss_fn and at what happens between backward() and step()"
        if not bool(found.any()):
            diagnosis, fix = (
                "the optimizer gets no gradient",
                "zero_grad after the step, not between backward() and step()",
            )
        elif apart(found / ratio, right) < 0.01:
            diagnosis = f"the gradient is {ratio:.4g} times that of the mean cross-entropy of the batch"
            fix = "average the loss over all tokens, and scale it by nothing else"
        elif other := trained_on(subject, found):
            diagnosis, fix = (
                f"the step trains on {other}",
                "train on every target of the batch, as it comes from the source",
            )
        return failed(measured, expected, diagnosis, fix, values={"relative_error": error, "ratio": ratio})
    if not math.isclose(report.loss, loss_before, rel_tol=1e-3):
        diagnosis = "the loss that is shown is not the mean cross-entropy of the batch before the update"
        fix = "report the loss that is trained on"
        return failed(f"reports {report.loss:.4f}", f"{loss_before:.4f}", diagnosis, fix)
    return passed(measured, expected, values={"relative_error": error})


def trained_on(subject: Subject, found: Tensor) -> str:
    """The loss that has this gradient, of those that people take by mistake; '' if it is none of them."""
    state = subject.state(plain(subject), woken=True)
    inputs, targets = (subject.tensor(a) for a in subject.batch)
    logits = state.model.train()(inputs)
    flat = logits.flatten(0, 1), targets.flatten()
    losses = {
        "targets shifted once more": cross_entropy(logits[:, :-1], targets[:, 1:]),
        "the inputs themselves: it learns to copy": cross_entropy(logits, inputs),
        "the last position alone": cross_entropy(logits[:, -1:], targets[:, -1:]),
        "all positions but the first": cross_entropy(logits[:, 1:], targets[:, 1:]),
        "all positions but the last": cross_entropy(logits[:, :-1], targets[:, :-1]),
        "smoothed targets": nn.functional.cross_entropy(*flat, label_smoothing=0.1),
        "a softmax of the softmax": cross_entropy(logits.softmax(-1), targets),
    }
    named = dict(state.model.named_parameters())
    names = held(state)
    for words, loss in losses.items():
        gradients = torch.autograd.grad(loss, [named[n] for n in names], retain_graph=True, allow_unused=True)
        both = zip(names, gradients, strict=True)
        own = joined({n: torch.zeros_like(named[n]) if g is None else g for n, g in both})
        if apart(found, own) < 0.02:
            return words
    return ""


def accumulation(subject: Subject) -> Result:
    """Micro-batches add up to the gradient of the whole batch."""
    run, state = plain(subject, micro_batch_size=1), subject.state(plain(subject), woken=True)
    right, last = wanted(state, subject), wanted(state, subject, slice(-1, None))
    found, report = given(run, state, subject)
    error, ratio = apart(found, right), float(found @ right / (right @ right))
    measured, expected = f"{ROWS} micro-batches: {error:.1e} apart", "the gradient of the whole batch"
    if not error < CLOSE:
        diagnosis = "micro-batches do not add up to the whole batch"
        if apart(found, last) < 0.01 or apart(found * ROWS, last) < 0.01:
            diagnosis = "only the last micro-batch's gradient is left: the others were cleared"
        elif apart(found / ratio, right) < 0.01:
            diagnosis = f"the sum over {ROWS} micro-batches is {ratio:.3g} times the gradient of the whole batch"
        fix = "weigh each micro-batch's mean loss by its share of the batch; clear, clip and step once"
        return failed(measured, expected, diagnosis, fix, values={"relative_error": error, "ratio": ratio})
    whole = subject.loss(subject.woken)
    if not math.isclose(report.loss, whole, rel_tol=1e-3):
        diagnosis = "the loss shown for accumulated micro-batches is not that of the whole batch"
        return failed(f"reports {report.loss:.4f}", f"{whole:.4f}", diagnosis, "add up the weighted losses")
    return passed(measured, expected, values={"relative_error": error})


def zero_grad(subject: Subject) -> Result:
    """No step sees the gradient of the step before."""
    run, state = plain(subject), subject.state(plain(subject), woken=True)
    first, _ = given(run, state, subject)
    right = wanted(state, subject)
    second, _ = given(run, state, subject)
    error = apart(second, right)
    measured, expected = f"second step: {error:.1e} apart", "its own gradient"
    if not error < CLOSE:
        diagnosis = "the second step gets another gradient than its own"
        if apart(second, right + first) < 0.01:
            diagnosis = "the second step gets the gradient of the first as well: steps grow longer and longer"
        return failed(measured, expected, diagnosis, "optimizer.zero_grad(set_to_none=True) once a step")
    return passed(measured, expected)


def clipping(subject: Subject) -> Result:
    """The whole gradient is scaled to optim.grad_clip once, before the step; a smaller one is left alone."""
    limit = subject.run.config.optim.grad_clip
    if not limit:
        return skipped("optim.grad_clip = 0 switches it off")
    state = subject.state(plain(subject), woken=True)
    right = wanted(state, subject)
    norm = float(right.norm())
    expected = "scaled to the limit if above, untouched if below"
    fix = "clip_grad_norm_ over all parameters, once, after the last backward() and before step()"
    for share, micro in ((0.5, 0), (0.5, ROWS // 2), (2.0, 0)):
        run = plain(subject, micro_batch_size=micro, grad_clip=share * norm)
        found, report = given(run, subject.state(plain(subject), woken=True), subject)
        got = float(found.norm())
        how = f"a norm of {norm:.3g} with the limit {share * norm:.3g}{' in micro-batches' if micro else ''}"
        measured = f"{how} became {got:.3g}"
        if share < 1 and got > share * norm * 1.001:
            return failed(measured, expected, "the gradient is not clipped when the optimizer takes it", fix)
        if not apart(found, right * min(share, 1)) < 0.01:
            diagnosis = "clipping changes the direction of the gradient: clipped in parts, or more than once"
            return failed(measured, expected, diagnosis, fix)
        if not math.isclose(report.grad_norm, norm, rel_tol=0.01):
            diagnosis = "the gradient norm that is shown is not the one before clipping"
            fix = "report what clip_grad_norm_ returns"
            return failed(f"reports {report.grad_norm:.4g}", f"{norm:.4g}", diagnosis, fix)
    return passed(f"the norm {norm:.3g} is cut to {norm / 2:.3g}, and left alone below the limit", expected)
