"""What a process does to itself before it becomes a tinyllm (see `server.py`): plan its death, or fill its disk."""

import ctypes
import errno
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

CHANGES = {"open": 1, "os.rename": 2, "os.remove": 1, "os.link": 2, "shutil.copyfile": 2, "os.mkdir": 1}


def die_before_change(number: int, folder: str, note: str) -> None:
    """Die, by SIGKILL, right before the `number`-th change to a file of the folder; the note then says which it was."""
    before_change(number, folder, note, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_change(number: int, folder: str, note: str) -> None:
    """Have the `number`-th change to a file of the folder fail, as on a broken disk; the note then says which."""

    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before_change(number, folder, note, fail)


def before_change(number: int, folder: str, note: str, act: Callable[[], None]) -> None:
    lock, left = threading.Lock(), number

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in CHANGES or (event == "open" and not opens_to_write(args)):
            return
        paths = [Path(os.fsdecode(path)).absolute() for path in args[: CHANGES[event]] if not isinstance(path, int)]
        if any(path.parent == Path(folder) for path in paths):
            with lock:
                left -= 1
                now = left == 0
            if now:
                Path(note).write_text(f"{event} {' '.join(path.name for path in paths)}")
                act()

    sys.addaudithook(hook)


def opens_to_write(args: tuple[Any, ...]) -> bool:
    _, mode, flags = args
    return bool(set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR))


def die_after_bytes(size: int) -> None:
    """Die, by the kernel's hand, in the middle of the first write that takes any file beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and gets an error instead


def fill_disk(number: int, folder: str, left: int, checked: bool, note: str) -> None:
    """Have something else take the disk's space, but for `left` bytes, while the `number`-th file is saved.

    `checked`: after tinyllm has looked whether there is room. The note gets a line for each save.
    """
    filler = Filler(folder)
    wrap_saves(note, number, lambda: filler.fill(left), filler.remove, checked)


def limit_files(number: int, size: int, folder: str, note: str) -> None:
    """Let no file grow beyond so many bytes while the `number`-th file is saved, as a quota may."""

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    wrap_saves(note, number, lambda: limit(size), lambda: limit(resource.RLIM_INFINITY), True)


def wrap_saves(note: str, number: int, begin: Callable[[], None], end: Callable[[], None], checked: bool) -> None:
    """Call `begin` and `end` around the `number`-th file that is saved, and note what becomes of each."""
    from tinyllm import saver

    write, check_room, calls = saver.Saver.write, saver.check_room, 0

    def noted(self: Any, name: str, checkpoint: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not checked:
            begin()
        event = write(self, name, checkpoint)
        if calls == number:
            end()
        with open(note, "a") as file:
            print(event.step, name, type(event).__name__, file=file)
        return event

    def seemed(*args: Any) -> None:
        check_room(*args)
        if calls == number and checked:
            begin()

    saver.Saver.write, saver.check_room = noted, seemed


class Filler:
    """A file that takes the space of a small disk."""

    def __init__(self, folder: str) -> None:
        self.folder, self.path = folder, Path(folder) / "filler"

    def fill(self, left: int) -> None:
        with open(self.path, "ab") as file:
            for _ in range(100):  # somebody may take or give back space meanwhile
                found = os.statvfs(self.folder)
                if (size := found.f_bavail * found.f_frsize - left) <= 0:
                    return
                with suppress(OSError):
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def fill_between(first: int, last: int, folder: str) -> None:
    """Have something else take the whole disk from one step to another, and what is freed meanwhile."""
    filler = Filler(folder)
    between(first, last, lambda: filler.fill(0), filler.remove)


def protect_between(first: int, last: int, folder: str) -> None:
    """Take the right to write into the folder away from one step to another."""
    give_up_override()
    between(first, last, lambda: os.chmod(folder, 0o500), lambda: os.chmod(folder, 0o700))


def limit_from(first: int, size: int) -> None:
    """Let no file grow beyond so many bytes from a step on."""
    between(first, -1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)), lambda: None)


def between(first: int, last: int, act: Callable[[], Any], undo: Callable[[], Any]) -> None:
    """Act before each step from `first` on, and undo it before step `last`."""
    from tinyllm import engine

    train_step = engine.train_step

    def step(run: Any, state: Any, *args: Any) -> Any:
        if state.step == last:
            undo()
        elif state.step >= first and (state.step < last or last < 0):
            act()
        return train_step(run, state, *args)

    engine.train_step = step


def give_up_override() -> None:
    """Have the rights of files bind this process too, if it is root: give up CAP_DAC_OVERRIDE and _READ_SEARCH."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)  # the third version of the system call; this thread
    sets = ctypes.create_string_buffer(24)  # effective, permitted, inheritable: of capabilities 0 to 31, then 32 to 63
    assert libc.capget(header, sets) == 0
    low = [value & ~0b110 for value in struct.unpack("III", sets.raw[:12])]
    assert libc.capset(header, struct.pack("III", *low) + sets.raw[12:]) == 0


def signal_at(place: str, number: int, times: int, note: str) -> None:
    """Send this process a signal when it comes to a place for the so many-th time; the note then has the moment."""
    from tinyllm import data, engine, saver

    owner, name = {
        "start": (engine, "new_state"),
        "first moment": (engine, "Saver"),
        "step": (engine, "logits_of"),
        "save": (saver, "save"),
        "evaluation": (engine, "loss_fn"),
        "hanging batch": (data.BatchSource, "batch"),
        "compilation": (engine, "compiled"),
    }[place]
    original, left = getattr(owner, name), times

    def send() -> None:
        Path(note).write_text(str(time.time()))
        os.kill(os.getpid(), number)

    def reached(*args: Any) -> Any:
        nonlocal left
        here = place != "evaluation" or args[2:] == ("sum",)  # it alone adds up
        left -= here
        if left == 0 and here:
            later = {"compilation": 1.0, "hanging batch": 0.5}.get(place)
            if later:
                threading.Timer(later, send).start()
            else:
                send()
        if left <= 0 and place == "hanging batch":
            threading.Event().wait()
        return original(*args)

    setattr(owner, name, reached)
