"""What leaves together for one worker: siblings side by side, a budget in a frame, nothing later than the window."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from protos.v1 import session_pb2 as session_pb
from router.config import DispatchSection, RouterConfig, SessionsSection
from router.group import Group
from router.metrics import RouterMetrics
from router.pack import Pack
from tests.router.conftest import Cluster, until
from tests.router.offline import OfflineRouter, OfflineSession, whole
from tests.router.scripted_worker import hang

Start = Callable[..., Any]
LARGE = tuple(range(2, 34))
FIRST, SECOND = (40, 41, 42, 43), (50, 51, 52, 53)  # whole blocks: the beginnings of two families


def router(window_s: float) -> OfflineRouter:
    """Its window is either longer than any test or about nothing."""
    sessions = SessionsSection(packing_window_s=window_s)
    return OfflineRouter(RouterConfig(sessions=sessions, dispatch=DispatchSection(prefill_window_steps=0)))


def busy(app: OfflineRouter) -> tuple[OfflineSession, Group]:
    """A worker that computes a prompt."""
    [worker] = app.workers("w0", step_tokens=32)
    group = app.admit(LARGE)
    assert len(worker.submitted()) == 1
    return worker, group


def prompts(session: OfflineSession) -> list[list[tuple[int, ...]]]:
    """The prompts of each frame that leaves now."""
    frames = [[tuple(submit.token_ids) for submit in frame.submit] for frame in session.sent()]
    return [frame for frame in frames if frame]


def admit_all(app: OfflineRouter, *all_prompts: Sequence[int]) -> list[Group]:
    return [app.admit(prompt) for prompt in all_prompts]


async def test_without_a_window_everything_leaves_at_once() -> None:
    app = router(0)
    worker, _ = busy(app)
    for prompt in (FIRST, SECOND):
        app.admit(prompt)
        assert prompts(worker) == [[prompt]]
    await app.close()


async def test_an_idle_worker_waits_for_nothing() -> None:
    app = router(1.0)
    [worker] = app.workers("w0", step_tokens=32)
    app.admit(FIRST)
    assert prompts(worker) == [[FIRST]]
    await app.close()


async def test_a_worker_that_only_decodes_waits_for_nothing() -> None:
    app = router(1.0)
    worker, group = busy(app)
    worker.says(*whole(group.streams[0].request, 1))
    app.admit(FIRST)
    assert prompts(worker) == [[FIRST]]
    await app.close()


async def test_families_leave_side_by_side_when_the_worker_has_computed_its_prompts() -> None:
    app = router(1.0)
    worker, group = busy(app)
    admit_all(app, (*FIRST, 1), (*SECOND, 1), (*FIRST, 2), (*SECOND, 2), (*FIRST, 3))
    assert prompts(worker) == []
    worker.says(*whole(group.streams[0].request, 1))
    assert prompts(worker) == [[(*FIRST, 1), (*FIRST, 2), (*FIRST, 3), (*SECOND, 1), (*SECOND, 2)]]
    assert prompts(worker) == []
    await app.close()


async def test_a_full_budget_leaves_at_once() -> None:
    app = router(1.0)
    worker, _ = busy(app)
    app.admit(tuple(range(40, 60)))
    assert prompts(worker) == []
    app.admit(tuple(range(60, 80)))
    assert [[len(prompt) for prompt in frame] for frame in prompts(worker)] == [[20, 20]]
    await app.close()


async def test_the_window_ends() -> None:
    app = router(0.01)
    worker, _ = busy(app)
    admit_all(app, (*FIRST, 1), (*SECOND, 1), (*FIRST, 2))
    assert prompts(worker) == []
    await until(worker._outgoing.is_set)
    assert prompts(worker) == [[(*FIRST, 1), (*FIRST, 2), (*SECOND, 1)]]
    await app.close()


async def test_other_news_do_not_take_the_pack_along() -> None:
    app = router(1.0)
    worker, _ = busy(app)
    app.admit(FIRST)
    worker.resync()
    assert [(frame.resync, len(frame.submit)) for frame in worker.sent()] == [(True, 0)]
    await app.close()


async def test_what_is_cancelled_in_the_pack_is_never_sent() -> None:
    app = router(1.0)
    worker, group = busy(app)
    gone, stays = admit_all(app, FIRST, SECOND)
    app.admission.release(gone)
    worker.says(*whole(group.streams[0].request, 1))
    [frame] = worker.sent()
    assert [tuple(submit.token_ids) for submit in frame.submit] == [SECOND]
    assert not frame.cancel
    for rest in (group, stays):
        app.admission.release(rest)
    app.check_empty()
    await app.close()


async def test_what_is_lost_in_the_pack_goes_elsewhere() -> None:
    """And is not suspected: the worker had not been told of it."""
    app = router(1.0)
    worker, group = busy(app)
    packed = app.admit(FIRST)
    worker.lose()
    assert app.dispatcher.num_waiting == 2
    worker.greet(step_tokens=32)
    assert sorted(prompt for frame in prompts(worker) for prompt in frame) == sorted([LARGE, FIRST])
    for rest in (group, packed):
        app.admission.release(rest)
    app.check_empty()
    await app.close()


async def test_packs_are_measured() -> None:
    app = router(1.0)
    worker, _ = busy(app)
    admit_all(app, tuple(range(40, 60)), tuple(range(60, 80)))
    assert prompts(worker)
    value = app.metrics.registry.get_sample_value
    assert value("headwater_pack_requests_count") == 1
    assert value("headwater_pack_requests_sum") == 2
    assert value("headwater_pack_tokens_total") == value("headwater_pack_budget_tokens_total") == 32
    await app.close()


async def test_siblings_share_a_frame_over_the_wire(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster(sessions={"packing_window_s": 1.0}, dispatch={"prefill_window_steps": 0})
    worker = await cluster.add_worker("w0", hang(), step_tokens=48)
    client = await cluster.client()
    tasks = [asyncio.create_task(client.complete([5] * 8, max_tokens=1, request_id="first"))]
    await until(lambda: len(worker.submitted) == 1)
    for i in range(3):
        tasks.append(asyncio.create_task(client.complete([*range(40, 55), 60 + i], max_tokens=1, request_id=f"{i}")))
        tasks.append(asyncio.create_task(client.complete([*range(20, 35), 60 + i], max_tokens=1, request_id=f"{i}x")))
    await until(lambda: len(worker.submitted) == 7)
    assert max(worker.frame_sizes) > 1
    for request_id in ("first", "0", "1", "2", "0x", "1x", "2x"):
        await client.abort(request_id)
    await asyncio.gather(*tasks)


async def test_what_is_dropped_counts_no_more() -> None:
    """Else a worker with nothing else to compute would be taken for idle, or the rest for a full budget."""
    pack = Pack(1.0, lambda: None, RouterMetrics().packs)
    for name, num_tokens in (("a", 5), ("b", 7)):
        pack.add([session_pb.Submit(request_id=name)], num_tokens=num_tokens, family=0, budget=100)
    assert pack.drop("a")
    assert pack.num_tokens == 7
    assert not pack.drop("a")
    pack.release()
    assert [submit.request_id for submit in pack.take()] == ["b"]
