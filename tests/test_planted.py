"""Each planted bug is found, and the check whose business it is says so first.

At every `just test` the first bug of each check is planted, and no check after that is made; `just bugs` does it all.
"""

import ast
import shutil
from pathlib import Path

import pytest
from planted.bug import MY_MODEL, PACKAGE, edited
from planted.bugs import BUGS
from planted.harness import BASE, CUSTOM, SKIPPED, first_finding, run, run_bug

from tinyllm.sanity import CHECKS

NAMES = ("refused", *(check.name for check in CHECKS))


def first_of_each():
    """The first bug for each check, or for several that could rightly claim it."""
    return {bug.name for bug in {bug.caught_by[0]: bug for bug in reversed(BUGS) if not bug.missed}.values()}


def marked(bug):
    marks = [] if bug.name in first_of_each() else [pytest.mark.slow]
    if bug.missed:
        marks.append(pytest.mark.xfail(reason=bug.missed, strict=False))
    return pytest.param(bug, id=bug.name, marks=marks)


@pytest.mark.parametrize("bug", [marked(bug) for bug in BUGS])
def test_the_right_check_finds_it_first(bug, tales, tmp_path):
    outcome = run_bug(bug, tmp_path, Path(tales.dir), whole=False)
    first = first_finding(bug, outcome)
    assert first in bug.caught_by, f"{first}: {outcome.said(first)}"


@pytest.mark.parametrize("own", [{}, CUSTOM], ids=["built-in", "my_model.py"])
def test_the_healthy_base_passes(own, tales, tmp_path):
    """Without a warning; so what a bug fails, it fails for what was planted."""
    shutil.copytree(tales.dir, tmp_path / "data")
    outcome = run((), BASE | own, (), tmp_path)
    assert outcome.fired() == [], [outcome.said(name) for name in outcome.fired()]
    assert [result["name"] for result in outcome.results] == [name for name in NAMES[1:] if name not in SKIPPED]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_it_can_be_planted(bug):
    """Each text that it replaces is there as often as it says, and what comes out is Python, and not what went in."""
    texts = {}
    for edit in bug.edits:
        texts[edit.file] = edited(texts.get(edit.file) or edit.original.read_text(encoding="utf-8"), edit)
    for name, text in texts.items():
        original = (MY_MODEL if name == MY_MODEL.name else PACKAGE / name).read_text(encoding="utf-8")
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(original))
    assert texts or bug.set or bug.damage


def test_the_names_are_those_of_checks():
    assert {name for bug in BUGS for name in bug.caught_by} <= set(NAMES)
    assert len({bug.name for bug in BUGS}) == len(BUGS)


def test_every_check_has_a_bug_that_it_finds():
    """But for those that add up costs (see test_cost.py) or take a compiler (see test_runtime.py)."""
    unproven = {check.name for check in CHECKS} - {name for bug in BUGS for name in bug.caught_by}
    assert unproven <= {*SKIPPED, "size", "disk", "compile"}
