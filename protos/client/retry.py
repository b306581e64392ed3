"""When a failed call is sent again, and to whom."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass

from protos.client.endpoints import Endpoint, Endpoints
from protos.errors import DeadlineExceeded, Draining, HeadwaterError, NoWorker


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how fast a failed call is sent again. In one attempt every router that is up gets it once."""

    max_attempts: int = 4
    first_delay_s: float = 0.1
    max_delay_s: float = 5.0

    def delay_s(self, attempt: int, retry_after_s: float | None) -> float:
        """Seconds before attempt number `attempt + 1`: doubling, jittered, no earlier than the router asked for."""
        delay_s = min(self.first_delay_s * 2.0 ** (attempt - 1), self.max_delay_s) * random.uniform(0.5, 1.0)
        return delay_s if retry_after_s is None else max(delay_s, retry_after_s * random.uniform(1.0, 1.2))


class Attempts:
    """The attempts of one call. Owned by the call, which tells it what became of each."""

    def __init__(self, policy: RetryPolicy, endpoints: Endpoints, timeout_s: float | None) -> None:
        """`timeout_s` bounds all attempts together."""
        self._policy = policy
        self._endpoints = endpoints
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._attempt = 1
        self._tried: set[Endpoint] = set()  # in this attempt
        self._endpoint: Endpoint | None = None  # the latest

    @property
    def is_first(self) -> bool:
        """Whether nothing has been sent again yet."""
        return self._attempt == 1 and len(self._tried) <= 1

    def next(self) -> Endpoint:
        """Where to send the call now."""
        self._endpoint = self._endpoints.choose(but=self._tried)
        self._tried.add(self._endpoint)
        return self._endpoint

    def remaining_s(self) -> float | None:
        """Raises DeadlineExceeded once no time is left: such a call is not worth sending."""
        if self._deadline is None:
            return None
        remaining_s = self._deadline - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineExceeded("the call's time was over before it was sent; give it a longer timeout")
        return remaining_s

    def answered(self) -> None:
        """The router said something: it is up."""
        assert self._endpoint is not None
        self._endpoint.wake()

    def progressed(self) -> None:
        """The call brought something new: what comes after it, should it fail now, is a second attempt again."""
        assert self._endpoint is not None
        self._attempt = 1
        self._tried = {self._endpoint}

    async def failed(self, error: HeadwaterError, *, may_repeat: bool) -> None:
        """Wait until the next attempt; raises the error if there must not be one."""
        assert self._endpoint is not None
        is_routers_own = isinstance(error, NoWorker | Draining)
        if is_routers_own:
            self._endpoint.rest()
        else:
            self.answered()
        if not may_repeat:
            raise error
        if not (is_routers_own and self._endpoints.has_ready(but=self._tried)):
            await self._pause(error)

    async def _pause(self, error: HeadwaterError) -> None:
        delay_s = self._policy.delay_s(self._attempt, error.retry_after_s)
        in_time = self._deadline is None or time.monotonic() + delay_s < self._deadline
        if self._attempt >= self._policy.max_attempts or not in_time:
            raise error
        self._attempt += 1
        self._tried.clear()
        await asyncio.sleep(delay_s)
