"""Checks of the data: the token files, the tokenizer beside them, the two splits, and the batches made of them."""

import copy
import mmap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from tinyllm.baselines import WINDOW, window_hashes
from tinyllm.data import BatchSource, ids_hash, read_header
from tinyllm.errors import DataError
from tinyllm.sanity.result import Result, failed, passed, skipped, warned
from tinyllm.sanity.subject import COMPARED, Subject
from tinyllm.sources import inputs, pieces
from tinyllm.tokenizer import KINDS, decode, encode, end_of_text, from_json, token_bytes

PREPARE = "`tinyllm prepare run.toml --force` makes the files anew"
SLICE = 4000  # tokens that are decoded and read beside the source
SEARCHED = 1 << 28  # bytes of a token file in which windows are looked for by the dozen; in larger ones a few


def token_ids(subject: Subject) -> Result:
    """Every id in both files is one of the vocabulary, and the files' own account of themselves is right."""
    size, known = subject.run.vocab_size, subject.run.data.vocab_size
    highest = max(len(counts) - 1 for counts in subject.counts.values())
    measured, expected = f"ids up to {highest:,}", f"below {known:,}"
    if highest >= known:
        diagnosis = "the files hold ids that the tokenizer does not have: written by another one, or byte-swapped"
        return failed(measured, expected, diagnosis, PREPARE)
    if known > size:
        diagnosis = f"the model's embedding has {size:,} rows, the tokenizer {known:,} tokens"
        return failed(measured, f"below {size:,}", diagnosis, f"set model.vocab_size = 0, or at least {known}")
    for name in ("train", "val"):
        header = read_header(Path(subject.run.data.dir) / f"{name}.bin")
        if known > 1 << 8 * header.itemsize:
            diagnosis = (
                f"{name}.bin keeps ids in {header.itemsize} bytes: those above {1 << 8 * header.itemsize:,} wrap"
            )
            return failed(f"{header.itemsize} bytes an id", f"{known:,} ids to fit", diagnosis, PREPARE)
        share = subject.counts[name].max() / subject.counts[name].sum()
        if share > 0.9:
            token = int(subject.counts[name].argmax())
            diagnosis = f"{share:.0%} of {name}.bin is the one token {token}: there is hardly a text in it"
            return failed(f"token {token}: {share:.0%}", "at most 90%", diagnosis, "look at data.source")
    return passed(measured, expected, values={"highest": highest, "vocab_size": known})


def vocabulary(subject: Subject) -> Result:
    """Most of the vocabulary occurs in the training text: other rows of the embedding are never trained."""
    size, counts = subject.run.vocab_size, subject.counts["train"]
    used = int((counts > 0).sum())
    measured, expected = f"{used:,} of {size:,} ids occur in training", "half or more"
    values = {"used": used, "vocab_size": size}
    if used < 0.5 * size:
        diagnosis = f"{size - used:,} rows of the embedding are never trained, and cost memory and time"
        fix = 'a smaller vocabulary: data.tokenizer = "bpe" with a data.vocab_size that fits the text'
        if size > 1.5 * subject.run.data.vocab_size:
            fix = "model.vocab_size = 0, or the tokenizer's size rounded up"
        return warned(measured, expected, diagnosis, fix, values=values)
    return passed(measured, expected, values=values)


def repetition(subject: Subject) -> Result:
    """The training text does not say the same again and again."""
    hashes = window_hashes(subject.tokens["train"][: 1 << 22])
    # One window in 64, chosen by what it says, not by where it lies: copies are found wherever they begin.
    chosen = hashes[hashes >> np.uint64(58) == 0]
    if len(chosen) < 50:
        return skipped("the text is too short to tell")
    share = 1 - len(np.unique(chosen)) / len(chosen)
    measured, expected = f"{share:.1%} of windows of {WINDOW} tokens occur before", "at most 20%"
    values = {"share": share}
    if share > 0.2:
        diagnosis = "the training text repeats itself: an epoch is several, and the model learns by heart"
        return warned(measured, expected, diagnosis, "remove duplicates from data.source", values=values)
    return passed(measured, expected, values=values)


def tokenizer(subject: Subject) -> Result:
    """The ids, decoded, are the text of the source, and no byte of it is lost."""
    run = subject.run
    ours = from_json(run.data.tokenizer_json)
    own_kind = run.config.data.tokenizer in KINDS
    sizes = token_bytes(ours)
    for name, counts in subject.counts.items():
        found = int(sizes[: len(counts)] @ counts[: len(sizes)])
        header = read_header(Path(run.data.dir) / f"{name}.bin")
        if found != header.text_bytes:
            diagnosis = f"the tokens of {name}.bin stand for {found:,} bytes; the text it was made of had more or less"
            report = (f"{found:,} bytes in {name}.bin", f"{header.text_bytes:,} bytes", diagnosis)
            if own_kind:
                return failed(*report, "the tokenizer is not the one that made the files: " + PREPARE)
            return warned(*report, "data.tokenizer normalises or drops something; `bpe` and `byte` lose nothing")
    end = end_of_text(ours)
    for name, split in (("train", run.data.train), ("val", run.data.val)):
        counts = subject.counts[name]
        found = int(counts[end]) if end is not None and end < len(counts) else 0
        if found < 0.5 * split.documents:
            diagnosis = (
                f"{name}.bin has {found:,} ends of text, its text {split.documents:,} documents: they run together"
            )
            return failed(f"{found:,} ends of text", f"{split.documents:,}", diagnosis, PREPARE)
    ids = [int(i) for i in subject.tokens["train"][:SLICE]]
    text = decode(ours, ids).rstrip("\ufffd")
    again = len(encode(ours, text))
    plain = sum(1 for i in ids if sizes[i])
    if abs(again - plain) > 0.02 * plain + 8:
        diagnosis = "encoding the decoded text again gives other tokens: the files are not this tokenizer's"
        return failed(f"{again:,} tokens", f"{plain:,} tokens", diagnosis, PREPARE)
    source = beginning(subject, len(text))
    if source is None:
        return passed(f"{len(ids):,} tokens decode and encode again", "the same text (the source itself is not here)")
    if source != text and own_kind:
        at = next(
            (i for i, (a, b) in enumerate(zip(source, text, strict=False)) if a != b), min(len(source), len(text))
        )
        measured, expected = (f"...{part[max(0, at - 10) : at + 20]!r}" for part in (text, source))
        return failed(measured, expected, f"the tokens decode to another text, from character {at:,} on", PREPARE)
    return passed(f"{len(ids):,} tokens decode to the source's {len(text):,} characters", "the same text")


def beginning(subject: Subject, length: int) -> str | None:
    """The first characters of the source; None if it is not here any more."""
    config, parts, found = subject.run.config.data, [], 0
    try:
        for piece in pieces(config, inputs(config)):
            parts.append(piece.text)
            found += len(piece.text)
            if found >= length:
                break
    except (DataError, OSError):
        return None
    return "".join(parts)[:length]


def split_sizes(subject: Subject) -> Result:
    """Both splits hold enough windows to learn from and to measure by."""
    size = subject.run.config.model.block_size
    counts = {name: (len(tokens) - 1) // size for name, tokens in subject.tokens.items()}
    measured = f"{counts['train']:,} training, {counts['val']:,} validation windows"
    if counts["val"] > counts["train"]:
        diagnosis = "there is more text to measure by than to learn from"
        fix = "a smaller data.val_fraction"
        return warned(measured, "more training than validation", diagnosis, fix, values=counts)
    if counts["val"] < 20:
        diagnosis = "the validation loss will be noisy: too little text to measure by"
        fix = "more text, a larger data.val_fraction or a smaller model.block_size"
        return warned(measured, "20 or more", diagnosis, fix, values=counts)
    return passed(measured, "20 or more", values=counts)


def overlap(subject: Subject) -> Result:
    """The validation split is not in the training split, or its loss would only measure memory."""
    share = subject.comparison.overlap
    # Stories from a grammar have sentences in common; its exact entropy, which is known, accounts for that.
    usual = 0.01 if subject.run.data.entropy is None else 0.1
    where = "" if len(subject.tokens["train"]) <= COMPARED else f" of {COMPARED:,} tokens"
    measured, expected = f"{share:.1%} of validation windows{where} are in training", f"at most {usual:.0%}"
    values = {"share": share}
    if share > 0.2:
        diagnosis = "the validation text is in the training text: its loss would look good and mean nothing"
        fix = "remove duplicates from data.source, then prepare again"
        return failed(measured, expected, diagnosis, fix, values=values)
    if share > usual:
        diagnosis = "some validation text is also training text, or the text is made of templates"
        return warned(measured, expected, diagnosis, "remove duplicates from data.source", values=values)
    return passed(measured, expected, values=values)


def as_prepared(subject: Subject) -> Result:
    """The ids have the hash that they were written with, and counting pairs of them says what it said then."""
    for path in (Path(subject.run.data.dir) / f"{name}.bin" for name in ("train", "val")):
        if ids_hash(path) != read_header(path).ids_hash:  # of more than a gigabyte nobody else has read them all
            diagnosis = f"the ids of {path.name} are not those that were written: damaged or replaced"
            return failed("another SHA-256", "that of its header", diagnosis, PREPARE)
    if max(len(tokens) for tokens in subject.tokens.values()) > COMPARED:
        return skipped("the files are too large to count again")
    found, before = subject.comparison, subject.run.data
    measured, expected = f"bigrams cost {found.bigram:.4f} nats a token", f"{before.bigram_entropy:.4f}"
    if abs(found.bigram - before.bigram_entropy) > 1e-6 or abs(found.unigram - before.unigram_entropy) > 1e-6:
        diagnosis = "the ids of the token files have changed since they were prepared: damaged, shuffled or replaced"
        return failed(measured, expected, diagnosis, PREPARE)
    return passed(measured, expected)


def splits_alike(subject: Subject) -> Result:
    """The two splits are of one kind: text that is sorted by kind puts other kinds into validation."""
    counts = [np.zeros(max(map(len, subject.counts.values()))) for _ in "tv"]
    for total, own in zip(counts, (subject.counts["train"], subject.counts["val"]), strict=True):
        total[: len(own)] = own
    train, val = counts
    p = (train + 1) / (train.sum() + len(train))
    q = val / val.sum()
    seen = q > 0
    # Even a sample of p itself is off by (its tokens - 1) / (2 n) nats on average (Miller 1955).
    chance = (seen.sum() - 1) / (2 * val.sum())
    divergence = max(0.0, float((q[seen] * np.log(q[seen] / p[seen])).sum() - chance))
    measured = f"token frequencies {divergence:.2f} nats apart"
    values = {"nats": divergence}
    if divergence > 0.5:
        diagnosis = "validation is another kind of text than training: the source may be sorted"
        fix = "shuffle the documents of data.source before preparing"
        return warned(measured, "at most 0.5", diagnosis, fix, values=values)
    return passed(measured, "at most 0.5", values=values)


def batches(subject: Subject) -> Result:
    """Batches are windows of train.bin, in random order, each target the token after its input."""
    run = subject.run
    source = copy.copy(run.source)
    source.batch_size = rows = min(run.config.train.batch_size, 16)
    drawn = [source.batch(step) for step in range(-(-64 // rows))]
    expected = "windows of train.bin, shuffled, y[t] = x[t + 1]"
    used, tokens = run.source.splits["train"], subject.tokens["train"]
    if len(used) != len(tokens) or not np.array_equal(used[:1000], tokens[:1000]):
        diagnosis = "what is read of train.bin is not the ids behind its header, or not all of them"
        return failed("other ids than the file's", expected, diagnosis, "open it with `data.open_tokens`")
    if not all(np.array_equal(x[:, 1:], y[:, :-1]) for x, y in drawn):
        first = drawn[0]
        shift = "not shifted at all" if np.array_equal(*first) else "not the inputs one token on"
        diagnosis = "the model would learn to copy its input, or to skip a token"
        fix = "shift by one in `data.windows` and nowhere else"
        return failed(f"the targets are {shift}", expected, diagnosis, fix)
    both = np.concatenate([np.concatenate((x, y[:, -1:]), axis=1) for x, y in drawn])
    if both.shape[1] != run.config.model.block_size + 1:
        diagnosis = "the batch source gives windows of another length than model.block_size"
        fix = "cut them so"
        return failed(f"windows of {both.shape[1] - 1} tokens", f"{run.config.model.block_size}", diagnosis, fix)
    if not np.array_equal(source.batch(1)[0], drawn[1][0]):
        diagnosis = "the same step gave another batch the second time: no run could be resumed exactly"
        return failed("batch(1) differs from batch(1)", expected, diagnosis, "key the batch by (seed, step) alone")
    distinct, available = count_distinct(both), different_windows(subject)
    if distinct < 0.75 * len(both) and available > 4 * len(both):
        diagnosis = "batches share their windows: the run would go through the text far slower than it seems"
        return failed(f"{distinct} different windows of {len(both)}", expected, diagnosis, "other windows at each step")
    return repeated(subject, source, available, expected) or placed(subject, both, expected)


def repeated(subject: Subject, source: BatchSource, available: int, expected: str) -> Result | None:
    """A failure if an epoch does not go through the text, or the next one goes through it in the same order."""
    size = subject.run.config.model.block_size
    source.batch_size = count = min((len(subject.tokens["train"]) - 1) // size, drawn_at_most(size))
    distinct = count_distinct(source.batch(0)[0])
    if distinct < 0.5 * available:
        diagnosis = "the same few windows come again and again: the rest of the text is never read"
        measured = f"{distinct:,} different windows of {count:,}"
        return failed(measured, expected, diagnosis, "draw from the whole split, others at each step")
    source.batch_size = 1
    first = [source.batch(step)[0] for step in range(6)]
    whole = (len(subject.tokens["train"]) - 1) // size
    late = np.concatenate([source.batch(int(step))[0] for step in np.linspace(0, whole - 1, min(whole, 100))])
    if available > 400 and (distinct := count_distinct(late)) < 0.6 * len(late):
        diagnosis = "later steps read again what earlier ones read, within an epoch: the rest waits in vain"
        measured = f"{distinct} different windows of {len(late)} over an epoch"
        return failed(measured, expected, diagnosis, "each window once an epoch")
    epochs = {whole - 1, whole, whole + 1, len(source.starts) if source.starts is not None else whole}
    for epoch in epochs if available > 50 else ():
        if all(np.array_equal(x, source.batch(s + epoch)[0]) for s, x in enumerate(first)):
            diagnosis = "each epoch reads the same windows in the same order: neighbours are always the same"
            return failed(f"sequence {epoch:,} on is sequence 0 on", expected, diagnosis, "shuffle each epoch anew")
    return None


def drawn_at_most(size: int) -> int:
    """How many windows of this size may be held in memory at once here."""
    return max(1, min(4096, (1 << 22) // size))


def different_windows(subject: Subject) -> int:
    """How many different windows the training file has end to end, of the first few: a small one may repeat itself."""
    size, tokens = subject.run.config.model.block_size, subject.tokens["train"]
    count = min((len(tokens) - 1) // size, drawn_at_most(size))
    return count_distinct(tokens[: count * size].reshape(count, size))


def count_distinct(rows: np.ndarray) -> int:
    return len({row.tobytes() for row in np.ascontiguousarray(rows)})


def placed(subject: Subject, rows: np.ndarray, expected: str) -> Result:
    """The verdict on where in the training file the rows (n, T + 1) lie."""
    train = Path(subject.run.data.dir) / "train.bin"
    few = rows if train.stat().st_size < SEARCHED else rows[:6]
    places = [list(islice(places_of(row, train), 2)) for row in few]  # the second tells whether it is the only one
    if [] in places:
        row = few[places.index([])]
        if next(places_of(row, train.with_name("val.bin")), None) is not None:
            diagnosis = "training reads the validation split: its loss would mean nothing"
            return failed("a window of val.bin", expected, diagnosis, "read train.bin for training")
        diagnosis = "the ids of a batch are nowhere in train.bin in this order"
        fix = "take whole windows, in the file's order"
        return failed("a window that is not in train.bin", expected, diagnosis, fix)
    found = np.array([last for last, *_ in places])
    steps = np.diff(found)
    tokens = len(subject.tokens["train"])
    if len(found) > 8 and (np.mean(steps > 0) > 0.9 or np.mean(steps < 0) > 0.9):
        diagnosis = "windows come in the order of the file: each step sees one kind of text only"
        return failed("windows in the file's order", expected, diagnosis, "shuffle them")
    # Of a sentence that occurs again nobody knows where it was read.
    once = np.array([last for last, *others in places if not others])
    reach = float(np.ptp(once)) / tokens if len(once) > 20 else 1.0
    if reach < 0.5 and tokens > 100 * rows.shape[1]:
        diagnosis = f"64 windows drawn at random all lie within {reach:.0%} of the file: the rest is never read"
        return failed(f"windows from {reach:.0%} of the file", expected, diagnosis, "draw from the whole split")
    return passed(f"{len(found)} windows found in train.bin, in random order", "y[t] = x[t + 1]")


def places_of(row: np.ndarray, path: Path, *, backwards: bool = True) -> Iterator[int]:
    """Where a token file has this row, in tokens: from the last place to the first, which is quicker, or onwards."""
    header = read_header(path)
    wanted = row.astype(f"<u{header.itemsize}").tobytes()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        first = content.size() - header.count * header.itemsize
        at = content.rfind(wanted, first) if backwards else content.find(wanted, first)
        while at >= 0:
            if (at - first) % header.itemsize == 0:  # not between two ids
                yield (at - first) // header.itemsize
            at = content.rfind(wanted, first, at + len(wanted) - 1) if backwards else content.find(wanted, at + 1)
