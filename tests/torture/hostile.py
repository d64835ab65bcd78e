"""Checkpoints made by somebody who means harm: nothing in them is run, they take no memory, they are refused at once.

    for finding in hostile(Path("/tmp/hostile")):
        finding.ok, finding.name, finding.what      # True, "os.system: sample", "not a tinyllm checkpoint: it asks ..."

Most are a good checkpoint but for one part, and are sealed as a good one is: their maker has our code, too. A process
with little memory (`python -m torture.hostile`) hands each to `sample`, `eval` and `resume`, and is measured.
"""

import hashlib
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tinyllm import archive
from tinyllm.checkpoint import LATEST, load
from torture.finding import Finding, forget_peak, refused, resident
from torture.runs import LIMIT, QUIET, Forks, Home, environment, spawn

SECONDS = 5.0  # what a refusal may take at most
MEMORY = 150 << 20  # and that, on top of what a good file takes,
A_BYTE = 8  # and for each byte of the file
CEILING = 4 << 30  # of address space, on top of what a process has that has torch: nothing may come near
STUCK = 60.0  # seconds until a process is ended
STEP = 30  # of the good checkpoint
COMMANDS = (
    ("sample", "-c", "FILE", "--max-new-tokens", "3", "--prompt", "Once upon a time there was"), ("eval", "FILE"),
    ("resume", "FILE"),
)  # fmt: skip
RUN = {
    "train.max_steps": 60, "train.eval_interval": 30, "train.save_interval": 30, "data.tales_stories": 60,
    "model.recipe": "modern",
}  # fmt: skip

KNOWN = """\
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size, width=16):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size)

    def forward(self, tokens):
        return self.head(self.embed(tokens))
"""
Record = dict[str, Any]
Make = Callable[[Path, Record], None]  # writes the file, of a good record that it may change


# ---- Files as torch writes them, and otherwise ----


def saved(path: Path, record: Any) -> None:
    """As we save, sealed."""
    with open(path, "w+b") as file:
        archive.save_sealed(file, record, STEP)


def parts_of(record: Any) -> dict[str, bytes]:
    """What is in the zip file of a record."""
    buffer = io.BytesIO()
    torch.save(record, buffer)
    with zipfile.ZipFile(buffer) as file:
        return {name: file.read(name) for name in file.namelist()}


def zipped(parts: list[tuple[str, bytes]], deflated: tuple[str, ...] = ()) -> bytes:
    """A zip file of the parts, in their order, whatever their names; it ends as torch ends one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in parts:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED if name in deflated else zipfile.ZIP_STORED
            file.writestr(entry, content)
    with zipfile.ZipFile(buffer) as file:
        start = file.start_dir
    return with_end(buffer.getvalue()[:-22], start, len(parts))


def with_end(content: bytes, start: int, count: int, elsewhere: int = -1) -> bytes:
    """Entries and their directory, with the three records behind them; `elsewhere` the second looks for the first."""
    place, size = len(content), len(content) - start
    content += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    content += struct.pack("<4sLQL", b"PK\6\7", 0, place if elsewhere < 0 else elsewhere, 1)
    return content + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, 0)


def sealed(content: bytes) -> bytes:
    """A zip file without a comment, with a seal that is right."""
    content = content[:-2] + struct.pack("<H", archive.SEAL_SIZE) + archive.LEAD.format(STEP).encode()
    return content + hashlib.sha256(content).hexdigest().encode()


def pickled(path: Path, record: Record, change: Callable[[bytes], bytes], **others: bytes) -> None:
    """A sealed file whose pickle is changed; `others` are further parts, or other contents."""
    parts = parts_of(record) | {f"archive/{name}": content for name, content in others.items()}
    parts["archive/data.pkl"] = change(parts["archive/data.pkl"])
    path.write_bytes(sealed(zipped([*parts.items()])))


def instead(payload: bytes) -> Callable[[bytes], bytes]:
    """A pickle that is the payload alone."""
    return lambda _: payload


def value_of(payload: bytes, placeholder: str = "PLACE") -> Callable[[bytes], bytes]:
    """Operations that put something on the stack, in place of a text."""

    def change(content: bytes) -> bytes:
        text = b"X" + struct.pack("<I", len(placeholder)) + placeholder.encode()
        assert content.count(text) == 1
        return content.replace(text, payload)

    return change


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


# ---- Code ----

TOUCH = "touch marker"


class Payload:
    """Unpickled, it calls something."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Stateful:
    """Unpickled, its state is set."""

    def __setstate__(self, state: Any) -> None:
        os.system(TOUCH)

    def __reduce__(self) -> tuple[Any, ...]:
        return Stateful, (), {"x": 1}


def os_system(path: Path, record: Record) -> None:
    saved(path, record | {"data": Payload(os.system, TOUCH)})


def builtins_eval(path: Path, record: Record) -> None:
    record["config"]["model"]["args"] = {"x": Payload(eval, f"__import__('os').system('{TOUCH}')")}
    saved(path, record)


def setstate(path: Path, record: Record) -> None:
    saved(path, record | {"data": Stateful()})


def stack_global(path: Path, record: Record) -> None:
    """Protocol 4 takes the two names from the stack."""
    record["data"] = "PLACE"
    call = b"\x8c\x05posix\x94\x8c\x06system\x94\x93" + text(TOUCH) + b"\x85R"
    pickled(path, record, value_of(call))


def stack_global_hidden(path: Path, record: Record) -> None:
    """The names come out of the memo; those put down last are harmless ones."""
    record["data"] = "PLACE"
    names = text("posix") + b"r\0\0\1\0" + b"0" + text("system") + b"r\1\0\1\0" + b"0"
    call = b"j\0\0\1\0j\1\0\1\0" + b"\x93" + text(TOUCH) + b"\x85R"
    decoy = text("collections") + text("OrderedDict") + b"00"
    pickled(path, record, value_of(names + decoy + call))


def inst(path: Path, record: Record) -> None:
    pickled(path, record, instead(b"(S'" + TOUCH.encode() + b"'\nios\nsystem\n."))


def extension(path: Path, record: Record) -> None:
    pickled(path, record, instead(b"\x80\x02\x82\x01)R."))


def legacy_file(path: Path, record: Record) -> None:
    """As torch saved before it took to zip files."""
    torch.save(record | {"data": Payload(os.system, TOUCH)}, path, _use_new_zipfile_serialization=False)


def bare_pickle(path: Path, record: Record) -> None:
    path.write_bytes(pickle.dumps(Payload(os.system, TOUCH)))


def torch_load_inside(path: Path, record: Record) -> None:
    other = path.with_name("other.pt")
    torch.save(Payload(os.system, TOUCH), other)
    saved(path, record | {"data": Payload(torch.load, str(other))})


def rebuild_parameter(path: Path, record: Record) -> None:
    """Names that torch itself trusts, and we do not need."""
    record["model"]["wte.weight"] = torch.nn.Parameter(record["model"]["wte.weight"])
    saved(path, record)


def script_module(path: Path, record: Record) -> None:
    """A TorchScript file has code of its own."""
    pickled(path, record, lambda content: content, **{"constants.pkl": pickle.dumps(()), "code/a.py": b"x = 1\n"})


def upper_case_pickle(path: Path, record: Record) -> None:
    """torch finds the parts of a zip file whatever their case; who looks for `data.pkl` does not see `DATA.PKL`."""
    parts = parts_of(record | {"data": Payload(bytearray, 10**10)})
    path.write_bytes(sealed(zipped([(name.replace("data.pkl", "DATA.PKL"), part) for name, part in parts.items()])))


def upper_case_too(path: Path, record: Record) -> None:
    """Both: a harmless one for who looks, another for torch, which takes the last, or the first."""
    bad, good = parts_of(record | {"data": Payload(bytearray, 10**10)}), parts_of(record)
    both = [("archive/DATA.PKL", bad["archive/data.pkl"]), *good.items(), ("archive/Data.pkl", bad["archive/data.pkl"])]
    path.write_bytes(sealed(zipped(both)))


# ---- Memory ----


def bytearray_of_ten_gigabytes(path: Path, record: Record) -> None:
    saved(path, record | {"data": Payload(bytearray, 10**10)})


def untyped_storage(path: Path, record: Record) -> None:
    record["data"] = "PLACE"
    pickled(path, record, value_of(b"ctorch\nUntypedStorage\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R"))  # 10**10


def float_storage(path: Path, record: Record) -> None:
    record["data"] = "PLACE"
    pickled(path, record, value_of(b"ctorch\nFloatStorage\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R"))


def resized_by_state(path: Path, record: Record) -> None:
    """A tensor whose state is set once more, to one of a terabyte."""
    record["model"]["wte.weight"] = torch.ones(8)
    shape = b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85"  # 2**40

    def change(content: bytes) -> bytes:
        at = content.index(b"K\x08\x85")  # its size; then come its stride and what it was made of
        end = content.index(b"R", content.index(b"R", at) + 1) + 1
        storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x08tQ"
        return content[:end] + b"(" + storage + b"K\0" + shape + b"K\x01\x85tb" + content[end:]

    pickled(path, record, change)


def deflated_tensors(path: Path, record: Record) -> None:
    record["model"]["wte.weight"] = torch.zeros(1 << 26)
    parts = parts_of(record)
    large = max(parts, key=lambda name: len(parts[name]))
    path.write_bytes(sealed(zipped([*parts.items()], deflated=(large,))))


def overlapping_entries(path: Path, record: Record) -> None:
    """A thousand tensors of a megabyte each, all the same bytes of the file."""
    size = 1 << 18
    record["model"]["wte.weight"] = torch.zeros(size)
    parts = parts_of(record | {"optimizer": {str(i): {"x": torch.zeros(size) + i} for i in range(300)}})
    large = [name for name, part in parts.items() if len(part) == 4 * size]
    content = zipped([(n, p) for n, p in parts.items() if n not in large[1:]])
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        start = file.start_dir
    directory = content[start:-98]
    at = directory.index(large[0].encode()) - 46
    one = directory[at : at + 46 + len(large[0])]
    for name in large[1:]:
        directory += one[:28] + struct.pack("<H", len(name)) + one[30:46] + name.encode()
    path.write_bytes(sealed(with_end(content[:start] + directory, start, len(parts))))


def duplicate_names(path: Path, record: Record) -> None:
    bad, good = parts_of(record | {"data": Payload(bytearray, 10**10)}), parts_of(record)
    pickles = [("archive/data.pkl", part["archive/data.pkl"]) for part in (bad, good)]
    rest = [item for item in good.items() if item[0] != "archive/data.pkl"]
    path.write_bytes(sealed(zipped([pickles[0], *rest, pickles[1]])))


def two_files(record: Record) -> tuple[bytes, bytes, bytes, int]:
    """The entries of a harmful and of a harmless file, one after the other, the directories of both; their length."""
    bad, good = (zipped([*parts_of(r).items()]) for r in (record | {"data": Payload(bytearray, 10**10)}, record))
    starts = [zipfile.ZipFile(io.BytesIO(content)).start_dir for content in (bad, good)]
    hidden, directory = bad[starts[0] : -98], good[starts[1] : -98]
    shown, at = b"", 0
    while at < len(directory):
        size = 46 + sum(struct.unpack_from("<3H", directory, at + 28))
        (offset,) = struct.unpack_from("<L", directory, at + 42)
        shown += directory[at : at + 42] + struct.pack("<L", offset + starts[0]) + directory[at + 46 : at + size]
        at += size
    return bad[: starts[0]] + good[: starts[1]], shown, hidden, shown.count(b"PK\1\2")


def two_directories(path: Path, record: Record) -> None:
    """Python's zipfile looks for the zip64 record right before its locator, others look where the locator says."""
    entries, shown, hidden, count = two_files(record)
    content = with_end(entries + hidden, len(entries), count)[:-42]  # the first of the three records only
    place = len(content) - 56
    path.write_bytes(sealed(with_end(content + shown, len(content), count, elsewhere=place)))


def second_end_in_comment(path: Path, record: Record) -> None:
    """The comment of the file has the end of another directory in it."""
    entries, shown, hidden, count = two_files(record)
    first = with_end(entries + hidden + shown, len(entries) + len(hidden), count)
    second = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(hidden), len(entries), 0)
    path.write_bytes(sealed(first[:-2] + struct.pack("<H", 22 + archive.SEAL_SIZE) + second))


def end_inside_end(path: Path, record: Record) -> None:
    """The record at the end holds the beginning of another one."""
    entries, shown, hidden, count = two_files(record)
    first = bytearray(with_end(entries + hidden + shown, len(entries) + len(hidden), count))
    first[-12:-8] = b"PK\5\6"
    path.write_bytes(sealed(bytes(first)))


def lists_of_lists(path: Path, record: Record) -> None:
    """A billion laughs: each list holds the one before ten times."""
    laughs: list[Any] = ["ha"]
    for _ in range(12):
        laughs = [laughs] * 10
    saved(path, record | {"data": {"x": laughs}})


def laughs_in_config(path: Path, record: Record) -> None:
    laughs: list[Any] = ["ha"]
    for _ in range(9):
        laughs = [laughs] * 10
    record["config"]["model"]["args"] = {"x": laughs}
    saved(path, record)


def nested(depth: int) -> bytes:
    """Operations that make a list in a list in a list."""
    return b"]" * depth + b"a" * (depth - 1)


def nested_a_million_deep(path: Path, record: Record) -> None:
    pickled(path, record | {"data": {"x": "PLACE"}}, value_of(nested(10**6)))


def nested_deep(part: str) -> Make:
    """Less deep: so that it is not for their number that the operations are refused."""

    def make(path: Path, record: Record) -> None:
        if part == "config":
            record["config"]["model"]["args"] = {"x": "PLACE"}
        elif part == "optimizer":
            record["optimizer"]["wte.weight"]["exp_avg"] = "PLACE"
        elif part == "changes":
            record["changes"] = [{"step": 1, "what": "x", "from": "PLACE", "to": 1}]
        else:
            record[part]["x"] = "PLACE"
        pickled(path, record, value_of(nested(100_000)))

    make.__name__ = f"nested_deep_in_{part}"
    return make


def many_operations(path: Path, record: Record) -> None:
    """A small pickle, every byte of which becomes an empty dictionary."""
    pickled(path, record | {"data": {"x": "PLACE"}}, value_of(b"(" + b"}" * (16 << 20) + b"l"))


def many_memos(path: Path, record: Record) -> None:
    memos = b"".join(b"r" + struct.pack("<I", 1000 + i) for i in range(6 << 18))
    pickled(path, record | {"data": {"x": "PLACE"}}, value_of(b"N" + memos))


def huge_pickle(path: Path, record: Record) -> None:
    pickled(path, record | {"data": {"x": "PLACE"}}, value_of(text("x" * (66 << 20))))


def huge_text(path: Path, record: Record) -> None:
    pickled(path, record | {"data": {"x": "PLACE"}}, value_of(text("x" * (30 << 20) + "\U0001f600")))


def huge_number(path: Path, record: Record) -> None:
    saved(path, record | {"step": 10**100_000})


def huge_vocabulary_number(path: Path, record: Record) -> None:
    saved(path, record | {"vocab_size": 10**5000})


def number_in_config(path: Path, record: Record) -> None:
    record["config"]["model"]["n_layer"] = 10**5000
    saved(path, record)


# ---- Tensors that are not what they seem ----


def stride_zero(path: Path, record: Record) -> None:
    record["model"]["wte.weight"] = torch.ones(1).expand(10**12)
    saved(path, record)


def more_than_its_record(path: Path, record: Record) -> None:
    """A storage of a megabyte is said to have a terabyte; a careless reader would read what lies behind it."""
    record["model"]["wte.weight"] = torch.ones(8)
    forged = b"\x8a\x06\x00\x00\x00\x00\x00\x01"  # 2**40
    pickled(path, record, lambda c: c.replace(b"K\x08tq", forged + b"tq", 1).replace(b"K\x08\x85", forged + b"\x85", 1))


def slightly_more_than_its_record(path: Path, record: Record) -> None:
    record["model"]["wte.weight"] = torch.ones(8)
    pickled(path, record, lambda c: c.replace(b"K\x08tq", b"M\x00\x01tq", 1).replace(b"K\x08\x85", b"M\x00\x01\x85", 1))


def negative_sizes(path: Path, record: Record) -> None:
    record["model"]["wte.weight"] = torch.ones(8)
    pickled(path, record, lambda c: c.replace(b"K\x08\x85", b"J\xff\xff\xff\xff\x85", 1))


def sparse(path: Path, record: Record) -> None:
    record["model"]["wte.weight"] = torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6), check_invariants=False)
    saved(path, record)


def on_meta(path: Path, record: Record) -> None:
    record["model"]["wte.weight"] = torch.empty(10**6, 10**6, device="meta")
    saved(path, record)


def complex_weights(path: Path, record: Record) -> None:
    record["model"]["wte.weight"] = record["model"]["wte.weight"].to(torch.complex64)
    saved(path, record)


def not_a_number(path: Path, record: Record) -> None:
    record["model"]["wte.weight"] = record["model"]["wte.weight"] * float("nan")
    saved(path, record)


def optimizer_without_averages(path: Path, record: Record) -> None:
    record["optimizer"] = {name: {"step": state["step"]} for name, state in record["optimizer"].items()}
    saved(path, record)


def optimizer_of_texts(path: Path, record: Record) -> None:
    record["optimizer"] = {name: dict.fromkeys(state, "x") for name, state in record["optimizer"].items()}
    saved(path, record)


# ---- Configs that ask for too much ----


def asking(section: str, **values: Any) -> Make:
    """A config that asks for a model or a batch of any size; the weights are those of a small one."""

    def make(path: Path, record: Record) -> None:
        record["config"][section] |= values
        saved(path, record)

    make.__name__ = ", ".join(f"{section}.{name} = {value:.0e}" for name, value in values.items())
    return make


def rows(count: int) -> Make:
    def make(path: Path, record: Record) -> None:
        saved(path, record | {"vocab_size": count})

    make.__name__ = f"vocab_size = {count}"
    return make


def learned_positions(path: Path, record: Record) -> None:
    record["config"]["model"] |= {"positions": "learned", "block_size": 10**9}
    saved(path, record)


def thin_positions(path: Path, record: Record) -> None:
    """Weights that fit, but for a billion positions, which are one row that is seen a billion times."""
    record["config"]["model"] |= {"positions": "learned", "block_size": 10**9}
    record["model"]["wpe.weight"] = torch.zeros(1, 16).expand(10**9, 16)
    saved(path, record)


def thin_ngrams(path: Path, record: Record) -> None:
    """The same for seven billion n-grams."""
    record["config"]["model"] |= {"ngrams": 8, "ngram_rows": 10**9}
    record["model"]["ngrams.weight"] = torch.zeros(1, 16).expand(7 * 10**9, 16)
    saved(path, record)


# ---- Paths and names ----


def member_outside(path: Path, record: Record) -> None:
    parts = [(name.replace("archive/data/", "archive/../../data/"), part) for name, part in parts_of(record).items()]
    path.write_bytes(sealed(zipped([*parts, ("archive/../../marker", b"x"), ("/tmp/marker", b"x")])))


def other_out_dir(path: Path, record: Record) -> None:
    record["config"]["train"]["out_dir"] = "../marker"
    record["config"]["data"]["dir"] = "/etc"
    saved(path, record)


def data_that_is_a_device(path: Path, record: Record) -> None:
    """The user's own prepared data, said to be made from a file that never ends."""
    record["config"]["data"]["tokenizer"] = "/dev/zero"
    saved(path, record)


def data_that_is_the_disk(path: Path, record: Record) -> None:
    record["config"]["data"]["source"] = "/"
    saved(path, record)


def class_outside(path: Path, record: Record) -> None:
    outside = path.parent.parent / "outside.py"
    outside.write_text(f"import os\nos.system('{TOUCH}')\n")
    record["config"]["model"]["class"] = f"{outside}:Model"
    saved(path, record | {"model_source": hashlib.sha256(outside.read_bytes()).hexdigest()})


def class_beside(path: Path, record: Record) -> None:
    """A file of the current directory, but not one that was ever trained with."""
    record["config"]["model"]["class"] = "mine.py:Model"
    saved(path, record | {"model_source": "0" * 64})


def class_of_the_library(path: Path, record: Record) -> None:
    record["config"]["model"]["class"] = "torch.nn:Embedding"
    record["config"]["model"]["args"] = {"num_embeddings": 10**10, "embedding_dim": 10}
    saved(path, record | {"model_source": hashlib.sha256(Path(torch.nn.__file__).read_bytes()).hexdigest()})


def known_class_of_any_size(path: Path, record: Record) -> None:
    """A file that the user has, as everybody who began with the same example; the arguments are the stranger's."""
    record["config"]["model"] |= {"class": "known.py:Model", "args": {"width": 20_000_000}}
    saved(path, record | {"model_source": hashlib.sha256(KNOWN.encode()).hexdigest()})


def long_class(path: Path, record: Record) -> None:
    record["config"]["model"]["class"] = "x" * 1_000_000 + ".py:Model"
    saved(path, record)


def long_names(path: Path, record: Record) -> None:
    record["model"]["x" * 1_000_000] = torch.ones(1)
    saved(path, record)


def names_for_the_terminal(path: Path, record: Record) -> None:
    """Whatever is printed of it could clear the screen, or seem to be an answer of ours."""
    record["model"]["x\n\x1b[2Jerror: all is well\r"] = torch.ones(1)
    saved(path, record)


def config_for_the_terminal(path: Path, record: Record) -> None:
    record["config"]["data"]["dir"] = "x\n\x1b[2Jerror: all is well\r"
    record["config"]["\x1b[2J\nerror: "] = {}
    saved(path, record)


def directory_for_the_terminal(path: Path, record: Record) -> None:
    record["config"]["data"]["dir"] = "x\n\x1b[2Jerror: all is well\r"
    saved(path, record)


# ---- Tokenizers ----


def tokenizer_of(change: Callable[[dict[str, Any]], Any], name: str) -> Make:
    def make(path: Path, record: Record) -> None:
        tokenizer = json.loads(record["tokenizer"])
        changed = change(tokenizer)
        saved(path, record | {"tokenizer": changed if isinstance(changed, str) else json.dumps(tokenizer)})

    make.__name__ = f"tokenizer: {name}"
    return make


def far_id(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"]["far"] = 4_000_000_000


def id_beyond_the_rows(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {name: id + 60 for name, id in vocabulary.items()}


def growing(tokenizer: dict[str, Any]) -> None:
    doubled = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [doubled] * 40}


def growing_at_once(tokenizer: dict[str, Any]) -> None:
    pattern = {"type": "Replace", "pattern": {"Regex": "(?s)."}, "content": "a" * 100_000}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [pattern] * 2}


def prepending(tokenizer: dict[str, Any]) -> None:
    doubled = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    tokenizer["normalizer"] = {
        "type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a"}, *[doubled] * 40]
    }  # fmt: skip


def slow_regex(tokenizer: dict[str, Any]) -> None:
    pattern = {"Regex": r"(?:[a-z ]+[a-z ]+)+[0-9]|([a-z]|[a-z])*[0-9]"}
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def no_map(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}


def growing_decoder(tokenizer: dict[str, Any]) -> None:
    doubled = {"type": "Replace", "pattern": {"Regex": "."}, "content": "aa"}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [doubled] * 40}


def padded(tokenizer: dict[str, Any]) -> None:
    tokenizer["padding"] = {
        "strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "a",
    }  # fmt: skip


def doubling(part: str, members: str) -> Callable[[dict[str, Any]], None]:
    """Bytes written as characters, of which some are two bytes, which are written as characters."""

    def change(tokenizer: dict[str, Any]) -> None:
        one = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": False, "trim_offsets": True}
        tokenizer[part] = {"type": "Sequence", members: [one] * 40}

    return change


def unknown_of_no_token(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"] = {"type": "WordPiece", "unk_token": "none", "vocab": {"a": 0}} | {
        "continuing_subword_prefix": "##", "max_input_chars_per_word": 10**9
    }  # fmt: skip


def no_vocabulary(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"], tokenizer["added_tokens"] = {}, []


def special_text(tokenizer: dict[str, Any]) -> None:
    """An added token without text, and one of an id that nothing else has."""
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] = [{"id": 3_000_000_000, "content": "<|endoftext|>"} | common]


FILES: tuple[Make, ...] = (
    # Code
    os_system, builtins_eval, setstate, stack_global, stack_global_hidden, inst, extension, legacy_file, bare_pickle,
    torch_load_inside, rebuild_parameter, script_module,
    # Memory
    upper_case_pickle, upper_case_too, bytearray_of_ten_gigabytes, untyped_storage, float_storage, resized_by_state,
    deflated_tensors, overlapping_entries, duplicate_names, two_directories, second_end_in_comment, end_inside_end,
    lists_of_lists, laughs_in_config, nested_a_million_deep, nested_deep("data"), nested_deep("config"),
    nested_deep("optimizer"), nested_deep("changes"), many_operations, many_memos, huge_pickle, huge_text,
    huge_number, huge_vocabulary_number, number_in_config,
    # Tensors
    stride_zero, more_than_its_record, slightly_more_than_its_record, negative_sizes, sparse, on_meta, complex_weights,
    not_a_number, optimizer_without_averages, optimizer_of_texts,
    # Configs
    *(asking("model", n_layer=n) for n in (10**9, 10**18)), asking("model", n_embd=10**9, n_head=1),
    asking("model", n_embd=1 << 62, n_head=1), asking("model", n_head=1 << 40, n_embd=1 << 41),
    asking("model", block_size=10**9), asking("model", block_size=10**18), asking("model", vocab_size=10**9),
    asking("model", ngrams=8, ngram_rows=10**9), thin_ngrams,
    rows(10**9), rows((1 << 63) - 1), learned_positions, thin_positions, asking("train", batch_size=1 << 62),
    asking("train", batch_size=1 << 34, micro_batch_size=1), asking("train", batch_size=1 << 62, micro_batch_size=1),
    # Paths and names
    member_outside, other_out_dir, data_that_is_a_device, data_that_is_the_disk, class_outside, class_beside,
    class_of_the_library, known_class_of_any_size, long_class, long_names, names_for_the_terminal,
    config_for_the_terminal, directory_for_the_terminal,
    # Tokenizers
    tokenizer_of(lambda _: "not JSON", "not JSON"), tokenizer_of(lambda _: "[" * 100_000, "deep JSON"),
    tokenizer_of(lambda _: "{}", "an empty object"), tokenizer_of(far_id, "an id far out"),
    tokenizer_of(id_beyond_the_rows, "ids beyond the rows"), tokenizer_of(growing, "a text that grows"),
    tokenizer_of(growing_at_once, "a text that grows at once"), tokenizer_of(prepending, "a text that is begun"),
    tokenizer_of(slow_regex, "an expression that takes for ever"), tokenizer_of(no_map, "a damaged map"),
    tokenizer_of(doubling("normalizer", "normalizers"), "bytes of bytes"), tokenizer_of(padded, "padding"),
    tokenizer_of(doubling("pre_tokenizer", "pretokenizers"), "bytes of bytes of words"),
    tokenizer_of(unknown_of_no_token, "an unknown token that it has not"), tokenizer_of(no_vocabulary, "no tokens"),
    tokenizer_of(growing_decoder, "a decoder that grows"), tokenizer_of(special_text, "a special token far out"),
)  # fmt: skip
SLOW = {
    deflated_tensors, overlapping_entries, laughs_in_config, many_operations, many_memos, huge_pickle, huge_text,
    nested_a_million_deep,
}  # fmt: skip
# These ask for nothing that the command would not do for a good file: what it must not do, is checked all the same.
MAY_PASS = {
    "other_out_dir": ("sample",),
    "data_that_is_a_device": ("sample",),
    "data_that_is_the_disk": ("sample",),
    "directory_for_the_terminal": ("sample",),
    "optimizer_without_averages": ("sample", "eval"),
    "optimizer_of_texts": ("sample", "eval"),
    "model.vocab_size = 1e+09": ("sample",),
    "complex_weights": ("sample", "eval", "resume"),  # the real part is taken
    "tokenizer: padding": ("sample",),
    "tokenizer: a special token far out": ("sample",),  # the library gives it another id
    "not_a_number": ("sample",),
}


# ---- What must come of it ----


def hostile(folder: Path, whole: bool = True) -> Iterator[Finding]:
    """Hand each of the files to each of the commands, and some to the console script; or to `sample`, and few more."""
    home = Home(folder / "run", RUN, folder / "run" / "data")
    with Forks() as forks:
        code = forks.start(home, "train", "run.toml", *QUIET).wait(LIMIT)
        assert code == 0, home.said()
    good = home.out / f"ckpt-{STEP}.pt"
    makes = [make for make in FILES if whole or make not in SLOW]
    cases = {"a good file": good} | {make.__name__: made(make, good, folder / "cases") for make in makes}
    (home.folder / "known.py").write_text(KNOWN)
    (home.folder / "mine.py").write_text(f"import os\nos.system({TOUCH!r})\n")
    with Victim(home) as victim:
        home.log.unlink(missing_ok=True)
        before = tree(folder)
        for name, path in cases.items():
            for command in COMMANDS if whole or name in MAY_PASS else COMMANDS[:1]:
                answer = victim.answer([str(path) if word == "FILE" else word for word in command])
                kept = tree(folder)
                yield judged(name, command[0], path, answer, changed=[*(kept.keys() ^ before.keys())])
                if kept != before:  # it went on with the run, as with a good file
                    before = cleared(folder, path, before)
    for name in [*cases][1::9] if whole else ():
        home.log.unlink(missing_ok=True)
        started = time.monotonic()
        code = spawn(home, "sample", "-c", str(cases[name]), "--max-new-tokens", "3").wait(LIMIT)
        answer = {"code": code, "said": home.said(), "seconds": 0.0, "grown": 0}
        home.log.unlink()
        yield judged(name, "tinyllm sample", cases[name], answer, changed=[*(tree(folder).keys() ^ before.keys())])
        assert time.monotonic() - started < STUCK


def made(make: Make, good: Path, folder: Path) -> Path:
    """The file of a case, in a folder of its own."""
    own = folder / make.__name__.replace("/", " ")
    own.mkdir(parents=True)
    checkpoint = load(good)
    make(own / LATEST, {"format": "tinyllm checkpoint", "version": 3} | vars(checkpoint))
    return own / LATEST


def tree(folder: Path) -> dict[str, int]:
    """Every file, and its size."""
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def cleared(folder: Path, path: Path, before: dict[str, int]) -> dict[str, int]:
    """Delete what is new."""
    for name in tree(folder).keys() - before.keys():
        Path(name).unlink()
    return tree(folder)


def judged(name: str, command: str, path: Path, answer: dict[str, Any], changed: list[str]) -> Finding:
    """Whether a command's answer to a hostile file is as it must be."""
    code, said, full = answer["code"], answer["said"], f"{name}: {command}"
    may_pass = name == "a good file" or command.split()[-1] in MAY_PASS.get(name, ())
    outside = [file for file in changed if Path(file).parent != path.parent]
    problem = "" if may_pass and code == 0 else refused(code, said)
    if "not enough memory" in said:
        problem = "asked for memory, and did not get it"
    if outside:
        problem = f"files changed: {outside}"
    elif not problem and code == 2 and changed:
        problem = "" if command.endswith("resume") else f"refused, but left {changed}"  # it had begun
    elif not problem and (code == 2 and (len(said) > 1500 or said.count("\n") > 10)):
        problem = f"a message of {len(said):,} characters, {said.count(chr(10))} lines: {said[:300]}"
    elif not problem and any(ord(c) < 32 and c not in "\n\t" for c in said):
        problem = f"control characters: {said[:300]!r}"
    elif answer["seconds"] > SECONDS:
        problem = f"took {answer['seconds']:.1f} s"
    elif answer["grown"] > MEMORY + A_BYTE * path.stat().st_size:
        problem = f"took {answer['grown'] / 1e6:.0f} MB for a file of {path.stat().st_size / 1e6:.1f} MB"
    shown = said.strip()[:300] or "nothing was said"
    return Finding(full, not problem, problem or f"{answer['seconds']:.2f} s, {answer['grown'] / 1e6:.0f} MB: {shown}")


# ---- The victim ----


class Victim:
    """A process in which tinyllm runs command after command, with little memory to spare; a new one when it is gone."""

    def __init__(self, home: Home) -> None:
        self.home, self.process = home, None

    def __enter__(self) -> "Victim":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def start(self) -> None:
        command = [sys.executable, "-m", "torture.hostile", str(self.home.log)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen(command, cwd=self.home.folder, env=environment(), **pipes)
        self.process.stdout.readline()

    def answer(self, args: list[str]) -> dict[str, Any]:
        """Exit code, what was said, seconds, and by how many bytes its memory grew."""
        if not self.process:
            self.start()
        clock = threading.Timer(STUCK, self.process.kill)
        clock.start()
        print(json.dumps(args), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        clock.cancel()
        if line:
            answer = json.loads(line)
        else:
            code = self.process.wait()
            self.end()
            answer = {"code": code, "seconds": 0.0, "grown": 0}
        answer["said"] = self.home.said()
        self.home.log.unlink()
        return answer


def be_victim(log: str) -> None:
    """Run the commands that come as lines of JSON, until there are no more."""
    from tinyllm import cli, engine, generate  # noqa: F401

    torch.set_num_threads(1)
    os.environ["RUST_BACKTRACE"] = "0"
    limit = resident("VmSize") + CEILING
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    print("ready", file=out)
    for line in sys.stdin:
        with open(log, "ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        forget_peak()
        before, started = resident(), time.monotonic()
        code = run(json.loads(line))
        answer = {"code": code, "seconds": time.monotonic() - started, "grown": resident("VmHWM") - before}
        print(json.dumps(answer), file=out)


def run(args: list[str]) -> int:
    """Exit code of `tinyllm ARGS`; 70 for what would be a traceback, which is said."""
    import traceback

    from tinyllm import cli

    sys.argv = ["tinyllm", *args]
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    be_victim(sys.argv[1])
