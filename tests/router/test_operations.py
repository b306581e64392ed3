"""The service for operators, over the wire: what there is, why a prompt goes where it goes, drain, and pins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from protos import errors
from protos.blocks import block_hashes
from protos.client import Client
from protos.messages import Load, Pin
from tests.router.conftest import Cluster, Keys, until, until_async
from tests.router.scripted_worker import ScriptedWorker, answer, hang

Start = Callable[..., Any]
SALT = "default"
LONG = tuple(range(2, 34))  # eight blocks of four


def names(prompt: tuple[int, ...], salt: str = SALT) -> list[int]:
    return block_hashes(salt, prompt, 4)


async def known_tokens(client: Client, worker_id: str) -> int:
    [topology] = await client.topology()
    return next(worker.known_cached_tokens for worker in topology.workers if worker.worker_id == worker_id)


async def state(client: Client, worker_id: str) -> str:
    [topology] = await client.topology()
    return next(worker.state for worker in topology.workers if worker.worker_id == worker_id)


# Topology


async def test_topology_shows_workers_queue_and_tenants(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0", hang(1), max_running=1)
    worker.set_load(Load(num_running=1, num_waiting=0, kv_used_tokens=40, kv_capacity_tokens=400))
    client = await cluster.client()
    tasks = [
        asyncio.create_task(client.complete([5, 6, 7], max_tokens=9, request_id="0")),
        *(asyncio.create_task(client.complete([5, 6, 7], max_tokens=9, request_id=f"{i}")) for i in (1, 2, 3)),
    ]
    worker.store(names(LONG))
    await until(lambda: len(worker.submitted) == 2)
    await until_async(lambda: is_shown(client))
    [topology] = await client.topology()
    assert (topology.router_id, topology.model, topology.policy) == ("r0", "tiny", "prefix")
    assert (topology.num_waiting, topology.num_waiting_tokens) == (2, 6)
    assert [(t.tenant, t.num_waiting, t.num_running) for t in topology.tenants] == [("default", 2, 2)]
    [shown] = topology.workers
    assert (shown.worker_id, shown.address, shown.state) == ("w0", cluster.members["w0"], "ready")
    assert (shown.num_running, shown.kv_used_tokens, shown.kv_capacity_tokens) == (1, 40, 400)
    assert (shown.reserved_outputs, shown.reserved_decode_tokens) == (2, 16)
    assert shown.known_cached_tokens == len(LONG)
    for i in range(4):
        await client.abort(f"{i}")
    await asyncio.gather(*tasks)
    [topology] = await client.topology()
    assert (topology.num_waiting, topology.tenants) == (0, ())


async def is_shown(client: Client) -> bool:
    [topology] = await client.topology()
    worker = topology.workers[0]
    return (topology.num_waiting, worker.reserved_decode_tokens, worker.known_cached_tokens) == (2, 16, len(LONG))


# Explanations


@pytest.mark.parametrize("policy", ["prefix", "least_loaded", "round_robin", "random", "consistent_hash"])
async def test_an_explanation_is_what_then_happens(start_cluster: Start, policy: str) -> None:
    """Asking changes nothing, however often."""
    cluster: Cluster = await start_cluster(routing={"policy": policy})
    workers = [await cluster.add_worker(f"w{i}", answer(1)) for i in range(3)]
    workers[1].store(names(LONG))
    client = await cluster.client()
    await until_async(lambda: is_known(client))
    for prompt in (LONG, (50, 51, 52, 53, 54), LONG[:20], (7,)):
        explanations = [await client.explain_route(prompt, max_tokens=3) for _ in range(3)]
        assert len(set(explanations)) == 1
        told = explanations[0]
        completion = await client.complete(prompt, max_tokens=3)
        best, second = told.candidates[:2]
        assert completion.prompt.worker_id == told.worker_id == best.worker_id
        assert completion.route == (
            f"{told.reason} {best.worker_id} cost={best.cost:.0f} cached={best.cached_tokens} "
            f"next={second.worker_id} cost={second.cost:.0f}"
        )
        assert {candidate.worker_id for candidate in told.candidates} == {"w0", "w1", "w2"}
        assert told.prompt_tokens == len(prompt)


async def is_known(client: Client) -> bool:
    return await known_tokens(client, "w1") == len(LONG)


async def test_an_explanation_says_what_is_cached_live_and_ahead(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0", hang(), max_running=1)
    worker.store(names(LONG))
    client = await cluster.client()
    tasks = [asyncio.create_task(client.complete(LONG[:8], max_tokens=5, request_id=f"{i}")) for i in range(2)]
    await until(lambda: len(worker.submitted) == 2)
    await until_async(lambda: has_candidate(client, cached=31, live=8))
    [candidate] = (await client.explain_route(LONG)).candidates
    assert candidate.load_tokens >= 10
    assert not candidate.has_room
    for i in range(2):
        await client.abort(f"{i}")
    await asyncio.gather(*tasks)


async def has_candidate(client: Client, *, cached: int, live: int) -> bool:
    [candidate] = (await client.explain_route(LONG)).candidates
    return (candidate.cached_tokens, candidate.live_tokens) == (cached, live)


async def test_an_explanation_takes_the_defaults_and_refusals_of_generate(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    client = await cluster.client()
    assert (await client.explain_route("w5")).candidates == ()  # no worker was ever here
    await cluster.add_worker("w0", answer(1))
    by_default, explicit = await client.explain_route("w5"), await client.explain_route("w5", max_tokens=62)
    assert by_default == explicit  # the context has 64 tokens, the prompt 2
    for refused, kind in (
        ({"prompt": [5] * 65}, errors.PromptTooLong),
        ({"prompt": [5] * 60, "max_tokens": 5}, errors.PromptTooLong),
        ({"prompt": [2**32 - 1]}, errors.TokenOutOfRange),
        ({"prompt": ""}, errors.EmptyPrompt),
        ({"prompt": "w5", "model": "other"}, errors.UnknownModel),
        ({"prompt": b"\xff"}, errors.InvalidText),
    ):
        with pytest.raises(kind):
            await client.explain_route(**refused)  # type: ignore[arg-type]


# Drain


async def test_a_drained_worker_gets_nothing_until_it_is_resumed(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    first, second = await cluster.add_worker("w0", hang(1)), await cluster.add_worker("w1", answer(1))
    client = await cluster.client()
    await client.drain("w1")
    running = asyncio.create_task(client.complete("w5", max_tokens=3, request_id="0"))
    await until(lambda: len(first.submitted) == 1)
    assert await client.drain("w0") == 1
    assert await client.drain("w1", resume=True) == 0
    assert (await state(client, "w0"), await state(client, "w1")) == ("draining", "ready")
    for _ in range(5):
        await client.complete("w6", max_tokens=1)
    assert (len(first.submitted), len(second.submitted)) == (1, 5)
    first.script = answer(1)
    await client.abort("0")
    await running
    await client.drain("w0", resume=True)
    await client.drain("w1")
    assert (await client.complete("w6", max_tokens=1)).prompt.worker_id == "w0"


async def test_what_waits_goes_when_the_only_worker_is_resumed(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    await cluster.add_worker("w0", answer(1))
    client = await cluster.client()
    await client.drain("w0")
    waiting = asyncio.create_task(client.complete("w5", max_tokens=1))
    await until_async(lambda: num_waiting_is(client, 1))
    await client.drain("w0", resume=True)
    assert (await waiting).outputs


async def num_waiting_is(client: Client, number: int) -> bool:
    [topology] = await client.topology()
    return topology.num_waiting == number


async def test_an_unknown_worker_is_named_with_those_there_are(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    await cluster.add_worker("w0", answer(1))
    client = await cluster.client()
    with pytest.raises(errors.InvalidParameter, match=r"'w7'.*w0"):
        await client.drain("w7")


# Pins


async def test_a_pin_is_told_to_every_worker_once_and_counts_those_that_have_it(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    workers = [await cluster.add_worker(f"w{i}", answer(1)) for i in range(2)]
    client = await cluster.client()
    pin = await client.pin_prefix((*LONG, 90))
    assert (pin.num_tokens, pin.num_workers) == (32, 0)
    await until(lambda: all(worker.pins for worker in workers))
    workers[0].store(names(LONG))
    await until_async(lambda: num_having_is(client, 1))
    assert await client.pin_prefix(LONG) == (await client.pins())[0]  # the same blocks are the same pin
    await client.complete("w5", max_tokens=1)
    for worker in workers:
        assert [(told.cache_salt, told.token_ids) for told in worker.pins] == [(SALT, LONG)]


async def num_having_is(client: Client, number: int) -> bool:
    return [pin.num_workers for pin in await client.pins()] == [number]


async def test_an_unpinned_prefix_is_told_and_forgotten(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0", answer(1))
    client = await cluster.client()
    pin = await client.pin_prefix(LONG)
    await until(lambda: len(worker.pins) == 1)
    assert await client.unpin_prefix(pin.pin_id)
    await until(lambda: worker.unpins == [worker.pins[0].pin_id])
    assert not await client.unpin_prefix(pin.pin_id)
    assert await client.pins() == ()


async def pinned_cluster(start_cluster: Start, **sessions: Any) -> tuple[Cluster, Client]:
    """One worker that has what is pinned."""
    cluster: Cluster = await start_cluster(sessions=sessions)
    worker = await cluster.add_worker("w0", answer(1))
    worker.cache = names(LONG)
    worker.store(names(LONG))
    client = await cluster.client()
    await client.pin_prefix(LONG)
    await until_async(lambda: num_having_is(client, 1))
    return cluster, client


async def test_a_new_worker_gets_work_when_it_has_what_is_pinned(start_cluster: Start) -> None:
    cluster, client = await pinned_cluster(start_cluster, warm_up_s=1000.0)
    late = await cluster.add_worker("w1", answer(1))
    await until(lambda: len(late.pins) == 1)
    source = late.pins[0].prefix_source
    assert source is not None
    assert (source.worker_id, source.address, source.num_tokens) == ("w0", cluster.members["w0"], 32)
    assert await state(client, "w1") == "warming"
    await client.drain("w0")
    waiting = asyncio.create_task(client.complete("w5", max_tokens=1))
    await until_async(lambda: num_waiting_is(client, 1))
    late.store(names(LONG)[:4])
    await until_async(lambda: knows_some(client))
    assert await state(client, "w1") == "warming"
    late.store(names(LONG)[4:])
    assert (await waiting).prompt.worker_id == "w1"
    assert await state(client, "w1") == "ready"


async def knows_some(client: Client) -> bool:
    return await known_tokens(client, "w1") == 16


async def test_a_new_worker_warms_up_for_so_long_at_most(start_cluster: Start) -> None:
    cluster, client = await pinned_cluster(start_cluster, warm_up_s=0.1)
    await cluster.add_worker("w1", answer(1))
    await client.drain("w0")
    assert (await client.complete("w5", max_tokens=1)).prompt.worker_id == "w1"


async def test_a_worker_stops_warming_when_nothing_is_pinned_any_more(start_cluster: Start) -> None:
    cluster, client = await pinned_cluster(start_cluster, warm_up_s=1000.0)
    await cluster.add_worker("w1", answer(1))
    assert await state(client, "w1") == "warming"
    [pin] = await client.pins()
    assert await client.unpin_prefix(pin.pin_id)
    assert await state(client, "w1") == "ready"


async def test_a_worker_that_comes_back_with_its_cache_is_ready_at_once(start_cluster: Start) -> None:
    cluster, client = await pinned_cluster(start_cluster, warm_up_s=1000.0)
    worker = cluster.workers["w0"]
    await worker.kill()
    await worker.start()
    await until(lambda: worker.num_sessions == 2)
    assert (await client.complete("w5", max_tokens=1)).outputs
    assert [pin.token_ids for pin in worker.pins] == [LONG, LONG]  # each session is told


async def test_what_is_unpinned_and_pinned_while_a_worker_is_away_is_told_when_it_is_back(
    start_cluster: Start,
) -> None:
    cluster, client = await pinned_cluster(start_cluster, warm_up_s=1000.0)
    worker = cluster.workers["w0"]
    await worker.kill()
    await until_async(lambda: state_is(client, "w0", "connecting"))
    [pin] = await client.pins()
    await client.unpin_prefix(pin.pin_id)
    await client.pin_prefix(LONG)
    worker.pins.clear()
    await worker.start()
    await until(lambda: [told.token_ids for told in worker.pins] == [LONG])
    assert worker.unpins == []


async def state_is(client: Client, worker_id: str, wanted: str) -> bool:
    return await state(client, worker_id) == wanted


async def test_pins_have_limits(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster(max_pinned_tokens=40)
    await cluster.add_worker("w0", answer(1))
    client = await cluster.client()
    with pytest.raises(errors.InvalidParameter, match=r"has 3 tokens, a block .* has 4"):
        await client.pin_prefix([5, 6, 7])
    pin = await client.pin_prefix(LONG)
    with pytest.raises(errors.Overloaded, match="pinned 32 tokens and the prefix has 12, the limit is 40"):
        await client.pin_prefix(range(40, 52))
    assert await client.pin_prefix(LONG) == pin
    await client.unpin_prefix(pin.pin_id)
    assert (await client.pin_prefix(range(40, 52))).num_tokens == 12


async def test_pins_are_their_tenants(start_cluster: Start, keys: Keys) -> None:
    cluster: Cluster = await start_cluster(tenants={"file": keys.file})
    worker: ScriptedWorker = await cluster.add_worker("w0", answer(1))
    acme, globex = await cluster.client(api_key=keys.acme), await cluster.client(api_key=keys.globex)
    pins = [await client.pin_prefix(LONG) for client in (acme, globex)]
    assert pins[0].pin_id != pins[1].pin_id  # the salt is in the name
    assert not await globex.unpin_prefix(pins[0].pin_id)
    assert [await client.pins() for client in (acme, globex)] == [(pins[0],), (pins[1],)]
    await until(lambda: len(worker.pins) == 2)
    told: list[Pin] = worker.pins
    assert [pin.cache_salt for pin in told] == ["acme", "globex"]


# Who may


async def test_only_admins_see_and_drain(start_cluster: Start, keys: Keys) -> None:
    cluster: Cluster = await start_cluster(tenants={"file": keys.file})
    await cluster.add_worker("w0", answer(1))
    acme, admin = await cluster.client(api_key=keys.acme), await cluster.client(api_key=keys.admin)
    for refused in (acme.topology(), acme.drain("w0"), acme.drain("w0", resume=True)):
        with pytest.raises(errors.PermissionDenied, match="acme"):
            await refused
    assert (await acme.explain_route("w5")).worker_id == "w0"
    assert (await admin.topology())[0].workers[0].state == "ready"
    assert await admin.drain("w0") == 0
