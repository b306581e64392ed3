"""Requests sent to vLLM's own server, and what came back when: /v1/completions, streamed, over plain asyncio.

An HTTP library would cost the client several times what the answers do, on the cores that the server shares with it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.traffic import Ask, Trace
from protos import errors

EVENT: Final = b"data: "
DONE: Final = b"[DONE]"
OK: Final = 200


@dataclass(frozen=True, slots=True)
class Completions:
    """A server that speaks OpenAI's protocol, and the name of its model."""

    host: str
    port: int
    model: str

    async def send(self, ask: Ask, due_s: float) -> Trace:
        """Send one request and follow it to its end. Every failure is in the trace, typed."""
        sent_s, arrivals = time.perf_counter(), list[tuple[float, int]]()
        error: errors.HeadwaterError | None = None
        usage: Mapping[str, int] = {}
        try:
            async for event in self._events(ask):
                if b'"choices":[]' in event:
                    usage = json.loads(event)["usage"]
                else:
                    arrivals.append((time.perf_counter(), 1))
        except (OSError, EOFError, ValueError) as failure:
            error = errors.EngineFailure(str(failure) or type(failure).__name__)
        if error is None and not usage:
            error = errors.EngineFailure("the stream ended without its usage and without an error")
        return Trace(
            due_s=due_s,
            sent_s=sent_s,
            ended_s=time.perf_counter(),
            arrivals=counted(arrivals, usage.get("completion_tokens", 0)),
            prompt_tokens=usage.get("prompt_tokens", 0),
            error=error,
        )

    async def tokens(self, ask: Ask) -> tuple[int, ...]:
        """The ids of an answer. Raises ValueError if there is none."""
        async with self._post({**self._body(ask), "return_token_ids": True}) as body:
            answer = json.loads(b"".join([part async for part in body]))
        return tuple(answer["choices"][0]["token_ids"])

    async def is_healthy(self) -> bool:
        """Whether it answers that it serves."""
        try:
            async with self._connected() as (reader, writer):
                writer.write(b"GET /health HTTP/1.1\r\nHost: benchmark\r\nConnection: close\r\n\r\n")
                status, _ = await _head(reader)
                return status == OK
        except (OSError, EOFError, ValueError):
            return False

    async def _events(self, ask: Ask) -> AsyncIterator[bytes]:
        """What the server says, one message after another, undecoded."""
        body = {**self._body(ask), "stream": True, "stream_options": {"include_usage": True}}
        async with self._post(body) as parts:
            async for part in parts:
                for line in part.splitlines():
                    if line.startswith(EVENT) and not line.endswith(DONE):
                        yield line[len(EVENT) :]

    def _body(self, ask: Ask) -> dict[str, Any]:
        """It goes on past the end of text, so that every run produces as many tokens."""
        return {
            "model": self.model,
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "ignore_eos": True,
        }

    @asynccontextmanager
    async def _post(self, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The answer's body, as it comes. Raises ValueError with the server's words if it refuses."""
        data = json.dumps(body).encode()
        async with self._connected() as (reader, writer):
            head = "POST /v1/completions HTTP/1.1\r\nHost: benchmark\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            status, is_chunked = await _head(reader)
            if status != OK:
                raise ValueError(f"the server answers {status}: {(await reader.read()).decode(errors='replace')}")
            yield _chunks(reader) if is_chunked else _whole(reader)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            yield reader, writer
        finally:
            writer.close()


def counted(arrivals: list[tuple[float, int]], num_tokens: int) -> tuple[tuple[float, int], ...]:
    """One token a message, and what the server has put together in the last: messages do not say how many they hold."""
    if not arrivals:
        return ()
    last_s, _ = arrivals[-1]
    return (*arrivals[:-1], (last_s, max(num_tokens - len(arrivals) + 1, 1)))


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status of an answer, and whether its body comes in HTTP's chunks; the other headers are dropped."""
    head = await reader.readuntil(b"\r\n\r\n")
    return int(head.split(None, 2)[1]), b"transfer-encoding: chunked" in head.lower()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """A body in HTTP's chunks, one after another as they come."""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _whole(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    yield await reader.read()
