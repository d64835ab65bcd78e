# Recipes; `just` alone lists them. Everything happens in .venv, which the README's two lines make.

set positional-arguments

bin := ".venv/bin"

# What there is
default:
    @{{just_executable()}} --list

# tinyllm itself, in the versions it was tested with
install:
    {{bin}}/pip install --quiet --disable-pip-version-check -c constraints.txt -e .

# tinyllm and what its tests need
install-dev:
    {{bin}}/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'

# From nothing to a storyteller: prepare, check, train, sample
quickstart: install
    {{bin}}/tinyllm prepare examples/quickstart.toml
    {{bin}}/tinyllm sanity examples/quickstart.toml
    {{bin}}/tinyllm train examples/quickstart.toml --set train.out_dir=out/quickstart --overwrite
    {{bin}}/tinyllm sample --checkpoint out/quickstart

# All tests but the slow proofs
test *args: install-dev
    {{bin}}/python -m pytest -n 2 -m 'not slow' "$@"

# The slow proofs: whole training runs, on real data
proofs *args: install-dev
    {{bin}}/python -m pytest -m slow tests/test_proofs.py "$@"

# Plant every bug, run every healthy combination: what the checks find, miss and wrongly suspect
bugs *args: install-dev
    {{bin}}/python benchmarks/bugs.py "$@"

# Kill, fill, damage and deceive whole runs, and look whether anything is lost
torture *args: install-dev
    {{bin}}/python benchmarks/torture.py "$@"

# How fast it is on this machine, beside a plain loop
bench *args: install-dev
    {{bin}}/python benchmarks/speed.py "$@"

# Style and layers
lint: install-dev
    {{bin}}/ruff check .
    {{bin}}/ruff format --check .
    {{bin}}/lint-imports --no-cache
