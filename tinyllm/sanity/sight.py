"""Checks of what may see what, and what must: dropout, rows of a batch, the future, the past.

They use woken weights (`instruments.wake`): a fresh model whose last projections are zero would hide every mistake
behind them.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinyllm.config import ModelConfig
from tinyllm.runtime import seed_torch
from tinyllm.sanity.instruments import calls_of, dropouts, logits_of, reference_gradients, relative
from tinyllm.sanity.model import is_ours
from tinyllm.sanity.result import Result, failed, listed, passed, skipped, warned
from tinyllm.sanity.subject import Subject

LEAK = 1e-5  # relative to the logits' size; what is not there changes nothing at all, but for the order of sums
CLOSE = 1e-4  # of two rates of dropout: the built-in model rounds its own to a multiple of 2^-16


def dropout(subject: Subject) -> Result:
    """Off in evaluation, on in training, at the rate of the config."""
    config = subject.run.config.model
    model = copy.deepcopy(subject.own_woken)
    tokens = subject.tensor(subject.batch[0])
    differs = {training: is_random(model.train(training), tokens) for training in (False, True)}
    expected = "evaluation without, training with it"
    if differs[False]:
        diagnosis = "two forward passes in evaluation differ: losses would be noise, and worse than the model is"
        fix = "pass training=self.training to F.dropout, or use nn.Dropout"
        return failed("random in evaluation", expected, diagnosis, fix)
    own = any(module.p > 0 for module in dropouts(model))
    wanted = own or (is_ours(subject) and config.dropout + config.attn_dropout > 0)
    if wanted and not differs[True]:
        diagnosis = f"model.dropout = {config.dropout:g}, but two forward passes in training are equal"
        return failed("never on", expected, diagnosis, "apply it to the embedding and to each residual branch")
    if not wanted and not differs[True]:
        return skipped("model.dropout = 0" if not config.dropout else "the model has none")
    with Rates() as rates, torch.no_grad(), torch.random.fork_rng():
        logits = model.train()(tokens)
    if (dropped := float((logits == 0).float().mean())) > 0.005:
        diagnosis = f"{dropped:.1%} of the logits are zero in training: dropout after the head changes the answers"
        return failed("dropped logits", expected, diagnosis, "no dropout on what the model returns")
    if wrong := wrong_rates(rates.found, config, is_ours(subject)):
        fix = "p is the share to drop: on the embedding and each residual branch, model.attn_dropout in attention"
        return failed(f"rates {sorted(rates.found)}", expected, wrong, fix)
    return passed("off in evaluation, on in training", expected)


def is_random(model: nn.Module, tokens: Tensor) -> bool:
    """Whether the model's output follows the random generator."""
    outputs = []
    for seed in (1, 2):
        with torch.no_grad(), torch.random.fork_rng():
            seed_torch(seed)
            outputs.append(model(tokens))
    return not torch.equal(*outputs)


def wrong_rates(found: "Counter[float]", config: ModelConfig, ours: bool) -> str:
    """What is wrong with the rates (rate to times) at which activations are dropped, in words; '' for nothing."""
    if not ours:
        highest = max(found, default=0.0)
        odd = highest > 0.5 >= config.dropout or (highest >= 0.4 and not config.dropout)
        return f"drops {highest:.0%} of some activations; model.dropout = {config.dropout:g}" if odd else ""
    # Inside a fused attention nobody sees it.
    strange = [rate for rate in found if min(abs(rate - p) for p in (config.dropout, config.attn_dropout)) > CLOSE]
    times = sum(count for rate, count in found.items() if abs(rate - config.dropout) <= CLOSE)
    places = 1 + 2 * config.n_layer
    if strange or (config.dropout and times < places):
        return f"drops at {dict(found)} (rate: times); model.dropout = {config.dropout:g} belongs in {places} places"
    return ""


class Rates(TorchDispatchMode):
    """Counts the rates at which activations are dropped."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler to keep it away from here, a second of every start

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[float] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            self.found[round(args[1], 6)] += 1
        if name == "bernoulli_":  # its default is one half
            self.found[round(1 - (args[1] if len(args) > 1 else 0.5), 6)] += 1
        if name == "ge_" and args[0].dtype == torch.int16:  # 16 random bits a value, as the built-in model draws
            self.found[round(args[1] / 65536 + 0.5, 6)] += 1
        return func(*args, **(kwargs or {}))


def modes(subject: Subject) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The woken model as evaluation and as training call it; seeded alike each time, so dropout changes nothing."""
    model = copy.deepcopy(subject.own_woken)
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
    """Tokens after position t change no logit up to t, in both modes, and neither does their being there at all."""
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
                fix = "a causal mask: is_causal=True, or tril(ones(T, T)); if it is there: a view without transpose, a "
                fix += "softmax, norm or mean over time, a convolution padded on both sides, a bidirectional layer"
                return failed(f"logits change by {leak:.1e} of their size", expected, diagnosis, fix)
            worst = max(worst, (leak, t))
    cut = max(1, T // 2)
    whole = logits_of(subject.woken, tokens).float()
    change = relative(logits_of(subject.woken, tokens[:, :cut]).float() - whole[:, :cut], whole)
    if not change < 1e-3:  # other shapes, other order of sums
        diagnosis = "a text that ends earlier has other logits at the same places: the model knows its length"
        fix = "count positions from the start; no mean or norm over time"
        return failed(f"cut in two, logits change by {change:.1e} of their size", expected, diagnosis, fix)
    return passed(f"changes after t move no logit up to t (at most {worst[0]:.0e})", expected)


def context(subject: Subject) -> Result:
    """Every earlier token reaches the last logits, a token its own, none is taken for another, and order matters."""
    T = min(subject.run.config.model.block_size, 256)
    if T < 3 or subject.run.vocab_size < 3:
        return skipped("a context of one or two tokens")
    tokens = subject.tensor(subject.windows("train", 1, T)[0])
    return (
        unseen(subject, tokens)
        or misplaced(subject, tokens)
        or passed(f"all {T} tokens are seen, in their order", "the whole window")
    )


def moved(subject: Subject, tokens: Tensor, changed: Tensor) -> float:
    """How far the last logits move with the tokens, as a share of the logits' size."""
    base = logits_of(subject.woken, tokens).float()
    return relative((logits_of(subject.woken, changed).float() - base)[:, -1], base)


def unseen(subject: Subject, tokens: Tensor) -> Result | None:
    """A failure if a token has no influence, or two have the same; a warning if only those far back have none."""
    T, vocabulary, expected = tokens.shape[1], subject.run.vocab_size, "the whole window"
    for at in (T - 1, T - 2, T // 2, 0):
        changed = tokens.clone()
        changed[:, at] = (changed[:, at] + vocabulary // 2) % vocabulary
        if moved(subject, tokens, changed) > 1e-6:
            continue
        diagnosis = f"the token {T - 1 - at} places back has no influence on the prediction"
        if at == T - 1:
            fix = "look for inputs that are cut off"
            return failed("a token does not reach its own logits", expected, diagnosis, fix)
        if at == T - 2:
            fix = "attention that is never applied, or masked away"
            # A model all of which is used sees one token on purpose.
            used = all(g.any() for g in reference_gradients(subject.woken, tokens, tokens).values())
            return (warned if used else failed)("no earlier token is seen", expected, diagnosis, fix)
        fix = "a sliding window on purpose? else a mask that hides too much"
        return warned(f"sees less than {T - at} tokens back", expected, diagnosis, fix)
    ids = subject.tensor(np.linspace(0, vocabulary - 1, min(vocabulary, 512)).astype(np.int64)[:, None])
    apart = len(logits_of(subject.woken, ids).flatten(1)[:, :64].unique(dim=0))  # a few logits will differ, if any do
    if apart < len(ids):
        diagnosis = (
            f"of {len(ids)} tokens, each alone, the model tells only {apart} apart: ids that are cut or wrapped?"
        )
        fix = "give the ids to the embedding as they are"
        return failed(f"{apart} of {len(ids)} tokens differ", "all", diagnosis, fix)
    return None


def misplaced(subject: Subject, tokens: Tensor) -> Result | None:
    """A failure (or a warning) if places in the text do not count, or tokens are taken for them."""
    vocabulary, fix = subject.run.vocab_size, "torch.arange(T) for the positions"
    read = lookups(subject, tokens)
    if len(twice := read_by_token(read, tokens)) > 1:
        diagnosis = f"{listed(twice)} are all looked up by the token: is one of them for positions?"
        return warned("several tables read by the token", "one", diagnosis, fix)
    if fixed := one_row(subject, read, tokens):
        diagnosis = f"{fixed} has a row for each position and is always read at the same: positions do not count"
        return failed(f"{fixed}: one row", "a row a position", diagnosis, fix)
    # Two different tokens at the start, so that there is an order.
    one, other = tokens.clone(), tokens.clone()
    one[:, 0] = (tokens[:, 1] + 1) % vocabulary
    other[:, 0], other[:, 1] = tokens[:, 1], one[:, 0]
    if moved(subject, one, other) < 1e-6:
        diagnosis = "swapping two earlier tokens changes nothing: to the model a text is a bag of words"
        return failed("order does not matter", "it does", diagnosis, "add positions: learned, rotary or other")
    return None


def lookups(subject: Subject, tokens: Tensor) -> dict[str, Tensor]:
    """The ids that each embedding is read at, by its name."""
    return {
        call.name: call.args[0] for call in calls_of(subject.woken, tokens) if isinstance(call.module, nn.Embedding)
    }


def read_by_token(read: dict[str, Tensor], tokens: Tensor) -> list[str]:
    """Names of the embeddings whose row follows from the token, wherever it stands."""
    found = []
    for name, ids in read.items():
        pairs = list(zip(tokens.flatten().tolist(), ids.flatten().tolist(), strict=False))
        first = dict(reversed(pairs))  # the row at each token's first place
        by_token = ids.numel() == tokens.numel() and all(first[token] == row for token, row in pairs)
        if by_token and len(first) < len(pairs) and len(set(first.values())) > 2:
            found.append(name)
    return found


def one_row(subject: Subject, read: dict[str, Tensor], tokens: Tensor) -> str:
    """The name of an embedding with a row a position of which a whole window reads one row only; '' for none."""
    size = subject.run.config.model.block_size
    for name, ids in read.items():
        rows = subject.woken.get_submodule(name).num_embeddings
        if rows >= size and ids.numel() > 1 and bool((ids == ids.flatten()[0]).all()) and not torch.equal(ids, tokens):
            return name
    return ""
