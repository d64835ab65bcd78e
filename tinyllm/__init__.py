"""tinyllm: train a small language model from one TOML file."""


def __getattr__(name: str) -> str:
    """`__version__`, looked up when it is asked for: that takes an eighth of the time of `tinyllm --help`."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tinyllm")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0"
