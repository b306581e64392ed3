"""Requests whose worker is lost go on elsewhere: the same answer, one end, and no poison for everybody."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from protos import errors
from protos.client import Client, Completion
from protos.messages import Delta, Finish, Load, Request
from tests.metrics import scrape
from tests.router.conftest import Cluster, until
from tests.router.scripted_worker import Emit, ScriptedWorker, answer, deltas, hang, refuse, scored, token

Start = Callable[..., Any]


def expected(index: int, num_tokens: int) -> tuple[int, ...]:
    return tuple(token(index, position) for position in range(num_tokens))


def is_whole(completion: Completion, num_tokens: int) -> bool:
    """Whether every output is what an undisturbed worker makes, text and tokens."""
    return all(
        output.token_ids == expected(index, num_tokens)
        and output.text == "".join(f"t{token_id} " for token_id in expected(index, num_tokens))
        for index, output in enumerate(completion.outputs)
    )


async def pair(start_cluster: Start, **options: Any) -> tuple[Cluster, ScriptedWorker, ScriptedWorker]:
    """A worker that makes three tokens of each output and then hangs, and one that comes after it."""
    cluster: Cluster = await start_cluster(**options)
    first = await cluster.add_worker("w0", hang(3))
    return cluster, first, await cluster.add_worker("w1", answer(12))


async def run_until_stuck(client: Client, worker: ScriptedWorker, num: int, **options: Any) -> list[asyncio.Task[Any]]:
    """Completions, some of which are stuck on this worker."""
    tasks = [asyncio.create_task(client.complete("w5", max_tokens=12, **options)) for _ in range(num)]
    await until(lambda: len(worker.submitted) >= num // 2)
    await asyncio.sleep(0.05)  # their first tokens reach the clients
    return tasks


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("how", ["killed", "silent"])
async def test_streams_of_a_lost_worker_go_on_elsewhere(start_cluster: Start, how: str, n: int) -> None:
    cluster, first, second = await pair(start_cluster)
    client = await cluster.client()
    tasks = await run_until_stuck(client, first, 8, n=n)
    if how == "killed":
        await first.kill()
    else:
        first.silent = True
    completions = await asyncio.gather(*tasks)
    assert all(is_whole(completion, 12) and len(completion.outputs) == n for completion in completions)
    assert {completion.usage.completion_tokens for completion in completions} == {12 * n}
    resumed = [request for request in second.submitted if request.resume]
    assert len(resumed) == len(first.submitted)
    assert {tuple(len(point.token_ids) for point in request.resume) for request in resumed} == {(3,) * n}


async def test_finished_outputs_stay_finished(start_cluster: Start) -> None:
    cluster, first, second = await pair(start_cluster)

    async def ends_one(request: Request, emit: Emit) -> None:
        for delta in deltas(request, 2, finish=False):
            last = delta.index == 0 and delta.token_ids == (token(0, 1),)
            emit(delta._replace(finish=Finish("stop", stop="x")) if last else delta)
        await asyncio.Event().wait()

    first.script = ends_one
    client = await cluster.client()
    task = asyncio.create_task(client.complete("w5", n=2, max_tokens=12))
    await until(lambda: bool(first.submitted or second.submitted))
    await asyncio.sleep(0.05)
    await first.kill()
    completion = await task
    if first.submitted:
        assert completion.outputs[0].finish.stop == "x"
        assert [point.finished for point in second.submitted[0].resume] == [True, False]
        assert completion.outputs[1].token_ids == expected(1, 12)


async def test_scores_are_asked_again(start_cluster: Start) -> None:
    cluster, first, second = await pair(start_cluster)
    first.script = hang()
    second.script = hang()
    client = await cluster.client()
    task = asyncio.create_task(client.score([5], [[6], [7, 8]]))
    await until(lambda: len(first.submitted) + len(second.submitted) == 2)
    stuck, other = (first, second) if first.submitted else (second, first)
    other.script = answer(1)
    await stuck.kill()
    scores = await task
    assert [score.token_ids for score in scores.scores] == [(6,), (7, 8)]
    assert len(other.submitted) == 2


async def test_prompt_logprobs_come_once(start_cluster: Start) -> None:
    cluster, first, second = await pair(start_cluster)

    async def scores_and_hangs(request: Request, emit: Emit) -> None:
        first_delta = next(iter(deltas(request, 2, finish=False)))
        prompt = scored(request).prompt_logprobs if request.sampling.prompt_logprobs is not None else ()
        emit(first_delta._replace(prompt_logprobs=prompt))
        await asyncio.Event().wait()

    first.script = second.script = scores_and_hangs
    client = await cluster.client()
    task = asyncio.create_task(client.complete("w5", max_tokens=4, prompt_logprobs=0))
    await until(lambda: bool(first.submitted or second.submitted))
    await asyncio.sleep(0.05)
    stuck, other = (first, second) if first.submitted else (second, first)
    other.script = answer(4)
    await stuck.kill()
    completion = await task
    assert is_whole(completion, 4)
    assert len(completion.prompt_logprobs) == len(other.submitted[0].token_ids)
    assert other.submitted[0].sampling.prompt_logprobs is None


async def test_a_failed_step_is_tried_on_another_worker(start_cluster: Start) -> None:
    cluster, first, second = await pair(start_cluster)
    first.script = refuse("EngineFailure", "out of memory")
    client = await cluster.client()
    completions = await asyncio.gather(*(client.complete("w5", max_tokens=12) for _ in range(6)))
    assert all(is_whole(completion, 12) for completion in completions)
    assert first.submitted
    assert len(second.submitted) == 6


async def test_a_worker_that_drains_or_is_full_passes_requests_on(start_cluster: Start) -> None:
    cluster, first, second = await pair(start_cluster)
    client = await cluster.client()
    for kind in ("Draining", "Overloaded"):
        first.script = refuse(kind, "not here")
        completions = await asyncio.gather(*(client.complete("w5", max_tokens=12) for _ in range(6)))
        assert all(is_whole(completion, 12) for completion in completions)
    assert len(second.submitted) == 12


async def test_the_requests_own_fault_is_not_tried_again(start_cluster: Start) -> None:
    cluster, first, second = await pair(start_cluster)
    first.script = second.script = refuse("PromptTooLong", "64 tokens")
    client = await cluster.client()
    with pytest.raises(errors.PromptTooLong):
        await client.complete("w5")
    assert len(first.submitted) + len(second.submitted) == 1


async def test_streams_wait_for_a_worker_that_comes_back(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster(no_worker_grace_s=10)
    worker = await cluster.add_worker("w0", hang(3))
    client = await cluster.client()
    tasks = await run_until_stuck(client, worker, 4)
    await until(lambda: len(worker.submitted) == 4)
    await worker.kill()
    worker.script = answer(12)
    await worker.start()
    assert all(is_whole(completion, 12) for completion in await asyncio.gather(*tasks))


async def test_what_had_a_worker_ends_as_lost_when_none_comes(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0", hang(3))
    client = await cluster.client()
    task = asyncio.create_task(client.complete("w5", max_tokens=12))
    await until(lambda: bool(worker.submitted))
    await worker.kill()
    with pytest.raises(errors.WorkerLost, match="w0"):
        await task


async def test_a_poison_request_ends_two_workers_at_most(start_cluster: Start) -> None:
    """And those who stood beside it come through."""
    cluster: Cluster = await start_cluster()
    workers = [await cluster.add_worker(f"w{i}", answer(1)) for i in range(4)]
    killed: list[str] = []

    def poisoned_by(worker: ScriptedWorker) -> Any:
        async def script(request: Request, emit: Emit) -> None:
            if 66 in request.token_ids:
                killed.append(worker.worker_id)
                asyncio.get_running_loop().create_task(worker.kill())
                return
            for delta in deltas(request, min(12, request.sampling.max_tokens)):
                await asyncio.sleep(0.01)
                emit(delta)

        return script

    for worker in workers:
        worker.script = poisoned_by(worker)
    client = await cluster.client()
    innocents = [asyncio.create_task(client.complete([5 + i], max_tokens=12)) for i in range(12)]
    await asyncio.sleep(0.03)
    with pytest.raises(errors.EngineFailure, match="2 workers") as raised:
        await client.complete([66], max_tokens=12)
    assert not raised.value.retryable
    assert all(is_whole(completion, 12) for completion in await asyncio.gather(*innocents))
    assert len(killed) == 2


async def test_losses_are_bounded(start_cluster: Start) -> None:
    """A request that always makes progress is not suspect, but does not wander for ever."""
    cluster: Cluster = await start_cluster(recovery={"max_losses": 3})
    worker = await cluster.add_worker("w0", answer(1))

    async def one_more_and_dies(request: Request, emit: Emit) -> None:
        num_made = len(request.resume[0].token_ids) if request.resume else 0
        emit(Delta(request.request_id, 0, "t ", (token(0, num_made),), cached_tokens=0))
        await asyncio.sleep(0.05)
        restarts.append(asyncio.get_running_loop().create_task(restart()))

    async def restart() -> None:
        await worker.kill()
        await worker.start()

    restarts: list[asyncio.Task[None]] = []
    worker.script = one_more_and_dies
    client = await cluster.client()
    with pytest.raises(errors.WorkerLost):
        await client.complete("w5", max_tokens=12)
    assert len(worker.submitted) == 4


async def test_a_resumed_stream_overtakes_the_queue(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster(sessions={"max_in_flight": 2}, max_continuations=1)
    first = await cluster.add_worker("w0", hang(3))
    client = await cluster.client()
    stuck = [asyncio.create_task(client.complete("w5", max_tokens=12)) for _ in range(2)]
    await until(lambda: len(first.submitted) == 2)
    waiting = [asyncio.create_task(client.complete("w6", max_tokens=12)) for _ in range(6)]
    await asyncio.sleep(0.05)
    second = await cluster.add_worker("w1", answer(12, delay_s=0.005), max_running=1)
    await asyncio.sleep(0.02)
    await first.kill()
    assert all(is_whole(completion, 12) for completion in await asyncio.gather(*stuck, *waiting))
    order = [bool(request.resume) for request in second.submitted]
    assert sum(order) == 2
    assert order.index(True) < len(order) - 2


async def test_recoveries_are_counted(start_cluster: Start) -> None:
    cluster, first, _ = await pair(start_cluster)
    client = await cluster.client()
    tasks = await run_until_stuck(client, first, 8)
    num_stuck = len(first.submitted)
    await first.kill()
    await asyncio.gather(*tasks)
    assert scrape(cluster.address.metrics, outcome="resumed")["headwater_recoveries_total"] == num_stuck


async def test_requests_that_wait_in_vain_for_another_worker_are_counted(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    worker = await cluster.add_worker("w0", hang(3))
    client = await cluster.client()
    tasks = await run_until_stuck(client, worker, 2)
    await until(lambda: len(worker.submitted) == 2)
    await worker.kill()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ends] == [errors.WorkerLost] * 2
    with pytest.raises(errors.NoWorker):  # this one never had a worker
        await client.complete("w5")
    assert scrape(cluster.address.metrics, outcome="given_up")["headwater_recoveries_total"] == 2


async def test_streams_of_a_worker_that_drains_too_long_go_on(start_cluster: Start) -> None:
    """A worker that leaves ends its session at last; what it still ran moves without a word to its clients."""
    cluster, first, _ = await pair(start_cluster)
    client = await cluster.client()
    tasks = await run_until_stuck(client, first, 8)
    first.set_load(Load(draining=True))
    await asyncio.sleep(0.05)
    cluster.remove_worker("w0")
    await first.kill()
    endings = Counter(is_whole(completion, 12) for completion in await asyncio.gather(*tasks))
    assert endings == {True: 8}
