"""What a run will cost: the arithmetic against real files and models, and the process that measures."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinyllm import runtime as rt
from tinyllm.config import to_dict
from tinyllm.engine import new_state, train
from tinyllm.errors import DataError, is_out_of_memory
from tinyllm.folder import write_config
from tinyllm.metrics import record
from tinyllm.numbers import amount, divisors, lasting, size_of
from tinyllm.sanity import cost
from tinyllm.sanity import measure as measuring
from tinyllm.sanity.measure import Cost, measure, next_size
from tinyllm.sanity.subject import Subject

GB = 10**9


@pytest.fixture
def scratch(monkeypatch, tmp_path):
    """Where temporary folders go, here and in processes that we start."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    tempfile.tempdir = None


def finish(run):
    """Train to the end as the command line does; the folder."""
    folder = Path(run.config.train.out_dir)
    folder.mkdir()
    write_config(run.config)
    for _ in record(train(run, new_state(run)), folder):
        pass
    return folder


# ---- Size and tokens ----


@pytest.mark.parametrize("ngrams", [1, 3])
@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_size_counts_each_parameter_once_and_says_where_it_is(make_run, recipe, ngrams):
    run = make_run("optim.name=muon", f"model.ngrams={ngrams}", "model.ngram_rows=50", recipe=recipe)
    result = cost.size(Subject(run))
    total = sum(p.numel() for p in new_state(run).model.parameters())
    values = result.values
    assert values["parameters"] == total
    assert sum(values["parameters_of"].values()) == sum(values["parameters_in_group"].values()) == total
    V, C, T = run.vocab_size, 16, 16
    of_ngrams = (ngrams - 1) * 50 * C
    tables = V * C + (T * C if recipe == "gpt2" else 0) + of_ngrams
    assert values["parameters_of"]["embedding"] == tables
    assert values["parameters_of"]["head"] == (0 if recipe == "gpt2" else V * C)
    # Each weight that multiplies does so once forward (2 FLOPs) and twice backward; attention is 2 products of T x C.
    multiplied = total - (T * C if recipe == "gpt2" else V * C) - of_ngrams
    assert values["flops_a_token"] == 6 * multiplied + 3 * 2 * (2 * T * C)
    assert values["flops_a_step"] == 8 * 16 * values["flops_a_token"]


def test_the_flops_of_a_model_of_ones_own_are_six_a_parameter(make_config):
    assert cost.flops_a_token(torch.nn.Linear(3, 5), make_config()) == 6 * 20


def test_tokens_and_epochs(make_run):
    run = make_run("train.max_steps=100")
    result = cost.token_budget(Subject(run))
    assert result.verdict == "pass"
    assert result.values["tokens"] == 100 * 8 * 16
    tokens = len(run.source.splits["train"])
    assert result.values["epochs"] == pytest.approx(100 * 8 * 16 / tokens, rel=0.01)


def test_rows_of_ngrams_are_no_parameters_to_be_fed(make_run):
    plain, more = (cost.token_budget(Subject(make_run(f"model.ngrams={n}"))) for n in (1, 4))
    assert more.values["tokens_a_parameter"] == plain.values["tokens_a_parameter"] > 0


def test_many_epochs_are_worth_a_warning_only_without_dropout(make_run):
    steps = "train.max_steps=100_000"
    result = cost.token_budget(Subject(make_run(steps)))
    assert result.verdict == "warn"
    fewer = int(result.fix.partition("train.max_steps = ")[2].partition(";")[0])
    assert cost.token_budget(Subject(make_run(f"train.max_steps={fewer}"))).verdict == "pass"
    assert cost.token_budget(Subject(make_run(steps, "model.dropout=0.1"))).verdict == "pass"


def test_an_epoch_of_aligned_documents(make_run):
    run = make_run("train.align_documents=true")
    assert cost.windows_an_epoch(run) == len(run.source.starts)


# ---- Disk ----


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_the_disk_that_a_run_takes(make_run, name, recipe):
    run = make_run(f"optim.name={name}", recipe=recipe)
    values = cost.disk(Subject(run)).values
    files = {path.name: path.stat() for path in finish(run).iterdir()}
    sizes = {name: file.st_size for name, file in files.items()}
    on_disk = {file.st_ino: file.st_size for file in files.values()}  # the latest and the best share a file
    assert values["checkpoint_bytes"] == pytest.approx(sizes["ckpt.pt"], rel=0.01)
    assert values["bytes_on_disk"] == pytest.approx(sum(on_disk.values()), rel=0.02)
    assert cost.metrics_bytes(run.config) == pytest.approx(sizes["metrics.jsonl"], rel=0.1)
    assert len(on_disk) == 4
    assert values["peak_bytes_on_disk"] == values["bytes_on_disk"] + 3 * values["checkpoint_bytes"]


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ((), [("latest", 20), ("latest", 10)]),  # each was the best, and is one file with it
        (("train.save_interval=5",), [("latest", 20), ("latest", 15), ("best", 10)]),
        (("train.save_interval=5", "train.keep=1"), [("latest", 20), ("best", 20)]),  # two files
        (("train.keep=9",), [("latest", 20), ("latest", 10)]),
        (("train.eval_interval=7",), [("latest", 20), ("latest", 14)]),
        (("train.eval_interval=100", "train.save_interval=100"), [("latest", 20)]),
    ],
)
def test_which_checkpoints_are_kept(make_config, overrides, kept):
    assert cost.kept_steps(make_config(*overrides)) == kept


def test_a_shared_tensor_is_on_disk_once(make_run):
    run = make_run(recipe="modern")
    model = new_state(run).model
    apart = cost.checkpoint_bytes(run, model)
    model.head.weight = model.wte.weight
    assert apart - cost.checkpoint_bytes(run, model) > 3 * model.wte.weight.nbytes


def test_a_disk_that_is_too_small_fails(make_run):
    subject = Subject(make_run())
    peak = cost.disk(subject).values["peak_bytes_on_disk"]
    assert cost.disk(subject, free_bytes=peak).verdict == "pass"
    result = cost.disk(subject, free_bytes=peak - 1000)
    assert result.verdict == "fail"
    assert "free 1 kB more, a smaller train.keep, or another disk: --set train.out_dir=" in result.fix
    assert not Path(subject.run.config.train.out_dir).exists()


def test_what_the_folder_holds_gives_way(make_run):
    run = make_run()
    one = cost.disk(Subject(run), free_bytes=0).values
    finish(run)
    again = cost.disk(Subject(run), free_bytes=0).values
    assert again["free_bytes"] == pytest.approx(2 * one["checkpoint_bytes"], rel=0.01)


def test_a_checkpoint_that_goes_while_we_look_is_none(make_run, monkeypatch):
    """Another process is training in the folder, and keeps the last few only."""
    run, found = make_run(), cost.ckpt.checkpoints
    finish(run)
    whole = cost.disk(Subject(run), free_bytes=0).values["free_bytes"]
    gone = [Path(run.config.train.out_dir) / "ckpt-1.pt"]
    monkeypatch.setattr(cost.ckpt, "checkpoints", lambda folder: gone + found(folder))
    assert cost.disk(Subject(run), free_bytes=0).values["free_bytes"] == whole


# ---- The process that measures ----


def test_the_child_measures_and_leaves_nothing(make_run, scratch, capfd):
    subject = Subject(make_run("train.batch_size=8", "train.micro_batch_size=2", "data.source=tales"))
    memory, time_ = cost.memory(subject), cost.time(subject)
    found = subject.cost
    assert memory.verdict == time_.verdict == "pass", (memory, time_)
    assert memory.values["measured"]
    assert 100e6 < memory.values["peak_bytes"] < memory.values["room_bytes"]
    assert found.trying == 2
    values = time_.values
    assert sum(values["seconds_in"].values()) == values["seconds_to_the_end"]
    assert values["seconds_in"]["steps"] == pytest.approx(20 * found.step_seconds)
    assert min(found.startup_seconds, found.eval_seconds, found.save_seconds, found.step_seconds) > 0
    assert 0 < values["share_of_peak"] < 1
    assert not any(scratch.iterdir())
    assert not Path(subject.run.config.train.out_dir).exists()
    assert capfd.readouterr() == ("", "")


def test_a_run_that_is_too_large_is_not_tried_and_gets_a_micro_batch_that_fits(make_config):
    size, room = 90_000, 3 * GB // 2
    config = make_config(f"train.batch_size={size}", "model.block_size=32")
    found = measure(config, room_bytes=room)
    result = cost.judged_memory(found, size)
    assert result.verdict == "fail", result
    assert 1 < found.trying < size
    assert not result.values["measured"]
    fitting = result.values["micro_batch_size_that_fits"]
    assert size % fitting == 0
    assert f"train.micro_batch_size = {fitting} fits" in result.fix
    assert found.peak(fitting) <= 0.9 * room
    assert found.rungs[-1][1] < room  # and nothing went beyond
    assert cost.judged_time(found, config, 1).measured == "it does not fit into memory"


def test_what_stops_the_child_is_told_as_it_is(make_config, scratch):
    config = make_config()
    data = config.data.model_copy(update={"dir": str(scratch / "none")})
    found = measure(config.model_copy(update={"data": data}))
    assert isinstance(found.error, DataError)
    with pytest.raises(DataError):
        cost.judged_memory(found, 8)
    assert cost.judged_time(found, config, 1).verdict == "skip"
    assert not any(scratch.iterdir())


def test_a_child_that_is_killed_is_a_failure(make_config, scratch, monkeypatch):
    kill = "import os, sys; sys.stdin.readline(); print('{\"trying\": 8}', flush=True); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(measuring, "CHILD", kill)
    found = measure(make_config())
    assert (found.ended, found.trying) == ("ended by SIGKILL", 8)
    result = cost.judged_memory(found, 8)
    assert result.verdict == "fail"
    assert result.measured == "ended by SIGKILL, with micro-batches of 8"
    assert result.fix == "train.micro_batch_size = 4, or less"
    assert not any(scratch.iterdir())


def test_a_child_that_breaks_says_its_last_line(make_config, monkeypatch):
    monkeypatch.setattr(measuring, "CHILD", "raise SystemExit('a broken installation')")
    result = cost.judged_memory(measure(make_config()), 8)
    assert (result.verdict, result.measured) == ("fail", "a broken installation, before the first step")


ASK = """
import sys
from tinyllm.config import check
from tinyllm.sanity.measure import measure
import json
print("asking", flush=True)
measure(check(json.loads(sys.stdin.readline())))
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_whoever_asked_ends(make_config, scratch, number):
    import json

    asker = subprocess.Popen(
        [sys.executable, "-c", ASK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    # Many large windows to evaluate: it would take minutes.
    config = make_config("train.batch_size=512", "model.n_embd=256", "model.n_layer=8")
    asker.stdin.write(json.dumps(to_dict(config)) + "\n")
    asker.stdin.flush()
    assert asker.stdout.readline() == "asking\n"
    until(lambda: list(scratch.glob("tinyllm-*/out")) or list(scratch.glob("tinyllm-*/stderr")))
    time.sleep(4 if number == signal.SIGKILL else 1)  # for the child to be at work
    asker.send_signal(number)
    asker.wait()
    until(lambda: not any(scratch.iterdir()))


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


# ---- Verdicts ----

MEASURED = Cost(
    micro_batch_size=64,
    fixed_bytes=1 * GB,
    room_bytes=10 * GB,
    rungs=((1, 1_100_000_000), (64, 7_400_000_000)),
    trying=64,
    startup_seconds=3.0,
    checks_seconds=2.0,
    step_seconds=0.5,
    eval_seconds=10.0,
    save_seconds=1.0,
    matmul_rate=1e12,
)


@pytest.mark.parametrize(("room", "verdict", "fitting"), [(10, "pass", 0), (8, "warn", 32), (4, "fail", 16)])
def test_memory_against_what_there_is(room, verdict, fitting):
    result = cost.judged_memory(replace(MEASURED, room_bytes=room * GB), 64)
    assert result.verdict == verdict
    assert result.values.get("micro_batch_size_that_fits", 0) == fitting


def test_memory_is_a_line_through_what_was_measured():
    climbed = replace(MEASURED, rungs=((1, 1_100_000_000), (2, 1_200_000_000), (4, 1_500_000_000)), trying=4)
    assert climbed.peak(2) == 1_200_000_000
    assert climbed.peak(64) == 1_500_000_000 + 60 * 150_000_000
    # What the loop takes beside is there at any size; where it was larger than the last rung, it is a rung itself.
    assert replace(climbed, whole=(4, 2 * GB)).peak(8) == 2 * GB + 4 * 150_000_000
    assert replace(climbed, whole=(64, 13_500_000_000)).peak(32) == 13_500_000_000 - 32 * 200_000_000
    assert replace(MEASURED, rungs=()).peak(64) == GB
    assert replace(MEASURED, fixed_bytes=None, rungs=()).peak(64) is None


def test_not_even_one_sequence_fits():
    result = cost.judged_memory(replace(MEASURED, room_bytes=GB // 2, rungs=(), trying=0), 64)
    assert (result.verdict, "not even" in result.fix) == ("fail", True)


def test_where_memory_cannot_be_measured():
    unknown = replace(MEASURED, room_bytes=None, fixed_bytes=None, rungs=())
    assert cost.judged_memory(unknown, 64).verdict == "skip"


def test_time_adds_up(make_config):
    config = make_config("train.max_steps=100", "train.eval_interval=30", "train.save_interval=40")
    total, parts = cost.total_seconds(MEASURED, config)
    # Evaluations at 0, 30, 60, 90 and 100; saves at 30, 40, 60, 80, 90 and 100.
    assert parts == {"start": 5.0, "steps": 50.0, "evaluations": 50.0, "saves": 6.0}
    assert total == 111.0


def test_evaluations_and_saves_are_those_of_a_run(make_run):
    run = make_run("train.max_steps=20", "train.eval_interval=6", "train.save_interval=7")
    Path(run.config.train.out_dir).mkdir()
    names = [type(event).__name__ for event in train(run, new_state(run))]
    assert cost.evaluations(run.config) == names.count("Evaluated")
    _, parts = cost.total_seconds(replace(MEASURED, save_seconds=1.0), run.config)
    assert names.count("Saving") == parts["saves"] == 6  # at 6, 7, 12, 14, 18, 20


@pytest.mark.parametrize(
    ("override", "verdict", "word"),
    [
        ("train.save_interval=100", "pass", ""),
        ("train.save_interval=10_000", "warn", "train.save_interval = 3600"),
        ("train.max_steps=2_000_000", "warn", "week"),
    ],
)
def test_time_that_is_worth_a_warning(make_config, override, verdict, word):
    config = make_config("train.max_steps=20_000", "train.save_interval=100", "train.eval_interval=1000", override)
    result = cost.judged_time(MEASURED, config, flops_a_step=10**11)
    assert result.verdict == verdict, result
    assert word in result.expected + result.fix
    assert result.values["share_of_peak"] == pytest.approx(0.2)


def test_no_time_for_what_does_not_fit(make_config):
    assert cost.judged_time(replace(MEASURED, room_bytes=2 * GB), make_config(), 1).verdict == "skip"


@pytest.mark.parametrize(
    ("size", "seconds", "grows", "after"),
    [
        (1, 0.1, 10, 64),  # quick and small: at once
        (1, 0.1, 100, 2),  # it may need most of the room: carefully
        (1, 6.0, 10, 1),  # twice as much would be too slow
        (32, 1.0, 5000, 32),  # too large
        (32, 1.0, 4000, 64),  # just fits
    ],
)
def test_the_next_micro_batch_to_try(size, seconds, grows, after):
    assert next_size(64, size, seconds, grows, fixed=1000, room=10_000) == after


# ---- What the machine has ----


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_this_process_own():
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    code = "import torch; from tinyllm.runtime import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = rt.peak_memory(torch.device("cpu"))
    del block
    assert here > 400_000_000
    assert int(done.stdout) < 350_000_000  # `ru_maxrss` would begin with ours


def test_free_memory():
    assert 10**8 < rt.free_memory(torch.device("cpu")) < 10**14


def test_limits_of_control_groups(tmp_path):
    own, root = tmp_path / "cgroup", tmp_path / "fs"

    def group(path, limit, usage, stat, names):
        folder = root / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip((*names, "memory.stat"), (limit, usage, stat), strict=True):
            (folder / name).write_text(f"{text}\n")

    v2, v1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group("job", 5000, 3000, "anon 1\ninactive_file 1000", v2)
    group("job/inner", "max", 100, "inactive_file 0", v2)
    own.write_text("0::/job/inner\n")
    assert rt.control_group_rooms(own, root) == [3000]
    group("memory/old", 700, 100, "total_inactive_file 0", v1)
    own.write_text("4:memory:/old\n2:cpu:/\n0::/\n")
    assert rt.control_group_rooms(own, root) == [600]
    assert rt.control_group_rooms(tmp_path / "none", root) == []


def test_what_counts_as_out_of_memory():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("shapes"))


def test_matmul_rate():
    runtime = rt.Runtime(torch.device("cpu"), torch.float32, "")
    assert 1e8 < rt.matmul_rate(runtime, seconds=0.1) < 1e14


# ---- Numbers ----


def test_numbers_for_people():
    assert [amount(x) for x in (0, 0.5, 12, 1234, 1_234_567, 2e9)] == ["0", "0.5", "12", "1.23 k", "1.23 M", "2 G"]
    assert [amount(x, "B") for x in (12, 1234, 1_234_567)] == ["12 B", "1.23 kB", "1.23 MB"]
    assert [amount(x) for x in (999.4, 999.6, 999_600)] == ["999", "1 k", "1 M"], "never 1e+03"
    assert size_of(1.5e9) == "1.5 GB"
    assert [lasting(x) for x in (0.0241, 3.14, 53, 99, 600, 20_000, 300_000)] == [
        "24 ms",
        "3.1 s",
        "53 s",
        "99 s",
        "10 min",
        "5.6 h",
        "3.5 days",
    ]


def test_divisors_are_all_that_divide():
    for number in range(1, 400):
        assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]
