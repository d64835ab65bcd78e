"""The yardstick: a GPT and its training loop as the tutorials teach them, in one file, with nanoGPT's settings.

    python benchmarks/textbook.py input.txt --size cpu --steps 20      # seconds a step, and a token of sampling

float32, dropout inside attention, batches stacked in Python, `.item()` at each step, sampling without a cache. Nothing
in it is made slow on purpose: it is what one writes first, and what many runs use. It imports nothing of tinyllm.
Prints one JSON object: the seconds of each step, the losses, the seconds of each new token, and the peak of memory.
"""

import argparse
import json
import math
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# nanoGPT's config/train_shakespeare_char.py: with the flags its README gives for a CPU, and as it is.
SIZES = {
    "cpu": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 12, "dropout": 0.0},
    "char": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64, "dropout": 0.2},
}


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, block_size: int, dropout: float) -> None:
        super().__init__()
        self.n_head = n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(n_embd, bias=False), nn.LayerNorm(n_embd, bias=False)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.out = nn.Linear(4 * n_embd, n_embd, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.p = dropout

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        heads = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.qkv(self.norm_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(*heads, is_causal=True, dropout_p=self.p if self.training else 0.0)
        x = x + self.dropout(self.proj(y.transpose(1, 2).reshape(B, T, C)))
        return x + self.dropout(self.out(F.gelu(self.fc(self.norm_2(x)))))


class GPT(nn.Module):
    def __init__(
        self, vocab_size: int, n_layer: int, n_head: int, n_embd: int, block_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.tokens, self.places = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(n_embd, n_head, block_size, dropout) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(n_embd, bias=False)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.apply(self.init)
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "out.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer))
        self.head.weight = self.tokens.weight

    @staticmethod
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(self.dropout(x))))

    @torch.no_grad()
    def generate(self, x: Tensor, seconds: list[float], n: int) -> Tensor:
        self.eval()
        for _ in range(n):
            start = time.perf_counter()
            logits = self(x[:, -self.block_size :])[:, -1] / 0.8
            x = torch.cat((x, torch.multinomial(F.softmax(logits, dim=-1), 1)), dim=1)
            seconds.append(time.perf_counter() - start)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=0, help="to sample afterwards")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(1337)
    text = options.text.read_text(encoding="utf-8")
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[c] for c in text[: int(0.9 * len(text))]])
    shape = dict(SIZES[options.size])
    batch_size, block_size = shape.pop("batch_size"), shape["block_size"]
    model = GPT(len(ids), **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    steps: list[float] = []
    losses: list[float] = []
    for _ in range(options.steps):
        start = time.perf_counter()
        places = torch.randint(len(data) - block_size, (batch_size,))
        x = torch.stack([data[i : i + block_size] for i in places])
        y = torch.stack([data[i + 1 : i + 1 + block_size] for i in places])
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        steps.append(time.perf_counter() - start)
    tokens: list[float] = []
    model.generate(torch.zeros((1, 1), dtype=torch.long), tokens, options.tokens)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"steps": steps, "losses": losses, "tokens": tokens, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
