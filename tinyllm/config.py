"""The run config: one TOML file, typed sections, nothing hidden.

    config = load("run.toml", overrides=["optim.lr=3e-4"])
    config.optim.lr, config.model.n_layer
    print(to_toml(config))          # every value, defaults included: what a run's folder keeps

Reading is strict: an unknown key, a wrong type or two contradicting values are errors, and all of them are
reported together. Sections are immutable. Values that follow from others (micro-batches a step, tokens a step)
are properties, never stored. No torch here: `tinyllm --help` and `plot-lr` must stay instant.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, JsonValue, Strict, ValidationError

from tinyllm.errors import ConfigError
from tinyllm.mistakes import Problem, key_of, line_of, problem_of, show

# TOML's integers, and torch's, have 64 bits; Python's have no limit.
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")]  # a path, most of them
Steps = Annotated[int, Field(le=10**15)]  # which floats still tell apart
Beta = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(le=1e30)]  # the weights are float32
NAME = r"[A-Za-z_]\w*"
LARGEST = 1 << 17  # characters of a run config; who names the text instead, or /dev/zero, is not to wait for all of it
MOST = 50  # mistakes told at once
DEEPEST = 30  # lists and tables in each other, in model.args
TOKENS = 1 << 27  # of a step; the largest runs there are need half of that
CLASS = rf"^$|^([^\x00\n]+\.py|{NAME}(\.{NAME})*):{NAME}$"


class Section(BaseModel):
    """A table of the run config: immutable, strictly typed, closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """What text to learn from, and how it becomes tokens."""

    source: Text = Field(
        "tales",
        description="`tales`, `shakespeare`, `tinystories`, or a path, folder, glob or URL of .txt or .jsonl",
    )
    dir: Text = Field("data", description="folder of train.bin, val.bin and tokenizer.json")
    tokenizer: Text = Field("bpe", description="`char`, `byte`, `bpe`, `gpt2`, or the path of a tokenizer.json")
    vocab_size: Positive = Field(
        1024, le=1_000_000, description="tokens in a `bpe` vocabulary; the others bring their own size"
    )
    val_fraction: float = Field(0.1, gt=0, lt=1, description="share of the text held out, taken from its end")
    separator: str = Field("<|endoftext|>", description="what marks the end of a document in a .txt; '' for nothing")
    text_key: str = Field("text", min_length=1, description="the key that holds the text in a line of .jsonl")
    tales_stories: Positive = Field(20_000, le=10_000_000, description="stories to write, for the source `tales`")
    tales_seed: Count = Field(0, description="seed of the stories, for the source `tales`")


class ModelConfig(Section):
    """The transformer. A recipe sets the switches below it; a switch that is set wins over the recipe.

    A `class` of one's own is built instead of it, from those of these values that it asks for.
    """

    class_: str = Field(  # `class` to everyone but Python
        "", alias="class", pattern=CLASS, description="`file.py:Class` or `package.module:Class`; '': the built-in GPT"
    )
    args: dict[str, JsonValue] = Field({}, description="more keyword arguments, for a `class` of your own")
    recipe: Literal["gpt2", "modern"] = Field("gpt2", description="a named set of the switches from `norm` on")
    n_layer: Positive = Field(4, le=1_000, description="transformer blocks")
    n_head: Positive = Field(4, description="attention heads a block")
    n_embd: Positive = Field(128, le=1_000_000, description="width of the residual stream")
    block_size: Positive = Field(256, description="context length, tokens")
    vocab_size: Count = Field(0, le=1_000_000_000, description="rows of the embedding; 0: as many as the tokenizer has")
    ngrams: int = Field(
        1, ge=1, le=8, description="embed the last 2, 3, ... tokens together, too, up to so many; 1: only each alone"
    )
    ngram_rows: Positive = Field(
        8192,
        le=1_000_000_000,
        description="with ngrams > 1: rows for n-grams of each length, which find theirs by a hash",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the embedding and on each residual branch")
    attn_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="on the attention weights; costs a CPU in float32 more than the rest of the step",
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="normalisation before each branch")
    activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = Field(
        "gelu_tanh", description="in the MLP; `gelu_tanh` is GPT-2's, `relu2` is relu(x)^2"
    )
    positions: Literal["learned", "rope"] = Field("learned", description="learned embedding, or rotary")
    bias: bool = Field(True, description="biases in the linear layers and LayerNorms")
    qk_norm: bool = Field(False, description="RMS-normalise queries and keys a head")
    tie_embeddings: bool = Field(True, description="the output head is the token embedding")
    zero_init: bool = Field(False, description="residual projections (and an untied head) start at zero")


class OptimConfig(Section):
    """The optimizer and its rates."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="`muon` updates the matrices with Muon and the rest with AdamW"
    )
    lr: Rate = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    min_lr: Rate = Field(1e-4, ge=0, description="learning rate at the end of the decay")
    muon_lr: Rate = Field(0.02, gt=0, description="peak rate of Muon; follows the same curve as lr")
    muon_momentum: Beta = Field(0.95, description="Nesterov momentum of Muon")
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = Field((0.9, 0.95), description="AdamW's two averages")
    eps: Rate = Field(1e-8, gt=0, description="AdamW's denominator floor")
    weight_decay: Rate = Field(0.1, ge=0, description="decoupled; on tensors of two dimensions or more only")
    decay_embeddings: bool = Field(True, description="decay the embedding tables too")
    grad_clip: Rate = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")


class ScheduleConfig(Section):
    """The learning rate as a function of the step: warmup, then a decay."""

    kind: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warmup")
    warmup_steps: Steps = Field(100, ge=0, description="steps of linear warmup from 0 to lr")
    decay_steps: Steps = Field(0, ge=0, description="step at which min_lr is reached; 0: train.max_steps")


class TrainConfig(Section):
    """The run: how long, how large a batch, when to look and to save."""

    out_dir: Text = Field("out", description="the run's folder: checkpoints, metrics, resolved config")
    max_steps: Steps = Field(2000, gt=0, description="optimizer steps")
    batch_size: Positive = Field(12, description="sequences an optimizer step, all micro-batches together")
    micro_batch_size: Count = Field(0, description="sequences a forward pass; 0: batch_size, no accumulation")
    align_documents: bool = Field(
        False, description="windows begin where a document does, so that a token is predicted from its whole document"
    )
    eval_interval: Positive = Field(250, description="steps between evaluations of both splits")
    eval_windows: Count = Field(
        200, description="windows of block_size tokens a split, evenly spread, always the same; 0: the whole val split"
    )
    save_interval: Positive = Field(
        250, description="steps between checkpoints; one is made before each evaluation and when the run is stopped too"
    )
    save_minutes: float = Field(10.0, gt=0, description="minutes between checkpoints at most, where steps are slow")
    keep: Positive = Field(2, description="of the latest checkpoint and of the best, how many: 2 keeps the one before")
    skip_spikes: bool = Field(
        False, description="leave out a step whose loss is far above the last ones (6 standard deviations)"
    )
    log_interval: Positive = Field(10, description="steps between lines of metrics")
    seed: Count = Field(1337, description="of the weights, the batches and the dropout")


class RuntimeConfig(Section):
    """Where and how it is computed. None of these but dtype is meant to change the result."""

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$", description="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the forward pass (autocast); weights stay float32; auto: bfloat16 where it is faster"
    )
    compile: bool = Field(
        False, description="torch.compile, with a fallback to eager when it fails; for GPUs: on a CPU steps got slower"
    )
    loops: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compiled loops in place of torch's operations: for bfloat16 on a CPU; auto: in long runs",
    )
    threads: Count = Field(0, le=4096, description="CPU threads; 0: as many as there are physical cores")
    prefetch: Count = Field(2, le=1000, description="batches prepared ahead in the background; 0: none")


class RunConfig(Section):
    """Everything that defines a run."""

    data: DataConfig = Field(DataConfig(), description=DataConfig.__doc__)
    model: ModelConfig = Field(ModelConfig(), description=ModelConfig.__doc__)
    optim: OptimConfig = Field(OptimConfig(), description=OptimConfig.__doc__)
    schedule: ScheduleConfig = Field(ScheduleConfig(), description=ScheduleConfig.__doc__)
    train: TrainConfig = Field(TrainConfig(), description=TrainConfig.__doc__)
    runtime: RuntimeConfig = Field(RuntimeConfig(), description=RuntimeConfig.__doc__)

    @property
    def micro_batch_size(self) -> int:
        """Sequences a forward pass sees."""
        return self.train.micro_batch_size or self.train.batch_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches an optimizer step."""
        return self.train.batch_size // self.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Target tokens an optimizer step learns from."""
        return self.train.batch_size * self.model.block_size

    @property
    def flops(self) -> float:
        """Of the whole run, about: six for each weight of a block and each token."""
        return 6.0 * 12 * self.model.n_layer * self.model.n_embd**2 * self.tokens_per_step * self.train.max_steps

    @property
    def decay_steps(self) -> int:
        """The step at which the learning rate reaches its minimum."""
        return self.schedule.decay_steps or self.train.max_steps


# Only what differs between the recipes; `gpt2` is what the defaults above say.
RECIPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": {
        "norm": "rmsnorm",
        "activation": "relu2",
        "positions": "rope",
        "bias": False,
        "qk_norm": True,
        "tie_embeddings": False,
        "zero_init": True,
    },
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override (`section.key=value`) and check a run config. Raises ConfigError naming every mistake."""
    text = read_text(Path(path))
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}", where=str(path)) from None
    except RecursionError:
        raise ConfigError("lists or tables in it are nested too deeply", where=str(path)) from None
    except ValueError:  # Python reads no more than 4,300 digits
        raise ConfigError("a number in it has thousands of digits", where=str(path)) from None
    return check(raw, overrides, where=str(path), text=text)


def check(raw: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "config", text: str = "") -> RunConfig:
    """A RunConfig from nested plain values (a parsed TOML, a checkpoint's record). Raises ConfigError.

    `text` is the TOML the values came from, to name lines.
    """
    raw = apply_recipe(apply_overrides(raw, overrides))
    config, problems = validate(raw)
    bad = {problem.key for problem in problems}
    problems += [p for keys, p in contradictions(config) if not bad & set(keys)]
    if not problems:
        return config
    set_keys = {override.partition("=")[0].strip() for override in overrides}
    # An unknown section is one problem, whichever of its keys was set; and model.args is one key.
    set_keys |= {".".join(key.split(".")[:n]) for key in set_keys for n in (1, 2)}
    lines = []
    for problem in problems[:MOST]:
        line = line_of(text, problem.key)
        if problem.key in set_keys and not (line and "." not in problem.key):
            lines.append(f"--set {problem}")
        else:
            lines.append(f"{where}:{line}: {problem}" if line else f"{where}: {problem}")
    if len(problems) > MOST:
        lines.append(f"and {len(problems) - MOST:,} more")
    raise ConfigError("\n".join(lines))


def read_text(path: Path) -> str:
    """The file's text, or a ConfigError that says why there is none."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # Windows' editors put a byte order mark first
            text = file.read(LARGEST + 1)
    except FileNotFoundError:
        fix = "`tinyllm new` lists the ready-made ones; `tinyllm new quickstart` writes one"
        raise ConfigError("no such run config", where=str(path), fix=fix) from None
    except UnicodeDecodeError:
        raise ConfigError("not a text file (TOML is UTF-8 text)", where=str(path)) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if len(text) > LARGEST:
        raise ConfigError(f"larger than a run config may be, {LARGEST:,} characters", where=str(path))
    return text


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with each `section.key=value` set. A value is TOML; a bare word is a string."""
    merged = {k: dict(v) if isinstance(v, Mapping) else v for k, v in raw.items()}
    for override in overrides:
        key, equals, value = override.partition("=")
        section, dot, name = key.strip().partition(".")
        if re.search("[\ud800-\udfff]", override):  # what stands for bytes that are not UTF-8
            raise ConfigError(f"not UTF-8 text: {override!r}", where="--set")
        if not (equals and dot and section and name):
            fix = "write --set section.key=value, e.g. --set optim.lr=3e-4"
            raise ConfigError(f"cannot read {override!r}", where="--set", fix=fix)
        if not isinstance(merged.setdefault(section, {}), dict):
            merged[section] = {}
        table = merged[section]
        if section == "model" and name.startswith("args."):  # the only table inside a section
            inner = table.get("args")
            table["args"] = table = dict(inner) if isinstance(inner, Mapping) else {}
            name = name.removeprefix("args.")
        table[name] = parse_value(value.strip())
    return merged


def parse_value(text: str) -> Any:
    """`3e-4`, `true`, `[0.9, 0.95]` as TOML reads them; anything that is not TOML is a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # TOML's own error, too many digits, too many brackets
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text


def apply_recipe(raw: dict[str, Any]) -> dict[str, Any]:
    """Fill the model's switches from its recipe; switches that are set stay as they are."""
    model = raw.get("model")
    if isinstance(model, dict) and isinstance(model.get("recipe"), str):
        raw = raw | {"model": RECIPES.get(model["recipe"], {}) | model}
    return raw


def keys_of(section: type[Section]) -> list[str]:
    """The keys of a section as one writes them."""
    return [field.alias or name for name, field in section.model_fields.items()]


def validate(raw: Mapping[str, Any]) -> tuple[RunConfig, list[Problem]]:
    """The config, with the default in place of each value that is wrong, and the list of what is wrong."""
    try:
        return RunConfig.model_validate(dict(raw)), []
    except ValidationError as error:
        wrong = error.errors(include_url=False)
    sections = {name: keys_of(field.annotation) for name, field in RunConfig.model_fields.items()}
    problems = [problem_of(e, sections) for e in wrong[:MOST]]  # to look for what was meant takes milliseconds each
    problems += [Problem(key_of(e), "") for e in wrong[MOST:]]
    good = {k: dict(v) for k, v in raw.items() if k in RunConfig.model_fields and isinstance(v, Mapping)}
    for problem in problems:
        section, _, key = problem.key.partition(".")
        good.get(section, {}).pop(key, None)
    try:
        return RunConfig.model_validate(good), problems
    except ValidationError:  # of a key that is no text, which only a strange checkpoint has
        return RunConfig(), problems


def contradictions(config: RunConfig) -> Iterator[tuple[tuple[str, ...], Problem]]:
    """Values that are each allowed but not together: the keys involved, and what to say."""
    model, optim, train = config.model, config.optim, config.train
    built_in = not model.class_  # whether a class's values go together is its own business
    if built_in and model.args:
        message = "is for a class of your own: set model.class too"
        yield ("model.args", "model.class"), Problem("model.args", message, model.args)
    if message := not_for_toml(model.args):
        yield ("model.args",), Problem("model.args", message, model.args)
    if built_in and model.n_embd % model.n_head:
        message = f"must be a multiple of model.n_head = {model.n_head}"
        yield ("model.n_embd", "model.n_head", "model.class"), Problem("model.n_embd", message, model.n_embd)
    elif built_in and model.positions == "rope" and (model.n_embd // model.n_head) % 2:
        of = "model.positions" if RECIPES[model.recipe].get("positions") != "rope" else "model.recipe"
        size = f"model.n_embd / model.n_head = {model.n_embd // model.n_head}"
        message = f"rotary positions ({of}) need an even head size, {size} is odd"
        keys = ("model.n_embd", "model.n_head", "model.positions", "model.class")
        yield keys, Problem("model.n_embd", message, model.n_embd)
    if config.micro_batch_size > train.batch_size or train.batch_size % config.micro_batch_size:
        message = f"must divide train.batch_size = {train.batch_size}"
        problem = Problem("train.micro_batch_size", message, train.micro_batch_size)
        yield ("train.micro_batch_size", "train.batch_size"), problem
    if config.tokens_per_step > TOKENS:
        message = f"times model.block_size = {model.block_size} is too many tokens a step, at most {TOKENS} are allowed"
        yield ("train.batch_size", "model.block_size"), Problem("train.batch_size", message, train.batch_size)
    if config.schedule.kind != "constant":
        if optim.min_lr > optim.lr:
            message = f"must not be above optim.lr = {show(optim.lr)}"
            yield ("optim.min_lr", "optim.lr"), Problem("optim.min_lr", message, optim.min_lr)
        if config.schedule.warmup_steps >= config.decay_steps:
            end = "schedule.decay_steps" if config.schedule.decay_steps else "train.max_steps"
            message = f"must be below {end} = {config.decay_steps}, or no step is left to decay in"
            keys = ("schedule.warmup_steps", "schedule.decay_steps", "train.max_steps")
            yield keys, Problem("schedule.warmup_steps", message, config.schedule.warmup_steps)
    # A byte-level vocabulary starts with the 256 bytes and one end-of-text mark.
    if config.data.tokenizer == "bpe" and config.data.vocab_size < 257:
        message = "a byte-level BPE (data.tokenizer) needs at least 257 (256 bytes and <|endoftext|>)"
        keys = ("data.vocab_size", "data.tokenizer")
        yield keys, Problem("data.vocab_size", message, config.data.vocab_size)


def not_for_toml(value: JsonValue, depth: int = 0) -> str:
    """What the run's own run.toml could not hold of plain values; '' for nothing."""
    if depth > DEEPEST:
        return "must not be nested so deeply"
    if isinstance(value, list | dict):
        parts = value.values() if isinstance(value, dict) else value
        return next((message for part in parts if (message := not_for_toml(part, depth + 1))), "")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "the whole numbers in it must have 64 bits at most"
    return "must not hold null" if value is None else ""


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values, as TOML and checkpoints hold them (tuples become lists)."""
    return config.model_dump(mode="json", by_alias=True)


def to_toml(config: RunConfig) -> str:
    """The resolved config: every key, defaults included. `load` gives the same config back."""
    return tomli_w.dumps(to_dict(config))


def json_schema() -> dict[str, Any]:
    """JSON Schema of the run config, for editors (Even Better TOML and taplo read it)."""
    return RunConfig.model_json_schema() | {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tinyllm run config",
    }
