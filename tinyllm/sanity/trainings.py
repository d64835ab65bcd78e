"""Checks that train: a batch learned by heart, and a short run on the real data, at the real rate."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from tinyllm.engine import Run, TrainState, new_state, train_step
from tinyllm.errors import RunError
from tinyllm.sanity.instruments import cross_entropy, logits_of, variant
from tinyllm.sanity.result import Result, failed, passed, warned
from tinyllm.sanity.subject import Subject

OVERFIT_STEPS, OVERFIT_TOKENS, OVERFIT_MARGIN = 300, 512, 0.1
SHORT_STEPS, SHORT_TOKENS, SHORT_FLOPS, SHORT_SECONDS = 150, 4096, 1e12, 20.0  # tokens and FLOPs a step


def overfit(subject: Subject) -> Result:
    """A few windows, again and again, are learned by heart: gradients reach, the optimizer moves, the loss is right."""
    size = min(subject.run.config.model.block_size, OVERFIT_TOKENS)
    rows = max(1, min(OVERFIT_TOKENS // size, subject.run.config.train.batch_size))
    batch = subject.windows("train", rows, size)
    floor = prefix_entropy(*batch)
    run = learning_by_heart(subject.run, rows)
    state = subject.state(run)
    losses: list[float] = []
    expected = f"below {floor + OVERFIT_MARGIN:.2f} within {OVERFIT_STEPS} steps"
    while len(losses) < OVERFIT_STEPS and (not losses or losses[-1] > floor + OVERFIT_MARGIN):
        losses.append(train_step(run, state, batch).loss)
    measured = f"{losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"
    more = {"curve": tuple(enumerate(losses)), "values": {"first": losses[0], "last": losses[-1], "steps": len(losses)}}
    if losses[-1] <= floor + OVERFIT_MARGIN:
        return passed(measured, expected, **more)
    # Below what the frequencies of the tokens alone give, something of the text is learned.
    frequencies = np.unique(batch[1], return_counts=True)[1] / batch[1].size
    if losses[-1] < 0.6 * float(-(frequencies * np.log(frequencies)).sum()):
        diagnosis = "it learns a batch by heart, but slowly"
        fix = "a very small model? else optim.betas or optim.eps are unusual, or something weakens the logits"
        return warned(measured, expected, diagnosis, fix, **more)
    diagnosis = "the model cannot learn even these few lines by heart"
    fix = "look for frozen or detached parts, blocks that are never used, or inputs that do not reach the output"
    return failed(measured, expected, diagnosis, fix, **more)


def learning_by_heart(run: Run, rows: int) -> Run:
    """The user's run, with all that is meant to hinder learning by heart (dropout, decay, the schedule) off."""
    rate = min(max(run.config.optim.lr, 1e-3), 6e-3)  # whether the run's own rate is right is for `short run` to say
    return variant(
        run,
        {
            "model": {"dropout": 0.0, "attn_dropout": 0.0},
            "optim": {"lr": rate, "muon_lr": min(run.config.optim.muon_lr, 0.05), "min_lr": 0.0, "weight_decay": 0.0},
            "schedule": {"kind": "constant", "warmup_steps": 10},
            "train": {"batch_size": rows, "micro_batch_size": 0, "skip_spikes": False},
            "runtime": {"compile": False},
        },
    )


def prefix_entropy(inputs: np.ndarray, targets: np.ndarray) -> float:
    """The least mean loss (nats) a causal model can reach on a batch: windows may begin alike and go on differently."""
    following: dict[tuple[int, bytes], Counter[int]] = defaultdict(Counter)
    for x, y in zip(inputs, targets, strict=True):
        for t in range(len(x)):
            following[t, x[: t + 1].tobytes()][int(y[t])] += 1
    nats = sum(-n * math.log(n / seen.total()) for seen in following.values() for n in seen.values())
    return nats / inputs.size


def short_run(subject: Subject) -> Result:
    """A few real steps at the run's own peak rate: better than counting tokens, and better for knowing their order."""
    unigram, bigram = subject.run.data.unigram_entropy, subject.run.data.bigram_entropy
    run = shortened(subject)
    state = new_state(run)
    held_out = subject.windows("val", max(4, 2048 // subject.batch[0].shape[1]), subject.batch[0].shape[1])
    start = held_out_loss(subject, state, *held_out)
    try:
        losses = list(trained(run, state))
    except RunError as error:
        diagnosis = "the loss or its gradient overflows at the run's own rate"
        return failed(error.what, "finite losses", diagnosis, "a lower optim.lr, or more schedule.warmup_steps")
    end = held_out_loss(subject, state, *held_out)
    inputs = np.random.default_rng(0).permuted(held_out[0].ravel()).reshape(held_out[0].shape)
    shuffled = held_out_loss(subject, state, inputs, held_out[1])
    measured = f"{start:.2f} to {end:.2f} in {len(losses)} steps"
    expected = f"below the unigrams' {unigram:.2f}"
    values = {
        "first": start,
        "last": end,
        "shuffled": shuffled,
        "unigram": unigram,
        "bigram": bigram,
        "steps": len(losses),
    }
    more = {"curve": tuple(enumerate(losses)), "values": values}
    learned, hoped = start - end, max(start - unigram, 1e-9)
    if math.isfinite(end) and learned < 0.02 * hoped and min(losses[-5:]) < 0.7 * losses[0]:
        diagnosis = "the training loss falls, that of other windows does not: a text of few or periodic lines?"
        return warned(measured, expected, diagnosis, "more text, or another model.block_size than its period", **more)
    if not math.isfinite(end) or learned < 0.02 * hoped or end > start:
        rate = subject.run.config.optim.lr
        diagnosis = f"at optim.lr = {rate:g} the model does not learn" + (": the loss rises" if end > start else "")
        fix = (
            "a lower optim.lr, or more schedule.warmup_steps" if max(losses) > losses[0] + 0.2 else "a higher optim.lr"
        )
        return failed(measured, expected, diagnosis, fix, **more)
    if end < 0.5 * bigram and end < 0.5:
        diagnosis = "far better than counting pairs, after so few steps: a very regular text, or a leak"
        return warned(measured, f"not far below {bigram:.2f}", diagnosis, "look at mask, targets and overlap", **more)
    if shuffled <= end + 0.01 * abs(unigram - end) and end < 0.98 * unigram:
        diagnosis = f"with its inputs shuffled the model is as good ({shuffled:.2f}): it does not use their order"
        fix = "look at positions and attention"
        return failed(measured, f"below {shuffled:.2f}, its loss on shuffled inputs", diagnosis, fix, **more)
    if end > unigram * 1.02:
        diagnosis = f"after {len(losses)} short steps still above what counting tokens gives"
        if learned < 0.5 * hoped and max(losses[len(losses) // 2 :]) > losses[0]:
            return failed(measured, expected, diagnosis, "a lower optim.lr, or more schedule.warmup_steps", **more)
        if learned < 0.2 * hoped:
            return warned(measured, expected, diagnosis, "it may only need longer; else a higher optim.lr", **more)
        return passed(measured, f"on its way to the unigrams' {unigram:.2f}", **more)
    return passed(measured, expected, **more)


def shortened(subject: Subject) -> Run:
    """The user's run with small batches, at its peak rate after a short warmup."""
    run, tokens = subject.run, min(SHORT_TOKENS, int(SHORT_FLOPS / (6 * subject.size)))
    rows = max(1, min(run.config.train.batch_size, tokens // run.config.model.block_size))
    warmup = 20 if run.config.schedule.warmup_steps else 0
    return variant(
        run,
        {
            "schedule": {"kind": "constant", "warmup_steps": warmup},
            "train": {"batch_size": rows, "micro_batch_size": 0, "skip_spikes": False},
            "runtime": {"compile": False},
        },
    )


def trained(run: Run, state: TrainState) -> Iterator[float]:
    """The losses of real steps on real batches, until they are enough or it has taken long enough."""
    started = time.perf_counter()
    while state.step < SHORT_STEPS and (state.step < 20 or time.perf_counter() - started < SHORT_SECONDS):
        yield train_step(run, state).loss


def held_out_loss(subject: Subject, state: TrainState, inputs: np.ndarray, targets: np.ndarray) -> float:
    """Mean nats a token, dropout off."""
    state.model.eval()
    return float(cross_entropy(logits_of(state.model, subject.tensor(inputs)), subject.tensor(targets)))
