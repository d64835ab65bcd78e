"""What the README promises: its two lines, its commands, its config."""

import re
import tomllib
from pathlib import Path

import pytest

from tinyllm.cli import app
from tinyllm.config import check

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
    assert config.optim.name == raw["optim"]["name"]


def test_every_room_is_in_the_table():
    files = {path.name for path in (ROOT / "tinyllm").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(re.findall(r"`(\w+\.py)`", README)) - {"train.py"} == files  # nanoGPT's is named too
