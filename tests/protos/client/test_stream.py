"""Streams that break: what comes before and after is the answer of one that did not."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import grpc
import pytest

from protos import errors
from protos.client import Client, RetryPolicy, Usage
from protos.v1 import inference_pb2 as pb
from tests.protos.client.story import Break, Story, close, cut, joined, length, lost, messages, routers

FAST = RetryPolicy(max_attempts=3, first_delay_s=0.01, max_delay_s=0.02)
NUM_MESSAGES = {n: length(n - 1) for n in (1, 3)}
BREAKS = {
    "cut": cut,
    "closed": close,
    "lost": lost(errors.WorkerLost("x")),
    "draining": lost(errors.Draining("x")),
    "no worker": lost(errors.NoWorker("x")),
    "overloaded": lost(errors.Overloaded("x")),
}


async def answer(target: Any, **options: Any) -> dict[str, Any]:
    client_options = {name: options.pop(name) for name in ("retry", "resume", "timeout_s") if name in options}
    async with Client(target, **{"retry": FAST} | client_options) as client:
        return joined([event async for event in client.generate("p", **options)])


async def unbroken(**options: Any) -> dict[str, Any]:
    async with routers(Story()) as (router,):
        return await answer(router.address, **options)


@pytest.mark.parametrize("num_routers", [1, 2])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("kind", BREAKS)
async def test_a_break_at_any_message_changes_nothing(kind: str, n: int, num_routers: int) -> None:
    options = {"n": n, "prompt_logprobs": 0, "request_id": "mine"}
    whole = await unbroken(**options)
    for num_messages in range(NUM_MESSAGES[n]):
        stories = [Story() for _ in range(num_routers)]
        stories[0].plan.append((num_messages, BREAKS[kind]))
        async with routers(*stories) as started:
            assert await answer([router.address for router in started], **options) == whole
        assert sum(len(story.requests) for story in stories) == 2


async def test_a_break_after_each_message_changes_nothing() -> None:
    whole = await unbroken(n=3, seed=5)
    story = Story(plan=[(1, cut)] * NUM_MESSAGES[3])
    async with routers(story) as (router,):
        assert await answer(router.address, n=3, seed=5) == whole
    assert len(story.requests) == NUM_MESSAGES[3]


async def test_what_is_asked_again_is_what_is_missing() -> None:
    story = Story(plan=[(3, cut)])
    async with routers(story) as (router,):
        await answer(router.address, n=3, prompt_logprobs=0, logprobs=2, stop=["x"])
    first, second = story.requests
    assert not first.received
    assert not first.sampling.HasField("seed")
    assert second.request_id == "made"  # the id that was reported: Abort must find the request under it
    assert second.sampling.seed == 7
    assert {r.index: (len(r.token_ids), r.finished) for r in second.received} == {
        0: (0, True),
        1: (3, False),
        2: (3, False),
    }
    assert not second.sampling.HasField("prompt_logprobs")
    assert (second.sampling.logprobs, second.sampling.stop, second.text) == (2, ["x"], b"p")


async def test_prompt_logprobs_that_must_be_asked_for_again_come_once() -> None:
    options = {"n": 3, "max_tokens": 0, "prompt_logprobs": 0}  # a request for nothing at all is refused
    whole = await unbroken(**options)
    story = Story(plan=[(1, cut)])
    async with routers(story) as (router,):
        assert await answer(router.address, **options) == whole
    assert story.requests[1].sampling.HasField("prompt_logprobs")


async def test_a_killed_router_is_replaced_by_another() -> None:
    whole = await unbroken(n=3)
    stories = [Story(pause=asyncio.Event()), Story(name="other")]
    async with routers(*stories) as (first, second), Client([first.address, second.address], retry=FAST) as client:
        stream = client.generate("p", n=3)
        events = [await anext(stream)]
        await first.kill()
        events += [event async for event in stream]
    assert joined(events) == whole
    assert [len(story.requests) for story in stories] == [1, 1]


async def test_the_only_router_down_and_up_again() -> None:
    whole = await unbroken(n=3)
    story = Story(pause=asyncio.Event())
    patient = RetryPolicy(max_attempts=100, first_delay_s=0.01, max_delay_s=0.05)
    async with routers(story) as (router,), Client(router.address, retry=patient) as client:
        stream = client.generate("p", n=3)
        events = [await anext(stream)]
        await router.kill()
        rest = asyncio.create_task(_rest(stream))
        await asyncio.sleep(0.05)
        story.pause = None
        await router.start()
        assert joined(events + await rest) == whole


async def _rest(stream: Any) -> list[Any]:
    return [event async for event in stream]


async def test_all_received_but_the_usage_ends_without_a_call() -> None:
    class Mute(Story):
        async def Generate(self, request: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
            self.requests.append(request)
            for response in messages(request, self.name):
                response.ClearField("usage")
                await context.write(response)

    whole = await unbroken(n=3)
    story = Mute()
    async with routers(story) as (router,):
        got = await answer(router.address, n=3)
    assert len(story.requests) == 1
    assert got["usage"] == Usage(prompt_tokens=4, cached_tokens=0, completion_tokens=12)
    assert got | {"usage": whole["usage"]} == whole


async def test_a_break_behind_the_last_message_is_none() -> None:
    story = Story()
    original = story.Generate

    async def generate(request: Any, context: Any) -> None:
        await original(request, context)
        await cut(context)

    story.Generate = generate  # type: ignore[method-assign,assignment]
    async with routers(story) as (router,):
        assert await answer(router.address) == await unbroken()
    assert len(story.requests) == 1


async def test_attempts_without_a_new_token_are_bounded() -> None:
    story = Story(plan=[(1, cut), *[(0, cut)] * 100])
    async with routers(story) as (router,):
        with pytest.raises(errors.NoWorker):
            await answer(router.address)
    assert len(story.requests) == FAST.max_attempts


async def test_every_router_gets_one_try_in_an_attempt() -> None:
    stories = [Story(plan=[(0, cut)] * 100) for _ in range(3)]
    async with routers(*stories) as started:
        with pytest.raises(errors.NoWorker):
            await answer([router.address for router in started], retry=RetryPolicy(max_attempts=1))
    assert [len(story.requests) for story in stories] == [1, 1, 1]


async def test_one_attempt_on_one_router_is_one_call() -> None:
    story = Story(plan=[(1, cut)])
    async with routers(story) as (router,):
        with pytest.raises(errors.NoWorker):
            await answer(router.address, retry=RetryPolicy(max_attempts=1))
    assert len(story.requests) == 1


@pytest.mark.parametrize(("end", "kind"), [(cut, errors.NoWorker), (close, errors.WorkerLost)])
async def test_without_resume_a_break_is_an_error(end: Break, kind: type[errors.HeadwaterError]) -> None:
    story = Story(plan=[(0, end), (1, end)])  # before the first message it is repeated as ever
    async with routers(story) as (router,):
        with pytest.raises(kind):
            await answer(router.address, resume=False)
    assert len(story.requests) == 2


@pytest.mark.parametrize(
    "error", [errors.InvalidParameter("x"), errors.EngineFailure("x"), errors.DeadlineExceeded("x")]
)
async def test_other_errors_end_a_stream(error: errors.HeadwaterError) -> None:
    story = Story(plan=[(1, lost(error))])
    async with routers(story) as (router,):
        with pytest.raises(type(error)):
            await answer(router.address)
    assert len(story.requests) == 1


async def test_the_deadline_holds_over_all_calls() -> None:
    story = Story(plan=[(1, cut), *[(0, lost(errors.Overloaded("x", retry_after_s=30)))] * 9])
    async with routers(story) as (router,):
        with pytest.raises(errors.Overloaded):
            await answer(router.address, timeout_s=5)
    assert len(story.requests) == 2


async def test_a_router_that_still_holds_the_id_is_asked_again() -> None:
    whole = await unbroken(request_id="mine")
    duplicate = lost(errors.DuplicateRequest("mine is live"))
    story = Story(plan=[(1, cut), (0, duplicate)])
    async with routers(story) as (router,):
        assert await answer(router.address, request_id="mine") == whole
    assert [request.request_id for request in story.requests] == ["mine"] * 3
    story = Story(plan=[(1, cut), *[(0, duplicate)] * 100])
    async with routers(story) as (router,):
        with pytest.raises(errors.DuplicateRequest):
            await answer(router.address, request_id="mine")
    assert len(story.requests) == FAST.max_attempts


async def test_an_answer_that_reports_no_seed_is_not_resumed() -> None:
    class Silent(Story):
        async def Generate(self, request: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
            self.requests.append(request)
            await context.write(pb.GenerateResponse(outputs=[pb.OutputDelta(token_ids=[1])]))
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")

    story = Silent()
    async with routers(story) as (router,), Client(router.address, retry=FAST) as client:
        with pytest.raises(errors.NoWorker):
            [event async for event in client.generate("p")]
    assert len(story.requests) == 1


@pytest.mark.parametrize("how", ["cancelled", "closed"])
async def test_nothing_is_left_when_the_reader_goes(how: str) -> None:
    before = asyncio.all_tasks()
    slow = RetryPolicy(first_delay_s=60, max_delay_s=60)
    story = Story(plan=[(1, cut)] if how == "cancelled" else [], pause=None if how == "cancelled" else asyncio.Event())
    async with routers(story) as (router,), Client(router.address, retry=slow) as client:
        stream = client.generate("p")
        await anext(stream)
        if how == "closed":
            await stream.aclose()
        else:
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.1)  # in the pause before the next call
            assert not waiting.done()
            waiting.cancel()
            assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], asyncio.CancelledError)
        await _until_closed(story)
    gc.collect()
    assert asyncio.all_tasks() <= before | {asyncio.current_task()}


async def _until_closed(story: Story) -> None:
    async with asyncio.timeout(5):
        while story.num_open:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_abort_finds_the_router_that_holds_the_request() -> None:
    stories = [Story(), Story(held={"mine"}), Story()]
    async with routers(*stories) as started, Client([router.address for router in started], retry=FAST) as client:
        assert await client.abort("mine")
        assert not await client.abort("other")
        await started[0].kill()
        assert await client.abort("mine")
        await started[1].kill()
        with pytest.raises(errors.NoWorker):  # it may be held there
            await client.abort("mine")


async def test_many_streams_survive_a_crash_together() -> None:
    whole = await unbroken(n=3)
    stories = [Story(pause=asyncio.Event()), Story()]
    async with routers(*stories) as (first, second), Client(f"{first.address},{second.address}", retry=FAST) as client:
        tasks = [asyncio.create_task(_events(client)) for _ in range(20)]
        await _until_open(stories[0], 10)
        await first.kill()
        for events in await asyncio.gather(*tasks):
            assert joined(events) == whole
    assert [len(story.requests) for story in stories] == [10, 20]


async def _events(client: Client) -> list[Any]:
    return [event async for event in client.generate("p", n=3)]


async def _until_open(story: Story, num_open: int) -> None:
    async with asyncio.timeout(5):
        while story.num_open < num_open:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
