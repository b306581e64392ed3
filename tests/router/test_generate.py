"""Streams through a real router: what a client reads, and what reaches the worker."""

from __future__ import annotations

import asyncio

import pytest

from protos import errors
from protos.client import Client
from protos.v1 import inference_pb2 as pb
from tests.router.conftest import Cluster, until
from tests.router.scripted_worker import answer, hang, refuse


async def test_stream_has_facts_first_usage_last_and_no_repetition(client: Client) -> None:
    events = [event async for event in client.generate("w5 w6", request_id="mine", max_tokens=3, seed=7)]
    facts = [event.prompt for event in events if event.prompt]
    assert events[0].prompt == facts[0]
    assert len(facts) == 1
    assert (facts[0].request_id, facts[0].num_tokens, facts[0].seed) == ("mine", 3, 7)
    assert (facts[0].worker_id, facts[0].model) == ("w0", "tiny")
    usages = [event.usage for event in events]
    assert usages[-1] is not None
    assert usages[:-1] == [None] * (len(events) - 1)
    assert (usages[-1].prompt_tokens, usages[-1].cached_tokens, usages[-1].completion_tokens) == (3, 3, 3)
    tokens = [token for event in events for output in event.outputs for token in output.token_ids]
    assert tokens == [10, 11, 12]


async def test_complete_joins_all_outputs(client: Client) -> None:
    completion = await client.complete([5, 6], n=3, max_tokens=2)
    assert [output.token_ids for output in completion.outputs] == [(10, 11), (17, 18), (24, 25)]
    assert completion.text == "t10 t11 "
    assert all(output.finish.reason == "length" for output in completion.outputs)
    assert completion.usage.completion_tokens == 6


async def test_worker_gets_a_complete_request(cluster: Cluster, client: Client) -> None:
    await client.complete("w5", temperature=0.5, stop=["x"], logit_bias={3: 1.5})
    (request,) = cluster.workers["w0"].submitted
    assert request.token_ids == (0, 5)
    assert request.sampling.max_tokens == 62
    assert request.sampling.temperature == 0.5
    assert request.sampling.stop == ("x",)
    assert dict(request.sampling.logit_bias) == {3: 1.5}
    assert 0 <= request.sampling.seed < 2**63
    assert cluster.workers["w0"].metadata["headwater-session-token"] == "secret"
    assert cluster.workers["w0"].metadata["headwater-router-id"] == "r0"


async def test_chosen_seeds_differ(client: Client) -> None:
    first = await client.complete("w5")
    second = await client.complete("w5")
    assert first.prompt.seed != second.prompt.seed


async def test_concurrent_streams_do_not_mix(cluster: Cluster, client: Client) -> None:
    cluster.workers["w0"].script = answer(20, delay_s=0.001)
    completions = await asyncio.gather(*(client.complete([5, 6], max_tokens=1 + i % 20) for i in range(60)))
    assert [len(completion.outputs[0].token_ids) for completion in completions] == [1 + i % 20 for i in range(60)]


async def test_slow_reader_finds_tokens_joined(cluster: Cluster, client: Client) -> None:
    cluster.workers["w0"].script = answer(40)
    events = client.generate("w5", max_tokens=40)
    first = await anext(events)
    await asyncio.sleep(0.1)
    rest = [event async for event in events]
    tokens = [token for event in [first, *rest] for output in event.outputs for token in output.token_ids]
    assert tokens == [10 + i for i in range(40)]


async def test_prompt_logprobs_without_generation(client: Client) -> None:
    completion = await client.complete([5, 6, 7], max_tokens=0, prompt_logprobs=0)
    assert [position.token_id for position in completion.prompt_logprobs] == [5, 6, 7]
    assert completion.outputs[0].token_ids == ()


async def test_worker_failure_keeps_its_kind(cluster: Cluster, client: Client) -> None:
    cluster.workers["w0"].script = refuse("Overloaded", "queue of 1 is full")
    with pytest.raises(errors.Overloaded, match="queue of 1 is full"):
        await client.complete("w5")


async def test_unknown_failure_is_an_engine_failure(cluster: Cluster, client: Client) -> None:
    cluster.workers["w0"].script = refuse("Nonsense", "what")
    with pytest.raises(errors.EngineFailure, match="what"):
        await client.complete("w5")


async def test_output_after_its_finish_is_an_engine_failure_and_cancelled(cluster: Cluster, client: Client) -> None:
    async def twice(request, emit):  # type: ignore[no-untyped-def]
        from tests.router.scripted_worker import deltas

        for _ in range(2):
            for delta in deltas(request, 1):
                if delta.index == 0:
                    emit(delta)

    worker = cluster.workers["w0"]
    worker.script = twice
    with pytest.raises(errors.EngineFailure, match="output 0"):
        await client.complete("w5", n=2)
    await until(lambda: len(worker.cancelled) == 1)


async def test_disconnect_cancels_on_the_worker_at_once(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    worker.script = hang(2)
    events = client.generate("w5")
    await anext(events)
    await events.aclose()
    await until(lambda: worker.cancelled == [worker.submitted[0].request_id], timeout_s=2)


async def test_cancelled_reader_cancels_on_the_worker(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    worker.script = hang()
    task = asyncio.create_task(client.complete("w5"))
    await until(lambda: bool(worker.submitted))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: len(worker.cancelled) == 1, timeout_s=2)


async def test_deadline_in_the_stream_cancels_on_the_worker(cluster: Cluster) -> None:
    worker = cluster.workers["w0"]
    worker.script = hang(1)
    client = await cluster.client(timeout_s=0.3)
    with pytest.raises(errors.DeadlineExceeded):
        await client.complete("w5")
    await until(lambda: len(worker.cancelled) == 1, timeout_s=2)
    assert worker.submitted[0].deadline is not None


async def test_longest_life_holds_without_a_client_deadline(start_cluster) -> None:  # type: ignore[no-untyped-def]
    cluster: Cluster = await start_cluster(max_request_s=0.2)
    worker = await cluster.add_worker("w0", hang(1))
    with pytest.raises(errors.DeadlineExceeded, match="deadline passed"):
        await (await cluster.client()).complete("w5")
    await until(lambda: len(worker.cancelled) == 1, timeout_s=2)


async def test_abort_ends_the_stream_with_its_tokens_and_reason(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    worker.script = hang(2)
    task = asyncio.create_task(client.complete("w5", request_id="mine", n=2))
    await until(lambda: bool(worker.submitted))
    await asyncio.sleep(0.05)
    assert await client.abort("mine")
    completion = await task
    assert [output.finish.reason for output in completion.outputs] == ["abort", "abort"]
    assert completion.outputs[0].token_ids == (10, 11)
    await until(lambda: len(worker.cancelled) == 1)
    assert not await client.abort("mine")


async def test_live_id_is_refused_and_free_after_the_end(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    worker.script = hang(1)
    events = client.generate("w5", request_id="mine")
    await anext(events)
    with pytest.raises(errors.DuplicateRequest, match="mine"):
        await client.complete("w5", request_id="mine")
    worker.script = answer(2)
    await client.abort("mine")
    assert (await client.complete("w5", request_id="mine", max_tokens=2)).outputs[0].token_ids == (10, 11)
    assert [event.usage is not None async for event in events][-1]
    ids = [request.request_id for request in worker.submitted]
    assert len(set(ids)) == 2


async def test_score_sends_one_group_and_sums(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    scores = await client.score("w5 w6", ["w7", "w8 w9 w10"])
    assert [score.token_ids for score in scores.scores] == [(7,), (8, 9, 10)]
    assert [score.logprob for score in scores.scores] == [-0.5, -1.5]
    assert (scores.usage.prompt_tokens, scores.usage.cached_tokens, scores.usage.completion_tokens) == (7, 2, 0)
    assert worker.frame_sizes == [2]
    assert [request.token_ids for request in worker.submitted] == [(0, 5, 6, 7), (0, 5, 6, 8, 9, 10)]
    assert [request.prompt_logprobs_from for request in worker.submitted] == [3, 3]
    assert all(
        request.sampling.max_tokens == 0 and request.sampling.prompt_logprobs == 0 for request in worker.submitted
    )


async def test_score_takes_token_ids(client: Client) -> None:
    scores = await client.score([5], [[6], [7, 8]])
    assert [score.logprob for score in scores.scores] == [-0.5, -1.0]


async def test_aborted_score_is_an_error(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]
    worker.script = hang()
    task = asyncio.create_task(client.score([5], [[6], [7]], request_id="mine"))
    await until(lambda: len(worker.submitted) == 2)
    await client.abort("mine")
    with pytest.raises(errors.Aborted):
        await task
    await until(lambda: len(worker.cancelled) == 2)


async def test_score_that_fails_in_part_cancels_the_rest(cluster: Cluster, client: Client) -> None:
    worker = cluster.workers["w0"]

    async def script(request, emit):  # type: ignore[no-untyped-def]
        await (refuse("EngineFailure", "broken") if request.token_ids[-1] == 6 else hang())(request, emit)

    worker.script = script
    with pytest.raises(errors.EngineFailure, match="broken"):
        await client.score([5], [[6], [7]])
    assert [len(worker.submitted), worker.frame_sizes] == [4, [2, 2]]  # both again, once
    await until(lambda: worker.cancelled == [worker.submitted[1].request_id, worker.submitted[3].request_id])


async def test_tokenize_and_detokenize(client: Client) -> None:
    assert await client.tokenize("w5 w6") == (0, 5, 6)
    assert await client.tokenize("") == (0,)
    assert await client.detokenize([5, 6]) == "w5 w6"
    with pytest.raises(errors.TokenOutOfRange):
        await client.detokenize([5, 100])


async def test_long_text_is_tokenized_too(client: Client) -> None:
    assert await client.tokenize("w5 " * 5000) == (0, *[5] * 5000)


async def test_models_tell_the_limits(client: Client) -> None:
    (model,) = await client.models()
    assert (model.name, model.max_context, model.vocab_size, model.num_workers) == ("tiny", 64, 100, 1)


async def test_a_fault_of_the_router_is_a_clean_error(
    cluster: Cluster, client: Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> pb.GenerateResponse:
        raise RuntimeError("a secret path /etc/x")

    monkeypatch.setattr("router.stream.Stream._take", broken)
    with pytest.raises(errors.EngineFailure) as raised:
        await client.complete("w5")
    assert "/etc/x" not in raised.value.message
    assert "a secret path" in caplog.text
