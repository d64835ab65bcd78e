"""Operations of a GPT in compiled loops, to train it in bfloat16 on a CPU: one pass over memory for each, or two.

    y = linear(x, weight, bias)
    y = mlp(x, fc, proj, "gelu")                   # proj(gelu(fc(x)))
    y = add_dropout(x, h, 0.2)                     # x + dropout(h)
    y, x = norm(x, weight, bias, eps, rms=False)   # and x, for what goes around
    y = attend(qkv, n_head, qk_eps, rope, 0.0)

torch takes several passes where there are several operations, and its elementwise ones convert each number to float32
and back. Products are torch's, but for attention's and those of the weights' gradients where a CPU has tile units.
`fast.py` says when these take its place; the loops are in `kernels/`.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.profiler import record_function

from tinyllm.kernels import NONE, attention, f32, products, training
from tinyllm.kernels.products import DEEP
from tinyllm.kernels.tiles import BLOCK, has_units
from tinyllm.kernels.training import PARTS

POINTWISE = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
CACHE = 1 << 20  # bytes of sums that a core can have beside what it multiplies
NO_TABLE = NONE.reshape(0, 0)


def bits(x: Tensor) -> NDArray[np.uint16]:
    """A bfloat16 tensor's memory, as NumPy sees it."""
    return x.detach().view(torch.uint16).numpy()


@cache
def tables(name: str) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """What a function and its derivative are at each of the 65,536 numbers that a bfloat16 can be, by torch."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        x = every.float().requires_grad_()
        (slopes,) = torch.autograd.grad(POINTWISE[name](x).sum(), x)
    return bits(POINTWISE[name](every)), slopes.numpy()


def drop(h: Tensor, x: Tensor | None, p: float, seed: int) -> Tensor:
    """x + dropout(h), or dropout(h) alone, with what a seed draws. p is rounded to a multiple of 2^-16."""
    dropped = min(round(p * 65536), 65535)
    out, h = torch.empty_like(h, memory_format=torch.contiguous_format), h.contiguous()
    onto = NONE.view(np.uint16) if x is None else bits(x.contiguous()).ravel()
    scale = f32(65536 / (65536 - dropped))
    training.drop(bits(h).ravel(), onto, np.uint64(seed), np.uint16(dropped), scale, bits(out).ravel())
    return out


def drawn() -> int:
    """A seed that follows from torch's generator."""
    return int(torch.empty((), dtype=torch.int64).random_())


def add_dropout(x: Tensor | None, h: Tensor, p: float) -> Tensor:
    """x + dropout(h) (x None: dropout(h)). The mask is drawn again for the gradient, instead of being kept."""
    return AddDropout.apply(x, h, p)


class AddDropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor | None, h: Tensor, p: float) -> Tensor:
        ctx.p, ctx.seed, ctx.alone = p, drawn(), x is None
        return drop(h, x, p, ctx.seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, None]:
        return None if ctx.alone else g, drop(g, None, ctx.p, ctx.seed), None


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """LayerNorm (Ba et al. 2016) over the last dimension, or RMSNorm; weight and bias in float32. And x as it is.

    For whoever adds to x what is made of its norm: the gradient of the one is then added to that of the other in the
    same pass.
    """
    return Norm.apply(x, weight, bias, eps, rms)


class Norm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
    ) -> tuple[Tensor, Tensor]:
        around, x, C = x, x.contiguous(), x.shape[-1]
        y, means, scales = torch.empty_like(x), *torch.empty(2, x.numel() // C)
        parameters = weight.detach().numpy(), NONE if bias is None else bias.detach().numpy()
        training.normed(
            bits(x).reshape(-1, C), *parameters, eps, rms, bits(y).reshape(-1, C), means.numpy(), scales.numpy()
        )
        ctx.save_for_backward(x, weight, means, scales)
        ctx.rms, ctx.has_bias = rms, bias is not None
        ctx.set_materialize_grads(False)
        return y, around

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor | None, more: Tensor | None) -> tuple[Tensor | None, ...]:
        if g is None:
            return more, None, None, None, None
        x, weight, means, scales = ctx.saved_tensors
        out, C = torch.empty_like(x), x.shape[-1]
        of_weight, of_bias = torch.zeros(PARTS, C), torch.zeros(PARTS, C if ctx.has_bias else 0)
        rows = (x.new_empty(0, C) if y is None else y.contiguous().view(-1, C) for y in (x, g, more))
        known = weight.detach().numpy(), means.numpy(), scales.numpy(), ctx.rms
        training.normed_slope(*map(bits, rows), *known, bits(out).reshape(-1, C), of_weight.numpy(), of_bias.numpy())
        return out, of_weight.sum(0), of_bias.sum(0) if ctx.has_bias else None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias; weight and bias in float32, and so are their gradients."""
    return Linear.apply(x, weight, bias)


class Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias.to(x.dtype) if ctx.has_bias else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        return g @ weight, *slopes_of(g, x, ctx.has_bias)


def mlp(x: Tensor, fc: nn.Linear, proj: nn.Linear, name: str) -> Tensor:
    """proj(activation(fc(x))), the activation one of POINTWISE, looked up."""
    return MLP.apply(x, fc.weight, fc.bias, proj.weight, proj.bias, name)


class MLP(Function):
    """All at once, since the gradient of what is the widest by far can then take the place of the one that it is of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        fc, fc_bias, proj, proj_bias = (None if p is None else p.to(x.dtype) for p in parameters[:4])
        hidden = F.linear(x, fc, fc_bias)
        active, ctx.name = torch.empty_like(hidden), parameters[4]
        with record_function("activations"):
            training.look_up(bits(hidden).ravel(), tables(ctx.name)[0], bits(active).ravel())
        ctx.save_for_backward(x, hidden, active, fc, proj)
        ctx.has_biases = fc_bias is not None, proj_bias is not None
        return F.linear(active, proj, proj_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, hidden, active, fc, proj = ctx.saved_tensors
        of_proj, slope = slopes_of(g, active, ctx.has_biases[1]), g @ proj
        with record_function("activations"):
            training.look_up_slope(bits(hidden).ravel(), tables(ctx.name)[1], bits(slope).ravel())
        return slope @ fc, *slopes_of(slope, x, ctx.has_biases[0]), *of_proj, None


def slopes_of(g: Tensor, x: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of a layer's weights and bias, from that of its output and its input."""
    g, x = g.flatten(0, -2), x.flatten(0, -2)
    return summed_over_rows(g, x), g.sum(0, dtype=torch.float32) if has_bias else None


def summed_over_rows(y: Tensor, x: Tensor) -> Tensor:
    """y^T x (M, K), float32, of y (N, M) and x (N, K) in bfloat16."""
    (N, M), K = y.shape, x.shape[1]
    if not has_units() or N % BLOCK or M % BLOCK or K % BLOCK:
        return (y.mT @ x).float()
    out, across = torch.empty(M, K), M < K
    if across:  # the narrower one is laid out for all cores, the wider one by the core that it is for
        y, x, M, K = x, y, K, M
    threads = torch.get_num_threads()
    parts = min(threads * math.ceil(4 * M * K / threads / CACHE), M // BLOCK)
    width = math.ceil(M // BLOCK / parts) * BLOCK
    left, woven, sums = torch.empty_like(x), x.new_empty(parts, DEEP * width), torch.empty(parts, K * width)
    with record_function("matrix products"):
        products.laid_left(bits(x.contiguous()), bits(left))
        products.multiply(bits(left), bits(y.contiguous()), bits(woven), sums.numpy(), across, out.numpy())
    return out


def attend(qkv: Tensor, n_head: int, qk_eps: float, rope: tuple[Tensor, Tensor] | None, p: float) -> Tensor:
    """Causal attention of qkv (B, T, 3 C) to (B, T, C), written out.

    Queries and keys are normed if qk_eps is not zero, and rotated by rope's cos and sin, (T, 1, D) each, if given;
    weights are dropped with probability p. The price is memory, (B, H, T, T) of it.
    """
    tables = (NO_TABLE, NO_TABLE) if rope is None else tuple(table[:, 0].float().numpy() for table in rope)
    T, D = qkv.shape[1], qkv.shape[2] // 3 // n_head
    if has_units() and not p and T % BLOCK == 0 and D % BLOCK == 0:
        return AttentionInTiles.apply(qkv, n_head, qk_eps, tables)
    return Attention.apply(qkv, n_head, qk_eps, tables, p)


class AttentionInTiles(Function):
    """Head by head, each within a core's cache, by tile units."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int, qk_eps: float, tables: tuple) -> Tensor:
        qkv, (B, T, C) = qkv.contiguous().unflatten(2, (3, n_head, -1)), (*qkv.shape[:2], qkv.shape[2] // 3)
        D = C // n_head
        rooms = qkv.new_empty(torch.get_num_threads(), attention.room(T, D))
        weights, out = qkv.new_empty(B * n_head, T * (T + BLOCK) // 2), qkv.new_empty(B, T, n_head, D)
        ctx.known = qk_eps, *tables, f32(1 / math.sqrt(D))
        attention.attended(bits(qkv), *ctx.known, bits(rooms), bits(weights), bits(out))
        ctx.save_for_backward(qkv, weights)
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        qkv, weights = ctx.saved_tensors
        _, T, _, H, D = qkv.shape
        rooms, out = qkv.new_empty(torch.get_num_threads(), attention.room_for_slope(T, D)), torch.empty_like(qkv)
        up = g.contiguous().unflatten(2, (H, D))
        attention.attended_slope(bits(qkv), bits(weights), bits(up), *ctx.known, bits(rooms), bits(out))
        return out.flatten(2), None, None, None


class Attention(Function):
    """All heads at a time, by torch's products: with dropout, without units, or for lengths that do not fit these."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, n_head: int, qk_eps: float, tables: tuple, p: float) -> Tensor:
        B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        D = C // n_head
        apart, scales = qkv.new_empty(3, B, n_head, T, D), torch.empty(2, B, n_head, T)
        heads = bits(qkv.contiguous()).reshape(B, T, 3, n_head, D)
        training.heads_apart(heads, qk_eps, *tables, bits(apart), scales.numpy())
        q, k, v = apart.flatten(1, 2)
        weights = torch.bmm(q, k.mT)
        training.causal_softmax(bits(weights), f32(1 / math.sqrt(D)))
        ctx.p, ctx.seed = p, drawn() if p else 0
        kept = drop(weights, None, p, ctx.seed) if p else weights
        ctx.save_for_backward(apart, scales, weights, kept)
        ctx.qk_eps, ctx.tables = qk_eps, tables
        return moved(torch.bmm(kept, v).view(B, n_head, T, D)).view(B, T, C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        apart, scales, weights, kept = ctx.saved_tensors
        _, B, H, T, D = apart.shape
        q, k, v = apart.flatten(1, 2)
        up = moved(g.contiguous().view(B, T, H, D)).flatten(0, 1)
        of_apart = torch.empty_like(apart)
        of_q, of_k, of_v = of_apart.flatten(1, 2)
        torch.bmm(kept.mT, up, out=of_v)
        of_weights = torch.bmm(up, v.mT)
        if ctx.p:
            of_weights = drop(of_weights, None, ctx.p, ctx.seed)
        training.causal_softmax_slope(bits(weights), bits(of_weights), f32(1 / math.sqrt(D)))
        torch.bmm(of_weights, k, out=of_q)
        torch.bmm(of_weights.mT, q, out=of_k)
        out = torch.empty(B, T, 3, H, D, dtype=torch.bfloat16)
        training.heads_together(bits(apart), bits(of_apart), ctx.qk_eps, *ctx.tables, scales.numpy(), bits(out))
        return out.view(B, T, 3 * H * D), None, None, None, None


def moved(x: Tensor) -> Tensor:
    """(B, M, N, D) as (B, N, M, D)."""
    B, M, N, D = x.shape
    out = x.new_empty(B, N, M, D)
    training.rows_moved(bits(x), bits(out))
    return out
