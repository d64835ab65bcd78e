"""The errors a user can cause. Each says what is wrong, where, and how to fix it.

    raise DataError("the validation split has 50 tokens, block_size is 64", where="data/val.bin",
                    fix="set a larger data.val_fraction, or model.block_size = 32")

Libraries raise these; only `cli.py` prints them and exits (with code 2). Anything else that escapes is our bug.
"""

import re
import shlex
from pathlib import Path


class TinyLLMError(Exception):
    """A user's mistake, or a machine's: `what` is wrong, `where` it is, and the `fix`."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class ConfigError(TinyLLMError):
    """The run config does not parse, has unknown or mistyped keys, or contradicts itself."""


class DataError(TinyLLMError):
    """A text, a token file or a download is missing, damaged, too short, or not what the config says."""


class TokenizerError(TinyLLMError):
    """A tokenizer cannot be built, or does not know a character of a text."""


class CheckpointError(TinyLLMError):
    """A checkpoint is missing, damaged, of another version, or not a tinyllm checkpoint."""


class RunError(TinyLLMError):
    """A run cannot start or go on: its folder is taken, the device is missing, the loss is not finite."""


class NonFiniteError(RunError):
    """The loss or the gradient of a step is infinite or not a number; the weights have not taken it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that there was not enough memory: NumPy's, or torch's on a CPU or on a GPU."""
    told = isinstance(error, RuntimeError) and re.search("can't allocate memory|out of memory", str(error))
    return isinstance(error, MemoryError) or bool(told)


def typed(path: str | Path) -> str:
    """A path as one types it at a shell, for the commands that we suggest: quoted, and never taken for an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))
