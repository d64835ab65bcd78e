"""Causal attention to train with by tile units (Intel's AMX), a head at a time, within a core's own cache.

What stands left in a product lies in rows along the sum. What stands right, (N, M), lies in tiles, N / 32 x M / 16 of
1,024 bytes: of 16 columns 16 pairs along the sum. `tiled` makes these of a matrix and `tiled_across` of its transpose;
`laid_left` makes of them tiles of the transpose on the left. So the gradients of keys and values, which are sums over
queries, come as transposes. All is told by addresses, and by the bytes from one row to the next.

While a core is at work on a head, what it needs for the next one is on its way: memory is slow to begin.
"""

import math

from numba import prange

from tinyllm.kernels import at, f32, inlined, parallel
from tinyllm.kernels.rows import narrow_row, softmax, softmax_slope
from tinyllm.kernels.tiles import BLOCK, SIDE, TILE, done, multiply_rows, multiply_tiles, ready
from tinyllm.kernels.training import apart, together
from tinyllm.kernels.vectors import fetch, fetch_to_write, turn, weave

LOG2_E = f32(math.log2(math.e))


def room(T: int, D: int) -> int:
    """What a core needs for a head in `attended`, in numbers of 16 bits; and in `attended_slope`."""
    return 4 * T * D + 64 * (T + D)


def room_for_slope(T: int, D: int) -> int:
    return 2 * T * T + 7 * T * D + 100 * T + 132 * D


@parallel
def attended(qkv, eps, cos, sin, scale, rooms, weights, out):
    """Attention of qkv (B, T, 3, H, D) to out (B, T, H, D), for T and D that are multiples of 32.

    The weights go to (B H, T (T + 32) / 2): for each 32 queries rows as long as the last of them sees. Queries and keys
    are normed and rotated as `heads_apart` does. The heads are shared out among as many cores as there is room for.
    """
    B, T, _, H, D = qkv.shape
    P = len(rooms)
    for part in prange(P):
        q, k = rooms[part, : T * D].reshape(T, D), rooms[part, T * D : 2 * T * D].reshape(T, D)
        keys = at(k) + 2 * T * D
        values = keys + 2 * T * D
        scores = values + 2 * T * D
        sums = scores + 128 * T
        ready()
        for n in range(part * B * H // P, (part + 1) * B * H // P):
            b, h, row = n // H, n % H, 6 * H * D
            at_q, at_k, at_v = at(qkv[b, 0, 0, h]), at(qkv[b, 0, 1, h]), at(qkv[b, 0, 2, h])
            tiled(at_v, row, T, D, values)
            if eps or cos.size:
                for t in range(T):
                    apart(qkv[b, t, 0, h], t, eps, cos, sin, q[t])
                    apart(qkv[b, t, 1, h], t, eps, cos, sin, k[t])
                at_q, at_k, row = at(q), at(k), 2 * D
            tiled_across(at_k, row, T, D, keys)
            for first in range(0, T, BLOCK):
                end, weight, said = first + BLOCK, at(weights[n]) + first * (first + BLOCK), at(out[b, first, h])
                fetch_to_write(weight, 64 * end)
                for i in range(BLOCK):
                    fetch_to_write(said + i * 2 * H * D, 2 * D)
                if n + 1 < B * H:
                    fetch_heads(at(qkv[(n + 1) // H, first, 0, (n + 1) % H]), 3 * BLOCK, 2 * H * D, D)
                for j in range(0, end, BLOCK):
                    multiply_rows(at_q + first * row, row, keys + 64 * j, 64 * T, D, scores + 4 * j, 4 * T)
                for i in range(BLOCK):
                    softmax(scores + i * 4 * T, end, first + i + 1, f32(scale * LOG2_E), weight + i * 2 * end)
                for d in range(0, D, BLOCK):
                    multiply_rows(weight, 2 * end, values + 64 * d, 64 * D, end, sums + 4 * d, 4 * D)
                for i in range(BLOCK):
                    narrow_row(sums + i * 4 * D, D, said + i * 2 * H * D)
        done()


@parallel
def attended_slope(qkv, weights, g, eps, cos, sin, scale, rooms, out):
    """The gradient of qkv, to out, from the weights that `attended` gave and the gradient g (B, T, H, D) of its sums.

    With weights P, that of these is g V^T =: G, of the scores S = scale P (G - the sums of the rows of P G), of queries
    S K, of keys S^T Q and of values P^T g.
    """
    B, T, _, H, D = qkv.shape
    P = len(rooms)
    for part in prange(P):
        q, k = rooms[part, : T * D].reshape(T, D), rooms[part, T * D : 2 * T * D].reshape(T, D)
        values = at(k) + 2 * T * D
        keys = values + 2 * T * D
        queries = keys + 2 * T * D
        ups = queries + 2 * T * D
        tiles = ups + 2 * T * D
        weighed = tiles + 2 * T * D
        sloped = weighed + 2 * T * T
        slopes = sloped + 2 * T * T
        rows = slopes + 128 * T
        flat = rows + 64 * T
        used = (flat + 128 * D - at(q)) // 2
        scales = rooms[part, used : used + 4 * T].view(f32).reshape(2, T)
        sums = rooms[part, used + 4 * T : used + 4 * T + 64 * D].view(f32).reshape(BLOCK, D)
        two = rooms[part, used + 4 * T + 64 * D : used + 4 * T + 68 * D].view(f32).reshape(2, D)
        ready()
        for n in range(part * B * H // P, (part + 1) * B * H // P):
            b, h, row, g_row = n // H, n % H, 6 * H * D, 2 * H * D
            at_q, at_k, at_g = at(qkv[b, 0, 0, h]), at(qkv[b, 0, 1, h]), at(g[b, 0, h])
            tiled_across(at(qkv[b, 0, 2, h]), row, T, D, values)
            plain = not (eps or cos.size)
            if not plain:
                for t in range(T):
                    scales[0, t] = apart(qkv[b, t, 0, h], t, eps, cos, sin, q[t])
                    scales[1, t] = apart(qkv[b, t, 1, h], t, eps, cos, sin, k[t])
                at_q, at_k, row = at(q), at(k), 2 * D
            tiled(at_k, row, T, D, keys)
            tiled(at_q, row, T, D, tiles)
            laid_left(tiles, T, D, queries)
            tiled(at_g, g_row, T, D, tiles)
            laid_left(tiles, T, D, ups)
            for first in range(0, T, BLOCK):
                end, weight, place = first + BLOCK, at(weights[n]) + first * (first + BLOCK), at(out[b, first, 0, h])
                if end < T:
                    fetch(weight + 64 * end, 64 * (end + BLOCK))
                for i in range(3 * BLOCK):
                    fetch_to_write(place + i * 2 * H * D, 2 * D)
                if n + 1 < B * H:
                    fetch_heads(at(qkv[(n + 1) // H, first, 0, (n + 1) % H]), 3 * BLOCK, g_row, D)
                    fetch_heads(at(g[(n + 1) // H, first, (n + 1) % H]), BLOCK, g_row, D)
                for j in range(0, end, BLOCK):
                    multiply_rows(at_g + first * g_row, g_row, values + 64 * j, 64 * T, D, slopes + 4 * j, 4 * T)
                for i in range(BLOCK):
                    softmax_slope(weight + i * 2 * end, slopes + i * 4 * T, end, scale, rows + i * 2 * T)
                for i in range(0, BLOCK, 2):
                    in_pairs(weight + i * 2 * end, 2 * end, end, weighed + first * 2 * T + 32 * i)
                    in_pairs(rows + i * 2 * T, 2 * T, end, sloped + first * 2 * T + 32 * i)
                for d in range(0, D, BLOCK):
                    multiply_rows(rows, 2 * T, keys + 64 * d, 64 * D, end, at(sums) + 4 * d, 4 * D)
                for i in range(BLOCK):
                    if plain:
                        narrow_row(at(sums) + i * 4 * D, D, place + i * 6 * H * D)
                    else:
                        t = first + i
                        together(q[t], sums[i], t, scales[0, t], eps, cos, sin, two, out[b, t, 0, h])
            for first in range(0, T, BLOCK):
                place = at(out[b, first, 1, h])
                sum_over_queries(queries, sloped, first, T, D, flat, at(sums))
                for i in range(BLOCK):
                    if plain:
                        narrow_row(at(sums) + i * 4 * D, D, place + i * 6 * H * D)
                    else:
                        t = first + i
                        together(k[t], sums[i], t, scales[1, t], eps, cos, sin, two, out[b, t, 1, h])
                sum_over_queries(ups, weighed, first, T, D, flat, at(sums))
                for i in range(BLOCK):
                    narrow_row(at(sums) + i * 4 * D, D, place + 2 * H * D + i * 6 * H * D)
        done()


@inlined
def sum_over_queries(left, right, first, T, D, flat, sums):
    """32 rows (32, D) of a sum over the queries from the first of them on, by way of its transpose (D, 32)."""
    for d in range(0, D, BLOCK):
        of_left, of_right = left + d * 2 * T + 32 * first, right + first * 2 * T + 64 * first
        multiply_tiles(of_left, 32 * T, of_right, 64 * T, T - first, flat + d * 128, 128)
    for d in range(0, D, SIDE):
        for j in range(0, BLOCK, SIDE):
            turn(flat + d * 128 + 4 * j, 128, sums + j * 4 * D + 4 * d, 4 * D)


@inlined
def fetch_heads(x, count, row, D):
    """So many rows of a head."""
    for i in range(count):
        fetch(x + i * row, 2 * D)


# ---- Where factors lie ----


@inlined
def in_pairs(x, row, size, out):
    """Two rows that follow each other as one row of tiles."""
    for m in range(size // SIDE):
        weave(x + 32 * m, x + row + 32 * m, out + TILE * m)


@inlined
def tiled(x, row, N, M, out):
    """Tiles of a matrix (N, M)."""
    for n in range(0, N, 2):
        in_pairs(x + n * row, row, M, out + n // BLOCK * 64 * M + n % BLOCK * 32)


@inlined
def tiled_across(x, row, N, M, out):
    """Tiles of the transpose (M, N) of a matrix."""
    for m in range(0, M, BLOCK):
        for n in range(0, N, SIDE):
            turn(x + n * row + 2 * m, row, out + 2 * m * N + 64 * n, 64)


@inlined
def laid_left(tiles, N, M, out):
    """From the tiles of a matrix (N, M) those of its transpose on the left, M / 16 x N / 32."""
    for n in range(N // BLOCK):
        for m in range(M // SIDE):
            turn(tiles + TILE * (n * (M // SIDE) + m), 64, out + TILE * (m * (N // BLOCK) + n), 64)
