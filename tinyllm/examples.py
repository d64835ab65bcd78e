"""The ready-made run configs: `examples/*.toml` in the repository, and a copy inside the installed package.

    for example in examples():
        print(example.name, example.summary)
    text = read_example("quickstart")

They are found in either place, so that a pip-installed user and a reader of the repository have the same.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import ConfigError

PACKAGED = Path(__file__).parent / "examples"  # in a wheel
SOURCE = Path(__file__).parent.parent / "examples"  # in a checkout


@dataclass(frozen=True)
class Example:
    """A run config that ships with tinyllm."""

    name: str
    path: Path
    summary: str  # its first comment line


def examples() -> list[Example]:
    """All of them, by name."""
    folder = PACKAGED if PACKAGED.is_dir() else SOURCE
    return [Example(path.stem, path, first_comment(path)) for path in sorted(folder.glob("*.toml"))]


def read_example(name: str) -> str:
    """The text of an example. Raises ConfigError for a name that is none, with the nearest that is."""
    known = {example.name: example for example in examples()}
    if name in known:
        return known[name].path.read_text(encoding="utf-8")
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise ConfigError(f"no example called {name!r}", fix=hint)


def first_comment(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip(" .\n")
