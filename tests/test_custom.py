"""A model of one's own: real files, real processes, every way in which a class can be wrong, and what may be run."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinyllm import checkpoint as ckpt
from tinyllm import custom
from tinyllm.config import OptimConfig, check, to_dict
from tinyllm.engine import new_state, open_run, restore, snapshot, train
from tinyllm.errors import CheckpointError, ConfigError
from tinyllm.events import Evaluated, Stopped
from tinyllm.folder import reopen
from tinyllm.generate import Sampling, Speaker, generate
from tinyllm.model import GPT
from tinyllm.optim import Muon, build_optimizers, parameter_groups

# A little causal model: a running mean of what came before, through one hidden layer; tied, with dropout.
MODEL = """
import torch
from torch import nn

class MyGPT(nn.Module):
    def __init__(self, vocab_size, n_embd, block_size, dropout, hidden=32):
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.inner = nn.Sequential(nn.Linear(2 * n_embd, hidden), nn.GELU(), nn.Linear(hidden, n_embd))
        self.norm = nn.LayerNorm(n_embd)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        T = tokens.shape[1]
        x = self.wte(tokens) + self.wpe.weight[:T]
        mean = x.cumsum(1) / torch.arange(1, T + 1, device=x.device)[:, None]
        return self.head(self.norm(x + self.dropout(self.inner(torch.cat((x, mean), dim=-1)))))
"""
SPEC = "my_model.py:MyGPT"
V, CONTEXT = 11, 16
TINYLLM = [sys.executable, "-m", "tinyllm"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder to be in, with the model; and the import system as it was, afterwards."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (folder / "my_model.py").write_text(MODEL)
    yield folder
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def config_of(spec=SPEC, *overrides, **values):
    model = {"class": spec, "block_size": CONTEXT, "n_embd": 8, "n_head": 3}  # 3 heads of 8: the class's own affair
    return check({"model": model | values}, overrides).model


def built(spec=SPEC, *, seed=1, **values):
    return custom.build(config_of(spec, **values), V, seed)


def build_and_check(config):
    custom.check_contract(custom.build(config, V, 1), config, V)


def complaint(text, name="Bad", **values):
    """What is said of a class in a file bad.py."""
    Path("bad.py").write_text(text)
    config = config_of(f"bad.py:{name}", **values)
    with pytest.raises(ConfigError) as error:
        build_and_check(config)
    assert error.value.where == f"bad.py:{name}"
    assert "\n" not in error.value.what
    return str(error.value)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- What a class is given ----

ASKS = "from torch import nn\nclass A(nn.Module):\n    def __init__(self, {}):\n        super().__init__()\n"
ASKS += "        self.got = dict(locals()); self.layer = nn.Linear(2, 2)\n"


@pytest.mark.parametrize(
    ("asks_for", "args", "expected"),
    [
        ("vocab_size", {}, {"vocab_size": V}),
        ("n_layer, *, block_size=5, bias=False", {}, {"n_layer": 4, "block_size": CONTEXT, "bias": True}),
        ("width, n_layer=9", {"width": 3.5}, {"width": 3.5, "n_layer": 4}),
        ("n_layer, vocab_size", {"n_layer": 77, "vocab_size": 5}, {"n_layer": 77, "vocab_size": 5}),
        ("unknown=6, dropout=0.5", {}, {"unknown": 6, "dropout": 0.25}),
        ("n_head, **rest", {}, {"n_head": 3, "rest": {}}),
        ("n_head, **rest", {"a": [1, {"b": 2}]}, {"n_head": 3, "rest": {"a": [1, {"b": 2}]}}),
        ("*many", {}, {"many": ()}),
    ],
)
def test_a_class_gets_what_it_asks_for_by_name(asks_for, args, expected):
    Path("asks.py").write_text(ASKS.format(asks_for))
    got = built("asks.py:A", args=args, dropout=0.25).got
    assert {name: got[name] for name in got if name not in ("self", "__class__")} == expected


def test_or_the_whole_config_with_the_vocabulary_filled_in():
    Path("asks.py").write_text(ASKS.format("config"))
    config = config_of("asks.py:A")
    assert config.vocab_size == 0
    assert built("asks.py:A").got["config"] == config.model_copy(update={"vocab_size": V})


def test_what_nobody_knows_is_an_error_that_says_what_there_is():
    said = complaint(ASKS.format("vocab_size, width, depth, n_embd"), "A")
    assert "A asks for width, depth, and nobody knows what that is" in said
    assert "fix: set model.args.width, give it a default, or ask for one of activation, attn_dropout, bias," in said
    assert all(name in said for name in ("block_size", "config", "n_layer", "vocab_size"))
    assert not any(name in said for name in ("class_", "args,"))
    said = complaint(ASKS.format("vocab_size, width=3"), "A", args={"widht": 3, "deep": 1})
    assert "A does not take widht, deep, which model.args has\n  fix: it takes vocab_size, width" in said


# ---- Weights ----


def test_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    first, state = built(seed=3), torch.get_rng_state()
    torch.manual_seed(6)
    torch.randn(10)
    assert same(first.state_dict(), built(seed=3).state_dict())
    assert not torch.equal(first.wte.weight, built(seed=4).wte.weight)
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state), "and building one draws nothing from the others' generator"


def test_the_check_leaves_no_trace():
    model = built(dropout=0.5).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    custom.check_contract(model, config_of(), V)
    assert same(weights, model.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


# ---- Where a class comes from ----


def test_a_file_is_run_once_and_again_when_it_changed():
    Path("count.py").write_text(MODEL + "\nprint('run')\n")
    first = custom.load_class("count.py:MyGPT")
    before = set(sys.modules)
    assert custom.load_class("./count.py:MyGPT") is first
    assert set(sys.modules) == before
    assert sys.modules[first.__module__].MyGPT is first, "which dataclasses and torch.compile rely on"
    Path("count.py").write_text(MODEL.replace("GELU", "ReLU"))
    assert custom.load_class("count.py:MyGPT") is not first
    assert not Path("__pycache__").exists()


def test_what_lies_beside_the_file_can_be_imported(here):
    (here / "sub").mkdir()
    (here / "sub/my_layers_1.py").write_text(MODEL)
    (here / "sub/my_lazy_1.py").write_text("")
    text = "import my_layers_1\nclass Mine(my_layers_1.MyGPT):\n    def forward(self, tokens):\n"
    (here / "sub/beside.py").write_text(text + "        import my_lazy_1\n        return super().forward(tokens)\n")
    path = list(sys.path)
    model = built("sub/beside.py:Mine")
    assert sys.path[: len(path)] == path, "nothing of torch's or ours is shadowed afterwards"
    custom.check_contract(model, config_of(), V)


def test_a_module_of_a_package_is_found_without_running_anything(here):
    (here / "pkg_1/inner").mkdir(parents=True)
    (here / "pkg_1/__init__.py").write_text("")
    (here / "pkg_1/inner/__init__.py").write_text("raise SystemExit('run')")
    (here / "pkg_1/inner/net.py").write_text(MODEL)
    source = custom.find("pkg_1.inner.net:MyGPT")
    assert source.path == here / "pkg_1/inner/net.py"
    assert source.sha256 == custom.find("pkg_1/inner/net.py:MyGPT").sha256
    assert not any(name.startswith("pkg_1") for name in sys.modules)
    (here / "pkg_1/inner/__init__.py").write_text("")
    assert built("pkg_1.inner.net:MyGPT")(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, V)


@pytest.mark.parametrize("spec", ["sys:A", "no_such_thing:A", "tinyllm.no_such:A", "tinyllm.model.GPT:A", "os.path:A"])
def test_modules_that_are_none(spec):
    with pytest.raises(ConfigError) as error:
        custom.load_class(spec)
    if spec == "os.path:A":  # a module to `import`, not to the finders
        assert error.value.what
        return
    assert error.value.what == f"no Python module is called {spec[:-2]}"
    assert "in the current directory?" in error.value.fix


# ---- Classes that are wrong ----


def test_a_file_that_is_not_there(here):
    with pytest.raises(ConfigError) as error:
        built("sub/none.py:A")
    assert str(error.value) == (
        f"sub/none.py:A: there is no such file\n  fix: a relative path starts at the current directory, {here}"
    )
    (here / "folder.py").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.py cannot be read: Is a directory"):
        built("folder.py:A")


SUBCLASS = "expected a subclass of torch.nn.Module"
TAKES = "def forward(self, tokens): ..."
ALONE = "return the logits alone; the loss is computed outside"
EVERY = "return the logits of every position, not of the last alone"
HEAD = """import torch
from torch import nn
class Bad(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.wte, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size)
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            MODEL + "class Other(MyGPT): pass\nx = 1\n",
            "bad.py has no Bad\n  fix: the models that are there: MyGPT, Other",
        ),
        ("x = 1", "bad.py has no Bad\n  fix: the models that are there: none"),
        ("class Bad: pass", f"Bad is a class, {SUBCLASS}\n  fix: class Bad(torch.nn.Module): ..."),
        ("def Bad(vocab_size): ...", f"Bad is a function, {SUBCLASS}"),
        ("from torch.nn import Linear as Bad", "bad.py only imports Bad, from torch.nn.modules.linear"),
        (
            "import torch\n\nimport no_such_1",
            "the import raised ModuleNotFoundError: No module named 'no_such_1' (bad.py, line 3)",
        ),
        ("x = 1\nx y", "the import raised SyntaxError: invalid syntax (bad.py, line 2)"),
        ("def f():\n    return 1 / 0\nf()", "the import raised ZeroDivisionError: division by zero (bad.py, line 2)"),
        ("raise SystemExit", "the import raised SystemExit (bad.py, line 1)"),
        ("raise ValueError('a\\nb')", "the import raised ValueError: a (bad.py, line 1)"),
        ("\0", "the import raised "),
        (HEAD + "        raise ValueError('no')", "Bad(...) raised ValueError: no (bad.py, line 7)"),
        (HEAD + "        nn.Linear(-1, 2)", "Bad(...) raised RuntimeError: "),
        (
            HEAD.replace("super().__init__()", "pass"),
            "Bad(...) raised AttributeError: cannot assign module before Module.__init__() call (bad.py, line 6)",
        ),
        ("from torch import nn\nclass Bad(nn.Module): pass", "it has no trainable parameters\n  fix: register layers"),
        (HEAD + "        self.requires_grad_(False)", "it has no trainable parameters"),
        (HEAD + "        self.lazy = nn.LazyLinear(3)", "it has lazy parameters\n  fix: give every layer its size"),
        (HEAD, "forward of ids of shape (2, 8) raised NotImplementedError: Module [Bad] is missing"),
    ],
)
def test_classes_that_are_none(text, words):
    assert words in complaint(text)


LOGITS = "self.head(self.wte(x))"
TOO_SHORT = "self.head(self.wte(x) + torch.zeros(10)[torch.arange(x.shape[1])][:, None])"  # of 16 positions
WANTED = "expected float logits of shape (2, 8, 11)"


@pytest.mark.parametrize(
    ("takes", "returns", "came", "fix"),
    [
        (
            "x, y",
            LOGITS,
            "forward(x, y) cannot be called with the token ids alone: missing a required argument: 'y'",
            TAKES,
        ),
        ("", LOGITS, "forward() cannot be called with the token ids alone: too many positional arguments", TAKES),
        ("x, y=None", f"{LOGITS}, y", f"forward returned a tuple of 2, {WANTED}", ALONE),
        ("x", f"[{LOGITS}]", f"forward returned a list of 1, {WANTED}", ALONE),
        ("x", f"dict(logits={LOGITS})", f"forward returned a dict, {WANTED}", ALONE),
        ("x", "None", f"forward returned a NoneType, {WANTED}", ALONE),
        ("x", "self.wte(x)", f"a tensor of shape (2, 8, 8), {WANTED}", "the last layer needs vocab_size = 11 outputs"),
        ("x", f"{LOGITS}[:, [-1]]", f"a tensor of shape (2, 1, 11), {WANTED}", EVERY),
        ("x", f"{LOGITS}[:, -1]", f"a tensor of shape (2, 11), {WANTED}", EVERY),
        (
            "x",
            f"{LOGITS}.flatten(0, 1)",
            f"a tensor of shape (16, 11), {WANTED}",
            "one row of vocab_size logits for each",
        ),
        ("x", f"{LOGITS}.transpose(1, 2)", f"a tensor of shape (2, 11, 8), {WANTED}", "one row of vocab_size logits"),
        ("x", f"{LOGITS}.long()", f"int64 values, {WANTED}", "return the logits, not the ids they choose"),
        ("x", f"{LOGITS}.detach()", f"logits without a gradient, {WANTED}", "no torch.no_grad or .detach() on the way"),
        ("x", "self.head(x)", "forward of ids of shape (2, 8) raised RuntimeError: ", ""),
        ("x", "x.none", "raised AttributeError: 'Tensor' object has no attribute 'none' (bad.py, line 8)", ""),
        ("x", TOO_SHORT, "forward of ids of shape (1, 16) raised IndexError: ", ""),
    ],
)
def test_what_forward_must_do(takes, returns, came, fix):
    text = HEAD + f"    def forward({', '.join(filter(None, ['self', takes]))}):\n        return {returns}\n"
    said, _, advice = complaint(text).partition("\n")
    assert came in said
    assert advice.startswith(f"  fix: {fix}") if fix else not advice


def asked_of(spec, **values):
    """What the check asks of a class and gets: the shape of the ids, and the type of the logits."""
    asked, model = [], built(spec, **values)
    model.register_forward_hook(lambda _, args, logits: asked.append((tuple(args[0].shape), logits.dtype)))
    custom.check_contract(model, config_of(spec, **values), V)
    return asked


def test_a_context_of_one_token_and_a_model_in_half_precision():
    assert asked_of(SPEC, block_size=1) == [((2, 1), torch.float32), ((1, 1), torch.float32)]
    half = "class Half(MyGPT):\n    def forward(self, tokens):\n        return super().forward(tokens).bfloat16()\n"
    Path("my_model.py").write_text(MODEL + half)
    assert asked_of("my_model.py:Half") == [((2, 8), torch.bfloat16), ((1, CONTEXT), torch.bfloat16)]


# ---- The engine ----


@pytest.fixture
def make(make_run):
    """A run of the model in my_model.py."""
    return lambda *overrides: make_run(f"model.class={SPEC}", "model.dropout=0.1", *overrides)


def finish(run, state, stop_at=None):
    """Train to the end or to a step; the events."""
    return list(train(run, state, lambda: state.step == stop_at))


def test_it_trains_and_a_stopped_run_goes_on_to_the_last_bit(make, tmp_path):
    whole = make()
    state = new_state(whole)
    first, *_, last = (event.val.loss for event in finish(whole, state) if isinstance(event, Evaluated))
    assert last < first
    run = make(f"train.out_dir={tmp_path / 'parts'}")
    part = new_state(run)
    assert isinstance(finish(run, part, stop_at=7)[-1], Stopped)
    config, found = reopen(tmp_path / "parts", ())
    checkpoint = found.checkpoint
    assert checkpoint.step == 7
    assert checkpoint.config["model"]["class"] == SPEC
    assert checkpoint.model_source == custom.find(SPEC).sha256
    again = open_run(config)
    resumed = restore(again, checkpoint)
    finish(again, resumed)
    assert same(state.model.state_dict(), resumed.model.state_dict())


def test_tied_weights_are_one(make, tmp_path):
    run = make()
    state = new_state(run)
    finish(run, state)
    model = state.model
    assert model.head.weight is model.wte.weight
    names = [name for group in parameter_groups(model, run.config.optim) for name in group.names]
    assert "wte.weight" in names
    assert "head.weight" not in names
    saved = ckpt.load(tmp_path / "out/ckpt.pt")
    assert "head.weight" not in saved.optimizer
    assert saved.model["head.weight"].data_ptr() == saved.model["wte.weight"].data_ptr()
    loaded = restore(run, saved).model
    assert loaded.head.weight is loaded.wte.weight
    assert same(loaded.state_dict(), model.state_dict())


def test_a_wrong_class_is_found_when_the_run_is_opened(make_run):
    Path("bad.py").write_text(HEAD + "    def forward(self, x): return self.wte(x)")
    with pytest.raises(ConfigError, match="forward returned a tensor of shape"):
        make_run("model.class=bad.py:Bad")


def test_the_engine_does_to_it_what_it_does_to_the_gpt(make_run, tmp_path):
    """The same network under another name, from the same weights: the same, to the last bit."""
    text = """
import tinyllm.model, torch
class Mine(torch.nn.Module):
    def __init__(self, config, vocab_size):
        super().__init__()
        self.net = tinyllm.model.GPT(config, vocab_size)
    def forward(self, tokens):
        return self.net(tokens)
"""
    Path("same.py").write_text(text)
    switches = ["optim.name=muon", "model.dropout=0.2", "model.tie_embeddings=false", "train.micro_batch_size=4"]
    ours = make_run(*switches)
    mine = make_run(*switches, "model.class=same.py:Mine", f"train.out_dir={tmp_path / 'mine'}")
    a, b = new_state(ours), new_state(mine)
    b.model.net.load_state_dict(a.model.state_dict())
    finish(ours, a)
    finish(mine, b)
    assert same(a.model.state_dict(), b.model.net.state_dict())


# ---- Muon ----


def muon_names(model):
    groups = {group.name: group.names for group in parameter_groups(model, OptimConfig(name="muon"))}
    return set(groups.get("muon", ()))


E, A, HEAD_ = "self.wte = nn.Embedding(V, 8)", "self.a = nn.Linear(8, 8)", "self.head = nn.Linear(8, V)"
PARTS = {
    "head": ([E, A, HEAD_], {"a.weight"}),
    "head first, by another name": (["self.out = nn.Linear(8, V)", E, A], {"a.weight"}),
    "as many positions as a layer is wide": ([E, "self.wpe = nn.Embedding(8, 8)", A, HEAD_], {"a.weight"}),
    "tied": ([E, A, HEAD_, "self.head.weight = self.wte.weight"], {"a.weight"}),
    "layers as wide as the vocabulary, and no head": (
        [E, "self.blocks = nn.ModuleList([nn.Linear(8, V), nn.Linear(V, 8)])"],
        {"blocks.0.weight", "blocks.1.weight"},
    ),
    "no embedding": (["self.b = nn.Linear(V, 8)", A, HEAD_], {"a.weight", "b.weight"}),
    "convolution": ([E, "self.c = nn.Conv1d(8, 8, 3)", HEAD_], set()),
    "in a sequence": (
        ["self.net = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, 9), nn.Linear(9, 8), nn.Linear(8, V))"],
        {"net.1.weight", "net.2.weight"},
    ),
}


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_muon_gets_the_matrices_inside_and_never_the_head(parts):
    lines, expected = parts
    text = "from torch import nn\nV = 11\nclass M(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    Path("parts.py").write_text(text + "".join(f"        {line}\n" for line in lines))
    assert muon_names(built("parts.py:M")) == expected


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
@pytest.mark.parametrize("vocab_size", [16, 64])  # as wide as the stream, as wide as the MLP
def test_of_the_gpt_that_is_all_of_the_blocks(recipe, vocab_size):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "recipe": recipe}
    model = GPT(check({"model": sizes}).model, vocab_size)
    assert muon_names(model) == {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2}


def test_a_model_of_matrices_alone_has_one_optimizer():
    text = "from torch import nn\nclass M(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    Path("parts.py").write_text(text + "        self.a = nn.Parameter(nn.Linear(5, 5).weight.detach())\n")
    optimizers = build_optimizers(built("parts.py:M"), OptimConfig(name="muon"))
    assert [type(each) for each in optimizers] == [Muon]


# ---- Sampling ----


@torch.no_grad()
@pytest.mark.parametrize("prompt", [[3], list(range(10)), [7] * 40])
def test_a_sample_is_that_of_full_forward_passes(prompt):
    model = built().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    ids = list(prompt)
    for _ in range(30):
        ids.append(int(model(torch.tensor([ids[-CONTEXT:]]))[0, -1].argmax()))
    steps = generate(model, prompt, Sampling(temperature=0.0, max_new_tokens=30), n_samples=2, block_size=CONTEXT)
    assert [list(column) for column in zip(*steps, strict=True)] == [ids[len(prompt) :]] * 2
    assert len(set(ids)) > 2


def test_a_speaker_runs_only_what_may_be_run(make, capsys):
    run = make()
    checkpoint = snapshot(run, new_state(run))
    speaker = Speaker(checkpoint, "cpu")
    said = list(speaker.speak(speaker.encode("Once"), Sampling(max_new_tokens=40), 2))
    assert len(said) == 40
    Path("my_model.py").write_text(MODEL + "print('run!')")
    with pytest.raises(CheckpointError, match="is not the file that it was trained with, so it was not run"):
        Speaker(checkpoint, "cpu")
    assert "run!" not in capsys.readouterr().out
    Speaker(checkpoint, "cpu", run.config)  # whoever brings the config means it
    assert "run!" in capsys.readouterr().out


# ---- Which files a checkpoint may have us run ----


def assert_not_run(spec, recorded, *words):
    """`trust` refuses, says why, and runs nothing; returns the fix."""
    with pytest.raises(CheckpointError) as error:
        custom.trust(spec, recorded, "ckpt.pt")
    assert error.value.where == "ckpt.pt"
    for word in (f"its model is {spec}, ", *words):
        assert word in error.value.what
    return error.value.fix


OUTSIDE = "which is not in the current directory, so it was not run"
CONSENT = "if you know what it runs, say so: --set model.class=path.py:Class"


def test_an_unchanged_file_of_this_folder_may_be_run(here):
    (here / "sub").mkdir()
    text = MODEL + "raise SystemExit('run')"  # if anybody runs it to find out
    for name in ("my_model.py", "sub/own.py"):
        (here / name).write_text(text)
    (here / "own_link.py").symlink_to(here / "sub/own.py")
    paths = ("my_model.py", "./my_model.py", "sub/own.py", "sub/../my_model.py", "own_link.py", "sub.own")
    recorded = hashlib.sha256(text.encode()).hexdigest()
    for spec in (f"{path}:MyGPT" for path in paths):
        assert custom.find(spec).sha256 == recorded
        assert custom.trust(spec, recorded, "ckpt.pt") is None
        assert_not_run(spec, recorded[::-1], "is not the file that it was trained with")


def test_a_changed_one_may_not(here):
    recorded = custom.find(SPEC).sha256
    (here / "my_model.py").write_text(MODEL + "#")
    fix = assert_not_run(SPEC, recorded, "my_model.py is not the file that it was trained with, so it was not run")
    assert fix == f"if the new one is meant, say so: --set model.class={SPEC}"
    assert_not_run(SPEC, "", "is not the file")
    (here / "my_model.py").unlink()
    assert assert_not_run(SPEC, recorded, "and there is no such file in the current directory") == CONSENT


def test_nor_one_that_is_elsewhere_however_it_is_reached(here, tmp_path):
    (tmp_path / "outside.py").write_text(MODEL)
    (here / "link.py").symlink_to(tmp_path / "outside.py")
    (here / "folder").symlink_to(tmp_path)
    recorded = custom.find("../outside.py:MyGPT").sha256
    for path in ("../outside.py", f"{tmp_path}/outside.py", "link.py", "folder/outside.py", f"{here}/my_model.py"):
        assert assert_not_run(f"{path}:MyGPT", recorded, OUTSIDE) == CONSENT


@pytest.mark.parametrize("folder", ["site-packages", ".venv/lib/python3.11/site-packages"])
def test_nor_one_that_is_installed_even_in_this_folder(here, folder, monkeypatch):
    """Others wrote it: with the arguments of a stranger's checkpoint it may do anything."""
    (here / folder).mkdir(parents=True)
    (here / folder / "installed_1.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(here / folder))
    for spec in ("installed_1:MyGPT", f"{folder}/installed_1.py:MyGPT"):
        assert assert_not_run(spec, custom.find(spec).sha256, OUTSIDE) == CONSENT
    for spec in ("subprocess:Popen", "torch.nn.modules.linear:Linear", "no_such_module:A"):
        assert assert_not_run(spec, "", OUTSIDE) == CONSENT


def test_reopening_asks_before_it_runs(make, tmp_path, here):
    run = make()
    ckpt.save(tmp_path / "out/ckpt.pt", snapshot(run, new_state(run)))
    path = tmp_path / "out/ckpt.pt"
    assert reopen(path, ())[0].model.class_ == SPEC
    (here / "other.py").write_text(MODEL + "#")
    (here / "my_model.py").unlink()
    with pytest.raises(CheckpointError, match="there is no such file"):
        reopen(path, ["train.log_interval=5"])
    assert reopen(path, ["model.class=other.py:MyGPT"])[0].model.class_ == "other.py:MyGPT"
    with pytest.raises(ConfigError, match="cannot change in a run that goes on"):
        reopen(path, ["model.args.hidden=5"])


def test_a_checkpoint_of_the_gpt_names_no_file(make_run):
    run = make_run()
    checkpoint = snapshot(run, new_state(run))
    assert (checkpoint.model_source, checkpoint.config["model"]["class"]) == ("", "")
    with pytest.raises(CheckpointError, match="is not the file"):
        Speaker(replace(checkpoint, config=to_dict(run.config) | {"model": {"class": SPEC}}))


# ---- The command line ----


def tiny(*args, code=0):
    env = os.environ | {"PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}
    done = subprocess.run([*TINYLLM, *args], capture_output=True, text=True, env=env, timeout=200, encoding="utf-8")
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout, done.stderr


def test_from_a_class_to_a_storyteller(here, tales, make_config):
    """train, resume, eval and sample in processes of their own."""
    from tinyllm.config import to_toml

    config = make_config(f"model.class={SPEC}", "model.dropout=0.1", "model.args.hidden=48", "train.out_dir=whole")
    (here / "run.toml").write_text(to_toml(config))
    _, err = tiny("train", "--no-sanity")
    assert "my_model.py:MyGPT, context 16" in err
    assert "running" not in err, "it is the user's own config"
    assert 'class = "my_model.py:MyGPT"' in (here / "whole/run.toml").read_text()
    assert "hidden = 48" in (here / "whole/run.toml").read_text()

    run = open_run(check(to_dict(config), ["train.out_dir=parts"]))
    finish(run, new_state(run), stop_at=13)
    _, err = tiny("resume", "parts/ckpt.pt")
    assert err.startswith("running my_model.py: its MyGPT is the model\n")
    assert same(ckpt.load("whole/ckpt.pt").model, ckpt.load("parts/ckpt.pt").model)

    out, err = tiny("eval", "parts", "--windows", "5")
    assert "val   loss" in out
    assert "running my_model.py" in err
    speak = ("sample", "--checkpoint", "parts", "--prompt", "Once", "--max-new-tokens", "30")
    out, err = tiny(*speak)
    assert out.startswith("Once")
    assert len(out) > 20
    assert err.startswith("running my_model.py: its MyGPT is the model\n")
    assert tiny(*speak)[0] == out

    (here / "my_model.py").write_text(MODEL + "print('new file')\n")
    for command in (("resume", "parts/ckpt.pt"), ("eval", "parts"), speak):
        out_now, err = tiny(*command, code=2)
        assert "is not the file that it was trained with, so it was not run" in err
        assert "fix: if the new one is meant, say so: --set model.class=my_model.py:MyGPT" in err
        assert "new file" not in out_now + err
        assert "running" not in err
    consent = ("--set", "model.class=my_model.py:MyGPT")
    assert tiny(*speak, *consent)[0] == "new file\n" + out
    assert "new file\nval" not in tiny("eval", "parts", "--windows", "5", *consent)[0]
    assert tiny("resume", "parts/ckpt.pt", *consent)[0].startswith("new file\n")
    _, err = tiny(*speak, "--set", "train.seed=3", code=2)
    assert "--set train.seed: cannot change in a run that goes on" in err
    assert "may change: model.class" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class MyGPT: pass", "error: my_model.py:MyGPT: MyGPT is a class, expected a subclass of torch.nn.Module"),
        (
            "import no_such_1",
            "the import raised ModuleNotFoundError: No module named 'no_such_1' (my_model.py, line 1)",
        ),
        (
            MODEL.replace("return self.head(", "return None, self.head("),
            "for ids of shape (2, 8) forward returned a tuple of 2, expected float logits of shape (2, 8, ",
        ),
    ],
)
def test_a_wrong_class_ends_with_2_before_anything_is_written(here, tales, make_config, text, words):
    from tinyllm.config import to_toml

    (here / "run.toml").write_text(to_toml(make_config(f"model.class={SPEC}", "train.out_dir=out")))
    (here / "my_model.py").write_text(text)
    for command in ("train", "sanity"):
        _, err = tiny(command, code=2)
        assert words in err
    assert not (here / "out").exists()
