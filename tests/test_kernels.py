"""Machine code in files: what was compiled and what is loaded do the same, and what cannot be loaded is made again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllm import kernels


def said(code, folder):
    """What a process prints that has its machine code in a folder."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_machine_code_has_the_same_bits_where_it_is_made_and_where_it_is_loaded(tmp_path):
    """In two processes, a training's and a sampling's. The first says that it compiles."""
    code = """
import torch
from test_decode import EVERYDAY, Decoder, as_multiplied, make_model
from test_loops import drawn, half, loops, slopes
from tinyllm import kernels
from tinyllm.model import rope_tables

kernels.before_compiling(lambda: print("compiling"))
torch.manual_seed(0)
x, rope, weight = half(2, 200, 3 * 64), rope_tables(200, 16), drawn(3 * 64, seed=1).float()
fc, proj = torch.nn.Linear(3 * 64, 128), torch.nn.Linear(128, 3 * 64)
made = [
    slopes(lambda x, w: loops.norm(x, w, None, 1e-6, True)[0], x, weight),
    slopes(lambda x, w: loops.norm(x, w, w, 1e-6, False)[0], x, weight),
    slopes(lambda x: loops.add_dropout(x, loops.mlp(x, fc, proj, "gelu"), 0.3), x),
    slopes(lambda x: loops.attend(x, 4, 1e-6, rope, 0.1), x),
    slopes(lambda x: loops.attend(x, 2, 1e-6, rope_tables(96, 32), 0.0), half(2, 96, 3 * 64)),
    slopes(lambda x, w: loops.linear(x, w, None), half(2, 320, 64), drawn(96, 64, seed=1).float()),
]
model = make_model(**EVERYDAY).eval()
as_multiplied(model)
decoder = Decoder(model, 2, packed=True)
logits = [decoder(torch.full((2, length), length)) for length in (40, 1, 1)]
for numbers in (*(t for y, gradients in made for t in (y, *gradients)), *logits):
    print(numbers.double().contiguous().numpy().tobytes().hex())
"""
    made, loaded = said(code, tmp_path), said(code, tmp_path)
    assert made == "compiling\n" + loaded


NORMS = """
import numpy as np
from tinyllm.kernels import NONE, sampling

x, weight = np.arange(8, dtype=np.float32)[None], np.ones(8, np.float32)
for kind in (np.float32, np.uint16):
    out = np.zeros((1, 8), kind)
    sampling.norm(1, x, weight, NONE, 1e-5, False, out)
    print(out.tolist())
"""


def test_machine_code_for_other_types_is_not_taken(tmp_path):
    """Two processes that compile at once can write one file: here each of two files has what is the other's."""
    before = said(NORMS, tmp_path)
    one, two = sorted(tmp_path.rglob("sampling.norm-*.nbc"))
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    assert said(NORMS, tmp_path) == before


def test_machine_code_is_made_again_when_any_of_its_files_changes(tmp_path):
    """Numba looks at the file of a loop only, and not at those that it takes functions from."""
    shutil.copytree(Path(kernels.__file__).parents[1], tmp_path / "tinyllm")
    code = (
        "import numpy as np\n"
        "from tinyllm.kernels import sampling\n"
        "out = np.zeros((1, 1), np.float32)\n"
        "sampling.activate(1, np.ones((1, 1), np.float32), 1, 0, out)\n"
        "print(out[0, 0])\n"
    )

    def run():
        command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert run() == pytest.approx(0.8413, abs=1e-4)
    shared = tmp_path / "tinyllm" / "kernels" / "__init__.py"
    text = shared.read_text(encoding="utf-8")
    assert text.count("return x * (tail if") == 1
    shared.write_text(text.replace("return x * (tail if", "return x + (tail if"), encoding="utf-8")
    assert run() == pytest.approx(1.8413, abs=1e-4)


def test_machine_code_that_cannot_be_kept_or_is_damaged_is_compiled_again(tmp_path):
    """A folder that takes no more than a few bytes; then files that are cut, of each of which some part is missing."""
    pytest.importorskip("resource")
    full = (
        "import resource, signal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"  # so that a write fails with an OSError, as on a full disk
    )
    compiled = said(full + NORMS, tmp_path)
    assert said(NORMS, tmp_path) == compiled
    for ending in ("nbc", "nbi"):
        files = list(tmp_path.rglob(f"*.{ending}"))
        assert files
        for file in files:
            os.truncate(file, 20)
        assert said(NORMS, tmp_path) == compiled
    assert all(file.stat().st_size > 20 for file in tmp_path.rglob("*.nb?"))
