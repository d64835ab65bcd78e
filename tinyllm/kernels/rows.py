"""Rows of attention's scores in training, in vectors of 16 numbers; lengths are multiples of 16, addresses in bytes."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from tinyllm.kernels.vectors import FLOAT, FLOATS, HALVES, INT, LONG, PAIRS, WIDTH, ahead, loaded, rounded, sum_of

POWERS = (0.00966637, 0.05592198, 0.24022349, 0.69312105, 1.0)  # of 2^r for |r| <= 1/2, at Chebyshev's points


def numbers(value, kind=FLOATS):
    return ir.Constant(kind, [value] * WIDTH)


def spread(builder, number):
    """A number in all places of a vector."""
    one = builder.insert_element(ir.Constant(ir.VectorType(number.type, WIDTH), ir.Undefined), number, INT(0))
    return builder.shuffle_vector(one, one, numbers(0, PAIRS))


def stored(builder, vector, address):
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=4)


def call(builder, name, result, *operands, **options):
    """One of LLVM's own functions."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands, **options)


def widened(builder, address):
    """16 bfloat16 numbers as float32."""
    wide = builder.zext(loaded(builder, address, HALVES), PAIRS)
    return builder.bitcast(builder.shl(wide, numbers(16, PAIRS)), FLOATS)


def narrowed(builder, floats, address):
    """The other way."""
    stored(builder, builder.trunc(builder.lshr(rounded(builder, floats), numbers(16, PAIRS)), HALVES), address)


def fma(builder, a, b, c):
    return call(builder, "llvm.fma.v16f32", FLOATS, a, b, c)


def power_of_2(builder, x):
    """2^x for x <= 1, exact to 4e-6, and 0 from 2^-127 on."""
    x = builder.select(builder.fcmp_ordered("<", x, numbers(-127.0)), numbers(-127.0), x)
    n = call(builder, "llvm.rint.v16f32", FLOATS, x)
    r, p = builder.fsub(x, n), numbers(POWERS[0])
    for factor in POWERS[1:]:
        p = fma(builder, p, r, numbers(factor))
    exponent = builder.shl(builder.add(builder.fptosi(n, PAIRS), numbers(127, PAIRS)), numbers(23, PAIRS))
    return builder.fmul(p, builder.bitcast(exponent, FLOATS))


@intrinsic
def softmax(typing, x, size, seen, scale, out):
    """Of the first `seen` numbers, times scale, to bfloat16; the others' is zero. x is worked in."""

    def emit(context, builder, signature, operands):
        x, size, seen, scale, out = operands
        parts, scales = builder.udiv(size, LONG(WIDTH)), spread(builder, scale)
        places = ir.Constant(PAIRS, list(range(WIDTH)))
        sees = spread(builder, builder.trunc(seen, INT))
        largest = cgutils.alloca_once_value(builder, numbers(-1e30))
        with cgutils.for_range(builder, parts) as part:
            here = ahead(builder, x, (part.index, LONG(64)))
            first = spread(builder, builder.trunc(builder.mul(part.index, LONG(WIDTH)), INT))
            seeing = builder.icmp_signed("<", builder.add(first, places), sees)
            score = builder.select(seeing, builder.fmul(loaded(builder, here, FLOATS), scales), numbers(-1e30))
            before = builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", score, before), score, before), largest)
            stored(builder, score, here)
        top = call(builder, "llvm.vector.reduce.fmax.v16f32", FLOAT, builder.load(largest), fastmath=["nnan"])
        top, total = spread(builder, top), cgutils.alloca_once_value(builder, numbers(0.0))
        with cgutils.for_range(builder, parts) as part:
            here = ahead(builder, x, (part.index, LONG(64)))
            power = power_of_2(builder, builder.fsub(loaded(builder, here, FLOATS), top))
            builder.store(builder.fadd(builder.load(total), power), total)
            stored(builder, power, here)
        share = spread(builder, builder.fdiv(ir.Constant(FLOAT, 1.0), sum_of(builder, builder.load(total))))
        with cgutils.for_range(builder, parts) as part:
            power = loaded(builder, ahead(builder, x, (part.index, LONG(64))), FLOATS)
            narrowed(builder, builder.fmul(power, share), ahead(builder, out, (part.index, LONG(32))))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.float32, types.intp), emit


@intrinsic
def softmax_slope(typing, y, g, size, scale, out):
    """The gradient of what softmax gave y for, times scale, from the gradient g of y; y and out in bfloat16."""

    def emit(context, builder, signature, operands):
        y, g, size, scale, out = operands
        parts, along = builder.udiv(size, LONG(WIDTH)), cgutils.alloca_once_value(builder, numbers(0.0))
        with cgutils.for_range(builder, parts) as part:
            weight = widened(builder, ahead(builder, y, (part.index, LONG(32))))
            up = loaded(builder, ahead(builder, g, (part.index, LONG(64))), FLOATS)
            builder.store(fma(builder, weight, up, builder.load(along)), along)
        mean, scales = spread(builder, sum_of(builder, builder.load(along))), spread(builder, scale)
        with cgutils.for_range(builder, parts) as part:
            weight = widened(builder, ahead(builder, y, (part.index, LONG(32))))
            up = loaded(builder, ahead(builder, g, (part.index, LONG(64))), FLOATS)
            slope = builder.fmul(builder.fmul(weight, scales), builder.fsub(up, mean))
            narrowed(builder, slope, ahead(builder, out, (part.index, LONG(32))))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.float32, types.intp), emit


@intrinsic
def narrow_row(typing, x, size, out):
    """float32 numbers as bfloat16."""

    def emit(context, builder, signature, operands):
        x, size, out = operands
        with cgutils.for_range(builder, builder.udiv(size, LONG(WIDTH))) as part:
            floats = loaded(builder, ahead(builder, x, (part.index, LONG(64))), FLOATS)
            narrowed(builder, floats, ahead(builder, out, (part.index, LONG(32))))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), emit


@intrinsic
def multiply_row(typing, factors, size, x):
    """bfloat16 numbers times as many in float32, in the place of the first."""

    def emit(context, builder, signature, operands):
        factors, size, x = operands
        with cgutils.for_range(builder, builder.udiv(size, LONG(WIDTH))) as part:
            here = ahead(builder, x, (part.index, LONG(32)))
            factor = loaded(builder, ahead(builder, factors, (part.index, LONG(64))), FLOATS)
            narrowed(builder, builder.fmul(widened(builder, here), factor), here)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), emit
