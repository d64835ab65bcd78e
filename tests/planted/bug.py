"""What a bug is, and how it is planted.

A bug is written as people make it: a line of the source that reads otherwise, a number in the config, a damaged file.
The right line is looked for in the source as it is now, so that no refactoring disarms a bug without anybody noticing.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import tinyllm

PACKAGE = Path(tinyllm.__file__).parent
MY_MODEL = Path(__file__).with_name("my_model.py")


@dataclass(frozen=True)
class Edit:
    """A text replaced in a file of the package, or in my_model.py."""

    file: str
    old: str
    new: str
    times: int = 1  # how often `old` occurs

    @property
    def original(self) -> Path:
        return MY_MODEL if self.file == MY_MODEL.name else PACKAGE / self.file


@dataclass(frozen=True)
class Bug:
    """A mistake, and who should find it."""

    name: str
    what: str  # what people do
    caught_by: tuple[str, ...]  # any of these checks, before all others; `refused`: the run does not even start
    edits: tuple[Edit, ...] = ()
    set: tuple[str, ...] = ()  # overrides of the run config
    damage: Callable[[Path], None] | None = None  # does something to the folder of prepared data
    warns: bool = False  # unwise rather than wrong: a warning is enough
    prepares: bool = False  # the bug is in what makes the data, so the buggy program makes it itself
    missed: str = ""  # why no check can be expected to find it; nothing if one must

    @property
    def custom(self) -> bool:
        """Whether it is in a model of the user's own."""
        return any(edit.file == MY_MODEL.name for edit in self.edits)


def bug(name: str, what: str, caught_by: str | tuple[str, ...], *edits: tuple, **more) -> Bug:
    """A Bug, with less to write."""
    names = (caught_by,) if isinstance(caught_by, str) else caught_by
    return Bug(name, what, names, tuple(Edit(*edit) for edit in edits), **more)


def plant(edits: Iterable[Edit], folder: Path) -> None:
    """Copy the package and my_model.py into `folder`, with the edits made."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("examples"))
    shutil.copy(MY_MODEL, folder)
    for edit in edits:
        path = folder / (edit.file if edit.file == MY_MODEL.name else f"{PACKAGE.name}/{edit.file}")
        path.write_text(edited(path.read_text(encoding="utf-8"), edit), encoding="utf-8")


def edited(text: str, edit: Edit) -> str:
    found = text.count(edit.old)
    assert found == edit.times, f"{edit.file} has {found} times, not {edit.times}: {edit.old!r}"
    return text.replace(edit.old, edit.new)
