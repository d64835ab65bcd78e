"""Tensors and plain values in one file that says itself whether it is whole, and that runs nothing when it is read.

    write("out/ckpt.pt", record, step=250)       # in its place only once it is whole and on the disk
    record, sealed = read("out/ckpt.pt")
    sealed_step("out/ckpt.pt")                   # 250, at the price of reading the file's end

The file is what torch.save writes, a zip; anybody's `torch.load(path, weights_only=True)` reads it. Its last bytes, the
comment that a zip may end with, are a seal: the step, and the SHA-256 of all that stands before. A flipped bit or a
missing end anywhere shows.

Who made a file can seal it too, so a seal is no reason to trust it. Before torch reads a file it has been looked
through: nothing in it is compressed, so that it cannot unpack to more than its size, and its pickle names nothing but
tensors and dictionaries, so that it can neither call anything nor ask for memory.
"""

import hashlib
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tinyllm.errors import CheckpointError, is_out_of_memory
from tinyllm.files import sync_folder

LEAD = "tinyllm, step {:019}, sha256 "
SEAL = re.compile(rb"tinyllm, step (\d{19}), sha256 ([0-9a-f]{64})")
DIGEST_SIZE, SEAL_SIZE = 64, len(LEAD.format(0)) + 64  # bytes
MAX_PICKLE = 1 << 26  # bytes: all but the tensors, whose largest part is a tokenizer of a few megabytes
MAX_OPERATIONS = 1_000_000  # of the pickle, each of which may take 100 bytes; a parameter and its averages need 124
MAX_VALUES = 1_000_000  # plain values in a record; a list can hold another many times over
MAX_DEPTH, MAX_TEXT, MAX_NAME = 50, 1 << 14, 500  # of values in one another; characters, but of a tokenizer; of a key
# What torch.save writes for dictionaries of tensors.
NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch [A-Z][A-Za-z0-9]+Storage")


def write(path: str | Path, record: Mapping[str, Any], step: int) -> None:
    """Write the file aside, seal it, sync it, and put it in its place.

    Raises OSError, and CheckpointError for a record that `read` would refuse; the old file is then untouched.
    A crash leaves the old file or the new one, never a half; whoever writes next replaces what it left aside.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    refuse_unusual(record, str(path), "cannot save the checkpoint")
    try:
        with open(aside, "w+b") as file:
            save_sealed(file, record, step)
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):  # where the folder is not even a folder
            aside.unlink()


def save_sealed(file: BinaryIO, record: Mapping[str, Any], step: int) -> None:
    """torch.save, and a seal. Raises OSError."""
    try:
        torch.save(record, file)
    except RuntimeError as error:  # so torch's zip writer reports a full disk
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    file.seek(-2, os.SEEK_END)  # a zip file ends with the length of its comment, and the comment
    file.write(struct.pack("<H", SEAL_SIZE) + LEAD.format(step).encode())
    file.seek(0)
    file.write(hashlib.file_digest(file, "sha256").hexdigest().encode())
    file.flush()


def read(path: str | Path) -> tuple[dict[str, Any], bool]:
    """The record, its tensors on the CPU, and whether the file has a seal. Runs nothing that is in it.

    Raises CheckpointError for a file that is missing, of another kind, damaged, or not to be trusted with the memory.
    """
    where = str(path)
    with opened(path) as file:
        head = file.read(4)
        if head[:1] == b"\x80" or head[:3] == b"(dp":
            raise CheckpointError("not a tinyllm checkpoint: a pickle, which could run code", where=where)
        if head != b"PK\3\4":
            raise CheckpointError("not a tinyllm checkpoint: not a file of torch.save", where=where)
        sealed = verified(file, where)
        try:
            look_through(file, where, sealed)
            file.seek(0)
            record = torch.load(file, map_location="cpu", weights_only=True)
        except CheckpointError:
            raise
        except Exception as error:  # there is hardly one that a damaged file cannot cause
            if is_out_of_memory(error):
                raise
            said = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip()
            if isinstance(error, pickle.UnpicklingError):
                said = "its pickle is not one that torch takes"  # and says in many words
            reason = said.splitlines()[0] if said else type(error).__name__
            raise CheckpointError(f"not a checkpoint, or a damaged one ({reason})", where=where) from None
    if not isinstance(record, dict):
        raise CheckpointError("not a tinyllm checkpoint", where=where)
    refuse_unusual(record, where)
    return record, sealed


def opened(path: str | Path) -> BinaryIO:
    """The file, for reading. Raises CheckpointError."""
    try:
        return open(path, "rb")
    except FileNotFoundError:
        fix = "`tinyllm train run.toml` makes one in its train.out_dir"
        raise CheckpointError("no such checkpoint", where=str(path), fix=fix) from None
    except OSError as error:
        fix = "look at its permissions, and at the disk"
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path), fix=fix) from None


# ---- The seal ----


def sealed_step(path: str | Path) -> int | None:
    """The step that the seal tells, the rest of the file unseen; None where there is no file, or no seal."""
    try:
        with open(path, "rb") as file:
            match = read_seal(file)
    except OSError:
        return None
    return int(match[1]) if match else None


def is_whole(path: str | Path) -> bool:
    """Whether the file has a seal that fits all of its bytes."""
    try:
        with open(path, "rb") as file:
            return verified(file, str(path))
    except (OSError, CheckpointError):
        return False


def read_seal(file: BinaryIO) -> re.Match[bytes] | None:
    """The seal at the file's end, if there is one."""
    file.seek(max(0, os.fstat(file.fileno()).st_size - SEAL_SIZE))
    return SEAL.fullmatch(file.read())


def verified(file: BinaryIO, where: str) -> bool:
    """Whether the file is sealed. Raises CheckpointError when it is not what was sealed."""
    seal = read_seal(file)
    if seal is None:
        return False
    file.seek(0)
    digest, left = hashlib.sha256(), os.fstat(file.fileno()).st_size - DIGEST_SIZE
    while part := file.read(min(left, 1 << 20)):
        digest.update(part)
        left -= len(part)
    if digest.hexdigest().encode() != seal[2]:
        raise CheckpointError("damaged: it is not what was sealed (another SHA-256)", where=where)
    return True


# ---- Files of strangers ----


def look_through(file: BinaryIO, where: str, sealed: bool) -> None:
    """Refuse what torch would take, but nobody should. Raises CheckpointError, and what zipfile raises."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if not ends_plainly(file, archive, size, sealed):
            raise CheckpointError("not a tinyllm checkpoint: its directory is not where torch writes it", where=where)
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            what = f"not a file of torch.save: its {size:,} bytes would unpack to {unpacked:,}"
            raise CheckpointError(what, where=where)
        names = [entry.orig_filename for entry in entries]
        tops = {name.partition("/")[0] for name in names}
        pickles = [name for name in names if name.lower().endswith(".pkl")]
        distinct = {name.lower() for name in names}  # torch finds a part whatever its case
        if len(tops) != 1 or len(distinct) != len(names) or pickles != [f"{tops.pop()}/data.pkl"]:
            raise CheckpointError("not a file of torch.save: its parts have other names", where=where)
        if not sealed and (damaged := archive.testzip()):  # torch does not look at the checksums
            raise CheckpointError(f"damaged: {damaged} has another checksum", where=where)
        if archive.getinfo(pickles[0]).file_size > MAX_PICKLE:
            raise CheckpointError("not a tinyllm checkpoint: it holds too much beside tensors", where=where)
        refuse_code(archive.read(pickles[0]), where)


def ends_plainly(file: BinaryIO, archive: zipfile.ZipFile, size: int, sealed: bool) -> bool:
    """Whether a zip file ends as torch ends it: with three records, of which each says where the directory is.

    Of three that do not agree one reader believes this one and another that, and finds another file than we looked at.
    """
    comment = SEAL_SIZE if sealed else 0
    place = size - comment - 98  # of the first of them
    entries, start, length = len(archive.infolist()), archive.start_dir, place - archive.start_dir
    file.seek(max(place, 0))
    found = file.read(98)
    little = [min(value, most) for value, most in ((entries, 0xFFFF), (length, 0xFFFFFFFF), (start, 0xFFFFFFFF))]
    if length < 0 or found[:12] != struct.pack("<4sQ", b"PK\6\6", 44):
        return False
    return found[16:] == (
        struct.pack("<2L4Q", 0, 0, entries, entries, length, start)
        + struct.pack("<4sLQL", b"PK\6\7", 0, place, 1)
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, little[0], *little, comment)
    )


def refuse_code(pickled: bytes, where: str) -> None:
    """Raise CheckpointError for a pickle that names anything but tensors and dictionaries; nothing of it is run."""
    for number, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
        if number > MAX_OPERATIONS:
            raise CheckpointError("not a tinyllm checkpoint: its values are too many", where=where)
        if isinstance(argument, int) and not -(1 << 63) <= argument < 1 << 63:
            raise CheckpointError("not a tinyllm checkpoint: a number has more than 64 bits", where=where)
        if operation.name in ("GLOBAL", "INST"):
            is_known = NAMES.fullmatch(argument)
        else:  # ours never take a name from the stack, or from a table of extensions
            is_known = operation.name not in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
        if not is_known:
            called = (argument if isinstance(argument, str) else operation.name).replace(" ", ".")[:100]
            what = f"not a tinyllm checkpoint: it asks for {called!r}, and could run code; nothing of it was run"
            raise CheckpointError(what, where=where)


def refuse_unusual(record: Mapping[str, Any], where: str, what: str = "not a tinyllm checkpoint") -> None:
    """Raise CheckpointError unless the record is made of plain tensors and plain values, and not of too many."""
    todo: list[tuple[Any, int]] = [(record, 0)]  # and how deep it is
    seen = 0
    while todo:
        value, depth = todo.pop()
        seen += 1
        if seen > MAX_VALUES or depth > MAX_DEPTH:
            raise CheckpointError(f"{what}: its values hold one another without end", where=where)
        if isinstance(value, dict):
            # Keys are named in errors: one must not write to the terminal what it likes.
            if not all(isinstance(key, str) and key.isprintable() and len(key) <= MAX_NAME for key in value):
                raise CheckpointError(f"{what}: a dictionary's key is no plain text", where=where)
            todo += ((part, depth + 1) for part in value.values())
        elif isinstance(value, list | tuple):
            todo += ((part, depth + 1) for part in value)
        elif isinstance(value, str) and depth > 1 and len(value) > MAX_TEXT:
            raise CheckpointError(f"{what}: a text is too long", where=where)
        elif isinstance(value, Tensor):
            # One value can stand for many (stride 0), and would need their memory as soon as somebody computes.
            spread = value.layout is not torch.strided or value.untyped_storage().nbytes() < value.nbytes
            if type(value) is not Tensor or value.is_meta or spread:
                raise CheckpointError(f"{what}: a tensor is not what it seems", where=where)
        elif not (value is None or isinstance(value, bool | int | float | str)):
            raise CheckpointError(f"{what}: it holds a {type(value).__name__}", where=where)


def nbytes(record: Any) -> int:
    """Bytes of the tensors in a record, each storage once."""
    storages: dict[int, int] = {}
    todo = [record]
    while todo:
        value = todo.pop()
        if isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values())
