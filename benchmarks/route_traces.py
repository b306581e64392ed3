"""Made-up traffic for the routing simulator: when which prompt arrives, in names of blocks instead of tokens.

Tenants put a context of their own before every query; their popularity follows Zipf's law. Conversations come back with
all that was said before. A burst is many queries behind one new context at the same moment.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, NamedTuple

LENGTH_SPREAD: Final = 0.4  # of the log-normal distributions of queries and answers


class Arrival(NamedTuple):
    """One request, as a client sends it."""

    time_s: float
    hashes: tuple[int, ...]  # names of the prompt's whole blocks
    num_tokens: int
    max_tokens: int  # asked for
    output_tokens: int  # that the answer will have
    output_hashes: tuple[int, ...] = ()  # names of the blocks that the answer fills


@dataclass(frozen=True, slots=True)
class Traffic:
    """What arrives."""

    seconds: float
    requests_per_s: float
    num_tenants: int  # 0: no prompt begins like another
    context_tokens: int = 6144
    query_tokens: int = 1200  # median
    output_tokens: int = 128  # median
    max_tokens: int = 256
    zipf: float = 0.8  # exponent of the tenants' popularity; 0: all alike
    hot_share: float = 0.0  # of the requests, for one tenant more
    mean_turns: float = 1.5  # of a conversation
    think_s: float = 4.0  # mean time between two turns
    num_siblings: int = 0  # one burst, after a third of the time
    block_size: int = 64


def make_trace(traffic: Traffic, seed: int) -> list[Arrival]:
    """All arrivals in the order of time; the seed decides everything."""
    source = random.Random(seed)
    arrivals = [*_conversations(traffic, source), *_burst(traffic, source)]
    return sorted(arrivals, key=lambda arrival: arrival.time_s)


class _Conversation:
    """A context and what was said behind it. Mutated only while its trace is made."""

    def __init__(self, traffic: Traffic, context: Sequence[int], source: random.Random) -> None:
        self._traffic = traffic
        self._source = source
        self._names = list(context)
        self._num_tokens = len(context) * traffic.block_size

    def turn(self, time_s: float) -> Arrival:
        """Ask once more."""
        traffic = self._traffic
        prompt = self._say(_length(traffic.query_tokens, self._source))
        num_tokens = self._num_tokens
        output_tokens = min(_length(traffic.output_tokens, self._source), traffic.max_tokens)
        whole = self._say(output_tokens)
        return Arrival(
            time_s, whole[: len(prompt)], num_tokens, traffic.max_tokens, output_tokens, whole[len(prompt) :]
        )

    def _say(self, num_tokens: int) -> tuple[int, ...]:
        self._num_tokens += num_tokens
        num_new = self._num_tokens // self._traffic.block_size - len(self._names)
        self._names.extend(_names(num_new, self._source))
        return tuple(self._names)


def _conversations(traffic: Traffic, source: random.Random) -> Iterator[Arrival]:
    contexts = _Contexts(traffic, source)
    starts_per_s = traffic.requests_per_s / traffic.mean_turns
    time_s = -traffic.think_s * 10 * (traffic.mean_turns > 1)  # those that are under way when the trace begins
    while (time_s := time_s + source.expovariate(starts_per_s)) < traffic.seconds:
        conversation, turn_s = _Conversation(traffic, contexts.draw(), source), time_s
        while turn_s < traffic.seconds:
            arrival = conversation.turn(turn_s)
            if turn_s >= 0:
                yield arrival
            if source.random() * traffic.mean_turns < 1:
                break
            turn_s += source.expovariate(1 / traffic.think_s)


def _burst(traffic: Traffic, source: random.Random) -> Iterator[Arrival]:
    context = _names(traffic.context_tokens // traffic.block_size, source)
    for _ in range(traffic.num_siblings):
        yield _Conversation(traffic, context, source).turn(traffic.seconds / 3)


class _Contexts:
    """The tenants' contexts, made when they are first drawn."""

    def __init__(self, traffic: Traffic, source: random.Random) -> None:
        self._source = source
        self._num_blocks = traffic.context_tokens // traffic.block_size
        self._hot_share = traffic.hot_share
        self._sums = list(accumulate((rank + 1) ** -traffic.zipf for rank in range(traffic.num_tenants)))
        self._known: dict[int, list[int]] = {}

    def draw(self) -> list[int]:
        """The context of the next conversation; empty without tenants."""
        if not self._sums:
            return []
        is_hot = self._source.random() < self._hot_share
        tenant = -1 if is_hot else bisect(self._sums, self._source.random() * self._sums[-1])
        if tenant not in self._known:
            self._known[tenant] = _names(self._num_blocks, self._source)
        return self._known[tenant]


def _length(median: int, source: random.Random) -> int:
    return max(1, round(source.lognormvariate(math.log(median), LENGTH_SPREAD)))


def _names(number: int, source: random.Random) -> list[int]:
    return [source.getrandbits(64) for _ in range(number)]
