"""Checks of what may see what, and what must: dropout, rows of a batch, the future, the past.

They use woken weights (`subject.wake`): a fresh model whose last projections are zero would hide every mistake behind
them.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinyllm.sanity.model import is_ours, relative
from tinyllm.sanity.result import Result, failed, passed, skipped, warned
from tinyllm.sanity.subject import Subject, logits_of, wake

LEAK = 1e-5  # relative to the logits' size; what is not there changes nothing at all, but for the order of sums


def dropout(subject: Subject) -> Result:
    """Off in evaluation, on in training, by the seed of the step."""
    config = subject.run.config.model
    model = wake(copy.deepcopy(subject.own))
    tokens = subject.tensor(subject.batch[0])
    draws: dict[bool, list[Tensor]] = defaultdict(list)
    for training in (False, True):
        model.train(training)
        for seed in (1, 2):
            with torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(seed)
                draws[training].append(model(tokens).float())
    differs = {training: not torch.equal(*pair) for training, pair in draws.items()}
    expected = "evaluation without, training with it"
    if differs[False]:
        diagnosis = "two forward passes in evaluation differ: losses would be noise, and worse than the model is"
        fix = "pass training=self.training to F.dropout, or use nn.Dropout"
        return failed("random in evaluation", expected, diagnosis, fix)
    wanted = is_ours(subject) and config.dropout + config.attn_dropout > 0
    has = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    if (wanted or has) and not differs[True]:
        diagnosis = f"model.dropout = {config.dropout}, but two forward passes in training are equal"
        return failed("never on", expected, diagnosis, "apply it to the embedding and to each residual branch")
    if not (wanted or has) and not differs[True] and not config.dropout:
        return skipped("model.dropout = 0")
    if is_ours(subject) and not wanted and differs[True]:
        diagnosis = "model.dropout = 0, but two forward passes in training differ"
        return failed("on in training", "nothing random", diagnosis, "look for a fixed rate")
    with Rates() as rates, torch.no_grad(), torch.random.fork_rng():
        model(tokens)
    if not is_ours(subject) and max(rates.found, default=0) > 0.5 >= config.dropout:
        diagnosis = f"drops {max(rates.found):.0%} of some activations; model.dropout = {config.dropout:g}"
        return failed(
            f"rates {sorted(rates.found)}", expected, diagnosis, "p is the share to drop, not the one to keep"
        )
    if is_ours(subject):
        right = Counter({config.dropout: 1 + 2 * config.n_layer})
        right[config.attn_dropout] += config.n_layer
        right.pop(0.0, None)
        if rates.found != right:
            diagnosis = f"drops with {dict(rates.found)} (rate: times), the config asks for {dict(right)}"
            fix = "model.dropout on the embedding and each residual branch, model.attn_dropout in attention"
            return failed("another rate or another place", expected, diagnosis, fix)
    return passed("off in evaluation, on in training" if differs[True] else "nothing random in either mode", expected)


class Rates(TorchDispatchMode):
    """Counts the rates at which activations are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[float] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            self.found[round(args[1], 6)] += 1
        if name in ("bernoulli_", "bernoulli") and len(args) > 1:
            self.found[round(1 - args[1], 6)] += 1
        return func(*args, **(kwargs or {}))


def modes(subject: Subject) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The woken model as evaluation and as training call it; seeded alike each time, so dropout changes nothing."""
    model = wake(copy.deepcopy(subject.own))
    for name, training in (("in evaluation", False), ("in training", True)):
        model.train(training)
        yield name, model


def batch_rows(subject: Subject) -> Result:
    """Sequences of a batch know nothing of each other, in both modes."""
    tokens = subject.tensor(subject.batch[0])
    changed = tokens.clone()
    changed[0] = (changed[0] + 1) % subject.run.vocab_size
    expected = "other rows unchanged"
    for mode, model in modes(subject):
        base = logits_of(model, tokens).float()
        others = relative((logits_of(model, changed).float() - base)[1:], base)
        if not others < LEAK:
            diagnosis = f"one sequence changes the logits of another ({mode})"
            fix = "look for a softmax, mean, norm or reshape over the batch dimension; BatchNorm is not for text"
            return failed(f"other rows change by {others:.1e} of their size", expected, diagnosis, fix)
    alone = logits_of(subject.woken, tokens[1:2]).float()
    error = relative(alone - logits_of(subject.woken, tokens).float()[1:2], alone)
    if not error < 1e-3:
        diagnosis = "a sequence alone gives other logits than in a batch"
        return failed(f"alone it differs by {error:.1e}", expected, diagnosis, "compute each row by itself")
    return passed("one row changes no other", expected)


def causal_mask(subject: Subject) -> Result:
    """Tokens after position t change no logit up to t, in both modes."""
    T = subject.run.config.model.block_size
    tokens = subject.tensor(subject.windows("train", 1, T)[0])
    worst, expected = (0.0, 0), "no change before the changed token"
    for mode, model in modes(subject):
        base = logits_of(model, tokens).float()
        for t in sorted({0, 1, T // 3, T // 2, T - 2}):
            if not 0 <= t < T - 1:
                continue
            changed = tokens.clone()
            changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % subject.run.vocab_size
            leak = relative(logits_of(model, changed).float()[:, : t + 1] - base[:, : t + 1], base)
            if not leak < LEAK:
                diagnosis = f"the logits at position {t} know what comes after it ({mode}): the loss would be near zero"
                fix = "a causal mask: token t attends to tokens up to t; is_causal=True, or tril(ones(T, T))"
                return failed(f"logits change by {leak:.1e} of their size", expected, diagnosis, fix)
            worst = max(worst, (leak, t))
    return passed(f"changes after t move no logit up to t (at most {worst[0]:.0e})", expected)


def context(subject: Subject) -> Result:
    """Every earlier token reaches the last logits, a token its own, and their order matters."""
    size, vocabulary = subject.run.config.model.block_size, subject.run.vocab_size
    T = min(size, 256)
    tokens = subject.tensor(subject.windows("train", 1, T)[0])
    base = logits_of(subject.woken, tokens).float()
    expected = f"all {T} tokens of the window, and their order"

    def moved(changed: Tensor) -> float:
        return relative((logits_of(subject.woken, changed).float() - base)[:, -1], base)

    if T < 3 or vocabulary < 3:
        return skipped("a context of one or two tokens")
    for at in (T - 1, T - 2, T // 2, 0):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + vocabulary // 2) % vocabulary
        if moved(changed) > 1e-6:
            continue
        diagnosis = f"the token {T - 1 - at} places back has no influence on the prediction"
        if at == T - 1:
            return failed(
                "a token does not reach its own logits", expected, diagnosis, "look for inputs that are cut off"
            )
        if at == T - 2:
            return failed(
                "no earlier token is seen", expected, diagnosis, "attention that is never applied, or masked away"
            )
        fix = "a sliding window on purpose? else a mask that hides too much"
        return warned(f"sees less than {T - at} tokens back", expected, diagnosis, fix)
    if fixed := one_row(subject, tokens):
        diagnosis = f"{fixed} has a row for each position and is always read at the same: positions do not count"
        return failed(f"{fixed}: one row", expected, diagnosis, "torch.arange(T) for the positions")
    changed = tokens.clone()
    # Two different tokens, so that there is an order.
    changed[:, 0], tokens_1 = (tokens[:, 1] + 1) % vocabulary, tokens[:, 1]
    swapped = changed.clone()
    swapped[:, 0], swapped[:, 1] = tokens_1, changed[:, 0]
    difference = logits_of(subject.woken, changed).float()[:, -1] - logits_of(subject.woken, swapped).float()[:, -1]
    if relative(difference, base) < 1e-6:
        diagnosis = "swapping two earlier tokens changes nothing: to the model a text is a bag of words"
        return failed("order does not matter", expected, diagnosis, "add positions: learned, rotary or other")
    return passed(f"all {T} tokens are seen, in their order", expected)


def one_row(subject: Subject, tokens: Tensor) -> str:
    """The name of an embedding with a row a position of which a whole window reads one row only; '' for none."""
    read: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
        for name, module in subject.woken.named_modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings >= subject.run.config.model.block_size
    ]
    logits_of(subject.woken, tokens)
    for handle in handles:
        handle.remove()
    repeats = {name for name, ids in read.items() if ids.numel() > 1 and bool((ids == ids.flatten()[0]).all())}
    return next((name for name in sorted(repeats) if not torch.equal(read[name], tokens)), "")
