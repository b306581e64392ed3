"""Rings of what was counted, tick by tick: how much came within the last of them.

Counters begin anew where a worker restarts, and their series vanish where one leaves; what a ring has summed stays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from protos.messages import EngineTotals

WINDOW_TICKS = 60


class EngineWindow:
    """What one worker's engine did in the last ticks. Mutated only by Watch."""

    def __init__(self) -> None:
        self._last: EngineTotals | None = None  # as the worker told
        self._sums = deque([EngineTotals()], maxlen=WINDOW_TICKS + 1)

    def tick(self, totals: EngineTotals | None) -> None:
        """A tick ends with these totals; None: the worker is not connected. The first ones only tell where it stood."""
        news = EngineTotals()
        if totals is not None and self._last is not None:
            news = _growth(totals, self._last)
        self._last = totals
        self._sums.append(_each(self._sums[-1], news, sign=1))

    def last(self, num_ticks: int = WINDOW_TICKS) -> EngineTotals:
        """What was done in the last ticks, as far as it is known."""
        before = self._sums[max(len(self._sums) - 1 - num_ticks, 0)]
        return _each(self._sums[-1], before, sign=-1)


class BucketWindow:
    """What the buckets of a histogram counted in the last ticks, of all its series. Mutated only by Watch."""

    def __init__(self, num_buckets: int) -> None:
        self._last: Mapping[str, Sequence[int]] = {}  # by series
        self._sums = deque([(0,) * num_buckets], maxlen=WINDOW_TICKS + 1)

    def tick(self, series: Mapping[str, Sequence[int]]) -> None:
        """A tick ends with these counts."""
        sums = self._sums[-1]
        for name, counts in series.items():
            before = self._last.get(name)
            if before is None or any(now < then for now, then in zip(counts, before, strict=True)):
                before = (0,) * len(counts)
            sums = tuple(sum_ + now - then for sum_, now, then in zip(sums, counts, before, strict=True))
        self._last = series
        self._sums.append(sums)

    def last(self) -> tuple[int, ...]:
        """What was counted within the window."""
        return tuple(now - then for now, then in zip(self._sums[-1], self._sums[0], strict=True))


class CounterWindow:
    """How far counters that never begin anew went in the last ticks. Mutated only by Watch."""

    def __init__(self) -> None:
        self._ring = deque[Mapping[str, int]]([{}], maxlen=WINDOW_TICKS + 1)

    def tick(self, counts: Mapping[str, int]) -> None:
        """A tick ends with these counts."""
        self._ring.append(counts)

    def last(self) -> dict[str, int]:
        """Those that moved within the window."""
        before = self._ring[0]
        grown = {name: count - before.get(name, 0) for name, count in self._ring[-1].items()}
        return {name: count for name, count in grown.items() if count}


def _growth(now: EngineTotals, before: EngineTotals) -> EngineTotals:
    """Since `before`; all of `now` if the engine has begun anew."""
    if any(new < old for new, old in zip(now, before, strict=True)):
        return now
    return _each(now, before, sign=-1)


def _each(one: EngineTotals, other: EngineTotals, *, sign: int) -> EngineTotals:
    counts = (a + sign * b for a, b in zip(one[1:], other[1:], strict=True))
    return EngineTotals(one.seconds + sign * other.seconds, *counts)
