"""The GPT: token ids (B, T) in, logits (B, T, vocab_size) out. Prints nothing, knows no optimizer.

    model = GPT(config.model, vocab_size=65)
    init_weights(model, seed=1337)
    logits = model(tokens)                       # training: the whole window at once
    cache = KVCache(model, batch_size=1)
    logits = model(prompt, cache)                # generation: the prompt first,
    logits = model(token, cache)                 # then one token at a time

Shapes: B batch, T time (tokens), C = n_embd, H = n_head, D = C / H, V = vocab_size.
The two recipes are Radford et al. 2019 (`gpt2`) and, for `modern`, RMSNorm (Zhang & Sennrich 2019), rotary positions
(Su et al. 2021), query-key normalisation (Henry et al. 2020), squared ReLU (So et al. 2021) and zero-initialised
residual projections. Either can have embeddings of n-grams (Pagnoni et al. 2024).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyllm.config import ModelConfig
from tinyllm.fast import (
    EPS,
    activation,
    add_dropout,
    attend_by_products,
    dropout,
    layer_norm,
    linear,
    loops_for,
    norm_beside,
    rms_norm,
)

INIT_STD = 0.02  # GPT-2
ROPE_BASE = 10_000.0
HASH_BASE, HASH_PRIME = 1_640_531_527, 2**31 - 1  # the first is 2^32 in golden section; products fit in 64 bits
BY_PRODUCTS = 1024  # tokens: attention weights beyond that would take more memory than all the rest of a layer


class Linear(nn.Linear):
    """torch's, done faster, and without values drawn for a shape that has none (device "meta").

    To draw those, torch imports its compiler, which takes a second.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """The same for a table."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.RMSNorm):
    """torch's, done faster."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """The same."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.n_embd, eps=1e-6)
    return LayerNorm(config.n_embd, bias=config.bias)


class Attention(nn.Module):
    """Causal self-attention, all heads in one matrix product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head, self.attn_dropout = config.n_head, config.attn_dropout
        self.qk_norm = config.qk_norm
        self.qkv = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: "KVCache | None", layer: int) -> Tensor:
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        p, qkv = self.attn_dropout if self.training else 0.0, self.qkv(x)
        if T <= BY_PRODUCTS and qkv.requires_grad and (loops := loops_for(qkv)):
            return self.proj(loops.attend(qkv, H, EPS if self.qk_norm else 0.0, rope, p))
        qk, v = qkv.view(B, T, 3 * H, D).split((2 * H, H), dim=2)  # queries and keys go one way together
        if self.qk_norm:
            qk = rms_norm(qk)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k, v = (y.transpose(1, 2) for y in (*qk.chunk(2, dim=2), v))  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = attend(q, k, v, p)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


def attend(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Attention of queries (B, H, T, D) to keys and values (B, H, S, D): causal for T > 1; one query sees all S.

    Weights are dropped with probability p.
    """
    T = q.shape[2]
    if T <= BY_PRODUCTS and q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        return attend_by_products(q, k, v, p)
    return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, dropout_p=p)


class MLP(nn.Module):
    """The position-wise half of a block: C -> 4 C -> C (SwiGLU: 8/3 C, for the same number of weights)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        swiglu = config.activation == "swiglu"
        hidden = math.ceil(config.n_embd * 8 / 3 / 32) * 32 if swiglu else 4 * config.n_embd
        self.fc = Linear(config.n_embd, 2 * hidden if swiglu else hidden, bias=config.bias)
        self.proj = Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation != "swiglu" and (loops := loops_for(x)):
            return loops.mlp(x, self.fc, self.proj, self.activation)
        x = self.fc(x)
        if self.activation == "swiglu":
            gate, up = x.chunk(2, dim=-1)
            return self.proj(F.silu(gate) * up)
        return self.proj(activation(x, self.activation))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.norm_1, self.attn = make_norm(config), Attention(config)
        self.norm_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: "KVCache | None", layer: int) -> Tensor:
        y, x = norm_beside(self.norm_1, x)
        x = add_dropout(x, self.attn(y, rope, cache, layer), self.dropout, self.training)
        y, x = norm_beside(self.norm_2, x)
        return add_dropout(x, self.mlp(y), self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only transformer."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.wte = Embedding(vocab_size, config.n_embd)
        self.wpe = Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.ngrams = Embedding((config.ngrams - 1) * config.ngram_rows, config.n_embd) if config.ngrams > 1 else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        # A tied head has no tensor of its own, so that nothing is saved, counted or decayed twice.
        self.head = None if config.tie_embeddings else Linear(config.n_embd, vocab_size, bias=False)
        if config.positions == "rope":
            cos, sin = rope_tables(config.block_size, config.n_embd // config.n_head)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)

    @property
    def values_held(self) -> int:
        """Values a token that a step of training holds for its backward pass, at the least.

        In each block what its products and norms multiply, queries, keys and values, and what the activation takes.
        """
        linears = [module for block in self.blocks for module in block.modules() if isinstance(module, Linear)]
        others = sum(5 * self.config.n_embd + block.mlp.fc.out_features for block in self.blocks)
        return sum(linear.in_features for linear in linears) + others + self.vocab_size

    @property
    def matrices(self) -> list[Tensor]:
        """What products multiply with: the weights of linear layers, and the table of embeddings if it is the head."""
        found = [module.weight for module in self.modules() if isinstance(module, Linear)]
        return found if self.head else [*found, self.wte.weight]

    def forward(self, tokens: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Logits (B, T, V) of the next token at each position of tokens (B, T), int64, T <= block_size.

        With a cache, tokens continue what it holds (an empty one takes any T, a filled one T = 1).
        """
        T, start = tokens.shape[1], 0 if cache is None else cache.length
        x, rope = self.embed(tokens, cache), None
        if torch.is_autocast_enabled(x.device.type):  # the stream too: half the bytes, no casts at norms and sums
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.wpe is None:
            rope = tuple(table[start : start + T].to(x.dtype) for table in (self.rope_cos, self.rope_sin))
        x = dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, cache, layer)
        if cache is not None:
            cache.length += T
        x = self.norm(x)
        return F.linear(x, self.wte.weight) if self.head is None else self.head(x)

    def embed(self, tokens: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """What the first block is given, (B, T, C): embeddings of tokens, of their positions, of what they end."""
        T, at = tokens.shape[1], 0 if cache is None else cache.length
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe.weight[at : at + T]
        if self.ngrams is not None:
            seen = tokens if cache is None else cache.seen(tokens)
            rows = ngram_rows(seen[:, -(T + self.config.ngrams - 1) :], self.config)
            x = x + self.ngrams(rows[:, -T:]).sum(2)
        return x


class KVCache:
    """Tokens seen so far, (B, size), and each layer's keys and values of them, (B, H, size, D); `length` are filled.

    A size of 0: the model's block_size; a head_size of 0: the model's. Others are for who fills it in a way of his own.
    """

    def __init__(
        self, model: GPT, batch_size: int, size: int = 0, dtype: torch.dtype = torch.float32, head_size: int = 0
    ) -> None:
        config = model.config
        D = head_size or config.n_embd // config.n_head
        shape = (batch_size, config.n_head, size or config.block_size, D)
        device = model.wte.weight.device
        self.keys, self.values = torch.zeros(2, config.n_layer, *shape, device=device, dtype=dtype)
        self.tokens = torch.zeros(batch_size, shape[2], device=device, dtype=torch.int64)
        self.length = 0

    def seen(self, tokens: Tensor) -> Tensor:
        """Store tokens (B, T) after what is there; return all."""
        end = self.length + tokens.shape[1]
        self.tokens[:, self.length : end] = tokens
        return self.tokens[:, :end]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) after what is there; return all keys and values of the layer."""
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


def ngram_rows(tokens: Tensor, config: ModelConfig) -> Tensor:
    """Which rows stand for the last n of tokens (B, T), at each of them and for n = 2 ... N: (B, T, N - 1), int64.

    Each n has `config.ngram_rows` of its own, and n-grams find theirs by a hash, so that the table is of one size for
    any vocabulary; those that meet in a row share it (Pagnoni et al. 2024, section 3.2.1).
    """
    ids, found = tokens + 1, []  # zero stands for what is before the first
    key = ids
    for n in range(2, config.ngrams + 1):  # a number with the ids as its digits, the newest first
        key = (key * HASH_BASE + F.pad(ids, (n - 1, 0))[:, : ids.shape[1]]) % HASH_PRIME
        found.append(key % config.ngram_rows + (n - 2) * config.ngram_rows)
    return torch.stack(found, dim=-1)


def rope_tables(block_size: int, head_size: int) -> tuple[Tensor, Tensor]:
    """What `rotate` takes: cos and +-sin of position x frequency, each (block_size, 1, D), float32 (Su et al. 2021)."""
    if torch.get_default_device().type == "meta":  # shapes without values, as of Linear
        return torch.empty(block_size, 1, head_size), torch.empty(block_size, 1, head_size)
    frequencies = ROPE_BASE ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angles = torch.outer(torch.arange(block_size, dtype=torch.float64), frequencies)[:, None]
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of (B, T, N, D) by their position's angles, (T, 1, D) each.

    (a, b) becomes (a cos - b sin, b cos + a sin): x cos + (b, a)(-sin, sin).
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@torch.no_grad()
def init_weights(model: GPT, seed: int) -> None:
    """GPT-2's initialization: normal(0, 0.02), residual projections over sqrt(2 n_layer), biases zero.

    With `zero_init`, residual projections and an untied head start at zero instead; embeddings of n-grams always do, so
    that one never seen adds nothing. Drawn on the CPU from a generator of its own, so the weights depend on the seed
    alone, not on the device or on what was drawn before.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = INIT_STD / math.sqrt(2 * model.config.n_layer)
    for name, parameter in model.named_parameters():
        is_residual, is_head = name.endswith("proj.weight"), name == "head.weight"
        if parameter.dim() < 2:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif name == "ngrams.weight" or (model.config.zero_init and (is_residual or is_head)):
            parameter.zero_()
        else:
            std = residual_std if is_residual else INIT_STD
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
