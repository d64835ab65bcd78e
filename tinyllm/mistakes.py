"""The mistakes of a run config, in the words of the person who wrote it.

    problem = problem_of(pydantic_error, sections)     # Problem("optim.lr", "must be a number", "fast")
    str(problem)                                       # optim.lr = "fast": must be a number
    line_of(text, problem.key)                         # 12: where that stands in the file

A key that does not exist is met with the nearest one that does, in whichever section, or with what nanoGPT's name is
here.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Sections = Mapping[str, Sequence[str]]  # the keys of each section

# What people who come from other trainers will type.
ALIASES = {
    "learning_rate": "optim.lr",
    "max_lr": "optim.lr",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "max_iters": "train.max_steps",
    "total_steps": "train.max_steps",
    "warmup_iters": "schedule.warmup_steps",
    "lr_decay_iters": "schedule.decay_steps",
    "decay_lr": "schedule.kind",
    "eval_iters": "train.eval_windows",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "grad_accum_steps": "train.micro_batch_size",
    "dataset": "data.source",
    "context_length": "model.block_size",
    "max_seq_len": "model.block_size",
}

# What a text that has a pattern must look like.
PATTERNS = {
    "runtime.device": "must be one of `auto`, `cpu`, `cuda`, `cuda:1`, `mps`",
    "model.class": 'must be "file.py:Class" or "package.module:Class"',
}


@dataclass(frozen=True)
class Problem:
    """One mistake in a config: the dotted key, the value, and what is wrong with it."""

    key: str
    message: str
    value: Any = None
    has_value: bool = True

    def __str__(self) -> str:
        shown = f" = {show(self.value)}" if self.has_value else ""
        is_odd = len(self.key) > 60 or not self.key.isprintable() or "" in self.key.split(".")
        return f"{show(self.key) if is_odd else self.key}{shown}: {self.message}"


def key_of(error: Mapping[str, Any]) -> str:
    """The dotted key of pydantic's error."""
    return ".".join(str(part) for part in error["loc"][:2])


def problem_of(error: Mapping[str, Any], sections: Sections) -> Problem:
    """pydantic's error in the words of someone who wrote a TOML file."""
    loc, value = [str(part) for part in error["loc"]], error["input"]
    key = key_of(error)
    if error["type"] == "extra_forbidden":
        return Problem(key, unknown_key(loc, sections), value, has_value=len(loc) > 1)
    if len(loc) == 1:
        return Problem(key, f"must be a section: [{key}]", value)
    where = f"item {int(loc[2]) + 1} " if len(loc) > 2 and loc[2].isdigit() else ""
    kinds = {
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_type": "must not be so large" if type(value) is int else "must be a number",
        "recursion_depth_exceeded": "must not be nested so deeply",
        "bool_type": "must be true or false",
        "string_type": 'must be text in quotes, like "..."',
        "string_too_short": "must not be empty",
        "finite_number": "must be a finite number",
        "string_pattern_mismatch": PATTERNS.get(key, "must not have a null character in it"),
        "dict_type": "must be a table, like { width = 64 }",
        "invalid-json-value": "must hold plain values: text, numbers, true or false, lists and tables of them",
        "tuple_type": "must be a list of two numbers, like [0.9, 0.95]",
        "missing": "is missing (a list of two numbers is expected)",
        "too_long": "must have two numbers",
    }
    message = kinds.get(error["type"]) or error["msg"].replace("Input should be", "must be")
    return Problem(key, where + message, value)


def unknown_key(loc: Sequence[str], sections: Sections) -> str:
    """What to say of a key that no section has: the nearest one that exists."""
    if len(loc) == 1:
        name = loc[0]
        nearest = difflib.get_close_matches(name, sections, 1)
        homes = [f"[{section}] {name}" for section, keys in sections.items() if name in keys]
        homes += ["[{}] {}".format(*ALIASES[name].split("."))] if name in ALIASES else []  # nanoGPT has no sections
        hint = homes or [f"[{n}]" for n in nearest]
        known = "the sections are " + ", ".join(sections)
        return "unknown section" + (f"; did you mean {hint[0]}?" if hint else f"; {known}")
    section, name = loc[0], loc[1]
    if homes := [other for other, keys in sections.items() if name in keys]:
        return f"unknown key; did you mean {homes[0]}.{name}?"
    if near := difflib.get_close_matches(name, sections[section], 1, cutoff=0.7):
        return f"unknown key; did you mean {section}.{near[0]}?"
    if name in ALIASES:
        return f"unknown key; here it is {ALIASES[name]}"
    for other, keys in sections.items():
        if near := difflib.get_close_matches(name, keys, 1, cutoff=0.7):
            return f"unknown key; did you mean {other}.{near[0]}?"
    return f"unknown key; [{section}] has " + ", ".join(sections[section])


def line_of(text: str, key: str) -> int:
    """The line (from 1) on which `section.key` (or `[section]`) stands in a TOML text; 0 if not found."""
    section, _, name = key.partition(".")
    current = ""
    for number, line in enumerate(text.split("\n"), 1):  # a text may have more kinds of line ends, TOML has not
        stripped = line.split("#")[0].strip()
        if stripped.startswith("["):
            current = stripped.strip("[] ").replace('"', "")
            if current == key or (not name and current.startswith(section + ".")):
                return number
        left = stripped.partition("=")[0].strip().strip("\"'")
        if "=" in stripped and ((current == section and left == name) or (not current and left in (key, section))):
            return number
    return 0


def show(value: Any) -> str:
    """A value as TOML would write it, shortened."""
    if isinstance(value, str):
        return json.dumps(value if len(value) < 60 else value[:57] + "...", ensure_ascii=False)
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = str(list(value) if isinstance(value, tuple) else value)
    except (ValueError, RecursionError):  # thousands of digits, or of tables in each other
        return "..."
    return text if len(text) < 60 else text[:57] + "..."
