"""The process that we are: its standard streams, its cores, what it imports, and the signals that ask it to stop.

open_streams()
with importing():
    from tinyllm.engine import train
with stop_on_signals(note) as stop:
    for event in train(run, state, stop):        # ends by itself, soon after stop() has turned true
        ...
stop.signal                                      # which it was, or 0
"""

import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def open_streams() -> None:
    """Have standard streams that can be used, wherever we were started from."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `tinyllm train >&-`
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show (LANG=C) is no reason to fail
        sys.stdout.reconfigure(errors="replace")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def importing() -> Iterator[None]:
    """While torch is imported no search for garbage, and later none in what it has brought.

    That is a quarter of a million objects, which stay. To look through them takes 0.1 s, and happens on the way, when a
    later module is imported, and now and then in a run.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Interrupted(BaseException):
    """A signal came while nobody asked whether to stop: there is nothing to finish."""


class Stop:
    """Whether a signal has asked to stop. To be called, again and again, by whoever has something to finish."""

    def __init__(self) -> None:
        self.signal = 0
        self.asked = False  # whether somebody asks

    def __call__(self) -> bool:
        self.asked = True
        return bool(self.signal)


@contextmanager
def stop_on_signals(note: Callable[[str], None]) -> Iterator[Stop]:
    """A Stop that the first SIGINT, SIGTERM or SIGHUP turns true; a second one ends the process as usual.

    One that comes before anybody has asked (while torch compiles, for a minute) ends it at once: raises Interrupted.
    One that we were started to ignore, as `nohup` does with SIGHUP, stays ignored.
    """
    stop = Stop()

    def handle(number: int, frame: object) -> None:
        stop.signal = number
        for each, handler in previous.items():
            signal.signal(each, handler)
        if not stop.asked:
            raise Interrupted
        note("stopping: finishing what must be finished, then saving (again to quit at once)")

    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in heeded}
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
