"""Loops that numba compiles for this machine, where torch's operations are too many or pass over memory too often.

    training.py     for loops.py: what stands between the products of a step
    attention.py    its attention, and
    products.py     the gradients of its weights, by a CPU's tile units
    sampling.py     for decode.py: a token's way through the blocks
    tiles.py        products by tile units, and those with bfloat16 weights
    vectors.py      what all of these need vectors of a fixed width for, and
    rows.py         what the rows of attention's scores do

Here is what they share. The loops know arrays and numbers only. Functions of one number are written without branches
and without calls of a C library, so that the loop around them is done eight or sixteen numbers at a time.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import prange, types
from numba.core import event
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.sigutils import normalize_signature
from numba.extending import overload

# Sums may be taken in any order, products and sums at once; nan and infinity stay what they are.
FAST = {"reassoc", "contract", "arcp", "nsz"}
f32 = np.float32
ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)
NONE = np.zeros(0, dtype=np.float32)  # stands for an array that there is not


class Kept(FunctionCache):
    """Machine code in files: a full disk, or a damaged file, costs the time to compile again, and not the run.

    It is true as long as no file of this folder changes: numba itself looks only at that of the loop. And it is looked
    at whether it is for the types that are asked for: where two processes compile at once, for different types, numba
    can give both files one name.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        sources = [(path.name, path.stat()) for path in sorted(Path(__file__).parent.glob("*.py"))]
        self._cache_file._source_stamp = [(name, stat.st_mtime, stat.st_size) for name, stat in sources]

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # a damaged pickle can raise anything
            with suppress(OSError):
                self.flush()
            return None
        return found if found and found.signature.args == normalize_signature(sig)[0] else None


class SameInAll(Compiler):
    """Makes machine code that does the same where it has just been made and where it comes from a file.

    numba compiles what is in a `prange` by itself, and once more with the loop, where it is optimized twice, so that
    sums are taken in another order: other bits. Both go by one name. A process that compiles has both, and calls the
    first; one that loads the loop has the second alone.
    """

    def define_pipelines(self) -> Any:
        code = OnItsOwn(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        code.enable_object_caching()
        self.state.library = code
        return super().define_pipelines()


class OnItsOwn(JITCodeLibrary):
    """Machine code that takes nothing from elsewhere of what it has itself."""

    def _finalize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage.name in ("linkonce_odr", "weak_odr"):  # the first of a name in the process is taken
                function.linkage = "internal"
        super()._finalize_final_module()


def compiled(function: Callable[..., Any], parallel: bool = False) -> Callable[..., Any]:
    """A loop, compiled when it is first called, which is kept for all later processes if there is a place for it."""
    loop = inlined(function, parallel=parallel, pipeline_class=SameInAll)
    with suppress(RuntimeError):  # no folder that could be written to
        loop._cache = Kept(function)  # where numba's own `cache=True` puts what Kept is made of
    return loop


def inlined(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A part of loops, which they are compiled with."""
    return numba.njit(fastmath=FAST, error_model="numpy", forceinline=True, **options)(function)


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


@inlined
def at(x):
    """The address of an array."""
    return np.int64(x.ctypes.data)


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
def narrow(x):
    """A float32 as bfloat16, to the nearest, of two to the even one."""
    n = f32(x).view(np.uint32)
    rounded = np.uint16((n + np.uint32(0x7FFF) + ((n >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return rounded if x == x else np.uint16(0x7FC0)  # which is not a number either


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


@inlined
def dot(x, y):
    """The sum of x y, of (N,) each."""
    total = ZERO
    for k in range(x.size):
        total += x[k] * widen(y[k])
    return total
