"""Mistakes around the step: evaluation, modes, precision, repeatability, checkpoints, generation."""

from planted.bug import bug

EVAL_LOSS = '            nats += loss_fn(logits, run.runtime.tensor(targets), "sum").cpu().double()\n'
SEED = "    seed_dropout(run.config.train.seed, state.step, micro_step)\n"
BFLOAT16 = ("runtime.dtype=bfloat16",)
LOOPS = (*BFLOAT16, "runtime.loops=on")

BUGS = [
    # ---- Modes ----
    bug(
        "model.eval() missing",
        "dropout blurs the loss",
        ("evaluation", "dropout", "training mode"),
        ("engine.py", "    model.eval()\n", ""),
    ),
    bug(
        "evaluation leaves the model in eval mode",
        "no model.train() afterwards",
        "evaluation",
        ("engine.py", "        model.train(was_training)\n", "        pass\n"),
    ),
    bug(
        "dropout ends with the first evaluation",
        "model.train() once, before the loop",
        ("evaluation", "dropout", "training mode"),
        ("engine.py", "        model.train(was_training)\n", "        pass\n"),
        ("engine.py", "    state.model.train()\n", ""),
    ),
    bug(
        "trained in eval mode",
        "model.eval() in the step",
        ("training mode", "dropout"),
        ("engine.py", "    state.model.train()\n", "    state.model.eval()\n"),
    ),
    # ---- Evaluation ----
    bug(
        "validation on the training split",
        "split is a parameter, and not used",
        "evaluation",
        (
            "engine.py",
            "run.source.eval_batches(split, n_windows, rows or eval_rows(run))",
            'run.source.eval_batches("train", n_windows, rows or eval_rows(run))',
        ),
    ),
    bug(
        "mean of means",
        "a short last batch counts as much as a full one",
        "evaluation",
        ("engine.py", EVAL_LOSS, EVAL_LOSS.replace('"sum"', '"mean"')),
        ("engine.py", "    count = text_bytes = 0\n", "    count = text_bytes = batches = 0\n"),
        (
            "engine.py",
            "            count += counted.size\n",
            "            count += counted.size\n            batches += 1\n",
        ),
        ("engine.py", "return Evaluation(float(nats) / count,", "return Evaluation(float(nats) / batches,"),
        set=("train.eval_windows=0",),
    ),
    bug(
        "divided by batches of equal size",
        "sum / (batches * rows * T), though windows are cut short",
        "evaluation",
        ("engine.py", "            count += counted.size\n", "            count += rows * size\n"),
        set=("train.eval_windows=0",),
    ),
    bug(
        "other windows at each evaluation",
        "random batches: the curve's noise is the choice of windows",
        "evaluation",
        (
            "data.py",
            "chosen = np.arange(count) * total // count",
            "chosen = np.sort(np.random.randint(0, total, count))",
        ),
    ),
    bug(
        "evaluation on the first windows",
        "arange(count): the beginning stands for the whole",
        "evaluation",
        ("data.py", "chosen = np.arange(count) * total // count", "chosen = np.arange(count) * 0"),
    ),
    bug(
        "evaluation draws random numbers",
        "torch.manual_seed in the evaluation",
        "evaluation",
        (
            "engine.py",
            "    was_training = model.training\n",
            "    was_training = model.training\n    torch.manual_seed(1337)\n",
        ),
    ),
    bug(
        "evaluation trains",
        "the loop pasted with its backward()",
        ("evaluation", "zero_grad"),
        ("engine.py", "@torch.no_grad()\ndef evaluate(", "def evaluate("),
        ("engine.py", EVAL_LOSS, EVAL_LOSS + "            loss_fn(logits, run.runtime.tensor(targets)).backward()\n"),
        (
            "engine.py",
            "    return Evaluation(float(nats)",
            "    nats = nats.detach()\n    return Evaluation(float(nats)",
        ),
    ),
    bug(
        "averaged weights stay",
        "EMA weights put in for the evaluation, the trained ones never put back",
        "evaluation",
        (
            "engine.py",
            "    model.eval()\n",
            "    model.eval()\n    for p in model.parameters():\n        p.mul_(0.999)\n",
        ),
    ),
    bug(
        "bits a byte in nats",
        "1 / ln 2 forgotten",
        "evaluation",
        ("engine.py", "float(nats) / math.log(2) / max", "float(nats) / max"),
    ),
    bug(
        "bits a byte by tokens",
        "divided by the tokens, not the bytes",
        "evaluation",
        ("engine.py", "text_bytes += int(run.token_bytes[counted].sum())", "text_bytes += counted.size"),
        set=("data.tokenizer=bpe", "data.vocab_size=512"),
    ),
    bug(
        "the loss of labels the model has seen",
        "evaluation of the inputs",
        "evaluation",
        ("engine.py", EVAL_LOSS, EVAL_LOSS.replace("tensor(targets)", "tensor(inputs)")),
    ),
    # ---- Precision ----
    bug(
        "weights in bfloat16",
        "model.to(dtype): updates below 1/256 of a weight vanish",
        ("precision", "parameters", "initial weights", "weights move"),
        ("engine.py", "return model.to(run.runtime.device)", "return model.to(run.runtime.device, run.runtime.dtype)"),
        set=BFLOAT16,
    ),
    bug(
        "autocast around the backward pass only",
        "the forward pass stays in float32: no speed",
        "precision",
        ("runtime.py", "if in_float32 else torch.autocast(self.device.type, self.dtype)", ""),
        set=BFLOAT16,
        warns=True,
    ),
    # ---- Repeatability ----
    bug(
        "dropout from the global generator",
        "what was drawn before decides",
        ("repeatable", "training mode", "dropout"),
        ("engine.py", SEED, ""),
    ),
    bug(
        "the same dropout at every step",
        "manual_seed(1337) in the loop",
        ("dropout", "training mode", "repeatable"),
        ("engine.py", SEED, SEED.replace("state.step, micro_step", "0, micro_step")),
    ),
    bug(
        "the same dropout in every micro-batch",
        "seeded by the step alone",
        ("dropout", "training mode", "repeatable", "accumulation"),
        ("engine.py", SEED, SEED.replace("micro_step", "0")),
    ),
    bug(
        "seeded by the clock",
        "time.time() as a seed",
        ("repeatable", "training mode"),
        ("engine.py", SEED, "    torch.manual_seed(__import__('time').time_ns())\n"),
    ),
    bug(
        "weights depend on what was drawn before",
        "init from the global generator",
        ("initial weights", "repeatable"),
        ("model.py", "0.0, std, generator=generator", "0.0, std"),
    ),
    # ---- Checkpoints ----
    bug(
        "optimizer state not saved",
        "the model alone",
        "checkpoint",
        ("engine.py", "optimizer=state_by_name(state.optimizers)", "optimizer={}"),
    ),
    bug(
        "optimizer state not loaded",
        "saved, and forgotten on the way back",
        "checkpoint",
        ("engine.py", "    load_state_by_name(state.optimizers, checkpoint.optimizer)\n", ""),
    ),
    bug(
        "only the momentum saved",
        "the variance left out to save space",
        "checkpoint",
        (
            "optim.py",
            "name: dict(optimizer.state[parameter])",
            "name: dict(optimizer.state[parameter], exp_avg_sq=torch.zeros_like(parameter))",
        ),
    ),
    bug(
        "a step too far after resume",
        "start = step + 1",
        "checkpoint",
        (
            "engine.py",
            "state.step, state.best_val_loss = checkpoint.step,",
            "state.step, state.best_val_loss = checkpoint.step + 1,",
        ),
    ),
    bug(
        "resume starts the schedule again",
        "the step is not restored",
        "checkpoint",
        ("engine.py", "state.step, state.best_val_loss = checkpoint.step,", "state.step, state.best_val_loss = 0,"),
    ),
    bug(
        "the best loss is forgotten",
        "the first evaluation after resume overwrites the best checkpoint",
        ("checkpoint", "train loop"),
        ("engine.py", "= checkpoint.step, checkpoint.best_val_loss", "= checkpoint.step, math.inf"),
    ),
    bug(
        "weights saved in half precision",
        "half() for a smaller file",
        "checkpoint",
        (
            "engine.py",
            "model=dict(state.model.state_dict())",
            "model={n: t.bfloat16() for n, t in state.model.state_dict().items()}",
        ),
    ),
    bug(
        "weights not loaded",
        "strict=False hides that every name begins with module.",
        "checkpoint",
        (
            "checkpoint.py",
            "model.load_state_dict(weights)",
            "model.load_state_dict({f'module.{n}': t for n, t in weights.items()}, strict=False)",
        ),
    ),
    bug(
        "initialised after loading",
        "new weights over the loaded ones",
        "checkpoint",
        (
            "engine.py",
            "    load_state_by_name(state.optimizers, checkpoint.optimizer)\n",
            "    load_state_by_name(state.optimizers, checkpoint.optimizer)\n"
            "    for p in state.model.parameters():\n"
            "        torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else None\n",
        ),
    ),
    bug(
        "buffers and norms not saved",
        "only what is called weight",
        "checkpoint",
        (
            "engine.py",
            "model=dict(state.model.state_dict())",
            "model={n: t if 'bias' not in n else torch.zeros_like(t) for n, t in state.model.state_dict().items()}",
        ),
    ),
    bug(
        "the worst checkpoint is kept",
        "> for <",
        "train loop",
        (
            "engine.py",
            "val.loss < state.best_val_loss",
            "val.loss > (state.best_val_loss if state.best_val_loss < math.inf else 0)",
        ),
    ),
    bug(
        "the best by training loss",
        "train for val",
        ("train loop", "evaluation"),
        (
            "engine.py",
            "is_best = state.step > 0 and val.loss < state",
            "is_best = state.step > 0 and train_part.loss < state",
        ),
        ("engine.py", "state.best_val_loss = val.loss", "state.best_val_loss = train_part.loss"),
    ),
    bug(
        "the best checkpoint holds other weights",
        "those of the last save",
        "train loop",
        (
            "saver.py",
            "link(self.folder / LATEST, path,",
            "link(next(self.folder.glob('ckpt-*.pt'), self.folder / LATEST), path,",
        ),
    ),
    # ---- The loop ----
    bug(
        "resume begins with the first batch",
        "a fresh loader after a restart",
        "train loop",
        ("engine.py", "prefetch(run.source.batch, state.step, config", "prefetch(run.source.batch, 0, config"),
    ),
    bug(
        "the batch of the next step",
        "next(loader) once before the loop, and again in it",
        "train loop",
        (
            "engine.py",
            "batch = next(batch_of_step, None)",
            "batch = run.source.batch(state.step + 1)",
        ),
    ),
    bug(
        "the interval counted by the inner loop",
        "evaluations at every other step that was asked for",
        "train loop",
        ("engine.py", "state.step % config.eval_interval == 0", "state.step % (2 * config.eval_interval) == 0"),
    ),
    bug(
        "the last weights are not saved",
        "a checkpoint every so many steps, and none at the end",
        "train loop",
        ("engine.py", "if state.step and (looks or is_due):", "if state.step and is_due:"),
        ("engine.py", "yield from save_last(run, state, saver, final)", "yield from saver.finish()"),
    ),
    bug(
        "the checkpoint of before the step",
        "saved with the weights of the evaluation before",
        ("checkpoint", "train loop"),
        (
            "engine.py",
            "    return ckpt.Checkpoint(\n        step=state.step,",
            "    return ckpt.Checkpoint(\n        step=state.step + 1,",
        ),
    ),
    bug(
        "all losses kept, with their graphs",
        "losses.append(loss) for the mean at the end",
        "memory growth",
        (
            "engine.py",
            "        loss += micro_loss.detach()\n",
            "        loss += micro_loss.detach()\n        KEPT.append(micro_loss)\n",
        ),
        ("engine.py", "EVAL_TOKENS = 1 << 14\n", "EVAL_TOKENS = 1 << 14\nKEPT = []\n"),
    ),
    bug(
        "activations kept by a hook",
        "a forward hook for statistics, never removed",
        "memory growth",
        (
            "engine.py",
            "    state.model.train()\n",
            "    state.model.train()\n"
            "    state.model.register_forward_hook(lambda *seen: KEPT.append(seen[-1].detach()))\n",
        ),
        ("engine.py", "EVAL_TOKENS = 1 << 14\n", "EVAL_TOKENS = 1 << 14\nKEPT = []\n"),
    ),
    # ---- Compiled loops of training ----
    bug(
        "loops: scores not divided",
        "softmax(q k^T), without sqrt(head size)",
        "training loops",
        ("loops.py", "f32(1 / math.sqrt(D))", "f32(1)", 3),
        set=LOOPS,
    ),
    bug(
        "loops: softmax's gradient without its mean",
        "y g for y (g - mean)",
        "training loops",
        ("kernels/training.py", "(widen(g_row[j]) - along) * scale", "widen(g_row[j]) * scale"),
        ("kernels/rows.py", "builder.fsub(up, mean)", "up"),
        set=LOOPS,
    ),
    bug(
        "loops: keys' gradient for the queries",
        "the same product twice",
        "training loops",
        ("loops.py", "torch.bmm(of_weights, k, out=of_q)", "torch.bmm(of_weights.mT, q, out=of_q)"),
        ("kernels/attention.py", "sum_over_queries(queries, sloped", "sum_over_queries(ups, sloped"),
        set=LOOPS,
    ),
    bug(
        "loops: a norm's gradient along itself",
        "r g for r (g - n mean(g n))",
        "training loops",
        ("kernels/training.py", " - (widen(row[c]) - mean) * r * along - level)", ")", 2),
        set=LOOPS,
    ),
    bug(
        "loops: what goes around a norm has no gradient",
        "only that of what goes through it",
        "training loops",
        ("loops.py", "for y in (x, g, more))", "for y in (x, g, None))"),
        set=LOOPS,
    ),
    bug(
        "loops: a layer learns from the last tokens only",
        "sums begun anew with each part of the tokens",
        "training loops",
        ("loops.py", "        return (y.mT @ x).float()\n", "        return (y[-32:].mT @ x[-32:]).float()\n"),
        ("kernels/products.py", "DEEP = 256", "DEEP = 32"),
        ("kernels/products.py", "depth, first > 0, here)", "depth, False, here)"),
        set=LOOPS,
    ),
    bug(
        "loops: the activation's slope forgotten",
        "the gradient goes around it",
        "training loops",
        ("kernels/training.py", "multiply_row(at(found), whole, at(g_part))", "multiply_row(at(found), 0, at(g_part))"),
        set=LOOPS,
    ),
    bug(
        "loops: rotated back the wrong way",
        "the sine's sign forgotten in the gradient",
        "training loops",
        ("kernels/training.py", "out[d] = a * cos[d] + b * sin[d + half]", "out[d] = a * cos[d] - b * sin[d + half]"),
        set=(*LOOPS, "model.recipe=modern", "model.zero_init=false"),
    ),
    bug(
        "loops: the gradient goes through what was dropped",
        "another mask in the backward pass",
        "training loops",
        (
            "loops.py",
            "return None if ctx.alone else g, drop(g, None, ctx.p, ctx.seed), None",
            "return None if ctx.alone else g, drop(g, None, ctx.p, ctx.seed + 1), None",
        ),
        set=(*LOOPS, "model.dropout=0.5"),
    ),
    bug(
        "loops: the same mask everywhere",
        "a seed that does not change",
        ("training mode", "dropout"),
        ("loops.py", "    return int(torch.empty((), dtype=torch.int64).random_())", "    return 1"),
        set=LOOPS,
    ),
    # ---- Generation ----
    bug(
        "the loops stay where they are",
        "the cache's length is not counted on",
        "fast sampling",
        ("decode.py", "        self.cache.length += T\n", ""),
    ),
    bug(
        "the loops read the newest key too late",
        "attention to what was there before, without the token itself",
        "fast sampling",
        ("kernels/sampling.py", "range(at + 1)", "range(max(at, 1))", 2),
        ("kernels/sampling.py", "softmax(weights[: at + 1], q.size)", "softmax(weights[: max(at, 1)], q.size)"),
    ),
    bug(
        "the loops rotate a prompt as its first token",
        "one position for all that is read at once",
        "fast sampling",
        ("kernels/sampling.py", "rotate(x, cos[t], sin[t])", "rotate(x, cos[0], sin[0])"),
        set=(*BFLOAT16, "model.recipe=modern"),
    ),
    bug(
        "the loops look with half of a query",
        "the second number of each pair is left out",
        "fast sampling",
        (
            "kernels/vectors.py",
            "fused(builder, fused(builder, builder.load(total), q0, k0), q1, k1)",
            "fused(builder, builder.load(total), q0, k0)",
        ),
        set=BFLOAT16,
    ),
    bug(
        "the loops forget a residual connection",
        "the attention's result in place of the stream, not added to it",
        "fast sampling",
        (
            "kernels/sampling.py",
            "stack.proj_bias[layer], room.x, True, units)",
            "stack.proj_bias[layer], room.x, False, units)",
        ),
    ),
    bug(
        "the loops norm before the rotation only keys",
        "queries are left as they are",
        "fast sampling",
        (
            "kernels/sampling.py",
            "            for x in (q, k):\n                if qk_eps:\n",
            "            for x in (q, k):\n                if qk_eps and x[0] == k[0]:\n",
        ),
        set=("model.recipe=modern",),
    ),
    bug(
        "a GELU too steep",
        "x for x / sqrt(2) in the error function",
        "fast sampling",
        ("kernels/__init__.py", "T = f32(0.3275911 / math.sqrt(2))", "T = f32(0.3275911)"),
        set=("model.activation=gelu",),
    ),
    bug(
        "matrices in fewer bits than they have",
        "half the bytes, whatever is lost",
        "fast sampling",
        ("generate.py", "packed = in_bfloat16(model)", "packed = True"),
    ),
    bug(
        "tiles with rows for columns",
        "each tile is laid down as it was, not turned",
        "fast sampling",
        ("decode.py", "permute(0, 1, 3, 4, 2)", "permute(0, 1, 3, 2, 4)"),
        set=BFLOAT16,
    ),
    bug(
        "the loops draw the token before",
        "off by one in the search for where a draw falls",
        "fast sampling",
        ("kernels/sampling.py", "                out[b] = v\n", "                out[b] = max(v - 1, 0)\n"),
    ),
    bug(
        "the first position's logits",
        "[:, 0] for [:, -1]",
        "generation",
        ("generate.py", "[:, -1, :n_tokens]", "[:, 0, :n_tokens]"),
    ),
    bug(
        "tokens that do not exist",
        "an embedding padded to a round size, and all of its rows to choose from",
        "generation",
        ("generate.py", "[:, -1, :n_tokens]", "[:, -1]"),
        set=("model.vocab_size=128",),
    ),
    bug(
        "temperature upside down",
        "times for divided by",
        "generation",
        ("generate.py", "keepdims=True)) / sampling.temperature", "keepdims=True)) * sampling.temperature"),
    ),
    bug(
        "the older half is kept",
        "the window slides the wrong way",
        "generation",
        ("generate.py", "history[:, -max(1, block_size // 2) :]", "history[:, : max(1, block_size // 2)]"),
    ),
    bug(
        "generation in training mode",
        "model.eval() forgotten: dropout while it speaks",
        "generation",
        ("generate.py", "    model.eval()\n", "    model.train()\n"),
    ),
    bug(
        "the last token is given twice",
        "the prompt's last token is fed again",
        "generation",
        ("generate.py", "        new = chosen.to(device)[:, None]\n", "        new = history[:, -1:]\n"),
    ),
]
