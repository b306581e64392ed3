"""What a worker tells autoscaling: its own load, and what routers say waits with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from protos.v1 import session_pb2 as pb
from tests.workers.test_server import Session, request, running
from workers.usage import Usage


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_what_waits_is_summed_over_routers_as_each_last_said(target_dir: Path) -> None:
    async with running(target_dir) as (server, address):
        sessions = [Session(address.session) for _ in range(2)]
        for session, num_tokens in zip(sessions, (100, 20), strict=True):
            await session.call.write(pb.RouterFrame(queued_tokens=num_tokens))
        await until(lambda: server.queued_tokens == 120)
        await sessions[0].call.write(pb.RouterFrame(queued_tokens=7))
        await until(lambda: server.queued_tokens == 27)
        await sessions[0].pace(1000)  # says nothing about the queue
        await sessions[0].call.write(pb.RouterFrame(queued_tokens=0))
        await until(lambda: server.usage().queued_tokens == 20)
        await sessions[1].channel.close()
        await until(lambda: server.queued_tokens == 0)
        await sessions[0].channel.close()


async def test_usage_is_the_load_as_shares(target_dir: Path) -> None:
    async with running(target_dir, step_s=0.01) as (server, address):
        assert server.usage() == Usage(max_running=17)
        session = Session(address.session)
        await session.submit(request("a", max_tokens=400), request("b", max_tokens=400))
        await until(lambda: server.usage().num_running == 2)
        assert 0 < server.usage().kv_use < 1
        await session.cancel("a")
        await session.cancel("b")
        await until(lambda: server.usage().num_running == 0)
        await session.channel.close()


async def test_first_tokens_are_told_once(target_dir: Path) -> None:
    async with running(target_dir, step_s=0.02) as (server, address):
        session = Session(address.session)
        await session.submit(request("a"))
        await session.deltas("a")
        assert server.usage().first_token_s >= 0.02
        assert server.usage().first_token_s == 0
        await session.submit(request("b"))
        await session.deltas("b")
        assert server.usage().first_token_s >= 0.02
        await session.channel.close()
