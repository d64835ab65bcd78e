"""The zoo: runs of all kinds, as different as people want them, in which no check may fail."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from planted.bug import MY_MODEL, Edit
from planted.harness import BASE, CUSTOM, Outcome, run
from tinyllm.config import load
from tinyllm.tales import stories

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAKESPEARE = Path(__file__).parents[3] / "shared/data/tinyshakespeare.txt"
# What is large in an example is cut; what is special to it stays.
CUT = {
    "model.n_layer": 2,
    "model.n_head": 2,
    "model.n_embd": 32,
    "runtime.compile": False,
    "runtime.device": "cpu",
    "runtime.dtype": "float32",
    "runtime.threads": 1,
    "data.val_fraction": 0.1,
}


@dataclass(frozen=True)
class Healthy:
    """A run with nothing wrong."""

    name: str
    set: tuple[str, ...] = ()  # overrides of the base, or of the example
    edits: tuple[Edit, ...] = ()  # of my_model.py: other designs
    custom: bool = False
    example: str = ""


def gpt(name: str, *overrides: str) -> list[Healthy]:
    """Overrides with both recipes."""
    return [Healthy(f"{recipe}: {name}", (f"model.recipe={recipe}", *overrides)) for recipe in ("gpt2", "modern")]


def one(name: str, *overrides: str) -> list[Healthy]:
    return [Healthy(name, overrides)]


def mine(name: str, *edits: tuple, set: tuple[str, ...] = ()) -> list[Healthy]:
    """my_model.py in another design."""
    return [Healthy(f"my model: {name}", set, tuple(Edit(MY_MODEL.name, *edit) for edit in edits), custom=True)]


TIE = ("        self.head.weight = self.tok.weight\n", "")
DEFAULT_INIT = ("        self.apply(self.init)\n", "")
NO_POSITIONS = (
    ("        self.pos = nn.Embedding(block_size, n_embd)\n", ""),
    (" + self.pos(torch.arange(T, device=tokens.device))", ""),
)
BLOCKS = "nn.ModuleList([Block(n_embd, n_head, block_size, dropout) for _ in range(n_layer)])"
LOOP = "        for block in self.blocks:\n            x = block(x)\n"
ATTENTION = "        x = x + self.dropout(self.attn(self.norm_1(x)))\n"
FEED = "        h = self.fc(self.norm_2(x))\n"
END = "        return x + self.dropout(self.proj(h))\n"
RMS_NORM = """class Norm(nn.Module):
    def __init__(self, n_embd):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n_embd))

    def forward(self, x):
        return self.scale * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Attention(nn.Module):
"""
TORCH_LAYER = (
    "nn.TransformerEncoderLayer(n_embd, n_head, 4 * n_embd, dropout, 'gelu', batch_first=True, norm_first=True)"
)

MUON = ("optim.name=muon", "optim.muon_lr=0.02")
SMALL = ("model.n_embd=16", "model.n_head=2")
BYTES = ("data.tokenizer=byte",)
BPE = ("data.tokenizer=bpe", "data.vocab_size=512")

LOOPS = ("runtime.dtype=bfloat16", "runtime.loops=on")

RUNS = [
    *gpt("the base"),
    *gpt("no dropout", "model.dropout=0.0"),
    *gpt("dropout 0.3", "model.dropout=0.3"),
    *gpt("attention dropout", "model.attn_dropout=0.1"),
    *gpt("tied", "model.tie_embeddings=true"),
    *gpt("untied", "model.tie_embeddings=false"),
    *gpt("muon", *MUON),
    *gpt("muon, untied, dropout", *MUON, "model.tie_embeddings=false", "model.dropout=0.2"),
    *gpt("bfloat16", "runtime.dtype=bfloat16"),
    *gpt("bfloat16 with muon", "runtime.dtype=bfloat16", *MUON),
    *gpt("compiled loops", *LOOPS),
    *gpt("compiled loops, dropout everywhere", *LOOPS, "model.dropout=0.3", "model.attn_dropout=0.2"),
    *gpt("compiled loops, muon, small", *LOOPS, *MUON, *SMALL),
    *gpt("compiled loops, context of 8", *LOOPS, "model.block_size=8"),
    *gpt("compiled loops, SwiGLU, no bias", *LOOPS, "model.activation=swiglu", "model.bias=false"),
    *gpt("seed 1", "train.seed=1"),
    *gpt("seed 42", "train.seed=42"),
    *gpt("seed 7, no dropout", "train.seed=7", "model.dropout=0.0"),
    *gpt("16 wide", *SMALL),
    *gpt("128 wide", "model.n_embd=128"),
    *gpt("one layer", "model.n_layer=1"),
    *gpt("six layers", "model.n_layer=6", "model.n_embd=48"),
    *gpt("one head", "model.n_head=1"),
    *gpt("16 heads", "model.n_head=16"),
    *gpt("context of 8", "model.block_size=8"),
    *gpt("context of 256", "model.block_size=256", "train.batch_size=4", "train.micro_batch_size=2"),
    *gpt("bytes", *BYTES),
    *gpt("BPE", *BPE),
    *gpt("BPE, small, bfloat16", *BPE, *SMALL, "runtime.dtype=bfloat16"),
    *gpt("micro-batches of one", "train.micro_batch_size=1"),
    *gpt("no accumulation", "train.micro_batch_size=0"),
    *gpt("batch of one", "train.batch_size=1", "train.micro_batch_size=0"),
    *gpt("batch of 64", "train.batch_size=64", "train.micro_batch_size=16"),
    *gpt("no clipping", "optim.grad_clip=0.0"),
    *gpt("tight clipping", "optim.grad_clip=0.1"),
    *gpt("aligned documents", "train.align_documents=true"),
    *gpt("padded vocabulary", "model.vocab_size=128"),
    *gpt("much padded vocabulary, untied", "model.vocab_size=1024", "model.tie_embeddings=false"),
    *gpt("wide vocabulary", "model.vocab_size=4096"),
    *gpt("constant rate", "schedule.kind=constant"),
    *gpt("linear to zero", "schedule.kind=linear", "optim.min_lr=0.0"),
    *gpt("decay ends early", "schedule.decay_steps=300"),
    *gpt("no decay of weights", "optim.weight_decay=0.0"),
    *gpt("no decay of embeddings", "optim.decay_embeddings=false"),
    *gpt("Adam's usual betas", "optim.betas=[0.9, 0.999]", "optim.eps=1e-6"),
    *gpt("a low rate", "optim.lr=3e-4", "optim.min_lr=3e-5"),
    *gpt("a high rate", "optim.lr=1e-2", "optim.min_lr=1e-3"),
    *gpt("whole validation", "train.eval_windows=0"),
    *gpt("no prefetch", "runtime.prefetch=0"),
    *gpt("swiglu", "model.activation=swiglu"),
    *gpt("n-grams", "model.ngrams=3", "model.ngram_rows=1024"),
    *one("gpt2 with zero init", "model.zero_init=true"),
    *one("gpt2 without biases", "model.bias=false"),
    *one("gpt2 with exact GELU", "model.activation=gelu"),
    *one("gpt2 with query-key norm", "model.qk_norm=true"),
    *one("gpt2 with rotary positions", "model.positions=rope"),
    *one("gpt2 with RMSNorm", "model.norm=rmsnorm"),
    *one("modern without zero init", "model.recipe=modern", "model.zero_init=false"),
    *one("modern without query-key norm", "model.recipe=modern", "model.qk_norm=false"),
    *one("modern with learned positions", "model.recipe=modern", "model.positions=learned"),
    *one("modern with LayerNorm and biases", "model.recipe=modern", "model.norm=layernorm", "model.bias=true"),
    *mine("as it is"),
    *mine("untied", TIE),
    *mine("no dropout", set=("model.dropout=0.0",)),
    *mine("dropout 0.3", set=("model.dropout=0.3",)),
    *mine("its own dropout", ("nn.Dropout(dropout)", "nn.Dropout(0.2)", 3), set=("model.dropout=0.0",)),
    *mine("torch's own init, untied", TIE, DEFAULT_INIT),
    *mine("torch's own init, untied, muon", TIE, DEFAULT_INIT, set=MUON),
    *mine("muon", set=MUON),
    *mine("bfloat16", set=("runtime.dtype=bfloat16",)),
    *mine("BPE", set=BPE),
    *mine("four layers, 128 wide", set=("model.n_layer=4", "model.n_embd=128")),
    *mine("no positions", *NO_POSITIONS),
    *mine(
        "ALiBi",
        *NO_POSITIONS,
        (
            "        scores = scores.masked_fill",
            "        near = torch.arange(T)[None, :] - torch.arange(T)[:, None]\n"
            "        slopes = 2.0 ** -torch.arange(1, H + 1)[:, None, None]\n"
            "        scores = scores + slopes * near\n"
            "        scores = scores.masked_fill",
        ),
    ),
    *mine(
        "sliding window",
        (
            "dtype=torch.bool), diagonal=1))",
            "dtype=torch.bool), diagonal=1))\n        self.mask |= self.mask.T.roll(15, 0).tril(-16)",
        ),
    ),
    *mine(
        "sinusoidal positions",
        (
            "self.pos = nn.Embedding(block_size, n_embd)",
            "waves = torch.arange(block_size)[:, None] / 100 ** torch.linspace(0, 1, n_embd)\n"
            "        self.register_buffer('pos', 0.02 * torch.sin(waves))",
        ),
        ("self.pos(torch.arange(T, device=tokens.device))", "self.pos[:T]"),
    ),
    *mine(
        "post-norm",
        (ATTENTION, "        x = self.norm_1(x + self.dropout(self.attn(x)))\n"),
        (FEED, "        h = self.fc(x)\n"),
        (END, "        return self.norm_2(x + self.dropout(self.proj(h)))\n"),
    ),
    *mine(
        "parallel branches",
        (ATTENTION, "        y = self.dropout(self.attn(self.norm_1(x)))\n"),
        (END, END.replace("x + ", "x + y + ")),
    ),
    *mine(
        "RMSNorm of its own", ("class Attention(nn.Module):\n", RMS_NORM), ("nn.LayerNorm(n_embd)", "Norm(n_embd)", 3)
    ),
    *mine(
        "one key and value head",
        ("self.key = nn.Linear(n_embd, n_embd,", "self.key = nn.Linear(n_embd, n_embd // n_head,"),
        ("self.value = nn.Linear(n_embd, n_embd,", "self.value = nn.Linear(n_embd, n_embd // n_head,"),
        ("self.key(x).view(B, T, H, D)", "self.key(x).view(B, T, 1, D)"),
        ("self.value(x).view(B, T, H, D)", "self.value(x).view(B, T, 1, D)"),
    ),
    *mine(
        "fused attention",
        ("        scores = q @ k.transpose(-2, -1) / math.sqrt(D)\n", ""),
        ('        scores = scores.masked_fill(self.mask[:T, :T], float("-inf"))\n', ""),
        ("        weights = F.softmax(scores, dim=-1)\n", ""),
        ("self.dropout(weights) @ v", "F.scaled_dot_product_attention(q, k, v, is_causal=True)"),
    ),
    *mine("logits softly capped", ("return self.head(x)", "return 30 * torch.tanh(self.head(x) / 30)")),
    *mine("embedding scaled up", ("x = self.tok(tokens) +", "x = self.tok(tokens) * self.tok.embedding_dim**0.5 +")),
    *mine("head with a bias", TIE, ("nn.Linear(n_embd, vocab_size, bias=False)", "nn.Linear(n_embd, vocab_size)")),
    *mine(
        "residual gains",
        (
            "        self.dropout = nn.Dropout(dropout)\n\n    def forward(self, x):\n        x = x + self.dropout(",
            "        self.dropout = nn.Dropout(dropout)\n"
            "        self.gain = nn.Parameter(torch.ones(()))\n"
            "\n"
            "    def forward(self, x):\n"
            "        x = x + self.gain * self.dropout(",
        ),
    ),
    *mine(
        "torch's encoder layers",
        (BLOCKS, f"nn.ModuleList([{TORCH_LAYER} for _ in range(n_layer)])"),
        (
            LOOP,
            "        mask = nn.Transformer.generate_square_subsequent_mask(T, tokens.device)\n"
            "        for block in self.blocks:\n"
            "            x = block(x, mask, is_causal=True)\n",
        ),
    ),
    *mine(
        "an LSTM",
        (BLOCKS, "nn.LSTM(n_embd, n_embd, n_layer, batch_first=True)"),
        (LOOP, "        x = self.blocks(x)[0]\n"),
    ),
    *mine("shared blocks, on purpose twice each", (LOOP, LOOP + LOOP), set=("model.dropout=0.0",)),
    *[Healthy(f"example: {path.stem}", example=path.stem) for path in sorted(EXAMPLES.glob("*.toml"))],
]
# A handful that differ as much as they can: they run at every `just test`.
FEW = (
    "gpt2: muon, untied, dropout",
    "modern: the base",
    "modern: BPE, small, bfloat16",
    "gpt2: compiled loops, dropout everywhere",
    "gpt2: aligned documents",
    "my model: as it is",
    "my model: torch's own init, untied",
    "my model: ALiBi",
    "example: quickstart",
)


def run_healthy(item: Healthy, folder: Path) -> Outcome:
    """`tinyllm sanity` on it. `folder` is the zoo's: what several need is prepared once in it."""
    settings = of_example(item.example, folder) if item.example else BASE | (CUSTOM if item.custom else {})
    chosen = sorted(v for v in item.set if v.startswith("data."))
    own = item.example or " ".join(chosen) or "base"
    settings = settings | {"data.dir": str(folder / "data" / own.replace("/", "-"))}
    place = folder / "".join(c if c.isalnum() else "-" for c in item.name)
    shutil.rmtree(place, ignore_errors=True)
    return run(item.edits, settings, item.set, place)


def of_example(name: str, folder: Path) -> dict:
    """A ready-made config, cut to a small size, on a local text."""
    config = load(EXAMPLES / f"{name}.toml").model_dump(by_alias=True)
    settings = {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
    if model := config["model"]["class"]:
        settings["model.class"] = str(EXAMPLES / model)
    rows = config["train"]["batch_size"] // (config["train"]["micro_batch_size"] or config["train"]["batch_size"])
    rows = 2 * min(rows, 4)
    cut = CUT | {
        "model.block_size": min(config["model"]["block_size"], 64),
        "train.batch_size": rows,
        "train.micro_batch_size": 2 if rows > 2 else 0,
    }
    if config["data"]["source"] == "tales":
        cut["data.tales_stories"] = 300
    else:
        cut["data.source"] = str(text_of(config["data"]["source"], folder))
    if config["data"]["tokenizer"] != "char":
        cut |= {"data.tokenizer": "bpe", "data.vocab_size": 500}
    if config["model"]["vocab_size"]:
        cut["model.vocab_size"] = 512
    return settings | cut


def text_of(source: str, folder: Path) -> Path:
    """A file of text like the source's: with marked documents, or, for Shakespeare, without."""
    path = folder / f"{source}.txt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        text = "<|endoftext|>\n".join(f"{story.text}\n" for story in stories(300, seed=1))
        if source == "shakespeare":
            text = SHAKESPEARE.read_text()[:200_000] if SHAKESPEARE.exists() else text.replace("<|endoftext|>", "")
        path.write_text(text)
    return path
