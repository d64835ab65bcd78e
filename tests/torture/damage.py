"""Damaged checkpoints and token files: each is refused in one sentence, and the file before it is taken instead.

    for finding in damage(2000, seed=0, folder=Path("/tmp/damage")):
        finding.ok, finding.name, finding.what      # True, "bit flip, directory: muon", "damaged: it is not what ..."

The checkpoints are those of small real runs. What is done to them is what disks, copies and people do: bits flip,
blocks are zeroed, an end is missing, two files are mixed, one is taken for another.
"""

import random
import re
import shutil
import struct
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path

import torch

from tinyllm import prepare as prep
from tinyllm.archive import SEAL_SIZE, sealed_step
from tinyllm.checkpoint import BEST, LATEST, Checkpoint, find, load
from tinyllm.config import DataConfig
from tinyllm.data import HEADER_SIZE
from tinyllm.errors import CheckpointError, DataError
from torture.finding import Finding, forget_peak, refused, resident
from torture.runs import LIMIT, QUIET, Forks, Home, differences, unlike

RUNS = {
    "adamw": {"model.dropout": 0.1},
    "muon": {"optim.name": "muon", "model.recipe": "modern"},
    "vocabulary": {"data.tokenizer": "bpe", "data.vocab_size": 300, "model.vocab_size": 320},
}
STEPS = {"train.max_steps": 40, "train.eval_interval": 10, "train.save_interval": 10, "data.tales_stories": 120}
SECONDS, MEMORY = 2.0, 100 << 20  # what a refusal may take at most


@dataclass(frozen=True)
class Whole:
    """A checkpoint as it was written, and where its parts are."""

    run: str
    content: bytes
    parts: dict[str, list[range]]  # of its bytes, by what they are

    @classmethod
    def read(cls, run: str, path: Path) -> "Whole":
        content = path.read_bytes()
        parts: dict[str, list[range]] = {"local headers": [], "padding": []}
        with zipfile.ZipFile(BytesIO(content)) as archive:
            for entry in archive.infolist():
                first = entry.header_offset
                name, extra = struct.unpack_from("<HH", content, first + 26)
                data = first + 30 + name + extra
                parts["local headers"].append(range(first, first + 30 + name))
                if extra:
                    parts["padding"].append(range(first + 30 + name, data))
                if entry.filename.endswith("data.pkl"):
                    parts["pickle"] = [range(data, data + entry.file_size)]
                    at = data + content[data : data + entry.file_size].index(b"version") + len(b"version")
                    parts["version number"] = [range(at, at + 6)]  # it is memoized, then comes the number
            end = len(content) - SEAL_SIZE
            parts["directory"] = [range(archive.start_dir, end - 22)]
            parts["end record"] = [range(end - 22, end)]
            parts["seal"] = [range(end, len(content))]
        parts["anywhere"] = [range(len(content))]
        return cls(run, content, parts)


# ---- Ways to damage a file ----

Damage = Callable[[random.Random, bytes, bytes], bytes]  # of a file, with another one at hand


def flip(rng: random.Random, content: bytes, places: list[range]) -> bytes:
    place = rng.choice(places)
    at = rng.choice(place)
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def burst(rng: random.Random, content: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(min(rng.randint(2, 300), len(content) - at)) + content[at:][300:]


def overwrite(rng: random.Random, content: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(content))
    size = min(rng.randint(2, 300), len(content) - at)
    return content[:at] + rng.randbytes(size) + content[at + size :]


def truncate(rng: random.Random, content: bytes, _: bytes) -> bytes:
    near_the_end = rng.random() < 0.3
    return content[: len(content) - rng.randint(1, 400) if near_the_end else rng.randrange(len(content))]


def zero_block(rng: random.Random, content: bytes, _: bytes) -> bytes:
    size = rng.choice((16, 512, 4096, 65536))
    at = rng.randrange(len(content)) // size * size
    return content[:at] + bytes(len(content[at : at + size])) + content[at + size :]


def missing_block(rng: random.Random, content: bytes, _: bytes) -> bytes:
    at, size = rng.randrange(len(content)), rng.choice((1, 2, 16, 512, 4096))
    return content[:at] + content[at + size :]


def inserted(rng: random.Random, content: bytes, _: bytes) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(rng.choice((1, 2, 16, 512))) + content[at:]


def swapped_blocks(rng: random.Random, content: bytes, _: bytes) -> bytes:
    size = 512
    a, b = sorted(rng.sample(range(len(content) // size), 2))
    one, two = content[a * size : (a + 1) * size], content[b * size : (b + 1) * size]
    return content[: a * size] + two + content[(a + 1) * size : b * size] + one + content[(b + 1) * size :]


def splice(rng: random.Random, content: bytes, other: bytes) -> bytes:
    """The beginning of one file and the end of another, as long as one of them or not."""
    at = rng.randrange(1, len(content))
    return content[:at] + (other[at:] if rng.random() < 0.7 else other[rng.randrange(len(other)) :])


def appended(rng: random.Random, content: bytes, other: bytes) -> bytes:
    return content + rng.choice((b"\0", b"\n", bytes(4096), rng.randbytes(77), other, content, content[-SEAL_SIZE:]))


def begun_with(rng: random.Random, content: bytes, other: bytes) -> bytes:
    return rng.choice((b"\0", rng.randbytes(40), other)) + content


def seal_of_another(_: random.Random, content: bytes, other: bytes) -> bytes:
    return content[:-SEAL_SIZE] + other[-SEAL_SIZE:]


def other_step(rng: random.Random, content: bytes, _: bytes) -> bytes:
    lead = content.rindex(b"tinyllm, step ") + len(b"tinyllm, step ")
    return content[:lead] + b"%019d" % rng.randrange(10**6, 10**9) + content[lead + 19 :]


def unsealed(_: random.Random, content: bytes, __: bytes) -> bytes:
    return content[: -SEAL_SIZE - 2] + b"\0\0"  # a good zip file, but not sealed


def emptied(rng: random.Random, content: bytes, _: bytes) -> bytes:
    return rng.choice((b"", bytes(len(content)), b"\xff" * len(content)))


DAMAGES: dict[str, tuple[Damage, float]] = {  # and how many of all
    "burst": (overwrite, 2),
    "something lost": (burst, 1),
    "truncation": (truncate, 3),
    "zeroed block": (zero_block, 2),
    "missing block": (missing_block, 1),
    "inserted bytes": (inserted, 1),
    "swapped blocks": (swapped_blocks, 1),
    "spliced": (splice, 3),
    "appended": (appended, 1),
    "something before it": (begun_with, 0.5),
    "seal of another file": (seal_of_another, 0.3),
    "another step in the seal": (other_step, 0.3),
    "seal cut off": (unsealed, 0.1),
    "emptied": (emptied, 0.1),
}
FLIPS = {
    "anywhere": 4, "directory": 2, "local headers": 2, "padding": 1, "pickle": 2, "seal": 2, "end record": 1,
    "version number": 0.5,
}  # fmt: skip


KINDS = [*(("bit flip", part, weight) for part, weight in FLIPS.items())]
KINDS += [(name, "", weight) for name, (_, weight) in DAMAGES.items()]


def damaged(
    rng: random.Random, files: list[Whole], whole: Whole | None = None, number: int = len(KINDS)
) -> tuple[str, Whole, bytes]:
    """A file that is none of the given ones: what was done to which of them (or to this one), and what came of it.

    `number`: of the kinds, each of which is to come once; beyond them they come by chance.
    """
    whole = whole or rng.choice(files)
    name, part, _ = rng.choices(KINDS, [weight for *_, weight in KINDS])[0] if number >= len(KINDS) else KINDS[number]
    known = {file.content for file in files}
    content = whole.content
    while content in known:
        # Two of the same run are the most alike; they may have the same length.
        alike = rng.random() < 0.7
        other = rng.choice([f for f in files if f is not whole and (f.run == whole.run) == alike])
        if part:
            content = flip(rng, whole.content, whole.parts[part])
        else:
            content = DAMAGES[name][0](rng, whole.content, other.content)
    return f"{name}, {part}" if part else name, whole, content


# ---- What must come of it ----


def damage(count: int, seed: int, folder: Path, whole: bool = True) -> Iterator[Finding]:
    """Damage so many checkpoints and, in proportion, folders and token files; `whole`: for every command, too."""
    with Forks() as forks:
        homes = train_runs(folder, forks)
        files = [Whole.read(name, path) for name, home in homes.items() for path in sorted(home.out.glob("*.pt"))]
        yield from damaged_files(count, random.Random(seed), files, folder / "damaged")
        yield from old_files(count // 10, random.Random(seed), homes, folder / "old")
        yield from folders(count // 20, random.Random(seed), homes, files, folder / "folders")
        yield from token_files(count // 5, random.Random(seed), folder / "tokens")
        chosen = homes if whole else {"muon": homes["muon"]}
        yield from goes_on(random.Random(seed), chosen, files, folder / "resumed", forks)
        if whole:
            yield from commands(random.Random(seed), homes, files, folder / "commands", forks)
        names = ("train.bin", "val.bin", "tokenizer.json", "meta.json") if whole else ("train.bin",)
        yield from token_commands(homes["adamw"], folder / "again", forks, names)


def train_runs(folder: Path, forks: Forks) -> dict[str, Home]:
    """A finished run of each kind."""
    homes = {name: Home(folder / name, STEPS | changes, folder / name / "data") for name, changes in RUNS.items()}
    for home in homes.values():
        code = forks.start(home, "train", "run.toml", *QUIET).wait(LIMIT)
        assert code == 0, home.said()
    return homes


def damaged_files(count: int, rng: random.Random, files: list[Whole], folder: Path) -> Iterator[Finding]:
    """load() refuses each, in a moment and without taking memory."""
    folder.mkdir(parents=True)
    path = folder / LATEST
    forget_peak()
    before = resident()
    for number in range(count):
        name, whole, content = damaged(rng, files, number=number)
        path.write_bytes(content)
        what, problem = load_refuses(path)
        yield Finding(f"{name}: {whole.run}", not problem, problem or what)
    grown = resident("VmHWM") - before
    yield Finding("memory of all of them", grown < MEMORY, f"{grown / 1e6:.0f} MB")


def load_refuses(path: Path) -> tuple[str, str]:
    """What load says of a damaged file, and what is wrong with that."""
    started = time.monotonic()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            load(path)
        except CheckpointError as error:
            what, where, bad = error.what, error.where, ""
        except BaseException as error:
            return "", f"raised {type(error).__name__}: {error}"
        else:
            return "", "was loaded"
    if "\n" in what or where != str(path) or len(what) > 300:
        bad = f"the message: {where}: {what}"
    elif (seconds := time.monotonic() - started) > SECONDS:
        bad = f"took {seconds:.1f} s"
    elif warned:
        bad = f"a warning: {warned[0].message}"
    return what, bad


def of_version_2(checkpoint: Checkpoint) -> dict[str, object]:
    """The record as it was before there were seals."""
    held = {"format": "tinyllm checkpoint", "version": 2} | vars(checkpoint)
    for name in ("environment", "recent_losses", "changes"):
        del held[name]
    weights = OrderedDict(checkpoint.model)  # as state_dict() gives them
    weights._metadata = OrderedDict({"": {"version": 1}})
    return held | {"model": weights, "versions": {"torch": str(torch.__version__)}, "val_loss": 2.5}


def old_files(count: int, rng: random.Random, homes: dict[str, Home], folder: Path) -> Iterator[Finding]:
    """Files of version 2 have no seal, but checksums: one is refused, or says what it has always said."""
    folder.mkdir(parents=True)
    path = folder / LATEST
    whole = load(homes["muon"].out / LATEST)
    torch.save(of_version_2(whole), path)
    content = path.read_bytes()
    old = load(path)
    same = unlike(vars(old), vars(whole) | {"environment": old.environment, "recent_losses": [], "changes": []})
    yield Finding("version 2", not same, ", ".join(same) or "read")
    yield from both_versions(homes["muon"], folder / "both")
    for _ in range(count):
        kind = rng.choice((burst, overwrite, truncate, zero_block, missing_block, inserted, swapped_blocks, None))
        new = kind(rng, content, content) if kind else flip(rng, content, [range(len(content))])
        path.write_bytes(new)
        what, problem = load_refuses(path)
        if problem == "was loaded" and not unlike(vars(load(path)), vars(old)):
            what, problem = "in the padding", ""
        yield Finding(f"{kind.__name__ if kind else 'bit flip'}: version 2", not problem, problem or what)


def both_versions(home: Home, folder: Path) -> Iterator[Finding]:
    """A run that an older tinyllm began: its best is still from there, the latest is not."""
    out = copied(home, folder).out
    older = min(out.glob("*.pt"), key=lambda path: load(path).step)
    torch.save(of_version_2(load(older)), out / BEST)
    for wanted, expected in ((LATEST, LATEST), (BEST, BEST)):
        found = find(out, wanted)
        what = f"took {found.path.name} of step {found.checkpoint.step}"
        yield Finding(f"a {BEST} of version 2: {wanted}", found.path.name == expected and not found.passed_over, what)


# ---- Folders ----


def folders(
    count: int, rng: random.Random, homes: dict[str, Home], files: list[Whole], folder: Path
) -> Iterator[Finding]:
    """Of a folder the next good file is taken, and each better one that is damaged is named."""
    for number in range(count):
        run = rng.choice(list(homes))
        out = folder / str(number)
        shutil.copytree(homes[run].out, out)
        wanted = rng.choice((LATEST, BEST))
        order = newest_first(out, wanted)
        bad = order[: rng.choice((1, 1, 2, len(order) - 1, len(order)))]
        for path in bad:
            put(rng, path, files)
        yield Finding(f"{len(bad)} of {len(order)} damaged: {wanted} of {run}", *found_well(out, wanted, order, bad))
        shutil.rmtree(out)


def put(rng: random.Random, path: Path, files: list[Whole]) -> None:
    """Damage a file."""
    content = path.read_bytes()
    *_, content = damaged(rng, files, next(file for file in files if file.content == content))
    path.write_bytes(content)


def newest_first(out: Path, wanted: str) -> list[Path]:
    """The files of a run in the order in which `find` must look at them."""
    kinds = sorted(("best", "ckpt"), key=lambda kind: not wanted.startswith(kind))
    steps = {path: load(path).step for path in out.glob("*.pt")}
    if wanted == BEST:
        return sorted(steps, key=lambda path: (kinds.index(path.name[:4]), -steps[path]))
    return sorted(steps, key=lambda path: (-steps[path], path.name != LATEST, kinds.index(path.name[:4])))


def found_well(out: Path, wanted: str, order: list[Path], bad: list[Path]) -> tuple[bool, str]:
    try:
        found = find(out, wanted)
    except CheckpointError as error:
        unnamed = [path.name for path in bad if path.name not in str(error)]
        return len(bad) == len(order) and not unnamed, str(error)
    except BaseException as error:
        return False, f"raised {type(error).__name__}: {error}"
    if len(bad) == len(order):
        return False, f"{found.path} was loaded"
    named = {error.where for error in found.passed_over}
    missing = [path.name for path in bad if str(path) not in named and seems_newer(path, found.checkpoint.step, wanted)]
    if found.path != order[len(bad)] or missing:
        return False, f"took {found.path.name}, not {order[len(bad)].name}; did not name {missing}"
    return True, f"took {found.path.name}"


def seems_newer(path: Path, step: int, wanted: str) -> bool:
    """Whether a damaged file can be told from one that is whole and older: another's seal may be at its end, or none.

    Without one, it is what is wanted by its name alone; a best.pt may be of any age.
    """
    claimed = sealed_step(path)
    return path.name == wanted if claimed is None else claimed > step


# ---- The command line ----


def goes_on(
    rng: random.Random, homes: dict[str, Home], files: list[Whole], folder: Path, forks: Forks
) -> Iterator[Finding]:
    """What goes on with an older file says so, and ends with the very bits of the undisturbed run."""
    for number, (name, home) in enumerate(homes.items()):
        mine = copied(home, folder / f"resume-{number}")
        put(rng, mine.out / LATEST, files)
        claimed = sealed_step(mine.out / LATEST)
        code = forks.start(mine, "resume", "out").wait(LIMIT)
        problems = differences(mine, home) if code == 0 else [mine.said()[-500:]]
        if claimed is None or claimed >= home.steps:  # best.pt is there of the last step, too
            problems += [] if re.search(r"warning: .*ckpt\.pt", mine.said()) else ["the damaged file is not named"]
        yield Finding(f"resume with a damaged {LATEST}: {name}", not problems, "; ".join(problems) or "the same bits")

        mine = copied(home, folder / f"sample-{number}")
        put(rng, mine.out / BEST, files)
        code = forks.start(mine, "sample", "-c", "out", "--max-new-tokens", "5").wait(LIMIT)
        ok = code == 0 and "warning: " in mine.said() and "going on with " in mine.said()
        yield Finding(f"sample with a damaged {BEST}: {name}", ok, mine.said()[-300:])


def commands(
    rng: random.Random, homes: dict[str, Home], files: list[Whole], folder: Path, forks: Forks
) -> Iterator[Finding]:
    """One error and no traceback, whichever command it is."""
    home = homes["adamw"]
    for number, args in enumerate(
        (("resume", "out/ckpt.pt"), ("eval", "out/best.pt"), ("sample", "-c", "out/best.pt"), ("resume", "out/best.pt"))
    ):
        mine = copied(home, folder / f"file-{number}")
        for file in (LATEST, BEST):
            put(rng, mine.out / file, files)
        code = forks.start(mine, *args).wait(LIMIT)
        problem = refused(code, mine.said(), args[-1], "the newest good one beside it: ")
        yield Finding(f"a damaged file: {' '.join(args)}", not problem, problem or mine.said().strip())
    for number, args in enumerate((("resume", "out"), ("eval", "out"), ("sample", "-c", "out"))):
        mine = copied(home, folder / f"all-{number}")
        for file in mine.files_of_checkpoints():
            put(rng, mine.out / file, files)
        code = forks.start(mine, *args).wait(LIMIT)
        problem = refused(code, mine.said(), "no checkpoint in this folder can be read", *mine.files_of_checkpoints())
        yield Finding(f"all are damaged: {' '.join(args)}", not problem, problem or mine.said().strip())
    for other in ("muon", "vocabulary"):  # of other data, or of another config
        mine = copied(home, folder / f"other-{other}")
        for name in mine.files_of_checkpoints():
            (mine.out / name).unlink()
        shutil.copy(homes[other].out / LATEST, mine.out / LATEST)
        code = forks.start(mine, "resume", "out", "--set", f"data.dir={home.folder / 'data'}").wait(LIMIT)
        if other == "vocabulary":
            problem = refused(code, mine.said(), "prepared")
        else:
            there = load(mine.out / LATEST)
            problem = "" if code == 0 and there.config["optim"]["name"] == "muon" else mine.said()[-500:]
        yield Finding(f"the {LATEST} of another run: {other}", not problem, problem or mine.said().strip()[-300:])


class Copied(Home):
    """A copy of a finished run, with the same data."""

    def files_of_checkpoints(self) -> list[str]:
        return [name for name in self.files() if name.endswith(".pt")]


def copied(home: Home, folder: Path) -> Copied:
    shutil.copytree(home.folder, folder, ignore=shutil.ignore_patterns("data", "log.txt"))
    mine = Copied.__new__(Copied)
    mine.folder, mine.out, mine.log = folder, folder / "out", folder / "log.txt"
    mine.steps, mine.eval_interval = home.steps, home.eval_interval
    return mine


# ---- Token files ----


def token_files(count: int, rng: random.Random, folder: Path) -> Iterator[Finding]:
    """Whatever changes in prepared data is refused, or means what it meant; preparing again makes it good."""
    folder.mkdir(parents=True)
    with chdir(folder):
        texts = {
            name: [f"{word} {i % 7}, {i}.\n" for i in range(900)] for name, word in (("one", "left"), ("two", "gone"))
        }
        preparations = {}
        for name, lines in texts.items():
            Path("text.txt").write_text("".join(lines))
            config = DataConfig(source="text.txt", dir="data", tokenizer="byte")
            list(prep.prepare(config))
            preparations[name] = {file: (Path("data") / file).read_bytes() for file in prep.FILES}
        assert all(
            len(preparations["one"][file]) == len(preparations["two"][file]) for file in ("train.bin", "val.bin")
        )
        whole = preparations["two"]
        meaning = prep.open_prepared(config)
        for chosen in product(("one", "two"), repeat=len(prep.FILES)):
            mixed = {file: preparations[name][file] for file, name in zip(prep.FILES, chosen, strict=True)}
            if mixed != whole:
                put_files(mixed)
                which = ", ".join(file for file, name in zip(prep.FILES, chosen, strict=True) if name == "one")
                yield Finding(f"of another preparation: {which}", *opened_well(config, None))
        digit = whole["meta.json"].index(b'"unigram_entropy": ') + 20
        put_files(whole | {"meta.json": whole["meta.json"][:digit] + b"7" + whole["meta.json"][digit + 1 :]})
        yield Finding("another digit: meta.json", *opened_well(config, None))
        for number in range(count):
            file = rng.choice(prep.FILES)
            content = whole[file]
            kind = rng.choice(TOKEN_DAMAGES)
            new = kind(rng, content, whole["val.bin"])
            if new == content:
                continue
            put_files(whole | {file: new})
            ok, what = opened_well(config, meaning)
            if ok and number % 20 == 0 and what != HARMLESS:  # and can be prepared again
                *_, again = prep.prepare(config)
                ok = bool(again.reasons) and {f: (Path("data") / f).read_bytes() for f in prep.FILES} == whole
            yield Finding(f"{kind.__name__}: {file}", ok, what)


def flip_anywhere(rng: random.Random, content: bytes, _: bytes) -> bytes:
    return flip(rng, content, [range(len(content))])


def flip_header(rng: random.Random, content: bytes, _: bytes) -> bytes:
    return flip(rng, content, [range(min(HEADER_SIZE, len(content)))])


def replaced(_: random.Random, __: bytes, other: bytes) -> bytes:
    return other


TOKEN_DAMAGES: tuple[Damage, ...] = (
    flip_anywhere, flip_anywhere, flip_anywhere, flip_header, truncate, overwrite, zero_block, swapped_blocks, inserted,
    missing_block, appended, emptied, replaced,
)  # fmt: skip
HARMLESS = "means the same"


def put_files(files: dict[str, bytes]) -> None:
    for file, content in files.items():
        (Path("data") / file).write_bytes(content)


def opened_well(config: DataConfig, meaning: prep.Prepared | None) -> tuple[bool, str]:
    """Whether opening the data says what is wrong, or finds the same as ever (other white space, say)."""
    try:
        prepared = prep.open_prepared(config)
    except DataError as error:
        return "data" in error.where and bool(error.fix), str(error).partition("\n")[0][:300]
    except BaseException as error:
        return False, f"raised {type(error).__name__}: {error}"
    return prepared == meaning, HARMLESS if prepared == meaning else "was opened"


def token_commands(home: Home, folder: Path, forks: Forks, names: tuple[str, ...]) -> Iterator[Finding]:
    """One flipped bit, and no command computes anything with it; prepared again, the run goes on."""
    for number, file in enumerate(names):
        mine = copied(home, folder / str(number))
        data = folder / f"data-{number}"
        shutil.copytree(home.folder / "data", data)
        content = (data / file).read_bytes()
        middle = len(content) // 2
        (data / file).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        other = ("--set", f"data.dir={data}")
        for args in (
            ("train", "run.toml", *QUIET, *other), ("eval", "out", *other), ("resume", "out", *other),
            ("sanity", "run.toml", "--quick", *other),
        ):  # fmt: skip
            mine.log.unlink(missing_ok=True)
            before = mine.files()
            code = forks.start(mine, *args).wait(LIMIT)
            problem = refused(code, mine.said(), str(data), "prepare") or (
                "the run is gone" if mine.files() != before else ""
            )
            yield Finding(f"a flipped bit in {file}: {args[0]}", not problem, problem or mine.said().strip()[-300:])
        for args in (("prepare", "run.toml", *other), ("resume", "out", *other)):
            code = forks.start(mine, *args).wait(LIMIT)
        problems = (differences_but_config(mine, home)) if code == 0 else [mine.said()[-500:]]
        yield Finding(f"{file} prepared again: resume", not problems, "; ".join(problems) or "the same bits")


def differences_but_config(mine: Home, home: Home) -> list[str]:
    """Those of the weights and the metrics: the folder of the data is in the config, and has another name."""
    return [d for d in differences(mine, home) if not re.search(r"config|changes|run\.toml", d)]
