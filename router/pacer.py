"""How often a stream writes to its client, so that messages do not cost more than the tokens in them.

A message costs the worker, the router and the client about a tenth of a millisecond each, whatever it carries. While
few requests stream, every token leaves as it comes. When many do, workers send less often and more at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from router.config import StreamingSection


class Pacer:
    """Shares a number of messages a second among the streams. Touched on the event loop only.

    `tell` gets the seconds to leave between two messages of a stream whenever they change.
    """

    def __init__(self, config: StreamingSection, tell: Callable[[float], None]) -> None:
        self._config = config
        self._tell = tell
        self._num_streams = 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        """One more stream writes inside this block."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    @property
    def interval_s(self) -> float:
        """Seconds to leave between two messages of a stream now; a stream alone need not wait."""
        num_streams = self._num_streams if self._num_streams > 1 else 0
        return min(num_streams / self._config.messages_per_s, self._config.max_interval_s)

    def _change(self, by: int) -> None:
        before = self.interval_s
        self._num_streams += by
        if self.interval_s != before:
            self._tell(self.interval_s)
