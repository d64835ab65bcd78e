"""Healthy runs of all kinds fail no check. A handful at every `just test`, all of them in `just bugs`."""

import pytest
from planted.healthy import FEW, RUNS, run_healthy


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize(
    "item", [pytest.param(r, id=r.name, marks=[] if r.name in FEW else [pytest.mark.slow]) for r in RUNS]
)
def test_nothing_fails(item, zoo):
    outcome = run_healthy(item, zoo)
    assert outcome.failed() == [], [outcome.said(name) for name in outcome.failed()]


def test_the_zoo_is_large():
    assert len(RUNS) >= 60
    assert len({run.name for run in RUNS}) == len(RUNS)
    assert set(FEW) <= {run.name for run in RUNS}
