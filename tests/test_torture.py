"""Kill it anywhere, as often as you like: the result is the same to the last bit. So with full disks and signals.

At every `just test` a little of each kind; `just torture` does it all.
"""

import os

import pytest
from torture import disk, kills, signals

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals, forks and file systems of POSIX")


@pytest.fixture
def folder(tales, tmp_path):
    """One that has the data already."""
    (tmp_path / "data").symlink_to(tales.dir)
    return tmp_path


def test_a_run_that_is_killed_again_and_again_is_the_run_that_never_was(folder):
    names = ("dropout, accumulation", "muon, modern")
    found = list(kills.kills(8, seed=0, folder=folder, lanes=1, names=names, steps=100))
    assert [killed.lost for killed in found] == [[], []]
    assert sum(len(killed.falls) for killed in found) == 8


@pytest.mark.skipif(bool(disk.why_not()), reason=disk.why_not())
def test_a_disk_that_fails_costs_no_more_than_the_save(folder):
    assert lost(disk.disk(folder, whole=False)) == []


def test_a_signal_stops_a_run_wherever_it_is(folder):
    assert lost(signals.signals(folder, whole=False)) == []


@pytest.mark.slow
def test_a_kill_before_any_change_to_the_folder(folder):
    assert [killed for killed in kills.every_change(folder) if killed.lost] == []


@pytest.mark.slow
def test_a_kill_while_the_data_is_prepared(tmp_path):
    found = list(kills.while_preparing(tmp_path))
    assert found
    assert [killed for killed in found if killed.lost] == []


def lost(findings):
    return [f"{finding.name}: {finding.what}" for finding in findings if not finding.ok]
