"""A packed group: requests that one worker plans together."""

from __future__ import annotations

from dataclasses import dataclass

from protos.errors import HeadwaterError
from protos.messages import Request
from router.stream import Stream


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Streams that go to one worker in one submission: one for Generate, one per continuation for Score."""

    group_id: str  # the client's request id: unique among live groups
    streams: tuple[Stream, ...]
    remaining_s: float  # of the deadline, at admission

    @property
    def requests(self) -> tuple[Request, ...]:
        return tuple(stream.request for stream in self.streams)

    @property
    def priority(self) -> int:
        return self.streams[0].request.priority

    @property
    def num_tokens(self) -> int:
        """Prompt tokens, a shared context counted once."""
        return sum(stream.work.prefill_tokens for stream in self.streams)

    @property
    def age_s(self) -> float:
        """Seconds since the group arrived."""
        return self.streams[0].age_s

    def fail(self, error: HeadwaterError) -> None:
        """End every stream that has not ended in this error."""
        for stream in self.streams:
            stream.fail(error)

    def abort(self) -> None:
        """End every stream that has not ended with finish reason ABORT."""
        for stream in self.streams:
            stream.abort()
