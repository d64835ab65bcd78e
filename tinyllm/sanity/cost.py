"""What the run will cost: size, tokens, disk, memory, time. Numbers first, verdicts where one is due.

`size`, `token budget` and `disk` are arithmetic. `memory` and `time` are measured in a child process that does what the
run will do (see measure.py), once for both.
"""

import io
import math
import shutil
import time as clock
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm import checkpoint as ckpt
from tinyllm.archive import SEAL_SIZE
from tinyllm.config import RunConfig, to_toml
from tinyllm.engine import SPIKE_WINDOW, Run, TrainState, snapshot
from tinyllm.errors import RunError
from tinyllm.model import GPT
from tinyllm.numbers import amount, divisors, lasting, size_of
from tinyllm.optim import parameter_groups
from tinyllm.sanity.instruments import dropouts
from tinyllm.sanity.measure import Cost
from tinyllm.sanity.result import Result, failed, passed, skipped, warned
from tinyllm.sanity.subject import Subject

TOKENS_A_PARAMETER = 20  # Hoffmann et al. 2022: what makes the best model of a given number of FLOPs
MOST_EPOCHS = 4  # Muennighoff et al. 2023: up to here, repeated text is worth almost as much as new
STEP_ROW, EVAL_ROW = 140, 225  # bytes of a line of metrics.jsonl, about
FULL = 0.9  # share of the memory above which there is little air
HOUR, WEEK = 3600.0, 7 * 24 * 3600.0


# ---- Size ----


def size(subject: Subject) -> Result:
    """Parameters, how they split and how they are updated, and the FLOPs of a token."""
    model, config = subject.fresh, subject.run.config
    total, parts = subject.weights, split(model)
    groups = {group.name: group.count for group in parameter_groups(model, config.optim)}
    flops = flops_a_token(model, config)
    shares = ", ".join(f"{name} {number:,}" for name, number in parts.items() if number)
    measured = f"{total:,} parameters ({shares}); {amount(flops, 'FLOP')} a token"
    values: dict[str, Any] = {"parameters": total, "parameters_of": parts, "parameters_in_group": groups}
    values |= {"flops_a_token": flops, "flops_a_step": flops * config.tokens_per_step}
    return passed(measured, values=values)


def count(model: nn.Module) -> int:
    """Parameters, each once."""
    return sum(p.numel() for p in model.parameters())


def split(model: nn.Module) -> dict[str, int]:
    """Parameters in embedding tables, in a head of its own, and in the rest."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parts = {"embedding": 0, "head": 0, "blocks": 0}
    for name, p in model.named_parameters():
        part = "embedding" if id(p) in tables else "head" if name.startswith("head.") else "blocks"
        parts[part] += p.numel()
    return parts


def flops_a_token(model: nn.Module, config: RunConfig) -> int:
    """FLOPs to learn from one token, forward and backward: 6 N + 12 L T C (Chowdhery et al. 2022, PaLM, appendix B).

    N are the weights that multiply: all but the tables that are only looked up (all embeddings, but that of the tokens
    if it is the head too). 12 L T C is attention to a whole window; that half of it is masked is not taken off. Of a
    model that is not ours nothing is known but its parameters: 6 N, with all of them.
    """
    if not isinstance(model, GPT):
        return 6 * count(model)
    looked_up = split(model)["embedding"] - (model.wte.weight.numel() if model.head is None else 0)
    shape = config.model
    return 6 * (count(model) - looked_up) + 12 * shape.n_layer * shape.block_size * shape.n_embd


# ---- Tokens ----


def token_budget(subject: Subject) -> Result:
    """Tokens the run will see, against the size of the model and of the data."""
    run = subject.run
    seen = run.config.train.max_steps * run.config.tokens_per_step
    a_parameter = seen / subject.size
    epochs = run.config.train.max_steps * run.config.train.batch_size / windows_an_epoch(run)
    measured = f"{amount(seen)} tokens: {a_parameter:.2g} a parameter, {epochs:.2g} epochs"
    expected = f"about {TOKENS_A_PARAMETER} a parameter is best for the FLOPs spent"
    values = {"tokens": seen, "tokens_a_parameter": a_parameter, "epochs": epochs}
    if epochs > MOST_EPOCHS and not has_dropout(run, subject.fresh):
        expected = f"at most {MOST_EPOCHS} epochs without dropout"
        diagnosis = "text that is read again teaches less each time, and then it is learned by heart"
        fewer = max(1, int(run.config.train.max_steps * MOST_EPOCHS / epochs))
        fix = f"more text, model.dropout = 0.1, or train.max_steps = {fewer}; best.pt keeps the best evaluation anyhow"
        return warned(measured, expected, diagnosis, fix, values=values)
    return passed(measured, expected, values=values)


def windows_an_epoch(run: Run) -> int:
    """Windows that `BatchSource.batch` reads before one comes again."""
    source = run.source
    if source.starts is not None:
        return len(source.starts)
    return max((len(source.splits["train"]) - 1) // source.block_size - 1, 1)


def has_dropout(run: Run, model: nn.Module) -> bool:
    return bool(dropouts(model)) or max(run.config.model.dropout, run.config.model.attn_dropout) > 0


# ---- Disk ----


def disk(subject: Subject, free_bytes: int | None = None) -> Result:
    """What the run's folder will hold, and while a checkpoint is saved, against what is free (or `free_bytes`)."""
    run, out_dir = subject.run, Path(subject.run.config.train.out_dir)
    one = checkpoint_bytes(run, subject.fresh)
    rest = metrics_bytes(run.config) + len(to_toml(run.config).encode())
    kept = one * len(kept_steps(run.config)) + rest
    # While a checkpoint is written aside, all that are kept can be of different steps.
    peak = one * (2 * run.config.train.keep + 1) + rest
    free = shutil.disk_usage(existing(out_dir)).free if free_bytes is None else free_bytes
    # What the folder holds of a run goes before a new one begins, and is written over when it goes on.
    free += ckpt.bytes_held(out_dir)
    values = {"checkpoint_bytes": one, "bytes_on_disk": kept, "peak_bytes_on_disk": peak, "free_bytes": free}
    measured = f"{size_of(kept)} in the end, a checkpoint is {size_of(one)}; up to {size_of(peak)} on the way"
    expected = f"up to {size_of(free)}, which is free"
    if peak > free:
        diagnosis = (
            f"a save would fail: train.keep = {run.config.train.keep} of the latest and of the best, and one aside"
        )
        fix = f"free {size_of(peak - free)} more, a smaller train.keep, or another disk: --set train.out_dir=..."
        return failed(measured, expected, diagnosis, fix, values=values)
    return passed(measured, expected, values=values)


def kept_steps(config: RunConfig) -> list[tuple[str, int]]:
    """The checkpoints that are on the disk in the end, if each evaluation is the best; one that is both, once."""
    train = config.train

    def last(interval: int) -> list[int]:
        late = range(train.max_steps // interval * interval, 0, -interval)
        return [*dict.fromkeys([train.max_steps, *late[: train.keep]])]

    best = last(train.eval_interval)[: train.keep]
    latest = sorted({*last(train.save_interval), *best}, reverse=True)[: train.keep]
    shared = train.keep > 1  # the latest and the best are then names of one file
    return [("latest", step) for step in latest] + [("best", step) for step in best if not (shared and step in latest)]


def checkpoint_bytes(run: Run, model: nn.Module) -> int:
    """Size of a checkpoint of this run once the optimizers have their state, to a few bytes.

    A checkpoint in which every tensor has its shape but a single value tells the size of all the rest; tensors that
    share their memory are written once. Nothing large is copied.
    """
    data: dict[int, int] = {}  # bytes by address

    def hollow(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: hollow(part) for key, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        data[storage.data_ptr() or id(value)] = storage.nbytes()
        return torch.zeros((), dtype=value.dtype).expand(value.shape)

    losses = [0.0] * min(SPIKE_WINDOW, run.config.train.max_steps)
    checkpoint = snapshot(run, TrainState(model, [], recent_losses=losses))
    weights = hollow(checkpoint.model)
    state, state_bytes = optimizer_state(run, model)
    file = io.BytesIO()
    torch.save(ckpt.as_record(replace(checkpoint, model=weights, optimizer=state)), file)
    return file.tell() + SEAL_SIZE + sum(data.values()) + state_bytes


def optimizer_state(run: Run, model: nn.Module) -> tuple[dict[str, dict[str, Tensor]], int]:
    """The optimizers' state by parameter name, as `state_by_name` gives it, without its values; and their bytes."""
    state, size = {}, 0
    for group in parameter_groups(model, run.config.optim):
        names = ("momentum_buffer",) if group.name == "muon" else ("exp_avg", "exp_avg_sq")
        for name, p in zip(group.names, group.parameters, strict=True):
            shell = {key: torch.zeros((), dtype=p.dtype).expand(p.shape) for key in names}
            state[name] = shell if group.name == "muon" else {"step": torch.zeros(()), **shell}
            size += len(names) * p.numel() * p.element_size()
    return state, size


def metrics_bytes(config: RunConfig) -> int:
    """Size of metrics.jsonl in the end, about."""
    train = config.train
    return STEP_ROW * -(-train.max_steps // train.log_interval) + EVAL_ROW * evaluations(config)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


# ---- Memory ----


def memory(subject: Subject) -> Result:
    """Peak memory of the run's process, against all that it could have."""
    return judged_memory(subject.cost, subject.run.config.train.batch_size)


def judged_memory(cost: Cost, batch_size: int) -> Result:
    """The verdict on what was measured."""
    if isinstance(cost.error, RunError):  # a loss of nan, say, which others find and explain
        return skipped(f"the run stops before it can be measured: {cost.error.what}")
    if cost.error:
        raise cost.error
    if cost.ended:
        return ended(cost, batch_size)
    peak, room = cost.peak(cost.micro_batch_size), cost.room_bytes
    if peak is None or room is None:
        return skipped("this system does not tell how much memory a process uses, or may use")
    sure = cost.trying == cost.micro_batch_size
    measured = f"{size_of(peak)}{'' if sure else ', extrapolated'}, with micro-batches of {cost.micro_batch_size}"
    expected = f"below {FULL:.0%} of {size_of(room)}"
    values = {"peak_bytes": peak, "room_bytes": room, "measured": sure, "micro_batch_size": cost.micro_batch_size}
    if peak <= FULL * room:
        return passed(measured, expected, values=values)
    fitting = largest_that_fits(cost, batch_size)
    if fitting:
        values["micro_batch_size_that_fits"] = fitting
        fix = f"train.micro_batch_size = {fitting} fits; the result stays the same"
    else:
        fix = "a smaller model.n_embd, model.n_layer or model.block_size: not even micro-batches of 1 fit"
    if peak > room:
        return failed(measured, expected, "the run would be ended for want of memory", fix, values=values)
    diagnosis = "it fits, but anything else that needs memory meanwhile could end the run"
    return warned(measured, expected, diagnosis, fix, values=values)


def ended(cost: Cost, batch_size: int) -> Result:
    """The verdict on a measurement that came to no good end."""
    values = {"micro_batch_size": cost.micro_batch_size, "ended_at_micro_batch_size": cost.trying}
    where = f"with micro-batches of {cost.trying}" if cost.trying else "before the first step"
    measured = f"{cost.ended}, {where}"
    if cost.ended not in ("out of memory", "ended by SIGKILL"):
        diagnosis = "the process that did as the run would did not survive it"
        return failed(measured, "a run that is not ended", diagnosis, "see what the message says", values=values)
    smaller = [s for s in divisors(batch_size) if s < cost.trying]
    fix = f"train.micro_batch_size = {smaller[-1]}, or less" if smaller else "a smaller model"
    if cost.ended != "out of memory":
        diagnosis = "the system ends processes like that when memory is short"
        return failed(measured, "a run that is not ended", diagnosis, fix, values=values)
    return failed(measured, "enough memory", "the run would end like that", fix, values=values)


def largest_that_fits(cost: Cost, batch_size: int) -> int:
    """The largest micro-batch that divides the batch and leaves some air; 0 if none does."""
    assert cost.room_bytes is not None
    fitting = [s for s in divisors(batch_size) if (cost.peak(s) or 0) <= FULL * cost.room_bytes]
    return max((s for s in fitting if s < cost.micro_batch_size), default=0)


# ---- Time ----


def time(subject: Subject) -> Result:
    """How long the run will take, from the command to its end, and how well it uses the machine."""
    flops = flops_a_token(subject.fresh, subject.run.config) * subject.run.config.tokens_per_step
    return judged_time(subject.cost, subject.run.config, flops)


def judged_time(cost: Cost, config: RunConfig, flops_a_step: int) -> Result:
    """The verdict on what was measured."""
    if not cost.fits:
        return skipped("it does not fit into memory")
    if cost.error or cost.ended or not cost.step_seconds or cost.eval_seconds is None:
        return skipped("the measurement was not brought to its end; `memory` says why")
    total, parts = total_seconds(cost, config)
    rate = flops_a_step / cost.step_seconds
    values = {"seconds_a_step": cost.step_seconds, "seconds_an_evaluation": cost.eval_seconds}
    values |= {"seconds_a_save": cost.save_seconds, "seconds_in": parts, "seconds_to_the_end": total}
    values |= {"ends_at": clock.time() + total, "flops_a_second": rate, "matmul_flops_a_second": cost.matmul_rate}
    values |= {"tokens_a_second": config.tokens_per_step / cost.step_seconds, "evaluations": evaluations(config)}
    steps = f"{config.train.max_steps:,} steps of {lasting(cost.step_seconds)}"
    end = clock.strftime("%H:%M" if total < 12 * HOUR else "%d %b %H:%M", clock.localtime(values["ends_at"]))
    used = amount(rate, "FLOP/s")
    if cost.matmul_rate:
        values["share_of_peak"] = rate / cost.matmul_rate
        used += f", {values['share_of_peak']:.0%} of what a large matrix product reaches here"
    measured = f"{lasting(total)}, to {end}: {steps}, {evaluations(config)} evaluations of {lasting(cost.eval_seconds)}"
    return with_warnings(f"{measured}; {used}", total, cost.step_seconds, config, values)


def with_warnings(measured: str, total: float, step: float, config: RunConfig, values: dict[str, Any]) -> Result:
    """A pass, or a warning of a run longer than a week or of hours between two saves."""
    interval = min(config.train.save_interval, config.train.max_steps)
    values["seconds_between_saves"] = between = interval * step
    if between > HOUR:
        diagnosis = f"a crash or a power cut could cost {lasting(between)} of work"
        fix = f"train.save_interval = {max(1, int(HOUR / 2 / step))} saves every half hour"
        return warned(measured, "a save at least every hour", diagnosis, fix, values=values)
    if total > WEEK:
        fix = "a smaller model or fewer train.max_steps: `size` and `token budget` say what they come to; or a GPU"
        return warned(measured, "at most a week", "a long time to wait for one result", fix, values=values)
    return passed(measured, values=values)


def total_seconds(cost: Cost, config: RunConfig) -> tuple[float, dict[str, float]]:
    """Seconds from the command to its end, and what they go to; saves at each interval, evaluation, and the end."""
    steps, intervals = config.train.max_steps, (config.train.save_interval, config.train.eval_interval)
    saves = sum(steps // n for n in intervals) - steps // math.lcm(*intervals) + all(steps % n for n in intervals)
    assert cost.step_seconds is not None
    assert cost.eval_seconds is not None
    parts = {
        "start": cost.startup_seconds + cost.checks_seconds + cost.compile_seconds,
        "steps": cost.step_seconds * config.train.max_steps,
        "evaluations": cost.eval_seconds * evaluations(config),
        "saves": (cost.save_seconds or 0.0) * saves,
    }
    return sum(parts.values()), parts


def evaluations(config: RunConfig) -> int:
    """How often the run is evaluated: at step 0, at each interval, and at the end."""
    return -(-config.train.max_steps // config.train.eval_interval) + 1
