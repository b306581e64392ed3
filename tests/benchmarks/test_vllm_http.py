"""Requests to vLLM's server, against a small one in the test: messages, counts, and all that can go wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from benchmarks.traffic import Ask
from benchmarks.vllm_http import Completions
from benchmarks.vllm_processes import part_of
from protos import errors

ASK = Ask((5, 6, 7), max_tokens=4)
CHUNKED = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


def piece(text: str) -> str:
    return f"{len(text.encode()):x}\r\n{text}\r\n"


def event(**values: Any) -> str:
    return f"data: {json.dumps(values, separators=(',', ':'))}\n\n"


TOKEN = event(choices=[{"text": "a"}])
USAGE = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 4})
DONE = "data: [DONE]\n\n"


@asynccontextmanager
async def server(answer: Sequence[str], seen: list[dict[str, Any]] | None = None) -> AsyncIterator[Completions]:
    """Sends the parts of one answer, whatever it is asked; notes the bodies."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if "content-length: " in head and seen is not None:
            seen.append(json.loads(await reader.readexactly(int(head.split("content-length: ")[1].split()[0]))))
        for part in answer:
            writer.write(part.encode())
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with running:
        yield Completions("127.0.0.1", running.sockets[0].getsockname()[1], "tiny")


async def test_tokens_are_counted_as_they_come_and_those_put_together_with_the_last() -> None:
    seen: list[dict[str, Any]] = []
    async with server([CHUNKED, piece(TOKEN), piece(TOKEN + TOKEN), piece(USAGE + DONE), piece("")], seen) as found:
        trace = await found.send(ASK, due_s=0.0)
    assert trace.error is None
    assert [num_tokens for _, num_tokens in trace.arrivals] == [1, 1, 2]
    assert [when for when, _ in trace.arrivals] == sorted(when for when, _ in trace.arrivals)
    assert trace.prompt_tokens == 3
    assert seen == [
        {
            "model": "tiny",
            "prompt": [5, 6, 7],
            "max_tokens": 4,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (["HTTP/1.1 400 Bad Request\r\n\r\n", "the prompt is too long"], "answers 400: the prompt is too long"),
        ([CHUNKED, piece(TOKEN)], "0 bytes read"),
        ([CHUNKED, piece(TOKEN), piece(DONE), piece("")], "without its usage"),
        ([""], "0 bytes read"),
    ],
    ids=["refused", "broken off", "no usage", "closed at once"],
)
async def test_what_goes_wrong_is_in_the_trace(answer: Sequence[str], told: str) -> None:
    async with server(answer) as found:
        trace = await found.send(ASK, due_s=0.0)
    assert isinstance(trace.error, errors.EngineFailure)
    assert told in str(trace.error)


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_the_ids_of_an_answer(is_chunked: bool) -> None:
    text = json.dumps({"choices": [{"token_ids": [1, 2]}]})
    answer = [CHUNKED, piece(text), piece("")] if is_chunked else ["HTTP/1.1 200 OK\r\n\r\n", text]
    async with server(answer) as found:
        assert await found.tokens(ASK) == (1, 2)


async def test_a_server_is_healthy_that_says_so() -> None:
    async with server(["HTTP/1.1 200 OK\r\n\r\n"]) as found:
        assert await found.is_healthy()
    assert not await found.is_healthy()
    async with server(["HTTP/1.1 503 Service Unavailable\r\n\r\n"]) as starting:
        assert not await starting.is_healthy()


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("VLLM::EngineCore", "scheduler"),
        ("VLLM::Worker", "model"),
        ("ray::ServeReplica:headwater:Worker.handle_request", "worker"),
        ("ray::ServeReplica:headwater:Router", "router"),
        ("python -m vllm.entrypoints.openai.api_server --port 1", "front"),
        ("python -B -c from multiprocessing.resource_tracker import main;main(38)", "rest"),
        ("raylet --node-id=1", "rest"),
    ],
)
def test_processes_are_told_apart(command: str, part: str) -> None:
    assert part_of(command) == part
