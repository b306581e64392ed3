"""What is about to be sent to one worker: prompts that come close together travel, and are planned, together.

A worker that has prompts to compute anyway takes no new one before its step has ended. What comes for it meanwhile
waits here, for the window at most: prompts that begin alike leave side by side, so that one step computes what they
share once, and a frame fills a step's budget. To a worker with nothing to compute everything leaves at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protos.v1 import session_pb2 as session_pb
from router.metrics import PackSeries


@dataclass(frozen=True, slots=True)
class _Part:
    submits: Sequence[session_pb.Submit]
    num_tokens: int  # to compute
    family: int


class Pack:
    """Submissions of one session that have not been sent. Owned by Session; touched on the event loop only.

    `send` is called when they should leave: at once, when a budget is full, or when the window has passed.
    """

    def __init__(self, window_s: float, send: Callable[[], None], series: PackSeries) -> None:
        self._window_s = window_s
        self._send = send
        self._series = series
        self._parts: list[_Part] = []
        self._budget = 0
        self._is_due = False
        self._timer: asyncio.TimerHandle | None = None

    def add(self, submits: Sequence[session_pb.Submit], *, num_tokens: int, family: int, budget: int) -> None:
        """Put a group in. `budget`: tokens worth waiting for; 0 sends everything that is here now."""
        self._parts.append(_Part(submits, num_tokens, family))
        self._budget = budget
        if self.num_tokens >= budget or not self._window_s:
            self.release()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._window_s, self.release)

    def release(self) -> None:
        """Wait no longer."""
        self._stop_timer()
        if self._parts and not self._is_due:
            self._is_due = True
            self._observe()
            self._send()

    def take(self) -> list[session_pb.Submit]:
        """What should leave now, families side by side in the order of their first member; it is forgotten here."""
        if not self._is_due:
            return []
        families: dict[int, list[_Part]] = {}
        for part in self._parts:
            families.setdefault(part.family, []).append(part)
        self.clear()
        return [submit for family in families.values() for part in family for submit in part.submits]

    def drop(self, request_id: str) -> bool:
        """Forget a request; False if it is not here."""
        for index, part in enumerate(self._parts):
            left = [submit for submit in part.submits if submit.request_id != request_id]
            if len(left) < len(part.submits):
                self._parts[index : index + 1] = [_Part(left, part.num_tokens, part.family)] if left else []
                return True
        return False

    def clear(self) -> None:
        """Forget everything."""
        self._stop_timer()
        self._parts.clear()
        self._is_due = False

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of what is here."""
        return sum(part.num_tokens for part in self._parts)

    def _observe(self) -> None:
        """How full a pack was for which there was time to fill it."""
        if self._budget:
            self._series.requests.observe(sum(len(part.submits) for part in self._parts))
            self._series.tokens.inc(min(self.num_tokens, self._budget))
            self._series.budget_tokens.inc(self._budget)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
