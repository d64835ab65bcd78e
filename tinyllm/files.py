"""Small files written whole, renames that last, and folders locked by one process at a time.

    write_text("out/run.toml", text)            # a crash leaves the old file or the new one
    with locked("out") as got:                  # released when the process dies, however it dies
        if got is False: ...                    # somebody else is in there

All of it raises OSError; what that means to the user is for the caller to say.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file aside, sync it, and put it in its place."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            aside.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename inside the folder durable. Windows cannot open folders, and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def locked(folder: str | Path, *, wait: bool = False) -> Iterator[bool | None]:
    """Lock a folder; the system unlocks it when the process dies, however it dies.

    False: somebody else has it locked. None: there are no such locks here (Windows, some network file systems).
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield None
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            got = True
        except BlockingIOError:
            got = False
        except OSError:
            got = None
        yield got
    finally:
        os.close(descriptor)
