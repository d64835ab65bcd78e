"""What the README promises: its two lines, its commands, its config."""

import re
import tomllib
from pathlib import Path

import pytest

from tinyllm.cli import app
from tinyllm.config import check, to_dict
from tinyllm.engine import new_state, open_run, train
from tinyllm.events import Evaluated

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_second_line():
    first, second = (block.strip() for block in blocks("sh")[:2])
    assert first.endswith("just quickstart")
    assert second.endswith("just test")
    assert second in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_recipes_of_the_two_lines_exist():
    recipes = re.findall(r"^([\w-]+)[^:=\n]*:(?!=)", (ROOT / "Justfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"quickstart", "test"} <= set(recipes)


def test_commands_exist_and_all_are_shown():
    in_blocks = re.findall(r"^tinyllm ([a-z-]+)", "".join(blocks("sh")), re.MULTILINE)
    shown = {*in_blocks, *re.findall(r"`tinyllm ([a-z-]+)", README)}
    assert shown <= COMMANDS
    assert COMMANDS - shown <= {"eval"}


@pytest.mark.parametrize("text", blocks("toml"))
def test_configs_are_valid(text: str):
    raw = tomllib.loads(text)
    config = check(raw, text=text)
    assert all(to_dict(config)[section][key] == value for section, table in raw.items() for key, value in table.items())


def test_every_room_is_in_the_table():
    files = {path.name for path in (ROOT / "tinyllm").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(re.findall(r"`(\w+\.py)`", README)) - {"train.py"} == files  # nanoGPT's is named too


def test_its_model_learns(make_config, tmp_path, monkeypatch):
    """The two blocks of "Your own model", together."""
    (text,) = blocks("python")
    (named,) = (block for block in blocks("toml") if "class =" in block)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model.py").write_text(text, encoding="utf-8")
    overrides = [f"model.{key}={value}" for key, value in tomllib.loads(named)["model"].items()]
    run = open_run(make_config(*overrides))
    first, *_, last = (event for event in train(run, new_state(run)) if isinstance(event, Evaluated))
    assert last.val.loss < first.val.loss - 0.1
