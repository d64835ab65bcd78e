"""What a check is, and what it says.

A check is a small function from a Subject to a Result: it measures one property through the real engine and compares
it with what it must be, computed independently. It changes nothing but copies of its own.
"""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tinyllm.sanity.subject import Subject

Verdict = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True)
class Result:
    """What a check found."""

    verdict: Verdict
    measured: str  # what was seen; for a skip, why there was nothing to see
    expected: str = ""
    diagnosis: str = ""  # what that means, for a warning or a failure
    fix: str = ""  # what to do about it, in the user's terms
    values: Mapping[str, Any] = field(default_factory=dict)  # the numbers behind `measured`, for programs
    curve: tuple[tuple[float, float], ...] = ()  # (step, value) of what was measured over steps, for the page
    name: str = ""  # of the check; set by `sanity`
    seconds: float = 0.0  # that it took; set by `sanity`


@dataclass(frozen=True)
class Check:
    """A named check."""

    name: str
    catches: str  # the mistakes it is there for, in a few words
    function: "Callable[[Subject], Result]"
    quick: bool = True  # whether it is cheap enough for `--quick` and for the start of every training

    @property
    def group(self) -> str:
        """The file that it is written in, which is the heading that it stands under."""
        return self.function.__module__.rpartition(".")[2]


def passed(measured: str, expected: str = "", **more: Any) -> Result:
    return Result("pass", measured, expected, **more)


def skipped(why: str) -> Result:
    return Result("skip", why)


def warned(measured: str, expected: str, diagnosis: str, fix: str, **more: Any) -> Result:
    return Result("warn", measured, expected, diagnosis, fix, **more)


def failed(measured: str, expected: str, diagnosis: str, fix: str, **more: Any) -> Result:
    return Result("fail", measured, expected, diagnosis, fix, **more)


def raised(error: Exception) -> tuple[str, str]:
    """What an error says, in one line, and the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:200]
    return what, f"{place.filename}, line {place.lineno}"


def listed(names: list[str], most: int = 3) -> str:
    """A few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
