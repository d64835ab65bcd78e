"""The run configs that ship with tinyllm: each loads, is installed with the package, trains, and is what it says."""

import http.server
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from tinyllm import cli, custom
from tinyllm.config import check, load, to_dict
from tinyllm.engine import new_state, open_run, train
from tinyllm.errors import ConfigError
from tinyllm.events import Evaluated, Finished, StepDone
from tinyllm.examples import example_files, examples, find_example, first_comment, read_example
from tinyllm.model import GPT
from tinyllm.prepare import prepare
from tinyllm.tales import stories

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared/data"
FILES = sorted((ROOT / "examples").glob("*.toml"))
NAMES = [path.stem for path in FILES]
MODELS = {"my-model": ROOT / "examples" / "my_model.py"}  # what some bring along
GPT2_SIZE = 50257


def test_the_tool_knows_exactly_these():
    assert [example.name for example in examples()] == NAMES
    assert "quickstart" in NAMES


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_new_prints_the_file_itself(path, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tinyllm", "new", path.stem])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    out, err = capfd.readouterr()
    assert out == path.read_text(encoding="utf-8")
    hint = "it trains the model in my_model.py: `tinyllm new my-model --out run.toml` writes both\n"
    assert err == (hint if path.stem in MODELS else "")


def test_only_these_bring_a_model():
    assert {example.name: example.model for example in examples() if example.model} == MODELS
    assert set((ROOT / "examples").iterdir()) - {ROOT / "examples/__pycache__"} == {*FILES, *MODELS.values()}


@pytest.mark.parametrize(
    ("out", "named"),
    [
        ("run.toml", "my_model.py"),
        ("a b/run.toml", "a b/my_model.py"),
        ("{here}/sub/x.toml", "sub/my_model.py"),  # relative all the same: what a checkpoint may name
        ("../run.toml", "{above}/my_model.py"),
    ],
)
def test_a_model_is_written_beside_its_config_which_finds_it(out, named, tmp_path, monkeypatch):
    here = tmp_path / "here"
    for folder in ("", "a b", "sub"):
        (here / folder).mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    out = Path(out.format(here=here))
    for path, text in example_files("my-model", out).items():
        path.write_text(text, encoding="utf-8")
    assert out.with_name("my_model.py").read_bytes() == MODELS["my-model"].read_bytes()
    config = load(out)
    assert config.model.class_ == named.format(above=tmp_path) + ":MyGPT"
    assert custom.load_class(config.model.class_).__name__ == "MyGPT"
    original = load(find_example("my-model").path)
    assert config == original.model_copy(update={"model": config.model})


@pytest.mark.parametrize(("out", "shown"), [("run.toml", "run.toml"), ("a b/x.toml", "'a b/x.toml'")])
def test_the_commands_in_its_first_lines_are_those_for_the_file_it_becomes(out, shown):
    (text,) = example_files("shakespeare-cpu", Path(out)).values()
    assert f"#   tinyllm train {shown}\n" in text
    assert "shakespeare-cpu.toml" not in text


def test_a_name_of_two_lines_does_not_leave_the_comment():
    (text,) = example_files("shakespeare-cpu", Path("a\nb.toml")).values()
    assert text == read_example("shakespeare-cpu")


@pytest.mark.parametrize("there", ["run.toml", "my_model.py"])
def test_neither_file_is_overwritten(there, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path(there).write_text("mine")
    monkeypatch.setattr(sys, "argv", ["tinyllm", "new", "my-model", "--out", "run.toml"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert f"{there}: is there already" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert Path(there).read_text() == "mine"


def test_a_name_that_is_none(tmp_path):
    with pytest.raises(ConfigError) as error:
        example_files("my-modl", tmp_path / "run.toml")
    assert (error.value.what, error.value.fix) == ("no example called 'my-modl'", "did you mean my-model?")


def test_the_list_says_what_each_is_for(capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tinyllm", "new"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main()
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for path in FILES:
        assert any(path.stem in line and first_comment(path) in line for line in lines), (
            "each on one line of a terminal"
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    args = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", folder, ROOT]
    made = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return next(folder.glob("*.whl"))


def test_a_wheel_brings_them_along(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packaged = {n: archive.read(n) for n in archive.namelist() if n.startswith("tinyllm/examples/")}
    assert packaged == {f"tinyllm/examples/{path.name}": path.read_bytes() for path in [*FILES, *MODELS.values()]}


def test_installed_from_a_wheel_it_finds_them(wheel, tmp_path):
    """Not those of the checkout, whose path is not even known there."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from tinyllm.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-I", "-c", code, "new", "quickstart"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == (ROOT / "examples" / "quickstart.toml").read_text()
    where = "import tinyllm.examples; print(tinyllm.examples.examples()[0].path)"
    code = code.partition("from tinyllm")[0] + where
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(tmp_path / "site" / "tinyllm" / "examples"))
    code = code.rpartition("import tinyllm.examples")[0] + "from tinyllm.cli import main; main()"
    args = [sys.executable, "-I", "-c", code, "new", "my-model", "--out", "run.toml"]
    subprocess.run(args, cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "my_model.py").read_bytes() == MODELS["my-model"].read_bytes()


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_has_as_many_parameters_as_it_says(path, monkeypatch):
    """The first line ends with a size like (10.8 M). On the meta device nothing is computed, nor any memory needed."""
    config = load(path)
    said = float(re.search(r"\(([\d.]+) M\)$", first_comment(path))[1]) * 1e6
    characters = 65  # of Tiny Shakespeare
    sizes = {"char": characters, "bpe": config.data.vocab_size, "gpt2": GPT2_SIZE}
    vocab_size = config.model.vocab_size or sizes[config.data.tokenizer]
    monkeypatch.chdir(path.parent)
    with torch.device("meta"):
        model = custom.build(config.model, vocab_size, 0) if path.stem in MODELS else GPT(config.model, vocab_size)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(said, rel=0.15)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_is_sound(path):
    """What no rule of the config asks for, but every recipe here should have."""
    config = load(path)
    assert check(to_dict(config)) == config
    assert config.optim.min_lr <= config.optim.lr * 0.1001
    assert config.schedule.warmup_steps <= config.train.max_steps / 10
    assert config.train.save_interval <= config.train.max_steps / 4
    assert config.train.out_dir == "out", "where `tinyllm sample` looks"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A local text in place of each source, and a web server for GPT-2's tokenizer."""
    folder = tmp_path_factory.mktemp("sources")
    text = DATA / "tinyshakespeare.txt"
    if text.exists():
        (folder / "shakespeare.txt").write_text(text.read_text()[:60_000])
    told = "<|endoftext|>\n".join(story.text + "\n" for story in stories(300, seed=1))
    (folder / "tinystories.txt").write_text(told + "<|endoftext|>\n")
    (folder / "text.txt").write_text(told)
    return folder


@pytest.fixture(scope="module")
def web():
    """OpenAI's server, as far as we need it."""

    class Web(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = (DATA / "gpt2" / self.path.rpartition("/")[2]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_trains(path, sources, web, tmp_path, monkeypatch):
    """Three steps of the real engine; what is large is cut, what is special to the example stays.

    Three, because where the head and the residual projections start at zero the first moves the one, the second
    the others, and only the third the norms before them.
    """
    monkeypatch.chdir(tmp_path)
    if path.stem in MODELS:
        shutil.copy(MODELS[path.stem], tmp_path)
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TINYLLM_MIRROR", web)
    full = load(path)
    if full.data.source == "shakespeare" and not (sources / "shakespeare.txt").exists():
        pytest.skip(f"{DATA}/tinyshakespeare.txt is not there")
    if full.data.tokenizer == "gpt2" and not (DATA / "gpt2").is_dir():
        pytest.skip(f"{DATA}/gpt2 is not there")
    accumulation = full.accumulation_steps
    cut = {
        "model.n_layer": 2,
        "model.n_head": 2,
        "model.n_embd": 32,
        "model.block_size": min(full.model.block_size, 64),
        "train.batch_size": 2 * min(accumulation, 4),
        "train.micro_batch_size": 2 if accumulation > 1 else 0,
        "train.max_steps": 3,
        "train.eval_windows": 2,
        "train.log_interval": 1,
        "schedule.warmup_steps": 1,
        "schedule.decay_steps": 10,  # a rate of 0 would move nothing
        "data.val_fraction": 0.1,
        "runtime.compile": "false",  # minutes, and test_runtime.py's business
        "runtime.device": "cpu",
        "runtime.dtype": "float32",
    }
    if full.data.source == "tales":
        cut["data.tales_stories"] = 300
    else:
        cut["data.source"] = f"{sources}/{full.data.source}.txt"
    if full.data.tokenizer == "bpe":
        cut["data.vocab_size"] = 300
    config = load(path, [f"{key}={value}" for key, value in cut.items()])
    *_, prepared = prepare(config.data)
    assert (prepared.train.documents > 0) == (full.data.source != "shakespeare")
    run = open_run(config)
    state = new_state(run)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    events = list(train(run, state))
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3]
    assert [event.step for event in events if isinstance(event, Evaluated)] == [0, 3]
    assert isinstance(events[-1], Finished)
    first, last = (event for event in events if isinstance(event, Evaluated))
    assert last.train.loss < first.train.loss, "it learns something"
    after = torch.load("out/ckpt.pt", weights_only=True)["model"]
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert not unmoved
