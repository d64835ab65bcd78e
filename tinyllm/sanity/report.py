"""What one `tinyllm sanity` found, whole: for programs as JSON here, for people as a page in page.py.

report = Report("run.toml", run, checks, results, quick=False, seconds=21.4, when=datetime.now().astimezone())
json.dumps(report.as_json(), allow_nan=False)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from tinyllm import __version__
from tinyllm.engine import Run
from tinyllm.sanity.result import Check, Result

WORDS = {"pass": "passed", "warn": "to look at", "fail": "failed", "skip": "skipped"}


@dataclass(frozen=True)
class Report:
    """The results of checks, in their order, and what was checked."""

    config: str  # the path as it was given
    run: Run
    checks: tuple[Check, ...]
    results: tuple[Result, ...]
    quick: bool
    seconds: float
    when: datetime

    @property
    def counts(self) -> dict[str, int]:
        return tally(self.results)

    @property
    def verdict(self) -> str:
        """fail, if one check did; else pass."""
        return "fail" if self.counts["fail"] else "pass"

    def as_json(self) -> dict[str, Any]:
        """Plain values that any JSON parser reads: what is not finite is null."""
        return {
            "tinyllm": __version__,
            "config": self.config,
            "quick": self.quick,
            "verdict": self.verdict,
            "counts": self.counts,
            "seconds": self.seconds,
            "results": [row(result) for result in self.results],
        }


def tally(results: Sequence[Result]) -> dict[str, int]:
    """How many there are of each verdict."""
    return {verdict: sum(r.verdict == verdict for r in results) for verdict in WORDS}


def summary(results: Sequence[Result]) -> str:
    """31 passed, 2 to look at, 1 failed, 3 skipped: what there is of them."""
    return ", ".join(f"{count} {WORDS[verdict]}" for verdict, count in tally(results).items() if count)


def row(result: Result) -> dict[str, Any]:
    """A result as JSON, the name first."""
    names = sorted((f.name for f in fields(result)), key=lambda name: name != "name")
    return {name: plain(getattr(result, name)) for name in names}


def plain(value: Any) -> Any:
    """The value in the types that JSON has."""
    if hasattr(value, "tolist"):  # NumPy's and torch's
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
