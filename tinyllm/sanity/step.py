"""Checks of the step: the loss, and the gradient that the optimizers are given.

They watch real optimizer steps from outside (`subject.watched`) and compare what the optimizers were given with
gradients of their own.
"""

import copy
import math
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm import engine
from tinyllm.data import IGNORED
from tinyllm.engine import Run, TrainState, train_step
from tinyllm.errors import RunError
from tinyllm.optim import all_groups
from tinyllm.sanity.instruments import (
    Update,
    calls_of,
    cross_entropy,
    joined,
    reference_gradients,
    unnumbered,
    variant,
    watched,
)
from tinyllm.sanity.result import Result, failed, listed, passed, skipped, warned
from tinyllm.sanity.subject import ROWS, Subject

CLOSE = 1e-3  # relative; float32 sums in another order differ by 1e-6, a mistake by much more


def loss(subject: Subject) -> Result:
    """The real loss function is the mean of -log softmax(logits)[target], in float32."""
    generator = torch.Generator().manual_seed(0)
    size = min(subject.run.vocab_size, 1000)
    logits = torch.randn(2, 12, size, generator=generator) * 4
    targets = torch.randint(size, (2, 12), generator=generator)
    partly = targets.clone()
    partly[0, 5:] = IGNORED
    cases = {
        "": (logits, targets),
        " of bfloat16 logits": (logits.bfloat16(), targets),
        " with targets ignored": (logits, partly),
    }
    fix = "F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten()), and nothing else"
    for case, both in cases.items():
        found, right = float(engine.loss_fn(*both)), float(cross_entropy(*both))
        if not math.isclose(found, right, rel_tol=1e-5):
            return failed(f"{found:.5f}{case}", f"{right:.5f}", loss_diagnosis(found, right, *both), fix)
    counted = int((partly != IGNORED).sum())
    found, right = float(engine.loss_fn(logits, partly, "sum")), float(cross_entropy(logits, partly)) * counted
    if not math.isclose(found, right, rel_tol=1e-5):
        return failed(f"{found:.4f} summed", f"{right:.4f}", "evaluation adds up something else", fix)
    return passed(f"{float(engine.loss_fn(logits, targets)):.5f} on random logits", "-log softmax(logits)[target]")


def loss_diagnosis(found: float, right: float, logits: Tensor, targets: Tensor) -> str:
    """What a loss is that is not the cross-entropy."""
    counted = int((targets != IGNORED).sum())
    guesses = {
        f"summed, not averaged: it, and the gradient, are {counted} times too large": right * counted,
        "of a softmax of the softmax: the model would hardly learn": float(
            cross_entropy(logits.float().softmax(-1), targets)
        ),
        "of targets shifted once more: the batch has shifted them already": float(
            cross_entropy(logits[:, :-1], targets[:, 1:])
        ),
    }
    for words, value in guesses.items():
        if math.isclose(found, value, rel_tol=1e-4):
            return f"the loss is {words}"
    if math.isclose(found, right, rel_tol=0.02):
        return "the loss is a little off: rounded to 16 bits, or smoothed"
    return "the loss is not the cross-entropy"


def gradient_reach(subject: Subject) -> Result:
    """The loss reaches every tensor, and what autograd says is the slope of the loss."""
    model = copy.deepcopy(subject.woken)
    inputs, targets = (subject.tensor(a[:2, :32]) for a in subject.batch)
    gradients = reference_gradients(model, inputs, targets)
    if wrong := unreached(subject, model, gradients, inputs, targets):
        return wrong
    if subject.run.runtime.device.type == "mps":
        return passed(f"{len(gradients)} tensors", "a gradient each (slopes need float64)")
    slopes = Slopes(model, inputs, targets)
    for part, names in parts(gradients).items():
        # A short way, where the loss bends sharply; longer ones, where the model rounds on its own.
        for way in (1e-6, 1e-4, 1e-2):
            claimed, found = slopes.along(names, way)
            if agree := abs(claimed - found) < 0.02 * max(abs(claimed), abs(found)) + 1e-9:
                break
        if not agree:
            diagnosis = f"the loss falls {found / claimed:.2f} times as fast as the gradient of {part} says"
            fix = "look for detach(), no_grad or .data between there and the loss, or a backward of your own"
            return failed(f"slope {found:.3e}, gradient {claimed:.3e}", "the same", diagnosis, fix)
    return passed(
        f"{len(gradients)} tensors, and the slopes agree", "each tensor has a gradient, the slope of the loss"
    )


def unreached(
    subject: Subject, model: nn.Module, gradients: dict[str, Tensor], inputs: Tensor, targets: Tensor
) -> Result | None:
    """A failure if something is used and not trained."""
    expected = "each tensor has a gradient"
    ran = {call.name for call in calls_of(model, inputs)}
    if strangers := unregistered(model, inputs, targets):
        shapes = listed([str(tuple(t.shape)) for t in strangers])
        diagnosis = f"tensors of shape {shapes} are used but are no parameters: neither trained nor saved"
        fix = "nn.Parameter for a tensor, nn.ModuleList for a list of modules"
        return failed(f"{len(strangers)} tensors that nobody trains", expected, diagnosis, fix)
    if dead := [name for name, g in gradients.items() if not bool(g.any())]:
        if all(name.rpartition(".")[0] not in ran and has_live_sibling(name, gradients) for name in dead):
            diagnosis = f"{listed(dead)} were not used on these few tokens: experts that nothing was sent to?"
            fix = "see that each of them gets tokens in a longer run"
            return warned(f"{len(dead)} tensors without gradient", expected, diagnosis, fix)
        diagnosis = f"no gradient reaches {listed(dead)}: unused, or behind a detach()"
        fix = "use them in forward, without .data or detach()"
        return failed(f"{len(dead)} tensors without gradient", expected, diagnosis, fix)
    if bad := [name for name, g in gradients.items() if not bool(g.isfinite().all())]:
        diagnosis, fix = "the gradient overflows or divides by zero", "look there for x / 0, sqrt(0), log(0)"
        return failed(f"not finite: {listed(bad)}", expected, diagnosis, fix)
    if inputs.shape[1] > 2 and (half := half_used(model, gradients)):
        name, share, side = half
        diagnosis = (
            f"{share:.0%} of the {side} of {name} are never used: queries, keys and values confused, or cut off?"
        )
        return failed(f"{share:.0%} of {name} without gradient", expected, diagnosis, "use all that a layer gives")
    counts = subject.counts["train"]
    for name, module in model.named_modules():
        padding = module.padding_idx if isinstance(module, nn.Embedding) else None
        if padding is not None and padding < len(counts) and counts[padding]:
            diagnosis = f"{name} has padding_idx = {padding}, but that is a real token here: its row is never trained"
            return failed(f"{name}[{padding}] stands still", expected, diagnosis, "leave padding_idx out")
    return None


def has_live_sibling(name: str, gradients: dict[str, Tensor]) -> bool:
    """Whether another tensor, of a module beside this one's in a list, has a gradient."""
    return any(unnumbered(n) == unnumbered(name) and bool(g.any()) for n, g in gradients.items())


def half_used(model: nn.Module, gradients: dict[str, Tensor]) -> tuple[str, float, str] | None:
    """A linear layer a quarter of whose outputs (or inputs) get no gradient: its name, the share, and which of them."""
    for name, module in model.named_modules():
        gradient = gradients.get(f"{name}.weight") if isinstance(module, nn.Linear) else None
        if gradient is None or min(gradient.shape) < 4:
            continue
        for side, other in (("outputs", 1), ("inputs", 0)):
            share = 1 - float(gradient.any(other).float().mean())
            if share >= 0.25:
                return name, share, side
    return None


def unregistered(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Tensors that the loss would have trained, had the model known them as its parameters."""
    known = {id(p) for p in model.parameters()}
    todo, seen, found = [cross_entropy(model(inputs), targets).grad_fn], set(), []
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in known:
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


def parts(gradients: dict[str, Tensor]) -> dict[str, list[str]]:
    """Parameter names by the part of the model they are in: `blocks.0`, `wte`, ..."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in gradients:
        found[".".join(name.split(".")[: 2 if any(c.isdigit() for c in name) else 1])].append(name)
    return found


class Slopes:
    """How the loss really changes along a gradient: central differences, in float64."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.model, self.inputs, self.targets = model.double(), inputs, targets
        self.gradients = reference_gradients(self.model, inputs, targets)
        self.named = dict(self.model.named_parameters())

    @torch.no_grad()
    def along(self, names: list[str], h: float) -> tuple[float, float]:
        """The slope along these tensors' gradient: as autograd says, and as two losses say, h of their size apart."""
        norm = math.sqrt(sum(float(self.gradients[n].square().sum()) for n in names))
        size = math.sqrt(sum(float(self.named[n].square().sum()) for n in names))
        step = h * size / norm
        losses = []
        for sign in (1, -2, 1):  # there, to the other side, and back
            for n in names:
                self.named[n].add_(self.gradients[n], alpha=sign * step)
            losses.append(self.loss())
        return norm**2, (losses[0] - losses[1]) / (2 * step)

    def loss(self) -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return float(cross_entropy(self.model(self.inputs), self.targets))


def plain(subject: Subject, micro_batch_size: int = 0, grad_clip: float = 0.0, **optim: Any) -> Run:
    """The exact run with ROWS sequences a step, its micro-batches and its clipping as given, at a constant rate."""
    train = {"batch_size": ROWS, "micro_batch_size": micro_batch_size}
    schedule = {"kind": "constant", "warmup_steps": 0}
    return variant(subject.exact, {"train": train, "optim": {"grad_clip": grad_clip, **optim}, "schedule": schedule})


def given(run: Run, state: TrainState, subject: Subject) -> tuple[Tensor, list[Update], Any]:
    """One real step: the gradient the optimizers were given, (parameters,) float64, the updates, and the report."""
    with watched(state) as updates:
        report = train_step(run, state, subject.batch)
    held = {name for group in all_groups(state.optimizers) for name in group["names"]}
    if held != {u.name for u in updates}:
        raise RunError("a step does not step all of its optimizers", fix="see `one step`")
    return joined({u.name: torch.zeros_like(u.before) if u.grad is None else u.grad for u in updates}), updates, report


def wanted(state: TrainState, subject: Subject, rows: slice = slice(None)) -> Tensor:
    """The gradient of the mean cross-entropy of (some rows of) the batch, of what the optimizers hold."""
    state.model.train()
    inputs, targets = (subject.tensor(a[rows]) for a in subject.batch)
    gradients = reference_gradients(state.model, inputs, targets)
    held = {name for group in all_groups(state.optimizers) for name in group["names"]}
    return joined({name: g for name, g in gradients.items() if name in held})


def apart(a: Tensor, b: Tensor) -> float:
    """Distance of two vectors as a share of the second."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def one_step(subject: Subject) -> Result:
    """Each train_step is one step of each optimizer, and counts as one."""
    run, state = plain(subject, micro_batch_size=1), subject.state(plain(subject), woken=True)
    expected, fix = "one step of each optimizer", "step() on each optimizer, once, after the last micro-batch"
    for number in range(2):
        with watched(state) as updates:
            train_step(run, state, subject.batch)
        steps = Counter(u.name for u in updates)
        held = {name for group in all_groups(state.optimizers) for name in group["names"]}
        if not updates:
            diagnosis = f"train_step {number} makes no step of the optimizers that the state holds"
            return failed("no step", expected, diagnosis, fix)
        if missing := sorted(held - steps.keys()):
            diagnosis = f"an optimizer is left out: {listed(missing)} are never stepped"
            return failed(f"{len(missing)} tensors are not stepped", expected, diagnosis, fix)
        if max(steps.values()) > 1:
            diagnosis = f"each train_step makes {max(steps.values())} optimizer steps"
            return failed(f"{max(steps.values())} steps in one", expected, diagnosis, fix)
        if state.step != number + 1:
            diagnosis = "the schedule, the batches and the saves go by state.step"
            return failed(f"step {state.step} after {number + 1}", f"{number + 1}", diagnosis, "state.step += 1")
    return passed("one step of each optimizer, two times", expected)


def gradient(subject: Subject) -> Result:
    """What the optimizer gets is the gradient of the mean cross-entropy of the batch; what is reported is its loss."""
    run, state = plain(subject), subject.state(plain(subject), woken=True)
    right = wanted(state, subject)
    loss_before = subject.loss(state.model)
    found, _, report = given(run, state, subject)
    expected = "the gradient of the mean cross-entropy"
    ratio, error = float(found @ right / (right @ right)), apart(found, right)
    measured = f"{error:.1e} apart"
    if not error < CLOSE:
        diagnosis = "the optimizer is given another gradient than that of the batch's mean cross-entropy"
        fix = "look at loss_fn and at what happens between backward() and step()"
        if not bool(found.any()):
            diagnosis, fix = (
                "the optimizer gets no gradient",
                "zero_grad after the step, not between backward() and step()",
            )
        elif apart(found / ratio, right) < 0.01:
            diagnosis = f"the gradient is {ratio:.4g} times that of the mean cross-entropy of the batch"
            fix = "average the loss over all tokens, and scale it by nothing else"
        elif other := trained_on(subject, found):
            diagnosis, fix = (
                f"the step trains on {other}",
                "train on every target of the batch, as it comes from the source",
            )
        return failed(measured, expected, diagnosis, fix, values={"relative_error": error, "ratio": ratio})
    if not math.isclose(report.loss, loss_before, rel_tol=1e-3):
        diagnosis = "the loss that is shown is not the mean cross-entropy of the batch before the update"
        fix = "report the loss that is trained on"
        return failed(f"reports {report.loss:.4f}", f"{loss_before:.4f}", diagnosis, fix)
    return passed(measured, expected, values={"relative_error": error})


def trained_on(subject: Subject, found: Tensor) -> str:
    """The loss that has this gradient, of those that people take by mistake; '' if it is none of them."""
    state = subject.state(plain(subject), woken=True)
    inputs, targets = (subject.tensor(a) for a in subject.batch)
    logits = state.model.train()(inputs)
    flat = logits.flatten(0, 1), targets.flatten()
    losses = {
        "targets shifted once more": cross_entropy(logits[:, :-1], targets[:, 1:]),
        "the inputs themselves: it learns to copy": cross_entropy(logits, inputs),
        "the last position alone": cross_entropy(logits[:, -1:], targets[:, -1:]),
        "all positions but the first": cross_entropy(logits[:, 1:], targets[:, 1:]),
        "all positions but the last": cross_entropy(logits[:, :-1], targets[:, :-1]),
        "smoothed targets": nn.functional.cross_entropy(*flat, label_smoothing=0.1),
        "a softmax of the softmax": cross_entropy(logits.softmax(-1), targets),
    }
    named = dict(state.model.named_parameters())
    held = [name for group in all_groups(state.optimizers) for name in group["names"]]
    for words, loss in losses.items():
        gradients = torch.autograd.grad(loss, [named[n] for n in held], retain_graph=True, allow_unused=True)
        both = zip(held, gradients, strict=True)
        own = joined({n: torch.zeros_like(named[n]) if g is None else g for n, g in both})
        if apart(found, own) < 0.02:
            return words
    return ""


def accumulation(subject: Subject) -> Result:
    """Micro-batches add up to the gradient of the whole batch."""
    run, state = plain(subject, micro_batch_size=1), subject.state(plain(subject), woken=True)
    right, last = wanted(state, subject), wanted(state, subject, slice(-1, None))
    found, _, report = given(run, state, subject)
    error, ratio = apart(found, right), float(found @ right / (right @ right))
    measured, expected = f"{ROWS} micro-batches: {error:.1e} apart", "the gradient of the whole batch"
    if not error < CLOSE:
        diagnosis = "micro-batches do not add up to the whole batch"
        if apart(found, last) < 0.01 or apart(found * ROWS, last) < 0.01:
            diagnosis = "only the last micro-batch's gradient is left: the others were cleared"
        elif apart(found / ratio, right) < 0.01:
            diagnosis = f"the sum over {ROWS} micro-batches is {ratio:.3g} times the gradient of the whole batch"
        fix = "weigh each micro-batch's mean loss by its share of the batch; clear, clip and step once"
        return failed(measured, expected, diagnosis, fix, values={"relative_error": error, "ratio": ratio})
    whole = subject.loss(subject.woken)
    if not math.isclose(report.loss, whole, rel_tol=1e-3):
        diagnosis = "the loss shown for accumulated micro-batches is not that of the whole batch"
        return failed(f"reports {report.loss:.4f}", f"{whole:.4f}", diagnosis, "add up the weighted losses")
    return passed(measured, expected, values={"relative_error": error})


def zero_grad(subject: Subject) -> Result:
    """No step sees the gradient of the step before."""
    run, state = plain(subject), subject.state(plain(subject), woken=True)
    first, *_ = given(run, state, subject)
    right = wanted(state, subject)
    second, *_ = given(run, state, subject)
    error = apart(second, right)
    measured, expected = f"second step: {error:.1e} apart", "its own gradient"
    if not error < CLOSE:
        diagnosis = "the second step gets another gradient than its own"
        if apart(second, right + first) < 0.01:
            diagnosis = "the second step gets the gradient of the first as well: steps grow longer and longer"
        return failed(measured, expected, diagnosis, "optimizer.zero_grad(set_to_none=True) once a step")
    return passed(measured, expected)


def clipping(subject: Subject) -> Result:
    """The whole gradient is scaled to optim.grad_clip once, before the step; a smaller one is left alone."""
    limit = subject.run.config.optim.grad_clip
    if not limit:
        return skipped("optim.grad_clip = 0 switches it off")
    state = subject.state(plain(subject), woken=True)
    right = wanted(state, subject)
    norm = float(right.norm())
    expected = "scaled to the limit if above, untouched if below"
    fix = "clip_grad_norm_ over all parameters, once, after the last backward() and before step()"
    for share, micro in ((0.5, 0), (0.5, 1), (2.0, 0)):
        run = plain(subject, micro_batch_size=micro, grad_clip=share * norm)
        found, _, report = given(run, subject.state(plain(subject), woken=True), subject)
        got = float(found.norm())
        how = f"a norm of {norm:.3g} with the limit {share * norm:.3g}{' in micro-batches' if micro else ''}"
        measured = f"{how} became {got:.3g}"
        if share < 1 and got > share * norm * 1.001:
            return failed(measured, expected, "the gradient is not clipped when the optimizer takes it", fix)
        if not apart(found, right * min(share, 1)) < 0.01:
            diagnosis = "clipping changes the direction of the gradient: clipped in parts, or more than once"
            return failed(measured, expected, diagnosis, fix)
        if not math.isclose(report.grad_norm, norm, rel_tol=0.01):
            diagnosis = "the gradient norm that is shown is not the one before clipping"
            fix = "report what clip_grad_norm_ returns"
            return failed(f"reports {report.grad_norm:.4g}", f"{norm:.4g}", diagnosis, fix)
    return passed(f"the norm {norm:.3g} is cut to {norm / 2:.3g}, and left alone below the limit", expected)
