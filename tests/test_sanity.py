"""The checks before a run: healthy runs pass, nothing is left behind, and their references are right themselves.

What they catch is the business of tests/planted and test_planted.py.
"""

import dataclasses
import math
from itertools import groupby

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tinyllm import engine, sanity
from tinyllm.engine import new_state, train, train_step
from tinyllm.errors import ConfigError, RunError
from tinyllm.optim import build_optimizers
from tinyllm.sanity import CHECKS, Check, select
from tinyllm.sanity.config import closed_form
from tinyllm.sanity.data import places_of
from tinyllm.sanity.instruments import cross_entropy, reference_gradients, token_file, variant, wake, watched
from tinyllm.sanity.model import INITIAL_LOSS_TOLERANCE
from tinyllm.sanity.optimizer import adamw_error, muon_error
from tinyllm.sanity.reference import expected_parameters, reference_logits
from tinyllm.sanity.result import Result, passed
from tinyllm.sanity.subject import Subject
from tinyllm.sanity.trainings import prefix_entropy
from tinyllm.schedule import factor

# Wide enough to learn a batch by heart in the steps there are, for the recipes, optimizers and switches alike.
WIDE = ("model.n_embd=32", "model.n_layer=2", "train.batch_size=16", "train.max_steps=100", "optim.lr=3e-3")
COSTLY = ("memory", "time")  # they start a process of their own: test_cost.py


def results_of(run, *only):
    checks = select(only) if only else select(skip=COSTLY)
    return {result.name: result for result in sanity.sanity(run, checks)}


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("gpt2", ("model.dropout=0.2", "runtime.dtype=bfloat16")),
        ("modern", ("optim.name=muon", "train.micro_batch_size=4", "train.align_documents=true")),
    ],
)
def test_a_healthy_run_passes_all_of_them(make_run, recipe, overrides):
    results = results_of(make_run(*WIDE, *overrides, recipe=recipe))
    assert list(results) == [check.name for check in CHECKS if check.name not in COSTLY], "in this order"
    assert {name: r for name, r in results.items() if r.verdict == "fail"} == {}
    for r in results.values():
        assert r.measured
        assert r.seconds > 0
        assert r.expected or r.verdict == "skip" or r.name in ("size", "repetition", "token budget"), r


# ---- Choosing ----


def test_select():
    names = [check.name for check in CHECKS]
    assert [c.name for c in select()] == names
    assert len(set(names)) == len(names)
    groups = [check.group for check in CHECKS]
    assert [group for group, _ in groupby(groups)] == list(dict.fromkeys(groups)), "each heading once"
    assert [c.name for c in select(only=("loss", "causal mask"))] == ["causal mask", "loss"], "in their own order"
    assert [c.name for c in select(skip=names[1:])] == names[:1]
    assert [c.name for c in select(quick=True)] == [c.name for c in CHECKS if c.quick]
    assert "overfit one batch" not in {c.name for c in select(quick=True)}
    assert [c.name for c in select(only=("overfit one batch",), quick=True)] == ["overfit one batch"]
    with pytest.raises(ConfigError, match="casual mask"):
        select(only=("casual mask",))


def test_a_check_that_breaks_down_is_a_failure(make_run):
    def refuses(subject):
        raise RunError("the loss is nan", fix="a lower rate")

    def breaks(subject):
        return {}["missing"]

    run = make_run()
    checks = (Check("one", "", refuses), Check("two", "", breaks), Check("three", "", lambda subject: passed("fine")))
    one, two, three = sanity.sanity(run, checks)
    assert (one.name, one.verdict, one.measured, one.fix) == ("one", "fail", "the loss is nan", "a lower rate")
    assert (two.verdict, two.measured) == ("fail", "KeyError: 'missing'")
    assert "test_sanity.py, line" in two.diagnosis
    assert three.verdict == "pass", "the others go on"


def test_steps_that_break_down_after_all_weights_have_moved_are_found(make_run):
    """At this rate two steps go well, and the third has no finite gradient."""
    run = make_run("model.n_layer=2", "optim.name=muon", "optim.muon_lr=1000", "optim.lr=1000", "optim.grad_clip=0")
    (result,) = results_of(run, "weights move").values()
    assert result.verdict == "fail"
    assert "the weights have not taken it" in result.measured


# ---- What is unwise, and what is wrong with the config or the data alone ----


@pytest.mark.parametrize(
    ("overrides", "name", "verdict", "measured"),
    [
        (["schedule.warmup_steps=50"], "warmup", "warn", "50 steps, 50.0% of the run"),
        (["schedule.warmup_steps=0"], "warmup", "warn", "none"),
        (["schedule.warmup_steps=400", "schedule.kind=constant"], "learning rate", "fail", "up to 7.5e-04 at step 99"),
        (["schedule.decay_steps=1000"], "learning rate", "warn", "2.9e-03 at the end"),
        (["optim.min_lr=0.0"], "learning rate", "pass", ""),  # the last step is still above it
        (["optim.min_lr=0.0", "schedule.decay_steps=50"], "learning rate", "fail", "0.0e+00 at the end"),
        (["optim.lr=0.02"], "peak rate", "warn", "= 2.0e-02"),
        (["optim.lr=0.5"], "peak rate", "fail", "5.0e-01"),
        (["optim.lr=1e-6", "optim.min_lr=0.0"], "peak rate", "fail", "1.0e-06"),
        (["model.block_size=2048", "train.batch_size=1"], "split sizes", "warn", "validation windows"),
        (["model.vocab_size=400"], "vocabulary", "warn", "of 400 ids"),
        (["optim.weight_decay=10.0", "optim.eps=1e-3"], "settings", "warn", "= 0.001, 1e-8 is usual"),
    ],
)
def test_config_and_data_alone(make_run, overrides, name, verdict, measured):
    result = results_of(make_run(*WIDE, *overrides), name)[name]
    assert (result.name, result.verdict) == (name, verdict)
    assert measured in result.measured
    if verdict != "pass":
        assert result.diagnosis
        assert result.fix


def test_a_vocabulary_of_another_tokenizer_fails(make_run):
    """The ids in the files reach beyond the embedding."""
    run = make_run(*WIDE)
    result = results_of(variant(run, {"model": {"vocab_size": 20}}), "token ids")["token ids"]
    assert (result.verdict, result.expected) == ("fail", "below 20")
    assert int(result.measured.split()[-1]) == max(int(t.max()) for t in run.source.splits.values())


@pytest.mark.parametrize(
    "overrides", [[], ["model.n_embd=128"], ["model.tie_embeddings=false"], ["model.vocab_size=400"]]
)
@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_the_prediction_of_the_initial_loss_is_sharp(make_run, recipe, overrides):
    """Within a third of the tolerance: a planted bug of half a nat is not lost in it."""
    result = results_of(make_run(*overrides, recipe=recipe), "initial loss")["initial loss"]
    assert result.verdict == "pass"
    assert abs(result.values["loss"] - result.values["predicted"]) < INITIAL_LOSS_TOLERANCE / 3


# ---- The references ----


def test_prefix_entropy_by_hand():
    inputs = np.array([[1, 2], [1, 3], [1, 2], [4, 2]])
    targets = np.array([[2, 5], [3, 5], [2, 6], [2, 5]])
    # After a first 1: 2, 3, 2. After 1 2: 5 and 6. All else is certain.
    expected = (2 * -np.log(2 / 3) - np.log(1 / 3) + 2 * np.log(2)) / 8
    assert prefix_entropy(inputs, targets) == pytest.approx(expected, rel=1e-12)
    assert prefix_entropy(inputs[[1, 3]], targets[[1, 3]]) == 0


def test_the_cross_entropy_is_torchs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 11, generator=generator) * 20
    targets = torch.randint(11, (3, 5), generator=generator)
    targets[1, 2:] = -100
    assert float(cross_entropy(logits, targets)) == pytest.approx(
        float(F.cross_entropy(logits.double().flatten(0, 1), targets.flatten())), rel=1e-12
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_tensor_is_held_to_the_formula_from_its_first_gradient_on(make_run, name):
    """An expert that nothing was sent to at the first step: its averages begin later, the rate does not."""
    run = make_run(f"optim.name={name}", "schedule.kind=constant", "schedule.warmup_steps=4")
    state = new_state(run)
    late = {"norm.weight": adamw_error, "blocks.0.mlp.fc.weight": muon_error if name == "muon" else adamw_error}
    with watched(state) as updates:
        for step in range(3):
            for tensor in late:
                state.model.get_parameter(tensor).requires_grad_(step > 0)
            train_step(run, state)
    for tensor, error in late.items():
        steps = [u for u in updates if u.name == tensor and u.grad is not None]
        assert [u.step for u in steps] == [1, 2]
        assert error(steps, run.config.optim) < 1


@pytest.mark.parametrize("name", ["optimizer", "schedule in use"])
def test_a_check_that_saw_no_update_has_not_passed(make_run, monkeypatch, name):
    def by_others(run, state, batch):
        """A step of optimizers that the state does not hold."""
        own, state.optimizers = state.optimizers, build_optimizers(state.model, run.config.optim)
        report = train_step(run, state, batch)
        state.optimizers = own
        return report

    monkeypatch.setattr(sanity.optimizer, "train_step", by_others)
    result = results_of(make_run(*WIDE), name)[name]
    assert (result.verdict, result.measured) == ("fail", "no update to compare")


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_closed_form_is_the_schedule(make_config, kind):
    config = make_config(f"schedule.kind={kind}", "schedule.warmup_steps=7", "train.max_steps=100", "optim.lr=2e-3")
    assert [closed_form(step, config) for step in range(100)] == pytest.approx([factor(s, config) for s in range(100)])


@pytest.mark.parametrize("switches", [(), ("model.activation=swiglu", "model.bias=true"), ("model.activation=gelu",)])
@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_the_slow_gpt_is_the_fast_one(make_run, recipe, switches):
    run = make_run("model.n_layer=3", "model.n_embd=24", *switches, recipe=recipe)
    model = wake(new_state(run).model).eval()
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(run.config.model, run.vocab_size)
    tokens = torch.from_numpy(run.source.batch(0)[0][:2])
    slow = reference_logits(dict(model.named_parameters()), run.config.model, tokens)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).double(), slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_formulas_of_the_optimizers_are_torchs(make_run, name):
    """And each value of the config matters to them."""
    run = make_run(f"optim.name={name}", "optim.betas=[0.8, 0.9]", "schedule.kind=constant", "schedule.warmup_steps=4")
    state = new_state(run)
    wake(state.model)
    with watched(state) as updates:
        for _ in range(3):
            train_step(run, state)
    config = run.config.optim
    for tensor in {u.name for u in updates}:
        steps = [u for u in updates if u.name == tensor]
        assert [u.step for u in steps] == [0, 1, 2]
        if steps[0].muon:
            assert muon_error(steps, config) < 1
            for other in ({"muon_lr": 0.021}, {"muon_momentum": 0.9}, {"weight_decay": 0.0}):
                assert muon_error(steps, config.model_copy(update=other)) > 1
        else:
            assert adamw_error(steps, config) < 1
            for other in ({"betas": (0.9, 0.999)}, {"scale": 1.1}, {"coupled": True}, {"uncorrected": True}):
                if steps[0].weight_decay or "coupled" not in other:
                    assert adamw_error(steps, config, **other) > 1, other


def test_the_reference_gradient_is_autograds(make_run):
    run = make_run()
    model = new_state(run).model
    inputs, targets = (torch.from_numpy(a) for a in run.source.batch(0))
    found = reference_gradients(model, inputs, targets)
    engine.loss_fn(model(inputs), targets).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("length", [3, 40])
def test_all_places_of_a_window_are_found(make_run, length):
    run = make_run()
    path = engine.Path(run.data.dir) / "train.bin"
    tokens = token_file(path).tolist()
    for at in (0, 77, len(tokens) - length):
        row = tokens[at : at + length]
        expected = [i for i in range(len(tokens) - length + 1) if tokens[i : i + length] == row]
        assert list(places_of(np.array(row), path, backwards=False)) == expected
        assert list(places_of(np.array(row), path)) == expected[::-1]
    assert not list(places_of(np.array(tokens[5:45])[::-1], path))


def test_the_evaluation_of_a_subject_starts_from_the_runs_own_weights(make_run):
    run = make_run("model.dropout=0.2")
    own = new_state(run).model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in Subject(run).fresh.state_dict().items())


# ---- It leaves no trace ----


def test_it_writes_nothing_and_draws_from_nobody(make_run, tales, tmp_path):
    run = make_run(*WIDE, "model.dropout=0.2")
    folder = engine.Path(tales.dir)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()}
    torch.manual_seed(4)
    rng, np_rng = torch.get_rng_state(), np.random.get_state()[1].copy()
    for _ in sanity.sanity(run, select(skip=COSTLY)):
        assert torch.equal(torch.get_rng_state(), rng)  # in between too
        assert (np.random.get_state()[1] == np_rng).all()
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == []
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_after_it_is_the_run_without_it(make_run, tmp_path):
    ends = []
    for name, check_first in (("plain", False), ("checked", True)):
        run = make_run(*WIDE, "model.dropout=0.2", f"train.out_dir={tmp_path / name}", "train.max_steps=15")
        if check_first:
            assert len(results_of(run)) == len(CHECKS) - len(COSTLY)
        state = new_state(run)
        list(train(run, state))
        ends.append(state.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_results_are_plain():
    result = Result("pass", "1")
    assert dataclasses.asdict(result)["verdict"] == "pass"
    assert not math.isnan(result.seconds)


@pytest.mark.parametrize("rate", [0.1, 0.12345, 0.2, 0.33335, 0.49995])
def test_no_rate_of_dropout_is_suspected(make_run, rate):
    """The built-in model rounds it to a multiple of 2^-16."""
    (result,) = sanity.sanity(make_run(f"model.dropout={rate}"), select(only=["dropout"]))
    assert result.verdict == "pass", result.diagnosis
