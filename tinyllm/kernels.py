"""Loops that numba compiles for this machine, where torch's operations are too many or pass over memory too often.

What is here knows arrays and numbers only, and is all that is compiled: numba keeps the machine code beside this file
and looks at no other to see whether it is still true. Functions of one number are written without branches and without
calls of a C library, so that the loop around them is done eight or sixteen numbers at a time.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import prange, types
from numba.core import event
from numba.core.caching import FunctionCache
from numba.extending import overload
from numpy.typing import NDArray

# Sums may be taken in any order, products and sums at once; nan and infinity stay what they are.
FAST = {"reassoc", "contract", "arcp", "nsz"}
f32 = np.float32
ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)
NONE = np.zeros(0, dtype=np.float32)  # stands for an array that there is not


class Kept(FunctionCache):
    """Machine code in files: a full disk, or a damaged file, costs the time to compile again, and not the run."""

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a damaged pickle can raise anything
            with suppress(OSError):
                self.flush()
            return None


def compiled(function: Callable[..., Any], parallel: bool = False) -> Callable[..., Any]:
    """A loop, compiled when it is first called, which is kept for all later processes if there is a place for it."""
    loop = inlined(function, parallel=parallel)
    with suppress(RuntimeError):  # no folder that could be written to
        loop._cache = Kept(function)  # where numba's own `cache=True` puts what Kept is made of
    return loop


def inlined(function: Callable[..., Any], parallel: bool = False) -> Callable[..., Any]:
    """A part of loops, which they are compiled with."""
    return numba.njit(fastmath=FAST, error_model="numpy", parallel=parallel)(function)


def parallel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A loop whose `prange` is shared out among the cores."""
    return compiled(function, parallel=True)


class Listener(event.Listener):
    """Calls a function when the first loop is about to be compiled."""

    def __init__(self, say: Callable[[], None]) -> None:
        self.say, self.said = say, False

    def on_start(self, event: event.Event) -> None:
        if not self.said:
            self.said = True
            self.say()

    def on_end(self, event: event.Event) -> None:
        pass


def before_compiling(say: Callable[[], None]) -> None:
    """Have `say` called, once, should this process wait until loops are compiled: the first on a machine does."""
    event.register("numba:compile", Listener(say))


def threads_start_quickly(threads: int) -> bool:
    """Have loops shared out among so many threads; False where starting these takes longer than most loops here.

    It does with the last of what numba can start them with, where there is no OpenMP: a tenth of a millisecond.
    """
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    clear(np.zeros(2, np.float32))  # only after the first loop is it known what starts them
    return numba.threading_layer() != "workqueue"


@parallel
def clear(x):
    for i in prange(x.size):
        x[i] = ZERO


# ---- Functions of one number ----

LIMIT = f32(60)  # e^-60 is nothing beside 1, and still far from the smallest numbers, which are slow to reckon with
LOG2_E, LN2_HIGH, LN2_LOW = f32(math.log2(math.e)), f32(0.693359375), f32(math.log(2) - 0.693359375)
E2, E3, E4, E5, E6, E7 = (
    f32(e) for e in (0.50000001201, 0.16666665459, 0.041665795894, 8.3334519073e-3, 1.3981999507e-3, 1.98756915e-4)
)
T = f32(0.3275911 / math.sqrt(2))
A1, A2, A3, A4, A5 = (f32(a / 2) for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))
TANH, CUBE = f32(-2 * math.sqrt(2 / math.pi)), f32(0.044715)


def widen(x):
    """A number as float32; one of 16 bits (uint16) is a bfloat16, the upper half of a float32."""


@overload(widen, jit_options={"fastmath": FAST})
def widened(x):
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@inlined
def exp(x):
    """e^x, for |x| <= 60: 2^n e^r with |r| <= ln(2) / 2, that by a polynomial of the Cephes library; exact to 2e-7."""
    x = -LIMIT if x < -LIMIT else x
    x = LIMIT if x > LIMIT else x
    n = np.int32(x * LOG2_E + (HALF if x > ZERO else -HALF))
    k = f32(n)
    r = x - k * LN2_HIGH - k * LN2_LOW
    p = ((((E7 * r + E6) * r + E5) * r + E4) * r + E3) * r + E2
    return (p * r * r + r + ONE) * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@inlined
def gelu(x):
    """x times the normal distribution's share below x, that by Abramowitz & Stegun 7.1.26; wrong by 1e-7."""
    t = ONE / (ONE + T * abs(x))
    tail = ((((A5 * t + A4) * t + A3) * t + A2) * t + A1) * t * exp(-HALF * x * x)
    return x * (tail if x < ZERO else ONE - tail)


@inlined
def gelu_tanh(x):
    """GPT-2's: x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    return x / (ONE + exp(TANH * (x + CUBE * x * x * x)))


@inlined
def silu(x):
    """x / (1 + e^-x)."""
    return x / (ONE + exp(-x))


# ---- One token of each of B texts, for decode.py; several are padded to a multiple of TILE ----

TILE = 4  # rows of weights by rows of texts: sixteen sums, as many as fit in the registers
ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu")
Array = NDArray[np.float32]
Matrix = NDArray[np.float32] | NDArray[np.uint16]  # bfloat16, in the second


class Stack(NamedTuple):
    """The weights of all L blocks; biases that there are not are (L, 0)."""

    norm_1_weight: Array  # (L, C)
    norm_1_bias: Array
    qkv_weight: Matrix  # (L, 3 C, C)
    qkv_bias: Array
    proj_weight: Matrix
    proj_bias: Array
    norm_2_weight: Array
    norm_2_bias: Array
    fc_weight: Matrix
    fc_bias: Array
    mlp_weight: Matrix
    mlp_bias: Array


class Form(NamedTuple):
    """What kind of GPT it is."""

    eps: float
    rms: bool
    qk_eps: float  # 0: queries and keys are not normed
    activation: int  # its place in ACTIVATIONS


class Room(NamedTuple):
    """Where a token's numbers are kept on their way."""

    x: Array  # (B, C), the stream
    normed: Array  # (B, C)
    qkv: Array  # (B, 3 C)
    said: Array  # (B, C), by the heads
    fc: Array  # (B, hidden), or twice that for SwiGLU
    active: Array  # (B, hidden)
    scores: Array  # (B, H, size)


@compiled
def say(room, stack, keys, values, at, cos, sin, form, norm_weight, norm_bias, head, logits):
    """All blocks, the last norm and the head, of tokens at position `at` whose embeddings are room.x."""
    for layer in range(len(keys)):
        norm(room.x, stack.norm_1_weight[layer], stack.norm_1_bias[layer], form.eps, form.rms, room.normed)
        linear(room.normed, stack.qkv_weight[layer], stack.qkv_bias[layer], room.qkv, False)
        attend(room.qkv, keys[layer], values[layer], at, form.qk_eps, cos, sin, room.scores, room.said)
        linear(room.said, stack.proj_weight[layer], stack.proj_bias[layer], room.x, True)
        norm(room.x, stack.norm_2_weight[layer], stack.norm_2_bias[layer], form.eps, form.rms, room.normed)
        linear(room.normed, stack.fc_weight[layer], stack.fc_bias[layer], room.fc, False)
        activate(room.fc, form.activation, room.active)
        linear(room.active, stack.mlp_weight[layer], stack.mlp_bias[layer], room.x, True)
    norm(room.x, norm_weight, norm_bias, form.eps, form.rms, room.normed)
    linear(room.normed, head, NONE, logits, False)


@compiled
def norm(x, weight, bias, eps, rms, out):
    """LayerNorm, or RMSNorm, of each row of (B, C); no bias for NONE."""
    B, C = x.shape
    for b in range(B):
        mean = variance = ZERO
        if not rms:
            for c in range(C):
                mean += x[b, c]
            mean /= f32(C)
        for c in range(C):
            variance += (x[b, c] - mean) * (x[b, c] - mean)
        r = ONE / np.sqrt(variance / f32(C) + f32(eps))
        for c in range(C):
            out[b, c] = (x[b, c] - mean) * r * weight[c]
        if bias.size:
            for c in range(C):
                out[b, c] += bias[c]


@parallel
def linear(x, weight, bias, out, add):
    """out = x weight^T + bias, or that added to it: (B, K), (N, K) -> (B, N). Weights are float32, or bfloat16."""
    B, N = out.shape
    if B == 1:
        for n in prange(N):
            out[0, n] = start(out, bias, add, 0, n) + dot(x[0], weight[n])
    else:
        for tile in prange(N // TILE):
            for b in range(0, B, TILE):
                multiply_tile(x, weight, bias, out, add, b, tile * TILE)
        for n in range(N - N % TILE, N):  # what is left over
            for b in range(B):
                out[b, n] = start(out, bias, add, b, n) + dot(x[b], weight[n])


@inlined
def start(out, bias, add, b, n):
    """What a product is added to."""
    return (out[b, n] if add else ZERO) + (bias[n] if bias.size else ZERO)


@inlined
def dot(x, weight):
    total = ZERO
    for k in range(x.size):
        total += x[k] * widen(weight[k])
    return total


@inlined
def multiply_tile(x, weight, bias, out, add, b, n):
    """Four rows by four: sixteen sums at once, for eight numbers read."""
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = ZERO
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = ZERO
    for k in range(x.shape[1]):
        x0, x1, x2, x3 = x[b, k], x[b + 1, k], x[b + 2, k], x[b + 3, k]
        w0, w1 = widen(weight[n, k]), widen(weight[n + 1, k])
        w2, w3 = widen(weight[n + 2, k]), widen(weight[n + 3, k])
        s00, s01, s02, s03 = s00 + x0 * w0, s01 + x0 * w1, s02 + x0 * w2, s03 + x0 * w3
        s10, s11, s12, s13 = s10 + x1 * w0, s11 + x1 * w1, s12 + x1 * w2, s13 + x1 * w3
        s20, s21, s22, s23 = s20 + x2 * w0, s21 + x2 * w1, s22 + x2 * w2, s23 + x2 * w3
        s30, s31, s32, s33 = s30 + x3 * w0, s31 + x3 * w1, s32 + x3 * w2, s33 + x3 * w3
    sums = ((s00, s01, s02, s03), (s10, s11, s12, s13), (s20, s21, s22, s23), (s30, s31, s32, s33))
    for i in range(TILE):
        for j in range(TILE):
            out[b + i, n + j] = start(out, bias, add, b + i, n + j) + sums[i][j]


@parallel
def attend(qkv, keys, values, at, qk_eps, cos, sin, scores, out):
    """Each head of each text: its key and value into the cache, then softmax(q k^T / sqrt(D)) v of all there are.

    qkv (B, 3 H D); keys and values (B, H, size, D), to be filled at `at`; queries and keys are normed where qk_eps is
    not zero, and rotated by cos and sin (D,) unless these are NONE; scores (B, H, size); out (B, H D).
    """
    B, H, _, D = keys.shape
    for pair in prange(B * H):
        b, h = pair // H, pair % H
        heads, weights = qkv[b].reshape((3 * H, D)), scores[b, h]
        q, k, v, y = heads[h], heads[H + h], heads[2 * H + h], out[b].reshape((H, D))[h]
        for x in (q, k):
            if qk_eps:
                normalize(x, qk_eps)
            if cos.size:
                rotate(x, cos, sin)
        for d in range(D):
            keys[b, h, at, d], values[b, h, at, d], y[d] = k[d], v[d], ZERO
        scale, largest, total = ONE / np.sqrt(f32(D)), f32(-np.inf), ZERO
        for t in range(at + 1):
            weights[t] = dot(q, keys[b, h, t]) * scale
            largest = max(largest, weights[t])
        for t in range(at + 1):
            weights[t] = exp(weights[t] - largest)
            total += weights[t]
        for t in range(at + 1):
            weight = weights[t] / total
            for d in range(D):
                y[d] += weight * values[b, h, t, d]


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
def activate(x, kind, out):
    """What stands between the MLP's two products, (B, hidden), by its place in ACTIVATIONS.

    SwiGLU's x is twice as wide, with the gate in the first half.
    """
    B, N = out.shape
    for b in prange(B):
        if kind == 0:
            for n in range(N):
                out[b, n] = gelu(x[b, n])
        elif kind == 1:
            for n in range(N):
                out[b, n] = gelu_tanh(x[b, n])
        elif kind == 2:
            for n in range(N):
                out[b, n] = max(x[b, n], ZERO) ** 2
        else:
            for n in range(N):
                out[b, n] = silu(x[b, n]) * x[b, N + n]


@compiled
def draw(logits, temperature, draws, out):
    """Ids (B,), on which the draws (B,) in [0, 1) fall in the cumulative softmax(logits / temperature), (B, V)."""
    B, V = logits.shape
    for b in range(B):
        row = logits[b]
        order = np.int32(-(2**31))
        for v in range(V):
            order = max(order, in_order_32(f32(row[v]).view(np.int32)))
        largest = np.float64(np.int32(in_order_32(order)).view(np.float32))
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


@inlined
def in_order_32(bits):
    """As `in_order`, of a float32."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


# ---- Training in bfloat16, for fast.py: bfloat16 numbers are uint16 here, and are reckoned with in float32 ----

PART = 4096  # numbers that a core takes at a time; loops over a slice of an array are quicker than over its places
STRIDE = 32  # numbers: four vectors, as many as a loop takes at a time
PARTS = 64  # of rows, whatever the number of cores: sums of them are always added in the same order


@inlined
def narrow(x):
    """A float32 as bfloat16, to the nearest, of two to the even one."""
    n = f32(x).view(np.uint32)
    rounded = np.uint16((n + np.uint32(0x7FFF) + ((n >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return rounded if x == x else np.uint16(0x7FC0)  # which is not a number either


@parallel
def look_up(x, table, out):
    """table[x], for each of x (N,)."""
    for part in prange(-(-x.size // PART)):
        x_part, out_part = x[part * PART : (part + 1) * PART], out[part * PART : (part + 1) * PART]
        for i in range(x_part.size):
            out_part[i] = table[x_part[i]]


@parallel
def look_up_slope(x, g, slopes, out):
    """g slopes[x], for each of x (N,)."""
    for part in prange(-(-x.size // PART)):
        here = slice(part * PART, (part + 1) * PART)
        x_part, g_part, out_part = x[here], g[here], out[here]
        found = np.empty(PART, np.float32)
        for i in range(x_part.size):  # one by one, what follows many at a time
            found[i] = slopes[x_part[i]]
        for i in range(x_part.size):
            out_part[i] = narrow(widen(g_part[i]) * found[i])


@inlined
def random_bits(seed, i):
    """64 random bits, the i-th of a seed: SplitMix64 (Steele, Lea & Flood 2014)."""
    z = np.uint64(seed) + np.uint64(i) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@parallel
def drop(h, x, seed, dropped, scale, out):
    """x (nothing, if NONE) + scale h, but only x where 16 random bits are below `dropped`; (N,) each."""
    for part in prange(-(-h.size // PART)):
        here = slice(part * PART, (part + 1) * PART)
        h_part, x_part, out_part = h[here], x[here], out[here]
        draws = np.empty(PART // 4, np.uint64)
        for i in range(PART // 4):
            draws[i] = random_bits(seed, part * (PART // 4) + i)
        bits = draws.view(np.uint16)
        if x.size:
            for i in range(h_part.size):
                out_part[i] = narrow(widen(x_part[i]) + widen(h_part[i]) * (scale if bits[i] >= dropped else ZERO))
        else:
            for i in range(h_part.size):
                out_part[i] = narrow(widen(h_part[i]) * (scale if bits[i] >= dropped else ZERO))


@parallel
def normed(x, weight, bias, eps, rms, out, means, scales):
    """As `norm`, of (N, C); what it subtracted from each row and multiplied it with goes to means and scales (N,)."""
    N, C = x.shape
    for part in prange(PARTS):
        for i in range(part * N // PARTS, (part + 1) * N // PARTS):
            row, out_row = x[i], out[i]
            mean = variance = ZERO
            if not rms:
                for c in range(C):
                    mean += widen(row[c])
                mean /= f32(C)
            for c in range(C):
                variance += (widen(row[c]) - mean) * (widen(row[c]) - mean)
            r = ONE / np.sqrt(variance / f32(C) + f32(eps))
            means[i], scales[i] = mean, r
            if bias.size:
                for c in range(C):
                    out_row[c] = narrow((widen(row[c]) - mean) * r * weight[c] + bias[c])
            else:
                for c in range(C):
                    out_row[c] = narrow((widen(row[c]) - mean) * r * weight[c])


@parallel
def normed_slope(x, g, weight, means, scales, rms, out, of_weight, of_bias):
    """The gradient of x, r (h - n mean(h n) - mean(h)), with n = (x - mean) r, g that of n weight + bias, h = g weight.

    RMSNorm's is without the last mean. Those of weight and bias, PARTS sums of g n and of g, go to of_weight (PARTS, C)
    and of_bias (PARTS, C), or (PARTS, 0) for no bias.
    """
    N, C = x.shape
    for part in prange(PARTS):
        weight_sum, bias_sum = of_weight[part], of_bias[part]
        for i in range(part * N // PARTS, (part + 1) * N // PARTS):
            row, g_row, out_row, mean, r = x[i], g[i], out[i], means[i], scales[i]
            along = level = ZERO
            for c in range(C):
                n, up = (widen(row[c]) - mean) * r, widen(g_row[c])
                weight_sum[c] += up * n
                along += up * weight[c] * n
                level += up * weight[c]
            for c in range(bias_sum.size):
                bias_sum[c] += widen(g_row[c])
            along, level = along / f32(C), ZERO if rms else level / f32(C)
            for c in range(C):
                out_row[c] = narrow(r * (widen(g_row[c]) * weight[c] - (widen(row[c]) - mean) * r * along - level))


@parallel
def heads_apart(qkv, eps, cos, sin, out, scales):
    """(B, T, 3, H, D) to (3, B, H, T, D): queries, keys and values, the first two of them normed and rotated.

    Not normed where eps is 0, not rotated where cos and sin (T, D) have no numbers. What they were multiplied with to
    be normed goes to scales (2, B, H, T).
    """
    B, T, _, H, D = qkv.shape
    for b in prange(B):
        for t in range(T):
            for part in range(3):
                for h in range(H):
                    x, y = qkv[b, t, part, h], out[part, b, h, t]
                    r = ONE
                    if eps and part < 2:
                        square = ZERO
                        for d in range(D):
                            square += widen(x[d]) * widen(x[d])
                        r = ONE / np.sqrt(square / f32(D) + f32(eps))
                        scales[part, b, h, t] = r
                    if cos.size and part < 2:
                        turn(x, r, cos[t], sin[t], y)
                    elif eps and part < 2:
                        for d in range(D):
                            y[d] = narrow(widen(x[d]) * r)
                    else:
                        for d in range(D):
                            y[d] = x[d]


@inlined
def turn(x, r, cos, sin, out):
    """As `model.rotate`, of r x."""
    half = x.size // 2
    for d in range(half):
        a, b = widen(x[d]) * r, widen(x[d + half]) * r
        out[d] = narrow(a * cos[d] + b * sin[d])
        out[d + half] = narrow(b * cos[d + half] + a * sin[d + half])


@parallel
def heads_together(y, g, eps, cos, sin, scales, out):
    """The gradient of qkv, (B, T, 3, H, D), from what `heads_apart` gave and its gradient, (3, B, H, T, D) each.

    To rotate back is to rotate by the sines' negatives; with n = r x that of x is r (g - n mean(g n)).
    """
    _, B, H, T, D = g.shape
    for b in prange(B):
        up, n = np.empty(D, np.float32), np.empty(D, np.float32)
        for t in range(T):
            for part in range(3):
                for h in range(H):
                    g_row, y_row, x_row = g[part, b, h, t], y[part, b, h, t], out[b, t, part, h]
                    if part == 2 or not (eps or cos.size):
                        for d in range(D):
                            x_row[d] = g_row[d]
                        continue
                    if cos.size:
                        turned_back(g_row, cos[t], sin[t], up)
                        turned_back(y_row, cos[t], sin[t], n)
                    else:
                        for d in range(D):
                            up[d], n[d] = widen(g_row[d]), widen(y_row[d])
                    along, r = ZERO, ONE
                    if eps:
                        along, r = dot(up, n) / f32(D), scales[part, b, h, t]
                    for d in range(D):
                        x_row[d] = narrow(r * (up[d] - n[d] * along))


@inlined
def turned_back(x, cos, sin, out):
    half = x.size // 2
    for d in range(half):
        a, b = widen(x[d]), widen(x[d + half])
        out[d] = a * cos[d] + b * sin[d + half]
        out[d + half] = b * cos[d + half] + a * sin[d]


@parallel
def rows_moved(x, out):
    """(B, M, N, D) to (B, N, M, D)."""
    B, M, N, D = x.shape
    for b in prange(B):
        for m in range(M):
            for n in range(N):
                row, out_row = x[b, m, n], out[b, n, m]
                for d in range(D):
                    out_row[d] = row[d]


@parallel
def causal_softmax(scores, scale):
    """softmax(scale scores) over the last dimension of (N, T, T), in place; a row sees none of the later columns.

    Rows are worked through in strides of full vectors, what is ahead times zero.
    """
    N, T, _ = scores.shape
    for n in prange(N):
        terms, sees = np.empty(T, np.float32), np.zeros(2 * T, np.float32)
        sees[:T] = ONE
        for i in range(T):
            width = min(T, (i // STRIDE + 1) * STRIDE)
            seen, row, ahead, term = scores[n, i, : i + 1], scores[n, i, :width], scores[n, i, width:], terms[:width]
            sight = sees[T - 1 - i : T - 1 - i + width]
            largest, total = np.int16(-32768), ZERO
            for j in range(seen.size):
                largest = max(largest, in_order(seen[j]))
            top = widen(np.uint16(in_order(largest))) * scale
            for j in range(row.size):
                term[j] = exp(widen(row[j]) * scale - top) * sight[j]
                total += term[j]
            r = ONE / total
            for j in range(row.size):
                row[j] = narrow(term[j] * r)
            for j in range(ahead.size):
                ahead[j] = np.uint16(0)


@inlined
def in_order(x):
    """A bfloat16's bits as an integer that is larger where the number is, and back: integers have a quick max."""
    bits = np.int16(x)
    return np.int16(bits ^ ((bits >> np.int16(15)) & np.int16(0x7FFF)))


@parallel
def causal_softmax_slope(y, g, scale):
    """The gradient of the scores, from what `causal_softmax` gave and its gradient g, in the place of g."""
    N, T, _ = y.shape
    for n in prange(N):
        for i in range(T):
            width = min(T, (i // STRIDE + 1) * STRIDE)
            row, g_row, ahead = y[n, i, :width], g[n, i, :width], g[n, i, width:]
            along = ZERO
            for j in range(row.size):
                along += widen(row[j]) * widen(g_row[j])
            for j in range(row.size):
                g_row[j] = narrow(widen(row[j]) * (widen(g_row[j]) - along) * scale)
            for j in range(ahead.size):
                ahead[j] = np.uint16(0)
