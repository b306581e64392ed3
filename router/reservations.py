"""Token-work promised to one worker: reserved when a request is placed, paid off as deltas arrive."""

from __future__ import annotations

from router.work import Work


class Reservations:
    """What one worker still owes this router. Mutated only by its Session, on the event loop."""

    def __init__(self) -> None:
        self._open: dict[str, Work] = {}
        self._prefill_tokens = 0
        self._decode_tokens = 0
        self._num_outputs = 0

    @property
    def total(self) -> Work:
        """The sum over all open reservations."""
        return Work(self._prefill_tokens, self._decode_tokens, self._num_outputs)

    @property
    def num_open(self) -> int:
        """Requests that have something reserved."""
        return len(self._open)

    def reserve(self, request_id: str, work: Work) -> None:
        """Count a request's work against the worker."""
        assert request_id not in self._open, request_id
        self._open[request_id] = work
        self._add(work, 1)

    def progress(self, request_id: str, num_tokens: int) -> None:
        """A delta arrived: the prompt is computed and `num_tokens` outputs tokens are no longer owed."""
        owed = self._open[request_id]
        rest = Work(0, max(0, owed.decode_tokens - num_tokens), owed.num_outputs)
        self._open[request_id] = rest
        self._add(owed, -1)
        self._add(rest, 1)

    def release(self, request_id: str) -> None:
        """The request has ended. Unknown ids are ignored: it may have ended before."""
        owed = self._open.pop(request_id, None)
        if owed is not None:
            self._add(owed, -1)

    def check(self) -> None:
        """The totals are the sums over open reservations."""
        assert self._prefill_tokens == sum(work.prefill_tokens for work in self._open.values())
        assert self._decode_tokens == sum(work.decode_tokens for work in self._open.values())
        assert self._num_outputs == sum(work.num_outputs for work in self._open.values())

    def _add(self, work: Work, sign: int) -> None:
        self._prefill_tokens += sign * work.prefill_tokens
        self._decode_tokens += sign * work.decode_tokens
        self._num_outputs += sign * work.num_outputs
