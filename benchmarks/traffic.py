"""Requests sent to a cluster over gRPC, and what came back when.

Closed loop: a number of clients, each sending its next request when the last one ended. Open loop: requests arrive at
random times (Poisson) whatever the cluster does, and their latency counts from the time they were due, so that a slow
cluster cannot hide its queue behind a client that waits (coordinated omission).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

from protos import errors
from protos.client import Client, GenerateEvent

MAX_BACKOFF_S = 1.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to send."""

    prompt: str | tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """One request as the client saw it. Times are `time.perf_counter()` seconds."""

    due_s: float  # when it should have been sent
    sent_s: float
    ended_s: float
    arrivals: tuple[tuple[float, int], ...] = ()  # messages with tokens: when, and how many tokens
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: errors.HeadwaterError | None = None


Send = Callable[[Ask, float], Coroutine[None, None, Trace]]


class Sender:
    """Sends requests over a few connections in turn, as they are: clients that retry would hide a refusal."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = cycle(clients)

    async def send(self, ask: Ask, due_s: float) -> Trace:
        """Send one request and follow it to its end. Every failure is in the trace, typed."""
        sent_s, arrivals = time.perf_counter(), list[tuple[float, int]]()
        error: errors.HeadwaterError | None = None
        last: GenerateEvent | None = None
        try:
            async for last in _events(next(self._clients), ask):
                num_tokens = sum(len(output.token_ids) for output in last.outputs)
                if num_tokens:
                    arrivals.append((time.perf_counter(), num_tokens))
        except errors.HeadwaterError as failure:
            error = failure
        usage = last.usage if last is not None else None
        if error is None and usage is None:
            error = errors.EngineFailure("the stream ended without its usage and without an error")
        return Trace(
            due_s=due_s,
            sent_s=sent_s,
            ended_s=time.perf_counter(),
            arrivals=tuple(arrivals),
            prompt_tokens=usage.prompt_tokens if usage else 0,
            cached_tokens=usage.cached_tokens if usage else 0,
            error=error,
        )


def _events(client: Client, ask: Ask) -> AsyncIterator[GenerateEvent]:
    """It goes on past the end of text, so that every run produces as many tokens."""
    return client.generate(
        ask.prompt, max_tokens=ask.max_tokens, temperature=ask.temperature, seed=ask.seed, ignore_eos=True
    )


async def closed_loop(asks: Sequence[Ask], send: Send, *, concurrency: int, duration_s: float) -> list[Trace]:
    """Send all requests from `concurrency` clients. None begins after `duration_s`; those under way are followed to
    their end. After a refusal a client waits as long as it was told to, a second at most, and goes on to the next.
    """
    ends_s = time.perf_counter() + duration_s
    waiting, traces = iter(asks), list[Trace]()
    async with asyncio.TaskGroup() as clients:
        for _ in range(min(concurrency, len(asks))):
            clients.create_task(_client(waiting, send, ends_s, traces))
    return traces


async def _client(waiting: Iterator[Ask], send: Send, ends_s: float, traces: list[Trace]) -> None:
    while (now := time.perf_counter()) < ends_s and (ask := next(waiting, None)) is not None:
        trace = await send(ask, now)
        traces.append(trace)
        if trace.error is not None and trace.error.retry_after_s is not None:
            await asyncio.sleep(min(trace.error.retry_after_s, MAX_BACKOFF_S))


async def open_loop(asks: Sequence[Ask], send: Send, *, due_s: Sequence[float], duration_s: float) -> list[Trace]:
    """Send each request when it is due, in seconds from now; those due after `duration_s` are not sent."""
    begin_s = time.perf_counter()
    tasks: list[asyncio.Task[Trace]] = []

    async with asyncio.TaskGroup() as arrivals:
        for ask, offset_s in zip(asks, due_s, strict=True):
            if offset_s > duration_s:
                break
            await asyncio.sleep(max(begin_s + offset_s - time.perf_counter(), 0))
            tasks.append(arrivals.create_task(send(ask, begin_s + offset_s)))
    return [task.result() for task in tasks]


def poisson(num: int, rate_per_s: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process of this rate, seconds from its start."""
    rng, now_s, times = random.Random(seed), 0.0, list[float]()
    for _ in range(num):
        now_s += rng.expovariate(rate_per_s)
        times.append(now_s)
    return times
