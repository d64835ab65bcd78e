"""Checks of the loop around the step: repeating, saving, resuming, keeping the best, speaking."""

import copy
import gc
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyllm import checkpoint as ckpt
from tinyllm.engine import Run, TrainState, evaluate, new_state, restore, snapshot, train, train_step
from tinyllm.events import Evaluated, Event, Finished, StepDone, Stopped
from tinyllm.generate import WORTH_LOADING, Sampling, as_multiplied, choose, fast_decoder, generate
from tinyllm.model import GPT, KVCache
from tinyllm.sanity.evaluation import small
from tinyllm.sanity.instruments import called, logits_of, variant
from tinyllm.sanity.result import Result, failed, listed, passed, skipped
from tinyllm.sanity.subject import Subject

DRAWS = 100  # of tokens, all over [0, 1)


def steps(run: Run, state: TrainState, subject: Subject, count: int) -> TrainState:
    """Take real steps on the real batches of their numbers, cut to the length of the subject's batch."""
    size = subject.batch[0].shape[1]
    for _ in range(count):
        inputs, targets = run.source.batch(state.step)
        train_step(run, state, (inputs[:, :size], targets[:, :size]))
    return state


def repeatable(subject: Subject) -> Result:
    """The same run twice, with an evaluation and other random draws in between, ends in the same bits."""
    run = small(subject)
    first = steps(run, new_state(run), subject, 2)
    second = steps(run, new_state(run), subject, 1)
    torch.rand(7)
    np.random.rand(3)
    evaluate(run, second.model, "val", n_windows=2)
    steps(run, second, subject, 1)
    if different := differing(run, first, second):
        diagnosis = f"an evaluation or a random draw in between changed {listed(different)}: no run could be resumed"
        fix = "seed dropout by (seed, step); evaluation must draw nothing; no state outside the checkpoint"
        return failed(f"{len(different)} tensors differ", "the same bits", diagnosis, fix)
    return passed("two steps twice: the same bits", "the same bits")


def differing(run: Run, a: TrainState, b: TrainState) -> list[str]:
    """Names of the tensors in which two models differ: by a bit on a CPU, elsewhere by more than the order of sums."""

    def alike(x: Tensor, y: Tensor) -> bool:
        near = run.runtime.device.type != "cpu" and torch.allclose(x.float(), y.float(), rtol=1e-3, atol=1e-5)
        return near or torch.equal(x, y)

    others = b.model.state_dict()
    return [name for name, tensor in a.model.state_dict().items() if not alike(tensor, others[name])]


def checkpoint(subject: Subject) -> Result:
    """Two steps, a save, a load, two steps: the same bits as four steps."""
    run = small(subject)
    whole = steps(run, new_state(run), subject, 4)
    state = steps(run, new_state(run), subject, 2)
    state.best_val_loss = state.best_before = 1.25
    expected = "2 steps + save + load + 2 steps = 4 steps, bit for bit"
    with tempfile.TemporaryDirectory(prefix="tinyllm-sanity-") as folder:
        path = Path(folder) / ckpt.LATEST
        ckpt.save(path, snapshot(run, state))
        if left := [p.name for p in Path(folder).iterdir() if p != path]:
            diagnosis = "a save leaves files behind"
            fix = "remove what was written aside"
            return failed(f"leaves {listed(left)}", expected, diagnosis, fix)
        loaded = restore(run, ckpt.load(path))
    if (loaded.step, loaded.best_val_loss) != (state.step, state.best_val_loss):
        diagnosis = (
            f"step {state.step}, best loss {state.best_val_loss} come back as {loaded.step}, {loaded.best_val_loss}"
        )
        return failed("step or best loss is lost", expected, diagnosis, "keep both in the checkpoint")
    if lost := differing(run, state, loaded):
        diagnosis = "weights are lost in the file"
        fix = "save and load all of them"
        return failed(f"{listed(lost)} come back changed", expected, diagnosis, fix)
    if lost := lost_state(state, loaded):
        diagnosis = f"the optimizer's state of {listed(lost)} is not what was saved: its averages start anew"
        return failed("optimizer state is lost", expected, diagnosis, "save and load optimizer.state, by parameter")
    steps(run, loaded, subject, 2)
    if different := differing(run, whole, loaded):
        diagnosis = f"after the load, steps go another way: {listed(different)} differ"
        fix = "something outside the checkpoint has a state"
        return failed(f"{len(different)} tensors differ", expected, diagnosis, fix)
    return passed("weights, optimizer and step come back; the same bits", expected)


def lost_state(a: TrainState, b: TrainState) -> list[str]:
    """Names of the parameters whose optimizer state differs."""
    names = {id(p): name for state in (a, b) for name, p in state.model.named_parameters()}
    found: list[dict[str, dict[str, Any]]] = [
        {names[id(p)]: state for o in holder.optimizers for p, state in o.state.items()} for holder in (a, b)
    ]
    return [
        name
        for name, state in found[0].items()
        if state.keys() != found[1].get(name, {}).keys()
        or not all(equal(value, found[1][name][key]) for key, value in state.items())
    ]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    return bool(a == b)


def train_loop(subject: Subject) -> Result:
    """The loop itself, from the first event to the last file: stopped, resumed, evaluated, saved as it should be."""
    schedule = {"warmup_steps": min(subject.run.config.schedule.warmup_steps, 2), "decay_steps": 0}
    often = {"max_steps": 4, "eval_interval": 2, "save_interval": 3, "log_interval": 1, "eval_windows": 3}
    with tempfile.TemporaryDirectory(prefix="tinyllm-sanity-") as folder:
        run = variant(small(subject), {"train": often | {"out_dir": folder}, "schedule": schedule})
        by_hand = new_state(run)
        for step in range(4):
            train_step(run, by_hand, run.source.batch(step))
        events: list[Event] = []
        stopped = new_state(run)
        events += train(run, stopped, lambda: stopped.step == 2)
        resumed = restore(run, ckpt.load(Path(folder) / ckpt.LATEST))
        first = len(events)
        events += train(run, resumed)
        if wrong := wrong_events(events[:first], events[first:]):
            diagnosis = "the loop does not do what the config asks"
            fix = "look at engine.train"
            return failed(wrong, "steps 1 to 4, evaluations at 0, 2 and 4", diagnosis, fix)
        if different := differing(run, by_hand, resumed):
            diagnosis = f"a run that is stopped at step 2 and resumed ends elsewhere: {listed(different)} differ"
            fix = "the batch, the rate and the dropout of a step must follow from its number alone"
            return failed(f"{len(different)} tensors differ", "the same bits as four steps", diagnosis, fix)
        return best_file(run, Path(folder), events)


def wrong_events(first: list[Event], second: list[Event]) -> str:
    """What is out of order in a run stopped after step 2 and in the one that resumed it, in words; '' if nothing."""
    steps = [[e.step for e in part if isinstance(e, StepDone)] for part in (first, second)]
    looks = [[e.step for e in part if isinstance(e, Evaluated)] for part in (first, second)]
    if steps != [[1, 2], [3, 4]]:
        return f"reports steps {steps[0]}, resumed {steps[1]}"
    if looks[0][:1] != [0] or looks[1] != [2, 4]:
        return f"evaluates at {looks[0]}, resumed {looks[1]}"
    if not isinstance(first[-1], Stopped) or not isinstance(second[-1], Finished):
        return f"ends with {type(first[-1]).__name__} and {type(second[-1]).__name__}"
    return ""


def best_file(run: Run, folder: Path, events: list[Event]) -> Result:
    """The verdict on the files: the latest is the end, the best is the best, its weights have the loss it claims."""
    losses = {e.step: e.val.loss for e in events if isinstance(e, Evaluated) and e.step}
    latest, best = ckpt.load(folder / ckpt.LATEST), ckpt.load(folder / ckpt.BEST)
    expected = "the latest of step 4, the best of the lowest validation loss"
    lowest = min(losses, key=losses.__getitem__)
    if latest.step != 4 or best.step != lowest:
        diagnosis = (
            f"ckpt.pt is of step {latest.step}, best.pt of step {best.step}; the lowest loss was at step {lowest}"
        )
        return failed(f"steps {latest.step} and {best.step}", expected, diagnosis, "save after the step; keep the best")
    loss = evaluate(run, restore(run, best).model, "val").loss
    if not math.isclose(loss, losses[lowest], rel_tol=1e-3):
        diagnosis = f"best.pt claims {losses[lowest]:.4f}, its weights have {loss:.4f}: those of another step"
        return failed(f"{loss:.4f}", f"{losses[lowest]:.4f}", diagnosis, "save the weights that were evaluated")
    return passed("stopped at 2, resumed, ended at 4: the same bits; best and latest are right", expected)


def memory_growth(subject: Subject) -> Result:
    """A step leaves nothing behind: what grows a little each step is out of memory in the middle of the night."""
    run = small(subject)
    state = subject.own_state(run)
    counts = []
    gc.freeze()  # what is there already is not looked through again and again
    try:
        for _ in range(4):
            steps(run, state, subject, 1)
            gc.collect()
            counts.append(sum(1 for each in gc.get_objects() if issubclass(type(each), Tensor)))
    finally:
        gc.unfreeze()
    if counts[1] < counts[2] < counts[3]:
        diagnosis = f"each step leaves {counts[3] - counts[2]} tensors behind, and what they were computed from"
        fix = "a list or a sum of losses or activations? keep numbers, not tensors: .item(), .detach()"
        return failed(f"{counts[2]:,} tensors, a step later {counts[3]:,}", "as many", diagnosis, fix)
    return passed(f"{counts[3]:,} tensors, as many as a step before", "as many")


def generation(subject: Subject) -> Result:
    """Token by token, with what it remembers, the model says what it would say reading the whole text each time."""
    model, size = copy.deepcopy(subject.woken), subject.run.config.model.block_size
    length = max(1, min(size // 2, 24))
    count, expected = max(1, min(8, size - length)), "the likeliest token at each place"
    for row in subject.batch[0][:2, :length]:
        said = [
            int(ids[0])
            for ids in generate(model, row.tolist(), Sampling(temperature=0, max_new_tokens=count), block_size=size)
        ]
        text = row.tolist()
        for at, token in enumerate(said):
            logits = logits_of(model, subject.tensor(np.array([text])))[0, -1]
            if float(logits.max() - logits[token]) > 1e-3 * float(logits.std()):
                diagnosis = f"the {at + 1}. new token is not the one that the model finds likeliest"
                fix = "look at the positions and the mask of cached tokens"
                return failed(f"differs at new token {at + 1}", expected, diagnosis, fix)
            text.append(token)
        if len(said) != count:
            diagnosis = "generation ends too early"
            return failed(f"{len(said)} tokens", f"{count}", diagnosis, "look at max_new_tokens")
    some = subject.run.vocab_size // 2  # as if the embedding had twice as many rows as the tokenizer has tokens
    greedy = Sampling(temperature=0, max_new_tokens=count)
    if max(int(ids[0]) for ids in generate(model, [0], greedy, n_tokens=some, block_size=size)) >= some:
        wrong = "it gives ids beyond the tokenizer's, which stand for nothing"
        return failed(wrong, "tokens of the tokenizer", wrong, "cut the logits to the tokenizer's size")
    if wrong := ended_wrongly(subject, said):
        return failed(wrong, "samples that differ, and that end", wrong, "look at generate.generate")
    if wrong := beyond_the_context(subject):
        return failed(wrong, "the end of the text so far", wrong, "look at what is read again when the window slides")
    if wrong := cached_wrongly(subject, length):
        return failed(wrong, "the logits of the whole text", wrong, "look at the positions of cached tokens")
    if wrong := sampled_wrongly():
        return failed(wrong, "tokens as often as they are likely", wrong, "look at generate.choose")
    return passed(f"twice {count} new tokens, cached as uncached", expected)


def ended_wrongly(subject: Subject, said: list[int]) -> str:
    """What is wrong with several samples, or with the end of a text, in words; '' for nothing."""
    size, start = subject.run.config.model.block_size, subject.batch[0][1, :1].tolist()
    steps = generate(subject.woken, start, Sampling(max_new_tokens=16), n_samples=2, block_size=size)
    if all(one == other for one, other in steps):
        return "two samples are the same, token by token"
    row = subject.batch[0][1, : max(1, min(size // 2, 24))].tolist()  # the text after which `said` was said
    greedy = Sampling(temperature=0, max_new_tokens=4)
    ended = list(generate(subject.woken, row, greedy, end_token=said[0], block_size=size))
    return "" if ended == [[None]] else "it goes on after the token that ends a text"


def beyond_the_context(subject: Subject) -> str:
    """What is wrong with a token that follows on a full context, in words; '' for nothing. Dropout is off, too."""
    size, model = subject.run.config.model.block_size, copy.deepcopy(subject.own_woken).train()
    text = subject.windows("val", 1, size)[0][0].tolist()
    with called(model) as calls:
        said = [
            int(ids[0]) for ids in generate(model, text, Sampling(temperature=0, max_new_tokens=2), block_size=size)
        ]
    if any(call.training for call in calls):
        return "it speaks in training mode, with dropout"
    # How much of the past is kept when the window slides is the generator's choice, that it is its end is not.
    kept = [(text + said[:1])[-length:] for length in {size, max(1, size // 2)}]
    likely = [int(logits_of(model.eval(), subject.tensor(np.array([part])))[0, -1].argmax()) for part in kept]
    return "" if said[1] in likely else "once the context is full, it goes on from something else than the text's end"


def cached_wrongly(subject: Subject, length: int) -> str:
    """How the built-in model's logits with its cache differ from those without, in words; '' for not at all."""
    if type(subject.woken) is not GPT:
        return ""
    tokens = subject.tensor(subject.batch[0][:1])
    whole = logits_of(subject.woken, tokens)
    cache, parts = KVCache(subject.woken, 1), [tokens[:, :length], *tokens[:, length:].split(1, dim=1)]
    with torch.no_grad():
        pieces = [subject.woken(part, cache) for part in parts if part.shape[1]]
    error = (torch.cat(pieces, dim=1) - whole).abs().amax((0, 2)) / whole.std()
    wrong = (error > 1e-3).nonzero()
    return f"with its cache the model gives other logits, from position {int(wrong[0])} on" if len(wrong) else ""


def fast_sampling(subject: Subject) -> Result:
    """The compiled loops, through which a long text goes, give the logits of the whole text read at once.

    With the weights of a run in bfloat16 they round what its evaluation rounds, and not more; and a text is the same,
    to the last bit, for any number of them. From the same logits they draw the tokens that NumPy draws.
    """
    model, tokens, runtime = copy.deepcopy(subject.woken), subject.tensor(subject.batch[0][:3]), subject.run.runtime
    if (decoded := logits_decoded(model, tokens)) is None:
        return skipped("the compiled loops are for the built-in model, on a CPU")
    expected = "those of the whole text, within 0.1% of their spread"
    wrong, error = decoded_wrongly(model, tokens, 1e-3)
    if not wrong and runtime.dtype == torch.bfloat16:
        expected += "; with bfloat16 weights off by twice what an evaluation is, and the same for one text and three"
        as_multiplied(model)
        with runtime.autocast():
            evaluated = logits_of(model, tokens)
        whole = logits_of(model, tokens)
        wrong, error = decoded_wrongly(model, tokens, 1e-3 + 2 * float((evaluated - whole).abs().amax() / whole.std()))
        if not wrong and not torch.equal(logits_decoded(model, tokens[1:2]), logits_decoded(model, tokens)[1:2]):
            wrong = "what a text says depends on how many are written with it"
    wrong = wrong or drawn_wrongly(decoded[0, -1])
    measured = f"logits of {len(tokens)} texts, off by {error:.1g} of their spread"
    return failed(measured, expected, wrong, "look at decode.py and kernels/") if wrong else passed(measured, expected)


def decoded_wrongly(model: nn.Module, tokens: Tensor, allowed: float) -> tuple[str, float]:
    """What is wrong with the logits of the loops, in words, '' for nothing; and how far they are off."""
    decoded, whole = logits_decoded(model, tokens), logits_of(model, tokens)
    start = whole.shape[1] - decoded.shape[1]
    error = (decoded - whole[:, start:]).abs().amax((0, 2)) / whole.std()
    wrong = (~(error <= allowed)).nonzero()
    if not len(wrong):
        return "", float(error.max())
    first = start + int(wrong[0])
    what = f"long texts are sampled from other logits than the model's, from position {first} on"
    return f"{what} (off by {float(error.max()):.2g}, not {allowed:.1g})", float(error.max())


def drawn_wrongly(logits: Tensor) -> str:
    """What is wrong with the tokens that the loops draw from logits (V,), in words; a few may differ by rounding."""
    from tinyllm.decode import Decoder  # which takes a fifth of a second

    rows, draws = logits.repeat(DRAWS, 1), torch.arange(DRAWS, dtype=torch.float64) / DRAWS
    sampling = Sampling()
    others = int((Decoder.draw(rows, sampling.temperature, draws) != choose(rows, sampling, draws)).sum())
    return f"of {DRAWS} tokens drawn from the same logits {others} are not NumPy's" if others > DRAWS / 20 else ""


def logits_decoded(model: nn.Module, tokens: Tensor) -> Tensor | None:
    """Logits (B, some, V) after the last tokens of (B, T), by the loops, if any: half of these at once, then each."""
    if type(model) is not GPT or (decoder := fast_decoder(model, len(tokens), 0, WORTH_LOADING)) is None:
        return None
    half = max(1, tokens.shape[1] // 2)
    parts = [tokens[:, :half], *tokens[:, half:].split(1, dim=1)]
    return torch.stack([decoder(part).clone() for part in parts if part.shape[1]], dim=1)


def sampled_wrongly() -> str:
    """What is wrong with the way tokens are drawn, in words; '' for nothing. Evenly spread draws leave no chance."""
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    draws = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    cases = {
        "temperature 1": (Sampling(temperature=1.0), logits.softmax(-1)),
        "temperature 0.5": (Sampling(temperature=0.5), (logits / 0.5).softmax(-1)),
        "top_k 2": (Sampling(temperature=1.0, top_k=2), torch.cat((logits[:2].softmax(-1), torch.zeros(3)))),
        "top_p 0.7": (Sampling(temperature=1.0, top_p=0.7), torch.cat((logits[:2].softmax(-1), torch.zeros(3)))),
    }
    for name, (sampling, right) in cases.items():
        ids = choose(logits.expand(2000, 5), sampling, draws)
        found = torch.bincount(ids, minlength=5) / 2000
        if (found - right).abs().max() > 0.002:
            return f"{name} draws {[round(float(f), 2) for f in found]}, should {[round(float(r), 2) for r in right]}"
    return ""
