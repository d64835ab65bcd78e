"""Mistakes in a model of one's own: those of tutorials, forums and first drafts."""

from planted.bug import Bug
from planted.bug import bug as any_bug

MASK = 'scores = scores.masked_fill(self.mask[:T, :T], float("-inf"))'
SOFTMAX = "weights = F.softmax(scores, dim=-1)"
TRIU = "torch.triu(torch.ones(block_size, block_size, dtype=torch.bool), diagonal=1)"
ATTENTION = "x = x + self.dropout(self.attn(self.norm_1(x)))"
LOOP = "            x = block(x)\n"
TIE = "        self.head.weight = self.tok.weight\n"
NORM = "nn.LayerNorm(n_embd)"
# A norm of one's own, put before the attention; what it does is written in its place.
OWN_NORM = """class Norm(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x):
        return self.weight * {}


class Attention(nn.Module):
"""


def bug(name: str, what: str, caught_by: str | tuple[str, ...], *edits: tuple, **more) -> Bug:
    """A bug in my_model.py, which the name says and the edits need not."""
    return any_bug(f"my model: {name}", what, caught_by, *(("my_model.py", *edit) for edit in edits), **more)


def own_norm(formula: str) -> tuple[tuple, ...]:
    return (("class Attention(nn.Module):\n", OWN_NORM.format(formula)), (NORM, "Norm(n_embd)", 3))


BUGS = [
    # ---- The mask ----
    bug("no mask", "forgotten", "causal mask", (MASK + "\n", "\n")),
    bug("mask off by one", "diagonal=2: each token sees the next", "causal mask", ("diagonal=1", "diagonal=2")),
    bug(
        "mask too strict",
        "diagonal=0: the first token sees nothing, and is NaN",
        "output",
        ("diagonal=1", "diagonal=0"),
    ),
    bug(
        "mask inverted",
        "True means the opposite elsewhere",
        "causal mask",
        (TRIU, TRIU.replace("triu", "tril").replace("=1", "=-1")),
    ),
    bug("masked with zero", "0 before the softmax is a score like any other", "causal mask", ('float("-inf")', "0.0")),
    bug("masked with -1e-9", "-1e9 was meant", "causal mask", ('float("-inf")', "-1e-9")),
    bug(
        "masked after the softmax",
        "the future is still in the denominator",
        "causal mask",
        (MASK + "\n", "\n"),
        (SOFTMAX, "weights = F.softmax(scores, dim=-1).masked_fill(self.mask[:T, :T], 0.0)"),
    ),
    bug(
        "masked_fill without using its result",
        "it is not in place",
        "causal mask",
        (MASK, MASK.replace("scores = ", "")),
    ),
    # ---- Attention ----
    bug("softmax over the queries", "dim=-2", "causal mask", ("dim=-1", "dim=-2")),
    bug(
        "softmax over the batch",
        "dim=0; masked everywhere at once, that is 0 / 0",
        ("output", "batch rows"),
        ("dim=-1", "dim=0"),
    ),
    bug(
        "softmax over the batch, masked with -1e9",
        "the same without the NaN",
        ("batch rows", "causal mask"),
        ("dim=-1", "dim=0"),
        ('float("-inf")', "-1e9"),
    ),
    bug("scale missing", "q @ k.T, no 1 / sqrt(D)", "attention scale", (" / math.sqrt(D)", ""), warns=True),
    bug(
        "scale inverted", "times for divided by", "attention scale", (" / math.sqrt(D)", " * math.sqrt(D)"), warns=True
    ),
    bug(
        "scale of the whole width",
        "sqrt(C), where each head has D",
        "attention scale",
        ("math.sqrt(D)", "math.sqrt(C)"),
        warns=True,
    ),
    bug(
        "scaled after the softmax",
        "weights that do not sum to one",
        "attention scale",
        (" / math.sqrt(D)", ""),
        (SOFTMAX, SOFTMAX + " / math.sqrt(D)"),
        warns=True,
    ),
    bug(
        "heads by view alone",
        "view(B, H, T, D): a head reads pieces of several tokens",
        "causal mask",
        ("view(B, T, H, D).transpose(1, 2)", "view(B, H, T, D)", 3),
    ),
    bug(
        "heads joined without a transpose",
        "reshape straight after attention",
        "causal mask",
        ("y = y.transpose(1, 2).reshape(B, T, C)", "y = y.reshape(B, T, C)"),
    ),
    bug(
        "batch and time swapped",
        "nn.MultiheadAttention expects time first, unless it is told batch_first=True",
        ("batch rows", "causal mask"),
        (
            "        self.value = nn",
            "        self.attn = nn.MultiheadAttention(n_embd, n_head, dropout)\n        self.value = nn",
        ),
        (
            "        B, T, C = x.shape\n",
            "        mask = self.mask[: len(x), : len(x)]\n"
            "        return self.attn(x, x, x, attn_mask=mask, need_weights=False)[0]\n"
            "        B, T, C = x.shape\n",
        ),
    ),
    bug("keys from the queries' layer", "copy and paste", "gradient reach", ("k = self.key(x)", "k = self.query(x)")),
    bug("values are the keys", "copy and paste", "gradient reach", ("v = self.value(x)", "v = self.key(x)")),
    bug(
        "attention to oneself only",
        "a mask from below and from above",
        "context",
        (TRIU, "~torch.eye(block_size, dtype=torch.bool)"),
    ),
    # ---- Norms ----
    bug(
        "norm over time",
        "mean(1): each position knows of all others",
        "causal mask",
        *own_norm("(x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()"),
    ),
    bug(
        "norm over the batch",
        "mean(0)",
        "batch rows",
        *own_norm("(x - x.mean(0, keepdim=True)) / (x.var(0, keepdim=True, correction=0) + 1e-5).sqrt()"),
    ),
    bug(
        "BatchNorm",
        "in training each row sees all rows, and the future",
        ("batch rows", "causal mask"),
        (
            "class Attention(nn.Module):\n",
            "class Norm(nn.BatchNorm1d):\n"
            "    def forward(self, x):\n"
            "        return super().forward(x.transpose(1, 2)).transpose(1, 2)\n"
            "\n"
            "\n"
            "class Attention(nn.Module):\n",
        ),
        (NORM, "Norm(n_embd)", 3),
    ),
    bug(
        "RMSNorm without the root",
        "x / mean(x^2)",
        ("building blocks", "initial loss", "initial weights"),
        *own_norm("x / (x.pow(2).mean(-1, keepdim=True) + 1e-6)"),
        warns=True,
    ),
    bug(
        "one norm for both branches",
        "norm_1 copied, its number was not changed",
        "gradient reach",
        ("self.fc(self.norm_2(x))", "self.fc(self.norm_1(x))"),
    ),
    # ---- Structure ----
    bug("a block never runs", "blocks[1:]", "layers", ("for block in self.blocks:", "for block in self.blocks[1:]:")),
    bug("a block runs twice", "the line is there twice", "layers", (LOOP, LOOP + LOOP), warns=True),
    bug(
        "every block gets the embedding",
        "h = block(x): only the last one counts",
        ("layers", "gradient reach"),
        (LOOP, "            h = block(x)\n"),
        ("        x = self.norm(x)\n", "        x = self.norm(h)\n"),
    ),
    bug(
        "[block] * n",
        "one block, n times",
        ("parameters", "layers"),
        (
            "[Block(n_embd, n_head, block_size, dropout) for _ in range(n_layer)]",
            "[Block(n_embd, n_head, block_size, dropout)] * n_layer",
        ),
        warns=True,
    ),
    bug(
        "blocks in a plain list",
        "no ModuleList: the optimizer never hears of them",
        ("parameters", "layers"),
        (
            "nn.ModuleList([Block(n_embd, n_head, block_size, dropout) for _ in range(n_layer)])",
            "[Block(n_embd, n_head, block_size, dropout) for _ in range(n_layer)]",
        ),
    ),
    bug(
        "tied by data",
        "head.weight.data = tok.weight.data: two parameters in one memory, stepped twice",
        "parameters",
        (TIE, "        self.head.weight.data = self.tok.weight.data\n"),
    ),
    bug(
        "no residual",
        "x = attn(...)",
        "residual stream",
        (ATTENTION, ATTENTION.replace("x + ", "")),
        warns=True,
    ),
    bug(
        "no activation",
        "gelu left out: two matrices in a row",
        ("layers", "short run"),
        ("        h = F.gelu(h)\n", ""),
        missed="attention and the norms are not linear, so the model learns all the same, only less",
    ),
    bug(
        "a ReLU after the head",
        "a habit",
        ("output", "initial loss", "gradient reach"),
        ("return self.head(x)", "return F.relu(self.head(x))"),
    ),
    bug(
        "a tanh at the end",
        "logits between -1 and 1: never sure of anything",
        ("output", "overfit one batch"),
        ("return self.head(x)", "return torch.tanh(self.head(x))"),
    ),
    bug(
        "softmax at the end",
        "probabilities, of which the loss takes the softmax again",
        "output",
        ("return self.head(x)", "return F.softmax(self.head(x), dim=-1)"),
    ),
    bug(
        "logits of the last position only",
        "as generation needs them",
        ("refused", "output"),
        ("return self.head(x)", "return self.head(x[:, [-1]])"),
    ),
    bug(
        "logits with the axes swapped",
        "(B, V, T), as cross_entropy wants them elsewhere",
        ("refused", "output"),
        ("return self.head(x)", "return self.head(x).transpose(1, 2)"),
    ),
    bug(
        "a block in no_grad",
        "pasted from the generation loop",
        "gradient reach",
        (
            "        for block in self.blocks:\n" + LOOP,
            "        with torch.no_grad():\n            x = self.blocks[0](x)\n        for block in self.blocks[1:]:\n"
            + LOOP,
        ),
    ),
    bug(
        "a tensor through NumPy",
        "x.detach().numpy() for a home-made function",
        "gradient reach",
        ("h = F.gelu(h)", "h = torch.from_numpy(h.detach().numpy().clip(0))"),
    ),
    bug(
        "a parameter that is a plain tensor",
        "torch.zeros(...) without nn.Parameter: positions that never learn",
        ("parameters", "gradient reach"),
        ("self.pos = nn.Embedding(block_size, n_embd)", "self.pos = 0.02 * torch.randn(block_size, n_embd)"),
        ("self.pos(torch.arange(T, device=tokens.device))", "self.pos[:T]"),
        warns=True,
    ),
    # ---- Positions ----
    bug(
        "positions made and not used",
        "pos(...) left out of the sum",
        ("gradient reach", "context"),
        (" + self.pos(torch.arange(T, device=tokens.device))", ""),
    ),
    bug(
        "every token at position 0",
        "zeros for arange",
        ("gradient reach", "context"),
        ("torch.arange(T, device=tokens.device)", "torch.zeros(T, dtype=torch.long)"),
        warns=True,
    ),
    bug(
        "words in a bag",
        "no positions, and a mean in place of attention: the order is lost",
        ("context", "gradient reach", "building blocks"),
        (" + self.pos(torch.arange(T, device=tokens.device))", ""),
        ("scores = q @ k.transpose(-2, -1) / math.sqrt(D)", "scores = torch.zeros(B, H, T, T)"),
    ),
    bug(
        "only the last tokens count",
        "the context cut to 4 by a debugging slice",
        "context",
        (MASK, MASK + "\n        scores = scores.masked_fill(self.mask.T[:T, :T].roll(3, 0).tril(-3), float('-inf'))"),
        warns=True,
    ),
    # ---- Initial weights ----
    bug(
        "torch's own init, tied",
        "an embedding of std 1 is the head, too: a loss of tens",
        ("initial weights", "initial loss"),
        ("        self.apply(self.init)\n", ""),
    ),
    bug(
        "init std 0.2",
        "one zero too few",
        ("initial weights", "initial loss"),
        ("nn.init.normal_(module.weight, std=0.02)", "nn.init.normal_(module.weight, std=0.2)"),
    ),
    bug(
        "init std 1",
        "normal_() without a std",
        ("initial weights", "initial loss"),
        ("nn.init.normal_(module.weight, std=0.02)", "nn.init.normal_(module.weight)"),
    ),
    bug(
        "all zero",
        "zeros_ for weights and biases",
        ("initial weights", "gradient reach", "weights move"),
        ("nn.init.normal_(module.weight, std=0.02)", "nn.init.zeros_(module.weight)"),
        ("nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer))", "nn.init.zeros_(parameter)"),
    ),
    bug(
        "weights from uninitialised memory",
        "torch.empty and no init",
        ("initial weights", "output"),
        (
            "        self.head.weight = self.tok.weight\n",
            "        self.head.weight = nn.Parameter(torch.full((vocab_size, n_embd), float('nan')))\n",
        ),
        (
            "            nn.init.normal_(module.weight, std=0.02)\n",
            "            nn.init.normal_(module.weight, std=0.02) if module is not self.head else None\n",
        ),
    ),
    bug(
        "padding_idx = 0",
        "token 0 is a real one here, and its embedding stays zero",
        ("initial weights", "gradient reach", "gradient"),
        ("nn.Embedding(vocab_size, n_embd)", "nn.Embedding(vocab_size, n_embd, padding_idx=0)"),
        (TIE, ""),
    ),
    # ---- Dropout ----
    bug(
        "F.dropout without the mode",
        "on unless told otherwise",
        "dropout",
        ("h = F.gelu(h)", "h = F.dropout(F.gelu(h), 0.1)"),
    ),
    bug(
        "nn.Dropout made in forward",
        "a new module is always in training mode",
        "dropout",
        ("        x = self.dropout(x)\n", "        x = nn.Dropout(0.1)(x)\n"),
    ),
    bug(
        "the share that is kept",
        "nn.Dropout(1 - dropout)",
        ("dropout", "settings"),
        ("        self.dropout = nn.Dropout(dropout)\n", "        self.dropout = nn.Dropout(1 - dropout)\n", 3),
        warns=True,
    ),
    bug(
        "dropout argument not used",
        "made, never called",
        "dropout",
        ("x + self.dropout(self.attn(", "x + (self.attn("),
        ("x + self.dropout(self.proj(h))", "x + self.proj(h)"),
        ("        x = self.dropout(x)\n", ""),
        ("self.dropout(weights)", "weights"),
    ),
    bug(
        "noise in evaluation",
        "randn added for robustness, whatever the mode",
        ("dropout", "evaluation"),
        ("        x = self.dropout(x)\n", "        x = self.dropout(x + 0.01 * torch.randn_like(x))\n"),
    ),
    # ---- State ----
    bug(
        "a memory between batches",
        "a cache that is never cleared",
        "output",
        (
            "        x = self.dropout(x)\n",
            "        x = self.dropout(x)\n"
            "        if getattr(self, 'last', None) is not None and self.last.shape == x.shape:\n"
            "            x = x + 0.5 * self.last\n"
            "        self.last = x.detach()\n",
        ),
    ),
    bug(
        "a buffer that does not belong to the weights",
        "running statistics that the forward pass moves, and no checkpoint keeps",
        ("output", "checkpoint", "repeatable"),
        (
            "        self.apply(self.init)\n",
            "        self.apply(self.init)\n        self.register_buffer('scale', torch.ones(()), persistent=False)\n",
        ),
        (
            "        x = self.norm(x)\n",
            "        x = self.norm(x) / self.scale.clone()\n"
            "        if self.training:\n"
            "            self.scale.mul_(0.9).add_(0.1 * x.detach().std())\n",
        ),
    ),
    bug(
        "works for the full context only",
        "block_size where T belongs",
        ("refused", "output", "generation"),
        ("self.mask[:T, :T]", "self.mask"),
        ("torch.arange(T, device=tokens.device)", "torch.arange(len(self.pos.weight))"),
    ),
    bug(
        "float16 in the middle",
        "half() for speed: what is above 65,504 becomes infinite",
        ("precision", "output", "gradient reach", "gradient"),
        (
            "scores = q @ k.transpose(-2, -1)",
            "scores = ((1e4 * q).half() @ (1e4 * k).half().transpose(-2, -1)).float() / 1e8",
        ),
    ),
]
