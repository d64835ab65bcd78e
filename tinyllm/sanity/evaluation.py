"""Checks of the two modes, training and evaluation, of the loss that is shown, and of the precision."""

import copy
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm.data import IGNORED, BatchSource
from tinyllm.engine import Run, TrainState, evaluate, evaluate_both, train_step
from tinyllm.runtime import seed_torch
from tinyllm.sanity.data import places_of
from tinyllm.sanity.instruments import (
    called,
    cross_entropy,
    joined,
    logits_of,
    variant,
    watched,
)
from tinyllm.sanity.result import Result, failed, passed, skipped, warned
from tinyllm.sanity.subject import ROWS, Subject


def training_mode(subject: Subject) -> Result:
    """A step trains in training mode, whatever came before it, and its dropout follows step and micro-batch."""
    run = small(subject)
    seen = [observed(subject, run, step, disturb) for step, disturb in ((0, 1), (0, 2), (1, 3))]
    in_training, draws = zip(*seen, strict=True)
    if not all(in_training):
        diagnosis = "parts of the model are in evaluation mode during a training step: dropout is off"
        return failed("evaluation mode", "training mode", diagnosis, "model.train() at the start of each step")
    expected, fix = "dropout by (seed, step, micro-batch)", "seed the generator by (seed, step, micro-batch)"
    if not torch.equal(draws[0], draws[1]):
        diagnosis = "the same step gives other values the second time: its dropout depends on what was drawn before"
        return failed("another dropout for the same step", expected, diagnosis, fix)
    if not subject.run.config.model.dropout + subject.run.config.model.attn_dropout:
        return passed("on in training; nothing is random", expected)
    if torch.equal(draws[0], draws[2]):
        diagnosis = "two steps drop the same activations: some are never trained, or dropout is off"
        return failed("the same dropout at each step", expected, diagnosis, fix)
    if torch.equal(draws[0][0], draws[0][1]):
        diagnosis = "all micro-batches of a step drop the same activations"
        return failed("the same dropout in each micro-batch", expected, diagnosis, fix)
    return passed("on in training, another in each step and micro-batch", expected)


def observed(subject: Subject, run: Run, step: int, disturb: int) -> tuple[bool, Tensor]:
    """Whether all modules train in a step, and the model's outputs in its two micro-batches, (2, B, T, V).

    Both get the same tokens; the model comes to it in evaluation mode.
    """
    state = subject.own_state(run)
    state.step = step
    state.model.eval()
    seed_torch(disturb)  # what was drawn before must not matter
    inputs, targets = (np.concatenate([a[: ROWS // 2]] * 2) for a in subject.batch)
    with called(state.model) as calls, watched(state, hold=True):
        train_step(run, state, (inputs, targets))
    outputs = torch.stack([call.output.detach() for call in calls if not call.name])
    return all(call.training for call in calls), outputs


def small(subject: Subject) -> Run:
    """The user's run, dropout and precision and all, on two micro-batches of two short sequences a step."""
    train = {"batch_size": ROWS, "micro_batch_size": ROWS // 2}
    return variant(subject.run, {"train": train, "runtime": {"compile": False}})


def evaluation(subject: Subject) -> Result:
    """The validation loss is the mean over fixed windows of val.bin, dropout off; it changes nothing and repeats."""
    run, model = brief(subject), copy.deepcopy(subject.own_woken)
    for split in ("val", "train"):
        if stray := misread(subject, split, 24):
            diagnosis = f"the {split} loss is measured on something else than {split}.bin"
            fix = "read that file, evenly"
            return failed(f"the {split} loss is of {stray}", f"windows of {split}.bin", diagnosis, fix)
    if wrong := disturbing(run, model, 3):
        return wrong
    # More than one batch, the last one shorter: a mean of means would be wrong then.
    for source, windows in ((run.source, 3), (shorter(run.source), 0)):
        if wrong := miscounted(replace(run, source=source), model, subject, windows):
            return wrong
    return best_of_both(run, model, "the mean over windows of val.bin, dropout off")


def brief(subject: Subject) -> Run:
    """The exact run, evaluated on windows as short as the batch of the checks: a large model takes its time.

    But where windows begin with documents: there the run's own are taken.
    """
    run = subject.exact
    if run.source.documents:
        return run
    return variant(run, {"model": {"block_size": subject.batch[0].shape[1]}})


def misread(subject: Subject, split: str, n_windows: int) -> str:
    """What is wrong with the windows that an evaluation of this split reads, in words; '' for nothing."""
    path, source = Path(subject.run.data.dir) / f"{split}.bin", subject.run.source
    other = path.with_name("val.bin" if split == "train" else "train.bin")
    large = path.stat().st_size > 1 << 28  # where a search takes a while, and so does counting all targets
    places = []
    for inputs, targets in source.eval_batches(split, n_windows, 4):
        for x, y in zip(inputs[:2], targets[:2], strict=True):
            length = int((y != IGNORED).sum())
            if not np.array_equal(x[1:length], y[: length - 1]):
                return "targets that are not the inputs one token on"
            whole = np.append(x[:length], y[length - 1])
            last = next(places_of(whole, path), None)
            if last is None:
                elsewhere = next(places_of(whole, other), None) is not None
                return f"windows of {other.name}" if elsewhere else "windows of no file"
            places += [last, *islice(places_of(whole, path, backwards=False), 1)]  # it may occur more than once
        if large:
            break
    tokens = len(subject.tokens[split])
    total = (tokens - 1) // source.block_size
    if not large and len(places) > 16 and total > 4 * n_windows and max(places) - min(places) < 0.5 * tokens:
        return "one part of the file only"
    if split == "val" and not large:
        counted = sum(int((y != IGNORED).sum()) for _, y in source.eval_batches("val", 0, 64))
        if counted != tokens - 1:
            return f"{counted:,} targets of {tokens - 1:,} when it is to read the whole split"
    return ""


def disturbing(run: Run, model: nn.Module, n_windows: int) -> Result | None:
    """A failure if an evaluation is not the same each time, or leaves something changed."""
    state = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        with called(model) as calls:
            first = evaluate(run, model, "val", n_windows=n_windows)
        if model.training != training:
            diagnosis = "evaluation leaves the model in another mode: dropout would stay off (or on) in training"
            return failed(f"training = {model.training} afterwards", f"{training}", diagnosis, "restore the mode")
        if any(call.training or call.grad for call in calls):
            diagnosis = "parts of the model are in training mode during evaluation, or gradients are recorded"
            fix = "model.eval() on the model that is called, and torch.no_grad()"
            return failed("training mode", "evaluation mode, no gradients", diagnosis, fix)
    again = evaluate(run, model, "val", n_windows=n_windows)
    if first != again or not torch.equal(state, torch.get_rng_state()):
        diagnosis = "two evaluations of the same weights differ, or draw random numbers that training would draw"
        return failed(f"{first.loss:.5f}, then {again.loss:.5f}", "the same", diagnosis, "fixed windows, no generator")
    if any(p.grad is not None for p in model.parameters()):
        diagnosis = "evaluation leaves gradients behind, which the next step would take as its own"
        return failed("gradients afterwards", "none", diagnosis, "no backward() in an evaluation")
    return None


def shorter(source: BatchSource) -> BatchSource:
    """The source with a few windows a split, the last of them cut short."""
    cut = copy.copy(source)
    if source.documents:
        cut.documents = {name: (starts[:5], lengths[:5]) for name, (starts, lengths) in source.documents.items()}
    else:
        end = 3 * source.block_size + source.block_size // 2 + 1
        cut.splits = {name: tokens[:end] for name, tokens in source.splits.items()}
    return cut


def miscounted(run: Run, model: nn.Module, subject: Subject, n_windows: int) -> Result | None:
    """A failure if the engine's evaluation is not what one gets by hand."""
    found = evaluate(run, model, "val", n_windows=n_windows, rows=2)
    right, count, text_bytes = by_hand(run, model, subject, n_windows)
    if not math.isclose(found.loss, right, rel_tol=1e-4):
        diagnosis = "the validation loss is not the mean over the tokens of its windows"
        fix = "add up nats and tokens, divide once at the end"
        return failed(f"{found.loss:.5f}", f"{right:.5f}", diagnosis, fix)
    bits = right * count / math.log(2) / max(text_bytes, 1)
    if found.tokens != count or not math.isclose(found.bits_per_byte, bits, rel_tol=1e-3):
        measured = f"{found.tokens:,} tokens, {found.bits_per_byte:.4f} bits a byte"
        diagnosis, fix = "tokens or bytes are miscounted", "count the targets that are not ignored, and their bytes"
        return failed(measured, f"{count:,}, {bits:.4f}", diagnosis, fix)
    return None


def by_hand(run: Run, model: nn.Module, subject: Subject, n_windows: int) -> tuple[float, int, int]:
    """Mean nats, tokens and bytes of text over the evaluation's windows."""
    nats, count, text_bytes = 0.0, 0, 0
    model.eval()
    for inputs, targets in run.source.eval_batches("val", n_windows, 16):
        counted = targets[targets != IGNORED]
        loss = float(cross_entropy(logits_of(model, subject.tensor(inputs)), subject.tensor(targets)))
        nats += loss * counted.size
        count += counted.size
        text_bytes += int(run.token_bytes[counted].sum())
    return nats / count, count, text_bytes


def best_of_both(run: Run, model: nn.Module, expected: str) -> Result:
    """The verdict on `evaluate_both`: each split by its own text, and the best one remembered."""
    run = variant(run, {"train": {"eval_windows": 3}})
    own = {split: evaluate(run, model, split) for split in ("train", "val")}
    state = TrainState(model, [], step=1)
    both = evaluate_both(run, state, lambda: False)
    if (both.train, both.val) != (own["train"], own["val"]):
        diagnosis = "what is shown as training and validation loss are not these"
        fix = "evaluate each split by its name"
        return failed(
            f"{both.train.loss:.4f} and {both.val.loss:.4f}",
            f"{own['train'].loss:.4f} and {own['val'].loss:.4f}",
            diagnosis,
            fix,
        )
    again = evaluate_both(run, state, lambda: False)
    if not both.is_best or again.is_best or state.best_val_loss != both.val.loss:
        diagnosis = "the best checkpoint is not that of the lowest validation loss"
        fix = "keep it when val.loss < best_val_loss"
        return failed(f"best is {state.best_val_loss:.4f}", f"{both.val.loss:.4f}", diagnosis, fix)
    return passed(f"{both.val.loss:.4f} each time, and by hand", expected)


def precision(subject: Subject) -> Result:
    """The run's precision gives the loss and the gradient of float32, but for rounding."""
    dtype = subject.run.runtime.dtype_name
    if dtype == "float32":
        return skipped("the run computes in float32")
    found: dict[str, tuple[float, Tensor]] = {}
    for name in (dtype, "float32"):
        run = variant(
            subject.exact,
            {
                "runtime": {"dtype": name},
                "train": {"batch_size": ROWS, "micro_batch_size": 0},
                "optim": {"grad_clip": 0.0},
            },
        )
        state = subject.state(run)
        with watched(state, hold=True) as updates:
            report = train_step(run, state, subject.batch)
        found[name] = report.loss, joined({u.name: u.grad for u in updates if u.grad is not None})
    if subject.run.runtime.dtype not in computed_in(subject):
        diagnosis = f"nothing in the model is computed in {dtype}: the run would be as slow as in float32"
        fix = "the forward pass belongs under runtime.autocast(); casts to float32 inside the model undo it"
        return warned(f"no layer gives {dtype}", f"matrix products in {dtype}", diagnosis, fix)
    (loss, gradient), (right, exact) = found[dtype], found["float32"]
    off, cosine = abs(loss - right), float(torch.nn.functional.cosine_similarity(gradient, exact, dim=0))
    measured, expected = f"loss {off:.4f} off, gradient cosine {cosine:.4f}", "below 0.02 and above 0.99"
    values = {"loss_difference": off, "gradient_cosine": cosine}
    if not (off < 0.02 and cosine > 0.99):
        diagnosis = f"{dtype} changes the gradient's direction: something in the model overflows or cancels"
        fix = "runtime.dtype = float32, or keep norms, softmax and loss in float32"
        return failed(measured, expected, diagnosis, fix, values=values)
    return passed(measured, expected, values=values)


def computed_in(subject: Subject) -> set[torch.dtype]:
    """The dtypes of what the model's modules give in a step of the run's precision."""
    run = small(subject)
    state = subject.own_state(run)
    with called(state.model) as calls, watched(state, hold=True):
        train_step(run, state, subject.batch)
    return {call.output.dtype for call in calls if isinstance(call.output, Tensor)}
