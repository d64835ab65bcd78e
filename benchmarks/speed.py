"""How fast tinyllm is on this machine, beside the loop of the tutorials (`textbook.py`), in turn, in one run.

    just bench                             # all of it: half an hour on two cores; nothing else should run
    python benchmarks/speed.py step start --turns 5

machine   what it is, and what matrix products reach on it
step      an optimizer step of nanoGPT's two Shakespeare models, and the memory that it takes
start     from Enter to the first line, and to the first step, beside the import of torch
sample    new tokens a second, one text and sixteen at a time
prepare   text to GPT-2's tokens, beside tiktoken on one thread, and the memory that it takes
growth    the time of a step against batch, context, width and depth

Ratios are those of medians; the spread is from the quickest to the slowest. The text is that of `tales`, so that
nothing is downloaded, but for GPT-2's vocabulary.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = {"cpu": "shakespeare-cpu", "char": "shakespeare-char"}  # of textbook.py's sizes
THE_SAME = ["model.bias=false"]  # as nanoGPT's models are
STEPS, WARM_UP = {"cpu": 70, "char": 14}, {"cpu": 10, "char": 6}  # both, until the memory that they use is mapped
TOKENS = 500
MEGABYTES = 200
CHILD = """
import json, sys, time
from tinyllm import engine, runtime
from tinyllm.config import load
path, steps, *overrides = sys.argv[1:]
run = engine.open_run(load(path, overrides))
state, seconds = engine.new_state(run), []
for _ in range(int(steps)):
    start = time.perf_counter()
    engine.train_step(run, state)
    run.runtime.synchronize()
    seconds.append(time.perf_counter() - start)
from tinyllm.sanity.cost import flops_a_token
flops = flops_a_token(state.model, run.config) * run.config.tokens_per_step
peak = runtime.peak_memory(run.runtime.device)
print(json.dumps({"steps": seconds, "flops": flops, "peak_bytes": peak, "runtime": run.runtime.summary}))
"""
SPEAKER = """
import json, sys, time
import torch
from tinyllm import engine
from tinyllm.config import load
from tinyllm.generate import Sampling, as_multiplied, generate
path, n, tokens, *overrides = sys.argv[1:]
run = engine.open_run(load(path, overrides))
model, seconds = engine.new_model(run), []
if run.runtime.dtype == torch.bfloat16:  # as tinyllm sample does
    as_multiplied(model)
for _ in range(2):  # the first text is the one that waits until the loops are loaded
    texts = generate(model, [0], Sampling(max_new_tokens=int(tokens)), n_samples=int(n))
    start = time.perf_counter()
    for _ in texts:
        pass
    seconds.append(time.perf_counter() - start)
print(json.dumps({"first": seconds[0], "then": seconds[1]}))
"""
PREPARE = """
import json, sys, time
from tinyllm import prepare
from tinyllm.config import check
source, folder = sys.argv[1:]
start = time.perf_counter()
*_, made = prepare.prepare(check({"data": {"source": source, "dir": folder, "tokenizer": "gpt2"}}).data)
seconds = time.perf_counter() - start
status = open("/proc/self/status").read().split() if sys.platform == "linux" else ["VmHWM:", 0]
peak = status[status.index("VmHWM:") + 1 :]
print(json.dumps({"seconds": seconds, "peak_bytes": int(peak[0]) * 1024}))
"""
TIKTOKEN = """
import json, os, sys, time
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tinyllm import tokenizer as tok
from tinyllm.download import cache_path
tok.build("gpt2", (), vocab_size=0, documents=False)  # has the files fetched
os.environ["TIKTOKEN_CACHE_DIR"] = ""  # it would copy the files into a folder of its own
files = [str(cache_path(f"gpt2/{name}")) for name in ("vocab.bpe", "encoder.json")]
words = r"'(?:[sdmt]|ll|ve|re)| ?\\p{L}++| ?\\p{N}++| ?[^\\s\\p{L}\\p{N}]++|\\s++$|\\s+(?!\\S)|\\s"
ranks, special = data_gym_to_mergeable_bpe_ranks(*files), {"<|endoftext|>": 50256}
gpt2 = tiktoken.Encoding("gpt2", pat_str=words, mergeable_ranks=ranks, special_tokens=special)
text = open(sys.argv[1], encoding="utf-8").read(20_000_000)
parts = [text[first : first + 65536] for first in range(0, len(text), 65536)]
start = time.perf_counter()
for part in parts:
    gpt2.encode_ordinary(part)
print(json.dumps({"seconds": time.perf_counter() - start, "bytes": len(text.encode())}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="which; all if none is named")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="tinyllm-bench-") as name:
        folder = Path(name)
        text = folder / "tales.txt"
        run([sys.executable, "-c", WRITE, str(text), "2"])
        for part in options.parts or PARTS:
            print(f"\n{part}", flush=True)
            PARTS[part](folder, text, options.turns)


WRITE = """
import sys
from tinyllm.tales import stories
path, megabytes = sys.argv[1:]
missing = int(megabytes) * 1_000_000
with open(path, "w", encoding="utf-8") as file:
    for story in stories(missing, 0):  # more than it takes
        missing -= file.write(story.text + "\\n\\n")
        if missing <= 0:
            break
"""


# ---- The parts ----


def machine(folder: Path, text: Path, turns: int) -> None:
    import torch

    from tinyllm.config import RuntimeConfig
    from tinyllm.runtime import matmul_rate, resolve

    print(f"  {processor()}, {os.cpu_count()} cores; torch {torch.__version__}, Python {platform.python_version()}")
    for dtype in ("float32", "bfloat16"):
        rate = matmul_rate(resolve(RuntimeConfig(dtype=dtype)), 2.0)
        print(f"  a large matrix product in {dtype}: {rate / 1e9:,.0f} GFLOP/s")


def step(folder: Path, text: Path, turns: int) -> None:
    for size, steps in STEPS.items():
        config, own = prepared(folder, text, size), []
        theirs: list[dict] = []
        for _ in range(turns):
            theirs.append(said([*TEXTBOOK, str(text), "--size", size, "--steps", str(steps)]))
            own.append(said([sys.executable, "-c", CHILD, *config, str(steps), *of_text(folder, text)]))
        seconds = [[statistics.median(each["steps"][WARM_UP[size] :]) for each in both] for both in (own, theirs)]
        row(f"{size}, seconds a step", *seconds)
        row(f"{size}, peak memory, GB", *([each["peak_bytes"] / 1e9 for each in both] for both in (own, theirs)))
        rate = own[0]["flops"] / statistics.median(seconds[0])
        print(f"  {'':32} {rate / 1e9:,.0f} GFLOP/s; {own[0]['runtime']}")


def start(folder: Path, text: Path, turns: int) -> None:
    config = prepared(folder, text, "cpu")
    commands = {"tinyllm --help": ["--help"], "tinyllm plot-lr": ["plot-lr", *config]}
    for name, arguments in commands.items():
        times = [timed(lambda a=arguments: run([*TINYLLM, *a])) for _ in range(2 * turns + 1)]
        row(f"{name}, seconds", times[1:])
    parts: dict[str, Callable[[], float]] = {
        "import torch alone": lambda: timed(lambda: run([sys.executable, "-c", "import torch"])),
        "first step": lambda: first_step(folder, text, config[0], []),
        "first step, no checks": lambda: first_step(folder, text, config[0], ["--no-sanity"]),
    }
    seconds = [[part() for part in parts.values()] for _ in range(turns + 1)]
    for name, *times in zip(parts, *seconds[1:], strict=True):
        row(f"{name}, seconds", times)


def sample(folder: Path, text: Path, turns: int) -> None:
    config = prepared(folder, text, "char")
    rates: dict[int, list[float]] = {1: [], 16: []}
    theirs, loading = [], []
    for _ in range(turns):
        told = said([*TEXTBOOK, str(text), "--size", "char", "--steps", "0", "--tokens", str(TOKENS)])
        theirs.append(TOKENS / sum(told["tokens"]))
        for n, own in rates.items():
            told = said([sys.executable, "-c", SPEAKER, *config, str(n), str(TOKENS), *of_text(folder, text)])
            own.append(n * TOKENS / told["then"])
            if n == 1:
                loading.append(told["first"] - told["then"])
    row("one text, tokens a second", rates[1], theirs)
    row("sixteen texts, tokens a second", rates[16], rates[1])
    row("before the first, seconds", loading)


def prepare(folder: Path, text: Path, turns: int) -> None:
    large = folder / "large.txt"
    run([sys.executable, "-c", WRITE, str(large), str(MEGABYTES)])
    own, theirs, peaks = [], [], []
    for turn in range(turns):
        told = said([sys.executable, "-c", TIKTOKEN, str(large)])
        theirs.append(told["bytes"] / told["seconds"] / 1e6)
        told = said([sys.executable, "-c", PREPARE, str(large), str(folder / f"large-{turn}")])
        own.append(large.stat().st_size / told["seconds"] / 1e6)
        peaks.append(told["peak_bytes"] / 1e6)
    row("GPT-2's tokens, MB a second", own, theirs)
    row("peak memory, MB", peaks)


def growth(folder: Path, text: Path, turns: int) -> None:
    config = prepared(folder, text, "cpu")
    base = {"train.batch_size": 16, "model.block_size": 128, "model.n_embd": 256, "model.n_layer": 4}
    for key in base:
        for factor in (1, 2, 4):
            given = {**base, key: base[key] * factor}
            overrides = [f"{name}={value}" for name, value in given.items()]
            runs = [
                said([sys.executable, "-c", CHILD, *config, "8", *of_text(folder, text), *overrides])
                for _ in range(turns)
            ]
            seconds = [statistics.median(each["steps"][2:]) for each in runs]
            rate = runs[0]["flops"] / statistics.median(seconds) / 1e9
            row(f"{key.partition('.')[2]} = {given[key]}, seconds", seconds, note=f"{rate:,.0f} GFLOP/s")


# ---- What they share ----

TEXTBOOK = [sys.executable, str(ROOT / "benchmarks" / "textbook.py")]
TINYLLM = [sys.executable, "-m", "tinyllm"]


def prepared(folder: Path, text: Path, size: str) -> list[str]:
    """The path of the run config of this size; its data is ready."""
    path = folder / f"{size}.toml"
    if not path.exists():
        path.write_text((ROOT / "examples" / f"{EXAMPLES[size]}.toml").read_text(encoding="utf-8"), encoding="utf-8")
        run([*TINYLLM, "prepare", str(path), *sets(of_text(folder, text))])
    return [str(path)]


def of_text(folder: Path, text: Path) -> list[str]:
    return [f"data.source={text}", f"data.dir={folder}/data", *THE_SAME]


def sets(values: Sequence[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def first_step(folder: Path, text: Path, config: str, options: list[str]) -> float:
    """Seconds from the start of `tinyllm train` to the end of its first step, as its metrics tell."""
    out = folder / "out"
    few = ["train.max_steps=1", "train.log_interval=1", "schedule.warmup_steps=0", f"train.out_dir={out}"]
    began = time.time()
    run([*TINYLLM, "train", config, "--overwrite", *options, *sets([*of_text(folder, text), *few])])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return next(row["time"] for row in rows if row["event"] == "step") - began


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)[:200]}\n{done.stderr}")
    return done.stdout


def said(command: list[str]) -> dict:
    """What the process says in the JSON of its last line."""
    return json.loads(run(command).splitlines()[-1])


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def row(name: str, own: list[float], theirs: Sequence[float] = (), note: str = "") -> None:
    """A line: the median and the spread, and beside them the yardstick's, with the ratio."""
    line = f"  {name:32} {shown(own)}"
    if theirs:
        line += f"   yardstick {shown(theirs)}   ratio {statistics.median(own) / statistics.median(theirs):.3f}"
    print(f"{line}   {note}".rstrip(), flush=True)


def shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):8.3f} ({min(values):.3f} to {max(values):.3f})"


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    kinds = [kind for kind in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if kind in flags]
    return f"{names[0] if names else platform.processor()} ({', '.join(kinds)})"


PARTS = {f.__name__: f for f in (machine, step, start, sample, prepare, growth)}

if __name__ == "__main__":
    main()
