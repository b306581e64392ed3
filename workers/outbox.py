"""What a worker has to tell one session: ends and first tokens at once, other tokens together, changes of the cache.

A message costs the worker, the router and the client far more than the tokens in it. A router with many streams asks
its workers to leave an interval between messages; what comes meanwhile is joined, output by output.
"""

from __future__ import annotations

from protos.messages import Delta, Failure, joined
from workers.kv.events import EventFeed

_Key = tuple[str, int]  # request id, output index


class Outbox:
    """What an open session has not been sent: deltas, and `events`. Mutated only by EngineLoop, on its thread."""

    __slots__ = ("_held", "_last", "_urgent", "events", "interval_s")

    def __init__(self) -> None:
        self.interval_s = 0.0  # to leave between two messages that could wait
        self.events = EventFeed()
        self._urgent: list[Delta | Failure] = []
        self._held: dict[_Key, list[Delta]] = {}
        self._last = 0.0  # when all was last taken

    def add(self, delta: Delta) -> None:
        """Tokens of an output. They come out after all that was added for the output before, and only once."""
        key = (delta.request_id, delta.index)
        if delta.finish is not None or delta.cached_tokens is not None:
            self._urgent.append(joined([*self._held.pop(key, ()), delta]))
            return
        held = self._held.get(key)
        if held is None:
            self._held[key] = [delta]
        else:
            held.append(delta)

    def fail(self, failure: Failure) -> None:
        """The request's end. What it still had to tell comes before it."""
        self._urgent += [joined(self._held.pop(key)) for key in self._keys(failure.request_id)]
        self._urgent.append(failure)

    def drop(self, request_id: str) -> None:
        """Nobody waits for this request's tokens any more."""
        for key in self._keys(request_id):
            del self._held[key]

    def take(self, now: float) -> list[Delta | Failure]:
        """The deltas that should leave now, by the clock of `now` in seconds; it is forgotten here."""
        out, self._urgent = self._urgent, []
        if now - self._last >= self.interval_s:
            self._last = now
            held, self._held = self._held, {}
            out += [joined(deltas) for deltas in held.values()]
        return out

    def _keys(self, request_id: str) -> list[_Key]:
        return [key for key in self._held if key[0] == request_id]
