"""Curves over the steps of a run, as lines of text for a terminal or as a picture in a file.

    curves = lr_curves({"quickstart": config, "modern": other})
    for line in text_chart(curves, width=80, height=24):
        print("".join(span.text for span in line))
    picture(curves, "lr.png")

Nothing here colours or prints: a line is made of spans, and each span says which curve it belongs to.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from tinyllm.config import RunConfig
from tinyllm.errors import TinyLLMError
from tinyllm.schedule import landmarks, learning_rate

if TYPE_CHECKING:  # the import of matplotlib takes longer than the whole terminal chart may
    from matplotlib.axes import Axes

Kind = Literal["line", "top", "bottom", "point"]
GLYPHS = {"line": "┊|", "top": "▲^", "bottom": "▼v", "point": "●o"}  # with braille dots, and in plain ASCII
KEYS = ("abcdefgh", "*+x#%@=&")  # what tells curves apart without colour: letters on them, or their dots
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a cell's dots, U+2800 to 28FF
COLOURS = ("#3b6fb6", "#d9822b", "#3a9276", "#b8475f", "#7a5ea8", "#8a6d3b", "#5b8fa8", "#6b6b6b")
LR_KINDS: dict[str, Kind] = {
    "end of warmup": "line",
    "peak": "top",
    "minimum": "bottom",
    "last step": "bottom",
}


@dataclass(frozen=True)
class Mark:
    """A point of a curve to mark and name: with a glyph, or for `line` with a vertical line to the axis."""

    kind: Kind
    label: str
    x: float
    y: float


@dataclass(frozen=True)
class Curve:
    """A name, points (step, value) in the order they are joined, and at most one mark of each kind.

    Raises TinyLLMError if there is no point, or one that is not finite.
    """

    name: str
    points: Sequence[tuple[float, float]]
    marks: Sequence[Mark] = ()

    def __post_init__(self) -> None:
        if not self.points:
            raise TinyLLMError("nothing to draw: the curve has no points", where=self.name)
        for x, y in self.everywhere:
            if not (math.isfinite(x) and math.isfinite(y)):
                raise TinyLLMError(f"cannot draw the value {y} at step {x}: not finite", where=self.name)

    @property
    def everywhere(self) -> list[tuple[float, float]]:
        return [*self.points, *((mark.x, mark.y) for mark in self.marks)]


class Span(NamedTuple):
    """A piece of a line of text, and the number of the curve it belongs to; None for axes and titles."""

    text: str
    curve: int | None = None


@dataclass(frozen=True)
class Axis:
    """A range of values, and the labels of the round ones in it."""

    low: float
    high: float
    ticks: dict[float, str]


@dataclass(frozen=True)
class Grid:
    """Cells of text over two axes. A cell holds 2 x 4 braille dots, or in plain ASCII one."""

    x: Axis
    y: Axis
    columns: int
    rows: int
    plain: bool

    def trace(self, *points: tuple[float, float]) -> Iterator[tuple[int, int, int]]:
        """The cell (column, row from the top) and braille bit of each dot on the lines joining the points."""
        across, down = (1, 1) if self.plain else (2, 4)
        last = self.columns * across - 1, self.rows * down - 1
        # Divided first: the reciprocal of a very small range would overflow.
        shares = (
            ((x - self.x.low) / (self.x.high - self.x.low), (self.y.high - y) / (self.y.high - self.y.low))
            for x, y in points
        )
        dots = [(round(right * last[0]), round(below * last[1])) for right, below in shares]
        joined = dots[:1]
        for (x0, y0), (x1, y1) in pairwise(dots):
            n = max(abs(x1 - x0), abs(y1 - y0))
            steps = [k / n for k in range(1, n + 1)]
            joined += [(round(x0 + (x1 - x0) * s), round(y0 + (y1 - y0) * s)) for s in steps]
        for column, row in joined:
            yield column // across, row // down, BRAILLE[row % 4][column % 2]

    def cell(self, x: float, y: float) -> tuple[int, int]:
        column, row, _ = next(self.trace((x, y)))
        return column, row


def lr_curves(configs: Mapping[str, RunConfig], most: int = 2000) -> list[Curve]:
    """The learning rate of each named config over its run, at `most` steps or fewer, landmarks included."""
    curves = []
    for name, config in configs.items():
        marks = [Mark(LR_KINDS[m.name], m.name, m.step, m.rate) for m in landmarks(config)]
        last, stride = config.train.max_steps - 1, -(-config.train.max_steps // (most - 4))
        steps = sorted({*range(0, last, stride), *(int(mark.x) for mark in marks), last})
        curves.append(Curve(name, [(step, learning_rate(step, config)) for step in steps], marks))
    return curves


def axes_of(curves: Sequence[Curve], most_x: int, most_y: int) -> tuple[Axis, Axis]:
    """The axes over all points and marks, with at most that many intervals between ticks.

    The axis of steps ends with the last one, or on the tick just beyond it (2,000 after 1,999). The axis of
    values ends on ticks, and starts at zero unless that would waste more than a third of it.
    """
    if not curves:
        raise TinyLLMError("nothing to draw: there is no curve")
    points = [point for curve in curves for point in curve.everywhere]
    (left, low), (right, high) = map(min, zip(*points, strict=True)), map(max, zip(*points, strict=True))
    right = max(right, left + 1)
    size = max(1.0, tick_size((right - left) / most_x))
    beyond = math.ceil(right / size) * size
    right = beyond if beyond - right < (right - left) / 50 else right
    x = Axis(left, right, tick_labels(left, right, size))
    low = 0.0 if 0 <= low < high / 3 or low == high > 0 else low
    high = high if high - low > 1e-300 else low + 1  # ticks below that have no digits
    size = tick_size((high - low) / most_y)
    low, high = math.floor(low / size + 1e-9) * size, math.ceil(high / size - 1e-9) * size
    return x, Axis(low, high, tick_labels(low, high, size))


def tick_size(least: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below `least`, give or take rounding."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


def tick_labels(low: float, high: float, size: float) -> dict[float, str]:
    """The multiples of `size` from `low` to `high`, with the digits they need: 1.0e-03, 0.25, 1,500."""
    ticks = [k * size for k in range(math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9) + 1)]
    most, least = (math.floor(math.log10(v) + 1e-9) for v in (max(abs(low), abs(high)), size))
    if most < -2:
        return {tick: f"{tick:.{max(1, most - least)}e}" if tick else "0" for tick in ticks}
    return {tick: f"{tick:,.{max(0, -least)}f}" for tick in ticks}


def text_chart(
    curves: Sequence[Curve],
    *,
    title: str = "",
    x_label: str = "step",
    y_label: str = "learning rate",
    width: int = 80,
    height: int = 24,
    encoding: str = "utf-8",
) -> list[list[Span]]:
    """The curves as `height` lines of at most `width` characters, with a legend of the marks' values below.

    Braille dots where `encoding` has them, else ASCII. With less than 40 columns, or too few lines for the
    legend and five lines of curve, the chart is larger than asked. Raises TinyLLMError if there is no curve.
    """
    width, plain = max(width, 40), "?" in "⣿┤▲".encode(encoding, "replace").decode(encoding)
    above, legend = [[Span(text)] for text in (title, y_label) if text], legend_lines(curves, width, plain)
    rows = max(5, height - len(above) - len(legend) - 3)
    x, y = axes_of(curves, width // 14, min(5, rows // 2))
    gutter = max(map(len, y.ticks.values())) + 1
    # Half of the last label of the x axis stands to the right of its tick.
    grid = Grid(x, y, width - gutter - 1 - len(list(x.ticks.values())[-1]) // 2, rows, plain)
    lines = [*above, *plot_lines(curves, grid, gutter), *x_lines(grid, gutter, x_label), *legend]
    return [[Span(t.encode(encoding, "replace").decode(encoding), n) for t, n in line] for line in lines]


def plot_lines(curves: Sequence[Curve], grid: Grid, gutter: int) -> Iterator[list[Span]]:
    """The rows of the grid, with the axis of values on their left."""
    labels = {grid.cell(grid.x.low, value)[1]: label for value, label in grid.y.ticks.items()}
    cells = draw(curves, grid)
    for row in range(grid.rows):
        edge = ("|+" if grid.plain else "│┤")[row in labels]
        drawn = [cells.get((column, row), Span(" ")) for column in range(grid.columns)]
        spans = [Span("".join(s.text for s in same), n) for n, same in groupby(drawn, lambda s: s.curve)]
        yield [Span(f"{labels.get(row, ''):>{gutter - 1}} {edge}"), *spans]


def x_lines(grid: Grid, gutter: int, x_label: str) -> list[list[Span]]:
    """The axis of steps: its frame with ticks, their labels, and its name."""
    corner, dash, tick = "+-+" if grid.plain else "└─┬"
    at = {grid.cell(value, grid.y.low)[0]: label for value, label in grid.x.ticks.items()}
    frame, labels = "".join(tick if column in at else dash for column in range(grid.columns)), ""
    for column, label in at.items():
        labels = labels.ljust(gutter + 1 + column - len(label) // 2) + label
    name = x_label.center(grid.columns).rstrip()
    return [[Span(" " * gutter + corner + frame)], [Span(labels)], [Span(" " * (gutter + 1) + name)]]


def draw(curves: Sequence[Curve], grid: Grid) -> dict[tuple[int, int], Span]:
    """What stands in each cell (column, row) that is not empty: lines under curves, keys, then glyphs."""
    under, dots, cells, over = {}, {}, {}, {}
    for number, curve in enumerate(curves):
        for mark in curve.marks:
            column, row = grid.cell(mark.x, mark.y)
            glyph = Span(GLYPHS[mark.kind][grid.plain], number)
            if mark.kind == "line":
                under |= {(column, r): glyph for r in range(row + 1, grid.rows)}
                row = grid.rows - 1  # its foot stays in sight where the curve covers the rest
            over.setdefault((column, row), glyph)
        for column, row, bit in grid.trace(*curve.points):
            dots[column, row] = dots.get((column, row), 0) | bit
            text = KEYS[1][number % 8] if grid.plain else chr(0x2800 + dots[column, row])
            cells[column, row] = Span(text, number)
    letters = keys(curves, grid) if len(curves) > 1 and not grid.plain else {}
    return under | cells | letters | over


def keys(curves: Sequence[Curve], grid: Grid) -> dict[tuple[int, int], Span]:
    """A letter on each curve, where it is clear of the others."""
    heights = [{column: row for column, row, _ in grid.trace(*curve.points)} for curve in curves]
    found = {}
    for number, own in enumerate(heights):
        wish = grid.columns * (number + 1) // (len(curves) + 1)  # side by side where curves are the same
        others = [height for height in heights if height is not own]
        merits = {}
        for column, row in own.items():
            clear = min(abs(row - other.get(column, 99)) for other in others)
            merits[column] = min(clear, 2), -abs(column - wish)
        best = max(merits, key=merits.__getitem__)
        found[best, own[best]] = Span(KEYS[0][number % 8], number)
    return found


def table(curves: Sequence[Curve], plain: bool) -> list[list[str]]:
    """The legend: a row of titles, then one a curve; a column of names, then one a kind of mark."""
    rows = [[""], *([curve.name] for curve in curves)]
    for kind, glyphs in GLYPHS.items():
        found = [next((mark for mark in curve.marks if mark.kind == kind), None) for curve in curves]
        if titles := dict.fromkeys(mark.label for mark in found if mark):
            title = f"{glyphs[plain]} {' / '.join(titles)}"
            cells = [title, *(f"{number(mark.y)} at {mark.x:,.0f}" if mark else "" for mark in found)]
            rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    return rows


def number(value: float) -> str:
    """A value in three or four digits."""
    return f"{value:.2e}" if 0 < abs(value) < 0.01 else f"{value:.4g}"


def legend_lines(curves: Sequence[Curve], width: int, plain: bool) -> list[list[Span]]:
    """The table in lines of at most `width` characters; where that is too narrow, a line for each mark."""
    (_, *titles), *rows = table(curves, plain)
    letters = [f"{KEYS[plain][n % 8]} " if len(curves) > 1 else "" for n in range(len(curves))]
    names = [letter + row[0] for letter, row in zip(letters, rows, strict=True)]
    widths = [max(map(len, column)) for column in zip(titles, *(row[1:] for row in rows), strict=True)]
    room = width - sum(w + 2 for w in widths)
    if room < 8:
        return [
            [Span(text[:width], n)]
            for n, (name, (_, *values)) in enumerate(zip(names, rows, strict=True))
            for text in [name, *(f"  {t}  {value}" for t, value in zip(titles, values, strict=True) if value)]
        ]
    room = min(room, max(map(len, names), default=0))
    names = [n if len(n) <= room else f"{n[:2]}...{n[5 - room :]}" for n in names]  # a path's end says more
    lines = [
        (name.ljust(room) + "".join(f"  {text:<{w}}" for text, w in zip(row, widths, strict=True))).rstrip()
        for name, row in zip(["", *names], [titles, *(row[1:] for row in rows)], strict=True)
    ]
    return [[Span(line, n if n >= 0 else None)] for n, line in enumerate(lines, -1) if line]


def picture(
    curves: Sequence[Curve],
    path: str | Path,
    *,
    title: str = "",
    x_label: str = "optimizer step",
    y_label: str = "learning rate",
) -> None:
    """Draw the curves, with a legend of names and marks, as a .png (1,350 pixels wide) or an .svg.

    Written aside, then renamed. Raises TinyLLMError for no curve, another suffix, or a file it cannot write.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".png", ".svg"):
        what = f"cannot draw a file that ends in {suffix}" if suffix else "cannot tell the kind of picture"
        raise TinyLLMError(what, where=str(path), fix="name it .png or .svg")
    image, aside = render(curves, suffix[1:], title, x_label, y_label), path.with_name(path.name + ".tmp")
    try:
        aside.write_bytes(image)
        aside.replace(path)
    except OSError as error:
        raise TinyLLMError(f"cannot write the picture: {error.strerror}", where=str(path)) from None
    finally:
        aside.unlink(missing_ok=True)


def svg(
    curves: Sequence[Curve],
    prefix: str,
    *,
    title: str = "",
    x_label: str = "optimizer step",
    y_label: str = "learning rate",
) -> str:
    """The picture without a background, an `<svg>` element to put into a page; all its ids begin with the prefix."""
    text = render(curves, "svg", title, x_label, y_label, transparent=True).decode()
    text = text[text.index("<svg") :]  # without the declarations of a file of its own
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)


def render(
    curves: Sequence[Curve], kind: str, title: str, x_label: str, y_label: str, transparent: bool = False
) -> bytes:
    """The bytes of the picture, "png" or "svg"."""
    x, y = axes_of(curves, 6, 5)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    image = io.BytesIO()
    # Text stays text in an SVG: it can be searched, and weighs less than outlines.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tinyllm"}):
        figure = Figure(figsize=(9, 4.5 + 0.2 * len(curves)), dpi=150, layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        axes.set_title(title, loc="left")
        draw_frame(axes, x, y)
        draw_curves(axes, curves, x, y)
        figure.legend(loc="outside lower left", frameon=False, fontsize=9, labelcolor="#444444")
        none = dict.fromkeys(("Date", "Creator", "Format", "Type")) if kind == "svg" else None
        figure.savefig(image, format=kind, metadata=none, transparent=transparent)
    return image.getvalue()


def draw_frame(axes: "Axes", x: Axis, y: Axis) -> None:
    """A calm frame: light grid, no box, room for the marks' values."""
    axes.set_xticks(list(x.ticks), list(x.ticks.values()))
    axes.set_yticks(list(y.ticks), list(y.ticks.values()))
    axes.set_xlim(x.low - 0.03 * (x.high - x.low), x.high + 0.04 * (x.high - x.low))
    axes.set_ylim(y.low - 0.02 * (y.high - y.low), y.high + 0.09 * (y.high - y.low))
    axes.grid(color="#e8e8e8", linewidth=0.8)
    axes.tick_params(labelcolor="#555555", length=0)
    axes.xaxis.label.set_color("#555555")
    axes.yaxis.label.set_color("#555555")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def draw_curves(axes: "Axes", curves: Sequence[Curve], x: Axis, y: Axis) -> None:
    """The lines, their marks, and the marks' values where no other mark's value already stands."""
    taken: list[tuple[float, float]] = []
    for n, curve in enumerate(curves):
        colour = COLOURS[n % 8]
        marks = [f"{m.label} {number(m.y)} at {m.x:,.0f}" for m in curve.marks]
        label = f"{curve.name}:  {',  '.join(marks)}" if marks else curve.name
        axes.plot(*zip(*curve.points, strict=True), color=colour, linewidth=2, label=label, zorder=3)
        for mark in curve.marks:
            if mark.kind == "line":
                axes.vlines(mark.x, y.low, mark.y, color=colour, linewidth=1, linestyle=":", zorder=2)
                continue
            shape = {"top": "^", "bottom": "v", "point": "o"}[mark.kind]
            axes.plot(mark.x, mark.y, shape, color=colour, markersize=7, markeredgecolor="white", zorder=4)
            across, up = mark.x / (x.high - x.low), mark.y / (y.high - y.low)
            if all(abs(across - a) > 0.1 or abs(up - u) > 0.06 for a, u in taken):  # the size of a label
                taken.append((across, up))
                style = {"color": colour, "fontsize": 9, "ha": "left" if mark.kind == "top" else "center"}
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
                at = {"xytext": (0, 7), "textcoords": "offset points", "zorder": 5}
                axes.annotate(number(mark.y), (mark.x, mark.y), **at, **style, bbox=box)
