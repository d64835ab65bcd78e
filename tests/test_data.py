"""Token files by hand, and batches and evaluation windows against naive Python."""

import hashlib
import itertools
import struct
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyllm.data import (
    HEADER_SIZE,
    IGNORED,
    BatchSource,
    TokenWriter,
    document_windows,
    ids_hash,
    open_tokens,
    permuted,
    prefetch,
    read_header,
)
from tinyllm.errors import DataError

HASH = bytes(range(32)).hex()
END = 0


def write(path, ids, vocab_size=100, text_bytes=0):
    with TokenWriter(path, vocab_size=vocab_size, tokenizer_hash=HASH) as out:
        out.write(ids, text_bytes)
    return path


# ---- Token files ----


@pytest.mark.parametrize(("vocab_size", "itemsize", "code"), [(65_536, 2, "H"), (65_537, 4, "I")])
def test_the_bytes_of_a_token_file(tmp_path, vocab_size, itemsize, code):
    ids = [1, 0, vocab_size - 1, 513]
    with TokenWriter(tmp_path / "a.bin", vocab_size=vocab_size, tokenizer_hash=HASH) as out:
        out.write(ids[:3], text_bytes=5)
        out.write(np.array(ids[3:]), text_bytes=4)
        out.write([], text_bytes=0)
    packed = struct.pack(f"<4{code}", *ids)
    expected = b"tinyllm\n" + struct.pack("<I", 2) + struct.pack("<I", itemsize) + struct.pack("<Q", 4)
    expected += struct.pack("<Q", 9) + struct.pack("<I", vocab_size) + bytes(range(32))
    expected += hashlib.sha256(hashlib.sha256(packed).digest()).digest()
    expected += bytes(128 - len(expected)) + packed
    assert (tmp_path / "a.bin").read_bytes() == expected
    tokens, header = open_tokens(tmp_path / "a.bin")
    assert tokens.tolist() == ids
    assert header == out.header == read_header(tmp_path / "a.bin")
    assert (header.count, header.text_bytes, header.vocab_size, header.tokenizer_hash) == (4, 9, vocab_size, HASH)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 7


def test_an_empty_token_file(tmp_path):
    tokens, header = open_tokens(write(tmp_path / "a.bin", []))
    assert (len(tokens), tokens.dtype, header.count) == (0, np.uint16, 0)
    assert ids_hash(tmp_path / "a.bin") == header.ids_hash


@pytest.mark.parametrize("count", [1, 1 << 19, (1 << 19) + 1, 3 * (1 << 19) + 77])
def test_the_hash_of_the_ids_is_that_of_its_pieces(tmp_path, count):
    """However they come: of each MiB, and what is left, the SHA-256; and of these."""
    rng = np.random.default_rng(count)
    ids = rng.integers(100, size=count)
    with TokenWriter(tmp_path / "a.bin", vocab_size=100, tokenizer_hash=HASH) as out:
        for part in np.split(ids, np.sort(rng.integers(count, size=5))):
            out.write(part, 0)
    raw = ids.astype("<u2").tobytes()
    pieces = [hashlib.sha256(raw[first : first + (1 << 20)]).digest() for first in range(0, len(raw), 1 << 20)]
    assert read_header(tmp_path / "a.bin").ids_hash == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert ids_hash(tmp_path / "a.bin") == out.header.ids_hash


def test_each_changed_id_is_noticed(tmp_path):
    path = write(tmp_path / "a.bin", [1, 2, 3, 4, 5])
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            same = ids_hash(path) == read_header(path).ids_hash
        except DataError:
            assert bit < 8 * HEADER_SIZE
        else:  # the other fields of the header are compared with meta.json, by `prepare.reopen`
            assert not same or 24 * 8 <= bit < 68 * 8, bit


@pytest.mark.parametrize(("ids", "shown"), [([3, 100], "3 to 100"), ([-1, 5], "-1 to 5"), ([1 << 40], str(1 << 40))])
def test_ids_out_of_range_are_refused(tmp_path, ids, shown):
    with pytest.raises(DataError, match=f"token ids {shown}.* do not fit the vocabulary of 100"):
        write(tmp_path / "a.bin", ids)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_the_old_file(tmp_path, error):
    before = write(tmp_path / "a.bin", [1, 2, 3]).read_bytes()

    def interrupted():
        with TokenWriter(tmp_path / "a.bin", vocab_size=9, tokenizer_hash=HASH) as out:
            out.write([4] * 100_000, 0)
            assert (tmp_path / "a.bin").read_bytes() == before, "the old one stays until the new one is whole"
            raise error

    with pytest.raises(error):
        interrupted()
    assert (tmp_path / "a.bin").read_bytes() == before
    left = {"a.bin"} if error is RuntimeError else {"a.bin", "a.bin.tmp"}  # which another writer can go on with
    assert {path.name for path in tmp_path.iterdir()} == left


def test_an_interruption_at_the_very_end_leaves_what_was_written(tmp_path, monkeypatch):
    """While the disk is waited for: another writer goes on, and the file is the same."""
    whole = write(tmp_path / "whole.bin", [1, 2, 3]).read_bytes()
    writer = TokenWriter(tmp_path / "a.bin", vocab_size=100, tokenizer_hash=HASH).__enter__()
    writer.write([1, 2, 3], 0)
    writer.sync()
    done = (writer.count, writer.text_bytes, writer.header.ids_hash)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writer.__exit__(None, None, None)
    with TokenWriter(tmp_path / "a.bin", vocab_size=100, tokenizer_hash=HASH, done=done):
        pass
    assert (tmp_path / "a.bin").read_bytes() == whole


def changed(at, new):
    return lambda data: data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "the header says 5 tokens, the file holds 4.5"),
        (lambda data: data + b"\0\0", "the header says 5 tokens, the file holds 6.0"),
        (lambda data: data[:HEADER_SIZE], "the header says 5 tokens, the file holds 0.0"),
        (lambda data: data[: HEADER_SIZE - 1], "not a token file of tinyllm"),
        (lambda data: b"", "not a token file of tinyllm"),
        (lambda data: np.arange(500, dtype=np.uint16).tobytes(), "not a token file of tinyllm"),  # nanoGPT's
        (changed(0, b"T"), "not a token file of tinyllm"),
        (changed(8, b"\1"), "token file of version 1; this tinyllm reads version 2"),
        (changed(12, b"\3"), "damaged: its header is not one that we write"),
        (changed(127, b"\1"), "damaged: its header is not one that we write"),
        (changed(12, b"\4"), "the header says 5 tokens, the file holds 2.5"),
        (changed(16, b"\6"), "the header says 6 tokens, the file holds 5.0"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, damage, message):
    path = write(tmp_path / "a.bin", [1, 2, 3, 4, 5])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as error:
        open_tokens(path)
    assert error.value.what == message
    assert error.value.where == str(path)
    assert "--force" in error.value.fix


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match="no such token file"):
        open_tokens(tmp_path / "a.bin")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        open_tokens(tmp_path)


# ---- The shuffle ----


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_permuted_is_a_permutation(n, seed, epoch):
    key = np.array([seed, epoch], np.uint64)
    whole = permuted(np.arange(n), n, key)
    assert np.array_equal(np.sort(whole), np.arange(n))
    some = np.arange(0, n, 3)[::-1]
    assert np.array_equal(permuted(some, n, key), whole[some]), "an index alone goes where it goes among others"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 100_003])
def test_permuted_at_the_edges(n):
    key = np.array([7, 0], np.uint64)
    assert np.array_equal(np.sort(permuted(np.arange(n), n, key)), np.arange(n))


def test_different_keys_shuffle_differently_and_evenly():
    n, index = 1000, np.arange(1000)
    keys = [(seed, epoch) for seed in range(20) for epoch in range(20)]
    rows = np.array([permuted(index, n, np.array(key, np.uint64)) for key in keys])
    same = (rows[:, None] == rows).mean(axis=2)[~np.eye(len(keys), dtype=bool)]
    assert same.max() < 0.02, "two random permutations of 1000 agree in about one place"
    assert abs(same.mean() - 1 / n) < 1e-4
    # The mean of 400 places is 499.5, give or take 14 (a 400th of the variance n^2/12): nowhere is it 6 times as far.
    assert np.abs(rows.mean(axis=0) - (n - 1) / 2).max() < 6 * n / np.sqrt(12 * len(keys))
    neighbours = np.abs(np.diff(rows, axis=1)) == 1  # 2 of n pairs
    assert neighbours.mean() < 4 / n


def test_a_place_among_very_many_costs_no_memory():
    n = 10**15
    places = permuted(np.arange(1000), n, np.array([1, 2], np.uint64))
    assert len(np.unique(places)) == 1000
    assert 0 <= places.min() < n * 0.05
    assert n * 0.95 < places.max() < n


# ---- Batches ----

LENGTH, SIZE = 1003, 16


def source(train=None, val=None, **changes):
    train = np.arange(LENGTH, dtype=np.uint16) if train is None else train
    settings = {"block_size": SIZE, "batch_size": 7, "seed": 5} | changes
    return BatchSource(train=train, val=train if val is None else val, **settings)


def test_a_batch_is_a_function_of_seed_and_step():
    one, two = source(), source()
    steps = [*range(40)]
    forward = {step: one.batch(step) for step in steps}
    for step in [*reversed(steps), 3, 3, 17]:
        for a, b in zip(forward[step], two.batch(step), strict=True):
            assert np.array_equal(a, b)
    assert not np.array_equal(source(seed=6).batch(0)[0], forward[0][0])
    assert len({forward[step][0].tobytes() for step in steps}) == 40


def test_targets_are_the_inputs_one_token_on():
    for inputs, targets in map(source().batch, range(60)):  # the tokens count up, so that each tells its place
        assert inputs.shape == targets.shape == (7, SIZE)
        assert inputs.dtype == targets.dtype == np.int64
        assert np.array_equal(inputs, inputs[:, :1] + np.arange(SIZE))
        assert np.array_equal(targets, inputs + 1)


@pytest.mark.parametrize("batch_size", [1, 7, 61, 200])
def test_an_epoch_reads_every_window_once(batch_size):
    n_windows = (LENGTH - 1) // SIZE - 1
    each = source(batch_size=batch_size)
    starts = np.concatenate([each.batch(step)[0][:, 0] for step in range(-(-4 * n_windows // batch_size))])
    offsets = set()
    for epoch in starts[: 4 * n_windows].reshape(4, n_windows):
        offset = epoch.min()
        assert np.array_equal(np.sort(epoch), offset + SIZE * np.arange(n_windows))
        assert not np.array_equal(np.sort(epoch), epoch)
        offsets.add(offset)
    assert len(offsets) > 1, "each epoch cuts the text elsewhere"


def test_the_batch_size_does_not_change_the_order():
    """So that a run with other micro-batches, or another machine's, reads the same text."""
    large, small = source(batch_size=12), source(batch_size=3)
    for step in range(30):
        parts = [small.batch(4 * step + part)[0] for part in range(4)]
        assert np.array_equal(large.batch(step)[0], np.concatenate(parts))


def test_every_offset_occurs_and_the_last_token_is_reached():
    n_windows = (LENGTH - 1) // SIZE - 1
    each, ends, starts = source(batch_size=n_windows), set(), set()
    for epoch in range(300):
        inputs, targets = each.batch(epoch)
        starts.add(int(inputs.min()))
        ends.add(int(targets.max()))
    room = LENGTH - n_windows * SIZE
    assert starts == set(range(room))
    assert max(ends) == LENGTH - 1


@pytest.mark.parametrize("length", [SIZE + 1, SIZE + 2, 2 * SIZE, 2 * SIZE + 1, 3 * SIZE])
def test_the_shortest_splits(length):
    each = source(np.arange(length, dtype=np.uint16))
    for step in range(50):
        inputs, targets = each.batch(step)
        assert np.array_equal(targets, inputs[:, :1] + np.arange(1, SIZE + 1))
        assert targets.max() < length


def test_a_split_that_is_too_short_is_named():
    long, short = np.arange(50), np.arange(SIZE)
    with pytest.raises(DataError, match=r"the train split has 16 tokens; one window needs block_size \+ 1 = 17"):
        source(short, long)
    with pytest.raises(DataError, match="the val split has 16 tokens") as error:
        source(long, short, where="data")
    assert error.value.where == "data"
    assert "model.block_size below 16" in error.value.fix
    source(np.arange(SIZE + 1), np.arange(SIZE + 1))
    source(short, short, block_size=15)


# ---- Documents ----


def naive_document_windows(tokens, end, size):
    """A document is what follows an end, up to and with the next; cut every `size` targets."""
    windows, start = [], 0
    for place in range(1, len(tokens)):
        if place - start == size or tokens[place] == end or place == len(tokens) - 1:
            windows.append((start, place - start))
            start = place
    return windows


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=80), st.integers(1, 9))
def test_document_windows_against_naive_python(tokens, size):
    starts, lengths = document_windows(np.array(tokens, np.uint16), END, size)
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == naive_document_windows(tokens, END, size)


def test_document_windows_by_hand():
    #         0  1  2  3  4  5  6  7  8  9 10 11   a first document, an empty one, a long one, the rest
    tokens = [5, 6, 0, 0, 7, 7, 7, 7, 7, 0, 8, 8]
    starts, lengths = document_windows(np.array(tokens), END, 4)
    assert starts.tolist() == [0, 2, 3, 7, 9]
    assert lengths.tolist() == [2, 1, 4, 2, 2]


def stories(rng, count, longest):
    """Tokens of documents of 0 to `longest` tokens, each with its end."""
    return np.concatenate([[*rng.integers(1, 9, rng.integers(0, longest + 1)), END] for _ in range(count)]).astype(int)


def test_aligned_batches_begin_where_documents_do():
    tokens = stories(np.random.default_rng(0), 60, 40)
    tokens = np.append(tokens, [*range(1, SIZE), END])  # the last window ends with the split
    each = source(tokens, end_token=END, batch_size=5)
    allowed = [start for start, _ in naive_document_windows(tokens, END, SIZE) if start + SIZE < len(tokens)]
    steps = -(-3 * len(allowed) // 5)
    batches = [each.batch(step) for step in range(steps)]
    rows = [(*inputs, targets[-1]) for pair in batches for inputs, targets in zip(*pair, strict=True)]
    for first in range(0, 3 * len(allowed), len(allowed)):  # three epochs, each window once in each
        expected = sorted(tuple(tokens[start : start + SIZE + 1].tolist()) for start in allowed)
        assert sorted(tuple(map(int, row)) for row in rows[first : first + len(allowed)]) == expected
    assert rows[: len(allowed)] != rows[len(allowed) : 2 * len(allowed)]


def test_alignment_without_documents_is_refused():
    with pytest.raises(DataError, match=r"align_documents is set, but no document's end is marked") as error:
        source(np.arange(1, 50), end_token=END)
    assert "train.align_documents = false" in error.value.fix


# ---- Evaluation ----


def predicted(tokens, batches):
    """How often each place of `tokens` (which count up) is predicted, each from the token before it."""
    times = np.zeros(len(tokens), int)
    for inputs, targets in batches:
        assert inputs.shape == targets.shape
        counted = targets != IGNORED
        np.add.at(times, targets[counted], 1)
        assert np.array_equal(inputs[counted] + 1, targets[counted])
    return times


@pytest.mark.parametrize("length", [SIZE + 1, 2 * SIZE, 2 * SIZE + 1, 500, 1003])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_the_whole_split_predicts_every_token_once(length, rows):
    tokens = np.arange(length)
    each = source(np.arange(LENGTH), tokens)
    batches = list(each.eval_batches("val", 0, rows))
    assert max(len(inputs) for inputs, _ in batches) <= rows
    assert predicted(tokens, batches).tolist() == [0] + [1] * (length - 1)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 9), st.integers(0, 3))
def test_aligned_evaluation_against_a_naive_double_loop(seed, size, rows, cut):
    tokens = stories(np.random.default_rng(seed), 30, 20)
    tokens = tokens[: len(tokens) - cut]  # with and without an end at the end
    each = source(tokens, tokens, block_size=size, end_token=END)
    expected = []
    for start, length in naive_document_windows(tokens, END, size):
        for place in range(start, start + length):
            expected.append((tokens[start : place + 1].tolist(), int(tokens[place + 1])))
    found = []
    for inputs, targets in each.eval_batches("val", 0, rows):
        for row, wanted in zip(inputs, targets, strict=True):
            for place in range(size):
                if wanted[place] != IGNORED:
                    found.append((row[: place + 1].tolist(), int(wanted[place])))
    assert found == expected
    assert len(found) == len(tokens) - 1


@pytest.mark.parametrize("end_token", [None, END])
def test_evaluation_windows_are_fixed_and_evenly_spread(end_token):
    tokens = np.arange(LENGTH)  # only place 0 is an END: with it, one document of all the rest
    each = source(tokens, tokens, end_token=end_token)
    first, again = ([(i.copy(), t.copy()) for i, t in each.eval_batches("val", 10, 4)] for _ in range(2))
    each.batch(3)
    third = list(each.eval_batches("val", 10, 4))
    for a, b, c in zip(first, again, third, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)
    assert [len(inputs) for inputs, _ in first] == [4, 4, 2]
    starts = np.concatenate([inputs[:, 0] for inputs, _ in first])
    n_windows = -(-(LENGTH - 1) // SIZE)  # 63: some 6.3 windows apart
    assert starts.tolist() == [SIZE * (i * n_windows // 10) for i in range(10)]
    other = np.concatenate([inputs for inputs, _ in each.eval_batches("val", 10, 3)])
    assert np.array_equal(other, np.concatenate([inputs for inputs, _ in first])), "whatever the rows a batch"


def test_more_windows_than_there_are_and_the_training_split():
    each = source(np.arange(LENGTH), np.arange(100))
    assert predicted(np.arange(100), each.eval_batches("val", 10**6, 5)).tolist() == [0] + [1] * 99
    # 0: the training split is read at as many places as the validation split has.
    train = list(each.eval_batches("train", 0, 1))
    assert len(train) == len(list(each.eval_batches("val", 0, 1))) == 7
    assert [int(inputs[0, 0]) for inputs, _ in train] == [SIZE * (i * 63 // 7) for i in range(7)]
    assert len(list(source(np.arange(100), np.arange(LENGTH)).eval_batches("train", 0, 1))) == 7


# ---- Prefetching ----


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("tinyllm-batches")]


@pytest.mark.parametrize("ahead", [0, 1, 2, 5, 100])
def test_prefetching_changes_no_value(ahead):
    assert list(prefetch(lambda index: index * index, 3, 20, ahead)) == [index * index for index in range(3, 20)]
    assert list(prefetch(lambda index: index, 5, 5, ahead)) == []
    assert not workers()


@pytest.mark.parametrize("ahead", [1, 3])
def test_it_works_ahead_but_no_further(ahead):
    made = []
    values = prefetch(lambda index: made.append(index) or index, 0, 50, ahead)
    assert next(values) == 0
    until = time.monotonic() + 5
    while len(made) < ahead + 1 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [*range(ahead + 1)]
    values.close()
    assert not workers()


@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_an_error_of_the_worker_arrives_in_its_place(ahead):
    def make(index):
        if index == 5:
            raise DataError("the disk is gone")
        return index

    values, seen = prefetch(make, 0, 10, ahead), []
    with pytest.raises(DataError, match="the disk is gone"):
        seen.extend(values)
    assert seen == [0, 1, 2, 3, 4]
    assert not workers()


@pytest.mark.parametrize("leave", ["close", "throw", "forget"])
def test_leaving_early_leaves_no_thread(leave):
    made, may_end = [], threading.Event()

    def make(index):
        made.append(index)
        if index:
            may_end.wait(10)
        return index

    values = prefetch(make, 0, 10_000, 8)
    assert next(values) == 0
    start = time.monotonic()
    threading.Timer(0.3, may_end.set).start()  # the batch that is being made is waited for
    if leave == "close":
        values.close()
    elif leave == "throw":
        with pytest.raises(KeyboardInterrupt):
            values.throw(KeyboardInterrupt)
    else:
        del values
    assert time.monotonic() - start < 5
    assert not workers()
    assert made[0] == 0
    assert len(made) < 9, "the others that were asked for ahead are not made any more"


def test_one_waits_for_a_batch_only_until_asked_to_stop():
    """A file may be on a disk that hangs."""
    hangs, asked = threading.Event(), itertools.count()

    def make(index):
        if index == 3:
            hangs.wait(30)
        return index

    started = time.monotonic()
    assert list(prefetch(make, 0, 10, 2, lambda: next(asked) >= 2)) == [0, 1, 2]
    assert time.monotonic() - started < 10
    hangs.set()
