"""Whatever can be typed wrongly: configs, --set and command lines drawn by Hypothesis.

    for outcome in fuzz(3000, 1, folder):            # the same ones for the same seed
        outcome.fault, outcome.refused
    for outcome in beyond(folder): ...               # values that no machine can hold, files that never end

Most cases are nearly right, so that they get past the parser. Nothing here trains for more than a few steps: the base
run is tiny, and what is drawn for the numbers that cost memory or time is refused, or given only to commands that
compute nothing.
"""

import re
import string
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from tinyllm.config import RunConfig, keys_of
from tinyllm.mistakes import ALIASES
from torture.home import BASE, Case, Edit, Home, Outcome

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))


# ---- Values, as TOML writes them ----


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()


SECTIONS = {name: keys_of(section.annotation) for name, section in RunConfig.model_fields.items()}
KEYS = [(section, key) for section, keys in SECTIONS.items() for key in keys]
CHARACTERS = st.characters(codec="utf-8")  # no halves of surrogate pairs
TEXTS = st.text(CHARACTERS, max_size=30)
ODD = [  # literals that are wrong for most keys
    "0", "-1", "-0.0", "1", "2", "3", "5", "7", "257", "0.5", "2.5", "1e3", "1_000", "0x1F", "0b1", "true", "false",
    "nan", "inf", "-inf", "1e400", "5e-324", "1.7e308", "9223372036854775807", "9223372036854775808",
    "1000000000", "1000000000000000000", "-9223372036854775809", "9" * 50, "9" * 4300, "9" * 5000, "0x" + "f" * 4000,
    '""', '" "', '"x"', '"0"', '"\\u0000"', '"a\\u0000b"', '"\\u001b[31m"', "'''\nlines\n'''", '"größe 日本 🦙"',
    '"[bold]"',
    '"' + "x" * 5000 + '"', '"../.."', '"/proc/nowhere"', '"a:b"', '"~nobody"', '"http://["', '"**"', '"["',
    "1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "[]", "[1, 2]", "[0.9, 0.95]", "[0.9]", "[0.9, 1.0, 2]",
    "[nan, 0]",
    '["a", 1, [true]]', "{}", "{ a = 1 }", "{ a = { b = [1, { c = 2 }] } }", "{ a = nan }", "{ a = 1979-05-27 }",
]  # fmt: skip
BROKEN = [  # no TOML
    "", "x", "[", "{", "]", '"', "'''", '"\\ud800"', "1__0", "0x", "1979-13-45", "25:00:00", "= 1", "1 2",
    "{ a = 1, a = 2 }",
]  # fmt: skip


def nested(depth: int, kind: str) -> str:
    """Lists in lists, or tables in tables."""
    return "[" * depth + "]" * depth if kind == "lists" else "{a=" * depth + "1" + "}" * depth


LITERALS = st.one_of(
    st.sampled_from(ODD),
    st.sampled_from(ODD),
    st.builds(nested, st.sampled_from([10, 100, 250, 260, 500, 1000, 5000]), st.sampled_from(["lists", "tables"])),
    st.one_of(st.integers(), st.floats(), TEXTS, st.integers(0, 64), st.floats(0, 1)).map(literal),
)


def field_of(section: str, key: str) -> FieldInfo:
    """What pydantic knows of a key."""
    fields = RunConfig.model_fields[section].annotation.model_fields
    return next(field for name, field in fields.items() if key in (name, field.alias))


def allowed(section: str, key: str) -> st.SearchStrategy[str]:
    """Values that are right for this key, or nearly."""
    field = field_of(section, key)
    options: list[Any] = [field.get_default()]
    if get_origin(field.annotation) is Literal:
        options += get_args(field.annotation)
    elif field.annotation is bool:
        options += [True, False]
    elif field.annotation is int:
        options += [1, 2, 3, 8, 64, 1000]
    elif field.annotation is float:
        options += [0.1, 0.5, 1e-3, 1]
    return st.sampled_from([literal(list(o) if isinstance(o, tuple) else o) for o in options])


# ---- Configs ----


def base_of(text: str) -> dict[str, dict[str, str]]:
    return {s: {k: literal(v) for k, v in keys.items()} for s, keys in tomllib.loads(text).items()}


BASES = [base_of(BASE), base_of(BASE), {}, *(base_of(path.read_text(encoding="utf-8")) for path in EXAMPLES)]
BARE = set(string.ascii_letters + string.digits + "_-")


@dataclass(frozen=True)
class Written:
    """A config, and the key in it that is not as it was, if it is one."""

    text: str
    key: str = ""
    line: int = 0

    def case(self, *command: str, then: tuple[str, ...] = ()) -> Case:
        return Case(command, {"run.toml": self.text.encode()}, key=self.key, line=self.line, then=then)


def toml_key(name: str) -> str:
    return name if name and set(name) <= BARE else tomli_w.dumps({name: 1}).rpartition(" = ")[0]


@st.composite
def layouts(draw: st.DrawFn, config: dict[str, dict[str, str]], top: dict[str, str], key: str) -> Written:
    """The config as somebody might write it, and the line of the key."""
    comment = draw(st.sampled_from(["", "", "  # a comment", "\t#[model]", " # n_layer = 3"]))
    indent, equals = draw(st.sampled_from(["", "", "  "])), draw(st.sampled_from([" = ", " = ", "=", "  =  "]))
    lines: list[str] = draw(st.sampled_from([[], [], ["# first", ""], ["\N{BYTE ORDER MARK}# first"]]))
    lines, found = list(lines), 0
    for name, value in top.items():
        found = len(lines) + 1 if name == key else found
        lines += f"{toml_key(name)}{equals}{value}".split("\n")
    for section, keys in config.items():
        found = len(lines) + 1 if section == key else found
        lines.append(f"[{toml_key(section)}]{comment}")
        for name, value in keys.items():
            found = len(lines) + 1 if f"{section}.{name}" == key else found
            lines += f"{indent}{toml_key(name)}{equals}{value}{comment}".split("\n")
    end = draw(st.sampled_from(["\n", "\n", "\r\n"]))
    return Written(end.join(lines) + end, key, found)


@st.composite
def typos(draw: st.DrawFn, name: str) -> str:
    """A name that is nearly this one, or quite another."""
    at = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from("aeiouxyz_-09"))
    found = draw(
        st.sampled_from(
            [
                name[:at] + name[at + 1 :],
                name[:at] + letter + name[at:],
                name[:at] + letter + name[at + 1 :],
                name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
                name.upper(),
                name.replace("_", "-"),
                name + "s",
                *sorted(ALIASES),
                *(key for _, key in KEYS),
                *SECTIONS,
            ]
        )
    )
    return found or "x"


@st.composite
def one_mistake(draw: st.DrawFn) -> Written:
    """A config that is right but for one key, which may be right too."""
    config = {section: dict(keys) for section, keys in draw(st.sampled_from(BASES)).items()}
    top: dict[str, str] = {}
    kinds = ["value", "value", "value", "key", "key", "section", "scalar", "top", "array", "args", "depth"]
    kind = draw(st.sampled_from(kinds))
    section, key = draw(st.sampled_from(KEYS))
    value = draw(LITERALS)
    if kind == "value":
        config.setdefault(section, {})[key] = value
        return draw(layouts(config, top, f"{section}.{key}"))
    if kind == "key":
        wrong = draw(typos(key))
        config.setdefault(section, {}).setdefault(wrong, value)
        return draw(layouts(config, top, f"{section}.{wrong}"))
    if kind == "section":
        wrong = draw(typos(section).filter(lambda name: name not in SECTIONS))
        config[wrong] = config.pop(section, {key: value})
        # What is left of a config without one of its sections may be wrong for other reasons.
        return draw(layouts({wrong: config[wrong]}, top, wrong))
    if kind == "scalar":
        config.pop(section, None)
        return draw(layouts({}, {section: value}, section))
    if kind == "top":
        return draw(layouts(config, {key: value}, key))
    if kind == "args":
        config.setdefault("model", {})["class"] = '"my_model.py:Small"'
        config["model"]["args"] = "{ " + f"{toml_key(draw(TEXTS))} = {value}" + " }"
        return draw(layouts(config, top, "model.args"))
    if kind == "array":
        return Written(f"[[{section}]]\n{key} = {value}\n", section)
    dotted = ".".join(["a"] * draw(st.sampled_from([2, 10, 300, 1000, 10_000])))
    text = draw(st.sampled_from([f"[{dotted}]\nb = 1\n", f"{dotted} = 1\n", f"[{section}]\n{key}.{dotted} = 1\n"]))
    return Written(text, f"{section}.{key}" if text.startswith(f"[{section}") else "a")


def too_deep(text: str) -> bool:
    """Whether Python's parser may give up before it knows which key this is of."""
    return "[" * 200 in text or "{a=" * 200 in text


@st.composite
def many_mistakes(draw: st.DrawFn) -> Written:
    """A config with any number of things done to it."""
    config = {section: dict(keys) for section, keys in draw(st.sampled_from(BASES)).items()}
    for section, key in draw(st.lists(st.sampled_from(KEYS), max_size=8)):
        name = draw(st.one_of(st.just(key), st.just(key), st.just(key), typos(key), TEXTS))
        value = draw(st.one_of(allowed(section, key), allowed(section, key), LITERALS, st.sampled_from(BROKEN)))
        config.setdefault(section, {})[name] = value
    top = draw(st.dictionaries(TEXTS, st.sampled_from(ODD), max_size=2))
    written = draw(layouts(config, top, "-"))
    return replace(written, key="", line=0)


@st.composite
def torn_texts(draw: st.DrawFn) -> bytes:
    """The bytes of a config that something happened to."""
    base = draw(st.sampled_from([BASE, *(path.read_text(encoding="utf-8") for path in EXAMPLES)]))
    content = base.encode()
    pieces = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"[", b"]]", b'"', b"'''", b"=", b"#", b".", b"{"]
    data = st.one_of(st.sampled_from(pieces), st.binary(max_size=8))
    kinds = st.sampled_from(["cut", "flip", "insert", "insert", "delete"])
    for edit in draw(st.lists(st.builds(Edit, kinds, st.floats(0, 1), data), min_size=1, max_size=4)):
        content = edit(content)
    doubled = content + content[: int(draw(st.floats(0, 1)) * len(content))]  # keys twice, sections twice
    large = st.sampled_from([b"[" * 5000, b"a = " + b"[" * 5000, b"x" * 100_000, b"#" * 200_000, b"a.b=1\n" * 3000])
    many = st.sampled_from(["".join(f"key{i} = 1\n" for i in range(3000)), "[data]\n" + "sorce1 = 1\nx = 2\n"])
    encodings = st.sampled_from(["utf-16", "utf-32", "latin-1"])
    return draw(
        st.one_of(
            st.sampled_from([content, content, content, doubled]),
            st.binary(max_size=60),
            large,
            many.map(str.encode),
            encodings.map(lambda name: base.encode(name, "replace")),
        )
    )


HARMLESS = [("plot-lr",), ("plot-lr", "run.toml", "run.toml")]  # they compute next to nothing, whatever the config says
THEN = st.sampled_from([("prepare",), ("sanity", "--only=warmup"), ("sanity", "--quick"), ("train",), ("plot-lr",)])


@st.composite
def config_cases(draw: st.DrawFn) -> Case:
    """`tinyllm config` with a file that is wrong somewhere; the other commands must refuse what it refuses."""
    kind, then = draw(st.sampled_from(["one", "one", "one", "many", "torn", "plot"])), draw(THEN)
    if kind == "one":
        written = draw(one_mistake())
        return replace(written, key=claim(written)).case("config", then=then)
    if kind == "many":
        return draw(many_mistakes()).case("config", then=then)
    if kind == "torn":
        return Case(("config",), {"run.toml": draw(torn_texts())}, then=then)
    return draw(st.one_of(one_mistake(), many_mistakes()).map(lambda w: replace(w, key="", line=0))).case(
        *draw(st.sampled_from(HARMLESS))
    )


def claim(written: Written) -> str:
    """The key that the message must name: none when the text cannot be parsed at all, or the name is too odd."""
    if too_deep(written.text):
        return ""
    try:
        tomllib.loads(written.text)
    except ValueError:
        return ""
    return written.key if len(written.key) < 60 else ""


# ---- --set ----


@st.composite
def settings_of(draw: st.DrawFn) -> tuple[str, str]:
    """An override, and the key that a refusal must name."""
    section, key = draw(st.sampled_from(KEYS))
    kind = draw(st.sampled_from(["value", "value", "value", "key", "section", "form", "args"]))
    value = draw(st.one_of(LITERALS, st.sampled_from(BROKEN), TEXTS.filter(lambda t: "\0" not in t)))
    value = value if len(value) < 100_000 else "x"  # Linux takes no longer arguments
    if kind == "value":
        return f"{section}.{key}={value}", f"{section}.{key}"
    if kind == "key":
        wrong = draw(typos(key))
        return f"{section}.{wrong}={value}", f"{section}.{wrong}"
    if kind == "section":
        wrong = draw(typos(section).filter(lambda name: name not in SECTIONS))
        return f"{wrong}.{key}={value}", wrong
    if kind == "args":
        return f"model.args.{draw(typos(key))}={value}", "model.args"
    forms = ["", "=", "x", ".=1", "model=1", "model.=1", "=1", f"{section}.{key}", "\udcff.a=1", "a.\udcff=1"]
    return draw(st.sampled_from(forms) | junk()), "--set"


def junk() -> st.SearchStrategy[str]:
    """Anything that a shell can pass on: no NUL, but bytes that are no UTF-8. No path that leads out of the home."""
    characters = st.one_of(CHARACTERS.filter(lambda c: c != "\0"), st.sampled_from("\udc80\udcff-=[/].~*?"))
    return st.text(characters, max_size=12).map(lambda text: re.sub(r"^/+|=/+|\.\.+", "=", text))


@st.composite
def set_cases(draw: st.DrawFn) -> Case:
    """`tinyllm config` with --set on a config that is right."""
    chosen = draw(st.lists(settings_of(), min_size=1, max_size=draw(st.sampled_from([1, 1, 3]))))
    args = [part for override, _ in chosen for part in ("--set", override)]
    key = chosen[0][1] if len(chosen) == 1 else ""
    if draw(seldom(5)):
        return Case(("plot-lr", *args))
    then = draw(THEN)
    return Case(("config", *args), key=key, then=(*then, *args))


# ---- Command lines ----


def mostly(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any], times: int = 5) -> st.SearchStrategy[Any]:
    """The usual so many times out of one more."""
    return st.sampled_from(range(times + 1)).flatmap(lambda n: odd if n == times else usual)


def seldom(times: int) -> st.SearchStrategy[bool]:
    """True once in so many times."""
    return st.sampled_from(range(times)).map(lambda n: n == times - 1)


PATHS = mostly(
    st.sampled_from(
        [
            "run.toml", "run.toml", "out/run.toml", "nowhere.toml", ".", "..", "folder", "folder/a.md", "empty",
            "empty.toml",
            "photo", "latin.toml", "wide.toml", "syntax.toml", "loop", "gone.toml", "a.txt", "a.txt/below", "data",
            "data/train.bin", "data/meta.json", "out", "out/", "out/ckpt.pt", "out/best.pt", "bad", "bad/text.pt",
            "bad/zip.pt", "bad/no.pt", "/dev/null", "/proc/nowhere", "/proc", "~", "~nobody/x", "-x.toml", "a" * 300,
            "caf\udce9.toml", "größe.toml", "[bold].toml", "x/" * 3000, "", " ", "good.jsonl", "list.json",
        ]
    ),
    junk(),
)  # fmt: skip
CONFIGS = mostly(st.sampled_from(["run.toml", "run.toml", "out/run.toml"]), PATHS, 4)
CHECKPOINTS = mostly(st.sampled_from(["out", "out/ckpt.pt", "out/best.pt"]), PATHS, 3)
SOURCES = st.sampled_from(
    [
        "a.txt", "empty.txt", "photo.txt", "bad.jsonl", "good.jsonl", "deep.jsonl", "digits.jsonl", "folder", "out",
        "*.txt",
        "*.md", "[", "pipe.txt", "loop", "nowhere.txt", "shakespear", "shakespeare", "http://[", "http://127.0.0.1:9/x.txt",
        "https://", "http://127.0.0.1:9:9/", "/dev/null", "~nobody/a.txt", "a.txt/b", "a" * 300 + ".txt",
    ]
)  # fmt: skip
TOKENIZERS = st.sampled_from(
    ["char", "byte", "bpe", "gpt2", "chars", "a.txt", "list.json", "deep.json", "photo", "folder", "empty", "/dev/zero",
     "pipe.txt", "loop", "data/tokenizer.json", "a" * 300]
)  # fmt: skip
CLASSES = st.sampled_from(
    ["my_model.py:Small", "my_model.py:Large", "my_model.py:legs", "my_model.py:torch", "raises.py:A", "leaves.py:A",
     "nonsense.py:A", "nowhere.py:A", "a.txt:A", "folder:A", "json:JSONDecoder", "no.such.module:A",
     "tinyllm.model:GPT",
     "tinyllm.model:Block", "/:A", "x.py:", ":A", "photo.py:A", "folder.py:A"]
)  # fmt: skip
GENTLE = st.one_of(  # what may be given to a command that trains
    SOURCES.map("data.source={}".format),
    TOKENIZERS.map("data.tokenizer={}".format),
    CLASSES.map("model.class={}".format),
    PATHS.map("data.dir={}".format),
    PATHS.map("train.out_dir={}".format),
    st.sampled_from(
        [
            "optim.lr=3e-4", "train.seed=5", "train.save_interval=1", "data.vocab_size=300", "data.vocab_size=1000000",
            "model.block_size=99999", "model.block_size=1", "model.vocab_size=5", "model.vocab_size=99",
            "data.val_fraction=1e-9", "data.val_fraction=0.5", "data.separator=fox", "data.text_key=body",
            "data.separator=",
            "train.align_documents=true", "train.batch_size=1", "model.recipe=modern", "optim.name=muon",
            "runtime.device=cuda", "runtime.device=cuda:999", "runtime.device=mps", "runtime.dtype=bfloat16",
            "model.args.width=3", "train.micro_batch_size=1", "schedule.kind=constant", "train.eval_windows=0",
        ]
    ),
    settings_of().map(lambda pair: pair[0]).filter(lambda text: is_gentle(text)),
)  # fmt: skip


def is_gentle(override: str) -> bool:
    """Whether a setting cannot make a run large: it is refused, or about something else."""
    name = override.partition("=")[0].strip()
    large = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "ngrams", "ngram_rows", "max_steps",
             "batch_size", "micro_batch_size", "eval_windows", "tales_stories", "threads", "prefetch", "recipe",
             "compile"}  # fmt: skip
    return name.rpartition(".")[2] not in large and not name.startswith(("data.source", "data.dir", "train.out_dir"))


CHANGES = mostly(  # what may be given to a run that goes on
    st.one_of(
        st.sampled_from(
            [
                "data.dir=data", "data.dir=folder", "data.dir=nowhere", "data.dir=a.txt", "train.save_interval=1",
                "train.eval_interval=2", "train.log_interval=0", "train.save_interval=x", "runtime.device=cpu",
                "runtime.device=cuda", "runtime.device=mps", "runtime.dtype=bfloat16", "runtime.threads=2",
                "runtime.threads=-1", "runtime.prefetch=0", "runtime.prefetch=1001", "runtime.nope=1", "runtime.=1",
            ]
        ),
        CLASSES.map("model.class={}".format),
        PATHS.map("data.dir={}".format),
    ),
    GENTLE,
    3,
)  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from(
        [
            "0",
            "1",
            "2",
            "-1",
            "1.5",
            "nan",
            "inf",
            "-inf",
            "1e400",
            "",
            " ",
            "x",
            "0x10",
            "1_0",
            "٣",
            "9" * 30,
            "9" * 5000,
        ]
    ),
    st.integers(-3, 3).map(str),
    st.floats().map(str),
    junk(),
)
SMALL = st.sampled_from(["0", "1", "2", "-1", "1.5", "x", "", "nan", "٣", "9" * 5000])  # or it would take its time
CHECKS = mostly(
    st.sampled_from(
        [
            "schedule",
            "split",
            "size",
            "token budget",
            "disk",
            "tokenizer",
            "schedule,size",
            ",",
            "nothing",
            "shedule",
            "loss",
        ]
    ),
    junk(),
)
PICTURES = mostly(st.sampled_from(["lr.png", "lr.svg", "lr.gif", "out/lr.svg", ".png", "folder", "no/lr.png"]), PATHS)
PAGES = mostly(st.sampled_from(["page.html", "page.md", "page.pdf", "no/page.html", "page", ".html"]), PATHS)
NAMES = mostly(st.sampled_from(["quickstart", "my-model", "quikstart", "", "../run", "quickstart.toml"]), PATHS)
TEXT_ARGUMENTS = st.one_of(st.sampled_from(["the ", "", "-", "fooü", "\n", "\udcff", "<|endoftext|>"]), junk())
DEVICES = st.one_of(st.sampled_from(["cpu", "auto", "cuda", "cuda:999", "cuda:", "mps", "gpu", "meta", ""]), junk())


@dataclass(frozen=True)
class Command:
    """How a command is called: what always stands first so that it is quick, what may come, and what options it has."""

    first: tuple[str, ...]
    positional: st.SearchStrategy[str] | None
    options: dict[str, st.SearchStrategy[str] | None]  # None: takes no value


COMMANDS = {
    "config": Command((), CONFIGS, {"--set": GENTLE, "--schema": None}),
    "plot-lr": Command((), CONFIGS, {"--set": GENTLE, "--out": PICTURES, "-o": PICTURES}),
    "prepare": Command((), CONFIGS, {"--set": GENTLE, "--force": None}),
    "sanity": Command(
        ("--only=warmup",),
        CONFIGS,
        {"--set": GENTLE, "--only": CHECKS, "--skip": CHECKS, "--list": None, "--json": None, "-o": PAGES},
    ),
    "train": Command((), CONFIGS, {"--set": GENTLE, "--overwrite": None, "--no-sanity": None}),
    "resume": Command((), CHECKPOINTS, {"--set": CHANGES}),
    "eval": Command((), CHECKPOINTS, {"--set": CHANGES, "--windows": NUMBERS}),
    "sample": Command(
        ("--max-new-tokens=3",),
        None,
        {
            "--prompt": TEXT_ARGUMENTS,
            "-p": TEXT_ARGUMENTS,
            "--prompt-file": PATHS,
            "--checkpoint": CHECKPOINTS,
            "-c": CHECKPOINTS,
            "-n": SMALL,
            "--max-new-tokens": SMALL,
            "--temperature": NUMBERS,
            "--top-k": NUMBERS,
            "--top-p": NUMBERS,
            "--seed": NUMBERS,
            "--device": DEVICES,
            "--set": CHANGES,
        },
    ),
    "new": Command((), NAMES, {"--out": PATHS, "-o": PATHS}),
}


@st.composite
def command_cases(draw: st.DrawFn) -> Case:
    """Any command with any options, most of them in the right form."""
    name = draw(st.sampled_from(list(COMMANDS)))
    command, parts = COMMANDS[name], []
    options = st.sampled_from(list(command.options))
    for option in draw(st.lists(options, max_size=draw(st.sampled_from([1, 2, 2, 4])))):
        values = command.options[option]
        if values is None:
            parts.append([option])
            continue
        value = draw(values)
        form = draw(mostly(st.sampled_from(["two", "one"]), st.sampled_from(["none", "alone"]), 11))
        joined = f"{option}={value}" if option.startswith("--") else option + value
        parts.append({"two": [option, value], "one": [joined], "none": [option], "alone": [value]}[form])
    if command.positional is not None:
        most = draw(st.sampled_from([1, 1, 1, 1, 1, 2]))
        parts += [[value] for value in draw(st.lists(command.positional, max_size=most))]
    if draw(seldom(12)):
        odd = st.sampled_from(
            ["--", "-", "-x", "--nope", "-h", "--help", "--version", "", "[/red]", "a" * 3000, "--set="]
        )
        parts.insert(draw(st.integers(0, len(parts))), [draw(st.one_of(odd, junk()))])
    spelled = draw(mostly(st.just(name), st.one_of(typos(name), junk()), 30))
    args = (spelled, *command.first, *(word for part in draw(st.permutations(parts)) for word in part))
    return Case(args, stdin=draw(st.sampled_from([b"", b"the fox", b"\xff\xfe", b"\0"])))


# ---- Files that are damaged ----

VALUES = st.sampled_from([b"[" * 50_000, b"{}", b"[]", b"null", b"-1", b"0", b"9" * 5000, b"NaN", b'"x"', b'{"a": 1}'])
SHARES = st.floats(0, 1, exclude_max=True)
HARM = st.sampled_from(["cut", "flip", "insert", "delete", "blank"])
DAMAGE = st.builds(Edit, HARM, SHARES, st.binary(max_size=20) | VALUES)
SAMPLE = ("sample", "--max-new-tokens=3")
READERS = {
    "out/ckpt.pt": [("resume",), ("resume", "out"), ("eval", "out/ckpt.pt"), (*SAMPLE, "-c", "out/ckpt.pt")],
    "out/best.pt": [SAMPLE, ("eval",)],
    "data/meta.json": [("prepare",), ("sanity", "--only=warmup"), ("eval",)],
    "data/tokenizer.json": [("prepare",), ("eval",), ("prepare", "--set", "data.tokenizer=data/tokenizer.json")],
    "data/train.bin": [("prepare",), ("sanity", "--only=warmup")],
    "data/val.bin": [("sanity", "--only=warmup"), ("eval",)],
    "a.txt": [("prepare", "--force"), ("prepare", "--set", "data.tokenizer=bpe", "--set", "data.vocab_size=300")],
    "good.jsonl": [("prepare", "--set", "data.source=good.jsonl")],
    "my_model.py": [("train", "--overwrite", "--set", "model.class=my_model.py:Small")],
}  # fmt: skip


@st.composite
def damage_cases(draw: st.DrawFn) -> Case:
    """A file of a run, damaged, and a command that reads it."""
    name = draw(st.sampled_from(list(READERS)))
    values = st.builds(Edit, st.just("value"), SHARES, VALUES)
    damage = draw(DAMAGE | values if name.endswith(".json") else DAMAGE)
    return Case(draw(st.sampled_from(READERS[name])), edits={name: damage})


TYPED = (config_cases(), set_cases(), command_cases())
CASES = st.one_of(*TYPED, *TYPED, damage_cases())


# ---- Values that no machine can hold, and files that never end ----

HUGE = (10**12, (1 << 63) - 1)
LARGEST = {  # what the config allows, and must then be harmless
    "data.vocab_size": 1_000_000,
    "model.n_embd": 1_000_000,
    "model.vocab_size": 1_000_000_000,
    "model.ngram_rows": 1_000_000_000,
    "train.max_steps": 10**15,
}
WITH = {  # what makes the number count, or go together with the others
    "data.vocab_size": ("data.tokenizer=bpe", "data.dir=elsewhere"),
    "data.tales_stories": ("data.source=tales", "data.dir=elsewhere"),
    "train.micro_batch_size": ("train.batch_size={}",),
    "model.n_head": ("model.n_embd={}",),
    "model.ngram_rows": ("model.ngrams=2",),
    "schedule.warmup_steps": ("schedule.kind=constant",),
}
ENDLESS = [
    ("config", "/dev/zero"),
    ("train", "/dev/zero"),
    ("prepare", "--set", "data.tokenizer=/dev/zero"),
    ("prepare", "--set", "data.tokenizer=/dev/zero", "--set", "data.dir=elsewhere"),
    ("prepare", "--set", "data.source=/dev/zero", "--set", "data.dir=elsewhere"),
    ("resume", "/dev/zero"),
    ("sample", "--max-new-tokens=3", "--prompt-file", "/dev/zero"),
]


def huge_cases() -> list[Case]:
    """Each whole number of the config, huge: it must be refused, or be harmless. And files that never end."""
    cases = [Case(command) for command in ENDLESS]
    for section, key in KEYS:
        name, field = f"{section}.{key}", field_of(section, key)
        if field.annotation is not int or name == "runtime.threads":  # of which a system allows as many as it likes
            continue
        for value in (*HUGE, *([LARGEST[name]] if name in LARGEST else [])):
            sets = [part for more in WITH.get(name, ()) for part in ("--set", more.format(value))]
            sets += ["--set", f"{name}={value}"]
            commands = [("plot-lr",), ("sanity", "--quick")]
            if name != "train.max_steps":  # which would begin, and go on
                commands.append(("train", "--no-sanity", "--set", "train.out_dir=other"))
            cases += [Case((*command, *sets)) for command in commands]
    return cases


# ---- All of it ----


def draw_cases(examples: int, seed: int, strategy: st.SearchStrategy[Case] = CASES) -> list[Case]:
    """So many cases; the same for the same seed."""
    found: list[Case] = []

    @seeded(seed)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


def fuzz(examples: int, seed: int, folder: str | Path, apart: int = 50) -> Iterator[Outcome]:
    """The answers to so many cases, every `apart`-th of them from a process of its own (0: none).

    Meanwhile the folder is the current directory, and the environment is the home's.
    """
    with Home(folder) as home:
        for number, case in enumerate(draw_cases(examples, seed), 1):
            yield home.run_apart(case) if apart and number % apart == 0 else home.run(case)


def beyond(folder: str | Path) -> Iterator[Outcome]:
    """The answers to what no machine can hold, each from a process that has 4 GB of memory."""
    with Home(folder) as home:
        yield from map(home.run_apart, huge_cases())
