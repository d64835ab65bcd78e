"""The compiled loops of sampling against the model they stand for, which runs through torch."""

import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from test_generate import make_model
from torch import nn

from tinyllm import decode, generate, kernels
from tinyllm.decode import Decoder
from tinyllm.generate import Sampling, as_multiplied
from tinyllm.kernels import tiles

FORMS = {
    "gpt2": {"recipe": "gpt2", "tie_embeddings": True},
    "gpt2, tanh, no bias": {"activation": "gelu_tanh", "bias": False},
    "modern": {"recipe": "modern"},
    "swiglu, positions learned": {"recipe": "modern", "activation": "swiglu", "positions": "learned"},
    "rmsnorm, bias": {"norm": "rmsnorm", "activation": "relu2", "bias": True},
    "n-grams": {"recipe": "modern", "ngrams": 3, "ngram_rows": 50, "qk_norm": False},
}


@pytest.mark.parametrize("n_texts", [1, 2, 4, 5])
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_model(form, n_texts):
    model = make_model(vocab_size=13 if n_texts > 1 else 3, **FORMS[form]).eval()
    tokens = torch.randint(0, 3, (n_texts, 10), generator=torch.Generator().manual_seed(2))
    decoder = Decoder(model, n_texts)
    with torch.no_grad():
        expected = model(tokens)
    for at, part in zip(range(1, 10), [tokens[:, :2], *tokens[:, 2:].split(1, dim=1)], strict=True):
        torch.testing.assert_close(decoder(part), expected[:, at], rtol=2e-5, atol=2e-5)
    assert decoder.cache.length == 10
    assert decoder.stack.fc_weight.dtype == decoder.head.dtype == np.float32


EVERYDAY = {"n_layer": 2, "n_head": 4, "n_embd": 72, "block_size": 96, "scale": 0.1, "vocab_size": 301}


@pytest.mark.parametrize("n_texts", [1, 2, 5, 17])
@pytest.mark.parametrize("form", FORMS)
def test_in_bfloat16_logits_are_as_near_as_those_of_an_evaluation(form, n_texts):
    """Beside float64; 72 numbers fill no tile, 301 tokens no group of tiles; a prompt of 40 is read in parts."""
    model = make_model(**EVERYDAY, **FORMS[form]).eval()
    as_multiplied(model)
    tokens = torch.randint(0, 301, (n_texts, 48), generator=torch.Generator().manual_seed(2))
    decoder = Decoder(model, n_texts, packed=True)
    assert decoder.stack.fc_weight.dtype == decoder.head.dtype == np.uint16
    got = torch.stack([decoder(part).clone() for part in [tokens[:, :40], *tokens[:, 40:].split(1, dim=1)]], dim=1)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            evaluated = model(tokens)[:, 39:].float()
        exact = model.double()(tokens)[:, 39:]
    assert (got - exact).square().mean() < (evaluated - exact).square().mean()


@pytest.mark.parametrize("form", FORMS)
def test_in_bfloat16_a_text_has_the_same_bits_however_it_is_read(form, monkeypatch):
    """Alone or with others, its prompt at once or in parts, by tile units or by vectors."""
    model = make_model(**EVERYDAY, **FORMS[form]).eval()
    as_multiplied(model)
    tokens = torch.randint(0, 301, (18, 60), generator=torch.Generator().manual_seed(2))

    def logits(rows, prompt):
        decoder = Decoder(model, len(rows), packed=True)
        parts = [tokens[rows, :prompt], *tokens[rows, prompt:].split(1, dim=1)]
        return torch.stack([decoder(part).clone() for part in parts], dim=1)[:, -10:]

    whole = logits(range(18), 50)
    assert len(whole.unique(dim=0)) == 18
    for rows, prompt in (([3], 50), ([3], 1), ([2, 3], 7), ([17, 1, 3], 33)):
        assert torch.equal(logits(rows, prompt), whole[rows]), (rows, prompt)
    if not tiles.has_units():
        pytest.skip("no tile units here")
    monkeypatch.setattr(decode, "has_units", lambda: False)
    assert torch.equal(logits(range(18), 50), whole)


def test_torch_s_products_are_right_after_those_in_tiles():
    """Which leave the tile units as if they had not been used, in the thread that torch shares with them."""
    model = make_model(**EVERYDAY)
    as_multiplied(model)
    a, b = torch.randn(2, 100, 100, generator=torch.Generator().manual_seed(3)).bfloat16()
    before, decoder = a @ b, Decoder(model.eval(), 5, packed=True)
    for _ in range(3):
        decoder(torch.zeros(5, 3, dtype=torch.int64))
        assert torch.equal(a @ b, before)


@pytest.mark.parametrize("name", ["CPU_NAME", "CPU_FEATURES"])
def test_another_cpu_s_machine_code_has_no_tile_units(name, monkeypatch):
    monkeypatch.setattr(numba.config, name, "generic")
    assert not tiles.has_units.__wrapped__()


def test_a_model_of_an_everyday_size():
    """Whose sums are long enough to show how they are rounded: no worse than torch's, beside float64."""
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 256, "block_size": 64}
    model = make_model(vocab_size=301, scale=0.1, **sizes).eval()
    tokens = torch.randint(0, 301, (3, 64), generator=torch.Generator().manual_seed(2))
    decoder = Decoder(model, 3)
    got = torch.stack([decoder(tokens[:, at : at + 1]).clone() for at in range(64)], dim=1)
    with torch.no_grad():
        by_torch, exact = model(tokens), model.double()(tokens)
    assert (got - exact).abs().max() < 4 * (by_torch - exact).abs().max()


def test_long_texts_go_through_the_loops_and_are_the_same(monkeypatch):
    model, seen = make_model("modern"), []
    call = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, tokens: seen.append(len(tokens)) or call(self, tokens))

    def texts(n_tokens):
        sampling = Sampling(temperature=1.0, max_new_tokens=n_tokens, seed=3)
        return list(generate.generate(model, [1, 2, 3], sampling, n_samples=3))

    long = texts(generate.WORTH_LOADING)
    assert len(seen) == generate.WORTH_LOADING
    assert set(seen) == {3}
    seen.clear()
    short = texts(generate.WORTH_LOADING - 1)
    assert not seen
    assert long[:-1] == short
    monkeypatch.setattr(generate, "loops_start_quickly", lambda: False)
    assert texts(generate.WORTH_LOADING) == long
    assert not seen


def test_in_bfloat16_short_texts_go_through_the_loops_and_begin_long_ones(monkeypatch):
    """For the model itself does not round what it multiplies; and a text is the same among others, to the last bit."""
    model = make_model("modern")
    as_multiplied(model)

    def texts(n_tokens, n_samples):
        sampling = Sampling(temperature=1.0, max_new_tokens=n_tokens, seed=3)
        return list(zip(*generate.generate(model, [1, 2, 3], sampling, n_samples=n_samples), strict=True))

    long = texts(150, 5)
    assert [text[:20] for text in long] == texts(20, 5)
    assert texts(150, 1) == long[:1]
    monkeypatch.setattr(generate, "loops_start_quickly", lambda: False)
    assert len(texts(20, 5)[0]) == 20  # by the model, where there are no loops


@pytest.mark.parametrize(("packed", "n_texts"), [(False, 1), (True, 1), (True, 4)])
def test_weights_that_are_no_numbers_give_logits_that_are_none(packed, n_texts):
    model = make_model()
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight[0, 0] = float("nan")
    decoder = Decoder(model.eval(), n_texts, packed=packed)
    assert decoder(torch.ones(n_texts, 1, dtype=torch.int64)).isnan().all()


def test_only_matrices_of_products_are_rounded():
    model, before = make_model(), make_model()
    as_multiplied(model)
    for (name, got), was in zip(model.named_parameters(), before.parameters(), strict=True):
        a_product = name.endswith(("qkv.weight", "proj.weight", "fc.weight", "head.weight"))
        assert torch.equal(got, was.bfloat16().float() if a_product else was), name
    tied = make_model(tie_embeddings=True)
    as_multiplied(tied)
    assert torch.equal(tied.wte.weight, tied.wte.weight.bfloat16().float())


def test_what_the_loops_are_for():
    def decoder(model, n_tokens=1000):
        return generate.fast_decoder(model, 1, 0, n_tokens)

    model = make_model()
    assert not decoder(model).packed
    assert not decoder(model, n_tokens=10)
    assert not decoder(model.double())
    as_multiplied(model.float())
    assert decoder(model).packed
    assert decoder(model, n_tokens=10).packed
    assert not decoder(model.bfloat16())
    assert not decoder(model.float().to("meta"))


def test_threads_that_start_slowly_are_not_used():
    """Numba's last resort where there is no OpenMP: each loop would take longer to start than to run."""
    code = "from tinyllm.fast import loops_start_quickly; print(loops_start_quickly())"
    for layer, expected in (("workqueue", "False"), ("omp", "True")):
        environment = os.environ | {"NUMBA_THREADING_LAYER": layer}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        if layer == "omp" and "No threading layer could be loaded" in done.stderr:
            pytest.skip("no OpenMP here")
        assert done.stdout.strip() == expected, done.stderr


def test_torch_keeps_its_number_of_threads():
    """For numba tells OpenMP another, and who sums in another number of parts gets other bits."""
    code = (
        "import torch\n"
        "from test_generate import make_model, sample\n"
        "torch.set_num_threads(1)\n"
        "sample(make_model(), [1], max_new_tokens=150)\n"
        "print(torch.get_num_threads())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


# ---- Functions of one number ----


@kernels.inlined
def over(x, which, out):
    for i in range(x.size):
        if which == 0:
            out[i] = kernels.exp(x[i])
        elif which == 1:
            out[i] = kernels.gelu(x[i])
        elif which == 2:
            out[i] = kernels.gelu_tanh(x[i])
        else:
            out[i] = kernels.silu(x[i])


@pytest.mark.parametrize("which", ["exp", "gelu", "gelu_tanh", "silu"])
def test_functions_of_one_number_are_exact_to_the_last_bits(which):
    x = torch.cat((torch.linspace(-59, 59, 20_001), torch.linspace(-1, 1, 20_001)))
    out = np.zeros(len(x), np.float32)
    over(x.numpy(), ("exp", "gelu", "gelu_tanh", "silu").index(which), out)
    functional = nn.functional
    exact = {
        "exp": torch.exp,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "silu": functional.silu,
    }[which](x.double())
    error = (torch.from_numpy(out) - exact).abs()
    assert (error / exact.abs().clamp(min=1e-9)).max() < 3e-7 if which == "exp" else error.max() < 5e-6
    assert (error / (exact.abs() + x.abs().clamp(max=1))).max() < 6e-7


@pytest.mark.parametrize(("x", "expected"), [(np.nan, np.nan), (-np.inf, 0.0), (-1e9, 0.0), (1e9, 1e26)])
def test_exp_at_its_ends(x, expected):
    out = np.zeros(1, np.float32)
    over(np.array([x], np.float32), 0, out)
    assert np.isnan(out[0]) if np.isnan(expected) else out[0] == pytest.approx(expected, rel=1, abs=1e-20)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 0.05, 0.8, 1.0, 30.0])
@pytest.mark.parametrize("vocab_size", [1, 2, 65, 5000])
def test_a_draw_falls_where_it_does_in_float64(vocab_size, temperature):
    generator = torch.Generator().manual_seed(1)
    logits = 5 * torch.randn(300, vocab_size, generator=generator)
    logits[0], logits[1, : vocab_size // 2] = 2.0, -torch.inf  # all alike; some that cannot be
    draws = torch.rand(300, generator=generator, dtype=torch.float64)
    draws[:4] = torch.tensor([0.0, 0.0, 1 - 2**-53, 0.5])
    expected = generate.choose(logits, Sampling(temperature=temperature), draws)
    scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    cumulative = scaled.softmax(-1).cumsum(-1)
    by_hand = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
    got = Decoder.draw(logits, temperature, draws)
    assert torch.equal(expected[3:], by_hand[3:])
    assert torch.equal(got[3:], by_hand[3:])
    # At the very end of the interval rounding may decide, but never for a token that cannot be.
    assert all(cumulative[i, ids[i]] > 0 for ids in (got, expected) for i in range(3))
    assert (Decoder.draw(torch.full((2, 5), torch.nan), 1.0, draws[:2]) < 5).all()
