"""What a router keeps of the last minute: workers' totals and its own counts, over the wire and tick by tick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from protos import errors
from protos.client import Client, Overview
from protos.convert import load_to_proto, totals_to_proto
from protos.messages import EngineTotals, Load
from protos.v1 import session_pb2 as session_pb
from router.calls import GENERATING
from router.watch import WINDOW_TICKS, Watch
from tests.router.conftest import Cluster, Keys, until
from tests.router.scripted_worker import ScriptedWorker, refuse

Start = Callable[..., Any]


def watch_of(cluster: Cluster) -> Watch:
    assert cluster.server._running is not None
    return cluster.server._running._overview_watch


async def tell(cluster: Cluster, worker: ScriptedWorker, **totals: Any) -> None:
    """The worker's totals, as its session then has them."""
    told = EngineTotals(**totals)
    heartbeat = session_pb.Heartbeat(load=load_to_proto(worker.load), totals=totals_to_proto(told))
    worker.send(session_pb.WorkerFrame(heartbeat=heartbeat))
    session = watch_of(cluster)._fleet.session(worker.worker_id)
    assert session is not None
    await until(lambda: session.totals == told)


def tick(cluster: Cluster, count: int = 1) -> Overview:
    """Seconds pass."""
    watch = watch_of(cluster)
    for _ in range(count):
        watch.tick(watch._metrics.counts(GENERATING))
    return watch.overview


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second passes by itself."""
    monkeypatch.setattr("router.watch.TICK_S", 3600.0)


@pytest.mark.usefixtures("still")
async def test_rates_come_from_totals_by_the_workers_clocks(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    one, two = await cluster.add_worker("w0"), await cluster.add_worker("w1")
    await tell(cluster, one, seconds=100.0, generation_tokens=7000)
    await tell(cluster, two, seconds=5.0, generation_tokens=10)
    assert tick(cluster).figures()["generation_tokens_per_s"] == 0
    await tell(
        cluster, one, seconds=101.0, generation_tokens=7050, prompt_tokens=300, num_steps=10, num_step_outputs=25
    )
    await tell(cluster, two, seconds=5.5, generation_tokens=40)
    figures = tick(cluster).figures()
    assert figures["generation_tokens_per_s"] == pytest.approx(50 / 1.0 + 30 / 0.5)
    assert figures["prompt_tokens_per_s"] == pytest.approx(300)
    assert figures["history"]["generation_tokens_per_s"] == pytest.approx([0, 110])
    assert figures["workers"][0]["batch"] == 2.5
    assert figures["window"]["generation_tokens"] == 80


@pytest.mark.usefixtures("still")
async def test_a_lost_worker_has_no_rate_and_a_restarted_one_starts_anew(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0")
    for second in (1, 2):
        await tell(cluster, worker, seconds=float(second), generation_tokens=100 * second)
        tick(cluster)
    await worker.kill()
    await until(lambda: cluster.server.num_connected == 0)
    assert [view.state for view in tick(cluster, 6).workers] == ["connecting"]
    assert tick(cluster).figures()["generation_tokens_per_s"] == 0
    await worker.start()
    await cluster.wait_connected()
    await tell(cluster, worker, seconds=0.5, generation_tokens=20)
    tick(cluster)
    await tell(cluster, worker, seconds=1.5, generation_tokens=90)
    overview = tick(cluster)
    assert overview.figures()["generation_tokens_per_s"] == pytest.approx(70)
    assert overview.workers[0].window.generation_tokens == 100 + 70


@pytest.mark.usefixtures("still")
async def test_requests_count_by_how_they_end_and_are_forgotten(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    await cluster.add_worker("w0")
    client: Client = await cluster.client()
    for _ in range(3):
        await client.complete([5, 6], max_tokens=4)
    cluster.workers["w0"].script = refuse("EngineFailure", "broken")
    with pytest.raises(errors.EngineFailure):
        await client.complete([5, 6], max_tokens=4)
    await client.topology()  # no work of the cluster
    overview = tick(cluster)
    assert overview.outcomes == {"length": 3, "EngineFailure": 1}
    assert (overview.time_to_first_token.count, overview.inter_token.count) == (3, 9)
    assert (overview.num_live, overview.model) == (0, "tiny")
    figures = tick(cluster, WINDOW_TICKS - 1).figures()
    assert (figures["requests"]["ended"], figures["requests"]["errors"]) == (4, {"EngineFailure": 1})
    figures = tick(cluster).figures()
    assert (figures["requests"]["ended"], figures["time_to_first_token"]["count"]) == (0, 0)


@pytest.mark.usefixtures("still")
async def test_memory_is_bounded_and_workers_that_left_are_forgotten(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0")
    await cluster.add_worker("w1")
    for second in range(3):
        await tell(cluster, worker, seconds=float(second), generation_tokens=second)
        overview = tick(cluster, WINDOW_TICKS)
        assert len(overview.generation_history) == len(overview.prompt_history) == WINDOW_TICKS
    cluster.remove_worker("w0")
    assert [view.worker_id for view in tick(cluster).workers] == ["w1"]
    assert watch_of(cluster)._engines.keys() == {"w1"}


@pytest.mark.usefixtures("still")
async def test_clients_get_what_the_router_has(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0")
    worker.set_load(Load(num_running=4, num_waiting=1, kv_used_tokens=10, kv_capacity_tokens=40))
    for second in (1, 2):
        await tell(cluster, worker, seconds=float(second), generation_tokens=second, attention_keys=5 * second)
        overview = tick(cluster)
    client: Client = await cluster.client()
    await client.complete([5, 6], max_tokens=4)
    assert await client.overview() == (overview,)  # asking is no work of the router
    assert overview.workers[0].num_running == 4
    assert await client.overview() != (tick(cluster),)


async def test_the_router_looks_by_itself(start_cluster: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.watch.TICK_S", 0.01)
    cluster: Cluster = await start_cluster()
    await cluster.add_worker("w0")
    await until(lambda: [view.state for view in watch_of(cluster).overview.workers] == ["ready"])
    assert watch_of(cluster).overview.window_s > 0


async def test_only_admins_see_the_overview(start_cluster: Start, keys: Keys) -> None:
    cluster: Cluster = await start_cluster(tenants={"file": keys.file})
    await cluster.add_worker("w0")
    acme, admin = await cluster.client(api_key=keys.acme), await cluster.client(api_key=keys.admin)
    with pytest.raises(errors.PermissionDenied):
        await acme.overview()
    assert [view.router_ids for view in await admin.overview()] == [("r0",)]
