"""How fast the steps of a run are on this machine, and what their time goes to.

    found = bench(run)
    found.step_seconds, found.tokens_a_second           # medians
    found.flops_a_second / found.matmul_rate            # share of what a large matrix product reaches here
    found.parts                                         # {"matrix products": 0.48, "attention": 0.17, ...}

The steps are real ones (`engine.train_step`) of the run's own config and data. Nothing is written.
"""

import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from tinyllm.engine import Run, TrainState, new_state, train_step
from tinyllm.runtime import compiled, matmul_rate, peak_memory
from tinyllm.sanity.cost import flops_a_token

WARM_UP, LEAST = 2, 3  # steps before the measurement, and within it
AT_LEAST = WARM_UP + LEAST + 1  # steps in all: the last one goes to the profiler
SMALL = 0.005  # share of a step's time that is not worth a line
OPTIMIZER = "the optimizer"
# What an operation is part of says more than its own name: the optimizer, or an operation of `fast.py` or `loops.py`.
WITHIN = {
    OPTIMIZER: OPTIMIZER,
    "CrossEntropy": "loss",
    "RMSNorm": "norms",
    "Norm": "norms",
    "ReLU2": "activations",
    "activations": "activations",  # as `loops.py` marks its own, within larger operations
    "matrix products": "matrix products",
    "AddDropout": "dropout",
    "Attention": "attention",
    "AttentionInTiles": "attention",
}
# Else torch's names of operations begin so, or have it in them; the first that fits counts.
KINDS = {
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "attention": ("scaled_dot_product", "flash", "softmax"),
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "gemm"),
    "norms": ("layer_norm", "rms_norm", "rsqrt"),
    "activations": ("gelu", "silu", "relu", "threshold", "clamp_min", "sigmoid", "tanh"),
    "dropout": ("dropout", "bernoulli", "random_"),
    "embeddings": ("embedding", "index_select"),
    "moving data": ("copy_", "cat", "clone", "contiguous", "fill_", "zero_", "memcpy", "memset"),
    "elementwise": ("mul", "add", "sub", "div", "sum", "pow", "mean", "sqrt", "ge", "where"),
}


@dataclass(frozen=True)
class Bench:
    """What the steps of a run cost."""

    steps: int  # measured
    step_seconds: float  # the median
    quickest_seconds: float
    slowest_seconds: float
    tokens_a_second: float
    flops_a_second: float
    matmul_rate: float  # FLOP/s that a large matrix product reaches here
    peak_bytes: int | None  # of this process
    parts: dict[str, float]  # share of a step's time by kind of work, the largest first; those below SMALL left out

    @property
    def share_of_peak(self) -> float:
        """Of what a large matrix product reaches."""
        return self.flops_a_second / self.matmul_rate


def bench(run: Run, seconds: float = 10.0) -> Bench:
    """Measure steps for about so many seconds, three at least. Raises what the steps raise."""
    state = new_state(run)
    if run.config.runtime.compile:
        sample = run.runtime.tensor(run.source.batch(0)[0][: run.config.micro_batch_size])
        state.forward, _ = compiled(state.model, sample, run.runtime)
    for _ in range(WARM_UP):
        one_step(run, state)
    times: list[float] = []
    while len(times) < LEAST or sum(times) < seconds:
        times.append(one_step(run, state))
    peak, step = peak_memory(run.runtime.device), statistics.median(times)
    tokens = run.config.tokens_per_step
    return Bench(
        steps=len(times),
        step_seconds=step,
        quickest_seconds=min(times),
        slowest_seconds=max(times),
        tokens_a_second=tokens / step,
        flops_a_second=flops_a_token(state.model, run.config) * tokens / step,
        matmul_rate=matmul_rate(run.runtime),
        peak_bytes=peak,
        parts=parts(run, state),
    )


def one_step(run: Run, state: TrainState) -> float:
    """Seconds of a step, its batch included."""
    start = time.perf_counter()
    train_step(run, state)
    run.runtime.synchronize()
    return time.perf_counter() - start


def parts(run: Run, state: TrainState) -> dict[str, float]:
    """What the time of a step goes to, by torch's own profiler. What no operation accounts for is Python's.

    On a GPU, which works while Python goes on, of the GPU's time.
    """
    on_gpu = run.runtime.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with optimizers_marked(state), profile(activities=activities) as profiled:
        whole = one_step(run, state)
    found: Counter[str] = Counter()
    for event in profiled.events():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[kind_of(event)] += spent / 1e6
    found.pop("", None)
    if not on_gpu:
        found["Python and the rest"] = max(whole - found.total(), 0.0)
    total = max(found.total(), 1e-9)
    return {kind: spent / total for kind, spent in found.most_common() if spent > SMALL * total}


@contextmanager
def optimizers_marked(state: TrainState) -> Iterator[None]:
    """Have the profiler know which operations are the optimizers'."""

    def marked(optimizer: object) -> None:
        own = optimizer.step

        def step() -> None:
            with torch.profiler.record_function(OPTIMIZER):
                own()

        optimizer.step = step

    for optimizer in state.optimizers:
        marked(optimizer)
    try:
        yield
    finally:
        for optimizer in state.optimizers:
            del optimizer.step  # and the class's own is there again


def kind_of(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    """The kind of work an operation is; '' for what only holds others."""
    above = event
    while above is not None:
        if kind := WITHIN.get(above.name.removesuffix("Backward")):
            return kind
        above = above.cpu_parent
    name = event.name.removeprefix("aten::").lower()
    for kind, words in KINDS.items():
        if any(word in name if len(word) > 4 else name.lstrip("_").startswith(word) for word in words):
            return kind
    return "Python and the rest" if event.name.startswith(("aten::", "autograd::")) or "Backward" in name else ""
