"""The engine: a resumed run against an uninterrupted one, bit by bit; a step against a plain torch loop; evaluation."""

import itertools
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyllm import checkpoint as ckpt
from tinyllm import tokenizer as tok
from tinyllm.config import RunConfig
from tinyllm.data import IGNORED
from tinyllm.engine import (
    Run,
    TrainState,
    evaluate,
    new_state,
    open_run,
    restore,
    snapshot,
    train,
    train_step,
    usual_limit,
)
from tinyllm.errors import CheckpointError, ConfigError, DataError, NonFiniteError, RunError
from tinyllm.events import Evaluated, Finished, Saved, Saving, StepDone, Stopped
from tinyllm.folder import reopen
from tinyllm.metrics import as_row, record, trim
from tinyllm.metrics import read as rows_of
from tinyllm.optim import state_by_name
from tinyllm.prepare import prepare
from tinyllm.schedule import factor


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in state.model.named_parameters()}


def differing(a, b, path="") -> list[str]:
    """Where two nested values are not bit-equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys(), key=str)
        return [d for k in keys for d in differing(a.get(k), b.get(k), f"{path}/{k}")]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [path]


def all_of(state: TrainState):
    return {"model": state.model.state_dict(), "optimizer": state_by_name(state.optimizers), "step": state.step} | {
        "best": state.best_val_loss
    }


def without_time(rows):
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


# ---- Resuming is exact ----


class Countdown:
    """A should_stop that turns true at its n-th question, wherever in the run that falls."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        self.left -= 1
        return self.left < 0


def start(config: RunConfig, should_stop=lambda state: lambda: False):
    run = open_run(config)
    state = new_state(run)
    Path(config.train.out_dir).mkdir(parents=True, exist_ok=True)
    events = list(record(train(run, state, should_stop(state)), config.train.out_dir))
    return state, events


def go_on(path, should_stop=lambda state: lambda: False):
    """As a new process would: nothing but the file, and whatever random state there happens to be."""
    torch.manual_seed(np.random.default_rng().integers(1 << 40))
    config, found = reopen(path, ())
    run = open_run(config)
    state = restore(run, found.checkpoint)
    trim(config.train.out_dir, state.step)
    events = list(record(train(run, state, should_stop(state)), config.train.out_dir))
    return state, events


NOISY = ("model.dropout=0.2", "model.attn_dropout=0.1", "train.micro_batch_size=2")


@pytest.mark.parametrize(("dtype", "loops"), [("float32", "off"), ("bfloat16", "off"), ("bfloat16", "on")])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_stopped_at_step_73_ends_like_one_that_was_not(make_config, tmp_path, optimizer, dtype, loops):
    recipe = "modern" if optimizer == "muon" else "gpt2"
    settings = [*NOISY, f"optim.name={optimizer}", f"runtime.dtype={dtype}", f"runtime.loops={loops}"]
    settings += ["train.max_steps=200"]
    settings += ["train.eval_interval=50", "train.save_interval=60", "train.log_interval=7"]

    def config(name):
        return make_config(*settings, f"train.out_dir={tmp_path / name}", recipe=recipe)

    whole, _ = start(config("whole"))
    stopped, events = start(config("cut"), lambda state: lambda: state.step >= 73)
    assert events[-1] == Stopped(73)
    assert stopped.step == 73
    resumed, events = go_on(tmp_path / "cut" / "ckpt.pt")
    assert isinstance(events[-1], Finished)
    assert differing(all_of(resumed), all_of(whole)) == []
    assert without_time(rows_of(tmp_path / "cut")) == without_time(rows_of(tmp_path / "whole"))
    assert len(rows_of(tmp_path / "whole")) == 28 + 1 + 5  # every seventh step and the last; 0, 50, 100, 150, 200
    ends = [ckpt.load(tmp_path / name / "ckpt.pt") for name in ("whole", "cut")]
    assert differing(*({"model": c.model, "optimizer": c.optimizer} for c in ends)) == []
    assert all(p.abs().max() > 0 for p in weights(whole).values())  # it did learn with all of them


@pytest.fixture
def short(make_config, tmp_path):
    """20 steps of 4 micro-batches: a function from a name (and overrides) to the config, and the whole run's end."""

    def config(name, *overrides):
        return make_config(*NOISY, "train.log_interval=3", *overrides, f"train.out_dir={tmp_path / name}")

    state, events = start(config("whole"))
    return config, state, events


@pytest.mark.parametrize(
    "stops", [[0], [1], [0, 0, 0], [2], [5, 3, 8, 44, 1], [13, 40], [42], [43], [42, 0, 1], [83], [85, 1]]
)
def test_wherever_it_is_stopped_it_ends_alike(short, tmp_path, stops):
    """The n-th question may come before step 0, in an evaluation or between two micro-batches.

    An evaluation here asks twice, a step four times: questions 42 and 43 are inside the evaluation at step 10, where a
    checkpoint has just been saved.
    """
    config, whole, _ = short
    state, events = start(config("cut"), lambda state: Countdown(stops[0]))
    for left in [*stops[1:], None]:
        assert events[-1] == Stopped(state.step)
        assert ckpt.load(tmp_path / "cut" / "ckpt.pt").step == state.step
        state, events = go_on(
            tmp_path / "cut" / "ckpt.pt", lambda state, left=left: Countdown(10**9 if left is None else left)
        )
    assert isinstance(events[-1], Finished)
    assert differing(all_of(state), all_of(whole)) == []
    assert without_time(rows_of(tmp_path / "cut")) == without_time(rows_of(tmp_path / "whole"))
    best = [ckpt.load(tmp_path / name / "best.pt") for name in ("whole", "cut")]
    assert differing(*({"model": c.model, "step": c.step} for c in best)) == []


@pytest.mark.parametrize("stop_at", [0, 1, 9, 10, 19])
def test_stopped_at_any_step_it_ends_alike(short, tmp_path, stop_at):
    config, whole, _ = short
    _, events = start(config("cut"), lambda state: lambda: state.step >= stop_at)
    assert events[-1] == Stopped(stop_at)
    state, _ = go_on(tmp_path / "cut")  # a folder: its latest
    assert differing(all_of(state), all_of(whole)) == []
    assert without_time(rows_of(tmp_path / "cut")) == without_time(rows_of(tmp_path / "whole"))


def test_a_killed_run_goes_on_from_its_last_checkpoint(short, tmp_path):
    """No farewell: the generator is dropped at step 14, and what step 10 had saved is all there is."""
    config, whole, _ = short
    run = open_run(config("cut"))
    state = new_state(run)
    (tmp_path / "cut").mkdir()
    for event in record(train(run, state), tmp_path / "cut"):
        if isinstance(event, StepDone) and event.step >= 14:
            break
    assert ckpt.load(tmp_path / "cut" / "ckpt.pt").step == 10
    state, _ = go_on(tmp_path / "cut" / "ckpt.pt")
    assert differing(all_of(state), all_of(whole)) == []
    assert without_time(rows_of(tmp_path / "cut")) == without_time(rows_of(tmp_path / "whole"))


def test_from_the_best_checkpoint_too(make_config, tmp_path):
    # A rate so high that the loss rises again: the best checkpoint is not the last.
    settings = ["optim.lr=3.0", "schedule.kind=constant", "schedule.warmup_steps=10", "train.eval_interval=4"]
    whole, events = start(make_config(*NOISY, *settings))
    best = ckpt.load(tmp_path / "out" / "best.pt")
    assert 0 < best.step < 20
    lowest = min((e for e in events if isinstance(e, Evaluated) and e.step), key=lambda e: e.val.loss)
    assert (best.step, events[-1].best_val_loss) == (lowest.step, lowest.val.loss)
    rows = without_time(rows_of(tmp_path / "out"))
    state, again = go_on(tmp_path / "out" / "best.pt")
    assert differing(all_of(state), all_of(whole)) == []
    assert again[-1] == events[-1]
    assert without_time(rows_of(tmp_path / "out")) == rows


def test_the_best_is_remembered_over_a_stop(make_config, tmp_path):
    settings = ["optim.lr=3.0", "schedule.kind=constant", "schedule.warmup_steps=10", "train.eval_interval=4"]
    whole, _ = start(make_config(*NOISY, *settings))
    best = ckpt.load(tmp_path / "out" / "best.pt")
    cut = tmp_path / "cut"
    _, events = start(make_config(*NOISY, *settings, f"train.out_dir={cut}"), lambda state: lambda: state.step >= 13)
    assert best.step < 13
    assert events[-1] == Stopped(13)
    state, _ = go_on(cut)
    again = ckpt.load(cut / "best.pt")
    assert again.step == best.step
    assert state.best_val_loss == whole.best_val_loss


def test_a_finished_run_that_is_resumed_only_looks_again(short, tmp_path):
    _, whole, events = short
    state, again = go_on(tmp_path / "whole" / "ckpt.pt")
    # Its checkpoint is from before the last evaluation, which therefore finds the best loss again.
    assert [(type(e), getattr(e, "path", None)) for e in again] == [
        (Evaluated, None),
        (Saved, tmp_path / "whole" / "best.pt"),
        (Finished, None),
    ]
    assert again[0] == [e for e in events if isinstance(e, Evaluated)][-1]
    assert again[-1].final == events[-1].final
    assert differing(weights(state), weights(whole)) == []


@pytest.mark.parametrize(
    "override",
    [
        "train.eval_interval=1",
        "train.eval_interval=1000",
        "train.save_interval=3",
        "train.log_interval=20",
        "runtime.prefetch=0",
        "runtime.prefetch=7",
        "train.eval_windows=3",
    ],
)
def test_how_often_one_looks_changes_no_weight(short, override):
    config, whole, events = short
    state, others = start(config("other", override))
    assert differing(weights(state), weights(whole)) == []
    there = {e.step: e for e in events if isinstance(e, StepDone)}
    assert all(e == there[e.step] for e in others if isinstance(e, StepDone) and e.step in there)


def test_the_seed_changes_everything(short):
    config, whole, _ = short
    state, _ = start(config("other", "train.seed=7"))
    assert len(differing(weights(state), weights(whole))) == len(weights(whole))


def test_two_runs_from_one_checkpoint_do_not_share(short, tmp_path):
    _, whole, _ = short
    config, found = reopen(tmp_path / "whole" / "ckpt.pt", ())
    run, checkpoint = open_run(config), found.checkpoint
    before = {n: {k: v.clone() for k, v in s.items()} for n, s in checkpoint.optimizer.items()}
    first = restore(run, checkpoint)
    for _ in range(3):
        train_step(run, first)
    assert differing(checkpoint.optimizer, before) == []
    assert differing(all_of(restore(run, checkpoint))["model"], all_of(whole)["model"]) == []


# ---- One step ----


def plain_loss(model, inputs, targets):
    logits = model(torch.from_numpy(inputs).long()).log_softmax(-1)
    return -logits.gather(-1, torch.from_numpy(targets).long()[..., None]).mean()


def test_steps_are_those_of_a_plain_loop(make_run):
    run = make_run("optim.grad_clip=0.0", "optim.weight_decay=0.0")
    state, twin = new_state(run), new_state(run).model
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(5):
        loss = plain_loss(twin, *run.source.batch(step))
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in twin.parameters()))
        rate = 1e-3 * (step + 1) / 2 if step < 2 else 1e-3 * factor(step, run.config)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        done = train_step(run, state)
        assert done.step == state.step == step + 1
        assert done.loss == pytest.approx(loss.item(), rel=1e-5)
        assert done.grad_norm == pytest.approx(norm, rel=1e-5)
        assert done.lr == pytest.approx(rate, rel=1e-12)
        for name, p in state.model.named_parameters():
            torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in state.model.parameters())


def gradients_of(run, monkeypatch, state=None):
    """What the optimizers were given in one step, and what the step reported."""
    state = state or new_state(run)
    seen = {}
    for optimizer in state.optimizers:

        def look(optimizer=optimizer):
            for group in optimizer.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    seen[name] = parameter.grad.clone()

        monkeypatch.setattr(optimizer, "step", look)
    return seen, train_step(run, state)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_is_one_large_batch(make_run, monkeypatch, micro):
    whole, done = gradients_of(make_run("optim.grad_clip=0.0"), monkeypatch)
    parts, same = gradients_of(make_run("optim.grad_clip=0.0", f"train.micro_batch_size={micro}"), monkeypatch)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-7)
    assert same.loss == pytest.approx(done.loss, rel=1e-6)
    states = [new_state(run) for run in (make_run(), make_run(f"train.micro_batch_size={micro}"))]
    for run, state in zip((make_run(), make_run(f"train.micro_batch_size={micro}")), states, strict=True):
        for _ in range(5):
            train_step(run, state)
    for name, p in states[0].model.named_parameters():
        torch.testing.assert_close(states[1].model.get_parameter(name), p, rtol=1e-4, atol=1e-6)


def test_micro_batches_have_dropout_of_their_own(make_run, monkeypatch):
    """Two equal halves with one mask would give the gradient of one half."""
    run = make_run("model.dropout=0.5", "train.micro_batch_size=4", "optim.grad_clip=0.0")
    inputs, targets = run.source.batch(0)
    twice = np.concatenate([inputs[:4]] * 2), np.concatenate([targets[:4]] * 2)
    half = replace(run, config=make_run("model.dropout=0.5", "train.batch_size=4", "optim.grad_clip=0.0").config)
    state = new_state(run)
    both = train_step(run, state, twice)
    one = train_step(half, new_state(half), (inputs[:4], targets[:4]))
    assert abs(both.loss - one.loss) > 1e-5


@pytest.mark.parametrize("limit", [1e-3, 0.1, 100.0, 0.0])
def test_clipping_bounds_what_the_optimizer_gets(make_run, monkeypatch, limit):
    free, unclipped = gradients_of(make_run("optim.grad_clip=0.0"), monkeypatch)
    got, done = gradients_of(make_run(f"optim.grad_clip={limit}"), monkeypatch)
    norm = math.sqrt(sum(g.double().square().sum().item() for g in free.values()))
    assert done.grad_norm == pytest.approx(norm, rel=1e-5)  # before clipping, whatever the limit
    assert unclipped.grad_norm == done.grad_norm
    scale = min(1.0, limit / norm) if limit else 1.0
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, free[name] * scale, rtol=1e-4, atol=1e-9)


def test_a_spike_is_six_standard_deviations_above_the_usual():
    losses = np.random.default_rng(0).normal(2.5, 0.1, 128)
    assert usual_limit(losses.tolist()) == pytest.approx(losses.mean() + 6 * losses.std(), rel=1e-12)
    assert usual_limit([math.nan, *losses[:64].tolist(), math.inf]) == usual_limit(losses[:64].tolist())
    assert usual_limit(losses[:63].tolist()) == math.inf, "too few to tell"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_leaves_the_weights(make_run, optimizer, bad):
    run = make_run(f"optim.name={optimizer}", "train.micro_batch_size=2")
    state = new_state(run)
    train_step(run, state)
    with torch.no_grad():
        state.model.wpe.weight[3, 3] = bad
    before, optim_before = weights(state), {n: dict(s) for n, s in state_by_name(state.optimizers).items()}
    steps = {n: s["step"].clone() for n, s in optim_before.items() if "step" in s}
    with pytest.raises(NonFiniteError, match=r"at step 1 the loss is nan and the gradient norm nan"):
        train_step(run, state)
    for name, p in state.model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name
        assert p.grad is None
    assert state.step == 1
    assert differing({n: s["step"] for n, s in state_by_name(state.optimizers).items() if "step" in s}, steps) == []


def test_a_step_that_is_stopped_changes_nothing(make_run):
    run = make_run(*NOISY)
    state = new_state(run)
    train_step(run, state)
    before = {n: {k: v.clone() for k, v in s.items()} for n, s in state_by_name(state.optimizers).items()}
    kept = weights(state)
    for n in range(4):
        assert train_step(run, state, should_stop=Countdown(n)) is None
        assert all(p.grad is None for p in state.model.parameters())
    assert state.step == 1
    assert differing(weights(state), kept) == []
    assert differing(state_by_name(state.optimizers), before) == []
    assert train_step(run, state, should_stop=Countdown(4)).step == 2  # four questions, then it is done


# ---- Evaluation ----


def naive_evaluation(run: Run, model, split, windows, end=None):
    """Nats, targets and bytes of text, window by window and target by target, in float64."""
    tokens, size = np.asarray(run.source.splits[split]).astype(np.int64), run.config.model.block_size
    if end is None:
        spans = [(s, min(s + size, len(tokens) - 1)) for s in range(0, len(tokens) - 1, size)]
    else:
        bounds = sorted({0, len(tokens) - 1, *(i for i, t in enumerate(tokens) if t == end)})
        spans = [(s, min(s + size, b)) for a, b in pairwise(bounds) for s in range(a, b, size)]
    chosen = spans if windows == 0 else [spans[i * len(spans) // windows] for i in range(windows)]
    tokenizer = tok.from_json(run.data.tokenizer_json)
    nats, count, text_bytes = 0.0, 0, 0
    model.eval()
    for first, last in chosen:
        with torch.no_grad():
            logits = model(torch.tensor(tokens[first:last])[None])[0].double().log_softmax(-1)
        for t in range(first, last):
            target = int(tokens[t + 1])
            nats -= logits[t - first, target].item()
            count += 1
            text_bytes += len(tok.decode(tokenizer, [target]).encode())
    return nats, count, text_bytes


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize(("split", "windows"), [("val", 0), ("val", 7), ("train", 7)])
def test_evaluation_is_the_mean_over_all_targets(make_run, split, windows, align):
    run = make_run(f"train.align_documents={str(align).lower()}", "model.dropout=0.3")
    state = new_state(run)
    for _ in range(10):
        train_step(run, state)
    end = tok.end_of_text(tok.from_json(run.data.tokenizer_json))
    nats, count, text_bytes = naive_evaluation(run, state.model, split, windows, end if align else None)
    got = evaluate(run, state.model, split, windows)
    assert got.tokens == count
    assert got.loss == pytest.approx(nats / count, rel=1e-5)
    assert got.perplexity == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    if windows == 0:
        assert count == len(run.source.splits[split]) - 1  # every target once


def test_the_training_split_is_read_at_as_many_places(make_run):
    run = make_run()
    model = new_state(run).model
    whole = evaluate(run, model, "val", 0)
    part = evaluate(run, model, "train", 0)
    assert part.tokens == pytest.approx(whole.tokens, abs=16)


def test_the_number_of_rows_a_pass_changes_nothing(make_run, monkeypatch):
    run = make_run()
    model = new_state(run).model
    whole = evaluate(run, model, "val", 0)
    for tokens in (1, 16 * 3, 16 * 7):
        monkeypatch.setattr("tinyllm.engine.EVAL_TOKENS", tokens)
        got = evaluate(run, model, "val", 0)
        assert (got.tokens, got.loss) == (whole.tokens, pytest.approx(whole.loss, rel=1e-6))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_disturbs_nothing(make_run, training):
    run = make_run("model.dropout=0.3", "model.attn_dropout=0.3")
    state = new_state(run)
    train_step(run, state)
    state.model.train(training)
    before, rng = weights(state), torch.get_rng_state()
    first = evaluate(run, state.model, "val")
    assert torch.equal(torch.get_rng_state(), rng)
    assert evaluate(run, state.model, "val", should_stop=lambda: True) is None
    assert all(m.training is training for m in state.model.modules())
    torch.rand(5)
    assert evaluate(run, state.model, "val") == first
    assert differing(weights(state), before) == []
    assert all(p.grad is None for p in state.model.parameters())


def test_an_evaluation_that_is_not_finite_ends_the_run(make_run):
    run = make_run()
    state = new_state(run)
    with torch.no_grad():
        state.model.wte.weight[0, 0] = math.nan
    with pytest.raises(RunError, match=r"the loss of the val split is nan: the weight wte\.weight is not finite"):
        evaluate(run, state.model, "val")


def test_ignored_targets_do_not_count(make_run, monkeypatch):
    run = make_run()
    model = new_state(run).model
    inputs, targets = run.source.batch(0)
    targets = targets.copy()
    targets[:, 5:] = IGNORED
    monkeypatch.setattr(run.source, "eval_batches", lambda *_: iter([(inputs, targets)]))
    got = evaluate(run, model, "val")
    assert got.tokens == 8 * 5
    with torch.no_grad():
        assert got.loss == pytest.approx(plain_loss(model, inputs[:, :5], targets[:, :5]).item(), rel=1e-5)


# ---- The run as a whole ----


def test_events_come_in_order(make_config, tmp_path):
    config = make_config("train.max_steps=12", "train.eval_interval=5", "train.save_interval=4", "train.log_interval=3")
    state, events = start(config)
    latest, best = tmp_path / "out" / "ckpt.pt", tmp_path / "out" / "best.pt"
    assert [(type(e).__name__, e.step) for e in events if not isinstance(e, Saved)] == [
        ("Evaluated", 0),
        ("StepDone", 3),
        ("Saving", 4),
        ("Saving", 5),  # before the evaluation
        ("Evaluated", 5),
        ("StepDone", 6),
        ("Saving", 8),
        ("StepDone", 9),
        ("Saving", 10),
        ("Evaluated", 10),
        ("StepDone", 12),
        ("Saving", 12),
        ("Evaluated", 12),
        ("Finished", 12),
    ]
    saved = [(e.step, e.path) for e in events if isinstance(e, Saved)]  # by a thread: some time after
    wanted = [(4, latest), (5, latest), (5, best), (8, latest), (10, latest), (10, best), (12, latest), (12, best)]
    assert saved == wanted
    for step, path in saved:
        before = [e for e in events[: events.index(Saved(step, path))] if isinstance(e, Saving)]
        assert step in [e.step for e in before]
    evaluations = [e for e in events if isinstance(e, Evaluated)]
    assert [e.is_best for e in evaluations] == [False, True, True, True]  # step 0 is nobody's best
    losses = [e.val.loss for e in evaluations]
    assert losses == sorted(losses, reverse=True)
    assert events[-1].final == evaluations[-1].val
    assert events[-1].best_val_loss == state.best_val_loss == losses[-1]
    assert [as_row(e) for e in events if not isinstance(e, StepDone | Evaluated)] == [None] * 14


def test_the_last_step_is_reported_and_saved_whatever_the_intervals(make_config, tmp_path):
    config = make_config("train.max_steps=5", *(f"train.{n}_interval=100" for n in ("eval", "save", "log")))
    state, events = start(config)
    assert [(type(e), e.step) for e in events if not isinstance(e, Saved)] == [
        (Evaluated, 0),
        (StepDone, 5),
        (Saving, 5),
        (Evaluated, 5),
        (Finished, 5),
    ]
    assert [e.path.name for e in events if isinstance(e, Saved)] == ["ckpt.pt", "best.pt"]
    saved = ckpt.load(tmp_path / "out" / "ckpt.pt")
    assert differing(saved.model, state.model.state_dict()) == []


def test_it_learns(make_config):
    _, events = start(make_config("train.max_steps=100", "optim.lr=0.01", "train.eval_interval=100"))
    first, last = (e for e in events if isinstance(e, Evaluated))
    assert first.val.loss > last.val.loss + 1.0


def test_a_vocabulary_too_small_is_refused(make_config):
    size = open_run(make_config()).data.vocab_size
    with pytest.raises(ConfigError, match=f"model.vocab_size = {size - 1} is too small: the tokenizer has {size}"):
        open_run(make_config(f"model.vocab_size={size - 1}"))
    assert open_run(make_config(f"model.vocab_size={size}")).vocab_size == size


def test_a_larger_vocabulary_works(make_config, tmp_path):
    state, events = start(make_config("model.vocab_size=100", "optim.lr=0.02"))
    assert state.model.wte.weight.shape == (100, 16)
    first, *_, last = (e.val.loss for e in events if isinstance(e, Evaluated))
    assert first == pytest.approx(math.log(100), abs=0.05)
    assert last < first - 0.5
    assert ckpt.load(tmp_path / "out" / "ckpt.pt").vocab_size == 100


def test_documents_that_are_not_there_cannot_be_aligned_to(make_config, tmp_path):
    (tmp_path / "a.txt").write_text("some words without an end " * 100)
    overrides = [f"data.source={tmp_path / 'a.txt'}", f"data.dir={tmp_path / 'data'}", "train.align_documents=true"]
    config = make_config(*overrides)
    list(prepare(config.data))
    with pytest.raises((ConfigError, DataError), match="align_documents"):
        open_run(config)


def test_a_checkpoint_of_other_data_is_refused(make_config, make_run, tmp_path):
    run = make_run()
    made = snapshot(run, new_state(run))
    (tmp_path / "a.txt").write_text("some other words " * 100)
    for tokenizer in ("char", "byte"):
        other = make_config(
            f"data.source={tmp_path / 'a.txt'}", f"data.dir={tmp_path / tokenizer}", f"data.tokenizer={tokenizer}"
        )
        list(prepare(other.data))
        with pytest.raises(CheckpointError, match="another tokenizer"):
            restore(open_run(other), made)


def test_a_text_that_was_changed_under_a_checkpoint_is_refused(make_config, tmp_path):
    """The byte tokenizer is the same for every text: only the fingerprint tells."""
    text = tmp_path / "a.txt"
    overrides = [f"data.source={text}", f"data.dir={tmp_path / 'data'}", "data.tokenizer=byte"]
    text.write_text("some words " * 200)
    list(prepare(make_config(*overrides).data))
    run = open_run(make_config(*overrides))
    made = snapshot(run, new_state(run))
    restore(run, made)
    text.write_text("more words " * 200)
    list(prepare(make_config(*overrides).data))
    with pytest.raises(CheckpointError, match="other data than the checkpoint's"):
        restore(open_run(make_config(*overrides)), made)


# ---- What is not as it was ----


def test_what_was_changed_on_the_way_is_told_and_kept(make_config, tmp_path):
    """In the state, and so in all checkpoints after it."""
    start(make_config(), lambda state: lambda: state.step >= 7)
    config, found = reopen(tmp_path / "out", ["train.log_interval=2", "runtime.prefetch=0"])
    elsewhere = replace(found.checkpoint, environment=found.checkpoint.environment | {"torch": "1.0"})
    run = open_run(config)
    state = restore(run, elsewhere)
    assert state.changes == [
        {"step": 7, "what": "train.log_interval", "from": 1, "to": 2},
        {"step": 7, "what": "runtime.prefetch", "from": 2, "to": 0},
        {"step": 7, "what": "torch", "from": "1.0", "to": torch.__version__},
    ]
    list(train(run, state))
    final = ckpt.load(tmp_path / "out" / "ckpt.pt")
    assert final.changes == state.changes
    _, found = reopen(tmp_path / "out", [])
    assert restore(run, found.checkpoint).changes == state.changes, "nothing new"


def test_nothing_is_told_of_a_run_that_only_goes_on(make_config, tmp_path):
    start(make_config(), lambda state: lambda: state.step >= 7)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    config, found = reopen(tmp_path / "moved", [])
    assert restore(open_run(config), found.checkpoint).changes == []


def test_minutes_save_too(make_config, tmp_path, monkeypatch):
    config = make_config("train.eval_interval=100", "train.save_interval=100", "train.save_minutes=5")
    now = itertools.count(0.0, 50.0)  # each look at the clock is 50 seconds later
    monkeypatch.setattr("tinyllm.saver.time.monotonic", lambda: next(now))
    _, events = start(config)
    saved = [e.step for e in events if isinstance(e, Saving)]
    assert len(saved) > 2
    assert max(b - a for a, b in pairwise([0, *saved])) <= 6
    assert saved[-1] == 20


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_layer": 10**9}, "the config says 1,000,000,000 layers, the checkpoint holds"),
        ({"n_embd": 10**6}, r"blocks\.0\.attn\.proj\.bias is \(16,\), and must be \(1000000,\)"),
        ({"n_embd": 10**11}, "no machine holds a model of n_embd = 100,000,000,000 and block_size = 16"),
        ({"block_size": 10**9}, r"wpe\.weight is \(16, 16\), and must be \(1000000000, 16\)"),
        ({"n_layer": 2}, r"is not in the file, and must be \(16,\)"),
    ],
)
def test_sizes_are_compared_before_memory_is_taken(make_run, sizes, message):
    """Whatever the limits of a config are."""
    run = make_run()
    checkpoint = snapshot(run, new_state(run))
    other = run.config.model.model_copy(update=sizes)
    with pytest.raises(CheckpointError, match=f"the checkpoint's weights do not fit its config: .*{message}"):
        ckpt.check_sizes(checkpoint, other)


def test_tables_of_positions_are_compared_too(make_run):
    """They are made for block_size, and not in the file."""
    run = make_run(recipe="modern")
    checkpoint = snapshot(run, new_state(run))
    ckpt.check_sizes(checkpoint, run.config.model.model_copy(update={"block_size": 10**5}))
    with pytest.raises(CheckpointError, match="= 100,000,000 takes 6,400,000,000 bytes for positions alone"):
        ckpt.check_sizes(checkpoint, run.config.model.model_copy(update={"block_size": 10**8}))


def test_an_optimizer_state_of_another_shape_is_refused(make_run):
    run = make_run()
    state = new_state(run)
    train_step(run, state)
    held = snapshot(run, state)
    entry = held.optimizer["wpe.weight"]
    for wrong, message in (
        ({"wpe.weight": entry | {"exp_avg": torch.zeros(3)}}, r"wpe\.weight\.exp_avg is \(3,\)"),
        ({"other": entry}, "there is no other to train"),
    ):
        with pytest.raises(
            CheckpointError, match=f"the checkpoint's optimizer state does not fit its config: {message}"
        ):
            restore(run, replace(held, optimizer=held.optimizer | wrong))


# ---- A save that fails ----


def test_a_run_whose_last_step_cannot_be_saved_says_so(make_config, tmp_path, monkeypatch):
    def full_disk(path, record, step):
        if step == 20:
            raise OSError(28, "No space left on device")
        write(path, record, step)

    write = ckpt.archive.write
    monkeypatch.setattr(ckpt.archive, "write", full_disk)
    with pytest.raises(CheckpointError, match=r"the last step is not saved: .*No space left on device") as error:
        start(make_config())
    assert f"tinyllm resume {tmp_path}/out" in error.value.fix
    assert ckpt.load(tmp_path / "out" / "ckpt.pt").step == 10
    monkeypatch.undo()
    state, _ = go_on(tmp_path / "out")
    whole, _ = start(make_config(f"train.out_dir={tmp_path}/whole"))
    assert differing(all_of(state), all_of(whole)) == []


def test_a_model_larger_than_the_memory_is_refused_before_it_is_built(make_run):
    with pytest.raises(RunError, match=r"the weights take 48 TB, and \d+(\.\d+)? [MG]B of memory are free"):
        make_run("model.n_embd=1000000", "model.n_layer=1", "model.n_head=1")
