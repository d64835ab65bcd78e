"""Loops that numba compiles for this machine, where torch's operations are too many or pass over memory too often.

What is here knows arrays and numbers only, and is all that is compiled: numba keeps the machine code beside this file
and looks at no other to see whether it is still true. Functions of one number are written without branches and without
calls of a C library, so that the loop around them is done eight or sixteen numbers at a time.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numba
import numpy as np
from numba import prange, types
from numba.core import event
from numba.extending import overload

# Sums may be taken in any order, products and sums at once; nan and infinity stay what they are.
FAST = {"reassoc", "contract", "arcp", "nsz"}
inlined = numba.njit(fastmath=FAST, error_model="numpy")
serial = numba.njit(fastmath=FAST, error_model="numpy", cache=True)
parallel = numba.njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True)
f32 = np.float32
ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)
NONE = np.zeros(0, dtype=np.float32)  # stands for an array that there is not


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


@contextmanager
def before_compiling(say: Callable[[], None]) -> Iterator[None]:
    """Call `say`, once, should anything in here have to wait until loops are compiled: the first time on a machine."""
    with event.install_listener("numba:compile", Listener(say)):
        yield


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


@serial
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


ACTIVATIONS = ("gelu", "gelu_tanh", "relu2", "swiglu")
