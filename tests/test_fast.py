"""The faster operations compute what their formulas say, forwards and backwards."""

import math

import pytest
import torch

from tinyllm import fast
from tinyllm.data import IGNORED
from tinyllm.fast import WIDE, activation, cross_entropy, dropout, rms_norm
from tinyllm.model import attend


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- RMSNorm and relu^2 ----


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_gradients_of_rms_norm_are_the_slopes(eps):
    x, weight = drawn(3, 5, 8).requires_grad_(), drawn(8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, eps), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, eps=eps), (x,))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm_is_its_formula(dtype, near, scale, weighted):
    """Of a transposed tensor too, as attention's are; the weight stays in float32, as a model's do."""
    x = (scale * drawn(7, 4, 33)).to(dtype).transpose(0, 1).requires_grad_()
    weight = (1 + 0.1 * drawn(33, seed=1)).float().requires_grad_() if weighted else None
    up = drawn(4, 7, 33, seed=2).to(dtype)
    copies = [t.detach().double().requires_grad_() for t in (x, weight) if t is not None]
    expected = copies[0] / (copies[0].square().mean(-1, keepdim=True) + 1e-6).sqrt() * (copies[1] if weighted else 1)
    y = rms_norm(x, weight, 1e-6)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=near, atol=near)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), expected, rtol=near, atol=near)
    y.backward(up)
    expected.backward(up.double())
    for own, right in zip([t for t in (x, weight) if t is not None], copies, strict=True):
        assert own.grad.dtype == own.dtype
        size = right.grad.abs().max().item()
        torch.testing.assert_close(own.grad.double(), right.grad, rtol=near, atol=near * size)


def test_rms_norm_of_few_numbers_is_left_to_torch_without_gradients(monkeypatch):
    calls = []
    monkeypatch.setattr(fast.F, "rms_norm", lambda x, *args: calls.append(len(x)) or x)
    few, many = torch.ones(1, 64), torch.ones(fast.FEW // 64 + 1, 64)
    rms_norm(few), rms_norm(many)
    assert not calls
    with torch.inference_mode():
        rms_norm(few), rms_norm(many)
    assert calls == [1]


def test_rms_norm_of_zeros_is_zero():
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8))
    y.sum().backward()
    assert not y.any()
    assert x.grad.isfinite().all()


def test_relu2_and_its_slope():
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 3.0], requires_grad=True)
    y = activation(x, "relu2")
    assert y.tolist() == [0, 0, 0, 0.25, 9]
    y.backward(torch.tensor([1.0, 1.0, 1.0, 2.0, -1.0]))
    assert x.grad.tolist() == [0, 0, 0, 2.0, -6.0]
    assert torch.autograd.gradcheck(lambda x: activation(x, "relu2"), (drawn(4, 6).requires_grad_(),))


def test_elsewhere_they_are_those_of_torch(monkeypatch):
    x, weight = drawn(4, 8).float(), drawn(8, seed=1).float()
    own = rms_norm(x, weight), rms_norm(x), activation(x, "relu2")
    monkeypatch.setattr(fast, "leave_to_torch", lambda x: True)
    for a, b in zip(own, (rms_norm(x, weight), rms_norm(x), activation(x, "relu2")), strict=True):
        torch.testing.assert_close(a, b)


# ---- Dropout ----


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9, 0.99999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    n = 1_000_003  # no multiple of what is drawn at once
    x = torch.ones(n, dtype=dtype, requires_grad=True)
    y = dropout(x, p, training=True)
    assert y.dtype == dtype
    dropped = (y == 0).double()
    sigma = (p * (1 - p) / n) ** 0.5
    assert dropped.mean().item() == pytest.approx(p, abs=5 * sigma + 1e-5)
    assert len(y.unique()) <= 2  # zero and the scale, which gives the mean back
    assert y.detach().double().mean().item() == pytest.approx(1, abs=5 * sigma / (1 - p) + 4e-3)
    for lag in (1, 2, 3, 4, 5, 64):  # four values come from one draw
        both = (dropped[lag:] * dropped[:-lag]).mean().item()
        assert both == pytest.approx(p * p, abs=5 * (p * p / n) ** 0.5 + 1e-4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_dropout_draws_anew_each_time_and_the_same_from_a_seed():
    x, drawn = torch.ones(100_000), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append([dropout(x, 0.5, training=True) for _ in range(2)])
    assert torch.equal(drawn[0][0], drawn[1][0])
    for other in (drawn[0][1], drawn[2][0]):
        assert (drawn[0][0] == other).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x


# ---- Attention ----


def written_out(q, k, v, drop=lambda weights: weights):
    """Causal attention (Vaswani et al. 2017, eq. 1)."""
    T, D = q.shape[-2:]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D) + torch.full((T, T), -math.inf).triu(1)
    return drop(scores.softmax(-1)) @ v


@pytest.mark.parametrize("length", [1, 9])
def test_attention_in_bfloat16_trains_like_float32(length):
    q, k, v, up = (drawn(2, 3, length, 8, seed=seed).bfloat16() for seed in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(*leaves, 0.0)
    assert got.dtype == torch.bfloat16
    expected = written_out(*exact)
    torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-2)
    got.backward(up)
    expected.backward(up.float())
    for a, b in zip(leaves, exact, strict=True):
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=1e-2, atol=3e-2)


def test_attention_in_bfloat16_drops_weights():
    q, k = (drawn(1, 1, 64, 64, seed=seed).bfloat16().requires_grad_() for seed in range(2))
    v = torch.eye(64).bfloat16()[None, None].requires_grad_()  # what comes out is the weights themselves
    torch.manual_seed(3)
    dropped = attend(q, k, v, 0.25)[0, 0]
    kept = attend(q, k, v, 0.0)[0, 0]
    below = torch.ones(64, 64).tril().bool()
    assert not dropped[~below].any()
    share = ((dropped == 0) & (kept > 0))[below].float().mean().item()
    assert share == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / below.sum().item()) ** 0.5)
    there = below & (dropped != 0)
    torch.testing.assert_close(dropped[there], kept[there] / 0.75, rtol=1e-2, atol=1e-3)


def test_a_long_context_goes_through_the_fused_kernel(monkeypatch):
    """Its memory does not grow with the square of the length."""
    monkeypatch.setattr("tinyllm.model.BY_PRODUCTS", 8)
    monkeypatch.setattr("tinyllm.model.attend_by_products", lambda *args: pytest.fail("written out"))
    q, k, v = (drawn(1, 2, 9, 8, seed=seed).bfloat16().requires_grad_() for seed in range(3))
    torch.testing.assert_close(
        attend(q, k, v, 0.0).float(), written_out(q.float(), k.float(), v.float()), rtol=1e-2, atol=1e-2
    )


# ---- The loss ----


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("vocab_size", [65, WIDE])
def test_cross_entropy_and_its_gradient_are_those_of_torch_in_float64(vocab_size, dtype, near, reduction):
    """Rows of all kinds: of natural size, steep, hopeless, flat, and ignored. A wide one has several parts."""
    rows = 2 * fast.AT_ONCE // WIDE + 3
    scale = torch.tensor([1.0, 30.0, 1000.0, 0.0]).repeat(rows)[:rows, None]
    logits = (scale * drawn(rows, vocab_size)).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (rows,), generator=torch.Generator().manual_seed(1))
    targets[::5] = IGNORED
    exact = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction=reduction)
    loss = cross_entropy(logits, targets, reduction)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    up = drawn(*expected.shape, seed=2)
    loss.backward(up.float())
    expected.backward(up)
    assert logits.grad.dtype == dtype
    largest = exact.grad.abs().max().item()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=near, atol=1e-6 * largest)
    assert not logits.grad[targets == IGNORED].any()


def test_a_wide_cross_entropy_keeps_no_copy_of_the_logits():
    kept = []
    logits = drawn(100, WIDE).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cross_entropy(logits * 1, torch.zeros(100, dtype=torch.int64))
    assert sum(t.nbytes for t in kept) < 1.1 * logits.nbytes


@pytest.mark.parametrize("vocab_size", [65, WIDE])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_of_what_is_not_finite_is_not_finite(vocab_size, value):
    logits = drawn(3, vocab_size).float()
    logits[1, 7] = value
    assert cross_entropy(logits, torch.tensor([1, 2, 3]), "none").isfinite().tolist() == [True, False, True]
    assert cross_entropy(logits, torch.full((3,), IGNORED)).isnan()  # a mean of nothing
