"""Pre-flight checks: does this model, with this config, on this data, learn at all?

    for result in sanity(open_run(config)):
        print(result.name, result.verdict, result.measured)

A check is a small function from a Run to a Result. All of them drive the real engine (`new_state`, `train_step`,
`evaluate`, `set_learning_rate`): a check that had a loop of its own would check itself. Nothing is written, and torch's
random state is left as it was, so a run that follows is the run that would have been.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tinyllm.config import RunConfig
from tinyllm.data import open_tokens
from tinyllm.engine import Run, evaluate, new_state, train_step
from tinyllm.errors import RunError
from tinyllm.model import INIT_STD
from tinyllm.optim import all_groups, parameter_groups, set_learning_rate
from tinyllm.schedule import factor

Verdict = Literal["pass", "warn", "fail"]

INITIAL_LOSS_TOLERANCE = 0.15  # nats; healthy GPTs were 0.02 off the prediction at 0.8 M parameters, 0.03 at 124 M
OVERFIT_STEPS, OVERFIT_TOKENS, OVERFIT_MARGIN = 200, 512, 0.1


@dataclass(frozen=True)
class Result:
    """What a check found."""

    name: str
    verdict: Verdict
    measured: str
    expected: str
    fix: str = ""  # what to do, for anything but a pass


Check = Callable[[Run], Result]


def sanity(run: Run) -> Iterator[Result]:
    """Run the checks in turn, the cheapest and most fundamental first."""
    for check in CHECKS:
        with torch.random.fork_rng():
            result = check(run)
        yield result  # outside, so that whoever reads the results draws from their own state


def token_ids(run: Run) -> Result:
    """Every id in both files is below the vocabulary size, and the windows' targets are their inputs one on."""
    highest = 0
    for name in ("train", "val"):
        tokens, _ = open_tokens(Path(run.data.dir) / f"{name}.bin")
        highest = max(highest, *(int(part.max()) for part in np.array_split(tokens, max(1, len(tokens) >> 22))))
    inputs, targets = run.source.batch(0)
    measured, expected = f"ids up to {highest:,}", f"below {run.vocab_size:,}"
    if highest >= run.vocab_size:
        fix = "the model would look beyond its embedding: prepare the data again with this tokenizer"
        return Result("token ids", "fail", measured, expected, fix)
    if not np.array_equal(inputs[:, 1:], targets[:, :-1]):
        fix = "each target must be the token after its input: shift once, in the batch source and nowhere else"
        return Result("token ids", "fail", "targets are not the inputs shifted by one", "y[t] = x[t + 1]", fix)
    return Result("token ids", "pass", measured, expected)


def split_sizes(run: Run) -> Result:
    """Both splits hold enough windows to learn from and to measure by."""
    counts = {name: (len(tokens) - 1) // run.config.model.block_size for name, tokens in run.source.splits.items()}
    measured = f"{counts['train']:,} training and {counts['val']:,} validation windows"
    if counts["val"] < 20:
        fix = "the validation loss will be noisy: more text, a larger data.val_fraction or a shorter block_size"
        return Result("split sizes", "warn", measured, "20 windows or more", fix)
    return Result("split sizes", "pass", measured, "20 windows or more")


def learning_rate(run: Run) -> Result:
    """The rate that every parameter group really gets: up to the peak, down to the minimum, never zero."""
    config, optimizers = run.config, new_state(run).optimizers
    steps = sorted({*np.linspace(0, config.train.max_steps - 1, 500).astype(int), config.schedule.warmup_steps})
    steps = [int(s) for s in steps if s < config.train.max_steps]
    curve = []
    for step in steps:
        set_learning_rate(optimizers, factor(step, config))
        shares = {group["lr"] / group["peak_lr"] for group in all_groups(optimizers)}
        if max(shares) - min(shares) > 1e-9:
            fix = "set the rate of every parameter group, not of the first alone"
            return Result("learning rate", "fail", f"groups differ at step {step}", "all groups on one curve", fix)
        curve.append(config.optim.lr * max(shares))
    peak = int(np.argmax(curve))
    measured = f"{curve[0]:.1e} up to {curve[peak]:.1e} at step {steps[peak]:,}, {curve[-1]:.1e} at the end"
    expected = f"peak {config.optim.lr:.1e}, end near {config.optim.min_lr:.1e}"
    if min(curve) <= 0 or np.any(np.diff(curve[peak:]) > 1e-12) or not math.isclose(curve[peak], config.optim.lr):
        return Result("learning rate", "fail", measured, expected, "see the curve: `tinyllm plot-lr run.toml`")
    share = config.schedule.warmup_steps / config.train.max_steps
    if share > 0.2:
        fix = "1 to 5 percent of the steps are usual: a smaller schedule.warmup_steps"
        return Result("learning rate", "warn", f"warmup takes {share:.0%} of the steps", "at most 20%", fix)
    if config.schedule.kind != "constant" and curve[-1] > config.optim.min_lr + 0.1 * config.optim.lr:
        fix = "the decay ends after the run: set schedule.decay_steps = 0, or to train.max_steps"
        return Result("learning rate", "warn", measured, expected, fix)
    return Result("learning rate", "pass", measured, expected)


def decay_groups(run: Run) -> Result:
    """Each parameter is in one group of one optimizer; nothing of one dimension (a bias, a norm's gain) decays."""
    state = new_state(run)
    groups = list(all_groups(state.optimizers))
    placed = Counter(id(p) for group in groups for p in group["params"])
    named = {id(p): name for name, p in state.model.named_parameters()}  # frozen ones too: nothing here freezes any
    summary = parameter_groups(state.model, run.config.optim)
    measured = ", ".join(f"{g.name} {len(g.names)} tensors ({g.count:,})" for g in summary)
    expected = f"{len(named)} tensors, each once"
    if placed.keys() != named.keys() or max(placed.values()) > 1:
        wrong = [named[i] for i in named if placed[i] != 1]
        fix = "give each parameter to one group: a missing one is never trained, one that is there twice steps twice"
        return Result("decay groups", "fail", f"missing or twice: {', '.join(wrong[:3])}", expected, fix)
    decayed = [named[id(p)] for group in groups if group["weight_decay"] for p in group["params"] if p.dim() < 2]
    if decayed:
        fix = "biases and norm gains belong into a group with weight_decay = 0"
        return Result("decay groups", "fail", f"decays {', '.join(decayed[:3])}", "only matrices decay", fix)
    return Result("decay groups", "pass", measured, expected)


def initial_loss(run: Run) -> Result:
    """An untrained model knows nothing: its loss is near ln V, and a little above it by a known amount."""
    state = new_state(run)
    rows = max(1, 2048 // run.config.model.block_size)
    evaluation = evaluate(run, state.model, "val", n_windows=rows)
    assert evaluation is not None
    predicted = math.log(run.vocab_size) + logit_variance(run) / 2
    measured = f"{evaluation.loss:.3f}"
    expected = f"{predicted:.3f} ± {INITIAL_LOSS_TOLERANCE} (ln {run.vocab_size:,} = {math.log(run.vocab_size):.3f})"
    if abs(evaluation.loss - predicted) < INITIAL_LOSS_TOLERANCE:
        return Result("initial loss", "pass", measured, expected)
    fix = "the weights start too large, or logits, targets and vocabulary do not belong together"
    return Result("initial loss", "fail", measured, expected, fix)


def logit_variance(run: Run) -> float:
    """Variance of a fresh model's logits: a normalised vector of width d times weights of variance s^2 gives d s^2.

    Softmax of such logits costs ln V + d s^2 / 2 on average (the log-normal mean).
    """
    model = run.config.model
    return 0.0 if model.zero_init and not model.tie_embeddings else model.n_embd * INIT_STD**2


def overfit(run: Run) -> Result:
    """A few windows, again and again, are learned by heart: gradients reach, the optimizer moves, the loss is right."""
    config = run.config
    size = config.model.block_size
    rows = max(1, min(OVERFIT_TOKENS // size, config.train.batch_size))
    probe = replace(run, config=probe_config(run, rows))
    inputs, targets = run.source.batch(0)
    keep = min(size, OVERFIT_TOKENS)
    batch = inputs[:rows, :keep], targets[:rows, :keep]
    floor = prefix_entropy(*batch)
    state, losses = new_state(probe), []
    expected = f"below {floor + OVERFIT_MARGIN:.2f} within {OVERFIT_STEPS} steps"
    try:
        while len(losses) < OVERFIT_STEPS and (not losses or losses[-1] > floor + OVERFIT_MARGIN):
            values = train_step(probe, state, batch)
            assert values is not None
            losses.append(values.loss)
    except RunError as error:
        return Result("overfit one batch", "fail", str(error.what), expected, error.fix)
    measured = f"{losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"
    if losses[-1] <= floor + OVERFIT_MARGIN:
        return Result("overfit one batch", "pass", measured, expected)
    fix = "the model cannot learn even these few lines: look for frozen or detached parts, or a wrong loss"
    if losses[-1] < 0.25 * losses[0]:
        fix = "it learns, but slowly: the model may be too small for its vocabulary, or optim.betas or eps unusual"
        return Result("overfit one batch", "warn", measured, expected, fix)
    return Result("overfit one batch", "fail", measured, expected, fix)


def probe_config(run: Run, rows: int) -> RunConfig:
    """The user's config, with all that is meant to hinder learning by heart (dropout, decay, the schedule) off."""
    config = run.config
    updates = {
        "model": {"dropout": 0.0, "attn_dropout": 0.0},
        "optim": {"lr": max(config.optim.lr, 1e-3), "min_lr": 0.0, "weight_decay": 0.0},
        "schedule": {"kind": "constant", "warmup_steps": 10},
        "train": {"batch_size": rows, "micro_batch_size": 0, "max_steps": OVERFIT_STEPS},
        "runtime": {"compile": False},
    }
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in updates.items()}
    )


def prefix_entropy(inputs: np.ndarray, targets: np.ndarray) -> float:
    """The least mean loss (nats) a causal model can reach on a batch: windows may begin alike and go on differently."""
    following: dict[tuple[int, bytes], Counter[int]] = defaultdict(Counter)
    for x, y in zip(inputs, targets, strict=True):
        for t in range(len(x)):
            following[t, x[: t + 1].tobytes()][int(y[t])] += 1
    nats = sum(-n * math.log(n / seen.total()) for seen in following.values() for n in seen.values())
    return nats / inputs.size


CHECKS: tuple[Check, ...] = (token_ids, split_sizes, learning_rate, decay_groups, initial_loss, overfit)
