"""How often a stream writes to its client, so that messages do not cost more than the tokens in them.

A message costs the router and the client about a tenth of a millisecond each, whatever it carries. While few requests
stream, every token leaves as it comes. When many do, each stream writes less often and more at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from router.config import StreamingSection


class Pacer:
    """Shares a number of messages a second among the streams. Touched on the event loop only."""

    def __init__(self, config: StreamingSection) -> None:
        self._config = config
        self._num_streams = 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        """One more stream writes inside this block."""
        self._num_streams += 1
        try:
            yield
        finally:
            self._num_streams -= 1

    @property
    def interval_s(self) -> float:
        """Seconds that a stream should leave between two messages now."""
        return min(self._num_streams / self._config.messages_per_s, self._config.max_interval_s)
