"""Products with bfloat16 weights, a tile of 16 x 32 of them at a time, by a CPU's tile units (Intel's AMX) or without.

A matrix (N, K) lies as (N / 16, K / 32, 512) numbers, tile after tile, in the order in which tile units read it: for
each of 16 pairs along K, the pairs of 16 rows. They take 16 rows of x at once and sum so (Intel's manual, TDPBF16PS):
in each tile the even products and the odd ones apart, one after the other, then both onto what there was. Vectors can
do the same to the last bit (but for numbers below 1e-38, zeros to the units), since a product of two bfloat16 numbers
is exact in float32, and are faster for few rows. So what a row comes to depends neither on how many others there are,
nor on what the CPU has.
"""

import ctypes
import sys

import numba
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from tinyllm.kernels import ZERO, inlined, parallel
from tinyllm.kernels.vectors import BYTE, LONG, add_product, ahead

SIDE = 16  # rows of a tile of sums, and its columns; factors of them are 16 rows of 64 bytes, too
TOGETHER = 4  # tiles of sums side by side
FEW = 2  # rows, up to which vectors are faster
SHAPES = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[SIDE] * 8, *[0] * 8])  # what the units are told of 8 tiles


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
            sums = out[b, column * SIDE :].ctypes.data
            add_products(x[b].ctypes.data, x_row, weight[column].ctypes.data, w_column, tiles, sums, out_row)
        done()
    for column in range(columns - columns % TOGETHER, columns):  # what is left over
        begin(rows, bias, out, add, column, column + 1)
        ready()
        for b in range(0, rows, SIDE):
            sums = out[b, column * SIDE :].ctypes.data
            add_products_of_one(x[b].ctypes.data, x_row, weight[column].ctypes.data, w_column, tiles, sums, out_row)
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


def adder(together):
    """`add_products` for so many columns of tiles side by side."""

    @intrinsic
    def add_products(typing, x, x_row, weight, column, tiles, sums, row):
        """16 rows of x times columns of tiles, onto 16 rows of sums."""

        def emit(context, builder, signature, operands):
            x, x_row, weight, column, tiles, sums, row = operands
            for j in range(together):
                moved(builder, "tileloadd64", j, builder.add(sums, LONG(64 * j)), row)
            with cgutils.for_range(builder, tiles) as tile:
                moved(builder, "tileloadd64", 7, ahead(builder, x, (tile.index, LONG(64))), x_row)
                for j in range(together):
                    here = ahead(builder, weight, (column, LONG(j)), (tile.index, LONG(1024)))
                    moved(builder, "tileloadd64", 4 + j % 3, here, LONG(64))
                    instruct(builder, "tdpbf16ps", j, 7, 4 + j % 3)
            for j in range(together):
                moved(builder, "tilestored64", j, builder.add(sums, LONG(64 * j)), row)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), emit

    return add_products


add_products, add_products_of_one = adder(TOGETHER), adder(1)


def moved(builder, name, tile, address, stride):
    """A tile loaded or stored, its rows `stride` apart."""
    instruct(builder, name, tile, builder.inttoptr(address, BYTE.as_pointer()), stride)


def instruct(builder, name, *operands):
    """One instruction for the units: numbers of tiles are a part of it, others are values."""
    operands = [ir.Constant(BYTE, operand) if isinstance(operand, int) else operand for operand in operands]
    kind = ir.FunctionType(ir.VoidType(), [operand.type for operand in operands])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}"), operands)
