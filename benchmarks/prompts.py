"""Prompts for benchmarks: the same seed gives the same prompts, another seed shares no prefix with it.

Token ids suit an engine or any vocabulary; code suits the models that ship with Headwater, which learnt Python: on it
speculation and prefix figures mean something. The code is the standard library's held-out part, which the models have
not seen; its text depends on the interpreter's version.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from models.corpus import documents

TokenIds = tuple[int, ...]
P = TypeVar("P", str, TokenIds)
P_co = TypeVar("P_co", str, TokenIds, covariant=True)

CHARS_PER_TOKEN = 3.0  # the shipped tokenizer on the held-out code: 2.97


@dataclass(frozen=True, slots=True)
class Shape:
    """How many prompts and how long. Lengths in tokens; with `prefix_tokens`, they are those of what follows it."""

    num_prompts: int
    shortest_tokens: int
    longest_tokens: int
    prefix_tokens: int = 0  # 0: nothing is shared
    num_prefixes: int = 1  # groups that share one each

    @property
    def max_tokens(self) -> int:
        """Of the longest prompt."""
        return self.prefix_tokens + self.longest_tokens


class Source(Protocol[P_co]):
    """Where prompts come from."""

    def piece(self, rng: random.Random, num_tokens: int) -> P_co:
        """A new piece of this many tokens, exactly or nearly, whose beginning no other piece has."""


class RandomTokens:
    """Uniformly random token ids in [first_id, vocab_size). Exact in length, without meaning to any model."""

    def __init__(self, vocab_size: int, first_id: int = 0) -> None:
        self._ids = range(first_id, vocab_size)

    def piece(self, rng: random.Random, num_tokens: int) -> TokenIds:
        return tuple(rng.choices(self._ids, k=num_tokens))


class Code:
    """Excerpts of Python source. Each begins with a comment of its own, so that no two begin alike."""

    def __init__(self, files: Iterable[str]) -> None:
        self._lines = [line for text in files for line in text.splitlines(keepends=True)]
        if not self._lines:
            raise ValueError("no source text to take excerpts from")

    @classmethod
    def heldout(cls) -> Code:
        """The part of the standard library that the shipped models did not train on."""
        return cls(documents("heldout"))

    def piece(self, rng: random.Random, num_tokens: int) -> str:
        num_chars = max(round(num_tokens * CHARS_PER_TOKEN), 1)
        text = [f"# {rng.getrandbits(32):08x}\n"]
        length, line = len(text[0]), rng.randrange(len(self._lines))
        while length < num_chars:
            text.append(self._lines[line])
            length += len(text[-1])
            line = (line + 1) % len(self._lines)
        return "".join(text)[:num_chars]


def prompts(shape: Shape, seed: int, source: Source[P]) -> list[P]:
    """The prompts of one workload, in random order. Those that share a prefix have it in common exactly."""
    rng = random.Random(seed)
    sizes = lengths(shape.num_prompts, shape.shortest_tokens, shape.longest_tokens, rng)
    if not shape.prefix_tokens:
        return [source.piece(rng, size) for size in sizes]
    prefixes = [source.piece(rng, shape.prefix_tokens) for _ in range(shape.num_prefixes)]
    dealt = _dealt(prefixes, len(sizes), rng)
    return [_joined(prefix, source.piece(rng, size)) for prefix, size in zip(dealt, sizes, strict=True)]


def lengths(num: int, shortest: int, longest: int, rng: random.Random) -> list[int]:
    """Lengths spread evenly on a logarithmic scale and shuffled: the sum is the same for every seed."""
    if not 0 < shortest <= longest:
        raise ValueError(f"lengths from {shortest} to {longest}: the shortest must be in [1, longest]")
    steps = max(num - 1, 1)
    ladder = [round(shortest * (longest / shortest) ** (step / steps)) for step in range(num)]
    rng.shuffle(ladder)
    return ladder


def _dealt(prefixes: Sequence[P], num: int, rng: random.Random) -> list[P]:
    """Every prefix as often as the next, in random order."""
    hands = [prefixes[index % len(prefixes)] for index in range(num)]
    rng.shuffle(hands)
    return hands


def _joined(prefix: P, rest: P) -> P:
    return prefix + rest
