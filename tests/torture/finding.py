"""What one experiment has shown, and how it is measured."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

NOT_FOR_USERS = re.compile(r"Traceback|Errno")


@dataclass(frozen=True)
class Finding:
    """One experiment: whether all was as it must be, and what was said, or what was not."""

    name: str
    ok: bool
    what: str = ""


def refused(code: int | None, said: str, *words: str) -> str:
    """What is wrong with a command's answer to a user's mistake; '' for one error of one line that has these words."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code != 2:
        return f"exit code {code}: {said[-500:]}"
    if len(errors) != 1:
        return f"{len(errors)} errors: {said[-500:]}"
    if NOT_FOR_USERS.search(said):
        return f"not for users: {said[-500:]}"
    missing = [word for word in words if word not in said]
    return f"does not say {', '.join(missing)}: {said[-500:]}" if missing else ""


def forget_peak() -> None:
    """Have `peak` begin anew."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident(which: str = "VmRSS") -> int:
    """Bytes of memory that this process has (VmRSS), or had at most (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{which}:"):
            return int(line.split()[1]) << 10
    return 0
