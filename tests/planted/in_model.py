"""Mistakes in the built-in model."""

from planted.bug import bug

MODERN = ("model.recipe=modern",)
NGRAMS = ("model.ngrams=3", "model.ngram_rows=1024")
BEFORE = "F.pad(ids, (n - 1, 0))[:, : ids.shape[1]]"

BUGS = [
    # ---- Initial weights ----
    bug(
        "init std 1",
        "torch's default for an embedding",
        "initial weights",
        ("model.py", "INIT_STD = 0.02", "INIT_STD = 1.0"),
    ),
    bug(
        "init std 0.002",
        "a zero too many",
        "initial weights",
        ("model.py", "INIT_STD = 0.02", "INIT_STD = 0.002"),
    ),
    bug(
        "residual projections not scaled down",
        "GPT-2's 1 / sqrt(2 n_layer) forgotten",
        "initial weights",
        ("model.py", "residual_std = INIT_STD / math.sqrt(2 * model.config.n_layer)", "residual_std = INIT_STD"),
    ),
    bug(
        "n-grams start at one",
        "ones_ for zeros_",
        "initial weights",
        (
            "model.py",
            "            parameter.zero_()\n",
            "            parameter.fill_(1.0 if name == 'ngrams.weight' else 0.0)\n",
        ),
        set=NGRAMS,
    ),
    bug(
        "initialization never called",
        "the call lost in a refactoring",
        "initial weights",
        (
            "model.py",
            "    for name, parameter in model.named_parameters():\n        is_residual",
            "    for name, parameter in ():\n        is_residual",
        ),
    ),
    bug(
        "all matrices start at zero",
        "zeros_ for everything that ends in weight",
        "initial weights",
        (
            "model.py",
            "parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))",
            "parameter.zero_()",
        ),
    ),
    bug(
        "norm gains start at zero",
        "zeros_ for everything of one dimension",
        "initial weights",
        (
            "model.py",
            'parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)',
            "parameter.fill_(0.0)",
        ),
    ),
    bug(
        "all blocks start alike",
        "a generator of the same seed for each tensor",
        ("parameters", "initial weights"),
        ("model.py", "0.0, std, generator=generator", "0.0, std, generator=torch.Generator().manual_seed(seed)"),
    ),
    bug(
        "the seed is not used",
        "weights from whatever the generator holds",
        ("repeatable", "initial weights"),
        ("model.py", "generator = torch.Generator().manual_seed(seed)", "(generator := torch.Generator()).seed()"),
    ),
    bug(
        "a NaN among the weights",
        "0 / 0 in a home-made initialization",
        "initial weights",
        (
            "model.py",
            "    generator = torch.Generator().manual_seed(seed)\n",
            "    generator = torch.Generator().manual_seed(seed)\n    model.norm.weight.data[3] = float('nan')\n",
        ),
        (
            "model.py",
            "        if parameter.dim() < 2:\n",
            "        if parameter is model.norm.weight:\n            pass\n        elif parameter.dim() < 2:\n",
        ),
    ),
    # ---- Structure ----
    bug(
        "[block] * n",
        "one block, n times",
        "parameters",
        (
            "model.py",
            "nn.ModuleList(Block(config) for _ in range(config.n_layer))",
            "nn.ModuleList([Block(config)] * config.n_layer)",
        ),
    ),
    bug(
        "head untied by accident",
        "tie_embeddings is not looked at",
        "parameters",
        ("model.py", "self.head = None if config.tie_embeddings else", "self.head = None if not config else"),
    ),
    bug(
        "head tied by accident",
        "the output always goes through the embedding; the head is never used",
        ("formula", "gradient reach"),
        (
            "model.py",
            "return F.linear(x, self.wte.weight) if self.head is None else self.head(x)",
            "return F.linear(x, self.wte.weight)",
        ),
        set=("model.tie_embeddings=false",),
    ),
    bug(
        "last block never runs",
        "range(n_layer - 1)",
        "layers",
        ("model.py", "enumerate(self.blocks)", "enumerate(self.blocks[:-1])"),
    ),
    bug(
        "a block runs twice",
        "a line pasted twice",
        "layers",
        (
            "model.py",
            "            x = block(x, rope, cache, layer)\n",
            "            x = block(x, rope, cache, layer)\n"
            "            x = block(x, rope, None, layer) if layer == 0 else x\n",
        ),
    ),
    bug(
        "a block is frozen",
        "left over from finetuning",
        "parameters",
        (
            "model.py",
            "        self.norm = make_norm(config)\n        #",
            "        self.blocks[0].requires_grad_(False)\n        self.norm = make_norm(config)\n        #",
        ),
    ),
    bug(
        "a block is detached",
        "detach() for debugging memory",
        "gradient reach",
        ("model.py", "x = block(x, rope, cache, layer)", "x = block(x.detach(), rope, cache, layer)"),
    ),
    bug(
        "the embedding is detached",
        "the tied table learns from the output side only",
        ("gradient reach", "gradient", "formula"),
        ("model.py", "x = self.wte(tokens)\n", "x = self.wte(tokens).detach()\n"),
    ),
    # ---- Formula ----
    bug(
        "no causal mask",
        "is_causal forgotten",
        ("formula", "causal mask"),
        ("model.py", "is_causal=T > 1", "is_causal=False"),
    ),
    bug(
        "attention scale missing",
        "scale=1",
        ("formula", "attention scale"),
        ("model.py", "dropout_p=p)", "dropout_p=p, scale=1.0)"),
    ),
    bug(
        "heads mixed by view",
        "view where the axes need a transpose",
        ("formula", "causal mask", "batch rows"),
        (
            "model.py",
            ".view(B, T, 3 * H, D).split(",
            ".view(B, 3 * H, T, D).transpose(1, 2).split(",
        ),
    ),
    bug(
        "heads joined without a transpose",
        "reshape straight after attention",
        ("formula", "causal mask"),
        ("model.py", "y.transpose(1, 2).reshape(B, T, C)", "y.reshape(B, T, C)"),
    ),
    bug(
        "residual missing",
        "x = attn(...) for x = x + attn(...)",
        "formula",
        ("model.py", "x = add_dropout(x, self.attn(", "x = add_dropout(0, self.attn("),
    ),
    bug(
        "final norm missing",
        "made and not applied",
        ("formula", "gradient reach"),
        ("model.py", "        x = self.norm(x)\n", ""),
    ),
    bug(
        "positions not added",
        "x + pos computed and dropped",
        ("formula", "gradient reach"),
        (
            "model.py",
            "            x = x + self.wpe.weight[at : at + T]\n",
            "            x + self.wpe.weight[at : at + T]\n",
        ),
    ),
    bug(
        "positions reversed",
        "counted from the end",
        ("causal mask", "formula"),
        (
            "model.py",
            "x = x + self.wpe.weight[at : at + T]",
            "x = x + self.wpe.weight[at : at + T].flip(0)",
        ),
    ),
    bug(
        "n-grams of the tokens to come",
        "the pad at the wrong end",
        "causal mask",
        ("model.py", BEFORE, "F.pad(ids, (0, n - 1))[:, n - 1 :]"),
        set=NGRAMS,
    ),
    bug(
        "n-grams that go round",
        "roll for pad: the first positions see the last",
        "causal mask",
        ("model.py", BEFORE, "ids.roll(n - 1, 1)"),
        set=NGRAMS,
    ),
    bug(
        "n-grams read backwards",
        "the oldest token first",
        "formula",
        ("model.py", f"(key * HASH_BASE + {BEFORE})", f"(key + HASH_BASE ** (n - 1) % HASH_PRIME * {BEFORE})"),
        set=NGRAMS,
    ),
    bug(
        "n-grams not added",
        "computed and dropped",
        ("formula", "gradient reach"),
        ("model.py", "x = x + self.ngrams(rows[", "x + self.ngrams(rows["),
        set=NGRAMS,
    ),
    bug(
        "another GELU",
        "the exact one where GPT-2 has tanh's approximation",
        "formula",
        ("fast.py", 'approximate="tanh" if name == "gelu_tanh" else "none"', 'approximate="none"'),
    ),
    bug(
        "norm after the branch",
        "norm(attn(x)) for attn(norm(x))",
        "formula",
        ("model.py", "self.attn(y, rope, cache, layer)", "self.norm_1(self.attn(x, rope, cache, layer))"),
    ),
    bug(
        "one norm for both branches",
        "norm_1 copied, its number was not changed",
        ("formula", "gradient reach"),
        ("model.py", "norm_beside(self.norm_2, x)", "norm_beside(self.norm_1, x)"),
    ),
    bug(
        "norm with another epsilon",
        "1e-1 for 1e-6",
        "formula",
        ("model.py", "eps=1e-6", "eps=1e-1"),
        set=MODERN,
    ),
    bug(
        "rotary on the queries only",
        "the keys forgotten",
        "formula",
        (
            "model.py",
            "qk = rotate(qk, *rope)",
            "qk = torch.cat((rotate(qk[:, :, :H], *rope), qk[:, :, H:]), dim=2)",
        ),
        set=MODERN,
    ),
    bug(
        "rotary on the values too",
        "one tensor too many",
        "formula",
        (
            "model.py",
            "qk = rotate(qk, *rope)",
            "qk, v = rotate(qk, *rope), rotate(v, *rope)",
        ),
        set=MODERN,
    ),
    bug(
        "rotary with a wrong sign",
        "not a rotation any more",
        "formula",
        ("model.py", "torch.cat((-sin, sin), dim=-1)", "torch.cat((-sin, -sin), dim=-1)"),
        set=MODERN,
    ),
    bug(
        "rotary frequencies upside down",
        "a minus forgotten in the exponent",
        "formula",
        (
            "model.py",
            "(-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)",
            "(torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)",
        ),
        set=MODERN,
    ),
    bug(
        "queries normalised, keys not",
        "half of the query-key norm",
        "formula",
        (
            "model.py",
            "qk = rms_norm(qk)",
            "qk = torch.cat((rms_norm(qk[:, :, :H]), qk[:, :, H:]), dim=2)",
        ),
        set=MODERN,
    ),
    bug(
        "softmax in the model",
        "the loss takes the softmax of a softmax",
        "output",
        (
            "model.py",
            "return F.linear(x, self.wte.weight) if self.head is None else self.head(x)",
            "return F.linear(x, self.wte.weight).softmax(-1)",
        ),
    ),
    # ---- Dropout ----
    bug(
        "dropout in evaluation",
        "a mode that was left on",
        "dropout",
        ("model.py", "x = dropout(x, self.config.dropout, self.training)", "x = dropout(x, self.config.dropout, True)"),
    ),
    bug(
        "attention dropout in evaluation",
        "scaled_dot_product_attention does not know the mode",
        "dropout",
        ("model.py", "self.attn_dropout if self.training else 0.0", "self.attn_dropout"),
        set=("model.attn_dropout=0.1",),
    ),
    bug(
        "dropout never on",
        "the number is read, and not used",
        "dropout",
        ("model.py", "self.dropout = config.dropout", "self.dropout = 0.0"),
        ("model.py", "        x = dropout(x, self.config.dropout, self.training)\n", ""),
    ),
    bug(
        "attention dropout never on",
        "the number is read, and not used",
        "dropout",
        ("model.py", "self.attn_dropout if self.training else 0.0", "0.0"),
        set=("model.attn_dropout=0.1", "model.dropout=0.0"),
    ),
    bug(
        "dropout of a fixed strength",
        "0.5 written where the config's belongs",
        ("dropout", "formula"),
        ("model.py", "x = dropout(x, self.config.dropout, self.training)", "x = dropout(x, 0.5, self.training)"),
    ),
    # ---- The cache, which only generation uses ----
    bug(
        "cache position off by one",
        "the first new token takes the place of the last of the prompt",
        "generation",
        (
            "model.py",
            "at = tokens.shape[1], 0 if cache is None else cache.length",
            "at = tokens.shape[1], 0 if cache is None else max(cache.length - 1, 0)",
        ),
    ),
    bug(
        "cache does not count the prompt",
        "length += 1, whatever was read",
        "generation",
        ("model.py", "cache.length += T", "cache.length += 1"),
    ),
    bug(
        "cache without the n-grams before it",
        "of one token after the other",
        "generation",
        ("model.py", "seen = tokens if cache is None else cache.seen(tokens)", "seen = tokens"),
        set=NGRAMS,
    ),
    bug(
        "cache forgets where it is",
        "rotary tables from position 0 for every new token",
        "generation",
        (
            "model.py",
            "table[start : start + T].to(",
            "table[:T].to(",
        ),
        set=MODERN,
    ),
    bug(
        "cache keeps keys only",
        "the values of the prompt are overwritten by the newest",
        "generation",
        (
            "model.py",
            "self.values[layer][:, :, self.length : end] = v",
            "self.values[layer][:, :, :end] = v[:, :, -1:]",
        ),
    ),
    bug(
        "cache keeps keys before their rotation",
        "append before rotate",
        "generation",
        (
            "model.py",
            "        if rope is not None:\n"
            "            qk = rotate(qk, *rope)\n"
            "        q, k, v = (y.transpose(1, 2) for y in (*qk.chunk(2, dim=2), v))  # each (B, H, T, D)\n"
            "        if cache is not None:\n"
            "            k, v = cache.append(layer, k, v)\n",
            "        q, k, v = (y.transpose(1, 2) for y in (*qk.chunk(2, dim=2), v))  # each (B, H, T, D)\n"
            "        if cache is not None:\n"
            "            k, v = cache.append(layer, k, v)\n"
            "        if rope is not None:\n"
            "            q, k = (rotate(y.transpose(1, 2), *rope).transpose(1, 2) for y in (q, k))\n",
        ),
        set=MODERN,
    ),
]
