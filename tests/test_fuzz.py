"""Anything that can be typed is done, or refused with a message that says what is wrong: some hundred drawn examples.

`benchmarks/torture.py` runs thousands; see `torture/fuzz.py`.
"""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from torture import home as homes
from torture.fuzz import command_cases, config_cases, damage_cases, draw_cases, huge_cases, set_cases
from torture.home import Case, Home

from tinyllm import config, mistakes

few = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with Home(tmp_path_factory.mktemp("home")) as home:
        yield home


def assert_right(outcome):
    assert not outcome.fault, outcome.report()


@settings(few, max_examples=200)
@given(case=config_cases())
def test_configs(home, case):
    assert_right(home.run(case))


@settings(few, max_examples=120)
@given(case=set_cases())
def test_overrides(home, case):
    assert_right(home.run(case))


@settings(few, max_examples=160)
@given(case=command_cases())
def test_command_lines(home, case):
    assert_right(home.run(case))


@settings(few, max_examples=80)
@given(case=damage_cases())
def test_damaged_files(home, case):
    assert_right(home.run(case))


@pytest.mark.parametrize(
    "args",
    [
        ("config", "/dev/zero"),
        ("sanity", "--quick", "--set", "data.tales_stories=9223372036854775807"),
        ("train", "--no-sanity", "--set", "model.n_embd=1000000"),
    ],
)
def test_more_than_a_machine_has(home, args):
    """In a process that has 4 GB; the benchmark tries each number of the config."""
    case = next(case for case in huge_cases() if set(args) <= set(case.args))
    outcome = home.run_apart(case)
    assert_right(outcome)
    assert outcome.refused


def test_the_same_seed_draws_the_same():
    assert draw_cases(5, seed=3) == draw_cases(5, seed=3) != draw_cases(5, seed=4)


# ---- What is wrong is noticed ----

TYPO = Case(("config",), {"run.toml": b"[train]\nmax_stepz = 5\n"}, key="train.max_stepz", line=2)


def raises(error):
    def fails(*args):
        raise error

    return fails


def writes(path):
    (homes.Path("new") / "file").parent.mkdir()
    return "[train]\nmax_stepz = 5"


@pytest.mark.parametrize(
    ("module", "name", "broken", "fault"),
    [
        (mistakes, "unknown_key", raises(KeyError("x")), "traceback"),
        (mistakes, "unknown_key", lambda *args: time.sleep(9), "hang"),
        (mistakes, "key_of", lambda error: "train.?", "unnamed key"),
        (config, "line_of", lambda text, key: 7, "wrong line"),
        (config, "read_text", writes, "written"),
        (config, "read_text", raises(SystemExit(3)), "exit code"),
        (config, "read_text", raises(SystemExit(2)), "no message"),
    ],
)
def test_faults_are_noticed(home, monkeypatch, module, name, broken, fault):
    assert_right(home.run(TYPO))
    monkeypatch.setattr(homes, "LIMIT", 0.2)
    monkeypatch.setattr(module, name, broken)
    assert home.run(TYPO).fault == fault


def test_a_command_that_says_something_else_is_noticed(home, monkeypatch):
    case = Case(("config", "--set", "optim.lr=-1"), then=("train", "--set", "optim.lr=-2"))
    assert home.run(case).fault == "other words"
