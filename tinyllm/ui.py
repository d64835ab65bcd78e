"""What a person sees: what knows rich, with ui_sanity.py. Results go to standard output, all else to standard error."""

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import tinyllm
from tinyllm.errors import TinyLLMError, typed
from tinyllm.events import Evaluated, Evaluation, Event, Finished, Note, Saved, SaveFailed, StepDone, Stopped
from tinyllm.examples import Example
from tinyllm.numbers import amount, lasting, size_of

if TYPE_CHECKING:  # these import NumPy, some of them torch, which `--help` must not wait for
    from tinyllm.bench import Bench
    from tinyllm.engine import Run
    from tinyllm.optim import ParameterGroup
    from tinyllm.plot import Curve
    from tinyllm.prepare import Prepared
    from tinyllm.prepare import Progress as Preparing

PLAIN_SECONDS = 5.0  # between two progress lines where there is no terminal to redraw


class Results(Console):
    """Standard output. Rich would exit with 1 when its reader has left; cli.py knows better."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Listener:
    """Standard error, but that nobody listens any more is no error: the run goes on to its next save.

    Ctrl-C ends the `tee` of `train 2>&1 | tee log` too, and a lost connection takes the terminal away.
    """

    def __init__(self) -> None:
        self.stream: TextIO = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # rich's own while it draws a bar

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def stdout() -> Console:
    return Results(highlight=False, soft_wrap=True)


def stderr() -> Console:
    return Console(file=cast(TextIO, Listener()), highlight=False, soft_wrap=True)


def show_error(error: TinyLLMError) -> None:
    """What is wrong and where in red, the fix below it."""
    console = stderr()
    where = f"{error.where}: ".replace("\n", " ") if error.where else ""
    console.print(Text.assemble(("error: ", "bold red"), plain(where + error.what)))
    if error.fix:
        console.print(Text.assemble(("  fix: ", "bold"), plain(error.fix)))


def note(text: str) -> None:
    """A line of progress."""
    stderr().print(Text(plain(text), style="dim"))


def warn(text: str) -> None:
    """A line that must not be overlooked, and does not end the command."""
    stderr().print(Text.assemble(("warning: ", "bold yellow"), plain(text)))


def plain(text: str) -> str:
    """The text without what a terminal would obey: a name in it may come from a stranger's checkpoint."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def result(text: str) -> None:
    """A line of result, as it is."""
    stdout().print(Text(text))


# ---- prepare ----


def show_preparing(events: "Iterable[Preparing | Prepared]") -> "Prepared":
    """Draw a progress bar in bytes while the data is prepared; return what came of it."""
    from tinyllm.prepare import Prepared

    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    prepared = None
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}
        for event in events:
            if isinstance(event, Prepared):
                prepared = event
                continue
            if event.stage not in tasks:
                tasks[event.stage] = bar.add_task(event.stage, total=event.total or None)
                if not console.is_terminal:
                    console.print(f"{event.stage} ...")
            bar.update(tasks[event.stage], completed=event.done, total=event.total or None)
    assert prepared is not None
    return prepared


def show_prepared(prepared: "Prepared", asked_for: bool = True) -> None:
    """What the data is, and the losses that a model of it must beat: a result only if it was asked for."""
    out = stdout() if asked_for else stderr()
    if prepared.reasons and prepared.reasons != ("new",):
        note("prepared again: " + "; ".join(prepared.reasons))
    if not prepared.reasons:
        note("nothing changed since it was prepared")
    head = f"{prepared.dir}/: {prepared.source}, {prepared.tokenizer} tokens, vocabulary {prepared.vocab_size:,}"
    out.print(Text(head, style="bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for name in ("", "tokens", "characters", "documents"):
        table.add_column(name, justify="left" if not name else "right", header_style="dim")
    for name, split in (("training", prepared.train), ("validation", prepared.val)):
        documents = f"{split.documents:,}" if split.documents else "-"
        table.add_row(name, f"{split.tokens:,}", f"{split.characters:,}", documents)
    out.print(table)
    overlap = f"{prepared.overlap:.1%} of the validation windows occur in training"
    out.print(f"{prepared.bytes_per_token:.2f} bytes a token; {overlap}")
    rungs = {"unigram": prepared.unigram_entropy, "bigram": prepared.bigram_entropy}
    ladder = ", ".join(f"{name} {value:.3f}" for name, value in rungs.items())
    out.print(f"validation loss to beat, nats a token: {ladder}")
    if prepared.entropy is not None:
        a_character = prepared.entropy * prepared.val.tokens / prepared.val.characters
        out.print(f"the best any model can do: {prepared.entropy:.4f} nats a token, {a_character:.4f} a character")


# ---- train ----


def show_run(run: "Run", groups: Sequence["ParameterGroup"], step: int) -> None:
    """What is about to be trained, on what, where, and how long."""
    config, data = run.config, run.data
    model, train = config.model, config.train
    steps = train.max_steps - step
    tokens = steps * config.tokens_per_step
    parameters = sum(group.count for group in groups)
    kind = model.class_ or f"{model.recipe}, {plural(model.n_layer, 'layer')} of {model.n_embd}"
    accumulation = f" in {config.accumulation_steps} micro-batches" if config.accumulation_steps > 1 else ""
    rows = {
        "data": f"{data.source}, {data.tokenizer}: {data.train.tokens:,} training tokens, "
        f"vocabulary {data.vocab_size:,}",
        "model": f"{kind}, context {model.block_size}: {parameters:,} parameters",
        "optim": config.optim.name + ": " + ", ".join(f"{g.name} {len(g.names)} ({g.count:,})" for g in groups),
        "device": run.runtime.summary,
        "steps": f"{steps:,} of {config.tokens_per_step:,} tokens{accumulation}: "
        f"{amount(tokens)} tokens, {tokens / data.train.tokens:.1f} epochs",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    console = stderr()
    goes_on = f" goes on at step {step:,}" if step else ""
    console.print(Text.assemble((f"tinyllm {tinyllm.__version__}", "bold"), f"  {train.out_dir}/{goes_on}"))
    console.print(table, soft_wrap=False)


def show_training(events: Iterable[Event], run: "Run", step: int) -> Finished | Stopped:
    """A live line (in a terminal) and a table of evaluations that grows as they come; returns how it ended."""
    console, config = stderr(), run.config
    clock = Clock(step, config.tokens_per_step)
    last: Finished | Stopped | None = None
    with live_line(console, step, config.train.max_steps) as update:
        console.print(
            Text(f"{'step':>9}  {'train loss':>10}  {'val loss':>9}  {'perplexity':>10}  {'bits/byte':>9}", "dim")
        )
        for event in events:
            match event:
                case StepDone():
                    if event.is_odd:
                        warn(odd_step(event))
                    rate = clock.tick(event.step)
                    eta = clock.eta(config.train.max_steps)
                    values = f"loss {event.loss:.3f} norm {event.grad_norm:.2f} lr {event.lr:.1e}"
                    update(event.step, f"{values} {amount(rate, 'tok/s')} {eta} left")
                case Evaluated():
                    console.print(evaluation_row(event))
                    clock.skip()
                case Saved():
                    clock.skip()
                case SaveFailed():
                    warn(f"{event.path}, step {event.step:,}: {event.reason}; the run goes on")
                case Note():
                    console.print(Text(event.text, "dim"))
                    clock.skip()
                case Finished() | Stopped():
                    last = event
    assert last is not None
    return last


def odd_step(event: StepDone) -> str:
    """What is odd about a step, and what was done about it."""
    what = f"the loss {event.loss:.3f}" if event.is_finite else f"loss {event.loss}, gradient norm {event.grad_norm}"
    usual = f" is above {event.limit:.3f}, 6 deviations over the last ones" if event.is_finite else ""
    done = "skipped" if event.skipped else "taken (train.skip_spikes would leave it out)"
    return f"step {event.step:,}: {what}{usual}; {done}"


def show_changes(changes: Sequence[Mapping[str, Any]]) -> None:
    """What is not as it was in a run that goes on, and what that means for its numbers."""
    for change in changes:
        note(f"changed: {change['what']} = {change['from']} -> {change['to']}")
    if any("." not in change["what"] for change in changes):  # of the machine, not of the config
        note("the numbers may differ in their last bits from those of a run that was never stopped")


def evaluation_row(event: Evaluated) -> Text:
    val = event.val
    losses = f"{event.step:>9,}  {event.train.loss:>10.4f}  {val.loss:>9.4f}"
    others = f"  {perplexity(val):>10}  {val.bits_per_byte:>9.3f}"
    return Text.assemble(losses, others, ("  best" if event.is_best else "", "green"))


class Clock:
    """Tokens a second over the last stretch of steps, and the time left, evaluations and saves included."""

    def __init__(self, step: int, tokens_per_step: int) -> None:
        self.start_step = self.step = step
        self.tokens_per_step = tokens_per_step
        self.start = self.mark = time.monotonic()

    def tick(self, step: int) -> float:
        """Tokens a second since the last tick or skip."""
        now = time.monotonic()
        rate = (step - self.step) * self.tokens_per_step / max(now - self.mark, 1e-9)
        self.step, self.mark = step, now
        return rate

    def skip(self) -> None:
        """Leave what just happened out of the rate."""
        self.mark = time.monotonic()

    def eta(self, max_steps: int) -> str:
        """Time to the end at the pace since the start, h:mm:ss."""
        pace = (time.monotonic() - self.start) / max(self.step - self.start_step, 1)
        return duration(pace * (max_steps - self.step))


@contextmanager
def live_line(console: Console, step: int, total: int) -> Iterator[Callable[[int, str], None]]:
    """A function to show (step, text) with: redrawn in place in a terminal, a plain line now and then elsewhere."""
    if console.is_terminal:
        columns = (TextColumn("{task.completed:,}/{task.total:,}"), BarColumn(None), TextColumn("{task.description}"))
        # Redrawn when there is something new, not by a timer thread: the cores are busy.
        with Progress(*columns, console=console, transient=True, auto_refresh=False, expand=True) as bar:
            task = bar.add_task("starting", total=total, completed=step)

            def redraw(step: int, text: str) -> None:
                bar.update(task, completed=step, description=text, refresh=True)

            bar.refresh()
            yield redraw
        return
    shown = time.monotonic()

    def line(step: int, text: str) -> None:
        nonlocal shown
        if time.monotonic() - shown > PLAIN_SECONDS:
            shown = time.monotonic()
            console.print(f"{step:>9,}  {text}")

    yield line


def show_finished(end: Finished, run: "Run", seconds: float) -> None:
    """The result of the run, beside the best any model could do where that is known."""
    out = stdout()
    out.print(Text.assemble(("validation loss ", "bold"), (f"{end.final.loss:.4f}", "bold green"), summary(end.final)))
    if run.data.entropy is not None:
        above = end.final.loss / run.data.entropy - 1
        out.print(
            f"the corpus's own entropy is {run.data.entropy:.4f} nats a token: "
            f"this is {above:.1%} above the best any model can do"
        )
    if end.best_val_loss < end.final.loss:
        out.print(f"the best was {end.best_val_loss:.4f}; its weights are in {run.config.train.out_dir}/best.pt")
    elsewhere = "" if run.config.train.out_dir == "out" else f" --checkpoint {typed(run.config.train.out_dir)}"
    note(f'trained in {duration(seconds)}; now try: tinyllm sample{elsewhere} --prompt "..."')


def summary(evaluation: Evaluation) -> str:
    return f" nats a token (perplexity {perplexity(evaluation)}, {evaluation.bits_per_byte:.3f} bits a byte)"


def show_evaluations(parts: Mapping[str, Evaluation], entropy: float | None) -> None:
    """Losses by split, for `eval`."""
    out = stdout()
    for name, part in parts.items():
        out.print(Text.assemble((f"{name:<6}loss ", "bold"), f"{part.loss:.4f}{summary(part)}"))
    out.print("on " + " and ".join(f"{part.tokens:,} tokens of {name}" for name, part in parts.items()))
    if entropy is not None:
        out.print(f"the corpus's own entropy is {entropy:.4f} nats a token of the validation split")


# ---- plot-lr ----

CURVE_STYLES = ("cyan", "magenta", "yellow", "green", "blue", "red")


def show_chart(curves: "Sequence[Curve]") -> None:
    """The curves in the terminal, each in its colour."""
    from tinyllm.plot import text_chart

    out = stdout()
    size = (out.width, min(out.height, 24) - 1) if out.is_terminal else (80, 23)
    for line in text_chart(curves, width=size[0], height=size[1], encoding=out.encoding):
        styles = ("" if span.curve is None else CURVE_STYLES[span.curve % len(CURVE_STYLES)] for span in line)
        out.print(Text.assemble(*((span.text, style) for span, style in zip(line, styles, strict=True))))


# ---- bench ----


def show_bench(found: "Bench") -> None:
    """The step in figures, and its parts as bars."""
    out = stdout()
    spread = f"{lasting(found.quickest_seconds)} to {lasting(found.slowest_seconds)}, {plural(found.steps, 'step')}"
    out.print(Text.assemble(("a step  ", "bold"), f"{lasting(found.step_seconds)} ({spread})"))
    out.print(Text.assemble(("speed   ", "bold"), f"{amount(found.tokens_a_second, 'tokens')} a second"))
    of_peak = f"{found.share_of_peak:.0%} of the {amount(found.matmul_rate, 'FLOP/s')} of a large matrix product here"
    out.print(Text.assemble(("rate    ", "bold"), f"{amount(found.flops_a_second, 'FLOP/s')}, {of_peak}"))
    if found.peak_bytes is not None:
        out.print(Text.assemble(("memory  ", "bold"), f"{size_of(found.peak_bytes)} at its peak"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    largest = max(found.parts.values(), default=1.0)
    for kind, share in found.parts.items():
        table.add_row(kind, f"{share:.0%}".rjust(4), Text("█" * round(30 * share / largest), style="cyan"))
    out.print()
    out.print(table)


# ---- sample ----


def show_samples(prompt: str, steps: Iterable[Sequence[str | None]], n_samples: int) -> None:
    """Write the prompt and stream the first sample; the others follow when it has ended, after a line of dashes."""
    write = sys.stdout.write
    others = [prompt] * (n_samples - 1)
    steps = iter(steps)
    first = list(islice(steps, 2))  # what may have to be said, or compiled, comes before the prompt, not into its line
    write(prompt)
    for step in chain(first, steps):
        write(step[0] or "")
        sys.stdout.flush()
        others = [text + (piece or "") for text, piece in zip(others, step[1:], strict=True)]
    write("\n")
    for text in others:
        write(f"---\n{text}\n")
    sys.stdout.flush()


# ---- new ----


def show_examples(items: Sequence[Example]) -> None:
    """The ready-made run configs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it trains")
    for item in items:
        table.add_row(item.name, item.summary)
    stdout().print(table, soft_wrap=False)


# ---- numbers ----


def perplexity(part: Evaluation) -> str:
    """12.34, but 1.2e+08 rather than hundreds of digits."""
    return f"{part.perplexity:.2f}" if part.perplexity < 1e6 else f"{part.perplexity:.1e}"


def plural(count: int, word: str) -> str:
    """1 layer, 2 layers."""
    return f"{count:,} {word}" + "s" * (count != 1)


def duration(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02}:{whole % 60:02}"
