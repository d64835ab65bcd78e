"""Numbers that go wrong: a run stops at that very step, says where it began, and goes on from there when it is mended.

    for finding in numbers(Path("/tmp/numbers")):
        finding.ok, finding.name, finding.what      # True, "nan in the activation, step 7 ...", "first: the output ..."

What goes wrong is put in on purpose, at a step and a micro-batch of it: into a weight, a module's output, a gradient or
the loss. And losses that are only unusual: those of a batch of garbage are told, those of a healthy run are not.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tinyllm import engine
from tinyllm import tokenizer as tok
from tinyllm.checkpoint import LATEST, find
from tinyllm.config import RunConfig, check
from tinyllm.engine import Run, TrainState, new_state, open_run, restore, snapshot, train
from tinyllm.errors import NonFiniteError
from tinyllm.events import Event, StepDone
from tinyllm.folder import reopen
from tinyllm.metrics import read, record, trim
from tinyllm.optim import state_by_name
from tinyllm.prepare import prepare
from torture.finding import Finding, refused
from torture.runs import LIMIT, QUIET, Forks, Home, differences, unlike

BASE = {
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.1},
    "optim": {"lr": 3e-3},
    "schedule": {"warmup_steps": 2},
    "train": {
        "max_steps": 12, "batch_size": 8, "micro_batch_size": 2, "eval_interval": 6, "eval_windows": 4,
        "save_interval": 4, "log_interval": 1,
    },
    "runtime": {"device": "cpu", "dtype": "float32", "threads": 1},
}  # fmt: skip
RUNS = {
    "adamw": (),
    "muon": ("optim.name=muon", "model.recipe=modern"),
    "bfloat16": ("runtime.dtype=bfloat16", "train.micro_batch_size=4"),
}
GARBAGE = 120  # the step with a batch of garbage, where the losses before it are many enough to tell
KILLED = (GARBAGE - 3, GARBAGE, GARBAGE + 1, GARBAGE + 9)


# ---- Runs, in this process ----


def prepared(folder: Path) -> dict[str, Any]:
    """The settings of a little prepared data."""
    data = {"source": "tales", "dir": str(folder / "data"), "tokenizer": "char", "tales_stories": 120}
    list(prepare(check({"data": data}).data))
    return data


def config_of(data: dict[str, Any], out: Path, *overrides: str) -> RunConfig:
    return check(BASE | {"data": data}, [f"train.out_dir={out}", *overrides])


def begun(config: RunConfig) -> tuple[Run, TrainState]:
    run = open_run(config)
    return run, new_state(run)


def resumed(out: Path) -> tuple[Run, TrainState]:
    """As a new process would: nothing but the folder."""
    config, found = reopen(out, ())
    run = open_run(config)
    state = restore(run, found.checkpoint)
    trim(str(out), state.step)
    return run, state


def events_of(run: Run, state: TrainState, until: Callable[[Event], bool] = lambda event: False) -> list[Event]:
    """Train, to the end or until an event, after which nothing more is done."""
    events = []
    Path(run.config.train.out_dir).mkdir(parents=True, exist_ok=True)
    trained = record(train(run, state), run.config.train.out_dir)
    for event in trained:
        events.append(event)
        if until(event):
            trained.close()
            break
    return events


def all_of(run: Run, state: TrainState) -> dict[str, Any]:
    """What a checkpoint keeps of it, but for where it was."""
    held = vars(snapshot(run, state))
    return {key: held[key] for key in ("step", "best_val_loss", "model", "optimizer", "recent_losses")}


def copy_of(run: Run, state: TrainState) -> dict[str, Any]:
    """The weights and the optimizer's state as they are now."""
    held = all_of(run, state)
    return {
        "model": {name: tensor.clone() for name, tensor in held["model"].items()},
        "optimizer": {
            name: {key: v.clone() if isinstance(v, Tensor) else v for key, v in values.items()}
            for name, values in state_by_name(state.optimizers).items()
        },
    }


def rows(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "time"} for row in read(str(out))]


# ---- What goes wrong ----


@dataclass(frozen=True)
class Wrong:
    """A number that goes wrong: what, in which tensor or module, at which step, micro-batch and row of it."""

    kind: str  # weight, activation, gradient, gradient of an activation, loss
    place: str
    value: float
    step: int
    micro: int
    row: int = 1

    def __str__(self) -> str:
        return f"{self.value} in the {self.kind}, step {self.step}, micro-batch {self.micro + 1}"


@contextmanager
def wrong(run: Run, state: TrainState, what: Wrong) -> Iterator[None]:
    """While this lasts, every pass over that micro-batch goes wrong: that of training, and that which looks for why."""
    passes, model = 0, state.model
    n = run.config.accumulation_steps

    def now() -> bool:
        return model.training and state.step == what.step and (passes - 1) % n == what.micro

    def count(*_: Any) -> None:
        nonlocal passes
        passes += model.training

    def spoiled(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[what.row].view(-1)[3] = what.value
        return tensor

    def output(_: Any, __: Any, value: Tensor) -> Tensor | None:
        if now() and what.kind == "gradient of an activation":
            value.register_hook(spoiled)
        return spoiled(value) if now() and what.kind == "activation" else None

    real = engine.loss_fn

    def loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        result = real(logits, targets, reduction)
        return result * what.value if now() and reduction == "mean" else result

    with ExitStack() as stack:
        handles = [model.register_forward_pre_hook(count)]
        if what.kind in ("activation", "gradient of an activation"):
            handles.append(model.get_submodule(what.place).register_forward_hook(output))
        elif what.kind == "gradient":
            parameter = model.get_parameter(what.place)
            handles.append(parameter.register_hook(lambda grad: grad * what.value if now() else None))
        elif what.kind == "loss":
            stack.enter_context(mock.patch.object(engine, "loss_fn", loss))
        for handle in handles:
            stack.callback(handle.remove)
        yield


def cases(values: tuple[float, ...], steps: tuple[int, ...], n: int) -> Iterator[Wrong]:
    for value in values:
        for step in steps:
            micro = step % n
            yield Wrong("activation", "blocks.1.mlp.proj", value, step, micro)
            yield Wrong("activation", "wte", value, step, n - 1)
            yield Wrong("gradient", "blocks.0.attn.qkv.weight", value, step, micro)
            yield Wrong("gradient of an activation", "blocks.1.attn", value, step, micro)
            yield Wrong("loss", "", value, step, micro, row=0)
            yield Wrong("weight", "blocks.1.mlp.proj.weight", value, step, 0)


# ---- What must come of it ----


def numbers(folder: Path, whole: bool = True) -> Iterator[Finding]:
    """All of it, which takes minutes; or a little of each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    data = prepared(folder)
    if not whole:
        yield from stopped(data, folder / "adamw", "adamw", RUNS["adamw"], (math.nan,), (7,))
        yield from once(data, folder / "once")
        yield from spikes(data, folder / "spikes", "adamw", ("model.n_layer=1",), killed=(GARBAGE,), skips=(True,))
        yield from false_alarms(data, folder / "healthy", seeds=1, steps=200, names=("two sequences, eight tokens",))
        return
    for name, overrides in RUNS.items():
        yield from stopped(data, folder / name, name, overrides, (math.nan, math.inf, -math.inf), (0, 3, 7, 11))
    yield from once(data, folder / "once")
    yield from skipped(data, folder / "skipped")
    for name, overrides in RUNS.items():
        yield from spikes(data, folder / f"spikes-{name}", name, overrides)
    yield from false_alarms(data, folder / "healthy", seeds=3, steps=400)
    yield from commands(folder / "commands")


def stopped(
    data: dict[str, Any],
    folder: Path,
    name: str,
    overrides: tuple[str, ...],
    values: tuple[float, ...],
    steps: tuple[int, ...],
) -> Iterator[Finding]:
    """Each thing that can go wrong, at each of the steps; and the same run where nothing does."""
    whole, state = begun(config_of(data, folder / "whole", *overrides))
    events_of(whole, state)
    undisturbed = all_of(whole, state)
    for number, what in enumerate(cases(values, steps, whole.config.accumulation_steps)):
        out = folder / str(number)
        problems, said = gone_wrong(config_of(data, out, *overrides), what, undisturbed, rows(folder / "whole"))
        yield Finding(f"{what}: {name}", not problems, "; ".join(problems) or said)


def gone_wrong(config: RunConfig, what: Wrong, undisturbed: dict[str, Any], metrics: list) -> tuple[list[str], str]:
    """What is not as it must be about a run in which this goes wrong; and what it said."""
    run, state = begun(config)
    out, problems, before = Path(config.train.out_dir), [], {}

    def until(event: Event) -> bool:
        if isinstance(event, StepDone) and event.step == what.step and what.kind == "weight":
            spoil(state, what)
        if not isinstance(event, StepDone) or event.step == what.step:
            before.clear()
            before.update(copy_of(run, state))
        return False

    if what.kind == "weight" and what.step == 0:
        spoil(state, what)
        state.step = 0
    try:
        with wrong(run, state, what):
            events_of(run, state, until)
    except NonFiniteError as error:
        message = str(error)
    except Exception as error:  # a weight that is bad is seen by the evaluation, too, if that comes first
        if what.kind != "weight" or "is not finite" not in str(error):
            return [f"raised {type(error).__name__}: {error}"], ""
        message = str(error)
    else:
        return ["went on"], ""
    problems += [f"stopped at step {state.step}"] if state.step != what.step else []
    problems += [f"took the step: {d}" for d in unlike({k: all_of(run, state)[k] for k in before}, before)][:3]
    problems += [f"does not say {word!r}: {message}" for word in words_for(run, what) if word not in message]
    problems += [
        f"a row for step {row['step']}" for row in rows(out) if row["event"] == "step" and row["step"] > what.step
    ]
    saved = [path.name for path in out.glob("*.pt")]
    if what.kind == "weight":
        good = what.step // 2 * 2 if what.step else 0  # saved at every fourth step, and before each evaluation
        problems += [f"{name} is not whole" for name in saved if not all_finite(find(out / name).checkpoint.model)]
        problems += ["nothing is left"] if good >= 4 and not saved else []
    elif what.step and (LATEST not in saved or find(out, LATEST).checkpoint.step != what.step):
        problems.append(f"the step before is not saved: {saved}")
    if saved and not problems:
        run, state = resumed(out)
        events_of(run, state)
        problems += [f"mended, another {place}" for place in unlike(all_of(run, state), undisturbed)][:3]
        problems += ["mended, other metrics"] if rows(out) != metrics else []
    return problems, message


def spoil(state: TrainState, what: Wrong) -> None:
    with torch.no_grad():
        state.model.get_parameter(what.place).view(-1)[3] = what.value


def all_finite(weights: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def words_for(run: Run, what: Wrong) -> list[str]:
    """What the message has to have in it."""
    if what.kind == "weight":
        return [f"the weight {what.place}"]
    size, n = run.config.micro_batch_size, run.config.accumulation_steps
    ids = run.source.batch(what.step)[0][what.micro * size + what.row]
    text = tok.decode(tok.from_json(run.data.tokenizer_json), ids.tolist())
    origin = {
        "activation": f"the output of {what.place}", "gradient": f"the gradient of {what.place}",
        "gradient of an activation": f"the gradient of the output of {what.place}", "loss": "the loss",
    }[what.kind]  # fmt: skip
    words = [f"at step {what.step:,}", f"first: {origin}, in micro-batch {what.micro + 1} of {n}"]
    # A gradient that goes wrong has no row of its own: the loss of each is what it was.
    return words + ([repr(text)] if "gradient" not in what.kind else [])


def once(data: dict[str, Any], folder: Path) -> Iterator[Finding]:
    """A fault of the machine, that is gone when one looks again."""
    run, state = begun(config_of(data, folder))
    real, calls = engine.loss_fn, 0

    def loss(*args: Any) -> Tensor:
        nonlocal calls
        calls += state.model.training
        return real(*args) * (math.nan if calls == 14 and state.model.training else 1)

    try:
        with mock.patch.object(engine, "loss_fn", loss):
            events_of(run, state)
        said = "went on"
    except NonFiniteError as error:
        said = str(error)
    yield Finding("nan that does not come again", "made once more" in said and "step 3" in said, said)


def skipped(data: dict[str, Any], folder: Path) -> Iterator[Finding]:
    """With train.skip_spikes a step that is not finite is left out; ten in a row end the run."""
    what = Wrong("activation", "blocks.1.mlp.fc", math.nan, 5, 1)
    run, state = begun(config_of(data, folder / "one", "train.skip_spikes=true"))
    with wrong(run, state, what):
        events_of(run, state)
    row = next(row for row in rows(folder / "one") if row["event"] == "step" and row["step"] == 6)
    ok = state.step == 12 and row["skipped"] and row["loss"] is None and all_finite(state.model.state_dict())
    yield Finding("nan with skip_spikes", ok, str(row))
    run, state = begun(config_of(data, folder / "all", "train.skip_spikes=true", "train.max_steps=40"))
    real = engine.loss_fn

    def bad() -> bool:
        return state.model.training and state.step > 5

    try:
        with mock.patch.object(engine, "loss_fn", lambda *args: real(*args) * (math.nan if bad() else 1)):
            events_of(run, state, lambda event: state.step > 30)
        said = "went on"
    except Exception as error:
        said = str(error)
    yield Finding(
        "nan for ever with skip_spikes", state.step == 16 and "at step 16" in said, f"step {state.step}: {said}"
    )


# ---- Losses that are only unusual ----


def spikes(
    data: dict[str, Any],
    folder: Path,
    name: str,
    overrides: tuple[str, ...],
    killed: tuple[int, ...] = KILLED,
    skips: tuple[bool, ...] = (False, True),
) -> Iterator[Finding]:
    """A batch of garbage is told; it is skipped if so wished; and whenever one is killed, the result is the same."""
    settings = (*overrides, f"train.max_steps={GARBAGE + 20}", "train.eval_interval=100", "train.save_interval=7")
    for skip in skips:
        out = folder / f"skip-{skip}".lower()

        def config(place: str, out: Path = out, skip: bool = skip) -> RunConfig:
            return config_of(data, out / place, *settings, f"train.skip_spikes={str(skip).lower()}")

        run, state = begun(config("whole"))
        with garbage(run):
            events_of(run, state)
        whole, metrics = all_of(run, state), rows(out / "whole")
        told = [row["step"] - 1 for row in metrics if row.get("spike")]
        skipped = [row["step"] - 1 for row in metrics if row.get("skipped")]
        ok = told == [GARBAGE] and skipped == ([GARBAGE] if skip else [])
        yield Finding(f"a batch of garbage, skipped: {skip}: {name}", ok, f"spikes {told}, skipped {skipped}")
        for last in killed:
            place = f"killed-{last}"
            run, state = begun(config(place))
            with garbage(run):
                events_of(run, state, lambda event, at=last: isinstance(event, StepDone) and event.step == at)
            run, state = resumed(out / place)
            with garbage(run):
                events_of(run, state)
            places = unlike(all_of(run, state), whole)
            problems = places[:3] + (["other metrics"] if rows(out / place) != metrics else [])
            yield Finding(f"killed at {last}, skipped: {skip}: {name}", not problems, ", ".join(problems) or "the same")


@contextmanager
def garbage(run: Run, step: int = GARBAGE) -> Iterator[None]:
    """While this lasts, the batch of a step is not text."""
    real = run.source.batch

    def batch(wanted: int) -> tuple[np.ndarray, np.ndarray]:
        x, y = real(wanted)
        if wanted != step:
            return x, y
        rng = np.random.default_rng(0)
        rare = np.argsort(np.bincount(run.source.splits["train"], minlength=run.data.vocab_size))[:10]
        return rng.choice(rare, size=x.shape), rng.choice(rare, size=y.shape)

    with mock.patch.object(run.source, "batch", batch):
        yield


HEALTHY = {
    "adamw": (),
    "one sequence a step": ("train.batch_size=1", "train.micro_batch_size=0"),
    "two sequences, eight tokens": ("train.batch_size=2", "train.micro_batch_size=0", "model.block_size=8"),
    "muon": ("optim.name=muon", "model.recipe=modern"),
    "modern": ("model.recipe=modern", "optim.lr=1e-3"),
    "a high rate": ("optim.lr=3e-2",),
    "a low rate": ("optim.lr=1e-4",),
    "a constant rate": ("schedule.kind=constant",),
    "no dropout, no clipping": ("model.dropout=0.0", "optim.grad_clip=0.0"),
    "much dropout": ("model.dropout=0.4", "model.attn_dropout=0.2"),
    "documents": ("train.align_documents=true", "train.batch_size=2"),
    "bfloat16": ("runtime.dtype=bfloat16",),
}


def false_alarms(
    data: dict[str, Any], folder: Path, seeds: int, steps: int, names: tuple[str, ...] = tuple(HEALTHY)
) -> Iterator[Finding]:
    """Healthy runs: how many steps are taken for spikes."""
    judged = told = 0
    for name in names:
        alarms = []
        for seed in range(seeds):
            often = (f"train.max_steps={steps}", f"train.seed={seed}", "train.save_interval=1000")
            settings = (*often, "train.eval_interval=1000", *HEALTHY[name])
            run, state = begun(config_of(data, folder / f"{name}-{seed}", *settings))
            done = [event for event in events_of(run, state) if isinstance(event, StepDone)]
            judged += sum(math.isfinite(event.limit) for event in done)
            alarms += [(seed, event.step, event.loss, event.limit) for event in done if event.is_odd]
        told += len(alarms)
        yield Finding(f"healthy: {name}", not alarms, f"{alarms}" if alarms else f"{seeds} runs of {steps} steps")
    yield Finding(
        "false alarms", told == 0, f"{told} of {judged:,} steps of {len(names) * seeds} runs taken for spikes"
    )


# ---- Through the command line ----


def commands(folder: Path) -> Iterator[Finding]:
    """A real process: one error, exit code 2; `tinyllm resume` then ends with the bits of the undisturbed run."""
    changes = {"train.max_steps": 40, "data.tales_stories": 120, "model.dropout": 0.1, "train.micro_batch_size": 4}
    whole, mine = (Home(folder / name, changes, folder / "data") for name in ("whole", "mine"))
    with Forks() as forks:
        code = forks.start(whole, "train", "run.toml", *QUIET).wait(LIMIT)
        assert code == 0, whole.said()
        poison = forks.start(mine, "train", "run.toml", *QUIET, before="torture.numbers:poison", step=23)
        problem = refused(
            poison.wait(LIMIT), mine.said(), "at step 23", "in micro-batch 2 of 2", "text: ", "saved: step 23"
        )
        yield Finding("train: exit code 2", not problem, problem or mine.said()[-600:])
        code = forks.start(mine, "resume", "out").wait(LIMIT)
        problems = differences(mine, whole) if code == 0 else [mine.said()[-500:]]
        yield Finding("resume: the same bits", not problems, "; ".join(problems) or "the same bits")


def poison(step: int) -> None:
    """Have the loss of the second micro-batch of a step be no number, whenever it is computed."""
    real, calls = engine.micro_batches, {"now": False}
    real_loss, real_step = engine.loss_fn, engine.train_step

    def micro_batches(run: Run, batch: Any) -> Iterator[Any]:
        for number, each in enumerate(real(run, batch)):
            calls["now"] = calls.get("step") == step and number == 1
            yield each
        calls["now"] = False

    def train_step(run: Run, state: TrainState, *args: Any) -> StepDone | None:
        calls["step"] = state.step
        return real_step(run, state, *args)

    def loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        return real_loss(logits, targets, reduction) * (math.nan if calls["now"] and reduction == "mean" else 1)

    engine.micro_batches, engine.loss_fn, engine.train_step = micro_batches, loss, train_step
