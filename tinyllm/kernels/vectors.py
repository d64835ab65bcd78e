"""Loops over vectors of 16 numbers, in LLVM's language: where it takes more than a loop in Python's to get them.

bfloat16 numbers are read in pairs, 16 of them at once: the first of each is the upper half of a float32 number when
moved up, the second when what is below it is cut off. Addresses and strides are in bytes.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

WIDTH = 16
BYTE, LONG, INT, FLOAT = ir.IntType(8), ir.IntType(64), ir.IntType(32), ir.FloatType()
PAIRS, FLOATS = ir.VectorType(INT, WIDTH), ir.VectorType(FLOAT, WIDTH)
HALVES = ir.VectorType(ir.IntType(16), WIDTH)
ZEROS = ir.Constant(FLOATS, [0.0] * WIDTH)


def loaded(builder, address, kind=PAIRS):
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def everywhere(builder, address, kind=PAIRS):
    """The number, or the pair, at an address in all places of a vector."""
    nothing, first = ir.Constant(kind, ir.Undefined), ir.Constant(PAIRS, [0] * WIDTH)
    one = builder.insert_element(nothing, loaded(builder, address, kind.element), INT(0))
    return builder.shuffle_vector(one, nothing, first)


def halves(builder, pairs):
    """The first numbers of pairs, and the second, as float32."""
    first = builder.shl(pairs, ir.Constant(PAIRS, [16] * WIDTH))
    second = builder.and_(pairs, ir.Constant(PAIRS, [0xFFFF0000] * WIDTH))
    return builder.bitcast(first, FLOATS), builder.bitcast(second, FLOATS)


def rounded(builder, floats):
    """As bfloat16, in the upper halves of integers: `narrow`."""
    n, of = builder.bitcast(floats, PAIRS), lambda number: ir.Constant(PAIRS, [number] * WIDTH)
    odd = builder.and_(builder.lshr(n, of(16)), of(1))
    near = builder.add(builder.add(n, of(0x7FFF)), odd)
    nan = builder.fcmp_unordered("uno", floats, floats)
    return builder.select(nan, of(0x7FC00000), near)


def fused(builder, total, a, b):
    """total + a b, at once if the CPU can."""
    return in_order(builder, total, builder.fmul(a, b, flags=["contract"]))


def in_order(builder, a, b):
    """a + b, which without a flag of its own would get the loop's, that sums may be taken in any order."""
    return builder.fadd(a, b, flags=["contract"])


def ahead(builder, address, *steps):
    """An address, further by products of two numbers."""
    for count, size in steps:
        address = builder.add(address, builder.mul(count, size))
    return address


@intrinsic
def add_product(typing, x, weight, tiles, sums):
    """One row of x (K,) times a column of tiles, onto 16 sums, each in its own place of a vector."""

    def emit(context, builder, signature, operands):
        x, weight, tiles, sums = operands
        total = cgutils.alloca_once_value(builder, loaded(builder, sums, FLOATS))
        with cgutils.for_range(builder, tiles) as tile:
            x_here, here = (ahead(builder, x, (tile.index, LONG(64))), ahead(builder, weight, (tile.index, LONG(1024))))
            even = odd = ZEROS
            for pair in range(WIDTH):
                x_even, x_odd = halves(builder, everywhere(builder, builder.add(x_here, LONG(4 * pair))))
                w_even, w_odd = halves(builder, loaded(builder, builder.add(here, LONG(64 * pair))))
                even, odd = fused(builder, even, x_even, w_even), fused(builder, odd, x_odd, w_odd)
            builder.store(in_order(builder, builder.load(total), in_order(builder, even, odd)), total)
        builder.store(builder.load(total), builder.inttoptr(sums, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), emit


@intrinsic
def pair(typing, x, half, out):
    """Numbers in float32 as pairs of bfloat16, one from each of two halves of `half` bytes."""

    def emit(context, builder, signature, operands):
        x, half, out = operands
        with cgutils.for_range(builder, builder.udiv(half, LONG(64))) as part:
            here = ahead(builder, x, (part.index, LONG(64)))
            first = rounded(builder, loaded(builder, here, FLOATS))
            second = rounded(builder, loaded(builder, builder.add(here, half), FLOATS))
            low = builder.lshr(first, ir.Constant(PAIRS, [16] * WIDTH))
            high = builder.and_(second, ir.Constant(PAIRS, [0xFFFF0000] * WIDTH))
            place = builder.inttoptr(ahead(builder, out, (part.index, LONG(64))), PAIRS.as_pointer())
            builder.store(builder.or_(low, high), place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), emit


def fetcher(to_write):
    """`fetch`, for what will be read, or written."""

    @intrinsic
    def fetch(typing, address, size):
        """Have so many bytes on their way to the core's cache."""

        def emit(context, builder, signature, operands):
            address, size = operands
            kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            with cgutils.for_range(builder, builder.udiv(size, LONG(64))) as line:
                place = builder.inttoptr(ahead(builder, address, (line.index, LONG(64))), BYTE.as_pointer())
                builder.call(function, [place, INT(to_write), INT(3), INT(1)])
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), emit

    return fetch


fetch, fetch_to_write = fetcher(0), fetcher(1)


@intrinsic
def weave(typing, x, y, out):
    """16 numbers of 16 bits of x and of y as pairs."""

    def emit(context, builder, signature, operands):
        x, y, out = operands
        first, second = (builder.zext(loaded(builder, place, HALVES), PAIRS) for place in (x, y))
        pairs = builder.or_(first, builder.shl(second, ir.Constant(PAIRS, [16] * WIDTH)))
        builder.store(pairs, builder.inttoptr(out, PAIRS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), emit


@intrinsic
def turn(typing, x, row, out, out_row):
    """16 rows of 16 numbers of 32 bits, or of pairs, as columns."""

    def emit(context, builder, signature, operands):
        x, row, out, out_row = operands
        rows = [loaded(builder, ahead(builder, x, (LONG(i), row))) for i in range(WIDTH)]
        for step in (8, 4, 2, 1):  # what is that far from the diagonal changes sides
            low = [place if not place & step else place - step + WIDTH for place in range(WIDTH)]
            high = [place + step if not place & step else place + WIDTH for place in range(WIDTH)]
            for i in range(WIDTH):
                if not i & step:
                    two = rows[i], rows[i + step]
                    rows[i], rows[i + step] = (chosen(builder, *two, places) for places in (low, high))
        for i, numbers in enumerate(rows):
            place = builder.inttoptr(ahead(builder, out, (LONG(i), out_row)), PAIRS.as_pointer())
            builder.store(numbers, place, align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), emit


@intrinsic
def look(typing, query, half, keys, row, count, scores):
    """Products of a query with so many keys, that are rows of pairs: of its two halves, of `half` bytes each."""

    def emit(context, builder, signature, operands):
        query, half, keys, row, count, scores = operands

        def some(first, n):
            sums = [cgutils.alloca_once(builder, FLOATS) for _ in range(n)]
            for total in sums:
                builder.store(ZEROS, total)
            with cgutils.for_range(builder, builder.udiv(half, LONG(64))) as part:
                here = ahead(builder, query, (part.index, LONG(64)))
                q0, q1 = loaded(builder, here, FLOATS), loaded(builder, builder.add(here, half), FLOATS)
                for j, total in enumerate(sums):
                    key = ahead(builder, keys, (builder.add(first, LONG(j)), row), (part.index, LONG(64)))
                    k0, k1 = halves(builder, loaded(builder, key))
                    builder.store(fused(builder, fused(builder, builder.load(total), q0, k0), q1, k1), total)
            place = ahead(builder, scores, (first, LONG(4)))
            found = [builder.load(total) for total in sums]
            score = sum_of(builder, *found) if n == 1 else sums_of_four(builder, *found)
            builder.store(score, builder.inttoptr(place, score.type.as_pointer()), align=4)

        by_fours(builder, count, some)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), emit


@intrinsic
def gather(typing, weights, values, row, count, half, out):
    """The sum of so many values, that are rows of pairs, each by its weight: two halves, of `half` bytes each."""

    def emit(context, builder, signature, operands):
        weights, values, row, count, half, out = operands
        with cgutils.for_range(builder, builder.udiv(half, LONG(64))) as part:
            sums = [cgutils.alloca_once(builder, FLOATS) for _ in range(4)]  # more than one addition is under way
            for total in sums:
                builder.store(ZEROS, total)
            here = ahead(builder, values, (part.index, LONG(64)))

            def some(first, n, here=here, sums=sums):
                for j in range(n):
                    at = builder.add(first, LONG(j))
                    weight = everywhere(builder, ahead(builder, weights, (at, LONG(4))), FLOATS)
                    pair = halves(builder, loaded(builder, ahead(builder, here, (at, row))))
                    for value, total in zip(pair, sums[j % 2 :: 2], strict=True):
                        builder.store(fused(builder, builder.load(total), weight, value), total)

            by_fours(builder, count, some)
            for i in range(2):
                place = builder.add(ahead(builder, out, (part.index, LONG(64))), builder.mul(half, LONG(i)))
                whole = in_order(builder, builder.load(sums[2 * i]), builder.load(sums[2 * i + 1]))
                builder.store(whole, builder.inttoptr(place, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), emit


def by_fours(builder, count, some):
    """`some(first, n)` for four at a time, and for what is left over one by one."""
    fours = builder.udiv(count, LONG(4))
    with cgutils.for_range(builder, fours) as four:
        some(builder.mul(four.index, LONG(4)), 4)
    with cgutils.for_range(builder, builder.urem(count, LONG(4))) as one:
        some(builder.add(builder.mul(fours, LONG(4)), one.index), 1)


def sums_of_four(builder, a, b, c, d):
    """The sums of four vectors, as a vector of four: woven into each other they take half the work of four sums."""
    ab, cd = (woven(builder, *two, [0, WIDTH, 1, WIDTH + 1]) for two in ((a, b), (c, d)))
    sums = woven(builder, ab, cd, [0, 1, WIDTH, WIDTH + 1])  # in each four of its numbers one of a, of b, of c and of d
    for half in (WIDTH // 2, WIDTH // 4):
        low, high = (chosen(builder, sums, sums, range(start, start + half)) for start in (0, half))
        sums = in_order(builder, low, high)
    return sums


def woven(builder, a, b, order):
    """The first two of each four numbers of a and of b, in an order, and onto these the last two."""
    low, high = (
        chosen(builder, a, b, [four + start + place for four in range(0, WIDTH, 4) for place in order])
        for start in (0, 2)
    )
    return in_order(builder, low, high)


def chosen(builder, a, b, places):
    """Numbers of two vectors, as of one that has both."""
    places = list(places)
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT, len(places)), places))


def sum_of(builder, vector):
    """Of its 16 numbers, two by two."""
    kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(function, [ir.Constant(FLOAT, 0.0), vector], fastmath=["reassoc"])
