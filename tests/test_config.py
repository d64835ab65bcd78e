"""The run config: what a file may say, what is said of its mistakes, and that nothing is lost on the way."""

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tinyllm.config import RECIPES, RunConfig, check, json_schema, keys_of, load, to_dict, to_toml
from tinyllm.errors import ConfigError
from tinyllm.mistakes import ALIASES

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))


def write(folder, text):
    path = folder / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def problems(path, overrides=()):
    """The lines of the error, the file's name shortened."""
    with pytest.raises(ConfigError) as error:
        load(path, overrides)
    return str(error.value).replace(str(path), "run.toml").splitlines()


# ---- Mistakes ----


def test_every_mistake_is_reported_at_once_with_its_line(tmp_path):
    text = """
[data]
val_fraction = 1.5
sauce = "tales"          # source

[model]
n_layer = "four"
block_size = 0
recipe = "gpt3"
lr = 0.1

[optim]
learning_rate = 1e-3
betas = [0.9, 1.0]
warmup_iters = 5
frobnicate = true

[trian]
seed = 1

[train]
max_steps = 100
batch_size = 10
micro_batch_size = 4
eval_interval = 2.5
"""
    path = write(tmp_path, text)
    expected = {
        "run.toml:3: data.val_fraction = 1.5: must be less than 1",
        'run.toml:4: data.sauce = "tales": unknown key; did you mean data.source?',
        'run.toml:7: model.n_layer = "four": must be a whole number',
        "run.toml:8: model.block_size = 0: must be greater than 0",
        "run.toml:9: model.recipe = \"gpt3\": must be 'gpt2' or 'modern'",
        "run.toml:10: model.lr = 0.1: unknown key; did you mean optim.lr?",
        "run.toml:13: optim.learning_rate = 0.001: unknown key; here it is optim.lr",
        "run.toml:14: optim.betas = 1.0: item 2 must be less than 1",
        "run.toml:15: optim.warmup_iters = 5: unknown key; here it is schedule.warmup_steps",
        "run.toml:16: optim.frobnicate = true: unknown key; [optim] has name, lr, min_lr, muon_lr, muon_momentum, "
        "betas, eps, weight_decay, decay_embeddings, grad_clip",
        "run.toml:18: trian: unknown section; did you mean [train]?",
        "run.toml:24: train.micro_batch_size = 4: must divide train.batch_size = 10",
        "run.toml:25: train.eval_interval = 2.5: must be a whole number",
        # 100 steps of warmup are the default: no line to name.
        "run.toml: schedule.warmup_steps = 100: must be below train.max_steps = 100, or no step is left to decay in",
    }
    found = problems(path)
    assert set(found) == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[model]\nn_embd = 30\nn_head = 4", "2: model.n_embd = 30: must be a multiple of model.n_head = 4"),
        (
            '[model]\nn_embd = 12\npositions = "rope"',
            "2: model.n_embd = 12: rotary positions (model.positions) need an even head size, "
            "model.n_embd / model.n_head = 3 is odd",
        ),
        ("[model]\nargs = {a = 1}", "2: model.args = {'a': 1}: is for a class of your own: set model.class too"),
        (
            "[train]\nbatch_size = 4\nmicro_batch_size = 8",
            "3: train.micro_batch_size = 8: must divide train.batch_size = 4",
        ),
        (
            "[optim]\nlr = 0.001\nmin_lr = 0.00100000001",  # shown to the last digit
            "3: optim.min_lr = 0.00100000001: must not be above optim.lr = 0.001",
        ),
        (
            "[schedule]\nwarmup_steps = 50\ndecay_steps = 50",
            "2: schedule.warmup_steps = 50: must be below schedule.decay_steps = 50, or no step is left to decay in",
        ),
        (
            "[data]\nvocab_size = 256",
            "2: data.vocab_size = 256: a byte-level BPE (data.tokenizer) needs at least 257 "
            "(256 bytes and <|endoftext|>)",
        ),
    ],
)
def test_contradictions(tmp_path, text, expected):
    assert problems(write(tmp_path, text)) == ["run.toml:" + expected]


@pytest.mark.parametrize(
    "spec",
    ["my_model.py", "MyGPT", ":", ":MyGPT", "my_model.py:", "a/b:C", "a..b:C", ".a:C", "a.py:3D", "a.py:B.C", "a:b:C"],
)
def test_a_class_is_a_file_or_a_module_and_a_name(tmp_path, spec):
    """Said once: n_embd may be no multiple of n_head in a class of one's own."""
    expected = f'run.toml:3: model.class = "{spec}": must be "file.py:Class" or "package.module:Class"'
    assert problems(write(tmp_path, f'[model]\nn_embd = 30\nclass = "{spec}"')) == [expected]


@pytest.mark.parametrize(
    "spec", ["", "my_model.py:MyGPT", "../a b/é.py:C_1", "C:\\a\\b.py:C", "model:GPT", "a.b_2.c:_D"]
)
def test_a_class_is_called_class_wherever_it_is_seen(tmp_path, spec):
    config = load(write(tmp_path, ""), [f"model.class={spec}"])
    assert config.model.class_ == to_dict(config)["model"]["class"] == spec
    assert tomllib.loads(to_toml(config))["model"]["class"] == spec
    assert config.model.model_copy(update={"vocab_size": 7}).class_ == spec
    jsonschema.validate(to_dict(config), json_schema())


def test_args_are_set_one_by_one_or_together(tmp_path):
    path = write(tmp_path, '[model]\nclass = "a.py:B"\n[model.args]\nwidth = 3\nnames = ["a"]\n')
    assert load(path).model.args == {"width": 3, "names": ["a"]}
    assert load(path, ["model.args.width=0.5", "model.args.new=x"]).model.args == {
        "width": 0.5,
        "names": ["a"],
        "new": "x",
    }
    assert load(path, ["model.args={a = {b = true}}"]).model.args == {"a": {"b": True}}


@pytest.mark.parametrize(
    "text",
    [
        '[model]\nclass = "a.py:B"\nn_embd = 30\nn_head = 4',
        '[model]\nclass = "a.py:B"\nn_embd = 12\npositions = "rope"',
        '[schedule]\nkind = "constant"\nwarmup_steps = 9999',
        '[optim]\nmin_lr = 1.0\n[schedule]\nkind = "constant"',
        '[data]\ntokenizer = "char"\nvocab_size = 1',
        "[model]\nn_embd = 12",  # a head of 3 is fine for learned positions
        "[schedule]\nwarmup_steps = 49\ndecay_steps = 50",
        "[optim]\nlr = 0.001\nmin_lr = 0.001",
        "[train]\nbatch_size = 12\nmicro_batch_size = 12",
    ],
)
def test_what_only_looks_like_a_contradiction(tmp_path, text):
    config = load(write(tmp_path, text))
    assert config == load(write(tmp_path, to_toml(config)))


def test_wrong_keys_are_not_held_against_others(tmp_path):
    """min_lr is above lr's default, n_embd no multiple of n_head's: but lr and n_head are what is wrong."""
    text = '[model]\nn_head = "x"\nn_embd = 30\n[optim]\nlr = -1.0\nmin_lr = 0.5\n'
    text += "[train]\nbatch_size = 7\nmicro_batch_size = 2"
    keys = [line.split(" = ")[0] for line in problems(write(tmp_path, text))]
    assert sorted(keys) == ["run.toml:2: model.n_head", "run.toml:5: optim.lr", "run.toml:9: train.micro_batch_size"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nmax_steps = true", "2: train.max_steps = true: must be a whole number"),
        ("[optim]\nlr = true", "2: optim.lr = true: must be a number"),
        ("[optim]\nbetas = [true, 0.9]", "2: optim.betas = true: item 1 must be a number"),
        ("[model]\nbias = 1", "2: model.bias = 1: must be true or false"),
        ("[train]\nmax_steps = 100.0", "2: train.max_steps = 100.0: must be a whole number"),
        ('[train]\nmax_steps = "100"', '2: train.max_steps = "100": must be a whole number'),
        ("[train]\nmax_steps = 1979-05-27", "2: train.max_steps = 1979-05-27: must be a whole number"),
        ("[train]\nout_dir = 07:32:00", '2: train.out_dir = 07:32:00: must be text in quotes, like "..."'),
        ("[train]\nout_dir = ['a']", "2: train.out_dir = ['a']: must be text in quotes, like \"...\""),
        ("[train]\nout_dir = ''", '2: train.out_dir = "": must not be empty'),
        ("[optim]\nlr = {a = 1}", "2: optim.lr = {'a': 1}: must be a number"),
        ("[optim]\nlr = nan", "2: optim.lr = nan: must be a finite number"),
        ("[optim]\nlr = -inf", "2: optim.lr = -inf: must be a finite number"),
        ("[optim]\nweight_decay = 1e999", "2: optim.weight_decay = inf: must be a finite number"),
        ("[optim]\nbetas = [nan, 0.9]", "2: optim.betas = nan: item 1 must be a finite number"),
        ("[optim]\nbetas = [0.9]", "2: optim.betas = [0.9]: item 2 is missing (a list of two numbers is expected)"),
        ("[optim]\nbetas = [0.1, 0.2, 0.3]", "2: optim.betas = [0.1, 0.2, 0.3]: must have two numbers"),
        ("[optim]\nbetas = 0.9", "2: optim.betas = 0.9: must be a list of two numbers, like [0.9, 0.95]"),
        ("[train]\nseed = -1", "2: train.seed = -1: must be greater than or equal to 0"),
        (f"[train]\nseed = {1 << 63}", f"2: train.seed = {1 << 63}: must be less than {1 << 63}"),
        ("optim = 3", "1: optim = 3: must be a section: [optim]"),
        ("[model]\nmax_steps = 5", "2: model.max_steps = 5: unknown key; did you mean train.max_steps?"),
        ("[data]\nblock_size = 5", "2: data.block_size = 5: unknown key; did you mean model.block_size?"),
        ("[[optim]]\nlr = 1", "1: optim = [{'lr': 1}]: must be a section: [optim]"),
        ("optim.lr = -1", "1: optim.lr = -1: must be greater than 0"),
        ("optim = {lr = -1}", "1: optim.lr = -1: must be greater than 0"),
        ('["optim"] # quoted\n\n"lr" = -1', "3: optim.lr = -1: must be greater than 0"),
        ("learning_rate = 3", "1: learning_rate: unknown section; did you mean [optim] lr?"),
        ("block_size = 3", "1: block_size: unknown section; did you mean [model] block_size?"),
        (
            "[logging.wandb]\nx = 1",
            "1: logging: unknown section; the sections are data, model, optim, schedule, train, runtime",
        ),
        ("[model]\n[train.seed]\na = 1", "2: train.seed = {'a': 1}: must be a whole number"),
        ("[model]\nclass = 3", '2: model.class = 3: must be text in quotes, like "..."'),
        ('class = "a.py:B"', "1: class: unknown section; did you mean [model] class?"),
        ('[model]\nclas = "a.py:B"', '2: model.clas = "a.py:B": unknown key; did you mean model.class?'),
        ('[model]\nclass_ = "a.py:B"', '2: model.class_ = "a.py:B": unknown key; did you mean model.class?'),
        ('[model]\nclass = "a.py:B"\nargs = 3', "3: model.args = 3: must be a table, like { width = 64 }"),
        (
            '[model]\nclass = "a.py:B"\n[model.args]\na = [07:32:00]',
            "3: model.args = 07:32:00: must hold plain values: text, numbers, true or false, lists and tables of them",
        ),
        ('[model]\nclass = "a.py:B"\n[model.args]\na = nan', "3: model.args = nan: must be a finite number"),
        (
            '[model]\nclass = "a.py:B"\n[model.args]\na = [{b = 0x10000000000000000}]',
            "3: model.args = {'a': [{'b': 18446744073709551616}]}: the whole numbers in it must have 64 bits at most",
        ),
        (f"[train]\nseed = 0x{'f' * 4000}", f"2: train.seed = ...: must be less than {1 << 63}"),
        (f"[optim]\nlr = 1{'0' * 400}", f"2: optim.lr = 1{'0' * 56}...: must not be so large"),
        ("[optim]\nmuon_lr = 1e300", f"2: optim.muon_lr = 1e+300: must be less than or equal to 1{'0' * 30}"),
        ("[model]\nn_layer = 1_000_000_000", "2: model.n_layer = 1000000000: must be less than or equal to 1000"),
        ('[data]\ndir = "a\u2028b"\nseparator = 1', '3: data.separator = 1: must be text in quotes, like "..."'),
    ],
)
def test_each_kind_of_value(tmp_path, text, expected):
    assert problems(write(tmp_path, text)) == ["run.toml:" + expected]


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_leads_to_a_key_that_exists(tmp_path, alias):
    section, key = ALIASES[alias].split(".")
    assert key in RunConfig.model_fields[section].annotation.model_fields
    (line,) = problems(write(tmp_path, f"[runtime]\n{alias} = 1"))
    assert line == f"run.toml:2: runtime.{alias} = 1: unknown key; here it is {section}.{key}"


def test_names_that_are_hardly_any(tmp_path):
    path = write(tmp_path, f'[train]\n"a\\nb" = 1\n"" = 2\n{"x" * 99} = 3\n["\\u001b[31m"]')
    names = [line.partition(" = ")[0] for line in problems(path)]
    long = '"train.' + "x" * 51 + '..."'
    assert names[:3] == [r'run.toml: "train.a\nb"', 'run.toml:3: "train."', f"run.toml:4: {long}"]
    assert names[3].startswith(r'run.toml: "\u001b[31m": unknown section')


def test_deep_nesting(tmp_path):
    for deep in ("[" * 5000, "[" * 5000 + "]" * 5000, "{a=" * 5000 + "1" + "}" * 5000):
        path = write(tmp_path, f"[model]\nargs = {{a = {deep}}}")
        assert problems(path) == ["run.toml: lists or tables in it are nested too deeply"]
    assert problems(write(tmp_path, f"data{'.a' * 5000} = 1"))[0].startswith("run.toml: data.a = ...: unknown key; ")
    for depth in (50, 250, 260):
        path = write(tmp_path, f'[model]\nclass = "a.py:B"\nargs = {{a = {"[" * depth}{"]" * depth}}}')
        (line,) = problems(path)
        assert re.fullmatch(r"run\.toml:3: model\.args = .{0,60}: must not be nested so deeply", line)
    assert problems(write(tmp_path, ""), ["model.n_layer=" + "[" * 5000])[0].endswith("must be a whole number")


def test_numbers_of_thousands_of_digits(tmp_path):
    path = write(tmp_path, f"[train]\nseed = {'9' * 5000}")
    assert problems(path) == ["run.toml: a number in it has thousands of digits"]
    assert problems(write(tmp_path, ""), [f"train.seed={'9' * 5000}"])[0].endswith("must be a whole number")


def test_of_many_mistakes_the_first_are_told(tmp_path):
    path = write(tmp_path, "[train]\n" + "".join(f"seeds{i} = 1\n" for i in range(2000)))
    lines = problems(path)
    assert lines[0] == "run.toml:2: train.seeds0 = 1: unknown key; did you mean train.seed?"
    assert len(lines) == 51
    assert lines[-1] == "and 1,950 more"


def test_long_values_are_shortened_and_stay_on_their_line(tmp_path):
    text = f'[model]\nnorm = "{"x" * 200}"\nactivation = "a\\nb"\nn_layer = {list(range(99))}'
    found = problems(write(tmp_path, text))
    assert len(found) == 3
    assert all(len(line) < 200 for line in found)


# ---- Files ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such run config"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00binary\x80"), "not a text file (TOML is UTF-8 text)"),
        (lambda path: path.write_text("lr = = 3"), "not valid TOML: Invalid value (at line 1, column 6)"),
        (lambda path: path.write_text("[train]\nseed = 1\nseed = 2\n"), "not valid TOML: Cannot overwrite a value"),
    ],
)
def test_files_that_are_none(tmp_path, make, message):
    path = tmp_path / "run.toml"
    make(path)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert error.value.what.startswith(message)
    assert error.value.where == str(path)


def test_an_empty_file_is_the_defaults_and_windows_may_have_written_it(tmp_path):
    assert load(write(tmp_path, "")) == RunConfig()
    assert load(write(tmp_path, b"\xef\xbb\xbf[train]\r\nseed = 5\r\n")).train.seed == 5


def test_numbers_may_be_whole_where_any_is_allowed(tmp_path):
    lr = load(write(tmp_path, "[optim]\nlr = 1\n")).optim.lr
    assert (lr, type(lr)) == (1.0, float)


# ---- --set ----


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        (" optim.lr = 1 ", "optim", "lr", 1.0),
        ("train.max_steps=5_000", "train", "max_steps", 5000),
        ("model.bias=false", "model", "bias", False),
        ("optim.betas=[0.8, 0.99]", "optim", "betas", (0.8, 0.99)),
        ('train.out_dir="a b"', "train", "out_dir", "a b"),
        ("train.out_dir='3'", "train", "out_dir", "3"),
        ("train.out_dir=runs/a=b", "train", "out_dir", "runs/a=b"),
        ("train.out_dir=C:\\runs\\new", "train", "out_dir", "C:\\runs\\new"),
        ("runtime.device=cuda:1", "runtime", "device", "cuda:1"),
        ("data.separator=", "data", "separator", ""),
        ("data.source=a\nb = 1", "data", "source", "a\nb = 1"),
        ("data.source=1\nb = 1", "data", "source", "1\nb = 1"),  # not a way to set something else
    ],
)
def test_set(tmp_path, override, section, key, value):
    path = write(tmp_path, "[optim]\nmin_lr = 0.0\nlr = 0.5\n[train]\nseed = 3")
    config = load(path, ["schedule.warmup_steps=0", override])
    assert getattr(getattr(config, section), key) == value
    assert (config.optim.min_lr, config.train.seed) == (0.0, 3)  # the rest stays


@pytest.mark.parametrize("override", ["optim.lr", "lr=3", "=3", ".lr=3", "optim.=3", "optim", ""])
def test_set_that_cannot_be_read(tmp_path, override):
    assert problems(write(tmp_path, ""), [override]) == [
        f"--set: cannot read {override!r}",
        "  fix: write --set section.key=value, e.g. --set optim.lr=3e-4",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=-1", "--set optim.lr = -1: must be greater than 0"),
        ("optim.lr=nan", "--set optim.lr = nan: must be a finite number"),
        ("train.out_dir=3", '--set train.out_dir = 3: must be text in quotes, like "..."'),
        ("train.seed=abc", '--set train.seed = "abc": must be a whole number'),
        ("train.seed=1979-05-27", "--set train.seed = 1979-05-27: must be a whole number"),
        ("optim.lrr=1", "--set optim.lrr = 1: unknown key; did you mean optim.lr?"),
        ("trian.seed=1", "--set trian: unknown section; did you mean [train]?"),
        ("optim.betas.x=1", "--set optim.betas.x = 1: unknown key; did you mean optim.betas?"),
        ("optim.min_lr=1", "--set optim.min_lr = 1.0: must not be above optim.lr = 0.001"),
    ],
)
def test_mistakes_of_set_are_not_blamed_on_the_file(tmp_path, override, expected):
    assert problems(write(tmp_path, "[optim]\nlr = 1e-3\nmin_lr = 1e-4"), [override]) == [expected]


def test_the_last_set_wins_and_the_input_is_left_alone():
    raw = {"optim": {"lr": 0.5}}
    assert check(raw, ["optim.lr=0.1", "optim.lr=0.2", "train.seed=4"]).optim.lr == 0.2
    assert raw == {"optim": {"lr": 0.5}}


# ---- Recipes and derived values ----


def test_a_recipe_fills_the_switches_and_a_set_switch_wins(tmp_path):
    modern = load(write(tmp_path, '[model]\nrecipe = "modern"')).model
    assert {key: getattr(modern, key) for key in RECIPES["modern"]} == RECIPES["modern"]
    plain = load(write(tmp_path, '[model]\nrecipe = "gpt2"')).model
    assert plain == RunConfig().model
    assert not any(getattr(plain, key) == value for key, value in RECIPES["modern"].items())
    mixed = load(write(tmp_path, '[model]\nqk_norm = false\nrecipe = "modern"'), ["model.bias=true"]).model
    assert (mixed.qk_norm, mixed.bias, mixed.positions) == (False, True, "rope")
    assert load(write(tmp_path, ""), ["model.recipe=modern"]).model == modern
    # The resolved config of a run keeps every switch, whatever later versions put into the recipe.
    assert to_dict(RunConfig(model=mixed))["model"]["positions"] == "rope"


def test_derived_values():
    config = check({"train": {"batch_size": 12, "micro_batch_size": 3, "max_steps": 500}, "model": {"block_size": 64}})
    assert (config.micro_batch_size, config.accumulation_steps, config.tokens_per_step) == (3, 4, 768)
    assert config.decay_steps == 500
    config = check({"train": {"batch_size": 12}, "schedule": {"decay_steps": 300}})
    assert (config.micro_batch_size, config.accumulation_steps, config.decay_steps) == (12, 1, 300)
    assert "accumulation_steps" not in json.dumps(to_dict(config))


def test_a_config_cannot_be_changed():
    config = RunConfig()
    for section, key, value in ((config, "optim", None), (config.optim, "lr", 1.0), (config.optim, "new", 1)):
        with pytest.raises(ValidationError):
            setattr(section, key, value)
    assert isinstance(config.optim.betas, tuple)
    with pytest.raises(TypeError):
        config.optim.betas[0] = 0.5
    assert to_dict(config) == to_dict(RunConfig())


# ---- Round trips and the JSON Schema ----

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
NAME = TEXT.filter(bool)
UNIT = st.floats(0, 1, exclude_max=True)
RATE = st.floats(0, 1e3, exclude_min=True)
COUNT = st.integers(0, (1 << 63) - 1)
PLAIN = st.recursive(
    st.one_of(st.booleans(), COUNT, UNIT, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAME, inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def configs(draw):
    """Any valid config, as plain values; each key is there or not."""
    n_head, batch = draw(st.integers(1, 16)), draw(st.integers(1, 64))
    lr, decay = draw(RATE), draw(st.integers(1, 1 << 30))
    choice = st.sampled_from
    sections = {
        "data": {
            "source": NAME,
            "dir": NAME,
            "tokenizer": NAME.filter(lambda name: name != "bpe"),
            "vocab_size": st.integers(1, 1_000_000),
            "val_fraction": st.floats(0, 1, exclude_min=True, exclude_max=True),
            "separator": TEXT,
            "text_key": NAME,
            "tales_stories": st.integers(1, 10_000_000),
            "tales_seed": st.integers(0, (1 << 63) - 1),
        },
        "model": {
            "class": st.just("my_model.py:MyGPT"),
            "recipe": choice(["gpt2", "modern"]),
            "n_head": st.just(n_head),
            "n_embd": st.just(2 * n_head * draw(st.integers(1, 99))),
            "n_layer": st.integers(1, 99),
            "block_size": st.integers(1, 1 << 20),
            "vocab_size": st.integers(0, 1_000_000_000),
            "ngrams": st.integers(1, 8),
            "ngram_rows": st.integers(1, 1_000_000_000),
            "dropout": UNIT,
            "attn_dropout": UNIT,
            "norm": choice(["layernorm", "rmsnorm"]),
            "activation": choice(["gelu", "gelu_tanh", "relu2", "swiglu"]),
            "positions": choice(["learned", "rope"]),
        }
        | dict.fromkeys(("bias", "qk_norm", "tie_embeddings", "zero_init"), st.booleans()),
        "optim": {
            "name": choice(["adamw", "muon"]),
            "lr": st.just(lr),
            "min_lr": st.floats(0, lr),
            "muon_lr": RATE,
            "muon_momentum": UNIT,
            "betas": st.lists(UNIT, min_size=2, max_size=2),
            "eps": RATE,
            "weight_decay": st.floats(0, 1e30),
            "decay_embeddings": st.booleans(),
            "grad_clip": st.floats(0, 1e30),
        },
        "schedule": {
            "kind": choice(["cosine", "linear", "constant"]),
            "warmup_steps": st.integers(0, decay - 1),
            "decay_steps": st.just(decay),
        },
        "train": {
            "out_dir": NAME,
            "max_steps": st.integers(1, 1 << 40),
            "batch_size": st.just(batch),
            "micro_batch_size": choice([0, *(n for n in range(1, batch + 1) if batch % n == 0)]),
            "align_documents": st.booleans(),
            "eval_windows": COUNT,
            "seed": st.integers(0, (1 << 63) - 1),
        }
        | dict.fromkeys(("eval_interval", "save_interval", "log_interval"), st.integers(1, 1 << 40)),
        "runtime": {
            "device": choice(["auto", "cpu", "cuda", "cuda:1", "mps"]),
            "dtype": choice(["auto", "float32", "bfloat16"]),
            "compile": st.booleans(),
            "threads": st.integers(0, 4096),
            "prefetch": st.integers(0, 1000),
        },
    }
    # What others depend on is always there.
    needed = {"n_head", "n_embd", "lr", "min_lr", "warmup_steps", "decay_steps", "batch_size", "tokenizer"}
    needed.add("micro_batch_size")
    raw = {}
    for section, keys in sections.items():
        raw[section] = {key: draw(values) for key, values in keys.items() if key in needed or draw(st.booleans())}
    if "class" in raw["model"]:
        raw["model"]["args"] = draw(st.dictionaries(NAME, PLAIN, max_size=3))
    return raw


@settings(max_examples=80, deadline=None)
@given(configs())
def test_the_resolved_config_gives_the_same_config_back(raw):
    config = check(raw)
    resolved = tomllib.loads(to_toml(config))
    assert check(resolved) == config
    assert check(json.loads(json.dumps(to_dict(config)))) == config  # as a checkpoint keeps it
    for section, keys in raw.items():
        for key, value in keys.items():
            assert resolved[section][key] == value
    assert {s: set(keys) for s, keys in resolved.items()} == {
        s: set(keys_of(f.annotation)) for s, f in RunConfig.model_fields.items()
    }
    jsonschema.validate(resolved, json_schema())


def test_the_schema_is_as_strict_as_the_reader():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = to_dict(RunConfig())
    validator.validate(good)
    validator.validate({})
    bad = [
        {"optim": {"lrr": 1}},
        {"trian": {}},
        {"optim": {"lr": 0}},
        {"optim": {"lr": "1"}},
        {"optim": {"betas": [0.9]}},
        {"model": {"recipe": "gpt3"}},
        {"model": {"class": "my_model.py"}},
        {"model": {"args": 1}},
        {"model": {"n_layer": 1.5}},
        {"train": {"seed": 1 << 63}},
        {"train": {"out_dir": ""}},
    ]
    for raw in bad:
        assert not validator.is_valid(raw), raw
        with pytest.raises(ConfigError):
            check(raw)


@pytest.mark.skipif(not EXAMPLES, reason="no examples here")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_are_valid(path):
    config = load(path)
    jsonschema.validate(tomllib.loads(path.read_text(encoding="utf-8")), json_schema())  # what an editor sees
    jsonschema.validate(to_dict(config), json_schema())
    assert check(tomllib.loads(to_toml(config))) == config


def test_every_key_says_what_it_means():
    for section, field in RunConfig.model_fields.items():
        for key, each in field.annotation.model_fields.items():
            assert each.description, f"{section}.{key}"
