"""The rooms of the house: imports go downward, and looking something up does not wait for torch."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tinyllm

ROOT = Path(tinyllm.__file__).parents[1]
CONTRACTS = ROOT / "pyproject.toml"


def lint(folder):
    """import-linter's verdict on the package in `folder`."""
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    # -P and the folder first: the package there is what is looked at, wherever tinyllm is installed.
    code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{code}"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, to break."""
    pytest.importorskip("importlinter")
    if not CONTRACTS.is_file():
        pytest.skip("installed without its pyproject.toml")
    shutil.copytree(ROOT / "tinyllm", tmp_path / "tinyllm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CONTRACTS, tmp_path)
    return tmp_path


def test_the_contracts_are_kept_and_notice_a_breach(copy):
    code, text = lint(copy)
    assert code == 0, text
    assert " 0 broken" in text
    breaches = {
        "schedule.py": "from tinyllm import engine",
        "config.py": "import torch",
        "engine.py": "import rich.table",
        "prepare.py": "def lazy():\n    from typer import echo",
    }
    for name, line in breaches.items():
        path = copy / "tinyllm" / name
        path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    code, text = lint(copy)
    assert code != 0
    for contract in (
        "Imports go downward",
        "Only ui.py and ui_sanity.py know rich",
        "Only cli.py knows typer",
        "No torch before the model",
    ):
        assert f"{contract} BROKEN" in text, text
    assert "tinyllm.schedule -> tinyllm.engine" in text


def test_every_module_has_its_layer():
    """A file that is in no layer may import anything: the contract would not notice."""
    contracts = tomllib.loads(CONTRACTS.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    listed = [name.strip() for layer in layers for name in layer.replace(":", "|").split("|")]
    modules = {f"tinyllm.{path.stem}" for path in (ROOT / "tinyllm").glob("*.py") if path.stem != "__init__"}
    modules |= {f"tinyllm.{path.parent.name}" for path in (ROOT / "tinyllm").glob("*/__init__.py")}
    assert sorted(listed) == sorted(modules)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("cli", ["torch", "numpy", "pydantic", "matplotlib"]),
        ("config", ["torch", "numpy"]),
        ("plot", ["torch"]),
        ("prepare", ["torch", "pooch", "requests"]),
        ("errors", ["torch", "numpy", "pydantic", "matplotlib", "rich", "typer"]),
    ],
)
def test_imports_are_cheap(module, unwanted):
    code = f"import sys; before = set(sys.modules); import tinyllm.{module}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(done.stdout.split())
    assert f"tinyllm.{module}" in loaded
    assert not loaded & set(unwanted)


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_a_run_starts_without_torchs_compiler(recipe, tmp_path):
    """To import it takes a second, and several harmless calls do: opening, checking and training must make none."""
    code = (
        "import sys\n"
        "from tinyllm import engine, prepare, sanity\n"
        "from tinyllm.config import check\n"
        f"model = {{'recipe': '{recipe}', 'n_layer': 1, 'n_head': 2, 'n_embd': 16, 'block_size': 32, 'dropout': 0.1}}\n"
        "data = {'source': 'tales', 'dir': 'data', 'tokenizer': 'char', 'tales_stories': 40}\n"
        "config = check({'model': model, 'data': data, 'train': {'batch_size': 2}, 'optim': {'name': 'muon'}})\n"
        "list(prepare.prepare(config.data))\n"
        "run = engine.open_run(config)\n"
        "assert len(list(sanity.sanity(run, sanity.select(quick=True)))) > 40\n"
        "engine.train_step(run, engine.new_state(run))\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tinyllm.sanity" in done.stdout.split()
    assert "torch._dynamo" not in done.stdout.split()
