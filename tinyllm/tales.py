"""The built-in corpus `tales`: short children's stories whose entropy is known exactly.

A language model is trained to give high probability to text, and its loss is the mean of -log p. For text that
people wrote nobody knows how low that loss could go. These stories are drawn from a grammar of our own, so we
do know: a story is made by a row of choices, its probability is the product of the probabilities of those
choices, and the mean of -log p under the grammar itself is the entropy, which no model can beat on average.

    >>> import math
    >>> from tinyllm.tales import log_prob, stories
    >>> story = next(stories(1, seed=7))
    >>> math.isclose(story.log_prob, log_prob(story.text))
    True
    >>> log_prob("Once there was a spreadsheet.")
    -inf
    >>> some = list(stories(500))
    >>> floor = -sum(s.log_prob for s in some) / sum(len(s.text) for s in some)  # nats a character
    >>> 0.1 < floor < 0.3
    True

For this to be exact, the probability of the choices must be the probability of the *text*: two different rows
of choices must never give the same story. So every choice shows in the text at the place where it is made, its
options begin differently, and whatever was chosen (a name, a colour, a hiding place) is remembered and repeated
with certainty. The text then tells which choices were made, and `log_prob` reads them back from it.

The words and the plots are in `tales_words.py`, and so is the notation they are written in.
"""

import math
import re
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from tinyllm.tales_words import OPENING, WORLD


@dataclass(frozen=True)
class Story:
    """A story and the natural logarithm of its exact probability under the grammar."""

    text: str
    log_prob: float


# ---- The grammar: a template is a tuple of strings, slots and choices; an option of a choice is a template ----


@dataclass(frozen=True)
class Slot:
    """A place in a template where the thing or the phrase of this name is said."""

    name: str


@dataclass(frozen=True, eq=False)
class Choice:
    """Options with their probabilities. `facts[k]` becomes known when option k of a thing is chosen."""

    options: tuple[tuple, ...]
    facts: tuple[dict, ...]
    cumulative: tuple[float, ...]  # of the probabilities, for bisect
    log_probs: tuple[float, ...]


def make_choice(options: list[tuple], facts: list[dict]) -> Choice:
    """Earlier options are likelier: the k-th has weight 1 / (k + 3), a mild version of the skew of real words."""
    weights = [1 / (k + 3) for k in range(len(options))]
    total = math.fsum(weights)
    cumulative = [c / total for c in accumulate(weights)]
    cumulative[-1] = 1.0  # rounding must not leave a gap at the end that a draw could fall into
    return Choice(tuple(options), tuple(facts), tuple(cumulative), tuple(math.log(w / total) for w in weights))


def parse(source: str) -> tuple:
    """Turn "a [red|blue] {toy}" into a template. Line breaks are spaces, an empty line is a new paragraph."""
    source = re.sub(r"\s*\n\s*\n\s*", "\0", source.strip())
    source = re.sub(r"\s+", " ", source).replace("\0", "\n")
    source = re.sub(r"(?<=[\[|]) | (?=[\]|])", "", source)
    tokens = [t for t in re.split(r"([\[|\]]|\{\w+\})", source) if t]
    tokens.reverse()  # so that pop() takes the next one
    return _parse_template(tokens)


def _parse_template(tokens: list[str]) -> tuple:
    parts: list = []
    while tokens and tokens[-1] not in "|]":
        token = tokens.pop()
        if token[0] == "{":
            parts.append(Slot(token[1:-1]))
        elif token != "[":
            parts.append(token)
        else:
            options = [_parse_template(tokens)]
            while tokens.pop() == "|":  # and when it is "]" the choice is complete
                options.append(_parse_template(tokens))
            parts.append(make_choice(options, [{}] * len(options)))
    return tuple(parts)


def build(value: str | list | dict) -> tuple | Choice:
    """A string of `tales_words` becomes a template, a list or a dict a choice to be remembered."""
    if isinstance(value, str):
        return parse(value)
    facts = [build_facts(f) for f in value.values()] if isinstance(value, dict) else [{}] * len(value)
    return make_choice([parse(text) for text in value], facts)


def build_facts(facts: dict) -> dict:
    return {name: build(value) for name, value in facts.items()}


START = parse(OPENING)
KNOWN = build_facts(WORLD)


# ---- Telling: one walk through the grammar, shared by the writer and the reader ----


def tell(template: tuple, known: dict, chooser: "Writer | Reader") -> None:
    """Say a template from left to right. `known` is the memory of this one story and grows as it is told."""
    for part in template:
        if type(part) is str:
            chooser.say(part)
        elif type(part) is Choice:
            tell(part.options[chooser.pick(part)], known, chooser)
        else:
            value = known[part.name]
            if type(value) is Choice:  # first mention: choose it here, where it shows, and remember it
                k = chooser.pick(value)
                known[part.name] = value.options[k]
                known.update(value.facts[k])
                value = value.options[k]
            tell(value, known, chooser)


class Writer:
    """Draws every choice at random."""

    def __init__(self, seed: int, index: int):
        # Philox is a keyed counter: story `index` needs no story before it, and its bits are the same everywhere.
        self.bits = np.random.Philox(key=np.array([seed % 2**64, index], dtype=np.uint64))
        self.draws: list[float] = []
        self.pieces: list[str] = []
        self.log_prob = 0.0

    def say(self, text: str) -> None:
        self.pieces.append(text)

    def pick(self, choice: Choice) -> int:
        if not self.draws:  # 53 bits fill the fraction of a float
            self.draws = ((self.bits.random_raw(128) >> np.uint64(11)) * 2.0**-53).tolist()
        k = bisect(choice.cumulative, self.draws.pop())
        self.log_prob += choice.log_probs[k]
        return k


class Mismatch(Exception):
    """The text does not continue as the grammar would have it."""


class Reader:
    """Makes the choices that a given text shows. Follows `script` first, then the first option that fits."""

    def __init__(self, text: str, script: list[int]):
        self.text = text
        self.cursor = 0
        self.script = script
        self.picked: list[int] = []
        self.forks: list[list[int]] = []  # scripts of the roads not taken
        self.log_prob = 0.0

    def say(self, text: str) -> None:
        if not self.text.startswith(text, self.cursor):
            raise Mismatch
        self.cursor += len(text)

    def pick(self, choice: Choice) -> int:
        if len(self.picked) < len(self.script):
            k = self.script[len(self.picked)]
        else:
            fits = [k for k, option in enumerate(choice.options) if self.could_start(option)]
            if not fits:
                raise Mismatch
            k = fits[0]
            self.forks += [[*self.picked, other] for other in fits[1:]]
        self.picked.append(k)
        self.log_prob += choice.log_probs[k]
        return k

    def could_start(self, option: tuple) -> bool:
        """Whether the text goes on like this option, as far as can be said without telling it."""
        return not option or type(option[0]) is not str or self.text.startswith(option[0], self.cursor)


def derivations(text: str) -> list[float]:
    """The log-probability of every row of choices that gives exactly this text (by design at most one)."""
    found, scripts = [], [[]]
    while scripts:
        reader = Reader(text, scripts.pop())
        try:
            tell(START, dict(KNOWN), reader)
            if reader.cursor == len(text):
                found.append(reader.log_prob)
        except Mismatch:
            pass
        scripts += reader.forks
    return found


def log_prob(text: str) -> float:
    """The exact log-probability of a text under the grammar, in nats; -inf if it is not one of its stories."""
    found = derivations(text)
    if not found:
        return -math.inf
    top = max(found)
    return top + math.log(math.fsum(math.exp(p - top) for p in found))


def stories(n: int, seed: int = 0) -> Iterator[Story]:
    """Yield `n` stories. Story i depends on (seed, i) only, so any part of the corpus can be made anywhere."""
    for index in range(n):
        writer = Writer(seed, index)
        tell(START, dict(KNOWN), writer)
        yield Story("".join(writer.pieces), writer.log_prob)
