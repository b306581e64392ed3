"""A packed group: requests that one worker plans together, and where they stand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from protos.errors import HeadwaterError
from router.routing.protocol import Ask, Decision
from router.session import Session
from router.stream import Stream
from router.tenants import Tenant
from router.work import Work


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Streams that go to one worker in one submission: one for Generate, one per continuation for Score."""

    group_id: str  # the client's request id: unique among live groups
    streams: tuple[Stream, ...]
    tenant: Tenant
    remaining_s: float  # of the deadline, at admission

    @property
    def open_streams(self) -> tuple[Stream, ...]:
        """Those that have not ended."""
        return tuple(stream for stream in self.streams if not stream.ended)

    @property
    def prompt(self) -> Sequence[int]:
        """What a worker's prefix cache may hold of it: of several streams, what they share comes first."""
        return self.streams[0].request.token_ids

    @property
    def cache_salt(self) -> str:
        return self.streams[0].request.cache_salt

    @property
    def certain_tokens(self) -> int:
        """Tokens that its longest output has at the least."""
        return max(stream.certain_tokens for stream in self.streams)

    @property
    def priority(self) -> int:
        return self.streams[0].request.priority

    @property
    def num_tokens(self) -> int:
        """Prompt tokens, a shared context counted once."""
        return sum(stream.prefill_tokens for stream in self.streams)

    @property
    def work(self) -> Work:
        """What is still to compute, a shared context counted once, if nothing of it is cached anywhere."""
        works = [stream.work for stream in self.open_streams]
        return Work(
            prefill_tokens=sum(work.prefill_tokens for work in works),
            decode_tokens=sum(work.decode_tokens for work in works),
            num_outputs=sum(work.num_outputs for work in works),
        )

    @property
    def cached_tokens(self) -> int | None:
        """Tokens of the prompt that the first worker had in its cache; None while it has not said."""
        return self.streams[0].cached_tokens

    @property
    def num_completion_tokens(self) -> int:
        """Tokens made so far, over all outputs."""
        return sum(stream.num_completion_tokens for stream in self.streams)

    @property
    def used_tokens(self) -> int:
        """Token-work that was done for it so far: prompt tokens that no cache had, and what was made."""
        return sum(stream.used_tokens for stream in self.streams)

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


@dataclass(slots=True, eq=False)
class Entry:
    """A live group on its way. Mutated only by Admission and its Dispatcher."""

    group: Group
    expiry: asyncio.TimerHandle
    ask: Ask
    block_hashes: Sequence[int]  # of the prompt, as the workers' prefix caches name them
    charged_tokens: int  # of work, to its tenant
    num_requests: int  # that have not ended, as of its last coming to the queue
    placed_at: float = 0.0  # the event loop's time
    waits_since: float | None = None  # the event loop's time when it could have gone to a worse worker
    waits_until: float = 0.0  # and when it will
    waits_for: Session | None = None  # the better one, which was full
    is_waiting: bool = False  # in the dispatcher's queue
    session: Session | None = None  # that has it
    placed: Sequence[Stream] = ()  # those that had not ended when it was placed, the latest time
    decision: Decision | None = None  # the latest
    num_losses: int = 0  # workers that were lost with it
    num_strikes: int = 0  # of those, without anything having come from them since it was placed
    last_error: HeadwaterError | None = None  # why it lost its worker
    unwilling: set[str] = field(default_factory=set)  # workers that would not have it

    @property
    def was_placed(self) -> bool:
        """Whether a worker has had it: then its client may have had tokens."""
        return self.decision is not None

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what killed a worker: it was there, and nothing had come of it."""
        return self.num_strikes > 0

    @property
    def was_sent(self) -> bool:
        """Whether the worker that has it was told of it."""
        return any(stream.was_sent for stream in self.placed)

    @property
    def has_progressed(self) -> bool:
        """Whether something has come from the worker that has it."""
        return any(stream.has_progressed or stream.ended for stream in self.placed)
