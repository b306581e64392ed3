"""What the index predicted, against what engines found: it counts the error and says when a worker must be asked anew.

A prediction that fails means that events were lost, that the index forgot, or that a block went between the decision
and its use. The last two are ordinary, so it takes several failures, and repeating what did not help is slowed down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Totals(NamedTuple):
    """Sums over all replies."""

    num_replies: int = 0
    predicted_tokens: int = 0
    cached_tokens: int = 0
    error_tokens: int = 0  # the differences, without their signs


@dataclass(slots=True)
class _Record:
    """One worker's. Mutated only by Accuracy."""

    num_wrong: int = 0  # since its last snapshot
    asked_s: float = float("-inf")
    wait_s: float = 0.0  # from asking until it may be asked again


class Accuracy:
    """Compares predictions with replies. Owned by one router; on its event loop only.

    A worker is asked for a snapshot after `max_wrong` predictions that failed by a block or more since the last one,
    and at most once per `interval_s`. That doubles, up to `max_interval_s`, while asking does not help.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        max_wrong: int = 8,
        interval_s: float = 1.0,
        max_interval_s: float = 60.0,
    ) -> None:
        self._clock = clock
        self._max_wrong = max_wrong
        self._interval_s = interval_s
        self._max_interval_s = max_interval_s
        self._records: dict[str, _Record] = {}
        self._totals = Totals()

    @property
    def totals(self) -> Totals:
        return self._totals

    def observe(self, worker_id: str, predicted_tokens: int, cached_tokens: int, block_size: int) -> bool:
        """A reply told what was cached. True: ask the worker for a snapshot now."""
        error_tokens = abs(predicted_tokens - cached_tokens)
        sums = self._totals
        self._totals = Totals(
            sums.num_replies + 1,
            sums.predicted_tokens + predicted_tokens,
            sums.cached_tokens + cached_tokens,
            sums.error_tokens + error_tokens,
        )
        return error_tokens >= block_size and self._is_due(self._records.setdefault(worker_id, _Record()))

    def refreshed(self, worker_id: str) -> None:
        """A snapshot of this worker was applied: past failures no longer count."""
        record = self._records.get(worker_id)
        if record is not None:
            record.num_wrong = 0

    def forget(self, worker_id: str) -> None:
        """The worker's session is lost."""
        self._records.pop(worker_id, None)

    def _is_due(self, record: _Record) -> bool:
        record.num_wrong += 1
        now_s = self._clock()
        since_s = now_s - record.asked_s
        if record.num_wrong < self._max_wrong or since_s < record.wait_s:
            return False
        helped = since_s >= 2 * record.wait_s
        record.wait_s = self._interval_s if helped else min(2 * record.wait_s, self._max_interval_s)
        record.asked_s = now_s
        return True
