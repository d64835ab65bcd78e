"""Downloads into the cache, and slow work that tells how far it is.

    path = fetch("https://example.org/stories.txt", "stories.txt")      # the cache's file, downloaded if need be
    path = yield from watched("downloading", lambda meter: fetch(url, name, meter=meter))       # yields Progress

Work runs in a thread of its own; a Meter is what the two sides share.
"""

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from tinyllm.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far a stage is, in bytes of text. `total` is 0 while it is not known."""

    stage: str
    done: int
    total: int


class Stopped(Exception):
    """Raised in a worker that was asked to stop."""


@dataclass
class Meter:
    """How far a worker is, in bytes: read by one thread, moved by another, which stops when told to.

    Its methods are those of the progress bar that pooch wants.
    """

    done: int = 0
    total: int = 0  # 0: not known
    stopped: bool = False

    def update(self, n: int) -> None:
        self.done += n
        if self.stopped:
            raise Stopped

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        pass


def watched(stage: str, work: Callable[[Meter], T]) -> Generator[Progress, None, T]:
    """Do `work` in a thread and report how far it is. It is told to stop when nobody listens any more."""
    meter = Meter()
    with ThreadPoolExecutor(1, "tinyllm-prepare") as pool:
        future = pool.submit(work, meter)
        try:
            while wait([future], timeout=0.1).not_done:
                yield Progress(stage, meter.done, meter.total)
            return future.result()
        finally:
            meter.stopped = True


def cache_path(name: str) -> Path:
    """Where a download is kept: in TINYLLM_CACHE, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("TINYLLM_CACHE") or platformdirs.user_cache_dir("tinyllm")) / name


def fetch(url: str, name: str, sha256: str | None = None, *, mirror: bool = True, meter: Meter | None = None) -> Path:
    """The file of this name in the cache, downloaded when it is not there or has another checksum.

    With `mirror`, the environment variable TINYLLM_MIRROR replaces the URL's host. Raises DataError.
    """
    path = cache_path(name)
    base = os.environ.get("TINYLLM_MIRROR", "").rstrip("/") if mirror else ""
    url = base + urlsplit(url).path if base else url
    import pooch
    import requests

    pooch.get_logger().setLevel("ERROR")  # it would write to the terminal
    # Not compressed on the way: what arrives can then be compared with Content-Length.
    web = pooch.HTTPDownloader(
        progressbar=meter or Meter(), chunk_size=1 << 16, headers={"Accept-Encoding": "identity"}
    )
    known = f"sha256:{sha256}" if sha256 else None
    try:
        return Path(pooch.retrieve(url, known, path.name, path.parent, downloader=web))
    except (requests.RequestException, OSError) as error:
        # Its own text goes on for lines; the subclasses (a proxy, a certificate) have something to say.
        offline = type(error) is requests.ConnectionError
        problem = f"download failed: {f'no connection to {urlsplit(url).netloc}' if offline else error}"
    except ValueError:
        problem = f"the download is not the file it should be: its SHA-256 is not {sha256}"
    by_hand = f"put the file at {path} by hand" + (f" (SHA-256 {sha256})" if sha256 else "")
    raise DataError(problem, where=url, fix=f"check the connection, or {by_hand}")
