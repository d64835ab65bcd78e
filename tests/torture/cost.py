"""What it costs that nothing is lost: nanoGPT's CPU recipe, with saves and without, in turn.

    for finding in cost(Path("/tmp/cost")):
        finding.what                  # "a save costs 37 ms, the 8 of a run of 79 s 0.4% of its time"

A run's eight saves are lost in the noise of any machine, which is a tenth of the time, not a hundredth. So these runs
evaluate a little and save every ten steps; what that costs, divided by the saves, is what one costs. It is the
difference of the quickest runs of each kind: noise only ever adds. The machine should be quiet all the same.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from torture.finding import Finding

ROOT = Path(__file__).parents[2]
TURNS, LIMIT = 4, 0.02
STEPS, INTERVAL = 500, 10
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
started = time.perf_counter()
saves = sum(type(event).__name__ == "Saving" for event in record(engine.train(run, state), config.train.out_dir))
usual = load(sys.argv[2] + "/run.toml").train
print(json.dumps([time.perf_counter() - started, saves, [usual.max_steps, usual.save_interval]]))
"""


def cost(folder: Path, *overrides: str) -> Iterator[Finding]:
    """One finding: how much longer the run takes with its saves."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (ROOT / "examples" / "shakespeare-cpu.toml").read_text(encoding="utf-8")
    (folder / "run.toml").write_text(text, encoding="utf-8")
    overrides = ("data.source=tales", f"data.dir={folder}/data", *overrides)  # tales need no network
    prepare = [sys.executable, "-m", "tinyllm", "prepare", f"{folder}/run.toml"]
    subprocess.run([*prepare, *(part for o in overrides for part in ("--set", o))], check=True, capture_output=True)
    often = {"max_steps": STEPS, "eval_interval": INTERVAL, "save_interval": INTERVAL, "eval_windows": 12}
    arguments = [*overrides, *(f"train.{key}={value}" for key, value in often.items())]
    took: dict[str, list[list[float]]] = {"with": [], "without": []}
    for turn in range(TURNS):
        for kind in ("with", "without") if turn % 2 else ("without", "with"):
            command = [sys.executable, "-c", CHILD, kind, str(folder), *arguments]
            said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
            took[kind].append(json.loads(said.splitlines()[-1]))
    with_saves, without = (min(seconds for seconds, _, _ in took[kind]) for kind in ("with", "without"))
    _, saves, (steps, interval) = took["with"][0]
    one, usual = (with_saves - without) / saves, -(-steps // interval)
    share = one * usual / (without / STEPS * steps)
    what = f"a save costs {1e3 * one:.0f} ms, the {usual} of a run of {without / STEPS * steps:.0f} s {share:.1%} of it"
    yield Finding("saves", share < LIMIT, what)
