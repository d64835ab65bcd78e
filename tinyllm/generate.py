"""Sampling: a model, a prompt, and new tokens one at a time.

    for ids in generate(model, prompt_ids, Sampling(temperature=0.8, top_p=0.9, seed=1), n_samples=3):
        ...                                  # a list of 3 ids a step; None for a sample that has ended

Each sample is a pure function of (weights, prompt, settings, seed, its index): the random number behind token t of
sample i comes from a counter, so asking for more samples, or for other lengths, changes none of the others (on a CPU,
with the weights of a run in bfloat16, not in a single bit of the logits).
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm import custom
from tinyllm import tokenizer as tok
from tinyllm.checkpoint import Checkpoint, check_sizes, load_weights, run_config
from tinyllm.config import RunConfig
from tinyllm.errors import CheckpointError, TokenizerError
from tinyllm.fast import loops_start_quickly
from tinyllm.model import GPT, KVCache
from tinyllm.runtime import choose_device

if TYPE_CHECKING:
    from tinyllm.decode import Decoder

WORTH_LOADING = 128  # new tokens from which on compiled loops save more time than it takes to load them


@dataclass(frozen=True)
class Sampling:
    """How to choose among the next tokens."""

    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the most likely tokens that together have this probability (Holtzman et al. 2019)
    max_new_tokens: int = 500
    seed: int = 1337

    @property
    def keeps_all(self) -> bool:
        """Whether each token can be chosen, in proportion to its probability."""
        return self.temperature > 0 and not self.top_k and self.top_p >= 1


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    n_samples: int = 1,
    end_token: int | None = None,
    n_tokens: int | None = None,
    block_size: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield, for each new token position, one id a sample; None once a sample has produced `end_token`.

    The prompt (at least one id) is cropped to its last block_size tokens. Beyond the context the window slides: its
    older half is dropped and the rest read again, so a token costs the same however long the text grows. A model of
    one's own has no cache: it needs a `block_size`, and reads that many of the last tokens again each time. An
    embedding may have more rows than the tokenizer has tokens; only the first `n_tokens` (None: all) are chosen from.
    """
    model.eval()
    device = next(model.parameters()).device
    block_size = block_size or model.config.block_size
    history = torch.tensor([list(prompt)[-block_size:]] * n_samples, device=device)
    uniforms = [
        np.random.Generator(np.random.Philox(key=sampling.seed, counter=[0, 0, i, 0])) for i in range(n_samples)
    ]
    ended = [False] * n_samples
    size = min(block_size, history.shape[1] + sampling.max_new_tokens)  # positions that can be needed
    cache, decoder, new = None, None, history
    if isinstance(model, GPT):
        decoder = fast_decoder(model, n_samples, size, sampling.max_new_tokens)
        cache = decoder.cache if decoder else KVCache(model, n_samples, size)
    for _ in range(sampling.max_new_tokens):
        if cache and cache.length + new.shape[1] > block_size:
            cache.length, new = 0, history[:, -max(1, block_size // 2) :]
        if decoder:
            logits = decoder(new)[:, :n_tokens]
        else:
            logits = (model(new, cache) if cache else model(history))[:, -1, :n_tokens]
        draws = torch.tensor([u.random() for u in uniforms], dtype=torch.float64)
        if decoder and sampling.keeps_all:
            chosen = decoder.draw(logits, sampling.temperature, draws)
        else:
            chosen = choose(logits, sampling, draws)
        step_ids = [None if ended[i] or token == end_token else token for i, token in enumerate(chosen.tolist())]
        ended = [token is None for token in step_ids]
        yield step_ids
        if all(ended):
            return
        new = chosen.to(device)[:, None]
        history = torch.cat((history, new), dim=1)[:, -block_size:]


@torch.no_grad()
def as_multiplied(model: GPT) -> None:
    """Round matrices, in place, as each product of a run in bfloat16 does: what is sampled is what was evaluated."""
    for matrix in model.matrices:
        matrix.copy_(matrix.to(torch.bfloat16))


def in_bfloat16(model: GPT) -> bool:
    """Whether all matrices are so: of numbers in float32, the lower halves have no bits."""
    numbers = (matrix.detach().numpy().view(np.uint32) for matrix in model.matrices)
    return not any(np.bitwise_or.reduce(bits, axis=None) & 0xFFFF for bits in numbers)


def fast_decoder(model: GPT, n_samples: int, size: int, n_tokens: int) -> "Decoder | None":
    """What says one token after another faster than the model does itself; None where nothing is.

    In bfloat16 it rounds what the model does not, so that there it says all texts: short ones begin as long ones do.
    """
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
        return None
    packed = in_bfloat16(model)
    if n_tokens < WORTH_LOADING and not packed:
        return None
    from tinyllm.decode import Decoder  # which takes a fifth of a second

    return Decoder(model, n_samples, size, packed) if loops_start_quickly() else None


def choose(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """Next ids (N,), int64, on the CPU, from logits (N, V) and uniform draws (N,) in [0, 1).

    A draw, stretched to the mass of the tokens that are kept, picks from their cumulative distribution (inversion): in
    the order of their ids if all are kept, else in that of their probability, so that top-k and top-p both keep a first
    part of it.
    """
    of_all = logits.cpu().double().numpy()  # whose operations take a fifth of the time of torch's, for few numbers
    if sampling.temperature == 0:
        return torch.from_numpy(of_all.argmax(-1))
    with np.errstate(all="ignore"):  # less the largest nothing overflows but to zero, at the smallest temperature
        scaled = (of_all - of_all.max(-1, keepdims=True)) / sampling.temperature
        if sampling.keeps_all:
            likely = np.exp(scaled.astype(np.float32))  # a tenth of the time of float64's, and exact to 1e-7
            return torch.from_numpy(pick(likely.cumsum(-1, dtype=np.float64), draws.numpy()))
    scaled = torch.from_numpy(scaled)
    ids = likeliest(scaled, sampling)
    ordered, places = scaled.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    ids, of_all = ids.gather(1, places), scaled
    if sampling.top_k:
        ordered, ids = ordered[:, : sampling.top_k], ids[:, : sampling.top_k]
        of_all = ordered
    cumulative = (ordered - of_all.logsumexp(-1, keepdim=True)).exp().cumsum(-1)
    # A token stays if the ones before it have not reached top_p; the first does even for 0.
    before = torch.cat((torch.zeros_like(cumulative[:, :1]), cumulative[:, :-1]), dim=1)
    kept = (before < sampling.top_p).sum(-1, keepdim=True).clamp(min=1)
    mass = cumulative.gather(1, kept - 1)
    places = pick(cumulative.minimum(mass).numpy(), draws.numpy())
    return ids.gather(1, torch.from_numpy(places)[:, None])[:, 0]


def pick(cumulative: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Where draws (N,), stretched to the mass, fall in rows (N, k) that rise to their mass: (N,), int64."""
    places = np.zeros(len(draws), np.int64)
    for i, (row, draw) in enumerate(zip(cumulative, draws, strict=True)):
        last = np.searchsorted(row, row[-1])  # whatever comes after it has no probability
        places[i] = min(np.searchsorted(row, draw * row[-1], side="right"), last, len(row) - 1)
    return places


def likeliest(scaled: Tensor, sampling: Sampling) -> Tensor:
    """Ids, in ascending order, among which are all that top-k and top-p can keep, (N, some): few need to be sorted."""
    size = scaled.shape[-1]
    if 0 < sampling.top_k < size:
        least = scaled.topk(sampling.top_k).values[:, -1:]  # those that are equal to the last stay, too
    else:  # all that are less likely than this have, together, less than the mass that is left out
        left_out = max(1 - sampling.top_p, 0.0) / size
        least = scaled.logsumexp(-1, keepdim=True) + (math.log(left_out) if left_out else -math.inf)
    count = int((scaled >= least).sum(-1).amax().clamp(min=1))
    return scaled.topk(count).indices.sort(-1).values


class Speaker:
    """A checkpoint that can speak: its model, its tokenizer, and how its documents begin and end."""

    def __init__(self, checkpoint: Checkpoint, device: str = "auto", config: RunConfig | None = None) -> None:
        self.config = config or run_config(checkpoint)
        self.step = checkpoint.step
        self.device, _ = choose_device(device)
        self.tokenizer = tok.from_json(checkpoint.tokenizer, where="the checkpoint's tokenizer")
        self.n_tokens = len(tok.vocabulary(self.tokenizer))
        model, vocab_size = self.config.model, checkpoint.vocab_size
        if not 0 < self.n_tokens <= vocab_size:
            what = f"its tokenizer has {self.n_tokens:,} tokens, its model {vocab_size:,} rows for them"
            raise CheckpointError(f"a damaged checkpoint: {what}")
        check_sizes(checkpoint, model)
        self.model = custom.build(model, vocab_size, self.config.train.seed) if model.class_ else GPT(model, vocab_size)
        load_weights(self.model, checkpoint.model)
        if self.config.runtime.dtype == "bfloat16" and not model.class_:
            as_multiplied(self.model)
        self.model.to(self.device)
        if model.class_:
            custom.check_contract(self.model, model, vocab_size)
        # A tokenizer may have an end-of-text token that its training text never showed to the model.
        has_documents = bool(checkpoint.data.get("documents"))
        self.end_token = tok.end_of_text(self.tokenizer) if has_documents else None

    def encode(self, prompt: str) -> list[int]:
        """The prompt's ids, at least one: where documents are marked, each begins after the end of another."""
        ids = tok.encode(self.tokenizer, prompt)
        if self.end_token is not None:
            return [self.end_token, *ids]
        if not ids:  # the text has to begin somewhere: after a line's end, where the tokenizer has one
            with suppress(TokenizerError):
                ids = tok.encode(self.tokenizer, "\n")
        return ids or [0]

    def speak(self, ids: Sequence[int], sampling: Sampling, n_samples: int) -> Iterator[list[str | None]]:
        """Yield for each step the new text of each sample, as soon as its characters are whole; None at its end."""
        pieces = [tok.stream(self.tokenizer) for _ in range(n_samples)]
        limits = {"end_token": self.end_token, "n_tokens": self.n_tokens, "block_size": self.config.model.block_size}
        for step in generate(self.model, ids, sampling, n_samples=n_samples, **limits):
            yield [None if id is None else pieces[i](id) for i, id in enumerate(step)]
