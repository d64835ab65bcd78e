"""The gradient of a layer's weights, a product that sums over all tokens, by tile units (Intel's AMX).

Each core has the sums of some columns in its own cache, and goes through the tokens once, DEEP of them at a time.
"""

from numba import prange

from tinyllm.kernels import at, inlined, parallel
from tinyllm.kernels.tiles import BLOCK, SIDE, add_block, done, load, ready, store
from tinyllm.kernels.vectors import fetch, turn, weave

DEEP = 256  # tokens: what is multiplied with each other of them stays in the cache beside the sums


@parallel
def laid_left(x, out):
    """x (N, M) as tiles of its transpose on the left of a product, DEEP rows after the other, to as many numbers."""
    N, M = x.shape
    for n in prange(N // BLOCK):
        first = n * BLOCK // DEEP * DEEP
        depth = min(DEEP, N - first) // BLOCK
        if n + 1 < N // BLOCK:
            fetch(at(x[(n + 1) * BLOCK]), 2 * BLOCK * M)
        for m in range(M // SIDE):
            tile = at(out) + 2 * M * first + 1024 * (m * depth + n - first // BLOCK)
            for i in range(0, BLOCK, 2):
                weave(at(x[n * BLOCK + i, m * SIDE :]), at(x[n * BLOCK + i + 1, m * SIDE :]), tile + 32 * i)
            turn(tile, 64, tile, 64)


@parallel
def multiply(left, y, woven, sums, across, out):
    """y^T x (M, K), or if `across` its transpose, of y (N, M) and x (N, K) in bfloat16, x as `laid_left` has it.

    N, M and K are multiples of 32. In P parts, of W columns of y or 32 less: woven (P, DEEP W) is room for these in
    pairs, and sums (P, K W), float32, for their tiles, four for each 32 rows and columns.
    """
    (N, M), P = y.shape, len(sums)
    K = left.size // N
    for part in prange(P):
        begin, end = columns(M, part, P), columns(M, part + 1, P)
        right = at(woven[part])
        ready()
        for first in range(0, N, DEEP):
            depth = min(DEEP, N - first) // BLOCK
            for n in range(0, depth * BLOCK, 2):
                upper, lower = at(y[first + n, begin:]), at(y[first + n + 1, begin:])
                tile = right + 1024 * (n // BLOCK) + 32 * (n % BLOCK)
                for m in range(0, end - begin, SIDE):
                    weave(upper + 2 * m, lower + 2 * m, tile + 64 * m * depth)
            here, of_left = at(sums[part]), at(left) + 2 * K * first
            for k in range(0, K, BLOCK):
                coming = first + DEEP + k * DEEP // K  # some of the next rows, on their way while units are at work
                for n in range(coming, min(coming + BLOCK * DEEP // K + 1, N)):
                    fetch(at(y[n, begin:]), 2 * (end - begin))
                for m in range(0, end - begin, BLOCK):
                    add_block(of_left, right + 64 * m * depth, 1024 * depth, depth, first > 0, here)
                    here += 4096
                of_left += 64 * BLOCK * depth
        here = at(sums[part])
        for k in range(0, K, BLOCK):
            for m in range(begin, end, BLOCK):
                for tile in range(4):
                    row, column = k + tile // 2 * SIDE, m + tile % 2 * SIDE
                    if across:
                        load(0, here, 64)
                        store(0, at(out[row, column:]), 4 * M)
                    else:
                        turn(here, 64, at(out[column, row:]), 4 * K)
                    here += 1024
        done()


@inlined
def columns(M, part, parts):
    """The first of so many columns that are for a part."""
    return part * (M // BLOCK) // parts * BLOCK
