"""The model against transformers' GPT-2, against a slow reference with explicit loops, and against itself."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from tinyllm.config import ModelConfig, check
from tinyllm.fast import dropout
from tinyllm.model import GPT, KVCache, init_weights, ngram_rows, rope_tables, rotate

V = 31


def config(recipe="gpt2", **switches) -> ModelConfig:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12}
    return check({"model": {"recipe": recipe} | sizes | switches}).model


def randomized(model_config, vocab_size=V, seed=0, scale=0.2) -> GPT:
    """A model none of whose tensors is zero or one, so that no mistake hides behind its initialization."""
    model = GPT(model_config, vocab_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    return model


def tokens_of(rows=3, length=12, vocab_size=V, seed=1):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- The gpt2 recipe is GPT-2 ----

LINEARS = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
NORMS = {"norm_1": "ln_1", "norm_2": "ln_2"}


def names_there(model):
    """(our name, transformers' name, whether theirs is transposed) of every parameter."""
    yield "wte.weight", "transformer.wte.weight", False
    yield "wpe.weight", "transformer.wpe.weight", False
    for i in range(len(model.blocks)):
        for part in ("weight", "bias"):
            for ours, theirs in LINEARS.items():
                yield f"blocks.{i}.{ours}.{part}", f"transformer.h.{i}.{theirs}.{part}", part == "weight"
            for ours, theirs in NORMS.items():
                yield f"blocks.{i}.{ours}.{part}", f"transformer.h.{i}.{theirs}.{part}", False
    yield "norm.weight", "transformer.ln_f.weight", False
    yield "norm.bias", "transformer.ln_f.bias", False


def transformers_twin(model: GPT) -> GPT2LMHeadModel:
    c = model.config
    sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size}
    drops = {"resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.attn_dropout}
    twin = GPT2LMHeadModel(GPT2Config(vocab_size=model.vocab_size, attn_implementation="sdpa", **sizes, **drops))
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    pairs = list(names_there(model))
    assert {name for name, _, _ in pairs} == ours.keys()
    assert {name for _, name, _ in pairs} == theirs.keys()
    with torch.no_grad():
        for name, there, transposed in pairs:
            theirs[there].copy_(ours[name].T if transposed else ours[name])
    return twin


SIZES = [
    {},
    {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 5},
    {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 40},
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_gpt2_logits_and_gradients_are_those_of_transformers(sizes, training):
    model = randomized(config(**sizes)).train(training)
    twin = transformers_twin(model).train(training)
    tokens = tokens_of(length=model.config.block_size)
    targets = tokens_of(length=model.config.block_size, seed=2)
    logits, expected = model(tokens), twin(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for output in (logits, expected):
        F.cross_entropy(output.flatten(0, 1), targets.flatten()).backward()
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    for name, there, transposed in names_there(model):
        gradient = theirs[there].grad.T if transposed else theirs[there].grad
        torch.testing.assert_close(ours[name].grad, gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("drops", [{"dropout": 0.3}, {"attn_dropout": 0.3}, {"dropout": 0.2, "attn_dropout": 0.1}])
def test_gpt2_drops_out_where_transformers_does(drops):
    """Where both draw the same masks in the same order, the same seed must give the same logits."""
    model = randomized(config(**drops)).train()
    twin = transformers_twin(model).train()
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.forward = lambda x, p=module.p: dropout(x, p, training=True)
    tokens = tokens_of()
    torch.manual_seed(5)
    logits = model(tokens)
    torch.manual_seed(5)
    torch.testing.assert_close(logits, twin(tokens).logits, rtol=1e-5, atol=1e-5)
    torch.manual_seed(6)
    assert not torch.allclose(logits, model(tokens), atol=1e-2)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


# ---- Every recipe and switch against a slow reference ----


def reference(p: dict[str, torch.Tensor], c: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of tokens (T,), one query, one head and one pair of rotated numbers at a time."""

    def norm(name, x):
        if c.norm == "rmsnorm":
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * p[f"{name}.weight"]
        centred = x - x.mean(-1, keepdim=True)
        y = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * p[f"{name}.weight"]
        return y + p[f"{name}.bias"] if c.bias else y

    def linear(name, x):
        y = torch.einsum("oi,ti->to", p[f"{name}.weight"], x)
        return y + p[f"{name}.bias"] if c.bias else y

    def turn(vector, position):
        half = len(vector) // 2
        turned = [None] * len(vector)
        for i in range(half):
            angle = position / 10000 ** (2 * i / len(vector))
            a, b = vector[i], vector[i + half]
            turned[i] = a * math.cos(angle) - b * math.sin(angle)
            turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
        return torch.stack(turned)

    def prepared(vector, position):
        if c.qk_norm:
            vector = vector / torch.sqrt((vector * vector).mean() + torch.finfo(torch.float32).eps)
        return turn(vector, position) if c.positions == "rope" else vector

    def attention(name, x):
        size = c.n_embd // c.n_head
        q, k, v = linear(f"{name}.qkv", x).split(c.n_embd, dim=-1)
        rows = []
        for t in range(len(x)):
            heads = []
            for h in range(c.n_head):
                part = slice(h * size, (h + 1) * size)
                query = prepared(q[t, part], t)
                scores = [(query * prepared(k[s, part], s)).sum() / math.sqrt(size) for s in range(t + 1)]
                weights = torch.stack(scores).softmax(0)
                heads.append(sum(weights[s] * v[s, part] for s in range(t + 1)))
            rows.append(torch.cat(heads))
        return linear(f"{name}.proj", torch.stack(rows))

    def mlp(name, x):
        x = linear(f"{name}.fc", x)
        if c.activation == "swiglu":
            gate, up = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
            x = gate / (1 + torch.exp(-gate)) * up
        elif c.activation == "relu2":
            x = torch.where(x > 0, x * x, torch.zeros_like(x))
        elif c.activation == "gelu":
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        else:
            x = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return linear(f"{name}.proj", x)

    def ngram(n, t):
        """The row of the n tokens that end at t: a polynomial of their ids, from one on, as Python reckons it."""
        ids = [int(tokens[t - back]) + 1 if back <= t else 0 for back in range(n)]  # the last comes first
        number = sum(each * 1_640_531_527 ** (n - 1 - back) for back, each in enumerate(ids))
        return (n - 2) * c.ngram_rows + number % (2**31 - 1) % c.ngram_rows

    x = torch.stack([p["wte.weight"][t] for t in tokens])
    for n in range(2, c.ngrams + 1):
        x = x + torch.stack([p["ngrams.weight"][ngram(n, t)] for t in range(len(tokens))])
    if c.positions == "learned":
        x = x + p["wpe.weight"][: len(tokens)]
    for i in range(c.n_layer):
        x = x + attention(f"blocks.{i}.attn", norm(f"blocks.{i}.norm_1", x))
        x = x + mlp(f"blocks.{i}.mlp", norm(f"blocks.{i}.norm_2", x))
    return norm("norm", x) @ p["wte.weight" if c.tie_embeddings else "head.weight"].T


VARIANTS = [
    config("modern"),
    config("modern", activation="swiglu", n_head=1, n_embd=10),
    config("modern", bias=True, tie_embeddings=True, zero_init=False, qk_norm=False),
    config("gpt2", positions="rope", activation="gelu", norm="rmsnorm"),
    config("gpt2", bias=False, qk_norm=True, tie_embeddings=False, activation="swiglu"),
    config("modern", ngrams=3, ngram_rows=50),
    config("gpt2", ngrams=8, ngram_rows=7),
]


@pytest.mark.parametrize("c", VARIANTS)
def test_logits_and_gradients_are_those_of_the_slow_reference(c):
    model = randomized(c)
    copies = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    tokens, targets = tokens_of(rows=1, length=7), tokens_of(rows=1, length=7, seed=2)
    logits, expected = model(tokens)[0], reference(copies, c, tokens[0])
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    F.cross_entropy(logits, targets[0]).backward()
    F.cross_entropy(expected, targets[0]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), copies[name].grad, rtol=1e-4, atol=1e-5)


def test_a_rotary_score_depends_on_the_distance_alone():
    cos, sin = rope_tables(50, 8)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    queries, keys = (rotate(x.expand(1, 50, 1, 8), cos, sin)[0, :, 0] for x in (q, k))
    scores = queries @ keys.T
    for distance in range(-40, 41):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert scores[0].std() > 0.1  # and it does depend on it


# ---- What a position may see ----


@pytest.mark.parametrize("c", [*VARIANTS, config(), config(dropout=0.2, attn_dropout=0.2)])
def test_no_position_sees_the_future(c):
    model = randomized(c).train()
    tokens = tokens_of()
    torch.manual_seed(0)
    before = model(tokens)
    for t in (1, 5, 11):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % V
        torch.manual_seed(0)
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_every_position_sees_all_of_the_past(recipe):
    model, tokens = randomized(config(recipe)), tokens_of(rows=1)
    before = model(tokens)
    for t in range(12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % V
        assert (model(changed) - before)[0, t:].abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_rows_do_not_mix(recipe):
    model, tokens = randomized(config(recipe)), tokens_of()
    changed = tokens.clone()
    changed[1] = (changed[1] + 1) % V
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=1e-6)
    torch.testing.assert_close(model(tokens[2:]), before[2:], rtol=0, atol=1e-5)
    assert (after[1] - before[1]).abs().max() > 1e-2


@pytest.mark.parametrize("c", [*VARIANTS, config()])
@pytest.mark.parametrize("prompt", [1, 5, 12])
def test_the_cache_gives_the_logits_of_the_whole_window(c, prompt):
    model, tokens = randomized(c).eval(), tokens_of()
    with torch.no_grad():
        whole = model(tokens)
        cache = KVCache(model, len(tokens))
        parts = [model(tokens[:, :prompt], cache)]
        parts += [model(tokens[:, t : t + 1], cache) for t in range(prompt, 12)]
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


# ---- Initialization ----


def test_init_has_gpt2s_spreads():
    model = GPT(config(n_layer=8, n_embd=64, n_head=4), 500)
    init_weights(model, 1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        else:
            std = 0.02 / math.sqrt(16) if name.endswith(("attn.proj.weight", "mlp.proj.weight")) else 0.02
            sigmas = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(std, rel=sigmas), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


def test_zero_init_starts_at_a_uniform_guess():
    model = GPT(config("modern"), V)
    init_weights(model, 1)
    zero = {name for name, parameter in model.named_parameters() if not parameter.any()}
    projections = {f"blocks.{i}.{part}.proj.weight" for i in range(2) for part in ("attn", "mlp")}
    assert zero == projections | {"head.weight"}
    assert torch.equal(model(tokens_of()), torch.zeros(3, 12, V))


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_ngrams_add_nothing_at_first(recipe):
    plain, more = (GPT(config(recipe, **switches), V) for switches in ({}, {"ngrams": 4, "ngram_rows": 100}))
    for model in (plain, more):
        init_weights(model, 3)
    assert more.state_dict().keys() - plain.state_dict().keys() == {"ngrams.weight"}
    assert torch.equal(more(tokens_of()), plain(tokens_of()))


@pytest.mark.parametrize("rows", [1000, 2048, 8192, 10_000, 100_000, 1_000_000])
@pytest.mark.parametrize("vocab_size", [65, 300])
def test_ngrams_share_rows_no_more_than_by_chance(rows, vocab_size):
    """Round numbers of rows, too, to which a multiplier that is nearly round would not be a hash."""
    pairs = torch.cartesian_prod(*[torch.arange(vocab_size)] * 2)
    triples = tokens_of(50_000, 3, vocab_size).unique(dim=0)
    for n, tokens in ((2, pairs), (3, triples)):
        found = ngram_rows(tokens, config(ngrams=3, ngram_rows=rows))[:, -1, n - 2] - (n - 2) * rows
        assert 0 <= found.min() <= found.max() < rows
        by_chance = rows * -math.expm1(-len(tokens) / rows)
        assert len(found.unique()) > 0.9 * by_chance


@pytest.mark.parametrize("c", [config(n_embd=64), config(n_embd=64, tie_embeddings=False), config("modern")])
def test_the_first_loss_is_about_ln_v(c):
    model = GPT(c, 1000)
    init_weights(model, 3)
    tokens, targets = tokens_of(20, 12, 1000), tokens_of(20, 12, 1000, seed=2)
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).item()
    assert loss == pytest.approx(math.log(1000), abs=0.05)


@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_weights_follow_from_the_seed_alone(recipe):
    def weights(seed, noise):
        torch.manual_seed(noise)
        model = GPT(config(recipe), V)
        torch.rand(noise)
        before = torch.get_rng_state()
        init_weights(model, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return model.state_dict()

    a, b, c = weights(7, noise=1), weights(7, noise=2), weights(8, noise=1)
    assert all(torch.equal(a[name], b[name]) for name in a)
    drawn = [name for name in a if a[name].dim() > 1 and a[name].any()]
    assert len(drawn) > 3
    assert not any(torch.equal(a[name], c[name]) for name in drawn)
    same_shape = [a[f"blocks.{i}.mlp.fc.weight"] for i in range(2)]
    assert not torch.equal(*same_shape)  # nor do two layers share their draws


# ---- Counts ----


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dropout": 0.2},
        {"recipe": "modern", "ngrams": 3},
        {"recipe": "modern", "activation": "swiglu", "tie_embeddings": True},
    ],
    ids=str,
)
def test_a_step_holds_at_least_what_is_said_beforehand(settings, dtype):
    """Counted by autograd itself: each tensor that it saves, once, without the weights."""
    model = GPT(config(n_layer=3, n_head=2, n_embd=64, block_size=32, **settings), 65)
    init_weights(model, 1)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    tokens = torch.randint(65, (8, 32))
    watch = torch.autograd.graph.saved_tensors_hooks(note, lambda x: x)
    with watch, torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
    held = sum(x.untyped_storage().nbytes() for place, x in saved.items() if place not in own)
    least = tokens.numel() * model.values_held * dtype.itemsize
    assert 0.4 * held < least <= held
    assert loss.requires_grad


def test_gpt2_small_has_its_124_million_parameters():
    with torch.device("meta"):
        model = GPT(config(n_layer=12, n_head=12, n_embd=768, block_size=1024), 50_257)
    assert count(model) == 124_439_808


@pytest.mark.parametrize(("n_layer", "d", "context"), [(1, 8, 5), (3, 32, 40)])
def test_parameter_counts_by_formula(n_layer, d, context):
    sizes = {"n_layer": n_layer, "n_head": 2, "n_embd": d, "block_size": context}
    gpt2 = GPT(config(**sizes), V)
    block = 12 * d * d + 9 * d + 4 * d  # matrices; biases 3d + d + 4d + d; two norms
    assert count(gpt2) == V * d + context * d + n_layer * block + 2 * d
    modern = GPT(config("modern", **sizes), V)
    assert count(modern) == 2 * V * d + n_layer * (12 * d * d + 2 * d) + d
    hidden = {8: 32, 32: 96}[d]  # 8/3 d, rounded up to a multiple of 32
    swiglu = GPT(config("modern", activation="swiglu", **sizes), V)
    assert count(swiglu) == 2 * V * d + n_layer * (4 * d * d + 3 * d * hidden + 2 * d) + d
    assert count(GPT(config("modern", ngrams=4, ngram_rows=50, **sizes), V)) == count(modern) + 3 * 50 * d


def test_a_tied_head_is_stored_once():
    assert "head.weight" not in GPT(config(), V).state_dict()
    assert "head.weight" in GPT(config(tie_embeddings=False), V).state_dict()
    model = randomized(config())
    model(tokens_of()).sum().backward()
    rows_unseen = torch.ones(V, dtype=torch.bool)
    rows_unseen[tokens_of().flatten()] = False
    assert rows_unseen.any()
    assert model.wte.weight.grad[rows_unseen].abs().min() > 0  # from the head: the input never saw them


# ---- bfloat16 ----


@pytest.mark.parametrize("c", [config(), config("modern"), config("modern", activation="swiglu")])
def test_gradients_in_bfloat16_point_where_those_of_float32_do(c):
    gradients = []
    for enabled in (False, True):
        model = randomized(c, scale=0.05)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(tokens_of())
        F.cross_entropy(logits.flatten(0, 1).float(), tokens_of(seed=2).flatten()).backward()
        gradients.append({name: p.grad.flatten() for name, p in model.named_parameters()})
    for name, exact in gradients[0].items():
        rounded = gradients[1][name]
        if name.endswith("qkv.bias"):
            # A key's bias shifts all scores of a query alike: its gradient is zero, and rounding is all there is.
            # A query's is hardly more as long as attention is nearly uniform. What is left is the values'.
            exact, rounded = exact[-c.n_embd :], rounded[-c.n_embd :]
        assert F.cosine_similarity(exact, rounded, dim=0) > 0.99, name
