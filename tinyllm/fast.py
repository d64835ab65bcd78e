"""Operations of a GPT that are faster here than torch's own: the same formulas, in fewer passes over memory.

    y = rms_norm(x, weight, eps=1e-6)
    y = layer_norm(x, weight, bias, eps=1e-5)
    y = activation(x, "relu2")
    y = add_dropout(x, h, 0.2, training=True)    # x + dropout(h)
    y = attend_by_products(q, k, v, 0.0)
    loss = cross_entropy(logits, targets)

A step of a small model waits for memory more than for arithmetic: what counts is how often a tensor is read and
written, and in how many bytes. But for the loss, which saves memory everywhere, they are for the CPU: on other devices,
and for the compiler, they are torch's. A long run in bfloat16 has most of them done by compiled loops (`loops.py`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tinyllm.data import IGNORED

WIDE = 4096  # tokens of a vocabulary from which on its logits are more than a cache holds
AT_ONCE, AT_ONCE_ELSEWHERE = 1 << 19, 1 << 26  # logits: a CPU's cache holds them, to a GPU each operation must be sent
FEW = 1 << 17  # numbers up to which a call's own cost counts for more than the passes over them
EPS = torch.finfo(torch.float32).eps  # which is torch.rms_norm's in float32
IN_LOOPS = ContextVar("in_loops", default=False)


def loops_start_quickly() -> bool:
    """Have compiled loops shared out among torch's threads; False where they would wait for these."""
    from tinyllm.kernels import threads_start_quickly  # which takes a fifth of a second

    threads = torch.get_num_threads()
    quickly = threads_start_quickly(threads)
    torch.set_num_threads(threads)  # numba has told OpenMP of as many as cores: torch, too, where that is the same one
    return quickly


@contextmanager
def in_loops(wanted: bool) -> Iterator[None]:
    """Have what is computed in here done by compiled loops where there are some, as autocast has it done in 16 bits."""
    token = IN_LOOPS.set(wanted)
    try:
        yield
    finally:
        IN_LOOPS.reset(token)


def loops_for(x: Tensor) -> ModuleType | None:
    """`loops.py`, if compiled loops take this tensor: not imported before, as it takes a fifth of a second."""
    if torch.compiler.is_compiling() or not IN_LOOPS.get() or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return None
    from tinyllm import loops

    return loops


def leave_to_torch(x: Tensor) -> bool:
    """Whether torch has a quick form of its own, or makes one."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias."""
    if weight.requires_grad and torch.is_grad_enabled() and (loops := loops_for(x)):
        return loops.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = EPS) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times a weight (Zhang & Sennrich 2019, eq. 4).

    The weight in the type of x: two types have no quick form, and torch warns of that. Without gradients torch's is the
    quicker one for few numbers: a token's, while sampling.
    """
    if weight is not None and (loops := loops_for(x)):
        return loops.norm(x, weight, None, eps, rms=True)[0]
    weight = None if weight is None else weight.to(x.dtype)
    if leave_to_torch(x) or (x.numel() <= FEW and not torch.is_grad_enabled()):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return RMSNorm.apply(x, weight, eps)


class RMSNorm(Function):
    """With y = r x, r = 1 / sqrt(mean(x^2) + eps), and g the gradient of y: that of x is r (g - y mean(g y))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)  # in which a sum of squares is no sum of roundings
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        y = x * r
        ctx.save_for_backward(y, r, weight)
        return y if weight is None else y * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None]:
        y, r, weight = ctx.saved_tensors
        along = g * y
        if weight is None:
            of_weight, mean = None, along.mean(-1, keepdim=True)
        else:
            rows = along.flatten(0, -2)
            of_weight, mean = rows.sum(0), (rows @ weight).view(r.shape) / len(weight)
            g = g * weight
        return torch.addcmul(g, y, mean, value=-1).mul_(r), of_weight, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension (Ba et al. 2016)."""
    if loops := loops_for(x):
        return loops.norm(x, weight, bias, eps, rms=False)[0]
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def norm_beside(norm: nn.RMSNorm | nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x), and x for what it is a part of: loops add up the gradients of both in one pass."""
    if loops := loops_for(x):
        return loops.norm(x, norm.weight, getattr(norm, "bias", None), norm.eps, isinstance(norm, nn.RMSNorm))
    return norm(x), x


def activation(x: Tensor, name: str) -> Tensor:
    """`gelu` (Hendrycks & Gimpel 2016), `gelu_tanh`, its approximation, or `relu2`, relu(x)^2 (So et al. 2021)."""
    if name == "relu2":
        return F.relu(x).square() if leave_to_torch(x) else ReLU2.apply(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


class ReLU2(Function):
    """Its derivative is 2 relu(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.addcmul(g.new_zeros(()), g, *ctx.saved_tensors, value=2)


def add_dropout(x: Tensor, h: Tensor, p: float, training: bool) -> Tensor:
    """x + dropout(h)."""
    if training and p and (loops := loops_for(h)):
        return loops.add_dropout(x, h, p)
    return x + dropout(h, p, training)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each value with probability p and scale the others by 1 / (1 - p) (Srivastava et al. 2014).

    torch draws a mask number by number, which takes eight times as long as this: 16 random bits a value, four values a
    draw. So p is rounded to a multiple of 2^-16.
    """
    if not (training and p):
        return x
    if loops := loops_for(x):
        return loops.add_dropout(None, x, p)
    if leave_to_torch(x):
        return F.dropout(x, p)
    dropped = min(round(p * 65536), 65535)  # of so many
    seed = int(torch.empty((), dtype=torch.int64).random_())  # what torch's generator is seeded with decides all
    draws = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16))
    kept = draws.ge_(dropped - 32768)[: x.numel()].view(x.shape)  # as 0 and 1
    return x * kept.to(x.dtype).mul_(65536 / (65536 - dropped))


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Causal attention written out, (B, H, T, D) each; weights are dropped with probability p.

    To train in bfloat16: the backward pass of torch's fused kernel leaves a CPU's matrix units idle, and takes four
    times as long (torch 2.13). The price is memory, (B, H, T, T) of it.
    """
    B, H, T, D = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    ahead = q.new_full((T, T), -math.inf).triu_(1)
    with torch.autocast("cpu", enabled=False):  # which would take the softmax to float32
        scores = torch.baddbmm(ahead, q, k.mT, alpha=1 / math.sqrt(D))
        return torch.bmm(dropout(scores.softmax(-1), p, training=True), v).unflatten(0, (B, H))


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """-log softmax(logits)[target] in nats, float32, of logits (N, V) and targets (N,); IGNORED ones do not count.

    `reduction` is "mean", "sum" or "none". Those of a wide vocabulary are taken some rows at a time: torch's way is two
    copies of them all in float32, and two more for the gradient.
    """
    if logits.shape[1] < WIDE:
        return F.cross_entropy(logits.float(), targets, reduction=reduction)
    losses = CrossEntropy.apply(logits, targets)
    if reduction == "none":
        return losses
    return losses.sum() / (1 if reduction == "sum" else (targets != IGNORED).sum())


class CrossEntropy(Function):
    """Row by row log(sum(exp(logits))) - logits[target]. Its gradient is softmax(logits), less one at the target.

    Logits are taken less the largest of their row: a sum of thousands would round away what they differ by.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        at_once = AT_ONCE if logits.device.type == "cpu" else AT_ONCE_ELSEWHERE
        ctx.rows = max(1, at_once // logits.shape[1])
        largest = logits.amax(1, keepdim=True).float()
        sums = [
            (part - top).exp_().sum(1)
            for part, top in zip(logits.split(ctx.rows), largest.split(ctx.rows), strict=True)
        ]
        log_sums = torch.cat(sums).log_()[:, None]
        ctx.save_for_backward(logits, targets, largest, log_sums)
        chosen = logits.gather(1, targets.clamp(min=0)[:, None])
        return (largest - chosen + log_sums)[:, 0].masked_fill(targets == IGNORED, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        logits, targets, largest, log_sums = ctx.saved_tensors
        gradient, g = torch.empty_like(logits), g.masked_fill(targets == IGNORED, 0)
        by_rows = (gradient, logits, largest, log_sums, targets.clamp(min=0)[:, None], g[:, None])
        for out, part, top, log_sum, target, up in zip(*(x.split(ctx.rows) for x in by_rows), strict=True):
            share = (part - top).sub_(log_sum).exp_()
            share.scatter_(1, target, share.gather(1, target) - 1)
            out.copy_(share.mul_(up))
        return gradient, None
