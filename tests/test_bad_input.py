"""Every mistake a user makes is answered with what is wrong, where, and the way out: exit code 2, nothing half-written.

The commands are called in this process, through the function that the console script calls: an exception that it does
not turn into a message would be a traceback there, and fails the test here.
"""

import http.server
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from tinyllm import cli

TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(300))
CONFIG = """\
[data]
source = "a.txt"
tokenizer = "char"

[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16

[schedule]
warmup_steps = 2

[train]
max_steps = 6
batch_size = 2
eval_windows = 2

[runtime]
device = "cpu"
dtype = "float32"
threads = 1
"""


class Home:
    """A working folder, and what calling tinyllm in it gives."""

    def __init__(self, path, monkeypatch, capfd):
        self.path, self.monkeypatch, self.capfd = path, monkeypatch, capfd

    def run(self, *args):
        """(exit code, standard output, standard error)"""
        self.capfd.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["tinyllm", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, *self.capfd.readouterr()

    def done(self, *args):
        code, out, err = self.run(*args)
        assert code == 0, err
        return out

    def assert_refused(self, *args, says, leaves=()):
        """Expect exit code 2, an error with each of the words, and the folder as it was, but for what it `leaves`."""
        before = self.snapshot()
        code, out, err = self.run(*args)
        assert code == 2, (code, out, err)
        assert out == ""
        missing = [word for word in says if word not in err]
        assert not missing, (missing, err)
        assert err.count("error: ") == 1 or "Usage:" in err, err
        assert not [word for word in ("Traceback", "Exception", "Errno", "None") if word in err], err
        after = self.snapshot()
        made = {path for path in after if path.startswith(tuple(leaves)) and path not in before}
        assert {path: content for path, content in after.items() if path not in made} == before
        return err

    def snapshot(self):
        """Every file and folder, with its content; the caches are not the user's."""
        return {
            str(p.relative_to(self.path)): p.read_bytes() if p.is_file() else None
            for p in sorted(self.path.rglob("*"))
            if "cache" not in p.parts
        }

    def write(self, name, content):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def home(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path / "cache"))
    for name in ("TINYLLM_MIRROR", "NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")  # usage errors are wrapped
    home = Home(tmp_path, monkeypatch, capfd)
    home.write("a.txt", TEXT)
    home.write("run.toml", CONFIG)
    return home


@pytest.fixture
def trained(home):
    home.done("train")
    return home


def sets(*values):
    return [arg for value in values for arg in ("--set", value)]


# ---- The config ----


@pytest.mark.parametrize("command", ["config", "prepare", "sanity", "plot-lr", "train"])
def test_no_config(home, command):
    home.assert_refused(command, "nowhere.toml", says=["nowhere.toml: no such run config", "tinyllm new quickstart"])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[data\nsource = 1", ["not valid TOML", "line 1"]),
        ("[train]\nmax_steps = 5\nmax_steps = 6", ["not valid TOML", "overwrite"]),
        ("[train]\nmax_steps = 5x", ["not valid TOML", "line 2"]),
        (b"\xff\xfe[\0t\0", ["not a text file", "UTF-8"]),
        (b"\x00\x01\x02", ["not valid TOML"]),
        ("[trane]\nmax_steps = 5", ["run.toml:1: trane: unknown section", "did you mean [train]?"]),
        ("[train]\nmax_stepz = 5", ["run.toml:2: train.max_stepz = 5: unknown key", "did you mean train.max_steps?"]),
        ("\n[train]\nlr = 5", ["run.toml:3: train.lr = 5: unknown key", "did you mean optim.lr?"]),
        ("[train]\nlearning_rate = 5", ["unknown key", "here it is optim.lr"]),
        ("max_steps = 5", ["run.toml:1: max_steps", "[train] max_steps"]),
        ("train = 5", ["run.toml:1: train = 5: must be a section: [train]"]),
        ("[model]\nn_layer = 2.5", ["run.toml:2: model.n_layer = 2.5: must be a whole number"]),
        ('[model]\nn_layer = "4"', ['model.n_layer = "4": must be a whole number']),
        ("[model]\nbias = 1", ["model.bias = 1: must be true or false"]),
        ("[data]\nsource = 1", ["data.source = 1: must be text in quotes"]),
        ("[optim]\nbetas = [0.9]", ["optim.betas", "two numbers"]),
        ('[model]\nrecipe = "gpt3"', ['model.recipe = "gpt3"', "'gpt2'", "'modern'"]),
        ("[model]\nn_embd = 30\nn_head = 4", ["run.toml:2: model.n_embd = 30", "multiple of model.n_head = 4"]),
        (
            "[train]\nbatch_size = 8\nmicro_batch_size = 3",
            ["train.micro_batch_size = 3", "divide train.batch_size = 8"],
        ),
        ("[train]\nmax_steps = 50", ["schedule.warmup_steps = 100", "below train.max_steps = 50"]),
        ("[optim]\nmin_lr = 1", ["optim.min_lr = 1", "above optim.lr = 0.001"]),
        ("[data]\nvocab_size = 100", ["data.vocab_size = 100", "at least 257"]),
        ('[runtime]\ndevice = "gpu"', ['runtime.device = "gpu"', "`cuda`"]),
    ],
)
def test_a_config_that_is_wrong(home, content, says):
    home.write("run.toml", content)
    home.assert_refused("config", says=["run.toml", *says])


def test_all_mistakes_are_told_at_once(home):
    home.write("run.toml", "[model]\nn_layer = 0\nn_heads = 2\n[optim]\nlr = -1\n[train]\nmax_steps = true\n")
    err = home.assert_refused("train", says=["run.toml:2: model.n_layer = 0", "run.toml:3: model.n_heads = 2"])
    assert "run.toml:5: optim.lr = -1" in err
    assert "run.toml:7: train.max_steps = true" in err


@pytest.mark.parametrize("form", ["", "x", "=3", ".=3", "model=3", "model.=3", "model.n_layer", "n_layer=3"])
def test_set_in_a_form_that_is_none(home, form):
    home.assert_refused("config", "--set", form, says=["--set", f"cannot read {form!r}", "--set optim.lr=3e-4"])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("optim.lr=nan", ["optim.lr = nan", "finite"]),
        ("optim.lr=1e400", ["optim.lr = inf", "finite"]),
        ("optim.lr=", ['optim.lr = ""', "must be a number"]),
        ("optim.lr=-3e-4", ["optim.lr = -0.0003", "greater than 0"]),
        ("optim.betas=[nan, 0]", ["optim.betas = ", "item 1", "finite"]),
        ("train.seed=-1", ["train.seed = -1", "greater than or equal to 0"]),
        ("train.seed=99999999999999999999", ["train.seed = 99999999999999999999", "less than"]),
        ("runtime.threads=99999999999", ["runtime.threads", "less than or equal to"]),
        ("train.out_dir=", ['train.out_dir = ""', "must not be empty"]),
        ("modle.n_layer=3", ["modle", "unknown section", "[model]"]),
        ("model.n_layr=3", ["model.n_layr = 3", "did you mean model.n_layer?"]),
        ('train.out_dir="a\\u0000b"', ["train.out_dir", "null character"]),
        ("data.vocab_size=1000000000000", ["data.vocab_size = 1000000000000", "less than or equal to 1000000"]),
        ("data.tales_stories=1000000000000", ["data.tales_stories = 1000000000000", "less than or equal to 10000000"]),
        ("train.batch_size=1000000000000", ["train.batch_size = 1000000000000", "model.block_size = 16", "134217728"]),
        ("model.n_layer=[1", ['model.n_layer = "[1"', "whole number"]),
    ],
)
def test_set_to_a_value_that_is_wrong(home, setting, says):
    home.assert_refused("train", "--set", setting, says=["--set", *says])


# ---- The text ----


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", ["empty.txt", "is empty"]),
        ("photo.txt", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ["photo.txt", "byte 0", "UTF-8"]),
        ("latin.txt", "naïve café\n".encode("latin-1") * 99, ["latin.txt", "byte 2", "UTF-8"]),
        ("wide.txt", "Once upon a time".encode("utf-16"), ["wide.txt", "UTF-8"]),
        ("a.pdf", b"text", ["a.pdf", "not a .txt or .jsonl file"]),
        ("bad.jsonl", b'{"text": "one"}\n{"text": "two"\n', ["bad.jsonl:2", "not JSON", "column"]),
        (
            "key.jsonl",
            b'{"text": "one"}\n{"body": "two"}\n',
            ["key.jsonl:2", "no key 'text'", "'body'", "data.text_key"],
        ),
        ("list.jsonl", b'["one"]\n', ["list.jsonl:1", "not an object with text under 'text'"]),
        ("blank.jsonl", b"\n\n", ["blank.jsonl", "any text"]),
        ("one.txt", b"x", ["one.txt", "1 characters cannot be divided", "data.val_fraction"]),
    ],
)
@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_text_that_is_wrong(home, command, name, content, says):
    home.write(name, content)
    err = home.assert_refused(command, *sets(f"data.source={name}"), says=["error: ", *says])
    assert "fix: " in err or name.endswith("jsonl")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.txt", ["nowhere.txt", "no such file or folder"]),
        ("shakspeare", ["shakspeare", "did you mean 'shakespeare'?"]),
        ("*.md", ["*.md", "no file matches"]),
        ("folder", ["folder", "no .txt or .jsonl file"]),
    ],
)
def test_a_source_that_is_none(home, source, says):
    home.write("folder/a.md", "text")
    home.assert_refused("train", *sets(f"data.source={source}"), says=says)


def test_a_validation_split_shorter_than_the_context(home):
    size = len(TEXT) - int(len(TEXT) * 0.9)
    says = ["the val split has", f"{size:,} tokens", "block_size + 1 = 4,097", "data.val_fraction", "model.block_size"]
    home.assert_refused("train", *sets("model.block_size=4096"), says=says, leaves=["data"])


def test_vocabularies_that_do_not_fit(home):
    says = ["model.vocab_size = 5 is too small", f"has {len(set(TEXT))} tokens", "model.vocab_size = 0"]
    home.assert_refused("train", *sets("model.vocab_size=5"), says=says, leaves=["data"])
    bpe = ("data.tokenizer=bpe", "data.dir=bpe")
    says = ["data.vocab_size = 60000", "the text has", "or data.vocab_size = "]
    home.assert_refused("prepare", *sets(*bpe, "data.vocab_size=60000"), says=says, leaves=["data"])
    home.assert_refused(
        "prepare", *sets(*bpe, "data.vocab_size=256"), says=["data.vocab_size = 256", "257"], leaves=["data"]
    )


@pytest.mark.parametrize("tokenizer", ["chars", "a.txt", "missing/tokenizer.json"])
def test_a_tokenizer_that_is_none(home, tokenizer):
    says = [tokenizer, "not a tokenizer.json" if tokenizer == "a.txt" else "no such tokenizer"]
    home.assert_refused("prepare", *sets(f"data.tokenizer={tokenizer}"), says=says)


# ---- The prepared data ----


def test_data_that_is_missing_or_damaged_or_of_other_settings(home):
    home.done("prepare")
    meta = (home.path / "data" / "meta.json").read_bytes()
    says = ["data.val_fraction: 0.1 -> 0.2", "tinyllm prepare run.toml", "another data.dir"]
    home.assert_refused("train", *sets("data.val_fraction=0.2"), says=says)
    home.write("a.txt", TEXT + "more\n")
    home.assert_refused("train", says=["a.txt", "bytes", "tinyllm prepare run.toml"])
    home.write("a.txt", TEXT)
    for name in ("val.bin", "tokenizer.json"):
        whole = (home.path / "data" / name).read_bytes()
        home.write(f"data/{name}", whole[:-10])
        home.assert_refused("train", says=[f"data/{name}", "tinyllm prepare run.toml --force"])
        (home.path / "data" / name).unlink()
        home.assert_refused("train", says=[f"data/{name}", "no such", "tinyllm prepare run.toml"])
        home.write(f"data/{name}", whole)
    home.write("data/meta.json", meta[:-40])
    home.assert_refused("train", says=["data/meta.json", "damaged", "--force"])
    home.write("data/meta.json", meta)
    home.done("train")


def test_folders_that_cannot_be(home):
    home.write("file", "a regular file")
    for key in ("train.out_dir", "data.dir"):
        for place in ("file", "file/below", "/proc/nowhere"):
            home.assert_refused("train", *sets(f"{key}={place}"), says=[place, "cannot be written"])
        home.assert_refused("train", *sets(f"{key}={'a' * 300}"), says=["a" * 300, "File name too long"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_no_room_for_the_output(home):
    """The shell's `tinyllm config > /dev/full`: the mistake is told, not lost."""
    for command in (["config"], ["prepare"]):
        with open("/dev/full", "wb") as full:
            found = subprocess.run(
                [sys.executable, "-m", "tinyllm", *command],
                cwd=home.path,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert found.returncode == 2
        assert "error: No space left on device" in found.stderr
        assert "Traceback" not in found.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    disk = tmp_path / "cache" / "disk"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("cannot mount a small tmpfs here (it takes root)")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(home, small_disk):
    (small_disk / "ballast").write_bytes(bytes(900_000))
    wide = ("model.n_embd=128", "model.n_layer=2", f"train.out_dir={small_disk}/out")
    code, _, err = home.run("train", *sets(*wide))
    assert code == 1, "the checks before the run know how large a checkpoint will be"
    assert re.search(r"disk +\S+ .*B", err)
    assert sorted(p.name for p in small_disk.iterdir()) == ["ballast"]
    code, _, err = home.run("train", "--no-sanity", *sets(*wide))
    assert code == 2
    assert re.search(r"out/: no room for checkpoints: two take 9\.\d+ MB, and \d+ kB are free", err)
    assert "free some space" in err
    assert not list(small_disk.rglob("*.tmp"))
    assert not list(small_disk.rglob("*.pt"))
    home.write("b.txt", TEXT * 40)
    code, _, err = home.run("prepare", *sets(f"data.dir={small_disk}/data", "data.source=b.txt"))
    assert code == 2
    assert "No space left on device" in err
    assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "out"]


# ---- No network, no device, no memory ----


@pytest.fixture
def nobody(monkeypatch):
    """TINYLLM_MIRROR is a port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("TINYLLM_MIRROR", f"http://127.0.0.1:{port}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return f"127.0.0.1:{port}"


@pytest.mark.parametrize("setting", ["data.source=shakespeare", "data.source=tinystories", "data.tokenizer=gpt2"])
@pytest.mark.parametrize("command", ["prepare", "train"])
def test_no_network(home, nobody, command, setting):
    says = [nobody, "download failed", "no connection", "check the connection", "by hand", str(home.path / "cache")]
    home.assert_refused(command, *sets(setting), says=says)
    assert not [p for p in (home.path / "cache").rglob("*") if p.is_file()]


def test_a_mirror_without_the_file_or_with_another(home, monkeypatch):
    class Web(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            good = "input.txt" in self.path
            self.send_response(200 if good else 404)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"fake!")

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TINYLLM_MIRROR", f"http://127.0.0.1:{server.server_port}")
    try:
        home.assert_refused("prepare", *sets("data.source=shakespeare"), says=["not the file it should be", "SHA-256"])
        home.assert_refused("prepare", *sets("data.source=tinystories"), says=["download failed", "404"])
    finally:
        server.shutdown()
        server.server_close()
    assert not [p for p in (home.path / "cache").rglob("*") if p.is_file()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here(trained):
    says = ["'cuda'", "cannot be used", "auto"]
    trained.assert_refused("train", "--overwrite", *sets("runtime.device=cuda"), says=says)
    trained.assert_refused("resume", *sets("runtime.device=cuda"), says=says)
    trained.assert_refused("sample", "--device", "cuda", says=says)
    trained.assert_refused("sample", "--device", "gpu", says=["'gpu'", "`cuda`"])


def test_a_model_that_no_memory_holds(home):
    code, _, err = home.run("train", *sets("model.n_embd=1000000"))
    assert code == 2
    assert re.search(r"the weights take \d+ TB, and \S+ .B of memory are free", err)


def test_a_step_that_no_memory_holds(home):
    """Told before any of it is taken: to find out by trying would end this process, or another."""
    large = sets("train.batch_size=2000000", "model.n_layer=40", "train.micro_batch_size=2000000")
    for command in ("train", "bench"):
        code, _, err = home.run(command, *large)
        assert code == 2
        assert re.search(
            r"micro_batch_size = 2,000,000: a step takes at least \S+ .B, and \S+ .B of memory are free", err
        )
        (fits,) = re.findall(r"fix: (\d+) \(the result stays the same\)", err)
        assert 2_000_000 % int(fits) == 0
    assert not (home.path / "out").exists()


# ---- Checkpoints ----


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_checkpoints_that_are_none(trained):
    whole = (trained.path / "out" / "ckpt.pt").read_bytes()
    trained.write("bad/text.pt", "not a checkpoint")
    trained.write("bad/empty.pt", "")
    trained.write("bad/half.pt", whole[: len(whole) // 2])
    at = whole.index(torch.load(trained.path / "out" / "ckpt.pt")["model"]["wte.weight"].numpy().tobytes())
    trained.write("bad/flipped.pt", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    trained.write("bad/evil.pt", pickle.dumps(Evil()))
    torch.save({"format": "tinyllm checkpoint", "evil": Evil()}, trained.path / "bad" / "evil_zip.pt")
    torch.save({"model": {}}, trained.path / "bad" / "other.pt")
    torch.save(torch.load(trained.path / "out" / "ckpt.pt") | {"version": 99}, trained.path / "bad" / "newer.pt")
    with zipfile.ZipFile(trained.path / "bad" / "zip.pt", "w") as archive:
        archive.writestr("hello", "world")
    for path in sorted((trained.path / "bad").iterdir()):
        for command in (["resume", path], ["eval", path], ["sample", "-c", path]):
            err = trained.assert_refused(*command, says=[f"bad/{path.name}", "checkpoint"])
            if path.name == "newer.pt":
                assert "version 99" in err
    assert not (trained.path / "pwned").exists()


def test_checkpoints_that_are_not_there(trained):
    for command in (["resume", "no.pt"], ["eval", "no.pt"], ["sample", "-c", "no.pt"]):
        trained.assert_refused(*command, says=["no.pt: no such checkpoint", "tinyllm train run.toml"])
    (trained.path / "hollow").mkdir()
    for command in (["resume", "hollow"], ["eval", "hollow"], ["sample", "-c", "hollow"]):
        trained.assert_refused(*command, says=["hollow/", "ckpt.pt"])


def test_resume_refuses_what_would_be_another_run(trained):
    trained.assert_refused("resume", *sets("optim.lr=1"), says=["optim.lr", "cannot change", "tinyllm train"])
    trained.assert_refused("resume", "--set", "nonsense", says=["nonsense", "--set"])
    trained.done("prepare", *sets("data.tokenizer=byte", "data.dir=bytes"))
    trained.assert_refused("resume", *sets("data.dir=bytes"), says=["bytes", "data.tokenizer", '"char"', '"byte"'])


def test_a_folder_that_holds_a_run(trained):
    says = ["out/: already holds a run", "`tinyllm resume out`", "--overwrite", "train.out_dir"]
    trained.assert_refused("train", says=says)
    # What is wrong with the new run is found before the old one is deleted.
    for wrong in ("data.source=b.txt", "model.block_size=4096", "model.vocab_size=3", "data.val_fraction=0.5"):
        trained.assert_refused("train", "--overwrite", "--set", wrong, says=["error"])
    trained.done("train", "--overwrite")


# ---- Options and prompts ----


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--num-samples", "0"),
        ("--num-samples", "-1"),
        ("--max-new-tokens", "0"),
        ("--max-new-tokens", "many"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--top-k", "-1"),
        ("--top-p", "1.5"),
        ("--top-p", "0"),
        ("--top-p", "nan"),
        ("--seed", "-1"),
        ("--seed", "99999999999999999999999999999999999999999"),
    ],
)
def test_options_out_of_range(trained, option, value):
    trained.assert_refused("sample", option, value, says=["Invalid value", option, "Input should be"])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["smaple"], ["No such command 'smaple'", "sample"]),
        (["train", "--overwite"], ["No such option", "--overwrite"]),
        (["train", "a.toml", "b.toml"], ["unexpected extra argument", "b.toml"]),
        (["train", "-x.toml"], ["No such option"]),
        (["train", "--", "-x.toml"], ["-x.toml: no such run config"]),
        (["train", "."], [".: cannot be read: Is a directory"]),
        (["eval", "--windows", "-1"], ["--windows", "greater than or equal to 0"]),
        (["new", "quikstart"], ["no example called 'quikstart'", "did you mean quickstart?"]),
        (["new", "-o", "run.toml"], ["--out needs the name of an example"]),
        (["new", "quickstart", "-o", "no/run.toml"], ["no/run.toml", "No such file or directory"]),
        (["new", "my-model", "-o", "."], [".: is a folder", "--out run.toml"]),
        (["config", "/dev/zero"], ["/dev/zero: larger than a run config may be"]),
        (["config", "--set", "data.dir=\udcff"], ["--set: not UTF-8 text"]),
        (["config", "--set", "model.args.a=1"], ["--set model.args", "set model.class too"]),
        (["plot-lr", "-o", "lr.gif"], ["lr.gif", ".png", ".svg"]),
        (["plot-lr", "-o", "no/lr.png"], ["no/lr.png", "No such file or directory"]),
        (["plot-lr", "run.toml", "no.toml"], ["no.toml: no such run config"]),
    ],
)
def test_commands_that_make_no_sense(home, args, says):
    home.assert_refused(*args, says=says)


def test_prompts_that_cannot_be_read(trained, monkeypatch):
    trained.write("photo.txt", b"\x89PNG\r\n\xff")
    trained.assert_refused("sample", "--prompt-file", "no.txt", says=["no.txt", "cannot be read", "No such file"])
    trained.assert_refused("sample", "--prompt-file", ".", says=["cannot be read", "Is a directory"])
    trained.assert_refused("sample", "--prompt-file", "photo.txt", says=["photo.txt", "not UTF-8"])
    trained.assert_refused(
        "sample", "-p", "x", "--prompt-file", "photo.txt", says=["--prompt", "--prompt-file", "one of them"]
    )
    with open(trained.path / "photo.txt") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        trained.assert_refused("sample", "-p", "-", says=["standard input", "not UTF-8"])


def test_a_prompt_with_an_unknown_character(trained):
    says = ["U+00FC", "'ü'", "line 2, column 4", "character 8"]
    trained.assert_refused("sample", "-p", "the \nfooü", says=says)
    trained.write("prompt.txt", "the \nfooü")
    trained.assert_refused("sample", "--prompt-file", "prompt.txt", says=says)


# ---- Clumsy, but right ----


def test_a_byte_order_mark_and_windows_line_ends(home):
    home.write("run.toml", b"\xef\xbb\xbf" + CONFIG.replace("\n", "\r\n").encode())
    home.done("train")
    assert json.loads((home.path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


def test_a_run_does_not_overwrite_its_config(home):
    """Its folder gets a run.toml of its own."""
    home.done("prepare")
    home.assert_refused("train", *sets("train.out_dir=."), says=["run.toml", "overwrite", "another train.out_dir"])
    home.done("train")
    home.done("train", "out/run.toml", "--overwrite")  # which is that one already


def test_odd_names(home):
    """Spaces, quotes, a leading dash, other scripts: and what we suggest can be pasted."""
    for name in ("my run", "-out", "it's", "Größe 日本", "[bold]"):
        home.done("train", *sets(f"train.out_dir={name}"))
        assert (home.path / name / "ckpt.pt").is_file()
        err = home.assert_refused("train", *sets(f"train.out_dir={name}"), says=[f"{name}/: already holds a run"])
        command = err.split("`")[1]
        found = subprocess.run(
            ["bash", "-c", f'tinyllm() {{ printf "%s\\n" "$@"; }}; {command}'],
            capture_output=True,
            text=True,
            check=True,
        )
        verb, path = found.stdout.splitlines()
        assert (verb, Path(path)) == ("resume", Path(name))
        home.done(verb, path)
