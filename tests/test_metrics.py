"""The metrics: no line lost, none told twice, and a full disk costs none."""

import json
import math
import os
from pathlib import Path

import pytest

from tinyllm.events import Evaluated, Evaluation, Finished, Note, Saved, Saving, StepDone, Stopped
from tinyllm.metrics import Lines, read, record, trim

EVALUATED = Evaluated(10, Evaluation(2.0, 99, 1.25), Evaluation(3.0, 98, 1.5), is_best=True)
EVENTS = [
    Note("hello"),
    StepDone(10, 2.5, 0.75, 1e-3),
    Saving(10),
    Saved(10, Path("ckpt.pt")),
    EVALUATED,
    StepDone(20, 2.25, 0.5, 1e-4),
    Finished(20, Evaluation(3.0, 98, 1.5), 3.0),
    Stopped(20),
]
ROWS = [
    {"event": "step", "step": 10, "loss": 2.5, "grad_norm": 0.75, "lr": 1e-3},
    {
        "event": "eval",
        "step": 10,
        "train_loss": 2.0,
        "val_loss": 3.0,
        "train_bits_per_byte": 1.25,
        "val_bits_per_byte": 1.5,
    },
    {"event": "step", "step": 20, "loss": 2.25, "grad_norm": 0.5, "lr": 1e-4},
]


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


def test_each_event_passes_and_its_row_is_there_at_once(tmp_path):
    seen = []
    for event in record(EVENTS, str(tmp_path)):
        seen.append(event)
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        expected = sum(isinstance(e, StepDone | Evaluated) for e in seen)
        assert len(rows) == expected, "a kill after this event must not lose it"
    assert seen == EVENTS
    rows = read(str(tmp_path))
    assert without_time(rows) == ROWS
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    assert abs(times[0] - os.stat(tmp_path / "metrics.jsonl").st_mtime) < 60
    list(record(EVENTS[:2], str(tmp_path)))
    assert without_time(read(str(tmp_path))) == [*ROWS, ROWS[0]], "rows are appended"


def test_an_odd_step_says_so_and_stays_json(tmp_path):
    """JSON has no NaN and no infinity."""
    steps = [StepDone(1, math.nan, math.inf, 0.1, skipped=True), StepDone(2, 9.0, 1.0, 0.1, limit=5.0)]
    list(record([*steps, StepDone(3, 4.0, 1.0, 0.1, limit=5.0)], str(tmp_path)))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    rows = without_time(read(str(tmp_path)))
    odd = {"spike": True, "skipped": True}
    assert rows[0] == {"event": "step", "step": 1, "loss": None, "grad_norm": None, "lr": 0.1} | odd
    assert rows[1]["loss"] == 9.0
    assert (rows[1]["spike"], rows[1]["skipped"]) == (True, False)
    assert "spike" not in rows[2]


class FullDisk:
    """A file of `room` more bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self.file.write(content[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 50, 300])
def test_a_full_disk_costs_no_line(tmp_path, monkeypatch, room):
    """Lines wait in memory until there is room, even the half of one that was written; the user is told once."""
    opened, init = [], Lines.__init__

    def on_a_full_disk(lines, path):
        init(lines, path)
        lines.file = FullDisk(lines.file, room)
        opened.append(lines.file)

    monkeypatch.setattr(Lines, "__init__", on_a_full_disk)
    steps, seen = [StepDone(n, 2.5, 0.75, 1e-3) for n in range(1, 21)], []
    for event in record([*steps[:10], Saving(10), *steps[10:]], str(tmp_path)):
        seen.append(event)
        if event == steps[14]:
            opened[0].room = 10_000
    notes = [event for event in seen if isinstance(event, Note)]
    assert len(notes) == 1
    assert "No space left on device" in notes[0].text
    assert [event for event in seen if isinstance(event, StepDone)] == steps
    assert [row["step"] for row in read(str(tmp_path))] == list(range(1, 21))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 20


def test_no_metrics_yet(tmp_path):
    assert read(str(tmp_path)) == []
    trim(str(tmp_path), 5)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("whole", [0, 1, 2])
@pytest.mark.parametrize("torn", [b'{"event": "st', b"{", b"\0" * 40, b'{"event": "step", "loss": "\xe2\x82'])
def test_a_line_torn_by_a_crash(tmp_path, whole, torn):
    """Wherever the crash was: the rows before it are read, and those after the resume too."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in ROWS[:whole]).encode() + torn)
    assert read(str(tmp_path)) == ROWS[:whole]
    trim(str(tmp_path), 20)
    list(record(EVENTS[5:6], str(tmp_path)))
    assert without_time(read(str(tmp_path))) == [*ROWS[:whole], ROWS[2]]
    assert len(path.read_bytes().splitlines()) == whole + 1


def rows_at(*places):
    return [{"event": event, "step": step} for event, step in places]


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (0, []),
        (5, rows_at(("eval", 0))),
        (10, rows_at(("eval", 0), ("step", 10))),  # the checkpoint at 10 is older than the evaluation at 10
        (15, rows_at(("eval", 0), ("step", 10), ("eval", 10))),
        (20, rows_at(("eval", 0), ("step", 10), ("eval", 10), ("step", 20))),
        (99, rows_at(("eval", 0), ("step", 10), ("eval", 10), ("step", 20), ("eval", 20))),
    ],
)
def test_what_is_reported_again_is_forgotten(tmp_path, step, kept):
    rows = rows_at(("eval", 0), ("step", 10), ("eval", 10), ("step", 20), ("eval", 20))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trim(str(tmp_path), step)
    assert read(str(tmp_path)) == kept
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
