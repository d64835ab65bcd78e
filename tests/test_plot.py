"""The chart lights the cells it should and keeps to its size; the picture is the picture."""

import math
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from tinyllm.config import RunConfig, check
from tinyllm.errors import TinyLLMError
from tinyllm.plot import Curve, Mark, axes_of, lr_curves, number, picture, text_chart
from tinyllm.schedule import landmarks, learning_rate

RISING = Curve("rising", [(0, 0), (100, 10)])
FALLING = Curve("falling", [(0, 10), (100, 0)], [Mark("point", "half", 50, 5)])


def config(steps: int = 2000, **schedule: int | str) -> RunConfig:
    return check({"train": {"max_steps": steps}, "schedule": schedule})


FOUR = {
    "quickstart": config(),
    "linear": config(kind="linear", warmup_steps=300),
    "runs/of/mine/with/a/long/path.toml": config(600_000, warmup_steps=2000),
    "flat": config(kind="constant", warmup_steps=0),
}


def text(curves: list[Curve], **options) -> list[str]:
    return ["".join(span.text for span in line) for line in text_chart(curves, **options)]


def plot_area(lines: list[str], edges: str = "│┤") -> list[str]:
    """What is right of the axis of values."""
    gutter = min(line.find(edges[0]) for line in lines if edges[0] in line)
    return [line[gutter + 1 :] for line in lines if line[gutter : gutter + 1] in tuple(edges)]


def test_a_horizontal_line_lights_the_top_dots_only() -> None:
    area = plot_area(text([Curve("flat", [(0, 10), (100, 10)])], y_label=""))
    assert set(area[0]) == {"⠉"}  # 2809: both dots of the highest of the four rows
    assert set("".join(area[1:])) <= {" "}


def test_a_diagonal_runs_from_corner_to_corner() -> None:
    area = plot_area(text([RISING], y_label=""))
    assert area[-1][0] != " "
    assert ord(area[-1][0]) & 0x40
    assert area[0][-1] != " "
    assert ord(area[0][-1]) & 0x08
    first = [len(row) - len(row.lstrip()) for row in area]
    assert first == sorted(first, reverse=True)
    assert all(any(row[column : column + 1].strip() for row in area) for column in range(len(area[0])))


def test_ascii_where_the_encoding_has_no_braille() -> None:
    lines = text([RISING, FALLING], encoding="cp1252", y_label="")
    assert "\n".join(lines).isascii()
    area = plot_area(lines, "|+")[:-1]  # the last is the frame below
    assert (area[0][0], area[0][-1], area[-1][0], area[-1][-1]) == ("+", "*", "*", "+")
    assert lines[-3:] == ["           o half", "* rising", "+ falling  5 at 50"]


def test_names_that_cannot_be_encoded_do_not_fail() -> None:
    assert text([Curve("größe", [(0, 1), (1, 2)])], encoding="ascii")[-1] == "gr??e"


def test_every_cell_says_whose_it_is() -> None:
    lines = text_chart([RISING, FALLING], y_label="")
    top = [span for span in lines[0] if span.text.strip()]
    assert [span.curve for span in top] == [None, 1, 0]  # the axis, the start of one, the end of the other
    drawn = [span for line in lines[:-3] for span in line if span.curve is not None]
    keys = [(span.curve, letter) for span in drawn for letter in span.text if letter in "ab"]
    assert sorted(keys) == [(0, "a"), (1, "b")]
    assert [(line[0].text.strip(), line[0].curve) for line in lines[-3:]] == [
        ("● half", None),
        ("a rising", 0),
        ("b falling  5 at 50", 1),
    ]


def test_the_marks_are_where_the_landmarks_are() -> None:
    """1 column is about 2,000 / 70 steps: the warmup ends in the fourth, the minimum is in the last."""
    lines = text(lr_curves({"quickstart": config()}))
    area = plot_area(lines)
    assert area[0].index("▲") == 3
    assert {row.find("┊") for row in area} == {-1, 3}
    assert area[-1][3] == "┊"
    (lowest,) = (i for i, row in enumerate(area) if row.endswith("▼"))
    assert lowest == round(0.9 * (4 * len(area) - 1)) // 4  # a tenth of the peak, in rows of four dots
    assert lines[-2].split("  ")[-1] == "▼ minimum"
    assert "┊ end of warmup  ▲ peak " in lines[-2]
    assert lines[-1] == "quickstart  1.00e-03 at 100  1.00e-03 at 99  1.00e-04 at 1,999"


def test_the_axes_have_round_labels() -> None:
    lines = text(lr_curves({"quickstart": config()}))
    labels = [line.split("┤")[0].strip() for line in lines if "┤" in line]
    assert labels == ["1.0e-03", "8.0e-04", "6.0e-04", "4.0e-04", "2.0e-04", "0"]
    frame = next(i for i, line in enumerate(lines) if "└" in line)
    assert lines[frame + 1].split() == ["0", "500", "1,000", "1,500", "2,000"]
    zero = lines[frame].index("┬")
    assert lines[frame + 1][zero] == "0"
    assert lines[0] == "learning rate"
    assert lines[frame + 2].strip() == "step"


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 1e-3], ["0", "2.0e-04", "4.0e-04", "6.0e-04", "8.0e-04", "1.0e-03"]),
        ([1.00e-3, 1.04e-3], ["1.00e-03", "1.01e-03", "1.02e-03", "1.03e-03", "1.04e-03"]),
        ([3e-4, 3e-4], ["0", "1.0e-04", "2.0e-04", "3.0e-04"]),
        ([0.1, 10.8], ["0", "5", "10", "15"]),
        ([1.2, 1.5], ["1.2", "1.3", "1.4", "1.5"]),
        ([-3.0, 1.0], ["-3", "-2", "-1", "0", "1"]),
        ([0.0, 0.0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0, 2_000_000], ["0", "500,000", "1,000,000", "1,500,000", "2,000,000"]),
    ],
)
def test_ticks_of_values(values: list[float], labels: list[str]) -> None:
    _, y = axes_of([Curve("c", list(enumerate(values)))], 5, 5)
    assert list(y.ticks.values()) == labels
    assert y.low <= min(values) + 1e-12
    assert y.high >= max(values) - 1e-12


@pytest.mark.parametrize(("last", "high"), [(0, 1), (3, 3), (1999, 2000), (1900, 1900), (599_999, 600_000)])
def test_the_axis_of_steps_ends_with_them(last: int, high: int) -> None:
    x, _ = axes_of([Curve("c", [(0, 1), (last, 2)])], 5, 5)
    assert (x.low, x.high) == (0, high)
    assert all(tick == int(tick) <= high for tick in x.ticks)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_keeps_to_its_size(width: int, encoding: str, count: int) -> None:
    lines = text(lr_curves(dict(list(FOUR.items())[:count])), width=width, encoding=encoding)
    assert max(map(len, lines)) <= width
    assert max(map(len, lines)) > width - 4 or width > 80  # and uses it
    if width >= 80:
        assert len(lines) == 24
        for c, line in zip(FOUR.values(), lines[-count:], strict=False):  # every value of every mark, uncut
            assert all(f"{number(mark.rate)} at {mark.step:,}" in line for mark in landmarks(c))


def test_a_long_name_keeps_its_end() -> None:
    lines = text(lr_curves(FOUR))
    assert lines[-2].startswith("c ...")
    assert lines[-2].split("  ")[0].endswith("path.toml")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20), min_size=1, max_size=4),
    st.integers(40, 200),
)
@example([[0.0, 5e-324], [0.0, 1e-310]], 80)
def test_any_finite_curves(values: list[list[float]], width: int) -> None:
    """No values make a line too long or lose a curve altogether."""
    lines = text_chart([Curve(f"c{i}", list(enumerate(v))) for i, v in enumerate(values)], width=width)
    assert max(sum(len(span.text) for span in line) for line in lines) <= width
    assert len(lines) == 24
    assert {span.curve for line in lines[-len(values) :] for span in line} == set(range(len(values)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(TinyLLMError, match="at step 7: not finite"):
        Curve("loss", [(0, 1.0), (7, bad)])
    with pytest.raises(TinyLLMError, match="not finite"):
        Curve("loss", [(0, 1.0)], [Mark("point", "best", 7, bad)])


def test_refuses_nothing() -> None:
    with pytest.raises(TinyLLMError, match="no points"):
        Curve("loss", [])
    with pytest.raises(TinyLLMError, match="no curve"):
        text_chart([])
    with pytest.raises(TinyLLMError, match="no curve"):
        picture([], "lr.png")


@pytest.mark.parametrize("steps", [1, 2, 1996, 1997, 2000, 2001, 600_000])
def test_lr_curves_sample_the_schedule(steps: int) -> None:
    c = config(steps, kind="constant", warmup_steps=7)
    (curve,) = lr_curves({"run": c})
    at = [step for step, _ in curve.points]
    assert at == sorted(set(at))
    assert at[0] == 0
    assert at[-1] == steps - 1
    assert len(at) == steps if steps < 1997 else len(at) <= 2000
    assert all(value == learning_rate(step, c) for step, value in curve.points)
    assert {mark.step for mark in landmarks(c)} <= set(at)
    assert [(m.label, m.x, m.y) for m in curve.marks] == [(m.name, m.step, m.rate) for m in landmarks(c)]


def test_png(tmp_path: Path) -> None:
    path = tmp_path / "lr.PNG"
    others = {"short": config(1500, warmup_steps=0), "flat": FOUR["flat"], "linear": FOUR["linear"]}
    picture(lr_curves({"quickstart": config()} | others), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(path, format="png")
    assert pixels.shape[:2] == (795, 1350)
    for colour in ("3b6fb6", "d9822b", "3a9276", "b8475f"):  # every curve is there
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        assert (abs(pixels[:, :, :3] - rgb).max(axis=2) < 0.01).sum() > 300, colour
    assert os.listdir(tmp_path) == ["lr.PNG"]


def test_svg_says_everything_as_text(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        picture(lr_curves(FOUR), tmp_path / name, title="Rates", x_label="step of <run>", y_label="rate")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    words = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Rates", "step of <run>", "rate", "200,000", "1.0e-03", "1.00e-04"} <= set(words)
    for name in FOUR:
        assert any(word.startswith(f"{name}:") and "peak 1.00e-03 at" in word for word in words)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("name", ["lr.jpg", "lr", "lr.png.txt"])
def test_refuses_other_suffixes(tmp_path: Path, name: str) -> None:
    with pytest.raises(TinyLLMError) as caught:
        picture([RISING], tmp_path / name)
    assert ".png or .svg" in str(caught.value)
    assert name in str(caught.value)
    assert not os.listdir(tmp_path)


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(TinyLLMError, match="cannot write the picture: No such file or directory"):
        picture([RISING], tmp_path / "missing" / "lr.png")
    (tmp_path / "lr.png").mkdir()  # a folder in its place: the rename fails, and what was aside is gone
    with pytest.raises(TinyLLMError, match="cannot write the picture"):
        picture([RISING], tmp_path / "lr.png")
    assert os.listdir(tmp_path) == ["lr.png"]


def test_the_chart_imports_nothing_slow() -> None:
    code = (
        "import sys; from tinyllm.config import check; from tinyllm.plot import lr_curves, text_chart;"
        "text_chart(lr_curves({'run': check({})}));"
        "print(*{'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
