"""The ready-made run configs: `examples/*.toml` in the repository, and a copy inside the installed package.

    for example in examples():
        print(example.name, example.summary)
    text = read_example("quickstart")
    files = example_files("my-model", Path("run.toml"))    # run.toml and the my_model.py that it names: path to text

They are found in either place, so that a pip-installed user and a reader of the repository have the same.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from tinyllm.errors import ConfigError, typed

PACKAGED = Path(__file__).parent / "examples"  # in a wheel
SOURCE = Path(__file__).parent.parent / "examples"  # in a checkout


@dataclass(frozen=True)
class Example:
    """A run config that ships with tinyllm."""

    name: str
    path: Path
    summary: str  # its first comment line

    @property
    def model(self) -> Path | None:
        """The file of its model's class, if it brings one: my-model.toml has my_model.py."""
        path = self.path.with_name(self.name.replace("-", "_") + ".py")
        return path if path.is_file() else None


def examples() -> list[Example]:
    """All of them, by name."""
    folder = PACKAGED if PACKAGED.is_dir() else SOURCE
    return [Example(path.stem, path, first_comment(path)) for path in sorted(folder.glob("*.toml"))]


def find_example(name: str) -> Example:
    """The example of this name. Raises ConfigError for a name that is none, with the nearest that is."""
    known = {example.name: example for example in examples()}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    raise ConfigError(f"no example called {name!r}", fix=hint)


def read_example(name: str) -> str:
    """The text of an example. Raises ConfigError for a name that is none."""
    return find_example(name).path.read_text(encoding="utf-8")


def example_files(name: str, out: Path) -> dict[Path, str]:
    """What to write for an example, path to text: its config as `out` and, beside it, the file of its model."""
    example, text = find_example(name), read_example(name)
    if str(out).isprintable():  # or it would end the comment that its name is in
        text = text.replace(example.path.name, typed(out))
    if out.is_dir():
        raise ConfigError("is a folder", where=str(out), fix=f"name the file, e.g. --out {typed(out / 'run.toml')}")
    if example.model is None:
        return {out: text}
    beside = out.with_name(example.model.name)
    # The config says where that is from here: a relative path starts at the current directory.
    here = Path.cwd().resolve()
    folder = out.resolve().parent
    shown = (folder.relative_to(here) if folder.is_relative_to(here) else folder) / beside.name
    named = json.dumps(shown.as_posix(), ensure_ascii=False).strip('"')
    text = text.replace(f'class = "{beside.name}:', f'class = "{named}:')
    return {out: text, beside: example.model.read_text(encoding="utf-8")}


def first_comment(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.readline().lstrip("# ").rstrip(" .\n")
