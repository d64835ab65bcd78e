"""The run configs that ship with tinyllm: each loads, is installed with the package, trains, and is what it says."""

import http.server
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from tinyllm import cli
from tinyllm.config import check, load, to_dict
from tinyllm.engine import new_state, open_run, train
from tinyllm.events import Evaluated, Finished, StepDone
from tinyllm.examples import examples, first_comment
from tinyllm.model import GPT
from tinyllm.prepare import prepare
from tinyllm.tales import stories

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared/data"
FILES = sorted((ROOT / "examples").glob("*.toml"))
NAMES = [path.stem for path in FILES]
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
    assert capfd.readouterr() == (path.read_text(encoding="utf-8"), "")


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
        packaged = {name: archive.read(name) for name in archive.namelist() if name.endswith(".toml")}
    assert packaged == {f"tinyllm/examples/{path.name}": path.read_bytes() for path in FILES}


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


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_has_as_many_parameters_as_it_says(path):
    """The first line ends with a size like (10.8 M). On the meta device nothing is computed, nor any memory needed."""
    config = load(path)
    said = float(re.search(r"\(([\d.]+) M\)$", first_comment(path))[1]) * 1e6
    characters = 65  # of Tiny Shakespeare
    sizes = {"char": characters, "bpe": config.data.vocab_size, "gpt2": GPT2_SIZE}
    with torch.device("meta"):
        model = GPT(config.model, config.model.vocab_size or sizes[config.data.tokenizer])
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
