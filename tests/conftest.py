"""What several tests need: a little prepared data, and run configs small enough for hundreds of steps a second."""

import signal

import pytest
import torch

from tinyllm.config import DataConfig, RunConfig, check
from tinyllm.engine import Run, open_run
from tinyllm.prepare import Prepared, prepare
from tinyllm.process import SIGNALS

torch.set_num_threads(1)  # tiny matrices: a second thread costs more than it gives


@pytest.fixture(scope="session", autouse=True)
def signals_as_in_a_terminal():
    """A script's `&` ignores SIGINT, `nohup` SIGHUP, and what the tests start would inherit that."""
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session")
def tales(tmp_path_factory) -> DataConfig:
    """A few hundred stories by characters, with marked documents."""
    data = DataConfig(
        source="tales", dir=str(tmp_path_factory.mktemp("tales") / "data"), tokenizer="char", tales_stories=300
    )
    *_, prepared = prepare(data)
    assert isinstance(prepared, Prepared)
    return data


@pytest.fixture
def make_config(tales, tmp_path):
    """A function from overrides (`section.key=value`) to a small RunConfig on the tales, writing into tmp_path."""

    def make(*overrides: str, recipe: str = "gpt2") -> RunConfig:
        base = {
            "data": tales.model_dump(),
            "model": {"recipe": recipe, "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16},
            "schedule": {"warmup_steps": 2},
            "train": {
                "out_dir": str(tmp_path / "out"),
                "max_steps": 20,
                "batch_size": 8,
                "eval_interval": 10,
                "eval_windows": 20,
                "save_interval": 10,
                "log_interval": 1,
            },
            "runtime": {"device": "cpu", "dtype": "float32", "threads": 1},
        }
        return check(base, overrides)

    return make


@pytest.fixture
def make_run(make_config):
    """The same, opened."""

    def make(*overrides: str, recipe: str = "gpt2") -> Run:
        return open_run(make_config(*overrides, recipe=recipe))

    return make
