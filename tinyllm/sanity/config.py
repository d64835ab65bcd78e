"""Checks that need no step: the learning rate over the run, and how it compares with what others train with."""

import math

import numpy as np

from tinyllm.config import RunConfig
from tinyllm.optim import AdamW, Muon, set_learning_rate
from tinyllm.sanity.result import Result, failed, passed, warned
from tinyllm.sanity.subject import Subject
from tinyllm.schedule import factor

# Published peak rates of AdamW by parameters: Pythia (Biderman et al. 2023), GPT-3 (Brown et al. 2020).
PUBLISHED = {14e6: 1e-3, 70e6: 1e-3, 125e6: 6e-4, 350e6: 3e-4, 1.3e9: 2e-4, 6.7e9: 1.2e-4}


def closed_form(step: int, config: RunConfig) -> float:
    """The rate of a step as a share of the peak: warmup (s + 1) / w, then the decay to min_lr at decay_steps."""
    warmup, end = config.schedule.warmup_steps, config.schedule.decay_steps or config.train.max_steps
    if step < warmup:
        return (step + 1) / warmup
    done = min(max((step - warmup) / max(end - warmup, 1), 0.0), 1.0)
    shares = {"cosine": math.cos(math.pi * done / 2) ** 2, "linear": 1 - done, "constant": 1.0}
    lowest = 1.0 if config.schedule.kind == "constant" else config.optim.min_lr / config.optim.lr
    return lowest + (1 - lowest) * shares[config.schedule.kind]


def learning_rate(subject: Subject) -> Result:
    """The rate that every parameter group gets over the run: up to the peak, down to the minimum, never zero."""
    config = subject.run.config
    optimizers, last = subject.state(subject.run).optimizers, config.train.max_steps - 1
    warmup = config.schedule.warmup_steps
    wanted = {*np.linspace(0, last, 500).astype(int).tolist(), warmup - 1, warmup, min(config.decay_steps, last)}
    steps = sorted(step for step in wanted if 0 <= step <= last)
    curve = []
    peaks = [peak_of(optimizer, config) for optimizer in optimizers for _ in optimizer.param_groups]
    for step in steps:
        set_learning_rate(optimizers, factor(step, config))
        rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        shares = [rate / peak for rate, peak in zip(rates, peaks, strict=True)]
        if max(shares) - min(shares) > 1e-6:
            diagnosis = (
                f"at step {step} the parameter groups are at {min(shares):.3f} and {max(shares):.3f} of their peaks"
            )
            fix = "set the rate of every parameter group, not of the first alone"
            return failed("the groups do not follow one curve", "one curve", diagnosis, fix)
        curve.append((float(step), config.optim.lr * shares[0]))
    return verdict_on_curve(curve, config)


def peak_of(optimizer: AdamW | Muon, config: RunConfig) -> float:
    """The peak rate that the config asks for."""
    return config.optim.muon_lr if isinstance(optimizer, Muon) else config.optim.lr


def verdict_on_curve(curve: list[tuple[float, float]], config: RunConfig) -> Result:
    """The curve against the closed form, and against what a curve should be."""
    rates = [rate for _, rate in curve]
    top = int(np.argmax(rates))
    lr, lowest = config.optim.lr, config.optim.min_lr
    measured = f"{rates[0]:.1e} up to {rates[top]:.1e} at step {curve[top][0]:,.0f}, {rates[-1]:.1e} at the end"
    falls = config.schedule.kind != "constant"
    expected = f"peak {lr:.1e}" + (f", end near {lowest:.1e}" if falls else ", kept")
    more = {"curve": tuple(curve), "values": {"first": rates[0], "peak": rates[top], "last": rates[-1]}}
    see = "see the curve: `tinyllm plot-lr run.toml`"
    if not math.isclose(rates[top], lr, rel_tol=1e-4):
        diagnosis = f"the peak is {rates[top]:.2e}, not optim.lr = {lr:.2e}"
        if config.schedule.warmup_steps >= config.train.max_steps:
            diagnosis = (
                f"the run ends in the warmup: {config.schedule.warmup_steps:,} of {config.train.max_steps:,} steps"
            )
            see = "schedule.warmup_steps of 1 to 5 percent of train.max_steps"
        return failed(measured, expected, diagnosis, see, **more)
    if min(rates) <= 0 and not (
        falls and lowest == 0 and rates[0] > 0 and config.decay_steps >= config.train.max_steps
    ):
        diagnosis = f"the rate is zero at step {curve[int(np.argmin(rates))][0]:,.0f}: nothing is learned there"
        return failed(measured, expected, diagnosis, "optim.min_lr above 0, or a later schedule.decay_steps", **more)
    off = [(s, r) for s, r in curve if abs(r - lr * closed_form(int(s), config)) > 1e-4 * lr]
    if off:
        diagnosis = f"step {off[0][0]:,.0f} gets {off[0][1]:.3e}; the {config.schedule.kind} schedule says "
        diagnosis += f"{lr * closed_form(int(off[0][0]), config):.3e}"
        return failed(measured, expected, diagnosis, see, **more)
    if falls and config.decay_steps > config.train.max_steps and rates[-1] > lowest + 0.1 * lr:
        diagnosis = "the decay ends after the run: the last steps, which settle the loss, are taken at a high rate"
        return warned(measured, expected, diagnosis, "set schedule.decay_steps = 0, or to train.max_steps", **more)
    return passed(measured, expected, **more)


def warmup(subject: Subject) -> Result:
    """The warmup is a small part of the run, and there is one."""
    config = subject.run.config
    share = config.schedule.warmup_steps / config.train.max_steps
    measured = f"{config.schedule.warmup_steps:,} steps, {share:.1%} of the run"
    values = {"share": share}
    if config.schedule.warmup_steps == 0:
        diagnosis = "the first steps, whose gradients are the largest, are taken at the full rate"
        fix = f"schedule.warmup_steps = {max(1, round(0.02 * config.train.max_steps))}"
        return warned("none", "1 to 5% of the run", diagnosis, fix, values=values)
    if share > 0.2 or (share < 0.001 and config.schedule.warmup_steps < 100):
        diagnosis = "most of the run is spent warming up" if share > 0.2 else "the warmup is hardly there"
        fix = f"schedule.warmup_steps = {max(1, round(0.02 * config.train.max_steps))} would be 2 percent"
        return warned(measured, "1 to 5% of the run", diagnosis, fix, values=values)
    return passed(measured, "1 to 5% of the run are usual", values=values)


def peak_rate(subject: Subject) -> Result:
    """The peak rate is within reach of what others train models of this size with."""
    config = subject.run.config
    key, rate, usual = "optim.lr", config.optim.lr, published_rate(subject)
    if config.optim.name == "muon":  # it trains the matrices, at a rate that does not depend on the size
        key, rate, usual = "optim.muon_lr", config.optim.muon_lr, 0.02
    ratio = rate / usual
    measured, expected = f"{key} = {rate:.1e}", f"{usual:.0e}, within 5 times"
    values = {"lr": rate, "usual": usual}
    if max(ratio, 1 / ratio) > 5:
        side = "above" if ratio > 1 else "below"
        times = max(ratio, 1 / ratio)
        diagnosis = f"{key} is {times:,.0f} times {side} what models of this size are trained with"
        fix = f"start from {key} = {usual:.0e}; `short run` shows whether this one learns"
        far = failed if times > 50 else warned
        return far(measured, expected, diagnosis, fix, values=values)
    return passed(measured, expected, values=values)


def published_rate(subject: Subject) -> float:
    """What others train a model of this size with, by AdamW: interpolated between the published ones."""
    sizes, rates = np.log(list(PUBLISHED)), np.log(list(PUBLISHED.values()))
    return float(np.exp(np.interp(math.log(subject.size), sizes, rates)))


def settings(subject: Subject) -> Result:
    """Values that are allowed and hardly ever meant."""
    config = subject.run.config
    optim, model, train = config.optim, config.model, config.train
    unusual = {
        f"optim.weight_decay = {optim.weight_decay:g}, 0 to 0.3 are usual": optim.weight_decay > 1,
        f"optim.eps = {optim.eps:g}, 1e-8 is usual": optim.eps > 1e-4,
        f"optim.betas = {list(optim.betas)}, [0.9, 0.95] to [0.9, 0.999] are usual": not (
            0.5 <= optim.betas[0] <= 0.99 and 0.9 <= optim.betas[1] <= 0.9999
        ),
        f"optim.grad_clip = {optim.grad_clip:g}, 1 is usual": optim.grad_clip > 100 or 0 < optim.grad_clip < 0.01,
        f"model.dropout = {model.dropout:g}, 0 to 0.3 are usual": max(model.dropout, model.attn_dropout) > 0.5,
        f"steps of {config.tokens_per_step:,} tokens are very noisy": config.tokens_per_step < 128,
        f"train.max_steps = {train.max_steps:,} is hardly a run": train.max_steps < 10,
        f"schedule.decay_steps = {config.decay_steps:,} leaves most of the run at the minimum": (
            config.schedule.kind != "constant" and config.decay_steps < 0.5 * train.max_steps
        ),
        f"train.eval_windows = {train.eval_windows} make a noisy validation loss": 0 < train.eval_windows < 10,
        f"train.eval_interval = {train.eval_interval:,} is beyond the last step": train.eval_interval > train.max_steps,
        f"heads of {model.n_embd // model.n_head} channels, 32 to 128 are usual": (
            not model.class_ and model.n_embd // model.n_head < 4
        ),
    }
    found = [words for words, true in unusual.items() if true]
    if found:
        return warned("; ".join(found), "usual values", "it is allowed, and hardly ever wanted", "a typo, or meant so?")
    return passed("decay, eps, betas, clipping, dropout, batch and heads are as usual", "usual values")
