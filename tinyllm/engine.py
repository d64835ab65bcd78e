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
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm import checkpoint as ckpt
from tinyllm import custom
from tinyllm import tokenizer as tok
from tinyllm.config import RunConfig, to_dict
from tinyllm.data import IGNORED, BatchSource, open_tokens, prefetch
from tinyllm.errors import CheckpointError, ConfigError, RunError
from tinyllm.events import Evaluated, Evaluation, Event, Finished, Note, Saved, StepDone, Stopped
from tinyllm.model import GPT, init_weights
from tinyllm.optim import Optimizers, all_groups, build_optimizers, load_state_by_name, set_learning_rate, state_by_name
from tinyllm.prepare import Prepared, differences, open_prepared
from tinyllm.runtime import Runtime, compiled, resolve, seed_dropout
from tinyllm.schedule import factor

# Evaluation sees this many tokens or logits a forward pass at most: large enough to be fast, small enough for memory.
EVAL_TOKENS = 1 << 14
EVAL_LOGITS = 1 << 25

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
    best_val_loss: float = math.inf
    forward: nn.Module | None = None  # what is called: the model, or its compiled form

    def __post_init__(self) -> None:
        self.forward = self.forward or self.model


def open_run(config: RunConfig) -> Run:
    """Open the prepared data and the device, and try a class of one's own, so that it fails here or not at all.

    Raises DataError, RunError or ConfigError (a vocabulary too small, a class that is no language model).
    """
    data = open_prepared(config.data)
    size = config.model.vocab_size
    if size and size < data.vocab_size:
        what = f"model.vocab_size = {size:,} is too small: the tokenizer has {data.vocab_size:,} tokens"
        raise ConfigError(what, fix=f"set model.vocab_size = 0, or at least {data.vocab_size}")
    tokenizer = tok.from_json(data.tokenizer_json)
    source = open_source(config, data, tok.end_of_text(tokenizer))
    runtime = resolve(config.runtime)
    # `auto` is settled once a run: whoever resumes it computes in the same precision, whatever a new measurement says.
    settled = {"runtime": config.runtime.model_copy(update={"dtype": runtime.dtype_name})}
    source_hash = custom.find(config.model.class_).sha256 if config.model.class_ else ""
    run = Run(config.model_copy(update=settled), runtime, data, source, tok.token_bytes(tokenizer), source_hash)
    if config.model.class_:
        custom.check_contract(new_model(run), config.model, run.vocab_size)
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
    return TrainState(model, build_optimizers(model, run.config.optim))


def new_model(run: Run) -> nn.Module:
    """A fresh model on the run's device: the GPT, or the config's own class."""
    config, seed = run.config.model, run.config.train.seed
    if config.class_:
        model = custom.build(config, run.vocab_size, seed)
    else:
        model = GPT(config, run.vocab_size)
        init_weights(model, seed)
    return model.to(run.runtime.device)


def restore(run: Run, checkpoint: ckpt.Checkpoint) -> TrainState:
    """The state a checkpoint holds. Raises CheckpointError when it does not belong to this config or data."""
    if run.data.tokenizer_json != checkpoint.tokenizer:
        what = "the data was prepared with another tokenizer than the checkpoint's"
        raise CheckpointError(what, where=run.data.dir, fix="prepare the data as it was, or train anew")
    learned_from = {key: value for key, value in checkpoint.data.items() if key != "documents"}
    if changes := differences(learned_from, run.data.fingerprint):
        what = "the data was prepared from other data than the checkpoint's:\n  " + "\n  ".join(changes)
        raise CheckpointError(what, where=run.data.dir, fix="prepare the data as it was, or train anew")
    state = new_state(run)
    ckpt.load_weights(state.model, checkpoint.model)
    load_state_by_name(state.optimizers, checkpoint.optimizer)
    state.step, state.best_val_loss = checkpoint.step, checkpoint.best_val_loss
    return state


def snapshot(run: Run, state: TrainState, val_loss: float | None = None) -> ckpt.Checkpoint:
    """The state as a checkpoint (its tensors are the live ones)."""
    return ckpt.Checkpoint(
        step=state.step,
        best_val_loss=state.best_val_loss,
        config=to_dict(run.config),
        vocab_size=run.vocab_size,
        model=state.model.state_dict(),
        optimizer=state_by_name(state.optimizers),
        tokenizer=run.data.tokenizer_json,
        data={"documents": run.data.train.documents, **run.data.fingerprint},
        val_loss=val_loss,
        model_source=run.model_source,
    )


def loss_fn(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of logits (B, T, V) against targets (B, T), in float32."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction=reduction)


def train_step(
    run: Run, state: TrainState, batch: tuple[np.ndarray, np.ndarray] | None = None, should_stop: Stop = lambda: False
) -> StepDone | None:
    """One optimizer step on the batch of state.step: inputs and targets, each (batch_size, T), int64.

    Raises RunError when the loss or the gradient is not finite, before the weights take it. Returns None, with
    nothing changed, if asked to stop between micro-batches.
    """
    config, runtime = run.config, run.runtime
    inputs, targets = (runtime.tensor(array) for array in batch or run.source.batch(state.step))
    rate = factor(state.step, config)
    set_learning_rate(state.optimizers, rate)
    state.model.train()
    loss = torch.zeros((), device=runtime.device)
    micro_batches = zip(inputs.split(config.micro_batch_size), targets.split(config.micro_batch_size), strict=True)
    for micro_step, (x, y) in enumerate(micro_batches):
        if should_stop():
            zero_grad(state)
            return None
        seed_dropout(config.train.seed, state.step, micro_step)
        with runtime.autocast():
            logits = state.forward(x)
        # Each micro-batch weighs as much as it has sequences, so that the sum is the mean over the global batch.
        micro_loss = loss_fn(logits, y) * (len(x) / len(inputs))
        micro_loss.backward()
        loss += micro_loss.detach()
    norm = clip_gradients(state, config.optim.grad_clip)
    values = StepDone(state.step + 1, float(loss), float(norm), rate * config.optim.lr)
    if not (math.isfinite(values.loss) and math.isfinite(values.grad_norm)):
        zero_grad(state)
        raise RunError(
            f"at step {state.step} the loss is {values.loss} and the gradient norm {values.grad_norm}; "
            "the weights have not taken it",
            fix="a lower optim.lr, more schedule.warmup_steps, or runtime.dtype = float32",
        )
    for optimizer in state.optimizers:
        optimizer.step()
    zero_grad(state)
    state.step += 1
    return values


def clip_gradients(state: TrainState, limit: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit` (0: leave them); the norm before that."""
    parameters = [p for group in all_groups(state.optimizers) for p in group["params"]]
    return nn.utils.clip_grad_norm_(parameters, limit or math.inf, foreach=True)


def zero_grad(state: TrainState) -> None:
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)


def eval_rows(run: Run) -> int:
    """Windows that an evaluation reads in one forward pass."""
    size = run.config.model.block_size
    return max(1, min(EVAL_TOKENS // size, EVAL_LOGITS // (size * run.vocab_size)))


@torch.no_grad()
def evaluate(
    run: Run, model: nn.Module, split: str, n_windows: int | None = None, should_stop: Stop = lambda: False
) -> Evaluation | None:
    """Loss on fixed windows of a split ("train" or "val"); see BatchSource.eval_batches for which.

    Draws nothing from any random generator and leaves the model's mode as it was. None if asked to stop. Raises
    RunError when the loss is not finite.
    """
    n_windows = run.config.train.eval_windows if n_windows is None else n_windows
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64)
    count = text_bytes = 0
    try:
        for inputs, targets in run.source.eval_batches(split, n_windows, eval_rows(run)):
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
        what = f"the loss of the {split} split is {float(nats)}: the weights are useless"
        raise RunError(what, fix="a lower optim.lr or more schedule.warmup_steps, from an earlier checkpoint or anew")
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
    the generator ends with Stopped.
    """
    config, out_dir = run.config.train, Path(run.config.train.out_dir)
    latest = out_dir / ckpt.LATEST
    saved = state.step if latest.exists() else None  # the step that `latest` holds, as far as this call knows
    if run.config.runtime.compile:
        sample = run.runtime.tensor(run.source.batch(0)[0][: run.config.micro_batch_size])
        state.forward, note = compiled(state.model, sample, run.runtime)
        yield Note(note)
    with closing(prefetch(run.source.batch, state.step, config.max_steps, run.config.runtime.prefetch)) as batches:
        while True:
            done = state.step >= config.max_steps
            if saved != state.step and (done or (state.step and state.step % config.save_interval == 0)):
                ckpt.save(latest, snapshot(run, state))
                saved = state.step
                yield Saved(state.step, latest)
            evaluated = None
            if done or state.step % config.eval_interval == 0:
                evaluated = evaluate_both(run, state, should_stop)
                if evaluated is None:
                    break
                yield evaluated
                if evaluated.is_best:
                    ckpt.save(out_dir / ckpt.BEST, snapshot(run, state, evaluated.val.loss))
                    yield Saved(state.step, out_dir / ckpt.BEST)
            if done:
                assert evaluated is not None
                yield Finished(state.step, evaluated.val, state.best_val_loss)
                return
            values = train_step(run, state, next(batches), should_stop)
            if values is None:
                break
            if state.step % config.log_interval == 0 or state.step == config.max_steps:
                yield values
    if saved != state.step:
        ckpt.save(latest, snapshot(run, state))
        yield Saved(state.step, latest)
    yield Stopped(state.step)
