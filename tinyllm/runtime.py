"""Where we run: device, precision, threads, seeds, compilation. The only place that knows.

    runtime = resolve(config.runtime)
    runtime.summary                         # "cpu (no CUDA or MPS here), bfloat16 (2.9 times as fast here), 2 threads"
    with runtime.autocast():
        logits = model(runtime.tensor(inputs))

Whatever `auto` chooses comes with its reason, for the person who wonders why.
"""

import contextlib
import ctypes
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm.config import RuntimeConfig
from tinyllm.data import mixed
from tinyllm.errors import RunError


@dataclass(frozen=True)
class Runtime:
    """A device and a precision, with the reasons they were chosen for."""

    device: torch.device
    dtype: torch.dtype  # of the forward pass under autocast; weights and optimizer state are float32
    summary: str

    @property
    def dtype_name(self) -> str:
        """As the config writes it: `float32` or `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Runs matrix products in `dtype`; nothing for float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def tensor(self, array: np.ndarray) -> Tensor:
        """The array on the device; the copy overlaps with computation on CUDA."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it, so that clocks read true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def resolve(config: RuntimeConfig) -> Runtime:
    """Choose the device, the precision and the threads. Raises RunError for a device that is not here."""
    keep_freed_memory()
    device, why_device = choose_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(config.threads or usable_cores())
    dtype, why_dtype = choose_dtype(config.dtype, device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = str(dtype).removeprefix("torch.")
    return Runtime(device, dtype, f"{device}{why_device}, {name}{why_dtype}{threads}")


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """The torch device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`, and why. Raises RunError."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f" ({torch.cuda.get_device_name()})"
        if torch.backends.mps.is_available():
            return torch.device("mps"), " (Apple GPU)"
        return torch.device("cpu"), " (no CUDA or MPS here)"
    try:
        device = torch.device(wanted)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("tinyllm knows cpu, cuda and mps")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        fix = "runtime.device = auto takes what is there (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`)"
        raise RunError(f"the device {wanted!r} cannot be used: {reason}", where="runtime.device", fix=fix) from None
    return device, ""


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of the forward pass, and why. `auto` is bfloat16 where it is faster, and float32 elsewhere."""
    if wanted != "auto":
        return getattr(torch, wanted), ""
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "") if supported else (torch.float32, " (no bfloat16 on this GPU)")
    if device.type == "mps":
        return torch.float32, ""
    ratio = bfloat16_speedup()
    if ratio > 1.5:  # below that, the casts around the matrix products cost what they save
        return torch.bfloat16, f" ({ratio:.1f} times as fast here)"
    return torch.float32, " (bfloat16 is not faster here)"


def usable_cores() -> int:
    """torch's own choice (one thread a physical core), but no more than this process may use."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else torch.get_num_threads()
    return max(1, min(torch.get_num_threads(), affinity))


def bfloat16_speedup() -> float:
    """How many times faster the CPU multiplies bfloat16 matrices of a small model's shape than float32 ones."""
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 256, dtype=dtype), torch.ones(256, 1024, dtype=dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        best[dtype] = min(times)
    return best[torch.float32] / best[torch.bfloat16]


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory for the next step instead of returning it to the kernel.

    A step frees and allocates the same megabytes again and again; by default each tensor above 128 KiB is a fresh
    mapping whose pages fault in one by one. M_MMAP_THRESHOLD is -3 and M_TRIM_THRESHOLD -1 in malloc.h. Elsewhere a
    no-op.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, (1 << 31) - 1)


def seed_dropout(seed: int, step: int, micro_step: int) -> None:
    """Seed torch's generators for one forward pass, so that its dropout depends on nothing that went before."""
    torch.manual_seed(int(mixed(*(np.uint64(value) for value in (seed, step, micro_step)))) >> 1)


def compiled(model: nn.Module, tokens: Tensor, runtime: Runtime) -> tuple[nn.Module, str]:
    """torch.compile'd model and a note; the model itself, and why, when compiling or the first pass fails."""
    start = time.perf_counter()
    # The compiler adds up an embedding's gradient in whatever order the threads come, unless it is told not to: without
    # this no compiled run could be repeated, or resumed, bit for bit. The second is a debugging aid that goes with it.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        fast = torch.compile(model)
        with runtime.autocast():
            fast(tokens).sum().backward()
    except Exception as error:  # a missing C++ compiler, an unsupported op: many kinds, all with the same remedy
        torch.use_deterministic_algorithms(False)
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0].rstrip(": ")[:100]  # some have no message
        return model, f"torch.compile failed, going on without it ({reason})"
    finally:
        model.zero_grad(set_to_none=True)
    return fast, f"compiled in {time.perf_counter() - start:.0f} s"
