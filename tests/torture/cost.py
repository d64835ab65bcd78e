"""What it costs that nothing is lost: nanoGPT's CPU recipe, with saves and without, in turn.

    for finding in cost(Path("/tmp/cost")):
        finding.what                  # "2,000 steps in 20.1 s with 8 saves, in 20.0 s without: 1.004 times as long"

The machine should be quiet. The processes run by turns, so that a slow minute is shared; the ratio is that of the
medians, of what the processes themselves say about the time between their first and their last event.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from torture.finding import Finding

ROOT = Path(__file__).parents[2]
TURNS, LIMIT = 5, 1.02
CHILD = """
import json, sys, time
from tinyllm import engine, saver
from tinyllm.config import load
from tinyllm.metrics import record

class Never(saver.Saver):
    def save(self, checkpoint):
        self.step = checkpoint.step
    def keep_best(self, checkpoint):
        pass

kind, folder, *overrides = sys.argv[1:]
if kind == "without":
    engine.Saver = Never
config = load(sys.argv[2] + "/run.toml", [*overrides, f"train.out_dir={folder}/{kind}"])
run = engine.open_run(config)
state = engine.new_state(run)
import os; os.makedirs(config.train.out_dir, exist_ok=True)
started, cpu = time.perf_counter(), time.process_time()
saves = sum(type(event).__name__ == "Saving" for event in record(engine.train(run, state), config.train.out_dir))
print(json.dumps([time.perf_counter() - started, time.process_time() - cpu, saves, config.train.max_steps]))
"""


def cost(folder: Path, *overrides: str) -> Iterator[Finding]:
    """One finding: how much longer the run takes with its saves."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "examples" / "shakespeare-cpu.toml").read_text(encoding="utf-8")
    (folder / "run.toml").write_text(text, encoding="utf-8")
    overrides = ("data.source=tales", f"data.dir={folder}/data", *overrides)  # tales need no network
    prepare = [sys.executable, "-m", "tinyllm", "prepare", f"{folder}/run.toml"]
    subprocess.run([*prepare, *(part for o in overrides for part in ("--set", o))], check=True, capture_output=True)
    took: dict[str, list[list[float]]] = {"with": [], "without": []}
    for turn in range(TURNS):
        for kind in ("with", "without") if turn % 2 else ("without", "with"):
            command = [sys.executable, "-c", CHILD, kind, str(folder), *overrides]
            said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
            took[kind].append(json.loads(said.splitlines()[-1]))
    with_saves, without = (statistics.median(row[0] for row in took[kind]) for kind in ("with", "without"))
    ratio = with_saves / without
    _, _, saves, steps = took["with"][0]
    cpu = statistics.median(row[1] for row in took["with"]) / statistics.median(row[1] for row in took["without"])
    what = f"{steps:,} steps in {with_saves:.1f} s with {saves} saves, in {without:.1f} s without: "
    what += f"{ratio:.3f} times as long, {cpu:.3f} times the processor's time"
    yield Finding("saves", ratio < LIMIT, what)
