"""The report as a page that a person keeps beside the run: one HTML file, or Markdown with its pictures beside it.

    refuse("page.html")             # before the checks: what could not be written at the end
    write_page(report, "page.html")

The HTML loads nothing and runs nothing. The Markdown is GitHub's; its pictures are files, because neither GitHub nor
editors show one that is written into the text.
"""

import html
import math
import os
import platform
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

from tinyllm import __version__
from tinyllm.config import to_toml
from tinyllm.errors import ConfigError
from tinyllm.files import write_text
from tinyllm.plot import Curve, lr_curves, picture, svg
from tinyllm.sanity.report import WORDS, Report, summary
from tinyllm.sanity.result import Result

MARKS = {"pass": "✓", "warn": "!", "fail": "✗", "skip": "–"}
VERDICTS = {"pass": "Ready to train", "fail": "Not ready to train"}

STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #626b76; --line: #e3e6ea; --paper: #fff; --wash: #f6f7f9;
  --pass: #1a7f4b; --warn: #9a6700; --fail: #c62f2f; --skip: #7d8590; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa4b0; --line: #2c3138; --paper: #14171a; --wash: #1c2025;
    --pass: #4cc38a; --warn: #e0b04a; --fail: #ff7b72; --skip: #7d8590; }
  figure svg { filter: invert(0.93) hue-rotate(180deg); }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.02em; }
h2 { margin: 3rem 0 0.75rem; font-size: 1.15rem; }
p { margin: 0.4rem 0; }
.soft, dt, thead th, .group th { color: var(--soft); font-weight: normal; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.94rem; }
th, td { padding: 0.4rem 0.9rem 0.4rem 0; text-align: left; vertical-align: top; }
tbody tr { border-top: 1px solid var(--line); }
thead th, .group th { font-size: 0.85rem; }
.group th { padding-top: 1.3rem; }
.group, .group + tr, tr.story { border-top: 0; }
tbody tr:first-child { border-top: 0; }
.mark { width: 1.1rem; padding-right: 0.4rem; font-weight: bold; text-align: center; }
.name { width: 27%; font-weight: 600; }
.pass .mark, h1 + .pass { color: var(--pass); }
.warn .mark { color: var(--warn); }
.fail .mark, h1 + .fail { color: var(--fail); }
.skip td, .skip th { color: var(--skip); font-weight: normal; }
h1 + p { font-size: 1.15rem; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1.2rem; margin: 0; }
dd { margin: 0; }
.story dl { padding: 0.6rem 0.9rem; border-left: 3px solid var(--line); background: var(--wash); }
.story.warn dl { border-color: var(--warn); }
.story.fail dl { border-color: var(--fail); }
figure { margin: 1.5rem 0; }
figure svg { width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
pre { overflow-x: auto; padding: 1rem; background: var(--wash); font: 0.85rem/1.5 ui-monospace, monospace; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  thead { display: none; }
  table, tbody, tr, .name, td:not(.mark) { display: block; width: auto; padding: 0.1rem 0; }
  tbody tr { padding: 0.4rem 0; }
  .mark { float: left; }
  .name ~ td { padding-left: 1.5rem; }
}
@media print { main { padding: 0; } }
""".strip()


def refuse(path: Path) -> None:
    """Raise ConfigError for a page that could not be written."""
    if path.suffix.lower() not in (".html", ".md"):
        raise ConfigError("the page is written as HTML or as Markdown", where=str(path), fix="name it .html or .md")
    if path.is_dir():
        raise ConfigError("is a folder", where=str(path), fix="choose another --out")
    if not path.parent.is_dir():
        raise ConfigError("there is no such folder", where=f"{path.parent}/", fix="make it, or choose another --out")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError("the folder cannot be written to", where=f"{path.parent}/", fix="choose another --out")


def write_page(report: Report, path: Path) -> None:
    """Write the page, aside and then in its place; a Markdown's pictures before it, as page-learning-rate.svg."""
    if path.suffix.lower() == ".html":
        write_text(path, as_html(report))
        return
    pictures = {}
    for curve in curves(report):
        pictures[curve.name] = path.with_name(f"{path.stem}-{slug(curve.name)}.svg")
        picture([curve], pictures[curve.name], y_label=curve.name)
    write_text(path, as_markdown(report, {name: file.name for name, file in pictures.items()}))


def curves(report: Report) -> Iterator[Curve]:
    """The learning rate over the run, then what the checks measured over steps, as far as it is finite."""
    rate = "learning rate"
    yield from lr_curves({rate: report.run.config}, most=400)
    for result in report.results:
        if result.name == rate:  # the same, without its landmarks
            continue
        points = [(x, y) for x, y in result.curve if math.isfinite(x) and math.isfinite(y)]
        if len(points) > 1:
            yield Curve(result.name, points)


def groups(report: Report) -> list[tuple[str, list[Result]]]:
    """The results under the names of their groups."""
    both = zip(report.checks, report.results, strict=True)
    return [(name, [r for _, r in pairs]) for name, pairs in groupby(both, lambda pair: pair[0].group)]


def story(result: Result) -> dict[str, str]:
    """What a warning or a failure has to say beyond its numbers."""
    parts = {"Diagnosis": result.diagnosis, "Fix": result.fix} if result.verdict in ("warn", "fail") else {}
    return {label: text for label, text in parts.items() if text}


def facts(report: Report) -> dict[str, str]:
    """Where and with what it was checked."""
    return {
        "Device": report.run.runtime.summary,
        "Versions": f"tinyllm {__version__}, Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"NumPy {np.__version__}",
        "System": platform.platform(),
        "Data": report.run.data.source,
    }


def headline(report: Report) -> str:
    quick = " of the quick checks" if report.quick else ""
    return f"{summary(report.results)}{quick}, in {report.seconds:.1f} s"


def date(report: Report) -> str:
    return f"{report.when.day} {report.when:%B %Y, %H:%M}"


def slug(name: str) -> str:
    """A name for ids and files."""
    return re.sub(r"\W+", "-", name.lower())


# ---- HTML ----


def as_html(report: Report) -> str:
    """The page, whole and alone."""
    name, text = Path(report.config).name, html.escape
    figures = "".join(f"<figure>\n{svg([c], slug(c.name), y_label=c.name)}</figure>\n" for c in curves(report))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(name)}: {VERDICTS[report.verdict].lower()}</title>
<style>
{STYLE}
</style>
</head>
<body>
<main>
<h1>{text(name)}</h1>
<p class="{report.verdict}">{VERDICTS[report.verdict]}</p>
<p>{text(headline(report))}</p>
<p class="soft"><time datetime="{report.when.isoformat(timespec="seconds")}">{date(report)}</time></p>
<h2>Checks</h2>
{html_table(report)}
<h2>Curves</h2>
{figures}<h2>Where</h2>
{html_list(facts(report))}
<h2>Config</h2>
<details>
<summary>Every value of {text(report.config)}, defaults and recipe included</summary>
<pre>{text(to_toml(report.run.config))}</pre>
</details>
</main>
</body>
</html>
"""


def html_table(report: Report) -> str:
    """A body of rows a group; below a warning or a failure a row with its story."""
    rows = ['<table>\n<thead><tr><td></td><th scope="col">check</th><th scope="col">measured</th>']
    rows.append('<th scope="col">expected</th></tr></thead>')
    for group, results in groups(report):
        rows.append(
            f'<tbody>\n<tr class="group"><td></td><th colspan="3" scope="rowgroup">{html.escape(group)}</th></tr>'
        )
        rows += [html_rows(result) for result in results]
        rows.append("</tbody>")
    return "\n".join([*rows, "</table>"])


def html_rows(result: Result) -> str:
    name, measured, expected = (html.escape(t) for t in (result.name, result.measured, result.expected))
    mark = f'<td class="mark"><span role="img" aria-label="{WORDS[result.verdict]}">{MARKS[result.verdict]}</span></td>'
    cells = f'<th scope="row" class="name">{name}</th><td>{measured}</td><td class="soft">{expected}</td>'
    row = f'<tr class="{result.verdict}">{mark}{cells}</tr>'
    if more := story(result):
        row += f'\n<tr class="story {result.verdict}"><td class="mark"></td><td colspan="3">{html_list(more)}</td></tr>'
    return row


def html_list(parts: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in parts.items()) + "</dl>"


# ---- Markdown ----


def as_markdown(report: Report, pictures: dict[str, str]) -> str:
    """The page, with the pictures' files by the names of their curves."""
    lines = [f"# {md(Path(report.config).name)}", "", f"**{VERDICTS[report.verdict]}**: {headline(report)}.", ""]
    lines += [f"{date(report)}", ""]
    for result in report.results:
        if more := story(result):
            lines += [f"### {MARKS[result.verdict]} {md(result.name)}", ""]
            parts = {"Measured": result.measured, "Expected": result.expected} | more
            lines += [f"- **{label}:** {md(text)}" for label, text in parts.items() if text] + [""]
    lines += ["## Checks", "", "| | check | measured | expected |", "|---|---|---|---|"]
    for group, results in groups(report):
        lines.append(f"| | *{md(group)}* | | |")
        lines += [f"| {MARKS[r.verdict]} | {md(r.name)} | {md(r.measured)} | {md(r.expected)} |" for r in results]
    lines += ["", "## Curves", ""]
    lines += [f"![{md(name)}]({quote(file)})\n" for name, file in pictures.items()]
    lines += ["## Where", "", *(f"- {name}: {md(text)}" for name, text in facts(report).items()), ""]
    config = to_toml(report.run.config)
    fence = "`" * (1 + max(2, *(len(run) for run in re.findall("`*", config))))  # longer than any inside
    lines += ["<details>", "<summary>Config, defaults and recipe included</summary>", ""]
    lines += [f"{fence}toml", config.rstrip(), fence, "", "</details>"]
    return "\n".join(lines) + "\n"


def md(text: str) -> str:
    """The text in one line, as it is: nothing in it is markup."""
    text = re.sub(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;")
