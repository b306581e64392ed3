"""Who is placed where, and when: rooms of workers, shares of tenants, priorities, waiting for a prefix, deadlines."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from protos import errors
from protos.blocks import block_hashes
from protos.messages import KVEvents, Load
from router.config import DispatchSection, LimitsSection, RouterConfig, SessionsSection, TenantsSection
from router.group import Group
from router.routing.protocol import Ask
from router.tenants import EVERYBODY, Tenant
from tests.router.conftest import Cluster, Keys, until
from tests.router.offline import Clock, OfflineRouter, OfflineSession, whole
from tests.router.scripted_worker import answer, hang

Start = Callable[..., Any]
LONG = tuple(range(2, 34))  # eight blocks
OTHER = tuple(range(40, 72))


def router(clock: Clock | None = None, *, tenants: TenantsSection | None = None, **dispatch: Any) -> OfflineRouter:
    config = RouterConfig(
        dispatch=DispatchSection(**dispatch),
        sessions=SessionsSection(packing_window_s=0),
        limits=LimitsSection(max_queued_requests=1000),
        tenants=tenants or TenantsSection(),
    )
    return OfflineRouter(config, clock)


def store(session: OfflineSession, prompt: tuple[int, ...], sequence: int = 1) -> None:
    """The worker tells that it has a prompt in its cache."""
    session.hears(events=KVEvents(sequence, tuple(block_hashes(EVERYBODY.name, prompt, 4))))


def finish(session: OfflineSession, group: Group, app: OfflineRouter, *, cached_tokens: int = 0) -> None:
    """The worker answers a whole group and its client takes the answer."""
    for stream in group.open_streams:
        session.says(*whole(stream.request, 1, finish=True, cached_tokens=cached_tokens))
    app.admission.release(group)


def learn_prefill(app: OfflineRouter, seconds: float) -> None:
    """Prompts of 32 tokens lately took so long."""
    for _ in range(8):
        app.forecast.observe_first_token(32, seconds)


# What a worker is given


async def test_a_worker_gets_what_it_runs_and_an_eighth_ahead() -> None:
    app = router()
    [worker] = app.workers("w0", max_running=16)
    groups = [app.admit() for _ in range(40)]
    assert len(worker.submitted()) == worker.num_live == 18
    assert app.dispatcher.num_waiting == 22
    finish(worker, groups[0], app)
    assert [request.request_id for request in worker.submitted()] == [groups[18].streams[0].request.request_id]
    await app.close()


async def test_a_worker_gets_no_more_prompts_than_the_window() -> None:
    app = router(prefill_window_steps=2.0)
    [worker] = app.workers("w0", step_tokens=32)
    groups = [app.admit((i, *LONG[1:])) for i in range(6)]
    assert worker.num_live == 2  # 64 tokens: two steps
    worker.says(*whole(groups[0].streams[0].request, 1))
    assert worker.num_live == 3  # its prompt is computed; it still runs
    await app.close()


async def test_several_outputs_count_as_several() -> None:
    app = router()
    [worker] = app.workers("w0", max_running=4)
    for _ in range(3):
        app.admit(n=2)
    assert worker.num_live == 3  # 4 of 5 outputs, and the last slot takes a group whole: it must not starve
    await app.close()


async def test_a_group_larger_than_a_worker_runs_alone() -> None:
    app = router()
    [worker] = app.workers("w0", max_running=2)
    large = app.admit(n=9)
    app.admit()
    assert worker.num_live == 1
    finish(worker, large, app)
    assert app.dispatcher.num_waiting == 1 or worker.num_live == 1
    await app.close()


async def test_outputs_of_other_routers_take_room_too() -> None:
    app = router()
    [worker] = app.workers("w0", max_running=4)
    worker.reports(Load(num_running=5))
    app.admit()
    assert worker.num_live == 0
    worker.reports(Load(num_running=1))
    app.dispatcher.run()
    assert worker.num_live == 1
    await app.close()


async def test_workers_are_told_what_waits() -> None:
    app = router()
    [worker] = app.workers("w0", max_running=1)
    for _ in range(5):
        app.admit((5, 6), max_tokens=4)
    assert worker.num_live == 2
    assert [frame.queued_tokens for frame in worker.sent()] == [3 * (2 + 4)]
    await app.close()


async def test_workers_run_no_more_than_they_can_over_the_wire(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0", hang(1), max_running=8)
    client = await cluster.client()
    tasks = [asyncio.create_task(client.complete("w5", request_id=f"{i}")) for i in range(30)]
    await until(lambda: len(worker.submitted) == 9)
    await until(lambda: worker.queued_tokens > 0)
    assert worker.queued_tokens > 0
    worker.script = answer(1)
    for i in range(30):
        await client.abort(f"{i}")
    await asyncio.gather(*tasks)
    cluster.server.check()


# Tenants

ACME, GLOBEX = Tenant("acme"), Tenant("globex")


@pytest.fixture
def many(keys: Keys) -> TenantsSection:
    return TenantsSection(file=keys.file)


async def test_a_flood_delays_another_tenant_by_one_request(many: TenantsSection) -> None:
    app = router(tenants=many, tenant_headroom=0.0)
    [worker] = app.workers("w0", max_running=1)
    flood = [app.admit(tenant=ACME) for _ in range(200)]
    worker.submitted()
    other = app.admit(tenant=GLOBEX)
    finish(worker, flood[0], app)
    assert app.place_of(other) == "w0"
    await app.close()


async def test_a_flood_leaves_headroom_for_another_tenant(many: TenantsSection) -> None:
    app = router(tenants=many, tenant_headroom=0.25)
    [worker] = app.workers("w0", max_running=8)
    for _ in range(50):
        app.admit(tenant=ACME)
    assert app.dispatcher.running == {"acme": 6}
    assert app.place_of(app.admit(tenant=GLOBEX)) == "w0"  # at once
    assert worker.num_live == 7
    await app.close()


async def test_without_tenants_nothing_is_held_back() -> None:
    app = router(tenant_headroom=0.5)
    [worker] = app.workers("w0", max_running=8)
    for _ in range(50):
        app.admit()
    assert worker.num_live == 9
    await app.close()


async def test_weights_share_a_busy_worker(many: TenantsSection) -> None:
    app = router(tenants=many, tenant_headroom=0.0)
    [worker] = app.workers("w0", max_running=8)
    heavy, light = Tenant("acme", weight=3.0), Tenant("globex")
    groups = {g.group_id: g for t in (heavy, light) for g in [app.admit(tenant=t) for _ in range(60)]}
    served: Counter[str] = Counter()
    for _ in range(40):
        group = groups[next(iter(worker._live.values())).group_id]
        served[group.tenant.name] += 1
        finish(worker, group, app)
    assert 27 <= served["acme"] <= 32
    await app.close()


async def test_a_tenants_own_limits_hold(many: TenantsSection) -> None:
    app = router(tenants=many, tenant_headroom=0.0)
    [worker] = app.workers("w0", max_running=8)
    small = Tenant("acme", max_running=2, max_queued=3)
    groups = [app.admit(tenant=small) for _ in range(5)]
    assert worker.num_live == 2
    with pytest.raises(errors.Overloaded, match="3 requests of acme wait, its limit is 3"):
        app.admit(tenant=small)
    assert app.place_of(app.admit(tenant=GLOBEX)) == "w0"
    finish(worker, groups[0], app)
    assert app.place_of(groups[2]) == "w0"
    app.check()
    await app.close()


async def test_a_tenant_over_its_rate_is_refused_with_a_hint(start_cluster: Start, keys: Keys) -> None:
    keys.write(acme={"requests_per_s": 0.01})
    cluster: Cluster = await start_cluster(tenants={"file": keys.file})
    await cluster.add_worker("w0", answer(1))
    client = await cluster.client(api_key=keys.acme)
    await client.complete("w5", max_tokens=1)
    with pytest.raises(errors.Overloaded, match="requests_per_s") as raised:  # what has ended still counts
        await client.complete("w5", max_tokens=1)
    assert raised.value.retry_after_s is not None
    assert 50 < raised.value.retry_after_s < 100
    other = await cluster.client(api_key=keys.globex)
    assert (await other.complete("w5", max_tokens=1)).outputs


async def test_tokens_that_were_not_needed_come_back() -> None:
    app = router()
    [worker] = app.workers("w0", max_running=1)
    tenant = Tenant("acme", tokens_per_s=100.0)
    blockers = [app.admit() for _ in range(2)]
    waiting = app.admit(tenant=tenant, max_tokens=40)
    app.admission._expire(waiting)
    account = app.admission._quotas._accounts["acme"]
    assert account.tokens.wait_s(app.admission._quotas._clock(), 99, 100.0) == pytest.approx(0.0, abs=0.01)
    for group in blockers:
        app.admission.release(group)
    app.check_empty()
    assert worker.num_live == 0
    await app.close()


async def test_priorities_come_first_and_no_tenant_takes_more_than_its_own(start_cluster: Start, keys: Keys) -> None:
    keys.write(acme={"max_priority": 5})
    cluster: Cluster = await start_cluster(tenants={"file": keys.file}, dispatch={"tenant_headroom": 0.0})
    worker = await cluster.add_worker("w0", hang(), max_running=2)
    first = await cluster.client(api_key=keys.admin)
    acme, globex = await cluster.client(api_key=keys.acme), await cluster.client(api_key=keys.globex)
    holders = (first, first, acme)
    running = [asyncio.create_task(c.complete("w5", request_id=f"r{i}")) for i, c in enumerate(holders)]
    await until(lambda: len(worker.submitted) == 3)
    dispatcher = cluster.server._running._dispatcher  # type: ignore[union-attr]
    waiting = []
    for client, prompt, priority in ((globex, [10], 100), (acme, [11], 0), (acme, [12], 9), (globex, [13], -1)):
        count = dispatcher.num_waiting
        waiting.append(asyncio.create_task(client.complete(prompt, max_tokens=1, priority=priority)))
        await until(lambda count=count: dispatcher.num_waiting == count + 1)  # type: ignore[misc]
    worker.script = answer(1)
    for i, client in enumerate(holders):
        await client.abort(f"r{i}")
    await asyncio.gather(*running, *waiting)
    order = {request.token_ids[0]: request.priority for request in worker.submitted[3:]}
    assert next(iter(order)) == 12
    assert list(order)[-1] == 13
    assert order == {10: 0, 11: 0, 12: 5, 13: -1}


# Prefixes


async def test_a_group_waits_for_the_full_worker_with_its_prefix_while_others_pass() -> None:
    app = router(Clock(), max_affinity_wait_s=1000.0)
    learn_prefill(app, 500.0)
    home, other = app.workers("w0", "w1", max_running=2)
    store(home, LONG)
    for _ in range(3):
        assert app.place_of(app.admit(LONG)) == "w0"
    patient = app.admit(LONG)
    assert app.place_of(patient) is None
    passing = app.admit(OTHER)
    assert app.place_of(passing) == "w1"
    running = next(iter(home._live.values()))
    finish(home, app.admission._entries[running.group_id].group, app, cached_tokens=31)
    assert app.place_of(patient) == "w0"
    assert other.num_live == 1
    await app.close()


async def test_the_wait_for_a_prefix_ends() -> None:
    app = router(Clock(), max_affinity_wait_s=0.05)
    learn_prefill(app, 500.0)
    home, other = app.workers("w0", "w1", max_running=2)
    store(home, LONG)
    for _ in range(3):
        app.admit(LONG)
    patient = app.admit(LONG)
    assert app.place_of(patient) is None
    await until(lambda: app.place_of(patient) == "w1")
    assert (home.num_live, other.num_live) == (3, 1)
    app.check()
    await app.close()


async def test_nobody_waits_longer_than_computing_the_prefix_takes() -> None:
    app = router(Clock(), max_affinity_wait_s=1000.0)
    learn_prefill(app, 0.0)
    home, _ = app.workers("w0", "w1", max_running=2)
    store(home, LONG)
    for _ in range(3):
        app.admit(LONG)
    assert app.place_of(app.admit(LONG)) == "w1"
    await app.close()


async def test_one_hot_worker_does_not_switch_affinity_off_for_others() -> None:
    app = router(Clock(), max_affinity_wait_s=1000.0)
    learn_prefill(app, 500.0)
    hot, warm, _ = app.workers("w0", "w1", "w2", max_running=4)
    store(hot, LONG)
    store(warm, OTHER)
    for _ in range(10):
        app.admit(LONG)
    groups = [app.admit(OTHER) for _ in range(3)]
    assert [app.place_of(group) for group in groups] == ["w1"] * 3
    await app.close()


async def test_siblings_of_a_burst_find_each_other_before_any_event() -> None:
    app = router()
    app.workers("w0", "w1", "w2", max_running=32)
    groups = [app.admit((*LONG, 40 + i)) for i in range(4)]
    assert len({app.place_of(group) for group in groups}) == 1
    await app.close()


async def test_a_burst_too_large_for_one_worker_spreads() -> None:
    app = router()
    sessions = app.workers("w0", "w1", max_running=4)
    groups = [app.admit((*LONG, 40 + i)) for i in range(10)]
    assert sorted(session.num_live for session in sessions) == [5, 5]
    assert len({app.place_of(group) for group in groups[:5]}) == 1
    await app.close()


async def test_nothing_waits_while_workers_idle() -> None:
    app = router()
    sessions = app.workers("w0", "w1", "w2", max_running=4)
    for i in range(12):
        app.admit((40 + i,))
        assert app.dispatcher.num_waiting == 0
    assert sum(session.num_live for session in sessions) == 12
    await app.close()


async def test_a_worker_at_a_new_address_begins_with_nothing() -> None:
    """What the old session still says and holds is not mistaken for the new one's."""
    app = router()
    [old] = app.workers("w0", max_running=4)
    store(old, LONG)
    group = app.admit(LONG)
    app.set_members({"w0": "elsewhere"})
    new = app.session("w0")
    new.greet(max_running=4)
    assert app.index.num_known("w0") == 0
    store(new, OTHER)
    store(old, LONG, sequence=2)
    same = app.admit(LONG)
    finish(old, group, app)
    await until(lambda: old not in app.fleet._retired)
    assert app.index.num_known("w0") == 8
    assert live_tokens(app) == [31]
    finish(new, same, app)
    app.check_empty()
    await app.close()


def live_tokens(app: OfflineRouter) -> list[int]:
    """Of LONG, what is in use on each worker."""
    ask = Ask(len(LONG), 1, 1, 0)
    candidates = app.dispatcher.explain(ask, block_hashes(EVERYBODY.name, LONG, 4)).candidates
    return [estimate.live_tokens for estimate, _ in candidates]


async def test_an_answer_that_is_read_late_takes_nothing_from_others() -> None:
    """Its worker was lost and came back meanwhile: what others hold there now is theirs."""
    app = router()
    [worker] = app.workers("w0", max_running=4)
    slow = app.admit(LONG)
    worker.says(*whole(slow.streams[0].request, 1, finish=True))
    worker.lose()
    worker.greet(max_running=4)
    running = app.admit(LONG)
    assert live_tokens(app) == [31]
    app.admission.release(slow)
    assert live_tokens(app) == [31]
    app.admission.release(running)
    app.check_empty()
    await app.close()


async def test_many_suspects_do_not_keep_others_from_idle_workers() -> None:
    """Each worker runs one suspect at a time; what cannot have been the cause passes those that wait."""
    app = router()
    first, _ = app.workers("w0", "w1")
    app.session("w1").hold(True)
    suspects = [app.admit((40 + i,)) for i in range(30)]
    app.session("w1").hold(False)
    first.lose("silent")
    assert app.dispatcher.num_waiting == 29
    innocent = app.admit(LONG)
    assert app.place_of(innocent) == "w1"
    for group in (*suspects, innocent):
        app.admission.release(group)
    app.check_empty()
    await app.close()


async def test_a_continuation_that_has_ended_clears_no_suspicion_of_the_others() -> None:
    """A Score whose rest ends two workers is not sent to a third, though a part of it was answered by the first."""
    app = router()
    sessions = app.workers("w0", "w1", "w2")
    group = app.admit(num_streams=2)
    first = app.session(app.place_of(group) or "")
    first.says(*whole(group.streams[0].request, 1, finish=True))
    first.lose()
    for _ in range(2):
        assert group.open_streams
        app.session(app.place_of(group) or "").lose()
    assert isinstance(group.streams[1].error, errors.EngineFailure)
    app.admission.release(group)
    assert sum(session.model is not None for session in sessions) == 0
    app.check_empty()
    await app.close()


# Predictions


async def test_predictions_that_fail_ask_for_a_snapshot_and_a_snapshot_clears_them() -> None:
    clock = Clock()
    app = router(clock)
    [worker] = app.workers("w0")
    store(worker, LONG)

    def wrong_answers(num_answers: int) -> int:
        """How many snapshots were asked for meanwhile."""
        num_asked = 0
        for _ in range(num_answers):
            finish(worker, app.admit(LONG), app, cached_tokens=0)
            num_asked += sum(frame.resync for frame in worker.sent())
        return num_asked

    assert wrong_answers(7) == 0
    assert wrong_answers(1) == 1
    clock.now += 100
    worker.hears(events=KVEvents(1, (), snapshot=True))
    store(worker, LONG, sequence=2)
    assert wrong_answers(7) == 0
    await app.close()


# Deadlines


async def test_a_deadline_that_cannot_be_met_is_refused_early() -> None:
    clock = Clock()
    app = router(clock)
    [worker] = app.workers("w0", max_running=1)
    for _ in range(8):
        app.forecast.observe_decode(10, 10.0)
        app.forecast.observe_drain(10, 10.0)
    with pytest.raises(errors.DeadlineExceeded, match="at the least"):
        app.admit(max_tokens=40, ignore_eos=True, remaining_s=5.0)
    assert worker.num_live == 0
    fast = app.admit(max_tokens=40, remaining_s=5.0)  # it may end early
    slow = app.admit(max_tokens=40, ignore_eos=True, remaining_s=50.0)
    for group in (fast, slow):
        app.admission.release(group)
    app.check_empty()
    await app.close()


async def test_a_deadline_that_passes_while_it_waits_frees_its_place() -> None:
    app = router()
    [worker] = app.workers("w0", max_running=1)
    blockers = [app.admit() for _ in range(2)]
    late = app.admit(remaining_s=0.01)
    await until(lambda: isinstance(late.streams[0].error, errors.DeadlineExceeded))
    assert app.dispatcher.num_waiting == 0
    for group in blockers:
        finish(worker, group, app)
    app.check_empty()
    await app.close()
