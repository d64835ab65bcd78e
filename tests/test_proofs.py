"""The slow proofs: whole runs of the examples, as a user starts them. `just proofs`: three minutes on two cores."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare.txt"

pytestmark = pytest.mark.slow


def tinyllm(folder: Path, *arguments: str) -> str:
    """The standard output of a command that succeeds."""
    command = [sys.executable, "-m", "tinyllm", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart_comes_within_a_tenth_of_the_entropy(tmp_path: Path):
    config = str(ROOT / "examples/quickstart.toml")
    assert "6 passed" in tinyllm(tmp_path, "sanity", config)
    out = tinyllm(tmp_path, "train", config)
    above = float(re.search(r"this is ([\d.]+)% above", out)[1])
    assert 0 < above < 10
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
