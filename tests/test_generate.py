"""Sampling against full forward passes, softmax's own probabilities, and the tokenizer's decode."""

import itertools
import math

import numpy as np
import pytest
import torch

from tinyllm import tokenizer as tok
from tinyllm.config import check, to_dict
from tinyllm.engine import new_state, open_run, snapshot
from tinyllm.generate import Sampling, Speaker, choose, generate
from tinyllm.model import GPT
from tinyllm.prepare import prepare

V, CONTEXT = 13, 10


def make_model(recipe="gpt2", vocab_size=V, seed=1, scale=0.5, **switches) -> GPT:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": CONTEXT, "dropout": 0.3, "tie_embeddings": False}
    model = GPT(check({"model": {"recipe": recipe} | sizes | switches}).model, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    return model


def columns(steps):
    """The ids of each sample, None where it has ended."""
    return [list(column) for column in zip(*steps, strict=True)]


def sample(model, prompt, n_samples=1, end_token=None, n_tokens=None, **settings):
    steps = generate(model, prompt, Sampling(**settings), n_samples=n_samples, end_token=end_token, n_tokens=n_tokens)
    return columns(steps)


@torch.no_grad()
def windowed(model, prompt, n_new, pick):
    """The same by full forward passes only: the window grows to the context, then starts again from its newer half."""
    model.eval()
    ids, length = list(prompt)[-CONTEXT:], len(prompt[-CONTEXT:])
    for step in range(n_new):
        if step and length == CONTEXT:
            length = CONTEXT // 2
        elif step:
            length += 1
        ids.append(pick(model(torch.tensor([ids[-length:]]))[0, -1]))
    return ids[-n_new:]


@pytest.mark.parametrize(("recipe", "ngrams"), [("gpt2", 1), ("modern", 1), ("modern", 4)])
@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4], list(range(10)), [7, 7, 7, *range(12), 5]])
def test_greedy_is_the_argmax_of_full_forwards_also_past_the_context(recipe, ngrams, prompt):
    model = make_model(recipe, ngrams=ngrams, ngram_rows=100).train()
    expected = windowed(model, prompt, 3 * CONTEXT, lambda logits: logits.argmax().item())
    model.train()
    assert sample(model, prompt, n_samples=2, temperature=0.0, max_new_tokens=3 * CONTEXT) == [expected] * 2
    assert len(set(expected)) > 2  # not one letter again and again, which any mistake would give too


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_sampling_draws_from_the_softmax_of_full_forwards(recipe):
    """Inversion by hand: Philox, counter of the sample's index, cumulative probabilities in the order of ids."""
    model, prompt = make_model(recipe), [1, 2, 3]
    got = sample(model, prompt, n_samples=3, temperature=0.7, max_new_tokens=2 * CONTEXT, seed=5)
    for i in range(3):
        uniforms = np.random.Generator(np.random.Philox(key=5, counter=[0, 0, i, 0]))

        def pick(logits, uniforms=uniforms):
            p = (logits.double() / 0.7).softmax(0).numpy()
            return int(np.searchsorted(np.cumsum(p), uniforms.random(), side="right"))

        assert got[i] == windowed(model, prompt, 2 * CONTEXT, pick)


def test_a_sample_follows_from_its_seed_and_index_alone():
    model, settings = make_model(), {"temperature": 1.0, "max_new_tokens": 25}
    five = sample(model, [1, 2], n_samples=5, seed=3, **settings)
    torch.manual_seed(99)
    for n in (1, 2, 4):
        assert sample(model, [1, 2], n_samples=n, seed=3, **settings) == five[:n]
    shorter = sample(model, [1, 2], n_samples=5, seed=3, temperature=1.0, max_new_tokens=9)
    assert shorter == [ids[:9] for ids in five]
    assert len({tuple(ids) for ids in five}) == 5
    assert sample(model, [1, 2], n_samples=5, seed=4, **settings) != five


def test_no_global_random_state_is_drawn_from():
    model, before = make_model(), torch.get_rng_state()
    sample(model, [1], n_samples=2, max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("end_token", range(V))
def test_a_sample_ends_with_the_end_token(end_token):
    settings = {"n_samples": 4, "temperature": 1.0, "max_new_tokens": 40, "seed": 1}
    free = sample(make_model(), [1], **settings)
    cut = sample(make_model(), [1], end_token=end_token, **settings)
    steps = len(cut[0])
    for whole, part in zip(free, cut, strict=True):
        kept = list(itertools.takewhile(lambda id: id != end_token, whole))
        assert part == (kept + [None] * 40)[:steps]
    # It stops as soon as the last of them has ended.
    longest = max(ids.index(end_token) + 1 if end_token in ids else 40 for ids in free)
    assert steps == longest


def test_a_context_of_one_token():
    c = check({"model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 1}}).model
    model = GPT(c, V)
    ids = sample(model, [4, 2], temperature=0.0, max_new_tokens=5)[0]
    for before, after in itertools.pairwise([2, *ids]):
        assert model(torch.tensor([[before]]))[0, -1].argmax().item() == after


def test_rows_of_the_embedding_beyond_the_tokenizer_are_never_chosen():
    model = make_model()
    with torch.no_grad():
        model.norm.bias.zero_()
        model.norm.bias[0] = 50.0  # every position then likes the tokens whose first number is large
        model.head.weight[:, 0] = -1.0
        model.head.weight[10:, 0] = 1.0
    free = sample(model, [1], n_samples=4, temperature=1.0, max_new_tokens=20)
    assert min(min(ids) for ids in free) >= 10
    for temperature in (0.0, 1.0):
        bounded = sample(model, [1], n_samples=4, temperature=temperature, max_new_tokens=20, n_tokens=10)
        assert max(max(ids) for ids in bounded) < 10


# ---- Choosing ----

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.1, 2.0, -3.0, 0.0])


def chosen(logits, n=40_000, **settings):
    """How often each id is chosen under evenly spread draws, which leave no room for chance."""
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids = choose(logits.expand(n, -1), Sampling(**settings), draws)
    return torch.bincount(ids, minlength=len(logits)).double() / n


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_choices_have_softmaxs_probabilities(temperature):
    expected = (LOGITS.double() / temperature).softmax(0)
    torch.testing.assert_close(chosen(LOGITS, temperature=temperature), expected, rtol=0, atol=1e-4)
    # And with real draws, by the chi-square statistic: six degrees of freedom, 22.46 at p = 0.001.
    n = 20_000
    draws = torch.from_numpy(np.random.default_rng(0).random(n))
    ids = choose(LOGITS.expand(n, -1), Sampling(temperature=temperature), draws)
    seen = torch.bincount(ids, minlength=7).double()
    assert ((seen - n * expected) ** 2 / (n * expected)).sum() < 22.46


@pytest.mark.parametrize(
    ("top_k", "kept"),
    [(1, [1]), (2, [1, 4]), (3, [1, 4, 3]), (5, [1, 4, 3, 0, 6]), (7, range(7)), (100, range(7)), (0, range(7))],
)
def test_top_k_keeps_the_likeliest_in_their_proportions(top_k, kept):
    expected = torch.zeros(7, dtype=torch.float64)
    expected[list(kept)] = LOGITS[list(kept)].double().softmax(0)
    torch.testing.assert_close(chosen(LOGITS, temperature=1.0, top_k=top_k), expected, rtol=0, atol=1e-4)


def smallest_set(probabilities, top_p):
    """The fewest of the likeliest tokens that together have top_p."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += probabilities[i]
        if mass >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.3, 0.37, 0.5, 0.72, 0.76, 0.9, 0.99, 1.0])
def test_top_p_keeps_the_smallest_set_that_has_the_mass(top_p):
    p = LOGITS.double().softmax(0)
    kept = smallest_set(p.tolist(), top_p)
    assert top_p != 0.5 or kept == [1, 4]
    expected = torch.zeros(7, dtype=torch.float64)
    expected[kept] = p[kept] / p[kept].sum()
    torch.testing.assert_close(chosen(LOGITS, temperature=1.0, top_p=top_p), expected, rtol=0, atol=1e-4)


def test_top_p_is_of_what_temperature_and_top_k_leave():
    p = (LOGITS.double() / 2.0).softmax(0)
    three = p[[1, 4, 3]] / p[[1, 4, 3]].sum()  # 0.38, 0.38, 0.24
    expected = torch.zeros(7, dtype=torch.float64)
    expected[[1, 4, 3]] = three
    # At temperature 1 the first two would have 0.83 of the three.
    got = chosen(LOGITS, temperature=2.0, top_k=3, top_p=0.8)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    # Of all seven, the three have 0.71 only; of the three, two have 0.76.
    assert chosen(LOGITS, temperature=2.0, top_k=3, top_p=0.75).count_nonzero() == 2


@pytest.mark.parametrize("settings", [{}, {"top_p": 1.0}, {"top_p": 0.9999}, {"top_k": 2}, {"top_p": 1e-9}])
def test_the_ends_of_the_unit_interval(settings):
    """The largest draw picks the last token kept, and one that has no probability is never picked."""
    logits = torch.tensor([[5.0, -math.inf, 4.0, -2000.0]])
    ids = [choose(logits, Sampling(temperature=1.0, **settings), torch.tensor([u])) for u in (0.0, 1 - 2**-53)]
    assert ids[0].item() == 0
    assert ids[1].item() == (0 if settings.get("top_p") == 1e-9 else 2)


def test_the_smallest_temperature_is_greedy():
    """Divided by it the logits would overflow."""
    logits = torch.tensor([[-1e5, 2.0, 1.0], [3e5, 2.0, 1.0]])
    draws = torch.tensor([0.99, 0.99], dtype=torch.float64)
    assert choose(logits, Sampling(temperature=5e-324), draws).tolist() == [1, 0]


def test_equal_logits_are_equally_likely_and_rows_are_their_own():
    even = torch.zeros(8)
    torch.testing.assert_close(chosen(even, temperature=1.0), torch.full((8,), 0.125).double(), rtol=0, atol=1e-4)
    assert chosen(even, temperature=1.0, top_k=3).count_nonzero() == 3
    assert chosen(even, temperature=1.0, top_p=0.5).count_nonzero() == 4
    rows = torch.eye(3) * 100
    assert choose(rows, Sampling(temperature=1.0), torch.tensor([0.1, 0.5, 0.9])).tolist() == [0, 1, 2]
    assert choose(rows, Sampling(temperature=0.0), torch.tensor([0.1, 0.5, 0.9])).tolist() == [0, 1, 2]


# ---- Speaking ----


@pytest.fixture
def speaker(make_config, tmp_path):
    """A function to a Speaker of an untrained byte model, which says anything; its embedding has `rows` rows."""

    def make(rows=0):
        (tmp_path / "a.txt").write_text("A café, naïve: 日本語 🙂\n" * 40)
        overrides = [f"data.source={tmp_path / 'a.txt'}", f"data.dir={tmp_path / 'data'}", "data.tokenizer=byte"]
        config = make_config(*overrides, f"model.vocab_size={rows}")
        list(prepare(config.data))
        run = open_run(config)
        return Speaker(snapshot(run, new_state(run)), "cpu")

    return make


def test_the_pieces_joined_are_the_decoded_ids(speaker):
    speaker = speaker()
    settings = Sampling(temperature=1.0, max_new_tokens=400, seed=2)
    ids = speaker.encode("日本")
    assert ids == list("日本".encode())
    steps = list(speaker.speak(ids, settings, n_samples=3))
    spoken = ["".join(column) for column in columns(steps)]
    written = columns(generate(speaker.model, ids, settings, n_samples=3))
    for pieces, text, tokens in zip(columns(steps), spoken, written, strict=True):
        whole = tok.decode(speaker.tokenizer, tokens)
        assert whole.startswith(text)
        assert len(whole) - len(text) <= 1  # what is missing is a character that was never finished
        assert any(ord(c) > 127 and c != "\ufffd" for c in text)  # there were characters of several bytes
        assert "" in pieces


def test_a_character_is_spoken_once_it_is_whole(speaker, monkeypatch):
    speaker = speaker()
    text = "a日🙂é"
    steps = [[byte] for byte in text.encode()]
    monkeypatch.setattr("tinyllm.generate.generate", lambda *_, **__: iter(steps))
    pieces = [piece for [piece] in speaker.speak([0], Sampling(), 1)]
    assert pieces == ["a", "", "", "日", "", "", "", "🙂", "", "é"]


def test_a_speaker_with_more_rows_than_tokens_speaks(speaker):
    """vocab_size is often padded; the rows beyond the tokenizer stand for nothing."""
    speaker = speaker(rows=2000)
    settings = Sampling(temperature=2.0, max_new_tokens=50)
    steps = list(speaker.speak(speaker.encode("a"), settings, n_samples=2))
    assert len(steps) == 50
    ids = columns(generate(speaker.model, [97], settings, n_samples=2))
    assert max(max(column) for column in ids) > 256  # which the model alone would have said


def test_a_prompt_longer_than_the_context(speaker):
    speaker = speaker()
    settings = Sampling(temperature=0.0, max_new_tokens=20)
    long, short = ("".join(p for [p] in speaker.speak(speaker.encode(t), settings, 1)) for t in ("x" * 99, "x" * 16))
    assert long == short


def test_where_documents_are_marked_a_prompt_begins_one_and_a_sample_ends_with_it(make_run):
    run = make_run()
    state = new_state(run)
    checkpoint = snapshot(run, state)
    speaker = Speaker(checkpoint, "cpu")
    end = tok.end_of_text(tok.from_json(run.data.tokenizer_json))
    assert end is not None
    ids = tok.encode(speaker.tokenizer, "One day")
    assert speaker.encode("One day") == [end, *ids]
    assert speaker.encode("") == [end]
    expected = sample(speaker.model, [end, *ids], n_samples=5, end_token=end, max_new_tokens=300)
    settings = Sampling(max_new_tokens=300)
    spoken = columns(speaker.speak([end, *ids], settings, 5))
    assert [[p is None for p in c] for c in spoken] == [[i is None for i in c] for c in expected]
    assert any(None in column for column in spoken)
    for pieces, tokens in zip(spoken, expected, strict=True):
        text = tok.decode(speaker.tokenizer, [t for t in tokens if t is not None])
        assert "".join(p for p in pieces if p is not None) == text


def test_a_speaker_is_the_model_of_the_checkpoint(make_run):
    run = make_run("model.qk_norm=true", recipe="modern")
    state = new_state(run)
    with torch.no_grad():
        for p in state.model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    checkpoint = snapshot(run, state)
    assert checkpoint.config == to_dict(run.config)
    speaker = Speaker(checkpoint, "cpu")
    tokens = torch.from_numpy(run.source.batch(0)[0])
    assert torch.equal(speaker.model.eval()(tokens), state.model.eval()(tokens))


def test_numbers_that_are_none_choose_something_there_is():
    """Of damaged weights: whoever reads the text will see it; an id that does not exist would be a crash."""
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.0}):
        ids = choose(torch.full((2, 5), math.nan), Sampling(**settings), torch.tensor([0.2, 0.9]))
        assert ((ids >= 0) & (ids < 5)).all()
