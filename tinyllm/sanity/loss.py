"""Checks of the loss: its value, which weights it reaches, and whether its gradient is its slope."""

import copy
import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from tinyllm import engine
from tinyllm.data import IGNORED
from tinyllm.runtime import seed_torch
from tinyllm.sanity.instruments import calls_of, cross_entropy, reference_gradients, unnumbered
from tinyllm.sanity.result import Result, failed, listed, passed, warned
from tinyllm.sanity.subject import Subject


def loss(subject: Subject) -> Result:
    """The real loss function is the mean of -log softmax(logits)[target], in float32."""
    generator = torch.Generator().manual_seed(0)
    size = subject.run.vocab_size  # the loss of a wide vocabulary goes another way
    logits = torch.randn(2, 12, size, generator=generator) * 4
    targets = torch.randint(size, (2, 12), generator=generator)
    partly = targets.clone()
    partly[0, 5:] = IGNORED
    cases = {
        "": (logits, targets),
        " of bfloat16 logits": (logits.bfloat16(), targets),
        " with targets ignored": (logits, partly),
    }
    fix = "cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction), and nothing else"
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
            seed_torch(0)
            return float(cross_entropy(self.model(self.inputs), self.targets))
