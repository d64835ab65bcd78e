"""The checks before a run: healthy configs pass, and each planted bug fails the check that is meant for it, first.

The bugs are planted in the real code, by replacing a function of the engine, the optimizer or the model.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tinyllm import engine, model, optim, sanity
from tinyllm.engine import new_state, train
from tinyllm.sanity import INITIAL_LOSS_TOLERANCE, logit_variance, prefix_entropy

# Wide enough to learn a batch by heart in the steps there are, for the recipes, optimizers and switches alike.
WIDE = ("model.n_embd=32", "model.n_layer=2", "train.batch_size=16", "train.max_steps=100", "optim.lr=0.01")


def results_of(run):
    return list(sanity.sanity(run))


def first_failure(run):
    failed = [r for r in results_of(run) if r.verdict == "fail"]
    assert failed, "nothing failed"
    return failed[0]


HEALTHY = [
    ("gpt2", ()),
    ("gpt2", ("optim.name=muon", "optim.lr=3e-3")),
    ("gpt2", ("model.tie_embeddings=false", "model.dropout=0.3", "model.attn_dropout=0.2")),
    ("modern", ()),
    ("modern", ("optim.name=muon", "model.tie_embeddings=true", "train.micro_batch_size=4")),
    ("modern", ("model.activation=swiglu", "model.dropout=0.2", "model.vocab_size=128")),
    ("gpt2", ("train.align_documents=true", "runtime.dtype=bfloat16")),
]


@pytest.mark.parametrize(("recipe", "overrides"), HEALTHY)
def test_healthy_configs_pass(make_run, recipe, overrides):
    results = results_of(make_run(*WIDE, *overrides, recipe=recipe))
    assert {r.name: r.verdict for r in results} == dict.fromkeys(
        ["token ids", "split sizes", "learning rate", "decay groups", "initial loss", "overfit one batch"], "pass"
    ), results


# ---- Planted bugs ----


def plant_init_std(monkeypatch):
    monkeypatch.setattr(model, "INIT_STD", 1.0)


def plant_unshifted_targets(monkeypatch):
    real = engine.BatchSource.batch

    def batch(self, step):
        inputs, _ = real(self, step)
        return inputs, inputs

    monkeypatch.setattr(engine.BatchSource, "batch", batch)


def plant_double_shift(monkeypatch):
    real = engine.BatchSource.batch

    def batch(self, step):
        inputs, targets = real(self, step)
        return inputs[:, :-1], targets[:, 1:]

    monkeypatch.setattr(engine.BatchSource, "batch", batch)


def plant_decay_on_norms(monkeypatch):
    real = optim.parameter_groups

    def everything_decays(net, config):
        return [dataclasses.replace(group, weight_decay=config.weight_decay) for group in real(net, config)]

    monkeypatch.setattr(optim, "parameter_groups", everything_decays)


def plant_forgotten_group(monkeypatch):
    real = optim.parameter_groups
    monkeypatch.setattr(optim, "parameter_groups", lambda net, config: real(net, config)[:1])


def plant_parameter_twice(monkeypatch):
    real = engine.build_optimizers

    def build(net, config):
        again = {"params": [net.norm.weight], "names": ["norm.weight"], "lr": 1e-3, "peak_lr": 1e-3, "weight_decay": 0}
        return [*real(net, config), torch.optim.AdamW([again])]

    monkeypatch.setattr(engine, "build_optimizers", build)


def plant_frozen_parameters(monkeypatch):
    real = engine.init_weights

    def init(net, seed):
        real(net, seed)
        net.blocks[0].requires_grad_(False)

    monkeypatch.setattr(engine, "init_weights", init)


def plant_group_left_behind(monkeypatch):
    def only_the_first(optimizers, factor):
        group = optimizers[0].param_groups[0]
        group["lr"] = group["peak_lr"] * factor

    monkeypatch.setattr(sanity, "set_learning_rate", only_the_first)
    monkeypatch.setattr(engine, "set_learning_rate", only_the_first)


def plant_rate_of_zero(monkeypatch):
    real = sanity.factor
    monkeypatch.setattr(sanity, "factor", lambda step, config: real(step, config) * (step > 0))


def plant_saw(monkeypatch):
    real = sanity.factor
    monkeypatch.setattr(sanity, "factor", lambda step, config: real(step, config) * (0.9 if step % 7 == 5 else 1.0))


def plant_missed_peak(monkeypatch):
    real = sanity.factor
    monkeypatch.setattr(sanity, "factor", lambda step, config: real(step, config) * 0.9)


def plant_wrong_loss(monkeypatch):
    real = engine.loss_fn
    monkeypatch.setattr(engine, "loss_fn", lambda *args: real(*args) * 2)


def plant_detached_loss(monkeypatch):
    real = engine.loss_fn
    monkeypatch.setattr(engine, "loss_fn", lambda logits, *args: real(logits.detach().requires_grad_(), *args))


def plant_lost_gradients(monkeypatch):
    real = engine.clip_gradients

    def clip(state, limit):
        norm = real(state, limit)
        engine.zero_grad(state)
        return norm

    monkeypatch.setattr(engine, "clip_gradients", clip)


def plant_blindness(monkeypatch):
    """The model sees no token, only where it is: it learns what is common, never the text."""
    real = model.GPT.forward
    monkeypatch.setattr(model.GPT, "forward", lambda self, tokens, cache=None: real(self, tokens * 0, cache))


def plant_dropped_inputs(monkeypatch):
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True: torch.zeros_like(x))


def plant_nan(monkeypatch):
    real = engine.loss_fn
    monkeypatch.setattr(engine, "loss_fn", lambda *args: real(*args) * (1 if "sum" in args else float("nan")))


BUGS = [
    (plant_unshifted_targets, "token ids", "shifted by one"),
    (plant_double_shift, "token ids", "shifted by one"),
    (plant_group_left_behind, "learning rate", "groups differ at step 0"),
    (plant_rate_of_zero, "learning rate", "0.0e+00 up to"),
    (plant_saw, "learning rate", ""),
    (plant_missed_peak, "learning rate", "up to 9.0e-03"),
    (plant_decay_on_norms, "decay groups", "decays blocks.0.norm_1.weight, blocks.0.norm_1.bias, "),
    (plant_forgotten_group, "decay groups", "missing or twice: blocks.0.norm_1.weight"),
    (plant_parameter_twice, "decay groups", "missing or twice: norm.weight"),
    (plant_frozen_parameters, "decay groups", "missing or twice: blocks.0.norm_1.weight"),
    (plant_init_std, "initial loss", ""),
    (plant_wrong_loss, "initial loss", ""),
    (plant_lost_gradients, "overfit one batch", ""),
    (plant_blindness, "overfit one batch", ""),
    (plant_dropped_inputs, "overfit one batch", ""),
    (plant_detached_loss, "overfit one batch", ""),
    (plant_nan, "overfit one batch", "the loss is nan"),
]


@pytest.mark.parametrize(("plant", "check", "measured"), BUGS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_bug_fails_its_check_first(make_run, monkeypatch, plant, check, measured):
    run = make_run(*WIDE)
    plant(monkeypatch)
    failed = first_failure(run)
    assert (failed.name, measured in failed.measured) == (check, True), failed
    assert failed.expected


def test_a_vocabulary_of_another_tokenizer_fails(make_run):
    """The ids in the files reach beyond the embedding."""
    run = make_run(*WIDE)
    config = run.config.model_copy(update={"model": run.config.model.model_copy(update={"vocab_size": 20})})
    result = next(sanity.sanity(dataclasses.replace(run, config=config)))
    assert (result.name, result.verdict, result.expected) == ("token ids", "fail", "below 20")
    assert int(result.measured.split()[-1]) == max(int(t.max()) for t in run.source.splits.values())


def test_a_schedule_that_ends_at_zero_fails(make_run):
    healthy = make_run(*WIDE, "optim.min_lr=0.0")  # the last step is still above it
    assert [r.verdict for r in results_of(healthy) if r.name == "learning rate"] == ["pass"]
    failed = first_failure(make_run(*WIDE, "optim.min_lr=0.0", "schedule.decay_steps=50"))
    assert failed.name == "learning rate"
    assert failed.measured.endswith("0.0e+00 at the end")


@pytest.mark.parametrize(
    ("overrides", "name", "measured"),
    [
        (["schedule.warmup_steps=50"], "learning rate", "warmup takes 50% of the steps"),
        (["schedule.decay_steps=1000"], "learning rate", "9.8e-03 at the end"),
        (["model.block_size=2048", "train.batch_size=1"], "split sizes", "validation windows"),
    ],
)
def test_what_is_unwise_is_a_warning(make_run, overrides, name, measured):
    checks = {"learning rate": sanity.learning_rate, "split sizes": sanity.split_sizes}
    result = checks[name](make_run(*WIDE, *overrides))
    assert (result.name, result.verdict) == (name, "warn")
    assert measured in result.measured
    assert result.fix


@pytest.mark.parametrize(
    "overrides", [[], ["model.n_embd=128"], ["model.tie_embeddings=false"], ["model.vocab_size=400"]]
)
@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_the_prediction_of_the_initial_loss_is_sharp(make_run, recipe, overrides):
    """Within a third of the tolerance: a planted bug of half a nat is not lost in it."""
    run = make_run(*overrides, recipe=recipe)
    result = sanity.initial_loss(run)
    predicted = np.log(run.vocab_size) + logit_variance(run) / 2
    assert abs(float(result.measured) - predicted) < INITIAL_LOSS_TOLERANCE / 3
    logits = new_state(run).model(torch.from_numpy(run.source.batch(0)[0]))
    assert logits.var().item() == pytest.approx(
        logit_variance(run), rel=0.5, abs=1e-9
    )  # a tied head likes its own input


def test_prefix_entropy_by_hand():
    inputs = np.array([[1, 2], [1, 3], [1, 2], [4, 2]])
    targets = np.array([[2, 5], [3, 5], [2, 6], [2, 5]])
    # After a first 1: 2, 3, 2. After 1 2: 5 and 6. All else is certain.
    expected = (2 * -np.log(2 / 3) - np.log(1 / 3) + 2 * np.log(2)) / 8
    assert prefix_entropy(inputs, targets) == pytest.approx(expected, rel=1e-12)
    assert prefix_entropy(inputs[[1, 3]], targets[[1, 3]]) == 0


# ---- It leaves no trace ----


def test_it_writes_nothing_and_draws_from_nobody(make_run, tales, tmp_path):
    run = make_run(*WIDE, "model.dropout=0.2")
    folder = engine.Path(tales.dir)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    torch.manual_seed(4)
    rng = torch.get_rng_state()
    for _ in sanity.sanity(run):
        assert torch.equal(torch.get_rng_state(), rng)  # in between too
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == []


def test_a_run_after_it_is_the_run_without_it(make_run, tmp_path):
    ends = []
    for name, check_first in (("plain", False), ("checked", True)):
        run = make_run(*WIDE, "model.dropout=0.2", f"train.out_dir={tmp_path / name}", "train.max_steps=15")
        if check_first:
            assert len(results_of(run)) == len(sanity.CHECKS)
        state = new_state(run)
        list(train(run, state))
        ends.append(state.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
