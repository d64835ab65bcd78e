"""tinyllm: train a small language model from one TOML file."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tinyllm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0"
