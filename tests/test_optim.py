"""The optimizers against a closed form by hand, torch's own Muon, and the partition of the parameters."""

import math

import pytest
import torch

from tinyllm.config import OptimConfig, check
from tinyllm.model import GPT, init_weights
from tinyllm.optim import (
    all_groups,
    build_optimizers,
    load_state_by_name,
    parameter_groups,
    set_learning_rate,
    state_by_name,
)


def make_model(recipe="gpt2", **switches) -> GPT:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8}
    model = GPT(check({"model": {"recipe": recipe} | sizes | switches}).model, 11)
    init_weights(model, 1)
    return model


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def step_all(optimizers):
    for optimizer in optimizers:
        optimizer.step()


RECIPES = [
    ("gpt2", {}),
    ("gpt2", {"tie_embeddings": False, "bias": False}),
    ("modern", {}),
    ("modern", {"bias": True}),
    ("modern", {"ngrams": 3, "ngram_rows": 50}),
]


@pytest.mark.parametrize("decay_embeddings", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize(("recipe", "switches"), RECIPES)
def test_each_parameter_is_in_exactly_the_right_group(recipe, switches, name, decay_embeddings):
    model = make_model(recipe, **switches)
    config = OptimConfig(name=name, decay_embeddings=decay_embeddings, weight_decay=0.3, lr=0.01, muon_lr=0.05)
    expected = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            expected[parameter_name] = (0.0, 0.01)
        elif parameter_name in ("wte.weight", "wpe.weight", "ngrams.weight"):
            expected[parameter_name] = (0.3 if decay_embeddings else 0.0, 0.01)
        elif parameter_name == "head.weight":
            expected[parameter_name] = (0.3, 0.01)
        else:
            expected[parameter_name] = (0.3, 0.05 if name == "muon" else 0.01)
    own = dict(model.named_parameters())
    in_groups = [
        (n, p, (group.weight_decay, group.peak_lr))
        for group in parameter_groups(model, config)
        for n, p in zip(group.names, group.parameters, strict=True)
    ]
    in_optimizers = [
        (n, p, (group["weight_decay"], group["lr"]))
        for group in all_groups(build_optimizers(model, config))
        for n, p in zip(group["names"], group["params"], strict=True)
    ]
    for placed in (in_groups, in_optimizers):
        assert sorted(n for n, _, _ in placed) == sorted(expected)  # each, and none twice
        assert all(own[n] is p for n, p, _ in placed)
        assert {n: settings for n, _, settings in placed} == expected


def test_a_frozen_parameter_is_in_no_group():
    model = make_model()
    model.wpe.requires_grad_(False)
    names = [n for group in parameter_groups(model, OptimConfig()) for n in group.names]
    assert set(names) == dict(model.named_parameters()).keys() - {"wpe.weight"}


def test_adamw_is_the_closed_form():
    """Loshchilov & Hutter 2019, algorithm 2, in float64: decay first, then the bias-corrected step."""
    model = make_model()
    config = OptimConfig(lr=3e-3, betas=(0.8, 0.93), eps=1e-3, weight_decay=0.2, decay_embeddings=False)
    optimizers = build_optimizers(model, config)
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    m = {n: torch.zeros_like(p) for n, p in expected.items()}
    v = {n: torch.zeros_like(p) for n, p in expected.items()}
    for t, factor in enumerate((0.5, 1.0, 0.7, 0.1), start=1):
        give_gradients(model, seed=t)
        for name, parameter in model.named_parameters():
            gradient = parameter.grad.double()
            m[name] = 0.8 * m[name] + 0.2 * gradient
            v[name] = 0.93 * v[name] + 0.07 * gradient**2
            decays = parameter.dim() == 2 and name not in ("wte.weight", "wpe.weight")
            shrunk = expected[name] * (1 - 3e-3 * factor * (0.2 if decays else 0.0))
            denominator = (v[name] / (1 - 0.93**t)).sqrt() + 1e-3
            expected[name] = shrunk - 3e-3 * factor * m[name] / (1 - 0.8**t) / denominator
        set_learning_rate(optimizers, factor)
        step_all(optimizers)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_muon_is_torchs_muon_and_the_rest_adamw():
    model, twin = make_model("modern", bias=True, zero_init=False), make_model("modern", bias=True, zero_init=False)
    config = OptimConfig(name="muon", muon_lr=0.03, muon_momentum=0.8, lr=2e-3, weight_decay=0.3)
    optimizers = build_optimizers(model, config)
    named = dict(twin.named_parameters())
    inner = [n for n in named if n.startswith("blocks.") and named[n].dim() == 2]
    outer, flat = ["wte.weight", "head.weight"], [n for n in named if named[n].dim() == 1]
    assert len(inner) + len(outer) + len(flat) == len(named)
    muon = torch.optim.Muon([named[n] for n in inner], lr=0.03, weight_decay=0.3, momentum=0.8)
    adamw = torch.optim.AdamW([named[n] for n in outer], lr=2e-3, weight_decay=0.3, betas=(0.9, 0.95), eps=1e-8)
    plain = torch.optim.AdamW([named[n] for n in flat], lr=2e-3, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    for seed in range(3):
        give_gradients(model, seed)
        give_gradients(twin, seed)
        step_all(optimizers)
        step_all([muon, adamw, plain])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-5, atol=1e-7)


def test_muon_moves_matrices_along_the_nearest_orthogonal_matrix():
    model = make_model()
    config = OptimConfig(name="muon", muon_lr=0.1, weight_decay=0.0)
    optimizers = build_optimizers(model, config)
    give_gradients(model, seed=0)
    names = [n for n in dict(model.named_parameters()) if n.startswith("blocks.") and "proj.weight" in n]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step_all(optimizers)
    for name in names:
        parameter = model.get_parameter(name)
        u, _, vt = torch.linalg.svd(parameter.grad, full_matrices=False)
        rows, columns = parameter.shape
        update = (before[name] - parameter.detach()) / 0.1 / math.sqrt(max(1, rows / columns))
        singular = torch.linalg.svdvals(update)
        assert singular.min() > 0.5, name  # Jordan et al. 2024: five iterations bring them near 1
        assert singular.max() < 1.3, name
        assert torch.nn.functional.cosine_similarity(update.flatten(), (u @ vt).flatten(), dim=0) > 0.95, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_learning_rate_reaches_every_group(name):
    config = OptimConfig(name=name, lr=2e-3, muon_lr=0.05)
    optimizers = build_optimizers(make_model(), config)
    for factor in (0.25, 1.0, 0.0, 0.5):  # each from the peak, not from the rate before
        set_learning_rate(optimizers, factor)
        groups = list(all_groups(optimizers))
        assert len(groups) == (3 if name == "muon" else 2)
        matrices = 0.05 if name == "muon" else 2e-3
        assert {g["lr"] for g in groups} == {2e-3 * factor, matrices * factor}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_goes_round_by_name(name):
    config = OptimConfig(name=name, weight_decay=0.3)
    model = make_model()
    optimizers = build_optimizers(model, config)
    assert state_by_name(optimizers) == {}
    for seed in range(3):
        give_gradients(model, seed)
        step_all(optimizers)
    state = state_by_name(optimizers)
    assert state.keys() == dict(model.named_parameters()).keys()
    kept = {n: {k: torch.as_tensor(v).clone() for k, v in s.items()} for n, s in state.items()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}

    def goes_on():
        twin = make_model()
        twin.load_state_dict(weights)
        anew = build_optimizers(twin, config)
        load_state_by_name(anew, dict(reversed(kept.items())))  # by name, whatever the order
        give_gradients(twin, seed=9)
        step_all(anew)
        return twin

    first, second = goes_on(), goes_on()  # the first must not have used up what both were given
    give_gradients(model, seed=9)
    step_all(optimizers)
    fresh = make_model()
    fresh.load_state_dict(weights)
    give_gradients(fresh, seed=9)
    step_all(build_optimizers(fresh, config))
    for n, parameter in model.named_parameters():
        assert torch.equal(parameter, first.get_parameter(n)), n
        assert torch.equal(parameter, second.get_parameter(n)), n
        assert not torch.equal(parameter, fresh.get_parameter(n)), n


def test_muon_in_float32_is_its_formula_in_float64():
    model = make_model("modern", zero_init=False)
    config = OptimConfig(name="muon", muon_lr=0.1, weight_decay=0.0, muon_momentum=0.9)
    optimizers = build_optimizers(model, config, torch.float32)
    before = {n: p.detach().double() for n, p in model.named_parameters()}
    give_gradients(model, seed=0)
    step_all(optimizers)
    for group in optimizers[0].param_groups:
        for name, p in zip(group["names"], group["params"], strict=True):
            x = p.grad.double()  # the first step's direction, whatever the momentum
            u, s, v = torch.linalg.svd(x / x.norm(), full_matrices=False)
            for _ in range(5):
                s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
            move = -0.1 * max(1, p.shape[0] / p.shape[1]) ** 0.5 * (u * s) @ v
            torch.testing.assert_close(p.double() - before[name], move, rtol=1e-4, atol=1e-5)
