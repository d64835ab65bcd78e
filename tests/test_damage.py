"""What is damaged, made by a stranger or gone wrong is refused in a sentence, and costs nothing that was saved.

At every `just test` a little of each kind; `just torture` does it all.
"""

import os
from pathlib import Path

import pytest
from torture.damage import damage
from torture.hostile import hostile
from torture.numbers import numbers

from tinyllm.sanity import data as checks
from tinyllm.sanity.subject import Subject

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and limits of POSIX")


def lost(findings):
    found = list(findings)
    assert found
    return [f"{finding.name}: {finding.what}" for finding in found if not finding.ok]


def test_a_damaged_file_is_refused_and_the_one_before_it_taken(tmp_path):
    assert lost(damage(200, seed=0, folder=tmp_path, whole=False)) == []


def test_a_strangers_checkpoint_does_nothing_but_be_refused(tmp_path):
    assert lost(hostile(tmp_path, whole=False)) == []


def test_a_number_that_goes_wrong_stops_the_run_before_it_is_taken(tmp_path):
    assert lost(numbers(tmp_path, whole=False)) == []


def test_ids_that_nobody_has_read_are_read_by_the_sanity_checks(make_run):
    """Of a large file nobody reads all ids when it is opened."""
    run = make_run()
    path = Path(run.data.dir) / "val.bin"
    whole = path.read_bytes()
    assert checks.as_prepared(Subject(run)).verdict == "pass"
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        found = checks.as_prepared(Subject(run))
    finally:
        path.write_bytes(whole)
    assert (found.verdict, found.measured) == ("fail", "another SHA-256")
    assert "val.bin" in found.diagnosis


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_two_thousand_damaged_files(tmp_path, seed):
    assert lost(damage(2000, seed=seed, folder=tmp_path)) == []


@pytest.mark.slow
def test_every_hostile_file_for_every_command(tmp_path):
    assert lost(hostile(tmp_path)) == []


@pytest.mark.slow
def test_every_number_that_can_go_wrong(tmp_path):
    assert lost(numbers(tmp_path)) == []
