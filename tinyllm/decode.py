"""One token after another, in compiled loops: what `model(token, cache)` computes, for models on a CPU.

    cache = KVCache(model, batch_size=1)
    model(prompt, cache)                         # fills the cache
    decoder = Decoder(model, cache)
    logits = decoder(token)                      # (B, 1) -> (B, V), and so on

A small model's token takes less time than torch needs to start its two hundred operations. Here a block is eight loops
(`kernels.py`), shared out among the cores: weights are read once, all else stays in a core's own memory.
"""

from typing import NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyllm import kernels
from tinyllm.fast import EPS
from tinyllm.kernels import ACTIVATIONS, NONE, TILE
from tinyllm.model import GPT, KVCache

Array = NDArray[np.float32]


class Layer(NamedTuple):
    """A layer's weight and bias, or a norm's; NONE for a bias that there is not."""

    weight: Array
    bias: Array


def fits(model: nn.Module) -> bool:
    """Whether the loops are for this model, and quicker than torch."""
    if not isinstance(model, GPT) or any(
        p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()
    ):
        return False
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    one = np.zeros((1, 1), np.float32)
    kernels.linear(one, one, NONE, one, False)  # only after that is it known what starts the threads
    return numba.threading_layer() != "workqueue"  # which takes a tenth of a millisecond for it


class Decoder:
    """A GPT on a CPU, and the cache that it goes on from."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        config, block = model.config, model.blocks[0]
        B, C, hidden = len(cache.tokens), config.n_embd, block.mlp.proj.in_features
        rows = 1 if B == 1 else -(-B // TILE) * TILE
        self.model, self.cache = model, cache
        self.blocks = [tuple(layer_of(m) for m in layers_of(block)) for block in model.blocks]
        self.past = [(array(k), array(v)) for k, v in zip(cache.keys, cache.values, strict=True)]
        self.norm, self.head = (
            layer_of(model.norm),
            Layer(packed(model.wte if model.head is None else model.head), NONE),
        )
        self.activation, self.qk_eps = ACTIVATIONS.index(config.activation), EPS if config.qk_norm else 0.0
        self.how_normed = block.norm_1.eps, config.norm == "rmsnorm"
        self.rope = None if model.wpe is not None else (array(model.rope_cos[:, 0]), array(model.rope_sin[:, 0]))
        widths = C, C, 3 * C, C, block.mlp.fc.out_features, hidden, model.vocab_size
        self.x, self.normed, self.qkv, self.said, self.fc, self.active, self.logits = (
            np.zeros((rows, width), np.float32) for width in widths
        )
        self.scores = np.zeros((B, config.n_head, cache.keys[0].shape[2]), np.float32)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V), float32, after tokens (B, 1) that go on from the cache; they are true until the next call."""
        B, at = len(tokens), self.cache.length
        self.x[:B] = self.model.embed(tokens, self.cache)[:, 0].numpy()
        cos, sin = (table[at] for table in self.rope) if self.rope else (NONE, NONE)
        for (norm_1, qkv, proj, norm_2, fc, mlp_proj), past in zip(self.blocks, self.past, strict=True):
            kernels.norm(self.x, *norm_1, *self.how_normed, self.normed)
            kernels.linear(self.normed, *qkv, self.qkv, False)
            kernels.attend(self.qkv, *past, at, self.qk_eps, cos, sin, self.scores, self.said)
            kernels.linear(self.said, *proj, self.x, True)
            kernels.norm(self.x, *norm_2, *self.how_normed, self.normed)
            kernels.linear(self.normed, *fc, self.fc, False)
            kernels.activate(self.fc, self.activation, self.active)
            kernels.linear(self.active, *mlp_proj, self.x, True)
        self.cache.length += 1
        kernels.norm(self.x, *self.norm, *self.how_normed, self.normed)
        kernels.linear(self.normed, *self.head, self.logits, False)
        return torch.from_numpy(self.logits[:B])


def layers_of(block: nn.Module) -> tuple[nn.Module, ...]:
    """In the order in which they are used."""
    return block.norm_1, block.attn.qkv, block.attn.proj, block.norm_2, block.mlp.fc, block.mlp.proj


def layer_of(module: nn.Module) -> Layer:
    bias = getattr(module, "bias", None)  # an RMSNorm has none
    weight = array(module.weight) if module.weight.dim() < 2 else packed(module)
    return Layer(weight, NONE if bias is None else array(bias))


def packed(module: nn.Module) -> Array | NDArray[np.uint16]:
    """A matrix in half of its bytes, as bfloat16, where that loses nothing: it is their reading that takes the time."""
    weight = module.weight.detach()
    half = weight.to(torch.bfloat16)
    return half.view(torch.uint16).numpy() if torch.equal(half.float(), weight) else array(weight)


def array(tensor: Tensor) -> Array:
    """A tensor's memory, seen by NumPy."""
    return tensor.detach().contiguous().numpy()
