"""The console script's entry: `tinyllm`, and `python -m tinyllm`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is no error, not even in the moment before there is anybody to catch it."""
    try:
        from tinyllm.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
