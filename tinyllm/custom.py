"""A model of your own: any nn.Module that maps token ids (B, T), int64, to logits (B, T, vocab_size), float.

    [model]
    class = "my_model.py:MyGPT"              # or "package.module:Class"
    args = { width = 64 }                    # its own keyword arguments

    model = build(config.model, vocab_size=65, seed=1337)
    check_contract(model, config.model, 65)  # raises ConfigError: what was expected, what came

The class is given the keyword arguments that its `__init__` asks for by name, see `arguments`. A relative path starts
at the current directory. A checkpoint records the class's name and the SHA-256 of its source, never its code: `trust`
says whether the file that has this name here may be run.
"""

import hashlib
import importlib
import inspect
import re
import sys
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyllm.config import ModelConfig
from tinyllm.errors import CheckpointError, ConfigError, typed

INSTALLED = {"site-packages", "dist-packages"}  # folders of what others wrote
ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Source:
    """The file that a class is in, as it was read; nothing of it is run."""

    path: Path
    text: bytes

    @property
    def sha256(self) -> str:
        """What a checkpoint remembers of it."""
        return hashlib.sha256(self.text).hexdigest()


# ---- From a name to a class ----


def find(spec: str) -> Source:
    """The source of `file.py:Class` or `package.module:Class`, without running any of it. Raises ConfigError."""
    path = locate(spec)
    if path is None:
        fix = "is it installed here, or in the current directory? Each folder of a package needs an __init__.py"
        raise ConfigError(f"no Python module is called {spec.rpartition(':')[0]}", where=spec, fix=fix)
    try:
        return Source(path, path.read_bytes())
    except FileNotFoundError:
        fix = f"a relative path starts at the current directory, {Path.cwd()}"
        raise ConfigError("there is no such file", where=spec, fix=fix) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", where=spec) from None


def locate(spec: str) -> Path | None:
    """Where the source should be; None for a module that is not there.

    The import system would run a package to look into it, so its finders are asked one level after the other.
    """
    name = spec.rpartition(":")[0]
    if name.endswith(".py"):
        return Path(name)
    path, parts = [str(Path.cwd()), *sys.path], name.split(".")
    found = None
    for depth in range(1, len(parts) + 1):
        full = ".".join(parts[:depth])
        try:
            specs = (finder.find_spec(full, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            found = next((each for each in specs if each), None)
        except (ImportError, KeyError):  # KeyError: a folder without __init__.py in another
            return None
        if found is None or (depth < len(parts) and not found.submodule_search_locations):
            return None
        path = list(found.submodule_search_locations or ())
    origin = found.origin if found else None
    return Path(origin) if origin and origin.endswith(".py") else None  # no folder, nothing built in


def load_class(spec: str) -> type[nn.Module]:
    """Import the class. Raises ConfigError whatever goes wrong, with the line of the file if there is one."""
    source, (name, _, class_name) = find(spec), spec.rpartition(":")
    with blamed(spec, "the import"):
        module = run_file(source) if name.endswith(".py") else import_module(name)
    found = getattr(module, class_name, None)
    if found is None:
        there = [n for n, v in vars(module).items() if is_model(v) and v.__module__ == module.__name__]
        has = ", ".join(there) or "none"
        raise ConfigError(f"{source.path} has no {class_name}", where=spec, fix=f"the models that are there: {has}")
    if not is_model(found):
        kind = "a class" if isinstance(found, type) else f"a {type(found).__name__}"
        fix = f"class {class_name}(torch.nn.Module): ..."
        raise ConfigError(f"{class_name} is {kind}, expected a subclass of torch.nn.Module", where=spec, fix=fix)
    if found.__module__ != module.__name__:  # the hash of a file says nothing of what it imports
        what = f"{source.path} only imports {class_name}, from {found.__module__}"
        raise ConfigError(what, where=spec, fix="name the file or the module that defines it")
    return found


def is_model(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def run_file(source: Source) -> types.ModuleType:
    """The file as a module, run once for each content it has; it can import what lies beside it."""
    path = source.path.resolve()
    key = hashlib.sha256(str(path).encode() + source.text).hexdigest()[:12]
    name = re.sub(r"\W", "_", path.stem) + "_" + key  # of no other module
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = str(path)
    with first_in_path(path.parent):
        sys.modules[name] = module  # dataclasses and torch.compile look it up
        try:
            # The bytes that were read and hashed: no .pyc, no second look at the file.
            exec(compile(source.text, str(path), "exec", dont_inherit=True), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    return module


def import_module(name: str) -> types.ModuleType:
    with first_in_path(Path.cwd()):
        return importlib.import_module(name)


@contextmanager
def first_in_path(folder: Path) -> Iterator[None]:
    """Modules of the folder come first meanwhile, and last afterwards: for imports inside functions."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


# ---- From a class to a model ----


def build(config: ModelConfig, vocab_size: int, seed: int) -> nn.Module:
    """A fresh model of the config's class, on the CPU: a function of the seed alone. Raises ConfigError."""
    cls = load_class(config.class_)
    given = arguments(cls, config, vocab_size)
    with torch.random.fork_rng(devices=[]), blamed(config.class_, f"{cls.__name__}(...)"):
        torch.default_generator.manual_seed(seed)
        return cls(**given)


def arguments(cls: type[nn.Module], config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """What the class's `__init__` asks for by name: `config`, `vocab_size` or any other key of [model], and `args`.

    `args` wins. An unknown parameter with a default keeps it; `**kwargs` gets what `args` says and no more. Raises
    ConfigError for a parameter that nobody knows, and for args that the class does not take.
    """
    config = config.model_copy(update={"vocab_size": vocab_size})
    known = {name: getattr(config, name) for name in ModelConfig.model_fields if name not in ("class_", "args")}
    known["config"] = config
    parameters = inspect.signature(cls).parameters.values()
    names = [p.name for p in parameters if p.kind not in ANY]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if unknown := [name for name in config.args if name not in names and not takes_any]:
        what = f"{cls.__name__} does not take {', '.join(unknown)}, which model.args has"
        raise ConfigError(what, where=config.class_, fix=f"it takes {', '.join(names) or 'nothing'}")
    given = {name: known[name] for name in names if name in known} | config.args
    if missing := [p.name for p in parameters if p.name in names and p.default is p.empty and p.name not in given]:
        what = f"{cls.__name__} asks for {', '.join(missing)}, and nobody knows what that is"
        fix = f"set model.args.{missing[0]}, give it a default, or ask for one of {', '.join(sorted(known))}"
        raise ConfigError(what, where=config.class_, fix=fix)
    return given


# ---- What it must do ----


def check_contract(model: nn.Module, config: ModelConfig, vocab_size: int) -> None:
    """Raise ConfigError unless the model does what a run needs of it, wherever it is; leaves it as it was."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        fix = "register layers as attributes (lists of them as nn.ModuleList); requires_grad must be True"
        raise ConfigError("it has no trainable parameters", where=config.class_, fix=fix)
    if any(nn.parameter.is_lazy(p) for p in parameters):
        raise ConfigError("it has lazy parameters", where=config.class_, fix="give every layer its size")
    try:
        inspect.signature(model.forward).bind(torch.empty(0))
    except TypeError as error:
        takes = f"forward{inspect.signature(model.forward)}"
        what = f"{takes} cannot be called with the token ids alone: {error}"
        raise ConfigError(what, where=config.class_, fix="def forward(self, tokens): ...") from None
    was_training = model.training
    model.eval()
    try:
        for shape in ((2, min(8, config.block_size)), (1, config.block_size)):
            check_forward(model, config, shape, vocab_size)
    finally:
        model.train(was_training)


def check_forward(model: nn.Module, config: ModelConfig, shape: tuple[int, int], vocab_size: int) -> None:
    """Raise ConfigError unless ids of this shape give logits of every position, which can be learned from."""
    device = next(model.parameters()).device
    tokens = (torch.arange(shape[0] * shape[1], device=device) % vocab_size).view(shape)
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked), blamed(config.class_, f"forward of ids of shape {shape}"):
        logits = model(tokens)
    wanted = (*shape, vocab_size)
    if fault := fault_of(logits, wanted):
        came, fix = fault
        what = f"for ids of shape {shape} forward returned {came}, expected float logits of shape {wanted}"
        raise ConfigError(what, where=config.class_, fix=fix)


def fault_of(logits: object, wanted: tuple[int, ...]) -> tuple[str, str] | None:
    """What came instead of logits (B, T, V), and how to mend it; None if nothing is wrong."""
    batch, length, vocab_size = wanted
    if not isinstance(logits, Tensor):
        size = f" of {len(logits)}" if isinstance(logits, tuple | list) else ""
        return f"a {type(logits).__name__}{size}", "return the logits alone; the loss is computed outside"
    shape = tuple(logits.shape)
    if shape != wanted:
        fix = "one row of vocab_size logits for each token"
        if shape in ((batch, vocab_size), (batch, 1, vocab_size)):
            fix = "return the logits of every position, not of the last alone"
        elif shape[:-1] == (batch, length):
            fix = f"the last layer needs vocab_size = {vocab_size} outputs: let __init__ take vocab_size"
        return f"a tensor of shape {shape}", fix
    if not logits.is_floating_point():
        return f"{str(logits.dtype).removeprefix('torch.')} values", "return the logits, not the ids they choose"
    if torch.is_grad_enabled() and not logits.requires_grad:
        return "logits without a gradient", "no torch.no_grad or .detach() on the way to the logits"
    return None


@contextmanager
def blamed(spec: str, doing: str) -> Iterator[None]:
    """Turn whatever the user's code raises into a ConfigError that names its own line."""
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")[:300]
        folder = (locate(spec) or Path()).resolve().parent
        own = [
            f"{Path(frame.filename).name}, line {frame.lineno}"
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename != __file__ and is_inside(Path(frame.filename), folder)
        ]
        place = f" ({own[-1]})" if own and not isinstance(error, SyntaxError) else ""  # which names its line itself
        raise ConfigError(f"{doing} raised {reason}{place}", where=spec) from None


# ---- Whether a checkpoint may have us run it ----


def is_inside(path: Path, folder: Path) -> bool:
    """Whether the file is in the folder, links resolved, and not in what is installed there."""
    path = path.resolve()
    return path.is_relative_to(folder) and not INSTALLED & set(path.parts)


def trust(spec: str, recorded: str, where: str) -> None:
    """Raise CheckpointError unless a checkpoint's class may be run: it is a file of the current directory, unchanged.

    Not one outside, wherever the path, a link or the import system leads, and none that is installed: a class that
    others wrote might do anything with arguments that a stranger chose. Nothing is run to find out.
    """
    path = locate(spec)
    what, fix = f"its model is {spec}, ", "if you know what it runs, say so: --set model.class=path.py:Class"
    absolute = spec.rpartition(":")[0].endswith(".py") and path is not None and path.is_absolute()
    if path is None or absolute or not is_inside(path, Path.cwd().resolve()):
        what += "which is not in the current directory, so it was not run"
    elif not path.is_file():
        what += "and there is no such file in the current directory"
    elif find(spec).sha256 != recorded:
        what += f"and {path} is not the file that it was trained with, so it was not run"
        fix = f"if the new one is meant, say so: --set {typed(f'model.class={spec}')}"
    else:
        return
    raise CheckpointError(what, where=where, fix=fix)
