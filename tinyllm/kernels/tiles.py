"""Products with bfloat16 weights, a tile of 16 x 32 of them at a time, by a CPU's tile units (Intel's AMX) or without.

A matrix (N, K) lies as (N / 16, K / 32, 512) numbers, tile after tile, in the order in which tile units read it: for
each of 16 pairs along K, the pairs of 16 rows. They take 16 rows of x at once and sum so (Intel's manual, TDPBF16PS):
in each tile the even products and the odd ones apart, one after the other, then both onto what there was. Vectors can
do the same to the last bit (but for numbers below 1e-38, zeros to the units), since a product of two bfloat16 numbers
is exact in float32, and are faster for few rows. So what a row comes to depends neither on how many others there are,
nor on what the CPU has.

`attention.py` and `products.py` multiply blocks of 32 x 32 by the same instructions.
"""

import ctypes
import sys
from functools import cache

import numba
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from tinyllm.kernels import ZERO, at, inlined, parallel
from tinyllm.kernels.vectors import BYTE, add_product

SIDE = 16  # rows of a tile of sums, and its columns; factors of them are 16 rows of 64 bytes, too
TILE = 1024  # bytes
BLOCK = 32  # two tiles of sums side by side, and two below
TOGETHER = 4  # tiles of sums side by side
FEW = 2  # rows, up to which vectors are faster
SHAPES = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[SIDE] * 8, *[0] * 8])  # what the units are told of 8 tiles


@cache
def has_units() -> bool:
    """Whether this CPU has tile units and lets this process use them: Linux has to be asked (its docs, x86/xstate)."""
    chosen = numba.config.CPU_NAME or numba.config.CPU_FEATURES  # another CPU than this, by the user
    if sys.platform != "linux" or chosen:
        return False
    features = {name for name, has in get_host_cpu_features().items() if has}
    arch_prctl, ask_permission, tile_data = 158, 0x1023, 18
    if not {"amx-tile", "amx-bf16"} <= features:
        return False
    return ctypes.CDLL(None).syscall(arch_prctl, ask_permission, tile_data) == 0


def product(rows, x, weight, bias, out, add, units):
    """The first rows of out = x weight^T + bias, or that added to them; True for tile units, None for none.

    x (rows, K) and the weights (N / 16, K / 32, 512) are bfloat16, as uint16; out (rows, N) float32. There is room for
    rows to be multiples of 16, K of 32 and N of 16.
    """


@overload(product)
def producing(rows, x, weight, bias, out, add, units):
    if isinstance(units, types.NoneType):
        return lambda rows, x, weight, bias, out, add, units: by_vectors(rows, x, weight, bias, out, add)

    def whichever(rows, x, weight, bias, out, add, units):
        if rows > FEW:
            by_units(rows, x, weight, bias, out, add)
        else:
            by_vectors(rows, x, weight, bias, out, add)

    return whichever


@parallel
def by_vectors(rows, x, weight, bias, out, add):
    for column in prange(len(weight)):
        begin(rows, bias, out, add, column, column + 1)
        for b in range(rows):
            sums = out[b, column * SIDE :].ctypes.data
            add_product(x[b].ctypes.data, weight[column].ctypes.data, weight.shape[1], sums)


@parallel
def by_units(rows, x, weight, bias, out, add):
    columns, tiles = weight.shape[:2]
    x_row, w_column, out_row = x.strides[0], weight.strides[0], out.strides[0]
    for group in prange(columns // TOGETHER):
        column = group * TOGETHER
        begin(rows, bias, out, add, column, column + TOGETHER)
        ready()
        for b in range(0, rows, SIDE):
            sums = at(out[b, column * SIDE :])
            add_products(at(x[b]), x_row, at(weight[column]), w_column, tiles, sums, out_row)
        done()
    for column in range(columns - columns % TOGETHER, columns):  # what is left over
        begin(rows, bias, out, add, column, column + 1)
        ready()
        for b in range(0, rows, SIDE):
            sums = at(out[b, column * SIDE :])
            add_products_of_one(at(x[b]), x_row, at(weight[column]), tiles, sums, out_row)
        done()


@inlined
def begin(rows, bias, out, add, first, end):
    """What products are added to, in some columns of tiles."""
    first, end = first * SIDE, end * SIDE
    own_bias = bias[first : min(end, bias.size)]
    for b in range(rows):
        row = out[b, first:end]
        if not add:
            for n in range(row.size):
                row[n] = ZERO
        for n in range(own_bias.size):
            row[n] += own_bias[n]


# ---- The tile units, in LLVM's language; addresses and strides are in bytes ----


@intrinsic
def ready(typing):
    """Tell the units of their tiles."""

    def emit(context, builder, signature, operands):
        shapes = ir.Constant(ir.ArrayType(BYTE, len(SHAPES)), bytearray(SHAPES))
        place = builder.bitcast(cgutils.global_constant(builder, "shapes_of_tiles", shapes), BYTE.as_pointer())
        instruct(builder, "ldtilecfg", place)
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def done(typing):
    """Leave the units as if they had not been used."""

    def emit(context, builder, signature, operands):
        instruct(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), emit


@inlined
def add_products(x, x_row, weight, column, tiles, sums, row):
    """16 rows of x times four columns of tiles, onto 16 rows of sums."""
    load(0, sums, row)
    load(1, sums + 64, row)
    load(2, sums + 128, row)
    load(3, sums + 192, row)
    for _ in range(tiles):
        load(7, x, x_row)
        load(4, weight, 64)
        dot(0, 7, 4)
        load(5, weight + column, 64)
        dot(1, 7, 5)
        load(6, weight + 2 * column, 64)
        dot(2, 7, 6)
        load(4, weight + 3 * column, 64)
        dot(3, 7, 4)
        x += 64
        weight += TILE
    store(0, sums, row)
    store(1, sums + 64, row)
    store(2, sums + 128, row)
    store(3, sums + 192, row)


@inlined
def add_products_of_one(x, x_row, weight, tiles, sums, row):
    """The same for one column of tiles."""
    load(0, sums, row)
    for _ in range(tiles):
        load(7, x, x_row)
        load(4, weight, 64)
        dot(0, 7, 4)
        x += 64
        weight += TILE
    store(0, sums, row)


@inlined
def multiply_rows(left, row, right, next, depth, out, out_row):
    """32 x 32 sums of `depth` products each, to rows of float32; depth is a multiple of 32.

    The left factors are rows; the right ones tiles, two side by side, after `next` bytes those that are next in the
    sum. All are told by addresses, and by the bytes from one row to the next.
    """
    multiply_block(left, row, SIDE * row, 64, right, next, depth, out, out_row)


@inlined
def multiply_tiles(left, lower, right, next, depth, out, out_row):
    """The same for tiles on the left, too, that follow each other along the sum; `lower` to those of 16 rows below."""
    multiply_block(left, 64, lower, TILE, right, next, depth, out, out_row)


@inlined
def multiply_block(left, row, lower, step, right, next, depth, out, out_row):
    zero(0)
    zero(1)
    zero(2)
    zero(3)
    for _ in range(depth // BLOCK):
        load(4, left, row)
        load(5, left + lower, row)
        load(6, right, 64)
        load(7, right + TILE, 64)
        dot(0, 4, 6)
        dot(1, 4, 7)
        dot(2, 5, 6)
        dot(3, 5, 7)
        left += step
        right += next
    store(0, out, out_row)
    store(1, out + 64, out_row)
    store(2, out + SIDE * out_row, out_row)
    store(3, out + SIDE * out_row + 64, out_row)


@inlined
def add_block(left, right, next, depth, onto, sums):
    """32 x 32 sums, or what is added to them, in four tiles after each other: of so many tiles along the sum.

    These follow each other on both sides; after `next` bytes come those of the next 16 rows, or columns.
    """
    if onto:
        load(0, sums, 64)
        load(1, sums + TILE, 64)
        load(2, sums + 2 * TILE, 64)
        load(3, sums + 3 * TILE, 64)
    else:
        zero(0)
        zero(1)
        zero(2)
        zero(3)
    for _ in range(depth):
        load(4, left, 64)
        load(6, right, 64)
        dot(0, 4, 6)
        load(7, right + next, 64)
        dot(1, 4, 7)
        load(5, left + next, 64)
        dot(2, 5, 6)
        dot(3, 5, 7)
        left += TILE
        right += TILE
    store(0, sums, 64)
    store(1, sums + TILE, 64)
    store(2, sums + 2 * TILE, 64)
    store(3, sums + 3 * TILE, 64)


@intrinsic(prefer_literal=True)
def zero(typing, tile):
    def emit(context, builder, signature, operands):
        instruct(builder, "tilezero", tile.literal_value)
        return context.get_dummy_value()

    return types.void(tile), emit


@intrinsic(prefer_literal=True)
def load(typing, tile, address, row):
    def emit(context, builder, signature, operands):
        moved(builder, "tileloadd64", tile.literal_value, *operands[1:])
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp), emit


@intrinsic(prefer_literal=True)
def store(typing, tile, address, row):
    def emit(context, builder, signature, operands):
        moved(builder, "tilestored64", tile.literal_value, *operands[1:])
        return context.get_dummy_value()

    return types.void(tile, types.intp, types.intp), emit


@intrinsic(prefer_literal=True)
def dot(typing, sums, left, right):
    """sums += left right."""

    def emit(context, builder, signature, operands):
        instruct(builder, "tdpbf16ps", *(tile.literal_value for tile in (sums, left, right)))
        return context.get_dummy_value()

    return types.void(sums, left, right), emit


def moved(builder, name, tile, address, stride):
    """A tile loaded or stored, its rows `stride` apart."""
    instruct(builder, name, tile, builder.inttoptr(address, BYTE.as_pointer()), stride)


def instruct(builder, name, *operands):
    """One instruction for the units: numbers of tiles are a part of it, others are values."""
    operands = [ir.Constant(BYTE, operand) if isinstance(operand, int) else operand for operand in operands]
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), operands)
