"""Checks of the model's parts: the built-in GPT against its formula, those of another against what they are for."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinyllm.sanity.instruments import calls_of, logits_of, relative
from tinyllm.sanity.model import is_ours, stacks_of
from tinyllm.sanity.reference import reference_logits
from tinyllm.sanity.result import Result, failed, passed, skipped, warned
from tinyllm.sanity.subject import Subject


def formula(subject: Subject) -> Result:
    """The built-in model on this device computes what its papers say, written out in float64."""
    if not is_ours(subject):
        return skipped("a model of your own has no other description")
    model = subject.woken
    tokens = subject.tensor(subject.batch[0][:2, :24])
    with torch.no_grad():
        wanted = reference_logits(dict(model.named_parameters()), subject.exact.config.model, tokens)
    got = logits_of(model, tokens)
    error = relative(got.double().cpu() - wanted, wanted)
    measured, expected = f"logits differ by {error:.1e} of their size", "at most 1e-4, in float32"
    if not error < 1e-4:
        at = int((got.double().cpu() - wanted).abs().amax((0, 2)).gt(1e-4 * wanted.std()).nonzero()[0])
        diagnosis = f"the model computes something else than its formula, from position {at} on"
        fix = "model.py, or this build of torch on this device: runtime.device = cpu shows which"
        return failed(measured, expected, diagnosis, fix, values={"error": error})
    return passed(measured, expected, values={"error": error})


def building_blocks(subject: Subject) -> Result:
    """Norms take the size away, and layers bend: two matrices in a row are but one.

    A norm's output is the same for ten times its input; a network of two layers is not additive.
    """
    expected, looked_at = "norms take the size away, layers bend", 0
    for call in calls_of(subject.woken, subject.tensor(subject.batch[0])):
        name, module, x = call.name, call.module, call.args[0] if len(call.args) == 1 else None
        if not isinstance(x, Tensor) or not x.is_floating_point():
            continue
        looked_at += 1
        x = x / x.std().clamp(min=1e-6)
        if "norm" in type(module).__name__.lower() and lets_size_through(module, x):
            diagnosis = f"{name} ({type(module).__name__}) gives more for more: it does not normalise"
            return warned(f"{name} lets the size through", expected, diagnosis, "divide by the root of the mean square")
        if sum(isinstance(m, nn.Linear) for m in module.modules()) >= 2 and is_additive(module, x):
            diagnosis = f"{name} is linear: its matrices in a row could be one"
            return warned(f"{name} does not bend", expected, diagnosis, "an activation between its layers")
    return passed(f"{looked_at} modules looked at", expected)


def lets_size_through(norm: nn.Module, x: Tensor) -> bool:
    small, large = logits_of(norm, x), logits_of(norm, 10 * x)
    return isinstance(small, Tensor) and relative(large - small, small) > 0.05


def is_additive(module: nn.Module, x: Tensor) -> bool:
    y = 0.7 * x.roll(1, dims=-1)
    both, one, other, none = (logits_of(module, part) for part in (x + y, x, y, 0 * x))
    return isinstance(one, Tensor) and relative(both - one - other + none, one) < 1e-4


def residual_stream(subject: Subject) -> Result:
    """In a fresh model each block adds a little to what it gets: the way around it is open."""
    if is_ours(subject):
        return skipped("the built-in blocks are held to their formula")
    if not stacks_of(subject.fresh):
        return skipped("no stack of blocks")
    expected = "blocks that add to their input"
    if lone := without_residual(subject):
        diagnosis = f"what {lone} gives has nothing of what it gets: deep models hardly learn so"
        fix = "is a residual connection missing? x = x + block(norm(x))"
        return warned(f"{lone} replaces its input", expected, diagnosis, fix)
    return passed("what goes in comes out of each block", expected)


def attention_scale(subject: Subject) -> Result:
    """Attention scores are divided by sqrt(head size), or else the softmax saturates as training goes on.

    Queries and keys of unit variance give scores that spread by sqrt(D), and by 1 once scaled (Vaswani et al. 2017,
    3.2.1). Woken weights give about unit variance behind a norm.
    """
    if is_ours(subject):
        return skipped("the built-in attention is held to its formula")
    with Scores() as scores:
        logits_of(subject.woken, subject.tensor(subject.batch[0]))
    if not scores.spreads:
        return skipped("torch's own attention, which scales by itself")
    spread, width = max(scores.spreads)
    measured, expected = f"scores spread by {spread:.1f}, heads of {width}", "about 1"
    if width >= 8 and not 0.65 < spread < 0.5 * width**0.5:
        diagnosis = f"queries times keys spread by {spread:.2f}: the scale is missing, or is not that of a head"
        return warned(measured, expected, diagnosis, "divide the scores by the square root of the head size")
    return passed(measured, expected)


def without_residual(subject: Subject) -> str:
    """The name of a block, of several alike, whose output does not point where its input does; '' for none."""
    blocks = {
        id(block)
        for stack in stacks_of(subject.fresh).values()
        for block in stack
        if sum(isinstance(m, nn.Linear) for m in block.modules()) > 2  # a block, not a layer of one
    }
    for call in calls_of(subject.fresh, subject.tensor(subject.batch[0])):
        x, y = call.args[0] if call.args else None, call.output
        if (
            id(call.module) not in blocks
            or not isinstance(x, Tensor)
            or not isinstance(y, Tensor)
            or x.shape != y.shape
        ):
            continue
        if nn.functional.cosine_similarity(x.float().flatten(), y.float().flatten(), dim=0) < 0.3:
            return call.name
    return ""


class Scores(TorchDispatchMode):
    """Watches the softmax of square score matrices, as an attention written out takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.spreads: list[tuple[float, int]] = []  # of the visible scores, and the width of queries and keys
        self.width = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("bmm", "matmul") and args[0].dim() >= 3 and out.shape[-1] == out.shape[-2]:
            self.width = args[0].shape[-1]
        if name == "_softmax" and args[0].dim() >= 3 and args[0].shape[-1] == args[0].shape[-2] and self.width:
            scores = args[0].float()
            seen = torch.ones_like(scores, dtype=torch.bool).tril() & scores.isfinite()
            visible = scores[seen]
            self.spreads.append((float(visible.std()), self.width))
        return out
