"""The checks as a person sees them: a calm line each as they come, and the whole story of what needs mending.

With `ui.py` the only module that knows rich. Results go to standard output, all else to standard error.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tinyllm.ui import plural, stderr, stdout

if TYPE_CHECKING:  # this imports torch, which `--help` must not wait for
    from tinyllm.sanity import Check, Result

MARKS = {"pass": "✓+", "warn": "!!", "fail": "✗x", "skip": "–-"}  # the second in plain ASCII
STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}
ASCII = str.maketrans({"±": "+-", "×": "x", "→": "->", "≤": "<=", "≥": ">=", "…": "...", "–": "-", "·": "*"})
STORY = 4, 14  # columns in which the labels and the texts of a story begin
NARROW = 32  # columns: with less beside the names, what was measured stands below them


def show_sanity(checks: Sequence["Check"], results: Iterable["Result"]) -> list["Result"]:
    """Each result as it comes, under the heading of its group, then how many there are of each verdict; all of them."""
    from tinyllm.sanity.report import summary

    out, started, shown, group = stdout(), time.monotonic(), [], ""
    indent = 3 + max(len(check.name) for check in checks)
    live = out if out.is_terminal else stderr()
    for check, result in zip(checks, followed(results, checks, live), strict=True):
        if check.group != group:
            group = check.group
            out.print(Text(group, "dim"))
        show_result(out, result, indent)
        shown.append(result)
    worst = "fail" if any(r.verdict == "fail" for r in shown) else "pass"
    style = f"bold {STYLES[worst]}"
    hang(out, Text(), Text.assemble((summary(shown), style), f" in {time.monotonic() - started:.1f} s"), 0)
    return shown


def follow_sanity(checks: Sequence["Check"], results: Iterable["Result"]) -> list["Result"]:
    """All results, for a program: nothing is shown but the live line, in a terminal."""
    return list(followed(results, checks, stderr()))


def show_preflight(checks: Sequence["Check"], results: Iterable["Result"]) -> list["Result"]:
    """The checks before a training: one line if all is well, one more a warning, whole stories of failures; those."""
    from tinyllm.sanity.report import summary

    console, started = stderr(), time.monotonic()
    shown = list(followed(results, checks, console))
    failures = [r for r in shown if r.verdict == "fail"]
    passed = sum(r.verdict == "pass" for r in shown)
    others = summary([r for r in shown if r.verdict in ("warn", "fail")])
    words = f"sanity: {plural(passed, 'quick check')} passed" + f", {others}" * bool(others)
    hang(console, Text(), Text(f"{words} in {time.monotonic() - started:.1f} s", "dim"), 0)
    for warning in (r for r in shown if r.verdict == "warn"):
        mark = Text(mark_of(console, warning) + " ", STYLES["warn"])
        short = f"{warning.measured}; {warning.fix}" if warning.fix else warning.measured
        hang(console, mark, Text.assemble((warning.name, "bold"), f": {' '.join(short.split())}"), 2)
    for failure in failures:
        show_result(console, failure, 3 + max(len(r.name) for r in failures))
    return failures


def show_checks(checks: Sequence["Check"]) -> None:
    """The checks by group, what each is there to catch, and which are left out of the quick ones."""
    out, group = stdout(), ""
    indent = 4 + max(len(check.name) for check in checks)
    for check in checks:
        if check.group != group:
            group = check.group
            out.print(Text(group, "dim"))
        body = Text.assemble(check.catches, "" if check.quick else ("  not in --quick", "dim"))
        hang(out, Text.assemble("  ", (check.name.ljust(indent - 2), "bold")), body, indent)
    out.print(f"{plural(len(checks), 'check')}, {sum(check.quick for check in checks)} of them in --quick")


# ---- a result ----


def show_result(console: Console, result: "Result", indent: int) -> None:
    """A line with its mark, name and what was measured, from column `indent` on; the story below, if there is one."""
    dim = "dim" if result.verdict == "skip" else ""
    mark = (mark_of(console, result) + " ", STYLES[result.verdict])
    head = Text.assemble(mark, (result.name.ljust(indent - 2), dim or "bold"))
    beside = Text(f"  expected {result.expected}" if result.expected else "", "dim")
    body = Text(result.measured, dim)
    width = console.width if console.is_terminal else 80
    if result.verdict == "pass" and indent + len(body) + len(beside) <= width:
        body += beside
    hang(console, head, body, indent)
    if result.verdict in ("warn", "fail"):
        for label, text in (("expected", result.expected), ("diagnosis", result.diagnosis), ("fix", result.fix)):
            if text:
                label_style = "bold" if label == "fix" else "dim"
                column = " " * STORY[0]
                hang(
                    console,
                    Text.assemble(column, (label.ljust(STORY[1] - STORY[0]), label_style)),
                    Text(text),
                    STORY[1],
                )


def mark_of(console: Console, result: "Result") -> str:
    return MARKS[result.verdict][not console.encoding.startswith("utf")]


def hang(console: Console, head: Text, body: Text, indent: int) -> None:
    """The head, and beside it the body, whose further lines begin in column `indent`; whole where nobody wraps lines.

    In a terminal too narrow for both the body begins below.
    """
    width = console.width if console.is_terminal else 1 << 30
    if width - indent < NARROW and indent > STORY[1]:
        head.rstrip()
        console.print(head)
        indent = STORY[0]
        head = Text(" " * indent)
    if not console.encoding.startswith("utf"):
        body = Text(body.plain.translate(ASCII))
    for line in body.wrap(console, max(width - indent, 10)):
        line.rstrip()
        console.print(head + line)
        head = Text(" " * indent)


# ---- the live line ----


class Running:
    """What is running now and since when; nothing for a moment, lest short checks flicker."""

    def __init__(self, total: int, width: int) -> None:
        self.total, self.width, self.number, self.name, self.since = total, width, 0, "", 0.0

    def begin(self, number: int, name: str) -> None:
        self.number, self.name, self.since = number, name, time.monotonic()

    def __rich__(self) -> Text:
        seconds = time.monotonic() - self.since
        shown = self.name and seconds > 0.3
        text = f"  {self.number} of {self.total}  {self.name}  {seconds:.0f} s" if shown else ""
        return Text(text[: self.width - 1], "dim")


def followed(results: Iterable["Result"], checks: Sequence["Check"], console: Console) -> Iterator["Result"]:
    """The results; while one is being found a line at the bottom of the terminal says which, and it is gone then."""
    results = iter(results)
    if not (console.is_interactive and console.file.isatty()):
        yield from results
        return
    running = Running(len(checks), console.width)
    # Twice a second: the cores are busy. Standard streams are left alone, one of them may be a file.
    options = {"refresh_per_second": 2, "redirect_stdout": False, "redirect_stderr": False}
    with Live(running, console=console, transient=True, **options) as live:
        for number, check in enumerate(checks, 1):
            running.begin(number, check.name)
            result = next(results)
            running.name = ""
            live.refresh()
            yield result
