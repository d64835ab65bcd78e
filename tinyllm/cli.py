"""The command line: parse, call, render, exit. The only module that knows typer.

The rooms below are imported inside the commands that use them, so that `tinyllm --help` and `plot-lr` answer at once.
Exit codes: 0 done, 1 a check failed, 2 the user's mistake, 128 + n stopped by signal n (as shells count).
"""

import gc
import json
import os
import signal
import sys
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tinyllm
from tinyllm import ui, ui_sanity
from tinyllm.errors import ConfigError, RunError, TinyLLMError, is_out_of_memory, typed
from tinyllm.process import Interrupted, importing, open_streams, stop_on_signals

if TYPE_CHECKING:
    from tinyllm.checkpoint import Found
    from tinyllm.config import RunConfig
    from tinyllm.engine import Run, TrainState
    from tinyllm.sanity import Check


class Commands(typer.core.TyperGroup):
    """The commands, quiet when the reader of their output has left, as in `tinyllm sample | head`."""

    def invoke(self, ctx: typer.Context) -> object:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where it can still be handled
        except BrokenPipeError:  # typer would exit with 1, which is a failed check
            for stream in (sys.stdout, sys.stderr):  # for the interpreter's own last flush
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise typer.Exit(128 + 13) from None  # SIGPIPE, which Windows does not have
        return result


app = typer.Typer(
    cls=Commands,
    help="Train a small language model from one TOML file, and find the mistake before it costs a night.",
    epilog="A first run: tinyllm new quickstart > run.toml, then tinyllm train run.toml, then tinyllm sample.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run config, a TOML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of the config.")
]
CheckpointPath = Annotated[
    Path,
    typer.Option("--checkpoint", "-c", metavar="PATH", help="A checkpoint; of a folder its best, else its latest."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")]
RUN_TOML = Path("run.toml")
MAX_PROMPT = 1 << 24  # bytes


def main() -> None:
    """The console script: run the command, turn the user's mistakes into a message and exit code 2."""
    open_streams()
    # A thread of torch's that waits for the others spins, for about a millisecond, on a core that whoever it waits for
    # may need: two trainings side by side on two cores were 80 times slower than one. After a shorter spin they are 4
    # times slower, and one alone at most 5 percent. libgomp reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # Or torch's profiler tells standard error of its coming and going.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        app()
    except TinyLLMError as error:
        ui.show_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fix = "a smaller train.micro_batch_size (the result stays the same), train.batch_size or [model]"
        ui.show_error(TinyLLMError("not enough memory for this", fix=fix))
        sys.exit(2)
    except OSError as error:
        ui.show_error(TinyLLMError(error.strerror or str(error), where=str(error.filename or "")))
        sys.exit(2)
    finally:
        gc.freeze()  # or Python, at its end, searches all there is for garbage, for half a second


def show_version(wanted: bool) -> None:
    if wanted:
        ui.result(f"tinyllm {tinyllm.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command()
def new(
    name: Annotated[str | None, typer.Argument(help="The example to start from; without it, they are listed.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this file.")] = None,
) -> None:
    """Write a commented run config to start from."""
    from tinyllm.examples import example_files, examples, find_example, read_example

    if name is None and out is not None:
        raise ConfigError("--out needs the name of an example", fix="`tinyllm new` lists them")
    if name is None:
        ui.show_examples(examples())
        return
    if out is None:
        sys.stdout.write(read_example(name))
        if model := find_example(name).model:
            ui.note(f"it trains the model in {model.name}: `tinyllm new {name} --out run.toml` writes both")
        return
    files = example_files(name, out)
    for path in files:
        if path.exists():
            raise ConfigError("is there already", where=str(path), fix="choose another --out, or delete it")
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    ui.note(f"wrote {' and '.join(map(str, files))}; check it with: tinyllm sanity {typed(out)}")


@app.command()
def config(
    path: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="The run config, a TOML file.")] = None,
    set_: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema, for editors, instead.")] = False,
) -> None:
    """Print the resolved config: every value, defaults and recipe included."""
    from tinyllm.config import json_schema, to_toml

    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    sys.stdout.write(to_toml(read_config(path or RUN_TOML, set_)))


@app.command()
def prepare(
    path: ConfigPath = RUN_TOML,
    set_: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Prepare again even if nothing changed.")] = False,
) -> None:
    """Turn the text into a tokenizer and token files."""
    from tinyllm.prepare import prepare

    settings = read_config(path, set_)
    ui.show_prepared(ui.show_preparing(prepare(settings.data, force=force)))


@app.command()
def sanity(
    path: ConfigPath = RUN_TOML,
    set_: Overrides = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME,...", help="These checks alone.")] = None,
    skip: Annotated[list[str] | None, typer.Option(metavar="NAME,...", help="All checks but these.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only what `train` checks first, in seconds.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Say what the checks catch, and perform none.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document, for programs.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep a page too: page.html or page.md.")] = None,
) -> None:
    """Check the model, the config and the data before a run; exits with 1 if a check fails."""
    if list_:
        ui_sanity.show_checks(chosen_checks(only, skip, quick))
        return
    settings = read_config(path, set_)
    checks = chosen_checks(only, skip, quick)
    with importing():
        from tinyllm.sanity import sanity
        from tinyllm.sanity.page import refuse, write_page
        from tinyllm.sanity.report import Report

    if out is not None:
        refuse(out)  # before anything that takes its time
    show = ui_sanity.follow_sanity if json_ else ui_sanity.show_sanity
    with redirect_stdout(sys.stderr) if json_ else nullcontext():  # a model of the user's own may print
        prepare_if_missing(settings)
        run = opened(settings, in_loops=any(not check.quick for check in checks))
        when, started = datetime.now().astimezone(), time.monotonic()
        results = tuple(show(checks, sanity(run, checks)))
    report = Report(str(path), run, checks, results, quick, time.monotonic() - started, when)
    if out is not None:
        write_page(report, out)
        ui.note(f"wrote {out}")
    if json_:
        print(json.dumps(report.as_json(), indent=2, allow_nan=False))
    if report.verdict == "fail":
        raise typer.Exit(1)


def chosen_checks(only: list[str] | None, skip: list[str] | None, quick: bool) -> "tuple[Check, ...]":
    """The checks that the options leave; each may be repeated, or hold several names with commas between."""
    with importing():
        from tinyllm.sanity import select

    parts = [[part.strip() for text in texts or () for part in text.split(",")] for texts in (only, skip)]
    checks = select(*([name for name in names if name] for names in parts), quick=quick)
    if not checks:
        raise ConfigError("no check is left to do", fix="`tinyllm sanity --list` shows them")
    return checks


@app.command()
def plot_lr(
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="CONFIG...", help="Run configs to draw together.")
    ] = None,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Draw a picture instead: lr.png or lr.svg.")] = None,
) -> None:
    """Draw the learning rate over the run; needs no data."""
    from tinyllm.plot import lr_curves, picture

    curves = lr_curves({str(path): read_config(path, set_) for path in paths or [RUN_TOML]})
    if out is None:
        ui.show_chart(curves)
        return
    picture(curves, out)
    ui.note(f"wrote {out}")


@app.command()
def bench(
    path: ConfigPath = RUN_TOML,
    set_: Overrides = None,
    seconds: Annotated[float, typer.Option(min=0.0, max=3600.0, help="Measure for about so long.")] = 10.0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document, for programs.")] = False,
) -> None:
    """Measure the steps of a run on this machine, and what their time goes to; writes no run, only its data."""
    settings = read_config(path, set_)
    with redirect_stdout(sys.stderr) if json_ else nullcontext():  # a model of the user's own may print
        prepare_if_missing(settings)
        with importing():
            from tinyllm.bench import AT_LEAST, bench

        run = opened(settings, to_train=True)
        ui.note(run.runtime.summary)
        ui.note(f"measuring for about {seconds:g} s, {AT_LEAST} steps at the least")
        found = bench(run, seconds)
    if json_:
        print(json.dumps(asdict(found), indent=2))
        return
    ui.show_bench(found)


@app.command()
def train(
    path: ConfigPath = RUN_TOML,
    set_: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that train.out_dir holds.")] = False,
    no_sanity: Annotated[bool, typer.Option("--no-sanity", help="Begin without the quick checks.")] = False,
) -> None:
    """Check a model in seconds, then train it; evaluate it and save it on the way."""
    settings = read_config(path, set_)
    with importing():
        from tinyllm.folder import claimed, clear, keep_config, refuse

    out_dir = settings.train.out_dir
    keep_config(path, settings)
    refuse(out_dir, overwrite)  # before the data is prepared, which may take long
    prepare_if_missing(settings)
    with importing():
        from tinyllm.engine import new_state

    run = opened(settings, to_train=True)
    if not no_sanity:
        preflight(run)
    state = new_state(run)
    with claimed(out_dir):
        refuse(out_dir, overwrite)  # somebody else may have begun meanwhile
        clear(out_dir)
        go(run, state)


def preflight(run: "Run") -> None:
    """Do the quick checks, which leave no trace, and exit with 1 if one fails."""
    with importing():
        from tinyllm.sanity import sanity, select

    checks = select(quick=True)
    failures = ui_sanity.show_preflight(checks, sanity(run, checks))
    if failures:
        what = f"{ui.plural(len(failures), 'check')} failed; nothing was written"
        fix = "mend it, or train all the same with --no-sanity"
        ui.show_error(RunError(what, where=f"{run.config.train.out_dir}/", fix=fix))
        raise typer.Exit(1)


@app.command()
def resume(
    checkpoint: Annotated[
        Path, typer.Argument(help="The checkpoint to go on from; of a folder the newest that is whole.")
    ] = Path("out"),
    set_: Overrides = None,
) -> None:
    """Go on with a run that was stopped, to the last bit as if it never had been."""
    with importing():
        from tinyllm.engine import restore
        from tinyllm.folder import claimed, reopen
        from tinyllm.metrics import trim

    settings, found = reopen(checkpoint, set_ or ())
    note_found(found, settings)
    with claimed(settings.train.out_dir):
        run = opened(settings, to_train=True)
        state = restore(run, found.checkpoint)
        ui.show_changes(state.changes[len(found.checkpoint.changes) :])
        note_where(state.step, run.config)
        trim(settings.train.out_dir, state.step)
        go(run, state)


@app.command()
def eval(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a folder: its best, then its latest.")] = Path(
        "out"
    ),
    windows: Annotated[int, typer.Option(min=0, help="Windows a split, evenly spread; 0: the whole validation.")] = 0,
    set_: Overrides = None,
) -> None:
    """Measure a checkpoint's loss on both splits."""
    with importing():
        from tinyllm.checkpoint import BEST
        from tinyllm.engine import evaluate, restore
        from tinyllm.folder import reopen

    settings, found = reopen(checkpoint, set_ or (), BEST)
    note_found(found, settings)
    run = opened(settings)
    model = restore(run, found.checkpoint).model
    parts = {split: evaluate(run, model, split, windows) for split in ("train", "val")}
    ui.show_evaluations({name: part for name, part in parts.items() if part}, run.data.entropy)


@app.command()
def sample(
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="How the text begins; - reads standard input.")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="Read the prompt from a file.")] = None,
    checkpoint: CheckpointPath = Path("out"),
    n: Annotated[int, typer.Option("--num-samples", "-n", min=1, max=10_000, help="Samples.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens a sample, at most.")] = 500,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Only the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Only the likeliest with this mass; 1: all.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Same seed, same text.")] = 1337,
    device: Device = "auto",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="model.class=FILE:CLASS", help="Run this class as the model.")
    ] = None,
) -> None:
    """Let a trained model speak."""
    with importing():
        from tinyllm.checkpoint import BEST
        from tinyllm.folder import reopen
        from tinyllm.generate import Sampling, Speaker

    text = read_prompt(prompt, prompt_file)
    settings, found = reopen(checkpoint, set_ or (), BEST, may_change=("model.class",))
    note_found(found, settings)
    speaker = Speaker(found.checkpoint, device, settings)
    ids = speaker.encode(text)
    ui.note(f"{found.path}, step {speaker.step:,}")
    sampling = Sampling(temperature, top_k, top_p, max_new_tokens, seed)
    note_compiling()
    ui.show_samples(text, speaker.speak(ids, sampling, n), n)


def note_found(found: "Found", settings: "RunConfig") -> None:
    """Say which checkpoints of a folder were damaged, and which file one is about to have us run, if any."""
    from tinyllm.custom import find

    for error in found.passed_over:
        ui.warn(str(error))
    if found.passed_over:
        ui.warn(f"going on with {found.path} instead, of step {found.checkpoint.step:,}")
    if spec := settings.model.class_:
        ui.note(f"running {find(spec).path}: its {spec.rpartition(':')[2]} is the model")


def note_where(step: int, settings: "RunConfig") -> None:
    """Say so if the folder's run has come further than the step that is gone on from, or if there is no more to do."""
    from tinyllm.checkpoint import newest_step

    folder, last = settings.train.out_dir, settings.train.max_steps
    if (newest := newest_step(Path(folder))) > step:
        ui.warn(f"{folder}/ has come to step {newest:,}: what comes after {step:,} is made again, in its place")
    if step >= last:
        more = f"--set train.max_steps=... --set schedule.decay_steps={settings.decay_steps}"
        ui.note(f"all {last:,} steps of this run are made; for more of them: {more}")


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt's text, from the option, a file or standard input. Raises ConfigError."""
    if prompt is not None and file is not None:
        raise ConfigError("--prompt and --prompt-file are both given", fix="give one of them")
    where = str(file) if file else "standard input"
    try:
        if file is None and prompt != "-":
            return prompt or ""
        with file.open("rb") if file else nullcontext(sys.stdin.buffer) as stream:
            content = stream.read(MAX_PROMPT + 1)
        if len(content) > MAX_PROMPT:
            raise ConfigError(f"the prompt has more than {MAX_PROMPT:,} bytes", where=where, fix="its end is enough")
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError("the prompt is not UTF-8 text", where=where) from None
    except OSError as error:
        raise ConfigError(f"the prompt cannot be read: {error.strerror}", where=where) from None


def opened(settings: "RunConfig", *, to_train: bool = False, in_loops: bool = False) -> "Run":
    """The run, opened; where it goes by compiled loops, or what is done with it does, a wait for them will be told."""
    with importing():
        from tinyllm.engine import open_run

    run = open_run(settings, to_train=to_train)
    if run.runtime.loops or in_loops:
        note_compiling()
    return run


def note_compiling() -> None:
    """Say so if there are loops to compile."""
    from tinyllm.kernels import before_compiling

    before_compiling(lambda: ui.note("compiling its loops: once on this machine, some seconds"))


def read_config(path: Path, overrides: list[str] | None) -> "RunConfig":
    from tinyllm.config import load

    return load(path, overrides or ())


def prepare_if_missing(settings: "RunConfig") -> None:
    """Prepare the data when there is none yet. Data made for another config is left alone: the engine refuses it."""
    from tinyllm.prepare import is_prepared, prepare

    if not is_prepared(settings.data):
        ui.show_prepared(ui.show_preparing(prepare(settings.data)), asked_for=False)


def go(run: "Run", state: "TrainState") -> None:
    """Train to the end, or until a signal stops it; keep the metrics, show what happens."""
    from tinyllm.engine import train
    from tinyllm.events import Finished
    from tinyllm.folder import write_config
    from tinyllm.metrics import record
    from tinyllm.optim import parameter_groups, state_bytes
    from tinyllm.saver import check_room_for_two

    out_dir = run.config.train.out_dir
    tensors = sum(tensor.nbytes for tensor in state.model.state_dict().values())
    check_room_for_two(out_dir, tensors + state_bytes(state.optimizers))
    write_config(run.config)
    started, first = time.monotonic(), state.step
    ui.show_run(run, parameter_groups(state.model, run.config.optim), first)
    with stop_on_signals(ui.note) as stop:
        try:
            end = ui.show_training(record(train(run, state, stop), out_dir), run, first)
        except Interrupted:
            ui.note("stopped before the first step: there is nothing to save")
            raise typer.Exit(128 + stop.signal) from None
    if isinstance(end, Finished):
        ui.show_finished(end, run, time.monotonic() - started)
        return
    ui.note(f"stopped at step {end.step:,}; it is saved, go on with: tinyllm resume {typed(out_dir)}")
    raise typer.Exit(128 + stop.signal)
