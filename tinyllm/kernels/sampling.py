"""New tokens of each of B texts, for decode.py.

There are two ways to reckon. In float32 all is float32. In bfloat16, for weights that are bfloat16, so is whatever
products multiply, and the cache, as in an evaluation; sums, the stream and what is done number by number stay float32.
An array's type says which. In bfloat16 a text's numbers are the same to the last bit, however many are written at once.
"""

from typing import NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import overload
from numpy.typing import NDArray

from tinyllm.kernels import (
    LIMIT,
    NONE,
    ONE,
    ZERO,
    compiled,
    dot,
    exp,
    f32,
    gelu,
    gelu_tanh,
    inlined,
    narrow,
    parallel,
    silu,
    tiles,
)
from tinyllm.kernels.vectors import gather, look, pair

TILE = 4  # rows of weights by rows of texts: sixteen sums, as many as fit in the registers
ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu")
Array = NDArray[np.float32]
Packed = NDArray[np.uint16]  # bfloat16


class Stack(NamedTuple):
    """The weights of all L blocks; biases that there are not are (L, 0)."""

    norm_1_weight: Array  # (L, C)
    norm_1_bias: Array
    qkv_weight: Array | Packed  # (L, 3 C, C)
    qkv_bias: Array
    proj_weight: Array | Packed
    proj_bias: Array
    norm_2_weight: Array
    norm_2_bias: Array
    fc_weight: Array | Packed
    fc_bias: Array
    mlp_weight: Array | Packed
    mlp_bias: Array


class Form(NamedTuple):
    """What kind of GPT it is."""

    eps: float
    rms: bool
    head_size: int
    qk_eps: float  # 0: queries and keys are not normed
    hidden: int  # numbers between the MLP's products
    activation: int  # its place in ACTIVATIONS


class Room(NamedTuple):
    """Where the numbers of new tokens are kept on their way, a row each; in bfloat16 with room for whole tiles."""

    x: Array  # (rows, C), the stream
    normed: Array | Packed  # (rows, C)
    qkv: Array  # (rows, 3 C)
    said: Array | Packed  # (rows, C), by the heads
    fc: Array  # (rows, hidden), or twice that for SwiGLU
    active: Array | Packed  # (rows, hidden)
    queries: Array  # (B, H, D)
    scores: Array  # (B, H, size)


@compiled
def say(rows, room, stack, keys, values, at, cos, sin, form, units):
    """All blocks, for the new tokens of B texts at positions from `at` on, whose embeddings are the rows of room.x."""
    for layer in range(len(keys)):
        norm(rows, room.x, stack.norm_1_weight[layer], stack.norm_1_bias[layer], form.eps, form.rms, room.normed)
        multiply(rows, room.normed, stack.qkv_weight[layer], stack.qkv_bias[layer], room.qkv, False, units)
        attend(rows, room, keys[layer], values[layer], at, form, cos, sin)
        multiply(rows, room.said, stack.proj_weight[layer], stack.proj_bias[layer], room.x, True, units)
        norm(rows, room.x, stack.norm_2_weight[layer], stack.norm_2_bias[layer], form.eps, form.rms, room.normed)
        multiply(rows, room.normed, stack.fc_weight[layer], stack.fc_bias[layer], room.fc, False, units)
        activate(rows, room.fc, form.hidden, form.activation, room.active)
        multiply(rows, room.active, stack.mlp_weight[layer], stack.mlp_bias[layer], room.x, True, units)


@compiled
def conclude(rows, room, form, weight, bias, head, logits, units):
    """The last norm and the head."""
    norm(rows, room.x, weight, bias, form.eps, form.rms, room.normed)
    multiply(rows, room.normed, head, NONE, logits, False, units)


def fit(x, out):
    """A float32, as the array keeps it."""


@overload(fit)
def fitting(x, out):
    if out.dtype == types.uint16:
        return lambda x, out: narrow(x)
    return lambda x, out: x


@compiled
def norm(rows, x, weight, bias, eps, rms, out):
    """LayerNorm, or RMSNorm, of each of the rows, by C weights; no bias for NONE."""
    C = weight.size
    for b in range(rows):
        mean = variance = ZERO
        if not rms:
            for c in range(C):
                mean += x[b, c]
            mean /= f32(C)
        for c in range(C):
            variance += (x[b, c] - mean) * (x[b, c] - mean)
        r = ONE / np.sqrt(variance / f32(C) + f32(eps))
        if bias.size:
            for c in range(C):
                out[b, c] = fit((x[b, c] - mean) * r * weight[c] + bias[c], out)
        else:
            for c in range(C):
                out[b, c] = fit((x[b, c] - mean) * r * weight[c], out)


def multiply(rows, x, weight, bias, out, add, units):
    """The first rows of out = x weight^T + bias, or that added to them, as the weights are laid out for."""


@overload(multiply)
def multiplying(rows, x, weight, bias, out, add, units):
    if weight.dtype == types.uint16:
        return lambda rows, x, weight, bias, out, add, units: tiles.product(rows, x, weight, bias, out, add, units)
    return lambda rows, x, weight, bias, out, add, units: linear(rows, x, weight, bias, out, add)


@parallel
def linear(rows, x, weight, bias, out, add):
    """(rows, K), (N, K) -> (rows, N), in float32; there is room for many rows to be a multiple of TILE."""
    N = len(weight)
    if rows == 1:
        for n in prange(N):
            out[0, n] = start(out, bias, add, 0, n) + dot(x[0], weight[n])
    else:
        for tile in prange(N // TILE):
            for b in range(0, rows, TILE):
                multiply_tile(x, weight, bias, out, add, b, tile * TILE)
        for n in range(N - N % TILE, N):  # what is left over
            for b in range(rows):
                out[b, n] = start(out, bias, add, b, n) + dot(x[b], weight[n])


@inlined
def start(out, bias, add, b, n):
    """What a product is added to."""
    return (out[b, n] if add else ZERO) + (bias[n] if bias.size else ZERO)


@inlined
def multiply_tile(x, weight, bias, out, add, b, n):
    """Four rows by four: sixteen sums at once, for eight numbers read."""
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = ZERO
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = ZERO
    for k in range(x.shape[1]):
        x0, x1, x2, x3 = x[b, k], x[b + 1, k], x[b + 2, k], x[b + 3, k]
        w0, w1, w2, w3 = weight[n, k], weight[n + 1, k], weight[n + 2, k], weight[n + 3, k]
        s00, s01, s02, s03 = s00 + x0 * w0, s01 + x0 * w1, s02 + x0 * w2, s03 + x0 * w3
        s10, s11, s12, s13 = s10 + x1 * w0, s11 + x1 * w1, s12 + x1 * w2, s13 + x1 * w3
        s20, s21, s22, s23 = s20 + x2 * w0, s21 + x2 * w1, s22 + x2 * w2, s23 + x2 * w3
        s30, s31, s32, s33 = s30 + x3 * w0, s31 + x3 * w1, s32 + x3 * w2, s33 + x3 * w3
    sums = ((s00, s01, s02, s03), (s10, s11, s12, s13), (s20, s21, s22, s23), (s30, s31, s32, s33))
    for i in range(TILE):
        for j in range(TILE):
            out[b + i, n + j] = start(out, bias, add, b + i, n + j) + sums[i][j]


@parallel
def attend(rows, room, keys, values, at, form, cos, sin):
    """Each head of each text: its keys and values into the cache, then softmax(q k^T / sqrt(D)) v of all up to it.

    room.qkv has, row by row, the new tokens of the first text, of the second, ...; keys and values (B, H, size, D), or
    wider, are filled from `at` on; queries and keys are rotated by cos and sin (positions, D) unless these are NONE.
    """
    B, H = keys.shape[:2]
    T, D, qkv, qk_eps, out = rows // B, form.head_size, room.qkv, form.qk_eps, room.said
    for i in prange(B * H):
        b, h = i // H, i % H
        for t in range(T):
            row, first = b * T + t, h * D
            q = qkv[row, first : first + D]
            k = qkv[row, first + H * D : first + H * D + D]
            v = qkv[row, first + 2 * H * D : first + 2 * H * D + D]
            said = out[row, first : first + D]
            for x in (q, k):
                if qk_eps:
                    normalize(x, qk_eps)
                if cos.size:
                    rotate(x, cos[t], sin[t])
            ask(q, k, v, keys[b, h], values[b, h], at + t, room.queries[b, h], room.scores[b, h])
            for d in range(D):
                said[d] = fit(q[d], out)


def ask(q, k, v, keys, values, at, query, weights):
    """A key and a value (D,) into the cache, (size, D), and in place of the query what it finds up to these."""


@overload(ask)
def asking(q, k, v, keys, values, at, query, weights):
    if keys.dtype == types.uint16:
        return lambda q, k, v, keys, values, at, query, weights: ask_pairs(q, k, v, keys, values, at, query, weights)
    return lambda q, k, v, keys, values, at, query, weights: ask_floats(q, k, v, keys, values, at, weights)


@inlined
def ask_floats(q, k, v, keys, values, at, weights):
    for d in range(q.size):
        keys[at, d], values[at, d] = k[d], v[d]
    for t in range(at + 1):
        weights[t] = dot(q, keys[t])
    softmax(weights[: at + 1], q.size)
    for d in range(q.size):
        q[d] = ZERO
    for t in range(at + 1):
        for d in range(q.size):
            q[d] += weights[t] * values[t, d]


@inlined
def ask_pairs(q, k, v, keys, values, at, query, weights):
    """With pairs of a number from the first half of a key or value, and one from the second; both filled with zeros."""
    D, half, row = q.size, query.size // 2, query.size * keys.itemsize
    size, whole = half * query.itemsize, query.size == D
    if whole:
        place = q.ctypes.data
        pair(k.ctypes.data, size, keys[at].ctypes.data)
        pair(v.ctypes.data, size, values[at].ctypes.data)
    else:
        place = query.ctypes.data
        spread(q, k, v, query, keys[at], values[at])
    look(place, size, keys.ctypes.data, row, at + 1, weights.ctypes.data)
    softmax(weights[: at + 1], D)
    gather(weights.ctypes.data, values.ctypes.data, row, at + 1, size, place)
    if not whole:
        middle = D - D // 2
        for d in range(D):
            q[d] = query[d if d < middle else half + d - middle]


@inlined
def spread(q, k, v, query, key, value):
    """Where numbers do not fill whole vectors: a query (D,) in two halves, a key and a value in pairs."""
    half, middle = query.size // 2, q.size - q.size // 2
    for d in range(middle):
        query[d], key[2 * d], value[2 * d] = q[d], narrow(k[d]), narrow(v[d])
    for d in range(middle, q.size):
        e = d - middle
        query[half + e], key[2 * e + 1], value[2 * e + 1] = q[d], narrow(k[d]), narrow(v[d])


@inlined
def softmax(x, D):
    """Of x / sqrt(D), in place."""
    scale, largest, total = ONE / np.sqrt(f32(D)), largest_of(x), ZERO
    for t in range(x.size):
        x[t] = exp((x[t] - largest) * scale)
        total += x[t]
    for t in range(x.size):
        x[t] /= total


@inlined
def largest_of(x):
    """The largest of float32 numbers (N,), N > 0, found among their bits: integers have a quick max."""
    order = np.int32(-(2**31))
    for i in range(x.size):
        order = max(order, in_order(f32(x[i]).view(np.int32)))
    return np.int32(in_order(order)).view(np.float32)


@inlined
def in_order(bits):
    """The bits of a float32 as a number of the same order, and back."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@inlined
def normalize(x, eps):
    """RMSNorm without weights, in place."""
    r = ONE / np.sqrt(dot(x, x) / f32(x.size) + f32(eps))
    for d in range(x.size):
        x[d] *= r


@inlined
def rotate(x, cos, sin):
    """As `model.rotate`, in place."""
    half = x.size // 2
    for d in range(half):
        a, b = x[d], x[d + half]
        x[d], x[d + half] = a * cos[d] + b * sin[d], b * cos[d + half] + a * sin[d + half]


@parallel
def activate(rows, x, hidden, kind, out):
    """What stands between the MLP's two products, (rows, hidden), by its place in ACTIVATIONS.

    SwiGLU's x is twice as wide, with the gate in the first half.
    """
    for b in prange(rows):
        if kind == 0:
            for n in range(hidden):
                out[b, n] = fit(gelu(x[b, n]), out)
        elif kind == 1:
            for n in range(hidden):
                out[b, n] = fit(gelu_tanh(x[b, n]), out)
        elif kind == 2:
            for n in range(hidden):
                out[b, n] = fit(max(x[b, n], ZERO) ** 2, out)
        else:
            for n in range(hidden):
                out[b, n] = fit(silu(x[b, n]) * x[b, hidden + n], out)


@compiled
def draw(logits, temperature, draws, out):
    """Ids (B,), on which the draws (B,) in [0, 1) fall in the cumulative softmax(logits / temperature), (B, V)."""
    B, V = logits.shape
    for b in range(B):
        row = logits[b]
        largest = np.float64(largest_of(row))
        total, per_temperature = 0.0, min(1.0 / temperature, 1e300)
        for v in range(V):
            total += share(row[v] - largest, per_temperature)
        out[b], so_far = V - 1, 0.0
        for v in range(V):
            so_far += share(row[v] - largest, per_temperature)
            if so_far > draws[b] * total:
                out[b] = v
                break


@inlined
def share(difference, per_temperature):
    """e^(difference / temperature); zero for what has no chance, whatever `exp` makes of it."""
    scaled = f32(difference * per_temperature)
    term = exp(scaled)
    return term if scaled > -LIMIT else ZERO
