"""Tokens share messages when many streams write; first tokens and ends never wait."""

from __future__ import annotations

import asyncio
import time

import pytest

from protos.errors import WorkerLost
from protos.messages import Delta, Finish, Request, Sampling
from router.config import StreamingSection
from router.pacer import Pacer
from router.stream import Stream

FOR_EVER_S = 3600.0


@pytest.fixture
def stream() -> Stream:
    request = Request("a", (1, 2), Sampling(seed=0, max_tokens=8))
    return Stream(request, client_id="a", model="m", created=time.monotonic())


def token(position: int, *, finish: Finish | None = None) -> Delta:
    return Delta("a", 0, f"t{position} ", (position,), finish=finish)


async def test_the_first_token_leaves_at_once(stream: Stream) -> None:
    stream.deliver(token(0))
    response = await asyncio.wait_for(stream.next_response(FOR_EVER_S), 5)
    assert response is not None
    assert list(response.outputs[0].token_ids) == [0]


async def test_later_tokens_share_a_message_and_keep_their_order(stream: Stream) -> None:
    stream.deliver(token(0))
    await stream.next_response(0.05)
    left_at = time.monotonic()
    reading = asyncio.create_task(stream.next_response(0.05))
    for position in (1, 2, 3):
        await asyncio.sleep(0)
        stream.deliver(token(position))
    response = await asyncio.wait_for(reading, 5)
    assert response is not None
    assert list(response.outputs[0].token_ids) == [1, 2, 3]
    assert response.outputs[0].text == "t1 t2 t3 "
    assert time.monotonic() - left_at >= 0.045  # an event loop's timer may be early by its resolution


async def test_a_token_after_a_pause_leaves_at_once(stream: Stream) -> None:
    stream.deliver(token(0))
    await stream.next_response(0.01)
    await asyncio.sleep(0.02)
    stream.deliver(token(1))
    response = await asyncio.wait_for(stream.next_response(0.01), 5)
    assert response is not None
    assert list(response.outputs[0].token_ids) == [1]


async def test_an_end_does_not_wait(stream: Stream) -> None:
    stream.deliver(token(0))
    await stream.next_response(FOR_EVER_S)
    reading = asyncio.create_task(stream.next_response(FOR_EVER_S))
    stream.deliver(token(1))
    await asyncio.sleep(0.02)
    assert not reading.done()
    stream.deliver(token(2, finish=Finish("length")))
    response = await asyncio.wait_for(reading, 5)
    assert response is not None
    assert list(response.outputs[0].token_ids) == [1, 2]
    assert response.usage.completion_tokens == 0  # no worker was placed, so none were counted
    assert await stream.next_response(FOR_EVER_S) is None


async def test_an_error_comes_after_what_was_made_and_does_not_wait(stream: Stream) -> None:
    stream.deliver(token(0))
    await stream.next_response(FOR_EVER_S)
    stream.deliver(token(1))
    stream.fail(WorkerLost("gone"))
    response = await asyncio.wait_for(stream.next_response(FOR_EVER_S), 5)
    assert response is not None
    assert list(response.outputs[0].token_ids) == [1]
    with pytest.raises(WorkerLost):
        await stream.next_response(FOR_EVER_S)


def test_messages_are_shared_among_the_streams_that_write() -> None:
    pacer = Pacer(StreamingSection(messages_per_s=100, max_interval_s=0.04))
    assert pacer.interval_s == 0
    with pacer.stream():
        assert pacer.interval_s == 0.01
        with pacer.stream(), pacer.stream():
            assert pacer.interval_s == 0.03
            with pacer.stream(), pacer.stream():
                assert pacer.interval_s == 0.04
        assert pacer.interval_s == 0.01
    assert pacer.interval_s == 0
