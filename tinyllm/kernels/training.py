"""Training in bfloat16, for loops.py: bfloat16 numbers are uint16 here, and are reckoned with in float32."""

import numpy as np
from numba import prange

from tinyllm.kernels import ONE, ZERO, at, dot, exp, f32, inlined, narrow, parallel, widen
from tinyllm.kernels.rows import WIDTH, multiply_row
from tinyllm.kernels.vectors import fetch

PART = 4096  # numbers that a core takes at a time; loops over a slice of an array are quicker than over its places
STRIDE = 32  # numbers: four vectors, as many as a loop takes at a time
PARTS = 64  # of rows, whatever the number of cores: sums of them are always added in the same order


@inlined
def fetch_part(x, part):
    """Have numbers on their way while those before them are at work: memory is slow to begin."""
    if (part + 1) * PART <= x.size:
        fetch(at(x[part * PART :]), 2 * PART)


@parallel
def look_up(x, table, out):
    """table[x], for each of x (N,)."""
    for part in prange(-(-x.size // PART)):
        x_part, out_part = x[part * PART : (part + 1) * PART], out[part * PART : (part + 1) * PART]
        for i in range(x_part.size):
            out_part[i] = table[x_part[i]]


@parallel
def look_up_slope(x, slopes, g):
    """g slopes[x], for each of x (N,), in the place of g."""
    for part in prange(-(-x.size // PART)):
        here = slice(part * PART, (part + 1) * PART)
        x_part, g_part = x[here], g[here]
        found = np.empty(PART, np.float32)
        fetch_part(x, part + 1)
        fetch_part(g, part + 1)
        for i in range(x_part.size):  # one by one, what follows many at a time
            found[i] = slopes[x_part[i]]
        whole = x_part.size // WIDTH * WIDTH
        multiply_row(at(found), whole, at(g_part))
        for i in range(whole, x_part.size):
            g_part[i] = narrow(widen(g_part[i]) * found[i])


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
    """LayerNorm, or RMSNorm, of (N, C); means and scales (N,): what was subtracted from each row, and multiplied."""
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
def normed_slope(x, g, more, weight, means, scales, rms, out, of_weight, of_bias):
    """The gradient of x, r (h - n mean(h n) - mean(h)), with n = (x - mean) r, g that of n weight + bias, h = g weight.

    RMSNorm's is without the last mean. `more`, if it has rows, is added to it. Those of weight and bias, PARTS sums of
    g n and of g, go to of_weight (PARTS, C) and of_bias (PARTS, C), or (PARTS, 0) for no bias.
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
            if more.size:
                more_row = more[i]
                for c in range(C):
                    slope = r * (widen(g_row[c]) * weight[c] - (widen(row[c]) - mean) * r * along - level)
                    out_row[c] = narrow(slope + widen(more_row[c]))
            else:
                for c in range(C):
                    out_row[c] = narrow(r * (widen(g_row[c]) * weight[c] - (widen(row[c]) - mean) * r * along - level))


@parallel
def heads_apart(qkv, eps, cos, sin, out, scales):
    """(B, T, 3, H, D) to (3, B, H, T, D): queries, keys and values, the first two of them normed and rotated.

    Not normed where eps is 0, not rotated where cos and sin (T, D) have no numbers. What they were multiplied with to
    be normed goes to scales (2, B, H, T).
    """
    B, T, _, H, _ = qkv.shape
    for b in prange(B):
        for t in range(T):
            for part in range(3):
                for h in range(H):
                    x, y = qkv[b, t, part, h], out[part, b, h, t]
                    if part < 2:
                        scales[part, b, h, t] = apart(x, t, eps, cos, sin, y)
                    else:
                        copy(x, y)


@inlined
def apart(x, t, eps, cos, sin, out):
    """A query or a key, normed and rotated; what it was multiplied with to be normed."""
    r = ONE
    if eps:
        square = ZERO
        for d in range(x.size):
            square += widen(x[d]) * widen(x[d])
        r = ONE / np.sqrt(square / f32(x.size) + f32(eps))
    if cos.size:
        turn(x, r, cos[t], sin[t], out)
    elif eps:
        for d in range(x.size):
            out[d] = narrow(widen(x[d]) * r)
    else:
        copy(x, out)
    return r


@inlined
def copy(x, out):
    for i in range(x.size):  # which is quicker than out[:] = x, for few numbers
        out[i] = x[i]


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
        room = np.empty((2, D), np.float32)
        for t in range(T):
            for part in range(3):
                for h in range(H):
                    g_row, x_row = g[part, b, h, t], out[b, t, part, h]
                    if part < 2:
                        together(y[part, b, h, t], g_row, t, scales[part, b, h, t], eps, cos, sin, room, x_row)
                    else:
                        copy(g_row, x_row)


@inlined
def together(y, g, t, r, eps, cos, sin, room, out):
    """The gradient of a query or a key, from what `apart` made of it and the gradient of that."""
    if not (eps or cos.size):
        for d in range(g.size):
            out[d] = narrow(widen(g[d]))
        return
    up, n = room[0], room[1]
    if cos.size:
        turned_back(g, cos[t], sin[t], up)
        turned_back(y, cos[t], sin[t], n)
    else:
        for d in range(g.size):
            up[d], n[d] = widen(g[d]), widen(y[d])
    along = dot(up, n) / f32(g.size) if eps else ZERO
    for d in range(g.size):
        out[d] = narrow(r * (up[d] - n[d] * along))


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
