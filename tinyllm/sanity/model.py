"""Checks of the model by itself: what it is made of, where it starts, and what it gives."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.config import ModelConfig
from tinyllm.engine import new_state
from tinyllm.model import GPT
from tinyllm.sanity.instruments import calls_of, cross_entropy, logits_of, unnumbered
from tinyllm.sanity.reference import expected_parameters
from tinyllm.sanity.result import Result, failed, listed, passed, warned
from tinyllm.sanity.subject import ROWS, Subject

INITIAL_LOSS_TOLERANCE = 0.15  # nats; healthy GPTs were 0.02 off the prediction at 0.8 M parameters, 0.03 at 124 M
STD = 0.02  # GPT-2's initialization


def is_ours(subject: Subject) -> bool:
    """Whether the model is the built-in GPT, of which everything is known."""
    return type(subject.fresh) is GPT


def parameters(subject: Subject) -> Result:
    """As many as the config says, all of them trained, none twice by accident."""
    model, config = subject.fresh, subject.run.config.model
    total = subject.weights
    measured, expected = f"{total:,} in {len(list(model.parameters()))} tensors", "all trained, none by accident twice"
    if frozen := [name for name, p in model.named_parameters() if not p.requires_grad]:
        diagnosis = f"frozen: {listed(frozen)}"
        return failed(f"{len(frozen)} tensors are not trained", expected, diagnosis, "requires_grad = True for them")
    if hidden := unknown_modules(model):
        diagnosis = f"{listed(hidden)} are kept in plain lists, in which the model does not find them"
        return failed("modules outside the model", expected, diagnosis, "nn.ModuleList, or nn.ModuleDict")
    if plain := plain_tensors(model):
        diagnosis = f"{listed(plain)} are plain tensors: neither trained, nor moved to a device, nor saved"
        fix = "nn.Parameter(...), or register_buffer(...)"
        return warned("tensors that are no parameters", expected, diagnosis, fix)
    if is_ours(subject):
        formula = expected_parameters(config, subject.run.vocab_size)
        if total != formula:
            diagnosis = f"the config describes a model of {formula:,} parameters"
            if abs(total - formula) == subject.run.vocab_size * config.n_embd:
                diagnosis += f"; the head is {'un' if total > formula else ''}tied"
            return failed(measured, f"{formula:,}", diagnosis, "build what [model] says")
    if twins := list(equal_tensors(model)):
        pairs = listed([f"{a} and {b}" for a, b in twins])
        diagnosis = f"start with the same values and are not shared: {pairs}"
        fix = "share them (one tensor), or draw each from the generator on its own"
        # As in torch's nn.TransformerEncoder, which copies one layer: not good, but they do part as they learn.
        cloned = not is_ours(subject) and all(unnumbered(a) == unnumbered(b) for a, b in twins)
        return (warned if cloned else failed)("tensors are copies of each other", expected, diagnosis, fix)
    return passed(measured, expected, values={"parameters": total})


def unknown_modules(model: nn.Module) -> list[str]:
    """Names of attributes that hold modules which are not the model's children."""
    known = {id(m) for m in model.modules()}
    found = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            if not key.startswith("_") and any(isinstance(m, nn.Module) and id(m) not in known for m in inside):
                found.append(f"{name}.{key}".lstrip("."))
    return found


def plain_tensors(model: nn.Module) -> list[str]:
    """Names of attributes that are tensors of numbers but neither parameters nor buffers."""
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1 and not key.startswith("_")
    ]


def equal_tensors(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Pairs of different tensors that hold the same random values."""
    known: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        p = parameter.detach()
        if p.dim() < 2 or p.numel() < 8 or bool((p == p.flatten()[0]).all()):
            continue
        key = (tuple(p.shape), float(p.flatten()[0]), float(p.flatten()[-1]))
        if key in known and torch.equal(known[key][1], p):
            yield known[key][0], name
        known.setdefault(key, (name, p))


def layers(subject: Subject) -> Result:
    """Each block runs once in a forward pass, and no two are one and the same."""
    model, config = subject.fresh, subject.run.config.model
    stacks = {name: blocks for name, blocks in stacks_of(model).items() if any(list(b.parameters()) for b in blocks)}
    shapes = shapes_of_calls(subject, [block for blocks in stacks.values() for block in blocks])
    expected = "each block once"
    for name, blocks in stacks.items():
        if len({id(block) for block in blocks}) < len(blocks):
            diagnosis = f"some entries of {name} are the same module: they share their weights"
            fix = "build each block anew: [Block(...) for _ in range(n)], not [Block(...)] * n"
            return failed(f"{name} repeats a module", expected, diagnosis, fix)
        times = [len(shapes[id(block)]) for block in blocks]
        routed = len({shape for block in blocks for shape in shapes[id(block)]}) > 1  # experts get what is sent to them
        if not any(times) or routed:  # or they are called by another way than the module itself
            continue
        if len(set(times)) > 1 or (is_ours(subject) and set(times) != {1}):
            wrong = [f"{name}.{i} runs {n} times" for i, n in enumerate(times) if n != 1]
            diagnosis = "a forward pass leaves blocks out, or takes them twice"
            return failed(listed(wrong), expected, diagnosis, "call each block once, in order")
        if times[0] > 1:
            diagnosis = f"{name} runs {times[0]} times in one forward pass: recurrent on purpose?"
            return warned(f"each block {times[0]} times", expected, diagnosis, "call each block once")
    count = sum(len(blocks) for blocks in stacks.values())
    if is_ours(subject) and len(model.blocks) != config.n_layer:
        diagnosis = f"the model has {len(model.blocks)} blocks, model.n_layer = {config.n_layer}"
        return failed(f"{len(model.blocks)} blocks", f"{config.n_layer}", diagnosis, "build n_layer blocks")
    return passed(f"{count} blocks, each once" if count else "no stack of blocks to count", expected)


def stacks_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Lists of several modules of one kind, by name: the blocks of a transformer, mostly."""
    lists = {name: list(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)}
    return {name: blocks for name, blocks in lists.items() if len(blocks) > 1 and len({type(b) for b in blocks}) == 1}


def shapes_of_calls(subject: Subject, modules: list[nn.Module]) -> dict[int, list[tuple[int, ...]]]:
    """The shapes that each module gets in a forward pass, a shape a call, by the module's id."""
    shapes: dict[int, list[tuple[int, ...]]] = {id(m): [] for m in modules}
    for call in calls_of(subject.fresh, subject.tensor(subject.batch[0])):
        if id(call.module) in shapes:
            given = call.args[0] if call.args else None
            shapes[id(call.module)].append(tuple(given.shape) if isinstance(given, Tensor) else ())
    return shapes


def initial_weights(subject: Subject) -> Result:
    """Fresh weights have the size they should: GPT-2's for the built-in model, finite and moderate for another."""
    model, config = subject.own, subject.run.config.model
    bad = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    if bad:
        return failed(f"not finite: {listed(bad)}", "finite weights", "the initialization divides by zero", "mend it")
    if not all(
        torch.equal(a, b) for a, b in zip(model.parameters(), new_state(subject.run).model.parameters(), strict=True)
    ):
        diagnosis = "two fresh models of one seed differ: the run could not be repeated"
        return failed("another model each time", "the same weights", diagnosis, "draw from train.seed alone")
    if narrow := [name for name, p in model.named_parameters() if p.is_floating_point() and p.dtype.itemsize < 4]:
        diagnosis = f"{listed(narrow)} in 16 bits: updates smaller than 1/256 of a weight are lost"
        fix = "keep weights in float32; runtime.dtype = bfloat16 computes in 16 bits all the same"
        return failed(f"{len(narrow)} tensors in 16 bits", "float32 weights", diagnosis, fix)
    if is_ours(subject):
        for name, p in ((name, p.detach()) for name, p in model.named_parameters()):
            if p.dim() < 2:
                start = float("norm" in name and name.endswith("weight"))
                if not bool((p == start).all()):
                    measured, fix = f"{name}: {float(p.mean()):.3g}", "gains at 1, biases at 0"
                    diagnosis = f"{name} starts at {float(p.mean()):.3g} on average"
                    return failed(measured, f"{start:.0f}", diagnosis, fix)
                continue
            wanted = expected_std(name, config)
            found = float(p.square().mean().sqrt()) if p.numel() > 1 else wanted  # the mean should be zero
            if abs(found - wanted) > max(0.1, 5 / p.numel() ** 0.5) * wanted + 1e-9:
                diagnosis = f"{name} starts with a root mean square of {found:.4f} instead of {wanted:.4f}"
                fix = "0.02 as in GPT-2, and 0.02 / sqrt(2 n_layer) for the projections into the residual stream"
                return failed(f"{name}: RMS {found:.4f}", f"{wanted:.4f}", diagnosis, fix if wanted else "zero_()")
        return passed("all tensors start with the spread of the recipe", "GPT-2's initialization")
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    if matrices and not any(bool(p.any()) for p in matrices):
        diagnosis = "all matrices start at zero: every gradient is zero, and stays so"
        fix = "normal(0, 0.02) for the embedding and the inner matrices"
        return failed("all zero", "random weights", diagnosis, fix)
    if even := [
        n for n, p in model.named_parameters() if p.dim() >= 2 and p.any() and bool((p == p.flatten()[0]).all())
    ]:
        diagnosis = f"all values of {listed(even)} are equal: the units of a layer would stay copies of each other"
        return failed(f"{len(even)} matrices of one value", "random weights", diagnosis, "normal(0, 0.02)")
    growth = stream_growth(subject)
    if growth > 30:
        diagnosis = f"the residual stream is {growth:.0f} times larger after the last block than after the first"
        fix = "scale the projections into the residual stream by 1 / sqrt(2 n_layer)"
        return warned(f"activations grow {growth:.0f} times", "less than 30 times", diagnosis, fix)
    return passed(f"finite; activations grow {growth:.1f} times over the blocks", "finite, and less than 30 times")


def expected_std(name: str, config: ModelConfig) -> float:
    """Spread around zero of a fresh matrix of the built-in model."""
    into_stream = name.endswith("proj.weight")
    if name == "ngrams.weight" or (config.zero_init and (into_stream or name == "head.weight")):
        return 0.0
    return STD / math.sqrt(2 * config.n_layer) if into_stream else STD


def stream_growth(subject: Subject) -> float:
    """How many times larger (root mean square) the last block's output is than the first's; 1 where it has no stack."""
    blocks = {id(block) for block in max(stacks_of(subject.fresh).values(), key=len, default=[])}
    calls = [c for c in calls_of(subject.fresh, subject.tensor(subject.batch[0])) if id(c.module) in blocks]
    sizes = [float(c.output.float().square().mean().sqrt()) for c in calls if isinstance(c.output, Tensor)]
    return sizes[-1] / max(sizes[0], 1e-9) if len(sizes) > 1 else 1.0


def output(subject: Subject) -> Result:
    """Logits: one for each token of the vocabulary at each position, finite, and not yet probabilities."""
    inputs = subject.tensor(subject.batch[0])
    logits = logits_of(subject.woken, inputs).float()
    if remembered := remembering(subject, inputs):
        diagnosis = f"the same tokens give other logits the second time ({remembered}), with the same random numbers"
        fix = "forward must not change the model: no state from one batch to the next"
        return failed("keeps something from batch to batch", "a function of the tokens", diagnosis, fix)
    shape, wanted = tuple(logits.shape), (*inputs.shape, subject.run.vocab_size)
    if shape != wanted:
        diagnosis = "the model must give (B, T, V): one logit for each token of the vocabulary at each position"
        return failed(f"shape {shape}", f"{wanted}", diagnosis, "end with a linear layer of vocab_size outputs")
    if not bool(logits.isfinite().all()):
        where = (~logits.isfinite()).any(-1).any(0).nonzero()[0].item()
        diagnosis = f"from position {where} on: a row of the attention with nothing to attend to, or an overflow"
        return failed("logits that are not finite", "finite logits", diagnosis, "let each token attend to itself")
    total = logits.sum(-1)
    if bool((logits >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-3):
        diagnosis = "the model ends with a softmax, and the loss takes another one: it would hardly learn"
        return failed("probabilities", "logits", diagnosis, "return the values before the softmax")
    if bool((logits >= 0).all()):
        diagnosis = "no logit is ever negative: an activation after the head"
        return failed("logits of 0 and more", "any numbers", diagnosis, "return what the head gives")
    most = float(logits.max())
    if int((logits == most).sum()) > 2 * ROWS:
        diagnosis = f"many logits are exactly {most:.3g}: they are cut off there, and get no gradient beyond"
        return failed(f"logits up to {most:.3g} only", "any numbers", diagnosis, "no clamp on the logits")
    if 0.9 < float(logits.abs().max()) <= 1:
        diagnosis = "no logit leaves the range from -1 to 1: the model can never be sure of anything"
        return failed("logits from -1 to 1", "any numbers", diagnosis, "no tanh after the head, and no cosine")
    if torch.allclose(logits.logsumexp(-1), torch.zeros_like(total), atol=1e-3):
        diagnosis = "the model ends with a log-softmax; the loss takes it again, which is only waste"
        return warned("log-probabilities", "logits", diagnosis, "return the values before the softmax")
    return passed(f"logits of shape {shape}, finite", "(B, T, V)")


def remembering(subject: Subject, inputs: Tensor) -> str:
    """In which mode the model's output depends on what it has seen before; '' for in none."""
    model = copy.deepcopy(subject.woken)
    for training in (False, True):
        model.train(training)
        if not torch.equal(*(logits_of(model, inputs).nan_to_num() for _ in "ab")):
            return f"in {'training' if training else 'evaluation'}"
    return ""


def initial_loss(subject: Subject) -> Result:
    """An untrained model knows nothing: its loss is near ln V, and a little above it by a known amount.

    Softmax of logits that spread by σ costs ln V + σ²/2 on average (the log-normal mean); for the built-in model σ² is
    known too: a normalised vector of width d times weights of variance s² gives d s².
    """
    run, config = subject.run, subject.run.config.model
    inputs, targets = (subject.tensor(a) for a in subject.windows("val", 16, subject.batch[0].shape[1]))
    logits = logits_of(subject.fresh, inputs).float()
    loss, spread = float(cross_entropy(logits, targets)), float(logits.var(-1).mean())
    uniform = math.log(run.vocab_size)
    if is_ours(subject):
        spread = 0.0 if config.zero_init and not config.tie_embeddings else config.n_embd * STD**2
    tolerance = INITIAL_LOSS_TOLERANCE
    if not is_ours(subject):
        tolerance += spread**0.5  # logits that are alike at all places meet the frequent tokens by chance, or miss them
    if run.vocab_size < 16:
        tolerance += 0.35  # a token's own logit, which a tied head prefers, is much of so few
    measured = f"{loss:.3f}"
    expected = f"{uniform + spread / 2:.3f} ± {tolerance:.2g} (ln {run.vocab_size:,} = {uniform:.3f})"
    values = {"loss": loss, "predicted": uniform + spread / 2, "ln_vocab_size": uniform}
    if not is_ours(subject) and spread > 2:
        diagnosis = f"the logits of a fresh model spread by {spread**0.5:.1f}: it is sure of what it cannot know"
        fix = "smaller weights at the start (GPT-2: normal with a spread of 0.02), the embedding's too if it is tied"
        return failed(measured, f"near {uniform:.3f}", diagnosis, fix, values=values)
    if abs(loss - uniform - spread / 2) < tolerance:
        return passed(measured, expected, values=values)
    diagnosis = f"a model that knows nothing has a loss near ln {run.vocab_size:,}; this one is "
    if loss > uniform:
        diagnosis += "sure of something wrong"
        fix = "smaller weights at the start (GPT-2: normal with a spread of 0.02)"
    else:
        diagnosis += "better than it can be"
        fix = "look for targets that can be read off the inputs"
    return failed(measured, expected, diagnosis, fix, values=values)
