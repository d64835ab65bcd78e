"""Pre-flight checks: will this model, with this config, on this data, learn as it should?

    run = open_run(config)
    for result in sanity(run, select(quick=True)):
        print(result.name, result.verdict, result.measured)

A check measures one property of the real thing (`new_state`, `train_step`, `evaluate`, `save`, `load`) and compares it
with a reference that shares no code with it: a check that had a loop of its own would check itself, and one that asked
the code what to expect would believe it. They come in the order in which a mistake is best understood: data, config,
model, step, loop, then short trainings, then what the run will cost. Nothing is written but into a temporary folder,
and all random generators are left as they were, so a run that follows is the run that would have been.

    result.py    what a check is, and what it says
    subject.py   the run under test
    instruments.py   what the checks measure with: watched steps, recorded calls, woken weights, references
    data.py, config.py, model.py, sight.py, parts.py, loss.py, step.py, optimizer.py, compiled.py, evaluation.py,
    loop.py, trainings.py, cost.py      the checks, a file a group
    reference.py, measure.py    the built-in GPT once more; a process that does what a run will do
    report.py, page.py          what was found, as JSON and as a page to keep
"""

import difflib
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from tinyllm.engine import Run
from tinyllm.errors import ConfigError, TinyLLMError, is_out_of_memory
from tinyllm.sanity import (
    compiled,
    config,
    cost,
    data,
    evaluation,
    loop,
    loss,
    model,
    optimizer,
    parts,
    sight,
    step,
    trainings,
)
from tinyllm.sanity.result import Check, Result, Verdict, failed, raised, skipped
from tinyllm.sanity.subject import Subject

__all__ = ["CHECKS", "Check", "Result", "Verdict", "sanity", "select"]

CHECKS: tuple[Check, ...] = (
    Check("token ids", "ids beyond the vocabulary, wrapped ids, another byte order", data.token_ids),
    Check("vocabulary", "a vocabulary that the text does not use", data.vocabulary),
    Check("tokenizer", "another tokenizer than the one that wrote the files, lost characters", data.tokenizer),
    Check("split sizes", "too little text to learn from or to measure by", data.split_sizes),
    Check("overlap", "validation text inside the training text", data.overlap),
    Check("repetition", "a training text that repeats itself", data.repetition),
    Check("splits alike", "sorted text: validation is of another kind", data.splits_alike),
    Check("as prepared", "token files that were damaged or replaced", data.as_prepared),
    Check("batches", "targets not shifted, shifted twice, no shuffling, repeated or foreign windows", data.batches),
    Check(
        "learning rate",
        "a group left behind, a rate of zero, a peak or a minimum never reached",
        config.learning_rate,
    ),
    Check("warmup", "no warmup, or a run that is all warmup", config.warmup),
    Check("peak rate", "a zero too many or too few in optim.lr", config.peak_rate),
    Check("settings", "values that are allowed and hardly ever meant", config.settings),
    Check("parameters", "frozen, copied or missing tensors, a head untied by accident", model.parameters),
    Check("layers", "a block applied twice or never, the same block n times", model.layers),
    Check("initial weights", "weights that start too large, no residual scaling", model.initial_weights),
    Check("output", "a wrong shape, NaN, probabilities instead of logits", model.output),
    Check("initial loss", "logits too sure of themselves, targets that can be read off", model.initial_loss),
    Check("dropout", "dropout in evaluation, or none in training", sight.dropout),
    Check("batch rows", "sequences of a batch that see each other", sight.batch_rows),
    Check("causal mask", "attention that sees the future", sight.causal_mask),
    Check("context", "attention that sees too little, positions ignored", sight.context),
    Check("formula", "anything in the built-in model that its papers do not say", parts.formula),
    Check("building blocks", "norms that do not normalise, layers in a row that could be one", parts.building_blocks),
    Check("residual stream", "a residual connection left out", parts.residual_stream),
    Check("attention scale", "scores not divided by sqrt(head size)", parts.attention_scale),
    Check("loss", "a sum for a mean, a softmax too many, 16 bits in the loss", loss.loss),
    Check("gradient reach", "detached, frozen or unused parts", loss.gradient_reach),
    Check("one step", "an optimizer that never steps, or steps twice", step.one_step),
    Check("gradient", "a scaled loss, gradients cleared too early, two steps in one", step.gradient),
    Check("accumulation", "micro-batches that do not add up", step.accumulation),
    Check("zero_grad", "gradients that leak into the next step", step.zero_grad),
    Check("clipping", "clipping that is off, late, or by parts", step.clipping),
    Check("decay groups", "decay on norms, a parameter that no optimizer has, or two have", optimizer.decay_groups),
    Check("schedule in use", "a rate that is a step late, or of one group only", optimizer.schedule_in_use),
    Check("optimizer", "betas, eps, decay or rate that never reach the optimizer", optimizer.optimizer),
    Check("overflow", "nan that gets into the weights", optimizer.overflow),
    Check("weights move", "tensors that stand still from the real start", optimizer.weights_move),
    Check("compile", "a compiler that computes something else", compiled.compile_agrees, quick=False),
    Check("training loops", "compiled loops that compute something else", compiled.training_loops),
    Check("training mode", "dropout off in training, or the same at each step", evaluation.training_mode),
    Check("evaluation", "evaluation on other text, with dropout, or that changes the run", evaluation.evaluation),
    Check("precision", "16 bits where they do harm", evaluation.precision),
    Check("repeatable", "state outside the checkpoint: a run that cannot be repeated", loop.repeatable),
    Check("checkpoint", "what a checkpoint forgets", loop.checkpoint, quick=False),
    Check("train loop", "a loop that skips, repeats, or keeps the wrong weights", loop.train_loop, quick=False),
    Check("memory growth", "a step that leaves tensors behind", loop.memory_growth),
    Check("generation", "a cache that remembers wrongly", loop.generation),
    Check("fast sampling", "compiled loops that say something else", loop.fast_sampling, quick=False),
    Check("overfit one batch", "a model that cannot learn at all", trainings.overfit, quick=False),
    Check(
        "short run",
        "a rate that diverges or stands still, a leak, inputs that do not matter",
        trainings.short_run,
        quick=False,
    ),
    Check("size", "a model that is not the one meant", cost.size),
    Check("token budget", "too few tokens for the model, too many epochs over the text", cost.token_budget),
    Check("disk", "a save that fails in the middle of the run", cost.disk),
    Check("memory", "a batch that does not fit", cost.memory, quick=False),
    Check("time", "a run that nobody can wait for", cost.time, quick=False),
)


def select(only: Sequence[str] = (), skip: Sequence[str] = (), quick: bool = False) -> tuple[Check, ...]:
    """The checks of these names (all, for none), but for those to skip. Raises ConfigError for an unknown name."""
    known = {check.name for check in CHECKS}
    for name in (*only, *skip):
        if name not in known:
            near = [f"did you mean {n!r}? " for n in difflib.get_close_matches(name, known, 1)]
            listing = ", ".join(check.name for check in CHECKS)
            raise ConfigError(f"no check is called {name!r}", fix="".join(near) + f"the checks are: {listing}")
    chosen = [c for c in CHECKS if c.name in only] if only else [c for c in CHECKS if c.quick or not quick]
    return tuple(check for check in chosen if check.name not in skip)


def sanity(run: Run, checks: Iterable[Check] = CHECKS) -> Iterator[Result]:
    """Perform the checks in turn."""
    subject, stopped = Subject(run), {}
    for check in checks:
        started = time.perf_counter()
        with undisturbed():
            result = perform(check, subject, stopped)
        # outside, so that whoever reads the results draws from their own state
        yield replace(result, name=check.name, seconds=time.perf_counter() - started)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give every global random generator its state back: a model of the user's own may draw from any of them."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def perform(check: Check, subject: Subject, stopped: dict[tuple[str, str], str]) -> Result:
    """The check's result. That an error stopped it is a failure too, of the first check that this error `stopped`."""
    try:
        return check.function(subject)
    except TinyLLMError as error:
        what, where, fix = re.sub(r"step \d+", "a step", error.what), "this stopped the check", error.fix
    except Exception as error:  # a model of the user's own can raise anything
        if is_out_of_memory(error):  # the next check would not have more of it
            raise
        what, place = raised(error)
        where, fix = f"raised at {place}", "mend that line, then check again"
    first = stopped.setdefault((what, where), check.name)
    if first != check.name:  # one mistake can stop many checks; it is told once
        return skipped(f"stopped by what stopped `{first}`")
    return failed(what, "no error", where, fix)
