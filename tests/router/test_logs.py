"""What a router logs: never what was asked, what was answered, or who may ask."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from protos import errors
from router.server import RouterServer
from router.session import RouterIdentity
from tests.router.conftest import Cluster, router_config, until
from tests.router.scripted_worker import answer, hang, refuse

TOKEN, API_KEY, PROMPT = "token-4a1f", "key-77c2", "prompt-93be"


@pytest.fixture
async def cluster(tokenizer_dir: Path) -> AsyncIterator[Cluster]:
    """Short of patience, so that much goes wrong soon."""
    async with AsyncExitStack() as stack:
        server = RouterServer(
            router_config(),
            model_name="tiny",
            tokenizer_dir=tokenizer_dir,
            session_token=TOKEN,
            router_id="r0",
        )
        address = await server.start()
        stack.push_async_callback(server.stop, 0)
        yield Cluster(server, address, stack)


async def test_no_prompt_token_or_key_is_logged(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever becomes of a request, and however much is logged."""
    caplog.set_level(logging.DEBUG)
    client = await cluster.client(api_key=API_KEY, timeout_s=20.0, resume=False)
    worker = await cluster.add_worker("w0", answer(4))
    await client.complete(f"{PROMPT} w5", max_tokens=3)
    await client.score(f"{PROMPT} w5", [f"w6 {PROMPT}"])
    await client.tokenize(PROMPT)
    with pytest.raises(errors.InvalidRequest):
        await client.complete(f"{PROMPT} w5", temperature=-1.0)
    with pytest.raises(errors.PromptTooLong):
        await client.complete(f"{PROMPT} " * 100)
    with pytest.raises(errors.UnknownModel):
        await client.complete(PROMPT, model="another")
    worker.script = refuse("EngineFailure", "the engine is out of order")
    with pytest.raises(errors.EngineFailure):
        await client.complete(f"{PROMPT} w5")
    worker.script = hang(2)
    async with aclosing(client.generate(f"{PROMPT} w5")) as events:
        await anext(events)
    await until(lambda: bool(worker.cancelled))
    running = asyncio.create_task(_drained(client.generate(f"{PROMPT} w7", max_tokens=9)))
    await until(lambda: len(worker.submitted) > 4)
    await worker.kill()
    with pytest.raises(errors.HeadwaterError):
        await running
    assert worker.metadata["headwater-session-token"] == TOKEN
    assert "worker w0 lost" in caplog.text
    for secret in (TOKEN, API_KEY, PROMPT):
        assert secret not in caplog.text


async def _drained(events: Any) -> None:
    async for _ in events:
        pass


def test_the_session_token_is_not_printed_with_what_holds_it() -> None:
    assert TOKEN not in repr(RouterIdentity("r0", TOKEN, "tiny"))
