"""Checks of what the optimizers do with the gradient: to which tensors, how far, and at which rate."""

import math
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn

from tinyllm.config import OptimConfig
from tinyllm.engine import new_state, train_step
from tinyllm.errors import RunError
from tinyllm.optim import Muon, all_groups, parameter_groups
from tinyllm.sanity.config import closed_form, peak_of
from tinyllm.sanity.instruments import Update, apart, variant, watched
from tinyllm.sanity.result import Result, failed, listed, passed
from tinyllm.sanity.step import plain
from tinyllm.sanity.subject import ROWS, Subject


def decay_groups(subject: Subject) -> Result:
    """Each parameter is in one group of one optimizer; nothing of one dimension (a bias, a norm's gain) decays."""
    run, state = subject.run, new_state(subject.run)
    config = run.config.optim
    groups = list(all_groups(state.optimizers))
    placed = Counter(id(p) for group in groups for p in group["params"])
    named = {id(p): name for name, p in state.model.named_parameters() if p.requires_grad}
    summary = parameter_groups(state.model, config)
    measured = ", ".join(f"{g.name} {len(g.names)} tensors ({g.count:,})" for g in summary)
    expected = f"{len(named)} tensors, each once"
    if strangers := len(placed.keys() - named.keys()):
        diagnosis = f"the optimizers hold {strangers} tensors that are not the model's: they would train another model"
        fix = "build the optimizers last, over the very parameters that are trained: after moving or copying the model"
        return failed(f"{strangers} strangers", expected, diagnosis, fix)
    if wrong := [name for i, name in named.items() if placed[i] != 1]:
        diagnosis = f"in no group (never trained) or in two (stepped twice): {listed(wrong)}"
        return failed(f"{len(wrong)} tensors missing or twice", expected, diagnosis, "give each parameter to one group")
    embeddings = {id(m.weight) for m in state.model.modules() if isinstance(m, nn.Embedding)}
    for group in groups:
        for p in group["params"]:
            decays = p.dim() >= 2 and (config.decay_embeddings or id(p) not in embeddings)
            wanted = config.weight_decay if decays else 0.0
            if group["weight_decay"] != wanted:
                diagnosis = f"{named[id(p)]} decays by {group['weight_decay']:g}, should by {wanted:g}"
                fix = "matrices decay by optim.weight_decay; biases and norm gains, of one dimension, do not"
                return failed(diagnosis, "only matrices decay", diagnosis, fix)
    muon = [p for o in state.optimizers if isinstance(o, Muon) for g in o.param_groups for p in g["params"]]
    if outside := [named[id(p)] for p in muon if id(p) in embeddings or named[id(p)].endswith("head.weight")]:
        diagnosis = f"Muon updates {listed(outside)}: it is for the matrices between embedding and head"
        return failed(f"Muon has {listed(outside)}", "inner matrices only", diagnosis, "leave those to AdamW")
    return passed(measured, expected, values={g.name: g.count for g in summary})


def optimizer(subject: Subject) -> Result:
    """Three steps of the real optimizers are those of AdamW's (and Muon's) formulas with the config's values."""
    config = subject.run.config.optim
    run = variant(plain(subject), {"schedule": {"warmup_steps": 4}})  # so that no two steps have the same rate
    state = subject.state(run, woken=True)
    start = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    with watched(state) as updates:
        for _ in range(3):
            train_step(run, state, subject.batch)
    by_name: dict[str, list[Update]] = defaultdict(list)
    for update in updates:
        by_name[update.name].append(update)
    compared = 0
    expected = f"betas {config.betas}, eps {config.eps:g}, decay {config.weight_decay:g}, rate {config.lr:g}"
    for name, steps in by_name.items():
        steps = [u for u in steps if u.grad is not None]  # an expert that nothing was sent to is left as it is
        if not steps:
            continue
        compared += 1
        chain = [start[name], *(t for u in steps for t in (u.before, u.after)), state.model.get_parameter(name)]
        if not all(torch.equal(a, b) for a, b in zip(chain[::2], chain[1::2], strict=True)):
            diagnosis = f"{name} changes outside of its optimizer's steps: a decay or an average by hand?"
            return failed(f"{name} changes in between", expected, diagnosis, "leave the weights to the optimizer")
        error = muon_error(steps, config) if steps[0].muon else adamw_error(steps, config)
        if not error < 1:
            diagnosis = f"{name} does not move as the config says: {guess(steps, config)}"
            fix = "pass lr, betas, eps and weight_decay to the optimizer, and step it once"
            return failed(f"{name}: {error:.2g} times the tolerance off", expected, diagnosis, fix)
    if not compared:
        return nothing_seen(expected)
    kinds = " and ".join(type(optimizer).__name__ for optimizer in state.optimizers)
    return passed(f"three steps of {kinds} on {compared} tensors agree with the formula", expected)


def nothing_seen(expected: str) -> Result:
    """A failure: a check that compared nothing has not passed."""
    diagnosis = "the optimizers that the state holds make no step, or are given no gradient: others in their place?"
    return failed("no update to compare", expected, diagnosis, "step those that `new_state` gives; see `one step`")


def adamw_error(
    steps: list[Update], config: OptimConfig, *, betas: tuple[float, float] | None = None, **other: Any
) -> float:
    """How far real updates are from AdamW's (Loshchilov & Hutter 2019, algorithm 2), in units of the tolerance.

    `other` takes the formula's values elsewhere, to find out which of them was used instead.
    """
    beta1, beta2 = betas or config.betas
    eps, decay = other.get("eps", config.eps), other.get("decay", steps[0].weight_decay)
    m = v = torch.zeros_like(steps[0].before, dtype=torch.float64)
    worst = 0.0
    for t, u in enumerate(steps, 1):
        lr = config.lr * other.get("scale", 1.0) * (u.step + 1) / 4  # in the warmup of `optimizer`
        p, g = u.before.double(), u.grad.double()
        if other.get("coupled"):
            g = g + decay * p
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        bias1, bias2 = (1, 1) if other.get("uncorrected") else (1 - beta1**t, 1 - beta2**t)
        move = -lr * (m / bias1) / ((v / bias2).sqrt() + eps) - (0 if other.get("coupled") else lr * decay * p)
        error = (u.after.double() - p - move).norm()
        worst = max(worst, float(error / (3e-4 * move.norm() + 2e-7 * p.norm() + 1e-30)))
    return worst


def muon_error(steps: list[Update], config: OptimConfig) -> float:
    """The same for Muon (Jordan et al. 2024) and the last update, in units of a thousandth of the move.

    In float32, as the exact run has it: in bfloat16 its Newton-Schulz iterations round, and double every error. The
    last has the gradients of all in it, and the formula takes longer than the steps.
    """
    average, beta = torch.zeros_like(steps[0].before, dtype=torch.float64), config.muon_momentum
    for u in steps:
        average = beta * average + (1 - beta) * u.grad.double()
    lr = config.muon_lr * (u.step + 1) / 4  # in the warmup of `optimizer`
    p, x = u.before.double(), beta * average + (1 - beta) * u.grad.double()  # Nesterov
    x = x / x.norm().clamp(min=1e-7)
    rows, columns = x.shape
    x = x.T if rows > columns else x  # the quintic is odd, so that a matrix and its transpose go alike
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.775 * gram) @ x
    x = x.T if rows > columns else x
    move = -lr * config.weight_decay * p - lr * math.sqrt(max(1, rows / columns)) * x
    return 1e3 * apart(u.after.double() - p, move)


def guess(steps: list[Update], config: OptimConfig) -> str:
    """Which values explain the updates, where the config's do not."""
    if steps[0].muon:
        return "see optim.muon_lr, optim.muon_momentum and optim.weight_decay"
    moves = float((steps[0].after - steps[0].before).double().norm())
    ideal = config.lr * (steps[0].step + 1) / 4 * math.sqrt(steps[0].before.numel())
    others: dict[str, dict[str, Any]] = {
        "it fits betas = (0.9, 0.999), torch's default": {"betas": (0.9, 0.999)},
        "it fits an eps of 1e-8": {"eps": 1e-8},
        "it fits no weight decay": {"decay": 0.0},
        "it fits a weight decay of 0.01, torch's default": {"decay": 0.01},
        "it fits Adam with decay inside the gradient, not AdamW": {"coupled": True},
        "it fits Adam without bias correction": {"uncorrected": True},
        f"it moves {moves / ideal:.2g} times as far as optim.lr says": {"scale": moves / ideal},
    }
    for words, values in others.items():
        if adamw_error(steps, config, **values) < (30 if "scale" in values else 1):
            return words
    return "neither the config's values nor the usual ones explain it"


def schedule_in_use(subject: Subject) -> Result:
    """Each real step is taken at the rate that the schedule has for it."""
    config = subject.run.config
    run = variant(subject.exact, {"train": {"batch_size": 2, "micro_batch_size": 1}, "optim": {"grad_clip": 0.0}})
    inputs, targets = (a[:2, :16] for a in subject.batch)
    last, warmup = config.train.max_steps - 1, config.schedule.warmup_steps
    steps = sorted({s for s in (0, 1, warmup // 2, warmup - 1, warmup, (warmup + last) // 2, last) if 0 <= s <= last})
    state = subject.state(run)
    peaks = {id(p): peak_of(o, config) for o in state.optimizers for group in o.param_groups for p in group["params"]}
    named = {name: peaks[id(p)] for name, p in state.model.named_parameters() if id(p) in peaks}
    expected = "the schedule's rate at each step"
    for step in steps:
        state.step = step
        with watched(state, hold=True) as updates:
            report = train_step(run, state, (inputs, targets))
        if not updates:
            return nothing_seen(expected)
        for u in updates:
            right = named.get(u.name, config.optim.lr) * closed_form(step, config)
            if not math.isclose(u.lr, right, rel_tol=1e-4, abs_tol=1e-12):
                diagnosis = f"step {step:,} is taken at {u.lr:.3e} ({u.name}), the schedule says {right:.3e}"
                near = [
                    s
                    for s in (step - 1, step + 1)
                    if s >= 0 and math.isclose(u.lr, named.get(u.name, 0) * closed_form(s, config), rel_tol=1e-6)
                ]
                diagnosis += f": that is step {near[0]:,}'s" if near else ""
                fix = "set the rate of every group from state.step, before optimizer.step()"
                return failed(f"{u.lr:.3e} at step {step:,}", f"{right:.3e}", diagnosis, fix)
        if state.step != step + 1 or report.step != step + 1:
            diagnosis = "a step must count as one: the schedule, the batches and the saves go by it"
            return failed(f"after step {step:,} comes {state.step:,}", f"{step + 1:,}", diagnosis, "state.step += 1")
        if not math.isclose(report.lr, config.optim.lr * closed_form(step, config), rel_tol=1e-4, abs_tol=1e-12):
            diagnosis = "the learning rate that is shown is not the one used"
            return failed(f"reports {report.lr:.3e}", f"{updates[0].lr:.3e}", diagnosis, "report the step's own rate")
    return passed(f"{len(steps)} steps from 0 to {last:,}", expected)


def overflow(subject: Subject) -> Result:
    """A loss or a gradient that is not finite stops the run before the weights take it."""
    expected = "an error, and weights as they were"
    for what in ("loss", "gradient"):
        state = subject.state(plain(subject))
        victim = next(p for p in state.model.parameters() if p.requires_grad)
        if what == "loss":
            victim.data.fill_(math.nan)
        else:
            victim.register_hook(lambda gradient: gradient * math.inf)
        before = {name: p.detach().nan_to_num() for name, p in state.model.named_parameters()}
        try:
            train_step(plain(subject), state, subject.batch)
        except RunError:
            changed = [n for n, p in state.model.named_parameters() if not torch.equal(p.nan_to_num(), before[n])]
            if not changed:
                continue
            diagnosis = f"the weights have already taken the step when the error comes: {listed(changed)}"
        else:
            diagnosis = f"a step whose {what} is not finite is taken: it would ruin all weights, and the night"
        fix = "look at the loss and at the gradient norm before optimizer.step()"
        return failed(f"a {what} that is not finite gets through", expected, diagnosis, fix)
    return passed("a loss of nan and an infinite gradient are errors, and no weight takes them", expected)


def weights_move(subject: Subject) -> Result:
    """From the real start, every tensor gets a gradient and moves within a few steps; all stay finite."""
    run = variant(
        subject.run,
        {
            "train": {"batch_size": ROWS, "micro_batch_size": 0},
            "schedule": {"kind": "constant", "warmup_steps": 0},
            "runtime": {"compile": False},
        },
    )
    state = new_state(run)
    start = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    fed: set[str] = set()
    for _ in range(5):  # where the last projections start at zero, the first step moves only them, and so on inward
        with watched(state) as updates:
            train_step(run, state, subject.batch)
        fed |= {u.name for u in updates if u.grad is not None and bool(u.grad.any())}
    ends = dict(state.model.named_parameters())
    expected = "all tensors move, all finite"
    if bad := [name for name, p in ends.items() if not bool(p.isfinite().all())]:
        diagnosis = "the steps are far too long"
        fix = "a lower optim.lr"
        return failed(f"{listed(bad)} not finite after 5 steps", expected, diagnosis, fix)
    if still := [name for name, p in ends.items() if torch.equal(p, start[name]) or name not in fed]:
        diagnosis = f"after 5 steps nothing has reached {listed(still)}"
        fix = "two factors that both start at zero never move; or the optimizer does not have them"
        return failed(f"{len(still)} tensors stand still", expected, diagnosis, fix)
    return passed(f"{len(ends)} tensors moved in 5 steps", expected)
