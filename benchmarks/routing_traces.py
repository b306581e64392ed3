"""The requests of the routing benchmark: tenants whose prompts all begin with a context of their own.

A case says how many tenants there are and how popular each is. The contexts stay the same through all rounds of a run;
what follows them is new each time.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from benchmarks.prompts import P, Source
from benchmarks.traffic import Ask


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of every request, in tokens."""

    context: int
    query: int
    output: int

    @property
    def prompt(self) -> int:
        return self.context + self.query


@dataclass(frozen=True, slots=True)
class Case:
    """Who asks, and how often."""

    name: str
    num_tenants: int  # 0: no prompt begins like another
    zipf: float = 0.0  # exponent of the tenants' popularity; 0: all alike


class Tenants:
    """Draws tenants by their popularity, the first one most often."""

    def __init__(self, case: Case) -> None:
        self._sums = list(accumulate((rank + 1) ** -case.zipf for rank in range(case.num_tenants)))

    def draw(self, source: random.Random) -> int:
        """The tenant of the next request, in [0, num_tenants)."""
        return bisect(self._sums, source.random() * self._sums[-1])


def make_contexts(num: int, num_tokens: int, seed: int, source: Source[P]) -> list[P]:
    """What the prompts of each tenant begin with."""
    rng = random.Random(f"contexts/{seed}")
    return [source.piece(rng, num_tokens) for _ in range(num)]


def make_asks(
    case: Case, contexts: Sequence[P], lengths: Lengths, *, num: int, seed: int, source: Source[P]
) -> list[Ask]:
    """The requests of one measurement: the same ones for the same seed. Prompts are as long where nothing is shared."""
    rng = random.Random(seed)
    if not case.num_tenants:
        return [_ask(source.piece(rng, lengths.prompt), lengths, seed + index) for index in range(num)]
    tenants = Tenants(case)
    return [
        _ask(contexts[tenants.draw(rng)] + source.piece(rng, lengths.query), lengths, seed + index)
        for index in range(num)
    ]


def _ask(prompt: str | tuple[int, ...], lengths: Lengths, seed: int) -> Ask:
    return Ask(prompt, lengths.output, seed=seed)
