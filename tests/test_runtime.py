"""Devices, precision, dropout seeds, and what is left when torch.compile fails."""

import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tinyllm import runtime as rt
from tinyllm.config import RuntimeConfig, check, to_dict
from tinyllm.engine import new_state, open_run, snapshot
from tinyllm.errors import RunError
from tinyllm.runtime import resolve


def mask(*key):
    rt.seed_dropout(*key)
    return F.dropout(torch.ones(64), 0.5)


def test_dropout_follows_from_seed_step_and_micro_step():
    keys = list(product((0, 1, 1337, 2**63 - 1), (0, 1, 2, 10**6), (0, 1, 2)))
    masks = {key: mask(*key) for key in keys}
    torch.rand(17)
    assert all(torch.equal(mask(*key), masks[key]) for key in reversed(keys))
    assert len({tuple(m.tolist()) for m in masks.values()}) == len(keys)
    # Nor are they alike in part: masks of neighbouring steps agree in half of their places, as strangers do.
    agree = [(mask(1, s, 0) == mask(1, s + 1, 0)).float().mean().item() for s in range(200)]
    assert sum(agree) / 200 == pytest.approx(0.5, abs=0.02)


def test_dropout_does_not_draw_what_the_seed_itself_draws():
    torch.manual_seed(0)
    plain = F.dropout(torch.ones(64), 0.5)
    assert not torch.equal(mask(0, 0, 0), plain)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "cuda:99", "abacus"])
def test_a_device_that_is_not_here_is_refused(device):
    if (device.startswith("cuda") and torch.cuda.is_available()) or (
        device == "mps" and torch.backends.mps.is_available()
    ):
        pytest.skip("it is here")
    with pytest.raises(RunError) as caught:
        rt.resolve(RuntimeConfig.model_construct(**RuntimeConfig().model_dump() | {"device": device}))
    assert f"the device '{device}' cannot be used: " in str(caught.value)
    assert "runtime.device = auto" in caught.value.fix
    assert caught.value.where == "runtime.device"


def test_cpu_by_name_and_threads():
    resolved = rt.resolve(RuntimeConfig(device="cpu", dtype="float32", threads=1))
    assert resolved.device == torch.device("cpu")
    assert torch.get_num_threads() == 1
    assert resolved.summary == "cpu, float32, 1 threads"


@pytest.mark.parametrize(("ratio", "expected"), [(3.0, torch.bfloat16), (1.0, torch.float32), (0.2, torch.float32)])
def test_auto_takes_bfloat16_on_a_cpu_only_where_it_is_faster(monkeypatch, ratio, expected):
    monkeypatch.setattr(rt, "bfloat16_speedup", lambda: ratio)
    assert rt.choose_dtype("auto", torch.device("cpu"))[0] == expected
    assert rt.choose_dtype("float32", torch.device("cpu"))[0] == torch.float32
    assert rt.choose_dtype("bfloat16", torch.device("cpu"))[0] == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrix_products_run_in_the_dtype_and_weights_stay_float32(dtype):
    resolved = rt.resolve(RuntimeConfig(device="cpu", dtype=dtype, threads=1))
    layer = nn.Linear(4, 4)
    with resolved.autocast():
        output = layer(torch.ones(2, 4))
    assert output.dtype == getattr(torch, dtype)
    assert resolved.dtype_name == dtype
    assert layer.weight.dtype == torch.float32


# ---- Compilation ----


@pytest.mark.parametrize("error", [ValueError("no such\nthing"), AssertionError(), RuntimeError("")])
def test_a_model_that_fails_to_compile_goes_on_without(monkeypatch, error):
    def broken(model):
        def call(tokens):
            model(tokens).sum().backward()  # leaves gradients behind, as a failure half way through would
            raise error

        return call

    monkeypatch.setattr(torch, "compile", broken)
    model, sample = nn.Linear(3, 3), torch.ones(1, 3)
    used, note = rt.compiled(model, sample, rt.resolve(RuntimeConfig(device="cpu", dtype="float32", threads=1)))
    assert used is model
    assert note.startswith(f"torch.compile failed, going on without it ({type(error).__name__}")
    assert "\n" not in note
    assert all(p.grad is None for p in model.parameters())
    assert used(sample).shape == (1, 3)


WITHOUT_COMPILER = """
import torch
from tinyllm.config import RuntimeConfig, check
from tinyllm.model import GPT, init_weights
from tinyllm.runtime import compiled, resolve

model = GPT(check({"model": {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4}}).model, 7)
init_weights(model, 1)
tokens = torch.zeros(2, 4, dtype=torch.int64)
expected = model(tokens)
used, note = compiled(model, tokens, resolve(RuntimeConfig(device="cpu", dtype="float32", threads=1)))
print(note)
assert used is model and torch.equal(used(tokens), expected)
assert all(p.grad is None for p in model.parameters())
"""


def test_without_a_compiler_the_model_is_left_usable(tmp_path):
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
    assert "torch.compile failed, going on without it (" in done.stdout, done.stdout


def test_too_many_threads_are_refused():
    """OpenMP would end the process when it cannot have them."""
    with pytest.raises(RunError, match=rf"4,096 threads on {os.cpu_count()} cores"):
        rt.resolve(RuntimeConfig(device="cpu", threads=4096))


# ---- Compiled loops ----


@pytest.mark.parametrize(
    ("settings", "flops", "expected"),
    [
        ({"dtype": "bfloat16"}, 1e14, True),
        ({"dtype": "bfloat16"}, 1e12, False),
        ({"dtype": "bfloat16", "loops": "on"}, 1e3, True),
        ({"dtype": "bfloat16", "loops": "off"}, 1e18, False),
        ({"dtype": "float32", "loops": "on"}, 1e18, False),
        ({"dtype": "bfloat16", "loops": "on", "compile": True}, 1e18, False),
    ],
)
def test_loops_are_for_long_runs_in_bfloat16(settings, flops, expected):
    runtime = resolve(RuntimeConfig(device="cpu", threads=1, **settings), flops)
    assert runtime.loops is expected
    assert runtime.settled["loops"] == ("on" if expected else "off")
    assert ("compiled loops" in runtime.summary) is expected


def test_what_auto_came_to_goes_on_with_the_run(make_config):
    long = make_config("runtime.dtype=bfloat16", "train.max_steps=1000000000")
    assert long.flops == 6 * 12 * 16**2 * 8 * 16 * 1e9  # one layer 16 wide, 8 sequences of 16 tokens
    run = open_run(long)
    assert run.config.runtime.loops == "on"
    kept = snapshot(run, new_state(run))
    assert kept.config["runtime"]["loops"] == "on"
    assert "numba" in kept.environment
    shorter = check(to_dict(run.config), ("train.max_steps=20", "schedule.decay_steps=20"))
    assert open_run(shorter).runtime.loops
