"""A decoder-only transformer, written to be changed. `my-model.toml` trains it.

What tinyllm asks of the class, and no more:

- it is an nn.Module, and `__init__` names what it wants to be given: `vocab_size`, any other key of [model], `config`
  for all of them in one object, or names of its own, which [model.args] in the run config gives values to;
- `forward` takes token ids (B, T), whole numbers, T at most block_size, and returns logits (B, T, vocab_size): at each
  position a score for every token that could come next, found without looking at the tokens after it;
- the weights are drawn in `__init__`, with torch: tinyllm seeds it.

B is the batch, T the time (tokens), C the width (n_embd).
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Each token gathers what it needs from itself and the tokens before it."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, n_head, T, C / n_head)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Attention, then an MLP at each position; both add to what is there."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(n_embd), Attention(n_embd, n_head)
        self.norm_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm_1(x)))
        return x + self.dropout(self.mlp(self.norm_2(x)))


class MyGPT(nn.Module):
    """Token and position embeddings, a few blocks, and a head that shares the token embedding's weights."""

    def __init__(
        self, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int, dropout: float, init_std: float
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, n_embd)
        self.positions = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(Block(n_embd, n_head, dropout) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.head.weight = self.tokens.weight  # tied: one tensor, two uses
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.tokens(tokens) + self.positions.weight[:T]
        return self.head(self.norm(self.blocks(x)))
