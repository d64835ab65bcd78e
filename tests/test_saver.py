"""Saving in the background: what is copied, what is kept, and what happens when it fails."""

import errno
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinyllm import saver as module
from tinyllm.archive import is_whole
from tinyllm.checkpoint import Checkpoint, load
from tinyllm.errors import RunError
from tinyllm.events import Saved, SaveFailed
from tinyllm.saver import Saver, check_room_for_two

EXAMPLE = Checkpoint(0, 1.5, {}, 9, {"w": torch.zeros(4)}, {"w": {"exp_avg": torch.zeros(4)}}, "{}", {})


def at(step):
    return replace(EXAMPLE, step=step, model={"w": torch.full((4,), float(step))})


def steps(folder):
    """Name to step of all files in the folder; each is whole and holds the weights of its step."""
    found = {path.name: load(path) for path in Path(folder).iterdir()}
    assert all(torch.equal(c.model["w"], torch.full((4,), float(c.step))) for c in found.values())
    return {name: c.step for name, c in found.items()}


def run(folder, keep, saves, best=()):
    with Saver(folder, keep) as saver:
        for step in saves:
            saver.save(at(step))
            if step in best:
                saver.keep_best(at(step))
        return list(saver.finish())


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (1, [10, 30], {"ckpt.pt": 50, "best.pt": 30}),
        (2, [10, 30], {"ckpt.pt": 50, "ckpt-40.pt": 40, "best.pt": 30, "best-10.pt": 10}),
        (2, [50], {"ckpt.pt": 50, "ckpt-40.pt": 40, "best.pt": 50}),
        (
            3,
            [10, 20, 30],
            {"ckpt.pt": 50, "ckpt-40.pt": 40, "ckpt-30.pt": 30, "best.pt": 30, "best-20.pt": 20, "best-10.pt": 10},
        ),
        (99, [], {"ckpt.pt": 50, "ckpt-40.pt": 40, "ckpt-30.pt": 30, "ckpt-20.pt": 20, "ckpt-10.pt": 10}),
    ],
)
def test_what_is_kept(tmp_path, keep, best, kept):
    events = run(tmp_path / "new", keep, [10, 20, 30, 40, 50], best)
    assert steps(tmp_path / "new") == kept
    assert all(isinstance(event, Saved) for event in events)
    assert [event.step for event in events if event.path.name == "ckpt.pt"] == [10, 20, 30, 40, 50]
    assert [event.step for event in events if event.path.name == "best.pt"] == best


def test_a_run_that_goes_on_keeps_on_keeping(tmp_path):
    run(tmp_path, 2, [10, 20], [20])
    run(tmp_path, 2, [30], [30])
    assert steps(tmp_path) == {"ckpt.pt": 30, "ckpt-20.pt": 20, "best.pt": 30, "best-20.pt": 20}
    run(tmp_path, 1, [40])
    assert steps(tmp_path) == {"ckpt.pt": 40, "best.pt": 30, "best-20.pt": 20}, "best is not touched"


def test_the_best_is_the_latest_under_another_name_unless_it_would_be_alone(tmp_path):
    for keep, same in ((2, True), (1, False)):
        folder = tmp_path / str(keep)
        run(folder, keep, [10], [10])
        assert os.path.samefile(folder / "ckpt.pt", folder / "best.pt") is same


def test_without_hard_links_it_is_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    run(tmp_path, 2, [10, 20], [10, 20])
    assert steps(tmp_path) == {"ckpt.pt": 20, "ckpt-10.pt": 10, "best.pt": 20, "best-10.pt": 10}
    assert len({path.stat().st_ino for path in tmp_path.iterdir()}) == 4


def test_training_may_go_on_at_once(tmp_path):
    """What is written is the state at the call, though the tensors change while the thread writes."""
    live = {"w": torch.full((500_000,), 1.0)}
    with Saver(tmp_path, 1) as saver:
        saver.save(replace(EXAMPLE, step=1, model=live, optimizer={"w": {"exp_avg": live["w"]}}))
        live["w"].fill_(2.0)
    held = load(tmp_path / "ckpt.pt")
    assert torch.equal(held.model["w"], torch.full((500_000,), 1.0))
    assert held.optimizer["w"]["exp_avg"].data_ptr() == held.model["w"].data_ptr(), "what was shared still is"


def test_a_damaged_latest_is_not_kept_as_the_one_before(tmp_path):
    run(tmp_path, 2, [10, 20])
    content = bytearray((tmp_path / "ckpt.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "ckpt.pt").write_bytes(content)
    with Saver(tmp_path, 2) as saver:
        assert saver.step is None, "so that it is saved again"
        saver.save(at(30))
    assert steps(tmp_path) == {"ckpt.pt": 30, "ckpt-10.pt": 10}


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_is_told_and_costs_nothing_else(tmp_path, monkeypatch):
    run(tmp_path, 2, [10, 20], [20])
    before = steps(tmp_path)
    with Saver(tmp_path, 2) as saver:
        with monkeypatch.context() as broken:
            broken.setattr(module.archive, "write", full_disk)
            saver.save(at(30))
            (event,) = saver.finish()
            assert event == SaveFailed(30, tmp_path / "ckpt.pt", "cannot save the checkpoint: No space left on device")
            assert (saver.step, saver.failure) == (None, event.reason)
            assert {name: step for name, step in steps(tmp_path).items() if name in before} == before
        saver.save(at(40))
        saver.keep_best(at(40))
        assert [type(event) for event in saver.finish()] == [Saved, Saved]
        assert saver.step == 40
    assert steps(tmp_path) == {"ckpt.pt": 40, "ckpt-20.pt": 20, "best.pt": 40, "best-20.pt": 20}


def test_the_best_is_saved_even_if_the_latest_was_not(tmp_path, monkeypatch):
    with Saver(tmp_path, 2) as saver:
        saver.save(at(10))
        list(saver.finish())
        with monkeypatch.context() as broken:
            broken.setattr(module.archive, "write", full_disk)
            saver.save(at(20))
            assert [type(event) for event in saver.finish()] == [SaveFailed]
        saver.keep_best(at(20))
        assert list(saver.finish()) == [Saved(20, tmp_path / "best.pt")]
    assert steps(tmp_path)["best.pt"] == 20


def test_weights_that_are_not_finite_replace_nothing(tmp_path):
    run(tmp_path, 2, [10])
    bad = torch.tensor([1.0, math.nan])
    for spoiled in ({"model": {"w": bad}}, {"optimizer": {"w": {"m": bad}}}):
        with Saver(tmp_path, 2) as saver:
            saver.save(replace(at(20), **spoiled))
            (event,) = saver.finish()
        assert isinstance(event, SaveFailed)
        assert event.reason in ("not worth saving: w is not finite", "not worth saving: optimizer.w.m is not finite")
    assert steps(tmp_path) == {"ckpt.pt": 10}


def test_a_mistake_of_ours_in_the_thread_is_loud(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "save", lambda *_: 1 / 0)
    with Saver(tmp_path, 2) as saver:
        saver.save(at(10))
        with pytest.raises(ZeroDivisionError):
            list(saver.finish())


def test_no_room(tmp_path, monkeypatch):
    """Nothing is written where it cannot end well."""
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    (event,) = run(tmp_path, 2, [10])
    assert isinstance(event, SaveFailed)
    assert event.reason == "no room for a checkpoint: it takes 1.05 MB, and 1 MB are free"
    assert not [*tmp_path.iterdir()]
    check_room_for_two(tmp_path / "not" / "yet", 500_000)
    with pytest.raises(RunError, match="no room for checkpoints: two take 1 MB, and 1 MB are free"):
        check_room_for_two(tmp_path / "not" / "yet", 500_001)
    assert not [*tmp_path.iterdir()]


def test_what_is_left_is_finished_even_when_the_run_fails(tmp_path):
    def fail():
        with Saver(tmp_path, 2) as saver:
            saver.save(at(10))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert is_whole(tmp_path / "ckpt.pt")
