"""The common engine: everything that trains, evaluates or checks a model goes through here.

    run = open_run(config)                       # data, tokenizer, device
    state = new_state(run)                       # weights, optimizers, step 0
    for event in train(run, state):              # evaluates and saves on the way; prints nothing
        ...                                      # StepDone, Evaluated, Saved, then Finished or Stopped

**Step `s` of a run is a pure function of (weights, optimizer state, run config, s).** The batch is keyed by (seed, s),
the dropout by (seed, s, micro-step), the learning rate is computed from s, and evaluation reads fixed windows with
dropout off. So a run that is killed and resumed is the run that was never killed, to the last bit, and how often one
looks changes nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm import checkpoint as ckpt
from tinyllm import custom
from tinyllm import tokenizer as tok
from tinyllm.config import RunConfig, to_dict
from tinyllm.data import IGNORED, BatchSource, open_tokens, prefetch
from tinyllm.errors import CheckpointError, ConfigError, NonFiniteError, RunError, typed
from tinyllm.events import Evaluated, Evaluation, Event, Finished, Note, Saving, StepDone, Stopped
from tinyllm.fast import cross_entropy
from tinyllm.model import GPT, init_weights
from tinyllm.nonfinite import bad_tensor, first_bad
from tinyllm.numbers import amount, divisors
from tinyllm.optim import (
    Optimizers,
    all_groups,
    build_optimizers,
    load_state_by_name,
    set_learning_rate,
    state_by_name,
)
from tinyllm.prepare import Prepared, differences, open_prepared
from tinyllm.runtime import Runtime, compiled, environment, free_memory, resolve, seed_dropout
from tinyllm.saver import Saver
from tinyllm.schedule import factor

# Evaluation sees this many tokens or logits a forward pass at most: large enough to be fast, small enough for memory.
EVAL_TOKENS = 1 << 14
EVAL_LOGITS = 1 << 25

SPIKE_WINDOW = 128  # steps whose losses tell what is usual
SHOWN = 200  # characters of a text in an error
OVERFLOWS = 1e18  # a gradient whose square, summed over some, float32 cannot hold

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Run:
    """What a run reads but never changes."""

    config: RunConfig
    runtime: Runtime
    data: Prepared
    source: BatchSource
    token_bytes: np.ndarray  # (V,) int64: bytes of text each token stands for
    model_source: str = ""  # SHA-256 of the file that a class of one's own is in

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.model.vocab_size or self.data.vocab_size


@dataclass
class TrainState:
    """The only thing that training changes."""

    model: nn.Module  # the raw module: what is saved
    optimizers: Optimizers
    step: int = 0  # optimizer steps done
    best_val_loss: float = math.inf  # of the evaluations so far, this step's included
    best_before: float = math.inf  # of those before this step: what a checkpoint of it holds, whenever it is saved
    recent_losses: list[float] = field(default_factory=list)  # of the last steps, the oldest first
    changes: list[dict[str, Any]] = field(default_factory=list)  # what was changed on the way (see `changes_since`)
    forward: nn.Module | None = None  # what is called: the model, or its compiled form

    def __post_init__(self) -> None:
        self.forward = self.forward or self.model


def open_run(config: RunConfig, *, to_train: bool = False) -> Run:
    """Open the prepared data and the device, and try a class of one's own, so that it fails here or not at all.

    Raises DataError, RunError (memory too small, for the run's steps if it is `to_train`) or ConfigError (a vocabulary
    too small, a class that is no language model).
    """
    data = open_prepared(config.data)
    size = config.model.vocab_size
    if size and size < data.vocab_size:
        what = f"model.vocab_size = {size:,} is too small: the tokenizer has {data.vocab_size:,} tokens"
        raise ConfigError(what, fix=f"set model.vocab_size = 0, or at least {data.vocab_size}")
    tokenizer = tok.from_json(data.tokenizer_json)
    source = open_source(config, data, tok.end_of_text(tokenizer))
    runtime = resolve(config.runtime, 0.0 if config.model.class_ else config.flops)  # loops are for the built-in model
    # `auto` is settled once a run: whoever resumes it computes in the same precision, whatever a new measurement says.
    settled = {"runtime": config.runtime.model_copy(update=runtime.settled)}
    source_hash = custom.find(config.model.class_).sha256 if config.model.class_ else ""
    run = Run(config.model_copy(update=settled), runtime, data, source, tok.token_bytes(tokenizer), source_hash)
    if config.model.class_:
        custom.check_contract(new_model(run), config.model, run.vocab_size)
    else:
        refuse_larger_than_memory(run, to_train)
    return run


def open_source(config: RunConfig, data: Prepared, end_token: int | None) -> BatchSource:
    """The batches of a run. Raises DataError for a split that is too short, ConfigError for documents not marked."""
    if config.train.align_documents and not data.train.documents:
        what = "train.align_documents is set, but the text has no marked documents"
        raise ConfigError(what, where=data.source, fix="leave it false, or set data.separator to what marks them")
    return BatchSource(
        train=open_tokens(Path(data.dir) / "train.bin")[0],
        val=open_tokens(Path(data.dir) / "val.bin")[0],
        block_size=config.model.block_size,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        end_token=end_token if config.train.align_documents else None,
        where=data.dir,
    )


def new_state(run: Run) -> TrainState:
    """Fresh weights and optimizers: a function of the config alone."""
    model = new_model(run)
    return TrainState(model, build_optimizers(model, run.config.optim, run.runtime.dtype))


def new_model(run: Run) -> nn.Module:
    """A fresh model on the run's device: the GPT, or the config's own class."""
    config, seed = run.config.model, run.config.train.seed
    if config.class_:
        model = custom.build(config, run.vocab_size, seed)
    else:
        model = GPT(config, run.vocab_size)
        init_weights(model, seed)
    return model.to(run.runtime.device)


def refuse_larger_than_memory(run: Run, to_train: bool = False) -> None:
    """Raise RunError when the weights, or a step, do not fit into the memory that is free; none of it is taken.

    Of a step only what it takes at the least is known beforehand. To find out the rest by trying has the system end
    this process, or another one.
    """
    with torch.device("meta"):  # shapes without values
        model = GPT(run.config.model, run.vocab_size)
    size, free = sum(p.nbytes for p in model.parameters()), free_memory(run.runtime.device)
    if free is None:
        return
    if size > free:
        what = f"the weights take {amount(size, 'B')}, and {amount(free, 'B')} of memory are free"
        raise RunError(what, fix="a smaller model or vocabulary; a run needs four times its weights")
    config = run.config
    if not to_train or config.runtime.compile:  # the compiler may compute again what it does not hold
        return
    rows, row = config.micro_batch_size, config.model.block_size * model.values_held * run.runtime.dtype.itemsize
    kept = 3 * size  # the weights, their gradients, and at least one average of these
    if kept + rows * row > free:
        what = f"a step takes at least {amount(kept + rows * row, 'B')}, and {amount(free, 'B')} of memory are free"
        likely = int((free - kept) / (2.5 * row))  # sequences: steps of all kinds took 1.3 to 2.5 times the least
        fits = max((n for n in divisors(config.train.batch_size) if n <= likely), default=0)
        fix = f"{fits} (the result stays the same); `tinyllm sanity --only memory` measures what it takes"
        raise RunError(what, where=f"train.micro_batch_size = {rows:,}", fix=fix if fits else "a smaller model")


def restore(run: Run, checkpoint: ckpt.Checkpoint) -> TrainState:
    """The state a checkpoint holds. Raises CheckpointError when it does not belong to this config or data."""
    if run.data.tokenizer_json != checkpoint.tokenizer:
        what = "the data was prepared with another tokenizer than the checkpoint's"
        raise CheckpointError(what, where=run.data.dir, fix="prepare the data as it was, or train anew")
    learned_from = {key: value for key, value in checkpoint.data.items() if key != "documents"}
    if changes := differences(learned_from, run.data.fingerprint):
        what = "the data was prepared from other data than the checkpoint's:\n  " + "\n  ".join(changes)
        raise CheckpointError(what, where=run.data.dir, fix="prepare the data as it was, or train anew")
    ckpt.check_sizes(checkpoint, run.config.model)  # before memory is taken
    state = new_state(run)
    ckpt.load_weights(state.model, checkpoint.model)
    load_state_by_name(state.optimizers, checkpoint.optimizer)
    state.step, state.best_val_loss = checkpoint.step, checkpoint.best_val_loss
    state.best_before = checkpoint.best_val_loss
    state.recent_losses = checkpoint.recent_losses
    state.changes = [*checkpoint.changes, *changes_since(run, checkpoint)]
    return state


def changes_since(run: Run, checkpoint: ckpt.Checkpoint) -> list[dict[str, Any]]:
    """What is not as it was when the checkpoint was made, of the config and of what the last bits depend on."""
    here, there = (flat(config) for config in (to_dict(run.config), checkpoint.config))
    here |= environment(run.runtime, run.config.runtime.compile)
    there |= checkpoint.environment
    keys = [key for key in there if key != "train.out_dir" and here.get(key) != there[key]]
    return [{"step": checkpoint.step, "what": key, "from": there[key], "to": here.get(key)} for key in keys]


def snapshot(run: Run, state: TrainState) -> ckpt.Checkpoint:
    """The state as a checkpoint (its tensors are the live ones)."""
    return ckpt.Checkpoint(
        step=state.step,
        best_val_loss=state.best_before,
        config=to_dict(run.config),
        vocab_size=run.vocab_size,
        model=dict(state.model.state_dict()),
        optimizer=state_by_name(state.optimizers),
        tokenizer=run.data.tokenizer_json,
        data={"documents": run.data.train.documents, **run.data.fingerprint},
        model_source=run.model_source,
        environment=environment(run.runtime, run.config.runtime.compile),
        recent_losses=state.recent_losses,
        changes=state.changes,
    )


def loss_fn(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of logits (B, T, V) against targets (B, T), in float32."""
    return cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction)


def train_step(
    run: Run, state: TrainState, batch: tuple[np.ndarray, np.ndarray] | None = None, should_stop: Stop = lambda: False
) -> StepDone | None:
    """One optimizer step on the batch of state.step: inputs and targets, each (batch_size, T), int64.

    Raises NonFiniteError when the loss or the gradient is not finite, before the weights take it; with
    train.skip_spikes such a step, or one of an unusually high loss, is counted and not taken. Returns None, with
    nothing changed, if asked to stop between micro-batches.
    """
    config = run.config
    rate = factor(state.step, config)
    set_learning_rate(state.optimizers, rate)
    state.model.train()
    loss = torch.zeros((), device=run.runtime.device)
    for micro_step, (x, y, share) in enumerate(micro_batches(run, batch or run.source.batch(state.step))):
        if should_stop():
            zero_grad(state)
            return None
        logits = logits_of(run, state, x, micro_step)
        micro_loss = loss_fn(logits, y) * share
        micro_loss.backward()
        loss += micro_loss.detach()
    norm = clip_gradients(state, config.optim.grad_clip)
    limit = usual_limit(state.recent_losses)
    values = StepDone(state.step + 1, float(loss), float(norm), rate * config.optim.lr, limit)
    # Ten losses that are not finite, one after another, are no accident.
    if values.is_odd and config.train.skip_spikes and any(map(math.isfinite, state.recent_losses[-10:])):
        values = replace(values, skipped=True)
    elif not values.is_finite:
        zero_grad(state)
        what = f"at step {state.step:,} the loss is {values.loss} and the gradient norm {values.grad_norm}"
        fix = "a lower optim.lr, more schedule.warmup_steps, runtime.dtype = float32, or train.skip_spikes = true"
        raise NonFiniteError(f"{what}; the weights have not taken it", fix=fix)
    for optimizer in () if values.skipped else state.optimizers:
        optimizer.step()
    zero_grad(state)
    state.recent_losses = [*state.recent_losses, values.loss][-SPIKE_WINDOW:]
    state.step, state.best_before = state.step + 1, state.best_val_loss
    return values


def micro_batches(run: Run, batch: tuple[np.ndarray, np.ndarray]) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Inputs and targets, each (micro_batch_size, T), on the device, and their share of the batch.

    Each micro-batch weighs as much as it has sequences, so that the sum is the mean over the global batch.
    """
    size = run.config.micro_batch_size
    inputs, targets = (run.runtime.tensor(array) for array in batch)
    for x, y in zip(inputs.split(size), targets.split(size), strict=True):
        yield x, y, len(x) / len(inputs)


def logits_of(run: Run, state: TrainState, x: Tensor, micro_step: int, eager: bool = False) -> Tensor:
    """Logits (B, T, V) in a step of training; what dropout draws depends on seed, step and micro-step alone."""
    seed_dropout(run.config.train.seed, state.step, micro_step)
    with run.runtime.autocast():
        return (state.model if eager else state.forward)(x)


def usual_limit(losses: Sequence[float]) -> float:
    """The loss above which a step is a spike: 6 standard deviations above the mean of the last 128.

    These are the numbers of OLMo-core's SkipStepOptimizer. Infinity while there are too few losses to tell.
    """
    usual = [loss for loss in losses if math.isfinite(loss)]
    if len(usual) < SPIKE_WINDOW // 2:
        return math.inf
    mean = math.fsum(usual) / len(usual)
    # Written out: `statistics.pstdev` reckons in fractions, which takes ten times as long, at every step.
    return mean + 6 * math.sqrt(math.fsum((loss - mean) ** 2 for loss in usual) / len(usual))


def clip_gradients(state: TrainState, limit: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit` (0: leave them); the norm before that."""
    parameters = [p for group in all_groups(state.optimizers) for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, limit or math.inf, foreach=True)


def zero_grad(state: TrainState) -> None:
    for group in all_groups(state.optimizers):
        for p in group["params"]:
            p.grad = None


def eval_rows(run: Run) -> int:
    """Windows that an evaluation reads in one forward pass."""
    size = run.config.model.block_size
    return max(1, min(EVAL_TOKENS // size, EVAL_LOGITS // (size * run.vocab_size)))


@torch.no_grad()
def evaluate(
    run: Run,
    model: nn.Module,
    split: str,
    n_windows: int | None = None,
    should_stop: Stop = lambda: False,
    rows: int = 0,
) -> Evaluation | None:
    """Loss on fixed windows of a split ("train" or "val"); see BatchSource.eval_batches for which.

    `rows` of them a forward pass; 0: as many as are quick. Draws nothing from any random generator and leaves the
    model's mode as it was. None if asked to stop. Raises RunError when the loss is not finite.
    """
    n_windows = run.config.train.eval_windows if n_windows is None else n_windows
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64)
    count = text_bytes = 0
    try:
        for inputs, targets in run.source.eval_batches(split, n_windows, rows or eval_rows(run)):
            if should_stop():
                return None
            with run.runtime.autocast():
                logits = model(run.runtime.tensor(inputs))
            nats += loss_fn(logits, run.runtime.tensor(targets), "sum").cpu().double()
            counted = targets[targets != IGNORED]
            count += counted.size
            text_bytes += int(run.token_bytes[counted].sum())
    finally:
        model.train(was_training)
    if not math.isfinite(nats):
        name = bad_tensor(model.state_dict())
        why = f"the weight {name} is not finite" if name else "the weights are useless"
        fix = "a lower optim.lr or more schedule.warmup_steps, from an earlier checkpoint or anew"
        raise RunError(f"the loss of the {split} split is {float(nats)}: {why}", fix=fix)
    return Evaluation(float(nats) / count, count, float(nats) / math.log(2) / max(text_bytes, 1))


def evaluate_both(run: Run, state: TrainState, should_stop: Stop) -> Evaluated | None:
    """Both splits after state.step steps, and whether validation is the best so far (which it records)."""
    train_part = evaluate(run, state.model, "train", should_stop=should_stop)
    val = train_part and evaluate(run, state.model, "val", should_stop=should_stop)
    if not (train_part and val):
        return None
    is_best = state.step > 0 and val.loss < state.best_val_loss
    if is_best:
        state.best_val_loss = val.loss
    return Evaluated(state.step, train_part, val, is_best)


def train(run: Run, state: TrainState, should_stop: Stop = lambda: False) -> Iterator[Event]:
    """Take the state to the end of the schedule, yielding events. Saves into train.out_dir as it goes.

    A checkpoint of step s is taken *before* the evaluation at s: whoever resumes it evaluates at s again, with the same
    result, so nothing depends on when the run was interrupted. When `should_stop()` turns true the state is saved and
    the generator ends with Stopped. A save that fails is told as an event; if it is the last, CheckpointError is
    raised in the end. Raises NonFiniteError, with what went wrong first, when a step cannot be taken.
    """
    config, out_dir = run.config.train, Path(run.config.train.out_dir)
    if run.config.runtime.compile:
        sample = run.runtime.tensor(run.source.batch(0)[0][: run.config.micro_batch_size])
        state.forward, note = compiled(state.model, sample, run.runtime)
        yield Note(note)
    ahead, final = run.config.runtime.prefetch, None
    batches = closing(prefetch(run.source.batch, state.step, config.max_steps, ahead, should_stop))
    with Saver(out_dir, config.keep) as saver, batches as batch_of_step:
        while final is None:
            yield from saver.events()
            done = state.step >= config.max_steps
            looks = done or state.step % config.eval_interval == 0
            is_due = state.step % config.save_interval == 0 or saver.minutes >= config.save_minutes
            if state.step and (looks or is_due):
                yield from save(run, state, saver)
            if looks:
                evaluated = evaluate_both(run, state, should_stop)
                if evaluated is None:
                    break
                yield evaluated
                if evaluated.is_best:
                    saver.keep_best(snapshot(run, state))
                if done:
                    final = evaluated
                    continue
            batch = next(batch_of_step, None)
            try:
                values = batch and train_step(run, state, batch, should_stop)
            except NonFiniteError as error:
                yield from rescue(run, state, saver)
                raise explained(error, run, state, batch, saver.step) from None
            if values is None:
                break
            if values.is_odd or state.step % config.log_interval == 0 or state.step == config.max_steps:
                yield values
        yield from save_last(run, state, saver, final)
    yield Finished(state.step, final.val, state.best_val_loss) if final else Stopped(state.step)


def save(run: Run, state: TrainState, saver: Saver) -> Iterator[Event]:
    """Have the state saved, unless it is."""
    if saver.step != state.step:
        yield Saving(state.step)
        saver.save(snapshot(run, state))


def save_last(run: Run, state: TrainState, saver: Saver, final: Evaluated | None) -> Iterator[Event]:
    """Wait until the state is on the disk, as the best too if it is; try twice. Raises CheckpointError if it cannot."""
    for _ in range(2):
        yield from save(run, state, saver)
        if final and final.is_best and saver.best_step != state.step:
            saver.keep_best(snapshot(run, state))
        yield from saver.finish()
    if saver.step != state.step:
        fix = f"mend that, then `tinyllm resume {typed(saver.folder)}` goes on from what was saved before"
        raise CheckpointError(f"the last step is not saved: {saver.failure}", where=f"{saver.folder}/", fix=fix)


def rescue(run: Run, state: TrainState, saver: Saver) -> Iterator[Event]:
    """Save the state before a step that could not be taken, unless it is no good itself."""
    if state.step and not bad_tensor(state.model.state_dict() | flat(state_by_name(state.optimizers))):
        yield from save(run, state, saver)
    yield from saver.finish()


def flat(nested: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    return {f"{section}.{key}": value for section, values in nested.items() for key, value in values.items()}


def explained(
    error: NonFiniteError, run: Run, state: TrainState, batch: tuple[np.ndarray, np.ndarray], saved: int | None
) -> NonFiniteError:
    """The error of a step with what went wrong first: which tensor, in which micro-batch, on which text."""
    origin, text = origin_of(run, state, batch)
    lines = [error.what, f"first: {origin}"]
    if text:
        lines.append(f"text: {text!r}")
    if saved is not None:
        lines.append(f"saved: step {saved:,}" + (", just before it" if saved == state.step else ""))
    return NonFiniteError("\n  ".join(lines), where=run.config.train.out_dir + "/", fix=error.fix)


def origin_of(run: Run, state: TrainState, batch: tuple[np.ndarray, np.ndarray]) -> tuple[str, str]:
    """The first thing that is not finite in a step, in words, and the text of the sequence in which it is.

    The step is made once more, watched, without the optimizers; its dropout is the same again.
    """
    if name := bad_tensor(state.model.state_dict()):
        return f"the weight {name}, before the step", ""
    if name := bad_tensor(flat(state_by_name(state.optimizers))):
        return f"the optimizer's {name}, before the step", ""
    n = run.config.accumulation_steps
    for micro_step, (x, y, share) in enumerate(micro_batches(run, batch)):
        with first_bad(state.model) as found:
            logits = logits_of(run, state, x, micro_step, eager=True)
            loss = loss_fn(logits, y) * share
            if not math.isfinite(loss.detach()):
                found.append("the loss")
            loss.backward()
        if found:
            zero_grad(state)
            rows = loss_fn(logits.detach(), y, "none").view(y.shape).sum(1)
            row = x[int((~rows.isfinite()).to(torch.int64).argmax())]
            return f"{found[0]}, in micro-batch {micro_step + 1} of {n}", text_of(run, row)
    sizes = {name: float(p.grad.abs().max()) for name, p in state.model.named_parameters() if p.grad is not None}
    zero_grad(state)
    name = max(sizes, key=sizes.__getitem__)
    if sizes[name] > OVERFLOWS:
        return f"the norm of all gradients; that of {name} is up to {sizes[name]:.1e}", ""
    return "nothing, when the step was made once more: has the machine made a mistake?", ""


def text_of(run: Run, tokens: Tensor) -> str:
    """The text of a sequence (T,), its beginning if it is long."""
    text = tok.decode(tok.from_json(run.data.tokenizer_json), tokens.tolist())
    return text if len(text) <= SHOWN else text[:SHOWN] + " ..."
