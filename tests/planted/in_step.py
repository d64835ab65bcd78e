"""Mistakes in the loss, the optimizer and the step."""

from planted.bug import bug

LOSS = "cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction)"
NARROW = "F.cross_entropy(logits.float(), targets, reduction=reduction)"
WEIGHTED = "micro_loss = loss_fn(logits, y) * share"
BACKWARD = "        micro_loss.backward()\n"
CLIP = "    norm = clip_gradients(state, config.optim.grad_clip)\n"
STEP = "    for optimizer in () if values.skipped else state.optimizers:\n        optimizer.step()\n"
END = "    zero_grad(state)\n    state.recent_losses"
RATE = "    set_learning_rate(state.optimizers, rate)\n"
ADAMW = "AdamW(list(as_dicts.values()), config.betas, config.eps)"
IMPORT = "from torch.optim.adamw import adamw\n"
BFLOAT16 = ("runtime.dtype=bfloat16",)
WIDE = ("model.vocab_size=4096",)

BUGS = [
    # ---- The loss ----
    bug(
        "sum for mean",
        "reduction='sum': the rate means something else now",
        "loss",
        ("engine.py", LOSS, LOSS.replace("reduction)", "'sum')")),
    ),
    bug(
        "mean over the batch only",
        "summed over time",
        "loss",
        (
            "engine.py",
            LOSS,
            LOSS.replace("reduction)", "'sum')") + " / (1 if reduction == 'sum' else len(targets))",
        ),
    ),
    bug(
        "shifted in the loss too",
        "logits[:, :-1] against targets[:, 1:], as where the model gets its own inputs as labels",
        "loss",
        (
            "engine.py",
            LOSS,
            "cross_entropy(logits[:, :-1].flatten(0, -2), targets[:, 1:].flatten(), reduction)",
        ),
    ),
    bug(
        "softmax before the loss",
        "cross_entropy does it itself",
        "loss",
        ("engine.py", LOSS, LOSS.replace("-2)", "-2).float().softmax(-1)")),
    ),
    bug(
        "label smoothing",
        "left from a classifier",
        "loss",
        ("fast.py", NARROW, NARROW.replace("reduction=", "label_smoothing=0.1, reduction=")),
    ),
    bug(
        "temperature in the loss",
        "sampling's division",
        "loss",
        ("engine.py", LOSS, LOSS.replace("-2)", "-2).float().div(0.8)")),
    ),
    bug(
        "token 0 ignored",
        "ignore_index=0 for a padding that this vocabulary does not have",
        "loss",
        ("fast.py", NARROW, NARROW.replace("reduction=", "ignore_index=0, reduction=")),
    ),
    bug(
        "ignored targets count",
        "-100 clamped to a token",
        "loss",
        ("engine.py", LOSS, LOSS.replace("targets.flatten()", "targets.flatten().clamp(min=0)")),
    ),
    bug(
        "only the last position learns",
        "logits[:, -1]",
        "loss",
        ("engine.py", LOSS, "cross_entropy(logits[:, -1], targets[:, -1], reduction)"),
    ),
    bug(
        "the second half only",
        "the loss mask of a chat model",
        "loss",
        (
            "engine.py",
            LOSS,
            LOSS.replace("logits", "logits[:, logits.shape[1] // 2 :]").replace(
                "targets", "targets[:, targets.shape[1] // 2 :]"
            ),
        ),
    ),
    bug(
        "rows and columns of the targets",
        "view after a transpose",
        "loss",
        ("engine.py", LOSS, LOSS.replace("targets.flatten()", "targets.T.flatten()")),
    ),
    bug(
        "the loss in bfloat16",
        "no float(): steps of 0.03 nats",
        ("loss", "precision"),
        ("fast.py", NARROW, NARROW.replace(".float()", "")),
        set=BFLOAT16,
    ),
    bug(
        "loss clamped",
        "clamp(max=3) against spikes: no gradient where it is needed",
        "loss",
        (
            "engine.py",
            LOSS,
            LOSS + ".clamp(max=3.0 if reduction == 'mean' else 1e30)",
        ),
    ),
    bug("bits for nats", "divided by ln 2", "loss", ("engine.py", LOSS, LOSS + " / math.log(2)")),
    bug(
        "the target left out of the gradient",
        "the probabilities alone, in the loss of a wide vocabulary: all logits are pushed down",
        "gradient",
        ("fast.py", "share.gather(1, target) - 1)", "share.gather(1, target))"),
        set=WIDE,
    ),
    bug(
        "probabilities that do not add up",
        "exp without its sum, in the gradient of the loss of a wide vocabulary",
        "gradient",
        ("fast.py", ".sub_(log_sum).exp_()", ".exp_()"),
        set=WIDE,
    ),
    bug(
        "ignored targets count, of many tokens",
        "the mean over all rows, in the loss of a wide vocabulary",
        "loss",
        ("fast.py", "(targets != IGNORED).sum())", "len(targets))"),
        set=WIDE,
    ),
    bug(
        "the gradient of another loss",
        "the loss shown is right, the one that is differentiated is smoothed",
        "gradient",
        (
            "engine.py",
            "        micro_loss.backward()\n",
            "        (0.9 * micro_loss - 0.1 * logits.log_softmax(-1).mean() * share).backward()\n",
        ),
    ),
    # ---- Accumulation ----
    bug(
        "micro-batches not divided",
        "their gradients add up: the step is as many times too large",
        ("gradient", "accumulation"),
        ("engine.py", WEIGHTED, "micro_loss = loss_fn(logits, y)"),
    ),
    bug(
        "micro-batches divided twice",
        "by their number, and once more",
        ("gradient", "accumulation"),
        ("engine.py", WEIGHTED, "micro_loss = loss_fn(logits, y) / config.accumulation_steps**2"),
    ),
    bug(
        "divided by the rows",
        "the mean is there already",
        ("gradient", "accumulation"),
        ("engine.py", WEIGHTED, "micro_loss = loss_fn(logits, y) / config.train.batch_size"),
    ),
    bug(
        "a running mean of micro-batches",
        "weighted by 1 / (i + 1): the first count most",
        ("gradient", "accumulation"),
        ("engine.py", WEIGHTED, "micro_loss = loss_fn(logits, y) / (micro_step + 1)"),
    ),
    bug(
        "only the last micro-batch",
        "zero_grad inside the loop",
        ("gradient", "accumulation"),
        ("engine.py", BACKWARD, "        zero_grad(state)\n" + BACKWARD),
    ),
    bug(
        "only the first micro-batch",
        "backward outside the loop, in effect",
        ("gradient", "accumulation"),
        ("engine.py", BACKWARD, "        if micro_step == 0:\n            micro_loss.backward()\n"),
    ),
    bug(
        "the same micro-batch each time",
        "x of the outer loop",
        ("gradient", "accumulation"),
        (
            "engine.py",
            "        yield x, y, len(x) / len(inputs)\n",
            "        yield inputs[: len(x)], targets[: len(x)], len(x) / len(inputs)\n",
        ),
    ),
    bug(
        "a step after each micro-batch",
        "optimizer.step() in the loop",
        ("one step", "accumulation"),
        (
            "engine.py",
            BACKWARD,
            BACKWARD + "        if micro_step + 1 < config.accumulation_steps:\n"
            "            for optimizer in state.optimizers:\n"
            "                optimizer.step()\n",
        ),
    ),
    bug(
        "the loss of the last micro-batch is shown",
        "loss = where loss += was meant: the weights are right, the curve is not",
        ("accumulation", "gradient", "train loop"),
        ("engine.py", "        loss += micro_loss.detach()\n", "        loss = micro_loss.detach()\n"),
    ),
    # ---- zero_grad ----
    bug("no zero_grad", "gradients of all steps add up", "zero_grad", ("engine.py", END, "    state.recent_losses")),
    bug(
        "zero_grad for the first optimizer only",
        "Muon's gradients are cleared, AdamW's are not",
        "zero_grad",
        (
            "engine.py",
            "def zero_grad(state: TrainState) -> None:\n    for group in all_groups(state.optimizers):",
            "def zero_grad(state: TrainState) -> None:\n    for group in all_groups(state.optimizers[:1]):",
        ),
        set=("optim.name=muon", "optim.muon_lr=0.01"),
    ),
    bug(
        "zero_grad before the step",
        "one line too early",
        ("gradient", "weights move", "gradient reach"),
        ("engine.py", CLIP, CLIP + "    zero_grad(state)\n"),
    ),
    # ---- Clipping ----
    bug(
        "no clipping",
        "the norm is measured, nothing is scaled",
        "clipping",
        ("engine.py", CLIP, CLIP.replace("config.optim.grad_clip", "0")),
    ),
    bug(
        "clipping after the step",
        "too late to matter",
        "clipping",
        ("engine.py", CLIP, CLIP.replace("config.optim.grad_clip", "0")),
        ("engine.py", STEP, STEP + CLIP),
    ),
    bug(
        "clipping each micro-batch",
        "inside the loop: the sum is not clipped, its parts are",
        "clipping",
        ("engine.py", BACKWARD, BACKWARD + "        clip_gradients(state, config.optim.grad_clip)\n"),
        ("engine.py", CLIP, CLIP.replace("config.optim.grad_clip", "0")),
    ),
    bug(
        "clipping each tensor",
        "a norm a tensor, not one of all",
        "clipping",
        (
            "engine.py",
            "    return nn.utils.clip_grad_norm_(parameters, limit or math.inf, foreach=True)\n",
            "    return torch.stack([nn.utils.clip_grad_norm_(p, limit or math.inf) for p in parameters]).norm()\n",
        ),
    ),
    bug(
        "clipping by value",
        "clip_grad_value_",
        "clipping",
        (
            "engine.py",
            "    return nn.utils.clip_grad_norm_(parameters, limit or math.inf, foreach=True)\n",
            "    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])\n"
            "    nn.utils.clip_grad_value_(parameters, limit or math.inf)\n"
            "    return norm\n",
        ),
    ),
    bug(
        "clipping the first group only",
        "param_groups[0]",
        "clipping",
        (
            "engine.py",
            "    parameters = [p for group in all_groups(state.optimizers) for p in",
            "    parameters = [p for group in list(all_groups(state.optimizers))[:1] for p in",
        ),
    ),
    bug(
        "the gradient normalised, not clipped",
        "divided by its norm also when that is small",
        "clipping",
        (
            "engine.py",
            "    return nn.utils.clip_grad_norm_(parameters, limit or math.inf, foreach=True)\n",
            "    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])\n"
            "    for p in parameters:\n"
            "        if p.grad is not None and limit:\n"
            "            p.grad.mul_(limit / norm)\n"
            "    return norm\n",
        ),
    ),
    bug(
        "nan goes on",
        "nobody looks whether the loss is finite: one bad batch, and all weights are nan",
        "overflow",
        ("engine.py", "elif not values.is_finite:", "elif False:"),
    ),
    bug(
        "the gradient may be infinite",
        "the loss is looked at, the gradient is not",
        "overflow",
        ("engine.py", "elif not values.is_finite:", "elif not math.isfinite(values.loss):"),
    ),
    # ---- The optimizer's groups ----
    bug(
        "decay on norms and biases",
        "model.parameters() in one group",
        "decay groups",
        ("optim.py", '0.0 if group == "no_decay" else config.weight_decay', "config.weight_decay"),
    ),
    bug(
        "no decay at all",
        "weight_decay is not passed on",
        "decay groups",
        ("optim.py", '0.0 if group == "no_decay" else config.weight_decay', "0.0"),
    ),
    bug(
        "decay on the wrong group",
        "the condition the wrong way round",
        "decay groups",
        ("optim.py", '0.0 if group == "no_decay" else', '0.0 if group != "no_decay" else'),
    ),
    bug(
        "embeddings decay though they should not",
        "decay_embeddings is not looked at",
        "decay groups",
        ("optim.py", "parameter.dim() >= 2 and (config.decay_embeddings or not is_embedding)", "parameter.dim() >= 2"),
        set=("optim.decay_embeddings=false",),
    ),
    bug(
        "only the matrices are trained",
        "the second group forgotten",
        ("decay groups", "weights move"),
        (
            "optim.py",
            "AdamW(list(as_dicts.values()),",
            "AdamW(list(as_dicts.values())[:1],",
        ),
    ),
    bug(
        "only the blocks are trained",
        "model.blocks.parameters()",
        ("decay groups", "weights move"),
        ("optim.py", "        if not parameter.requires_grad:\n", '        if not name.startswith("blocks"):\n'),
    ),
    bug(
        "the optimizer of a copy",
        "built before deepcopy, compile or a wrapper",
        ("decay groups", "weights move"),
        (
            "engine.py",
            "build_optimizers(model, run.config.optim, run.runtime.dtype))",
            "build_optimizers(__import__('copy').deepcopy(model), run.config.optim, run.runtime.dtype))",
        ),
    ),
    bug(
        "a parameter replaced after the optimizer was built",
        "the embedding resized or tied afterwards",
        ("decay groups", "weights move"),
        (
            "engine.py",
            "    return TrainState(model, build_optimizers(model, run.config.optim, run.runtime.dtype))\n",
            "    state = TrainState(model, build_optimizers(model, run.config.optim))\n"
            "    model.norm.weight = nn.Parameter(model.norm.weight.detach().clone())\n"
            "    return state\n",
        ),
    ),
    bug(
        "Muon for the embeddings",
        "every matrix, though an embedding is a table",
        ("decay groups", "optimizer"),
        ("optim.py", "parameter.dim() == 2 and not is_embedding and", "parameter.dim() == 2 and"),
        set=("optim.name=muon", "optim.muon_lr=0.01"),
        warns=True,
    ),
    # ---- The optimizer ----
    bug(
        "AdamW's own betas",
        "betas are read, and not passed on",
        "optimizer",
        ("optim.py", ADAMW, ADAMW.replace("config.betas", "(0.9, 0.999)")),
    ),
    bug(
        "AdamW's own eps",
        "eps is read, and not passed on",
        "optimizer",
        ("optim.py", ADAMW, ADAMW.replace("config.eps", "1e-8")),
        set=("optim.eps=1e-6",),
    ),
    bug(
        "Adam for AdamW",
        "the decay goes through the averages",
        "optimizer",
        ("optim.py", IMPORT, "from torch.optim.adam import adam as adamw\n"),
    ),
    bug(
        "SGD for AdamW",
        "an experiment left behind",
        "optimizer",
        ("optim.py", IMPORT, "def adamw(ps, grads, *_, lr, **__): torch._foreach_add_(ps, grads, alpha=-lr)\n"),
    ),
    bug(
        "uphill",
        "maximize=True",
        "optimizer",
        ("optim.py", "maximize=False", "maximize=True"),
    ),
    bug(
        "AMSGrad",
        "a switch that was tried once",
        "optimizer",
        (
            "optim.py",
            "                [],\n                steps,\n                fused=True,\n                amsgrad=False,",
            "                [s.setdefault('max', torch.zeros_like(s['exp_avg'])) for s in states],\n"
            "                steps,\n                fused=True,\n                amsgrad=True,",
        ),
    ),
    bug(
        "no bias correction",
        "a home-made Adam without 1 - beta^t",
        "optimizer",
        (
            "engine.py",
            STEP,
            STEP.replace(
                "        optimizer",
                "        for averages in optimizer.state.values():\n"
                "            averages['step'].fill_(10_000)\n"
                "        optimizer",
            ),
        ),
    ),
    bug(
        "the step twice",
        "optimizer.step() in the loop and in a helper",
        "one step",
        ("engine.py", STEP, STEP + "        optimizer.step()\n"),
    ),
    bug(
        "the step every other time",
        "the accumulation counted twice",
        "one step",
        (
            "engine.py",
            STEP,
            STEP.replace("values.skipped", "state.step % 2 == 0"),
        ),
    ),
    bug(
        "only the first optimizer steps",
        "there are two with Muon",
        ("one step", "weights move"),
        (
            "engine.py",
            STEP,
            STEP.replace("state.optimizers:", "state.optimizers[:1]:"),
        ),
        set=("optim.name=muon", "optim.muon_lr=0.01"),
    ),
    bug(
        "the optimizer made anew each step",
        "built inside the loop: averages of one gradient",
        "one step",
        ("engine.py", RATE, "    state.optimizers = build_optimizers(state.model, config.optim)\n" + RATE),
    ),
    bug(
        "decay applied by hand too",
        "p *= 1 - lr * wd beside AdamW",
        "optimizer",
        (
            "engine.py",
            STEP,
            STEP + "    for group in all_groups(state.optimizers):\n"
            "        for p in group['params']:\n"
            "            p.data.mul_(1 - group['lr'] * group['weight_decay'])\n",
        ),
    ),
    bug(
        "Muon's own momentum",
        "muon_momentum is read, and not passed on",
        "optimizer",
        ("optim.py", "Muon([muon], config.muon_momentum", "Muon([muon], 0.95"),
        set=("optim.name=muon", "optim.muon_lr=0.01", "optim.muon_momentum=0.8"),
    ),
    bug(
        "averages in bfloat16",
        "to save memory: beta2's small steps round away",
        "optimizer",
        (
            "engine.py",
            STEP,
            STEP + "        for averages in optimizer.state.values():\n"
            "            averages['exp_avg_sq'].copy_(averages['exp_avg_sq'].bfloat16())\n",
        ),
    ),
    # ---- The schedule, as a function ----
    bug(
        "the minimum is not reached",
        "half of the cosine's half",
        "learning rate",
        ("schedule.py", "math.cos(math.pi * progress)", "math.cos(0.5 * math.pi * progress)"),
    ),
    bug(
        "the cosine without pi",
        "cos(progress)",
        "learning rate",
        ("schedule.py", "math.cos(math.pi * progress)", "math.cos(progress)"),
    ),
    bug(
        "the cosine comes back",
        "progress not clamped: the rate rises again",
        "learning rate",
        (
            "schedule.py",
            "min(1.0, (step - warmup) / (config.decay_steps - warmup))",
            "(step - warmup) / (config.decay_steps - warmup)",
        ),
        set=("schedule.decay_steps=200",),
    ),
    bug(
        "a jump after the warmup",
        "the decay counts from step 0",
        "learning rate",
        ("schedule.py", "(step - warmup) / (config.decay_steps - warmup)", "step / config.decay_steps"),
        set=("schedule.warmup_steps=40",),
    ),
    bug(
        "the first step has rate zero",
        "step / warmup",
        "learning rate",
        ("schedule.py", "return (step + 1) / warmup", "return step / warmup"),
    ),
    bug(
        "min_lr ignored",
        "the decay goes to zero",
        "learning rate",
        ("schedule.py", "lowest = config.optim.min_lr / config.optim.lr", "lowest = 0.0"),
    ),
    bug(
        "min_lr taken for a share",
        "0.0003 of the peak",
        "learning rate",
        ("schedule.py", "lowest = config.optim.min_lr / config.optim.lr", "lowest = config.optim.min_lr"),
    ),
    bug(
        "the decay in thousands of steps",
        "decay_steps in other units",
        "learning rate",
        ("schedule.py", "/ (config.decay_steps - warmup))", "/ (1000 * config.decay_steps - warmup))"),
    ),
    # ---- The schedule, as it is used ----
    bug(
        "another rate is shown than used",
        "the factor in place of the rate, in the metrics and the plots",
        ("schedule in use", "train loop"),
        ("engine.py", "rate * config.optim.lr, limit)", "rate, limit)"),
    ),
    bug(
        "only the first group gets the rate",
        "param_groups[0]['lr'] = lr",
        ("schedule in use", "learning rate"),
        (
            "optim.py",
            "    for group in all_groups(optimizers):\n        group[",
            "    for group in list(all_groups(optimizers))[:1]:\n        group[",
        ),
    ),
    bug("the rate never set", "the scheduler is made and never stepped", "schedule in use", ("engine.py", RATE, "")),
    bug(
        "one step late",
        "the rate of the step before",
        "schedule in use",
        ("engine.py", "rate = factor(state.step, config)", "rate = factor(max(state.step - 1, 0), config)"),
    ),
    bug(
        "one step early",
        "the step is counted before the rate is asked for",
        "schedule in use",
        ("engine.py", "rate = factor(state.step, config)", "rate = factor(state.step + 1, config)"),
    ),
    bug(
        "the rate set after the step",
        "scheduler.step() for the next one, which the first has not",
        "schedule in use",
        ("engine.py", RATE, ""),
        ("engine.py", STEP, STEP + RATE),
    ),
    bug(
        "the schedule in micro-steps",
        "counted in the inner loop: it ends early",
        "schedule in use",
        (
            "engine.py",
            "rate = factor(state.step, config)",
            "rate = factor(state.step * config.accumulation_steps, config)",
        ),
    ),
    bug(
        "the schedule in epochs",
        "scheduler.step() once an epoch",
        "schedule in use",
        ("engine.py", "rate = factor(state.step, config)", "rate = factor(state.step // 100, config)"),
    ),
    bug(
        "the rate compounds",
        "lr *= factor, on what it was",
        ("schedule in use", "learning rate"),
        ("optim.py", 'group["lr"] = group["peak_lr"] * factor', 'group["lr"] = group["lr"] * factor'),
    ),
    bug(
        "Muon at AdamW's rate",
        "one rate for both optimizers",
        ("schedule in use", "learning rate", "decay groups", "optimizer"),
        ("optim.py", 'peak_lr=config.muon_lr if group == "muon" else config.lr', "peak_lr=config.lr"),
        set=("optim.name=muon", "optim.muon_lr=0.01"),
    ),
    bug(
        "the decay follows the wrong rate",
        "weight decay scheduled with the rate, twice",
        ("optimizer", "decay groups", "schedule in use"),
        (
            "optim.py",
            '        group["lr"] = group["peak_lr"] * factor\n',
            '        group["lr"] = group["peak_lr"] * factor\n        group["weight_decay"] *= factor\n',
        ),
    ),
]
