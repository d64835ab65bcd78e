"""`tinyllm bench` measures real steps of the run and leaves no trace of them."""

import json
import subprocess
import sys

import pytest
import torch

from tinyllm.bench import AT_LEAST, KINDS, OPTIMIZER, WARM_UP, Bench, bench
from tinyllm.config import to_toml
from tinyllm.engine import new_state, train_step
from tinyllm.optim import AdamW
from tinyllm.sanity.cost import flops_a_token


@pytest.mark.parametrize(
    "overrides", [[], ["model.dropout=0.2", "train.micro_batch_size=2", "optim.name=muon"]], ids=["plain", "muon"]
)
def test_the_figures_belong_together(make_run, tmp_path, monkeypatch, overrides):
    monkeypatch.chdir(tmp_path)
    run, taken = make_run(*overrides), []

    def counted(*args, **kwargs):
        taken.append(args[1].step)
        return train_step(*args, **kwargs)

    monkeypatch.setattr("tinyllm.bench.train_step", counted)
    found = bench(run, seconds=0.0)
    assert isinstance(found, Bench)
    assert taken == list(range(WARM_UP + found.steps + 1))  # real steps, one after another; the last is looked into
    assert 0 < found.quickest_seconds <= found.step_seconds <= found.slowest_seconds
    tokens = run.config.tokens_per_step
    assert found.tokens_a_second == pytest.approx(tokens / found.step_seconds)
    flops = flops_a_token(new_state(run).model, run.config) * tokens
    assert found.flops_a_second == pytest.approx(flops / found.step_seconds)
    assert found.share_of_peak == pytest.approx(found.flops_a_second / found.matmul_rate)
    assert {"matrix products", OPTIMIZER} <= found.parts.keys() <= {*KINDS, OPTIMIZER, "Python and the rest"}
    assert 0.9 < sum(found.parts.values()) <= 1 + 1e-9
    assert list(found.parts.values()) == sorted(found.parts.values(), reverse=True)
    assert list(tmp_path.iterdir()) == []


def test_what_is_slow_is_named(make_run, monkeypatch):
    """The same run with an optimizer that takes its time spends most of a step on it."""
    run, own = make_run(), AdamW.step

    def slow(self):
        a = torch.ones(600, 600)
        for _ in range(40):
            a = a @ a / 600
        own(self)

    monkeypatch.setattr(AdamW, "step", slow)
    assert next(iter(bench(run, seconds=0.0).parts)) == OPTIMIZER


def test_operations_of_our_own_are_named(make_run, monkeypatch):
    """Though each is made of products and sums: that of a wide vocabulary takes its part of the step."""
    monkeypatch.setattr("tinyllm.bench.SMALL", 0.0)  # what is small depends on what else the machine does
    parts = bench(make_run("model.recipe=modern", "model.vocab_size=4096"), seconds=0.0).parts
    assert {"loss", "norms", "activations"} <= parts.keys()
    in_loops = make_run("model.dropout=0.5", "runtime.dtype=bfloat16", "runtime.loops=on")
    assert {"norms", "activations", "attention", "dropout"} <= bench(in_loops, seconds=0.0).parts.keys()


def test_the_command_line(make_config, tmp_path):
    (tmp_path / "run.toml").write_text(to_toml(make_config()), encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))

    def said(*options):
        command = [sys.executable, "-m", "tinyllm", "bench", "--seconds", "0", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "profiler" not in done.stderr  # it logs, unless it is told not to
        assert f"measuring for about 0 s, {AT_LEAST} steps at the least" in done.stderr
        return done.stdout

    assert "tokens a second" in (shown := said())
    assert "matrix products" in shown
    assert json.loads(said("--json")).keys() == set(Bench.__dataclass_fields__)
    assert sorted(tmp_path.rglob("*")) == before
