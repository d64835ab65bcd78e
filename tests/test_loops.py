"""Training's compiled loops against the formulas in float64, and against torch in bfloat16."""

import math

import numba
import numpy as np
import pytest
import torch
from test_fast import drawn

from tinyllm import fast, kernels, loops
from tinyllm.config import check
from tinyllm.fast import in_loops
from tinyllm.kernels import tiles
from tinyllm.model import GPT, init_weights, rope_tables, rotate

BF16 = torch.bfloat16


def half(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (scale * drawn(*shape, seed=seed)).to(BF16)


def slopes(f, *inputs):
    """The result for a random gradient's sake, and the gradients of the inputs, all float64."""
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    y = f(*copies)
    y.backward(half(*y.shape, seed=99).to(y.dtype))
    return y.detach().double(), [x.grad.double() for x in copies]


def worst(got, right):
    """How far a tensor is from another, as a part of its root mean square."""
    return ((got - right).square().mean().sqrt() / right.square().mean().sqrt()).item()


# ---- Rounding ----


@kernels.inlined
def narrowed(x, out):
    for i in range(x.size):
        out[i] = kernels.narrow(x[i])


def test_numbers_are_rounded_as_torch_rounds_them():
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(BF16).float()
    ties = torch.cat([(every.view(torch.int32) + extra).view(torch.float32) for extra in (1 << 15, (1 << 15) + 1, 1)])
    x = torch.cat((every, ties, torch.randn(10_000) * 1e3))
    out = torch.empty(len(x), dtype=BF16)
    narrowed(x.numpy(), loops.bits(out))
    numbers = ~x.isnan()
    assert torch.equal(out[numbers], x.to(BF16)[numbers])
    assert out[~numbers].isnan().all()


# ---- Operations ----


@pytest.mark.parametrize("name", loops.POINTWISE)
def test_activations_are_those_of_torch_to_the_bit(name):
    """In a network of one number between layers that do nothing, and so is their slope."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(BF16)
    x = every[(every == 0) | (every.abs() > 1e-18) & (every.abs() < 1e12)][:, None]  # squares and cubes are in float32
    up, one = half(len(x), 1), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(one.weight)
    own, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, right = loops.mlp(own, one, one, name), loops.POINTWISE[name](theirs)
    y.backward(up)
    right.backward(up)
    assert torch.equal(y, right)
    exact = torch.autograd.grad(loops.POINTWISE[name](wide := x.float().requires_grad_()), wide, up.float())[0].to(BF16)
    assert torch.equal(own.grad, exact)
    assert loops.mlp(torch.tensor([[math.nan]], dtype=BF16), one, one, name).isnan().all()


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "wide", "narrow"), [(32, 32, 32), (800, 96, 64), (800, 64, 160), (7, 5, 3)])
def test_layers_have_the_gradients_of_their_formula(rows, wide, narrow, bias, units, monkeypatch):
    """More exactly than torch's, which rounds those of weights to bfloat16; more rows than are multiplied at once."""
    monkeypatch.setattr(loops, "has_units", lambda: units and tiles.has_units())
    x, weight, shift = half(2, rows // 2, narrow), half(wide, narrow, seed=1).float(), half(wide, seed=2).float()
    given = (x, weight, shift) if bias else (x, weight)
    y, gradients = slopes(lambda x, weight, *shift: loops.linear(x, weight, *(shift or [None])), *given)
    right, expected = slopes(torch.nn.functional.linear, *(t.double() for t in given))
    assert worst(y, right) < 3e-3
    tolerances = (3e-3, 1e-6 if units and tiles.has_units() and rows % 32 == 0 else 3e-3, 1e-6)
    for got, slope, tolerance in zip(gradients, expected, tolerances, strict=False):
        assert worst(got, slope) < tolerance


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", loops.POINTWISE)
def test_a_network_has_the_gradients_of_its_formula(name, bias):
    fc, proj = torch.nn.Linear(64, 256, bias=bias), torch.nn.Linear(256, 64, bias=bias)
    x, parameters = half(3, 128, 64), [*fc.parameters(), *proj.parameters()]

    def by_formula(x, *p):
        (fc, proj), (fc_bias, proj_bias) = (p[::2], p[1::2]) if bias else (p, (None, None))
        hidden = loops.POINTWISE[name](torch.nn.functional.linear(x, fc, fc_bias))
        return torch.nn.functional.linear(hidden, proj, proj_bias)

    y = loops.mlp(own := x.clone().requires_grad_(), fc, proj, name)
    y.backward(half(*y.shape, seed=99))
    right, expected = slopes(by_formula, x.double(), *(p.detach().double() for p in parameters))
    assert worst(y.double(), right) < 0.01
    for got, slope in zip([own.grad, *(p.grad for p in parameters)], expected, strict=True):
        assert worst(got.double(), slope) < 0.01


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 8), (200, 33), (64, 384)])
def test_norms_are_their_formulas(rows, width, rms, bias):
    weight, shift = (1 + 0.1 * drawn(width, seed=1)).float(), drawn(width, seed=2).float() if bias else None
    x = (3 * half(2, rows, width) + 1).transpose(0, 1)
    eps = 1e-2 if width == 1 else 1e-5

    def formula(x, weight, *shift):
        x = x - (0 if rms else x.mean(-1, keepdim=True))
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight + (shift[0] if shift else 0)

    parameters = [weight] if shift is None else [weight, shift]
    y, gradients = slopes(lambda *given: loops.norm(*given, *[None][bias:], eps, rms)[0], x, *parameters)
    right, expected = slopes(formula, x.double(), *(p.double() for p in parameters))
    torch.testing.assert_close(y, right, rtol=5e-3, atol=5e-3)
    for got, slope in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, slope, rtol=1e-2, atol=1e-2 * slope.abs().max().item() + 1e-6)


def test_what_goes_around_a_norm_has_its_gradient_too():
    x, weight = half(5, 40), (1 + 0.1 * drawn(40, seed=1)).float()

    def both(x, weight):
        y, around = loops.norm(x, weight, None, 1e-6, True)
        return torch.stack((y, 3 * around))

    def formula(x, weight):
        return torch.stack((x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight, 3 * x))

    y, gradients = slopes(both, x, weight)
    right, expected = slopes(formula, x.double(), weight.double())
    for got, exact in ((y, right), *zip(gradients, expected, strict=True)):
        assert worst(got, exact) < 5e-3
    (alone,) = slopes(lambda x: loops.norm(x, weight, None, 1e-6, True)[1], x)[1]
    assert torch.equal(alone, half(5, 40, seed=99).double())


@pytest.mark.parametrize("p", [0.0001, 0.2, 0.9, 1 - 2**-20])
@pytest.mark.parametrize("size", [1, 7, 4096, 100_003])
def test_dropout_adds_what_it_keeps_scaled_and_its_gradient_remembers_which(size, p):
    torch.manual_seed(5)
    x, h = half(size).requires_grad_(), (1 + half(size, seed=1).abs()).detach().requires_grad_()
    y = loops.add_dropout(x, h, p)
    y.backward(torch.ones_like(y))
    kept, scale = h.grad != 0, 65536 / (65536 - min(round(p * 65536), 65535))
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(h.grad[kept], torch.full_like(h.grad[kept], scale))
    torch.testing.assert_close(y.double(), x.double() + kept * h.double() * scale, rtol=4e-3, atol=1e-6)
    if size == 100_003:
        assert kept.double().mean().item() == pytest.approx(1 - p, abs=4 * math.sqrt(p * (1 - p) / size) + 2e-5)


def test_dropout_draws_anew_each_time_the_same_from_a_seed_and_no_pattern():
    h = torch.ones(1 << 20, dtype=BF16)

    def mask():
        return loops.add_dropout(None, h, 0.5) > 0

    torch.manual_seed(1)
    first, second = mask(), mask()
    torch.manual_seed(1)
    assert torch.equal(mask(), first)
    # Neither between calls nor between neighbours, at distances where a generator of blocks would repeat itself.
    for one, other in [(first, second), *((first[d:], first[:-d]) for d in (1, 2, 3, 4, 1024, 4096, 8192))]:
        agree = (one == other).double().mean().item()
        assert agree == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(len(one)))


def exact_attention(qkv, n_head, eps, rope, keep=1):
    """In the type of qkv, by the formulas; `keep`: what the weights are multiplied with."""
    B, T, C = qkv.shape
    q, k, v = qkv.view(B, T, 3, n_head, C // 3 // n_head).unbind(2)
    if eps:
        q, k = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt() for x in (q, k))
    if rope:
        q, k = (rotate(x, *(table.to(x) for table in rope)) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) * keep @ v).transpose(1, 2).reshape(B, T, -1)


@pytest.mark.parametrize("form", ["plain", "normed", "rotated", "both"])
@pytest.mark.parametrize(("T", "D"), [(1, 16), (2, 16), (31, 16), (32, 16), (100, 16), (32, 32), (96, 32), (128, 64)])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_attention_is_its_formula(T, D, form, scale):
    """Of scores of up to some hundreds too: what has a probability of zero must not come back.

    The last three shapes are for tile units, if there are some.
    """
    n_head, eps = 3, 1e-6 if form in ("normed", "both") else 0.0
    rope = tuple(t[:T] for t in rope_tables(128, D)) if form in ("rotated", "both") else None
    qkv = half(2, T, 3 * n_head * D, scale=scale)
    y, (gradient,) = slopes(lambda x: loops.attend(x, n_head, eps, rope, 0.0), qkv)
    right, (expected,) = slopes(lambda x: exact_attention(x, n_head, eps, rope), qkv.double())
    by_torch, (rough,) = slopes(lambda x: exact_attention(x, n_head, eps, rope), qkv)
    assert worst(y, right) < max(0.01, 2 * worst(by_torch, right))
    assert worst(gradient, expected) < max(0.01, 2 * worst(rough, expected))


@pytest.mark.parametrize(("T", "D"), [(50, 8), (64, 32)])
def test_attention_sees_nothing_of_what_is_ahead(T, D):
    qkv = half(1, T, 6 * D)
    later = qkv.clone()
    later[:, 20:] = half(1, T - 20, 6 * D, seed=7, scale=1e3)
    y, z = (loops.attend(x, 2, 0.0, None, 0.0) for x in (qkv, later))
    assert torch.equal(y[:, :20], z[:, :20])
    assert not torch.equal(y[:, 20:], z[:, 20:])


def test_attention_drops_weights_and_its_gradient_the_same_ones():
    """What it dropped shows where the values are one-hot; with that, the formula's gradient."""
    T, D, p = 32, 32, 0.25
    qkv = half(1, T, 3 * D)
    qkv[..., 2 * D :] = torch.eye(T, D).to(BF16)
    torch.manual_seed(3)
    y = loops.attend(qkv, 1, 0.0, None, p)
    keep = (y != 0).double() / (1 - p)
    share = (y != 0).double().sum().item() / (T * (T + 1) / 2)
    assert share == pytest.approx(1 - p, abs=0.08)
    torch.manual_seed(3)
    again, (gradient,) = slopes(lambda x: loops.attend(x, 1, 0.0, None, p), qkv)
    assert torch.equal(again, y.double())
    right, (expected,) = slopes(lambda x: exact_attention(x, 1, 0.0, None, keep[:, None]), qkv.double())
    assert worst(again, right) < 0.01
    assert worst(gradient, expected) < 0.02


def with_threads(n, work):
    torch.set_num_threads(n)
    numba.set_num_threads(n)
    return work()


def test_nothing_depends_on_the_number_of_threads():
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    x, weight, qkv = half(320, 64), drawn(64, seed=1).float(), half(5, 64, 3 * 64, seed=2)
    layer = torch.nn.Linear(64, 96)

    def all_of_it():
        torch.manual_seed(0)
        results = [
            slopes(lambda x, w: loops.norm(x, w, w, 1e-5, False)[0], x, weight),
            slopes(lambda x: loops.add_dropout(x, x, 0.3), x),
            slopes(lambda x, *layer: loops.linear(x, *layer), x, *layer.parameters()),
            slopes(lambda x: loops.attend(x, 4, 1e-6, None, 0.1), qkv),
            slopes(lambda x: loops.attend(x, 2, 1e-6, None, 0.0), qkv),
        ]
        return [t for y, gradients in results for t in (y, *gradients)]

    before = numba.get_num_threads()
    try:
        one, two = (with_threads(n, all_of_it) for n in (1, 2))
    finally:
        with_threads(before, lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---- In the model ----


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_a_model_learns_by_loops_as_it_does_in_float32(recipe, monkeypatch):
    """Its gradient is no further from float32's than that of torch's operations in bfloat16."""
    config = check({"model": {"recipe": recipe, "n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 48}}).model
    model = GPT(config, 97)
    init_weights(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    tokens = torch.randint(0, 97, (4, 48), generator=torch.Generator().manual_seed(2))
    used = []
    for name in ("norm", "mlp", "linear", "attend"):
        whole = getattr(loops, name)
        monkeypatch.setattr(
            loops, name, lambda *args, name=name, whole=whole, **more: used.append(name) or whole(*args, **more)
        )

    def gradient(dtype, by_loops):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype == BF16), in_loops(by_loops):
            logits = model(tokens)
        fast.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    exact, rough = gradient(torch.float32, False), gradient(BF16, False)
    assert not used
    assert gradient(torch.float32, True).equal(exact)
    assert not used
    assert worst(gradient(BF16, True), exact) < 1.2 * worst(rough, exact)
    counts = [used.count(name) for name in ("norm", "mlp", "linear", "attend")]
    assert counts == [5, 2, 4 + (model.head is not None), 2]


def test_what_is_not_in_bfloat16_is_not_for_the_loops():
    with in_loops(True):
        assert fast.loops_for(torch.ones(1)) is None
        assert fast.loops_for(torch.ones(1, dtype=BF16)) is loops
        with in_loops(False):
            assert fast.loops_for(torch.ones(1, dtype=BF16)) is None
    assert fast.loops_for(torch.ones(1, dtype=BF16)) is None
    assert np.array_equal(loops.bits(torch.ones(2, dtype=BF16)), [0x3F80, 0x3F80])
