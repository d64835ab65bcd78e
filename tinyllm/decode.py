"""One token after another, in compiled loops: what `model(token, cache)` computes, for models on a CPU.

    cache = KVCache(model, batch_size=1)
    model(prompt, cache)                         # fills the cache
    decoder = Decoder(model, cache)
    logits = decoder(token)                      # (B, 1) -> (B, V), and so on

A small model's token takes less time than torch needs to start its two hundred operations. Here it is one call of
compiled code (`kernels.say`), shared out among the cores: weights are read once, all else stays in a core's own memory.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tinyllm import kernels
from tinyllm.fast import EPS
from tinyllm.kernels import ACTIVATIONS, NONE, TILE, Form, Room, Stack
from tinyllm.model import GPT, KVCache

Array = NDArray[np.float32]


def fits(model: nn.Module) -> bool:
    """Whether the loops are for this model, and quicker than torch."""
    if not isinstance(model, GPT) or any(
        p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()
    ):
        return False
    return kernels.threads_start_quickly(torch.get_num_threads())


class Decoder:
    """A GPT on a CPU, its weights copied, in half of their bytes if they can be, and the cache that it goes on from."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        config, block = model.config, model.blocks[0]
        B, C, hidden = len(cache.tokens), config.n_embd, block.mlp.proj.in_features
        rows = 1 if B == 1 else -(-B // TILE) * TILE
        self.model, self.cache, self.stack, self.head = model, cache, *weights_of(model)
        self.form = Form(
            block.norm_1.eps,
            config.norm == "rmsnorm",
            EPS if config.qk_norm else 0.0,
            ACTIVATIONS.index(config.activation),
        )
        self.wte, self.wpe = array(model.wte.weight), None if model.wpe is None else array(model.wpe.weight)
        self.final = array(model.norm.weight), array(getattr(model.norm, "bias", None))
        self.rope = None if model.wpe is not None else (array(model.rope_cos[:, 0]), array(model.rope_sin[:, 0]))
        widths = C, C, 3 * C, C, block.mlp.fc.out_features, hidden
        rooms = (np.zeros((rows, width), np.float32) for width in widths)
        self.room = Room(*rooms, np.zeros((B, config.n_head, cache.keys.shape[3]), np.float32))
        self.logits = np.zeros((rows, model.vocab_size), np.float32)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V), float32, after tokens (B, 1) that go on from the cache; they are true until the next call."""
        B, at, model = len(tokens), self.cache.length, self.model
        if model.ngrams is None:
            self.room.x[:B] = self.wte[tokens[:, 0].numpy()] + (0 if self.wpe is None else self.wpe[at])
        else:
            self.room.x[:B] = model.embed(tokens, self.cache)[:, 0].numpy()
        cos, sin = (table[at] for table in self.rope) if self.rope else (NONE, NONE)
        past = self.cache.keys.numpy(), self.cache.values.numpy()
        kernels.say(self.room, self.stack, *past, at, cos, sin, self.form, *self.final, self.head, self.logits)
        self.cache.length += 1
        return torch.from_numpy(self.logits[:B])

    @staticmethod
    def draw(logits: Tensor, temperature: float, draws: Tensor) -> Tensor:
        """As `generate.choose` where all tokens are kept: (B, V) and (B,) to (B,), int64, in one call."""
        chosen = torch.zeros(len(draws), dtype=torch.int64)
        kernels.draw(logits.numpy(), temperature, draws.numpy(), chosen.numpy())
        return chosen


PLACES = {
    "norm_1": "norm_1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm_2": "norm_2",
    "fc": "mlp.fc",
    "mlp": "mlp.proj",
}


def weights_of(model: GPT) -> tuple[Stack, Array | NDArray[np.uint16]]:
    """Those of all blocks, layer by layer, and the head's: as bfloat16 where that loses nothing.

    It is their reading that takes the time.
    """
    dtype = torch.bfloat16 if all(map(is_bfloat16, model.matrices)) else torch.float32
    stack = Stack(**{name: stacked(model, *name.rsplit("_", 1), dtype) for name in Stack._fields})
    head = (model.wte if model.head is None else model.head).weight.detach()
    return stack, bits(head.to(dtype))


def is_bfloat16(matrix: Tensor) -> bool:
    """Whether all of its numbers are; some rows at a time, which stay in the cache."""
    return all(torch.equal(rows.to(torch.bfloat16).float(), rows) for rows in matrix.detach().split(256))


def stacked(model: GPT, place: str, kind: str, dtype: torch.dtype) -> Array | NDArray[np.uint16]:
    """A tensor of each block, (n_layer, ...), matrices in `dtype`; (n_layer, 0) where they have none."""
    found = [getattr(block.get_submodule(PLACES[place]), kind, None) for block in model.blocks]
    if found[0] is None:
        return np.zeros((len(found), 0), np.float32)
    return bits(torch.stack([tensor.detach().to(dtype if tensor.dim() > 1 else tensor.dtype) for tensor in found]))


def bits(tensor: Tensor) -> Array | NDArray[np.uint16]:
    """As NumPy has it, which knows no bfloat16."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def array(tensor: Tensor | None) -> Array:
    """A tensor's memory, as NumPy sees it."""
    return NONE if tensor is None else tensor.detach().contiguous().numpy()
