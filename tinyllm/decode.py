"""One token after another, in compiled loops: what `model(token, cache)` computes, for models on a CPU.

    decoder = Decoder(model, n_texts=1, size=256)
    logits = decoder(prompt)                     # (B, T) -> (B, V), those after its last token
    logits = decoder(token)                      # (B, 1) -> (B, V), and so on

A small model's token takes less time than torch needs to start its two hundred operations. Here it is one call of
compiled code (`kernels.sampling.say`), shared out among the cores: weights are read once, all else stays in a core's
own memory.
"""

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm.fast import EPS
from tinyllm.kernels import NONE, sampling
from tinyllm.kernels.sampling import ACTIVATIONS, TILE, Array, Form, Packed, Room, Stack
from tinyllm.kernels.tiles import SIDE, has_units
from tinyllm.kernels.vectors import WIDTH
from tinyllm.model import GPT, KVCache

ROWS = 512  # new tokens, of all texts, that are read at once


class Decoder:
    """A GPT on a CPU, its weights copied, and a cache for so many texts of `size` tokens (0: the model's block_size).

    Packed it reckons in bfloat16, else in float32: `kernels/sampling.py` says what that means.
    """

    def __init__(self, model: GPT, n_texts: int, size: int = 0, packed: bool = False) -> None:
        config, block = model.config, model.blocks[0]
        self.model, self.packed = model, packed
        D = up_to(config.n_embd // config.n_head, 2 * WIDTH)
        self.cache = KVCache(model, n_texts, size, torch.bfloat16, D) if packed else KVCache(model, n_texts, size)
        self.past = bits(self.cache.keys), bits(self.cache.values)
        self.units = True if packed and has_units() else None
        self.positions = min(max(1, ROWS // n_texts), self.cache.tokens.shape[1]) if packed else 1  # read at once
        self.stack, self.head = weights_of(model, packed)
        self.form = Form(
            block.norm_1.eps,
            config.norm == "rmsnorm",
            config.n_embd // config.n_head,
            EPS if config.qk_norm else 0.0,
            block.mlp.proj.in_features,
            ACTIVATIONS.index(config.activation),
        )
        self.wte, self.wpe = array(model.wte.weight), None if model.wpe is None else array(model.wpe.weight)
        self.final = array(model.norm.weight), array(getattr(model.norm, "bias", None))
        self.rope = None if model.wpe is not None else (array(model.rope_cos[:, 0]), array(model.rope_sin[:, 0]))
        self.room, self.logits = self.made_room(n_texts)

    def made_room(self, n_texts: int) -> tuple[Room, Array]:
        """Room for as many new tokens as are read at once, and for the logits after them."""
        config, mlp, n = self.model.config, self.model.blocks[0].mlp, n_texts * self.positions
        size, D = self.cache.keys.shape[3:]

        def sums(width: int, rows: int = n) -> Array:
            if self.packed:
                return np.zeros((up_to(rows, SIDE), up_to(width, SIDE)), np.float32)
            return np.zeros((rows if rows == 1 else up_to(rows, TILE), width), np.float32)

        def factors(width: int) -> Array | Packed:
            if self.packed:  # some more, so that rows do not crowd in the same lines of a core's memory
                return np.zeros((up_to(n, SIDE), up_to(width, 2 * SIDE) + 2 * SIDE), np.uint16)
            return sums(width)

        room = Room(
            x=sums(config.n_embd),
            normed=factors(config.n_embd),
            qkv=sums(3 * config.n_embd),
            said=factors(config.n_embd),
            fc=sums(mlp.fc.out_features),
            active=factors(mlp.proj.in_features),
            queries=np.zeros((n_texts, config.n_head, D), np.float32),
            scores=np.zeros((n_texts, config.n_head, size), np.float32),
        )
        return room, sums(self.model.vocab_size, rows=n_texts)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V), float32, after tokens (B, T) that go on from the cache; they are true until the next call."""
        B, T = tokens.shape
        if T > 1 and not self.packed:  # torch is as fast, where there is no way but float32
            return self.model(tokens, self.cache)[:, -1]
        for part in tokens.split(self.positions, dim=1):
            self.read(part)
        last = part.shape[1]
        self.room.x[:B] = self.room.x[last - 1 : B * last : last]
        sampling.conclude(B, self.room, self.form, *self.final, self.head, self.logits, self.units)
        return torch.from_numpy(self.logits[:B, : self.model.vocab_size])

    def read(self, tokens: Tensor) -> None:
        """Take tokens (B, T), for which there is room, through all blocks."""
        (B, T), at, C = tokens.shape, self.cache.length, self.model.config.n_embd
        if self.model.ngrams is None:
            embedded = self.wte[tokens.numpy()] + (0 if self.wpe is None else self.wpe[at : at + T])
        else:
            embedded = self.model.embed(tokens, self.cache).numpy()
        self.room.x[: B * T, :C] = embedded.reshape(B * T, C)
        cos, sin = (table[at : at + T] for table in self.rope) if self.rope else (NONE[None], NONE[None])
        sampling.say(B * T, self.room, self.stack, *self.past, at, cos, sin, self.form, self.units)
        self.cache.length += T

    @staticmethod
    def draw(logits: Tensor, temperature: float, draws: Tensor) -> Tensor:
        """As `generate.choose` where all tokens are kept: (B, V) and (B,) to (B,), int64, in one call."""
        chosen = torch.zeros(len(draws), dtype=torch.int64)
        sampling.draw(logits.numpy(), temperature, draws.numpy(), chosen.numpy())
        return chosen


def up_to(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


PLACES = {
    "norm_1": "norm_1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm_2": "norm_2",
    "fc": "mlp.fc",
    "mlp": "mlp.proj",
}


def weights_of(model: GPT, packed: bool) -> tuple[Stack, Array | Packed]:
    """Those of all blocks, layer by layer, and the head's; packed into bfloat16, in tiles, or as they are."""
    stack = Stack(**{name: stacked(model, *name.rsplit("_", 1), packed) for name in Stack._fields})
    head = (model.wte if model.head is None else model.head).weight.detach()
    return stack, bits(in_tiles(head[None])[0]) if packed else array(head)


def stacked(model: GPT, place: str, kind: str, packed: bool) -> Array | Packed:
    """A tensor of each block, (n_layer, ...); (n_layer, 0) where they have none."""
    found = [getattr(block.get_submodule(PLACES[place]), kind, None) for block in model.blocks]
    if found[0] is None:
        return np.zeros((len(found), 0), np.float32)
    together = torch.stack([tensor.detach() for tensor in found])
    return bits(in_tiles(together)) if packed and together.dim() == 3 else array(together)


def in_tiles(matrices: Tensor) -> Tensor:
    """Matrices (L, N, K) as `kernels/tiles.py` takes them, (L, N / 16, K / 32, 512), filled up with zeros; bfloat16."""
    N, K = matrices.shape[1:]
    whole = nn.functional.pad(matrices.bfloat16(), (0, -K % (2 * SIDE), 0, -N % SIDE))
    pairs = whole.view(torch.int32).unflatten(2, (-1, SIDE)).unflatten(1, (-1, SIDE))  # (L, N / 16, 16, K / 32, 16)
    return pairs.permute(0, 1, 3, 4, 2).flatten(3).view(torch.bfloat16)


def bits(tensor: Tensor) -> Array | Packed:
    """A tensor's memory, as NumPy sees it, which knows no bfloat16."""
    return array(tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor)


def array(tensor: Tensor | None) -> Array:
    """The same, of one in float32, or of none."""
    return NONE if tensor is None else tensor.detach().contiguous().numpy()
