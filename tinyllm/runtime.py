"""Where we run: device, precision, threads, seeds, compilation, memory. The only place that knows.

    runtime = resolve(config.runtime)
    runtime.summary                         # "cpu (no CUDA or MPS here), bfloat16 (2.9 times as fast here), 2 threads"
    with runtime.autocast():
        logits = model(runtime.tensor(inputs))

Whatever `auto` chooses comes with its reason, for the person who wonders why.
"""

import contextlib
import ctypes
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm.config import RuntimeConfig
from tinyllm.data import mixed
from tinyllm.errors import RunError
from tinyllm.fast import in_loops, loops_start_quickly
from tinyllm.process import usable_cores

WORTH_LOOPS = 2e13  # FLOPs: a minute of two cores with matrix units
MOST_THREADS = 64  # a core: more can only be a slip


@dataclass(frozen=True)
class Runtime:
    """A device and a precision, with the reasons they were chosen for."""

    device: torch.device
    dtype: torch.dtype  # of the forward pass under autocast; weights and optimizer state are float32
    summary: str
    loops: bool = False  # whether compiled loops do what they can

    @property
    def settled(self) -> dict[str, str]:
        """What the config's `auto` came to."""
        return {"dtype": self.dtype_name, "loops": "on" if self.loops else "off"}

    @property
    def dtype_name(self) -> str:
        """As the config writes it: `float32` or `bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Runs matrix products in `dtype`, if that is not float32, and compiled loops where they are chosen."""
        in_float32 = self.dtype == torch.float32
        precision = contextlib.nullcontext() if in_float32 else torch.autocast(self.device.type, self.dtype)
        with precision, in_loops(self.loops):
            yield

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


def resolve(config: RuntimeConfig, flops: float = 0.0) -> Runtime:
    """Choose the device, the precision, the threads, and for a run of so many FLOPs the loops.

    Raises RunError for a device that is not here.
    """
    keep_freed_memory()
    device, why_device = choose_device(config.device)
    if device.type == "cpu":
        cores = os.cpu_count() or 1
        if config.threads > MOST_THREADS * cores:  # OpenMP ends the process when it cannot have as many
            what = f"{config.threads:,} threads on {cores} cores"
            raise RunError(what, where="runtime.threads", fix="0, for as many as there are cores")
        # torch's own choice, one thread a physical core, but no more than this process may use.
        torch.set_num_threads(config.threads or min(torch.get_num_threads(), usable_cores()))
    dtype, why_dtype = choose_dtype(config.dtype, device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name, loops = str(dtype).removeprefix("torch."), choose_loops(config, device, dtype, flops)
    summary = f"{device}{why_device}, {name}{why_dtype}{threads}" + ", compiled loops" * loops
    return Runtime(device, dtype, summary, loops)


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


def choose_loops(config: RuntimeConfig, device: torch.device, dtype: torch.dtype, flops: float) -> bool:
    """Whether compiled loops do what they can in a run of so many FLOPs: not in a short one, which they would delay."""
    wanted = flops > WORTH_LOOPS if config.loops == "auto" else config.loops == "on"
    if not wanted or device.type != "cpu" or dtype != torch.bfloat16 or config.compile:
        return False
    return loops_start_quickly()


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
        libc.mallopt(-1, -1)


def seed_dropout(seed: int, step: int, micro_step: int) -> None:
    """Seed torch's generators for one forward pass, so that its dropout depends on nothing that went before."""
    seed_torch(int(mixed(*(np.uint64(value) for value in (seed, step, micro_step)))) >> 1)


def seed_torch(seed: int) -> None:
    """torch.manual_seed, of the devices in use: that one keeps a stack trace for those that are not, a millisecond."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


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


def environment(runtime: Runtime, compile: bool) -> dict[str, str]:
    """What the last bits of a result depend on, beside the run config: versions, device, precision, threads."""
    if runtime.device.type == "cuda":
        device = f"{torch.cuda.get_device_name(runtime.device)}, CUDA {torch.version.cuda}"
    else:
        device = f"{runtime.device.type}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return ({"numba": version("numba")} if runtime.loops else {}) | {
        "torch": str(torch.__version__),
        "device": device,
        "dtype": runtime.dtype_name,
        "threads": str(torch.get_num_threads()),
        "compile": "yes" if compile else "no",
    }


# ---- What the machine has ----


def peak_memory(device: torch.device) -> int | None:
    """Most memory that this process has held on the device at a time, bytes; None where the system does not tell.

    On a GPU what torch has reserved, without the driver's context. On Linux not `ru_maxrss`, which a process inherits
    from the one that started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # not a peak, but torch keeps what it has freed
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def new_peak(device: torch.device) -> None:
    """Measure the peak on a GPU anew, without what torch keeps there for tensors of other sizes. On a CPU a no-op."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process could still get on the device, on top of what it has; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "darwin":
        return mac_free_memory()
    with contextlib.suppress(OSError):
        table = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(table["MemAvailable"].split()[0]) * 1024
        return min([free, *control_group_rooms()])
    return None


def mac_free_memory() -> int | None:
    """Free, inactive, speculative and purgeable pages, as `vm_stat` counts them; all there are where it does not."""
    try:
        text = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
        page = int(re.findall(r"page size of (\d+)", text)[0])
        counts = re.findall(r"Pages (?:free|inactive|speculative|purgeable): +(\d+)", text)
        return page * sum(map(int, counts))
    except (OSError, subprocess.SubprocessError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def control_group_rooms(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left to each memory limit that Linux has set on the groups of this process (containers, batch jobs).

    A group's limit holds for the groups inside it too. What it counts as used includes file pages that give way.
    """
    names = {  # version 1's memory controller, version 2
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        "": ("memory.max", "memory.current", "inactive_file"),
    }
    rooms = []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in names:
            continue
        limit, usage, reclaimable = names[controllers]
        top = root / controllers
        for folder in (top / path.lstrip("/"), *(top / path.lstrip("/")).parents):
            with contextlib.suppress(OSError, ValueError, KeyError):  # no limit here, or "max"
                stat = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(stat[reclaimable])
                rooms.append(int((folder / limit).read_text()) - used)
            if folder == top:
                break
    return rooms


def first_to_go() -> None:
    """Ask Linux to end this process before any other when memory is short. Elsewhere a no-op."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def matmul_rate(runtime: Runtime, seconds: float = 0.5) -> float:
    """FLOP/s that the device reaches in a large square matrix product in the runtime's dtype: the best of several.

    2 n^3 operations; n = 2048 keeps two cores busy for a tenth of a second in float32, and n = 8192 fills a GPU.
    """
    n = 2048 if runtime.device.type == "cpu" else 8192
    a = torch.ones(n, n, dtype=runtime.dtype, device=runtime.device)
    best, end = math.inf, time.perf_counter() + seconds
    while best == math.inf or time.perf_counter() < end:
        runtime.synchronize()
        start = time.perf_counter()
        a @ a
        runtime.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
