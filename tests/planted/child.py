"""What the process of a planted bug does. It must not know tinyllm before: the edited package is to be imported."""

import os
import sys


def child(folder: str, overrides: tuple[str, ...], skipped: tuple[str, ...], until: tuple[str, ...]) -> None:
    """`tinyllm sanity` as a user types it, with the package in `folder` in place of the installed one.

    Without the `skipped` checks, and without those after the ones in `until`, if any are named there.
    """
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.path.insert(0, folder)
    sys.argv = ["tinyllm", "sanity", "run.toml", "--json"]
    for override in overrides:
        sys.argv += ["--set", override]
    import tinyllm.cli
    from tinyllm.sanity import CHECKS

    assert tinyllm.cli.__file__.startswith(folder), "the installed package, not the edited one"
    names = [check.name for check in CHECKS]
    last = max((names.index(name) for name in until if name in names), default=len(names))
    sys.argv += [f"--skip={name}" for i, name in enumerate(names) if i > last or name in skipped]
    tinyllm.cli.main()
