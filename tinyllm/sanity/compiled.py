"""Checks of what is computed in another way to be quicker: by torch's compiler, or by loops of our own."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from tinyllm.engine import loss_fn
from tinyllm.fast import in_loops
from tinyllm.runtime import compiled, seed_torch
from tinyllm.sanity.instruments import apart, cross_entropy, joined, logits_of, reference_gradients, relative
from tinyllm.sanity.result import Result, failed, passed, skipped
from tinyllm.sanity.subject import Subject

RISE = 0.05  # nats by which the loss is moved along its gradient, either way


def compile_agrees(subject: Subject) -> Result:
    """The compiled model computes what the model does, forward and backward."""
    if not subject.run.config.runtime.compile:
        return skipped("runtime.compile = false")
    model = subject.state(woken=True).model.train()
    inputs, targets = (subject.tensor(a) for a in subject.batch)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        fast, note = compiled(model, inputs, subject.exact.runtime)
        if fast is model:
            return skipped(note)
        right = reference_gradients(model, inputs, targets)
        logits = logits_of(model, inputs)
        error = relative(logits_of(fast, inputs) - logits, logits)
        cross_entropy(fast(inputs), targets).backward()
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    finally:
        torch.use_deterministic_algorithms(deterministic)
    slope = apart(joined(found), joined(right))
    measured, expected = f"logits {error:.1e}, gradient {slope:.1e} apart", "below 1e-3, in float32"
    if not (error < 1e-3 and slope < 1e-3):
        diagnosis = "the compiler changes what the model computes: a miscompile"
        return failed(measured, expected, diagnosis, "runtime.compile = false, or another version of torch")
    return passed(f"{measured}; {note}", expected)


def training_loops(subject: Subject) -> Result:
    """Compiled loops give each tensor the gradient of float32, rounded no more than by torch in the run's precision."""
    if not subject.run.runtime.loops:
        return skipped("the run has no compiled loops")
    model = subject.state(woken=True).model
    exact = gradients(model, subject, subject.exact.runtime.autocast())
    rounded, found = (gradients(model, subject, autocast(subject, loops)) for loops in (False, True))
    errors = {name: (apart(found[name], exact[name]), apart(rounded[name], exact[name])) for name in exact}
    name = max(errors, key=lambda name: errors[name][0] / allowed(errors[name][1]))
    error, usual = errors[name]
    expected = "each tensor's gradient as near to float32's as by torch, within a factor of 1.5"
    measured = f"{error:.1%} off, by torch {usual:.1%}, in {name}"
    fix = "look at loops.py and kernels/, or set runtime.loops = off"
    if not error <= allowed(usual):
        return failed(measured, expected, "the loops compute another gradient", fix)
    if subject.run.config.model.dropout or subject.run.config.model.attn_dropout:
        predicted, found_slope = slopes(subject)
        measured += f"; with dropout {found_slope / predicted:.2f} of the slope"
        if not 0.9 < found_slope / predicted < 1.1:
            diagnosis = "with dropout, the gradient is not that of the loss: another mask on the way back?"
            return failed(measured, "a loss that changes as its gradient says", diagnosis, fix)
    return passed(measured, expected)


def allowed(usual: float) -> float:
    """The rounding to be put up with, where another way to round has the usual one."""
    return 1.5 * usual + 0.01


@contextmanager
def autocast(subject: Subject, loops: bool) -> Iterator[None]:
    """The run's precision, with and without loops."""
    with subject.run.runtime.autocast(), in_loops(loops):
        yield


def gradients(model: nn.Module, subject: Subject, how: AbstractContextManager[object]) -> dict[str, Tensor]:
    """Of the loss on the batch, each tensor's in one vector, float64; what is drawn is the same each time."""
    model.zero_grad()
    loss_of(model, subject, how).backward()
    return {name: p.grad.double().flatten() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model: nn.Module, subject: Subject, how: AbstractContextManager[object]) -> Tensor:
    seed_torch(0)
    inputs, targets = (subject.tensor(array) for array in subject.batch)
    with how:
        return loss_fn(model(inputs), targets)


def slopes(subject: Subject) -> tuple[float, float]:
    """How fast the loss rises along its gradient, with the run's dropout: by the gradient's length, and by trying."""
    model = copy.deepcopy(subject.own_woken).train()
    gradient = gradients(model, subject, autocast(subject, True))
    length = float(torch.cat(list(gradient.values())).norm())
    far, losses = RISE / length, []
    for way in (1, -2):  # there, and from there as far to the other side
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in gradient:
                    p += (way * far / length * gradient[name]).view(p.shape)
        losses.append(float(loss_of(model, subject, autocast(subject, True)).detach()))
    return length, (losses[0] - losses[1]) / (2 * far)
