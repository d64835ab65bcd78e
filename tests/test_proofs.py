"""The slow proofs: whole runs of the examples, as a user starts them.

`just proofs` takes three quarters of an hour on two cores; `just proofs -k "not 10m"`, without the largest, minutes.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinyllm.engine import Run, TrainState, new_state, open_run, restore, train
from tinyllm.folder import reopen

ROOT = Path(__file__).parents[1]
SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare.txt"

pytestmark = pytest.mark.slow


def tinyllm(folder: Path, *arguments: str) -> str:
    """The standard output of a command that succeeds."""
    command = [sys.executable, "-m", "tinyllm", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_comes_within_a_twentieth_of_the_entropy(tmp_path: Path):
    config = str(ROOT / "examples/quickstart.toml")
    checked = tinyllm(tmp_path, "sanity", config)
    assert re.search(r"^\d+ passed, \d+ skipped in", checked, re.M), "nothing fails, nothing to look at"
    out = tinyllm(tmp_path, "train", config)
    above = float(re.search(r"this is ([\d.]+)% above", out)[1])
    assert 0 < above < 5
    # The sample is a story of the grammar's kind: it begins as they do, and ends with the moral.
    story = tinyllm(tmp_path, "sample", "--seed", "1")
    assert re.match(r"(Long ago|Once|There was once|Once upon)", story), story
    assert story.rstrip().endswith("."), story


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs tinyshakespeare.txt in ../shared/data")
def test_nanogpts_recipe_on_shakespeare(tmp_path: Path):
    config, source = str(ROOT / "examples/shakespeare-cpu.toml"), f"data.source={SHAKESPEARE}"
    tinyllm(tmp_path, "train", config, "--set", source)
    losses = tinyllm(tmp_path, "eval")
    assert float(re.search(r"^val +loss ([\d.]+)", losses, re.MULTILINE)[1]) <= 1.90
    assert tinyllm(tmp_path, "sample", "--prompt", "ROMEO:", "--max-new-tokens", "50").startswith("ROMEO:")


@pytest.mark.parametrize(
    ("example", "seed", "nanogpts"),
    [*(("shakespeare-fast", seed, 1.8857) for seed in (1, 2, 3)), ("shakespeare-10m", 1, 1.4697)],
)
@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="needs tinyshakespeare.txt in ../shared/data")
def test_the_fast_recipes_come_to_nanogpts_losses(tmp_path: Path, example: str, seed: int, nanogpts: float):
    config = str(ROOT / f"examples/{example}.toml")
    out = tinyllm(tmp_path, "train", config, "--set", f"data.source={SHAKESPEARE}", "--set", f"train.seed={seed}")
    assert float(re.search(r"^validation loss ([\d.]+)", out, re.MULTILINE)[1]) <= nanogpts


def test_a_compiled_run_is_resumed_exactly(make_config, tmp_path: Path):
    """With dropout and two threads: the compiler's own kernels keep the order of their sums."""
    overrides = ("runtime.compile=true", "runtime.threads=2", "model.dropout=0.2", "train.micro_batch_size=4")

    def run_in(folder: str) -> Run:
        return open_run(make_config(*overrides, f"train.out_dir={tmp_path / folder}", "model.n_embd=64"))

    def finish(run: Run, state: TrainState) -> dict[str, torch.Tensor]:
        notes = [event.text for event in train(run, state) if hasattr(event, "text")]
        assert notes[0].startswith("compiled in"), notes
        assert state.step == 20
        return state.model.state_dict()

    run = run_in("whole")
    whole = finish(run, new_state(run))
    run = run_in("parts")
    state = new_state(run)
    list(train(run, state, should_stop=lambda: state.step >= 9))
    config, found = reopen(tmp_path / "parts/ckpt.pt", ())
    run = open_run(config)
    parts = finish(run, restore(run, found.checkpoint))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
