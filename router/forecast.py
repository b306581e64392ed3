"""How long work will take, from how long it took lately.

Admission asks it before it takes a request: one that cannot make its deadline is better refused now than dropped later,
when others have waited behind it. It is asked for the shortest time that is credible, so a doubt admits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

OPTIMISM = 2.0  # things may go so many times as fast as they lately did
HALF_LIFE_S = 10.0  # of what was seen
MAX_AGE_S = 30.0  # without anything new, what was seen is no longer believed
MIN_OBSERVATIONS = 8


class Forecast:
    """What the fleet lately took for its work. Owned by Admission; touched on the event loop only.

    Nothing is known until each kind of work that a question is about was seen often enough and not long ago. So a bad
    time cannot lead to refusals that then keep anything better from being seen.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._drain = _Pace()
        self._decode = _Pace()
        self._prefills: dict[int, _Pace] = {}  # by the bit length of their tokens

    def observe_drain(self, num_tokens: float, seconds: float) -> None:
        """Token-work left the queue; `seconds` since some left before, or since the queue was last empty."""
        self._drain.add(self._clock(), num_tokens, seconds)

    def observe_first_token(self, prefill_tokens: int, seconds: float) -> None:
        """From placement on a worker to the first token, with so many prompt tokens to compute."""
        pace = self._prefills.setdefault(prefill_tokens.bit_length(), _Pace())
        pace.add(self._clock(), max(prefill_tokens, 1), seconds)

    def observe_decode(self, num_tokens: int, seconds: float) -> None:
        """Tokens of one output after its first, and the seconds from the first to the last."""
        self._decode.add(self._clock(), num_tokens, seconds)

    def first_token_s(self, work_ahead_tokens: float, prefill_tokens: int) -> float | None:
        """The shortest credible time to a first token: the wait for the work ahead, then the prompt's own.

        `work_ahead_tokens` is what waits in front, 0 if a worker has room now. None: not enough is known.
        """
        wait_s, prefill_s = self.drain_s(work_ahead_tokens), self.prefill_s(prefill_tokens)
        return None if wait_s is None or prefill_s is None else (wait_s + prefill_s) / OPTIMISM

    def end_s(self, work_ahead_tokens: float, prefill_tokens: int, certain_decode_tokens: int) -> float | None:
        """The shortest credible time to the end, if no more tokens follow the first than are certain to."""
        first_s = self.first_token_s(work_ahead_tokens, prefill_tokens)
        decode_s = self._decode.time_s(self._clock(), certain_decode_tokens)
        return None if first_s is None or decode_s is None else first_s + decode_s / OPTIMISM

    def drain_s(self, num_tokens: float) -> float | None:
        """The likely time, not the shortest, until so much token-work has left the queue. None: not enough is known."""
        return self._drain.time_s(self._clock(), num_tokens)

    def prefill_s(self, prefill_tokens: int) -> float | None:
        """From placement to the first token, at least, as prompts of all sizes that were seen tell. None: too few were.

        A prompt takes some time whatever its size, and more with each token; how much of either cannot be told apart.
        What is sure: a smaller one takes at least its share of a larger one's time, a larger one no less than that.
        """
        if prefill_tokens <= 0:
            return 0.0
        now = self._clock()
        known = [pace for pace in self._prefills.values() if pace.is_known(now)]
        return max((pace.least_s(prefill_tokens) for pace in known), default=None)


@dataclass(slots=True)
class _Pace:
    """Exponentially weighted means of tokens and of the seconds they took. Mutated only by Forecast."""

    weight: float = 0.0  # of all observations, each halved every half-life
    tokens: float = 0.0
    seconds: float = 0.0
    count: int = 0
    at: float = 0.0  # the latest

    def add(self, now: float, num_tokens: float, seconds: float) -> None:
        """One more observation; after a long silence, the first."""
        if now - self.at > MAX_AGE_S:
            self.count = 0
        kept = 0.5 ** ((now - self.at) / HALF_LIFE_S) if self.count else 0.0
        self.weight = kept * self.weight + 1
        self.tokens = kept * self.tokens + num_tokens
        self.seconds = kept * self.seconds + seconds
        self.count += 1
        self.at = now

    def is_known(self, now: float) -> bool:
        return self.count >= MIN_OBSERVATIONS and now - self.at <= MAX_AGE_S and self.tokens > 0

    def time_s(self, now: float, num_tokens: float) -> float | None:
        """At the mean pace; nothing takes no time, known or not."""
        if num_tokens <= 0:
            return 0.0
        return num_tokens * self.seconds / self.tokens if self.is_known(now) else None

    def least_s(self, num_tokens: float) -> float:
        """The mean time, or for fewer tokens than the mean their share of it."""
        return self.seconds / self.weight * min(1.0, num_tokens * self.weight / self.tokens)
