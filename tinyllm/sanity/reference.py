"""The built-in GPT once more, slowly: float64, one head and one position at a time, no code of `model.py`.

What `formula` holds the model to. The functions follow the papers named in `model.py`, not its code.
"""

import math

import torch
from torch import Tensor

from tinyllm.config import ModelConfig

Weights = dict[str, Tensor]


def expected_parameters(config: ModelConfig, vocab_size: int) -> int:
    """How many parameters the config describes."""
    d, h = config.n_embd, 4 * config.n_embd
    if config.activation == "swiglu":
        h = math.ceil(8 * d / 3 / 32) * 32
    up = 2 * h if config.activation == "swiglu" else h
    norm = d * (2 if config.norm == "layernorm" and config.bias else 1)
    biases = 3 * d + d + up + d if config.bias else 0
    block = 3 * d * d + d * d + d * up + h * d + biases + 2 * norm
    embeddings = vocab_size * d * (1 if config.tie_embeddings else 2)
    positions = config.block_size * d if config.positions == "learned" else 0
    ngrams = (config.ngrams - 1) * config.ngram_rows * d
    return embeddings + positions + ngrams + config.n_layer * block + norm


def reference_logits(weights: Weights, config: ModelConfig, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) of tokens (B, T), float64, on the CPU."""
    w = {name: tensor.detach().double().cpu() for name, tensor in weights.items()}
    tokens = tokens.cpu()
    x = w["wte.weight"][tokens]
    if config.positions == "learned":
        x = x + w["wpe.weight"][: tokens.shape[1]]
    for n in range(2, config.ngrams + 1):
        found = [[ngram_row(ids[: t + 1][-n:], n, config) for t in range(len(ids))] for ids in tokens.tolist()]
        x = x + w["ngrams.weight"][torch.tensor(found)]
    for layer in range(config.n_layer):
        own = {name.removeprefix(f"blocks.{layer}."): v for name, v in w.items() if name.startswith(f"blocks.{layer}.")}
        x = x + attention(own, config, normalised(own, "norm_1", x, config))
        x = x + mlp(own, config, normalised(own, "norm_2", x, config))
    x = normalised(w, "norm", x, config)
    return x @ w["wte.weight" if config.tie_embeddings else "head.weight"].T


def ngram_row(last: list[int], n: int, config: ModelConfig) -> int:
    """The row of the last n ids: the digits of a number, the newest first, those missing as zero."""
    number = sum((token + 1) * 1_640_531_527 ** (n - 1 - age) for age, token in enumerate(reversed(last)))
    return (n - 2) * config.ngram_rows + number % (2**31 - 1) % config.ngram_rows


def normalised(w: Weights, name: str, x: Tensor, config: ModelConfig) -> Tensor:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019) over the last dimension."""
    if config.norm == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
    return y + w.get(f"{name}.bias", torch.zeros(1, dtype=torch.float64))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1, dtype=torch.float64))


def attention(w: Weights, config: ModelConfig, x: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v over the tokens so far (Vaswani et al. 2017), each head on its own slice."""
    C, D = config.n_embd, config.n_embd // config.n_head
    q, k, v = linear(w, "attn.qkv", x).split(C, dim=-1)
    heads = []
    for start in range(0, C, D):
        qh, kh, vh = (part[..., start : start + D] for part in (q, k, v))
        if config.qk_norm:
            eps = torch.finfo(torch.float32).eps  # what F.rms_norm takes
            qh, kh = (t / (t.square().mean(-1, keepdim=True) + eps).sqrt() for t in (qh, kh))
        if config.positions == "rope":
            qh, kh = rotated(qh), rotated(kh)
        rows = []
        for t in range(x.shape[1]):
            scores = (kh[:, : t + 1] * qh[:, t : t + 1]).sum(-1) / math.sqrt(D)
            shares = (scores - scores.amax(-1, keepdim=True)).exp()
            shares = shares / shares.sum(-1, keepdim=True)
            rows.append((shares[..., None] * vh[:, : t + 1]).sum(1))
        heads.append(torch.stack(rows, dim=1))
    return linear(w, "attn.proj", torch.cat(heads, dim=-1))


def rotated(x: Tensor) -> Tensor:
    """(B, T, D) with the pair (x[i], x[i + D/2]) of position t turned by t / 10000^(2i/D) (Su et al. 2021)."""
    T, half = x.shape[1], x.shape[2] // 2
    angle = torch.arange(T).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    as_complex = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((as_complex.real, as_complex.imag), dim=-1)


def mlp(w: Weights, config: ModelConfig, x: Tensor) -> Tensor:
    """C -> hidden -> C with the config's activation."""
    x = linear(w, "mlp.fc", x)
    if config.activation == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        x = gate / (1 + (-gate).exp()) * up
    elif config.activation == "relu2":
        x = x.clamp(min=0) ** 2
    elif config.activation == "gelu":
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    else:
        x = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return linear(w, "mlp.proj", x)
