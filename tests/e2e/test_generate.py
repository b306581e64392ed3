"""Tokens end to end, through every process there is."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import pytest

from cluster.lifecycle import Cluster
from protos.client import Client, Completion
from protos.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    EmptyPrompt,
    HeadwaterError,
    InvalidParameter,
    InvalidText,
    MessageTooLarge,
    Overloaded,
    PromptTooLong,
    TokenOutOfRange,
    UnknownModel,
)
from tests.e2e.conftest import HEADWATER, NUM_WORKERS
from tests.metrics import scrape
from tests.workers.engine.drive import request, run, torch_engine

PROMPTS = ["def fibonacci(n):", "import os\n\n\nclass ", "for i in range(10):\n    print(", "# Copyright", "x = [", "a"]
PAGES = "headwater_kv_pages_in_use"


def alone(root: Path, ids: list[int], **sampling: Any) -> list[int]:
    """What the engine says by itself."""
    return run(torch_engine(root / "models" / "target"), request("a", ids, **sampling))["a", 0].tokens


async def total(cluster: Cluster, metric: str) -> float:
    """A metric of all workers together."""

    def read() -> float:
        return sum(scrape(address)[metric] for address in cluster.worker_metrics())

    return await asyncio.to_thread(read)


async def idle(cluster: Cluster) -> None:
    """Wait until no worker holds a page for anybody."""
    async with asyncio.timeout(10):
        while await total(cluster, PAGES) > 0:  # noqa: ASYNC110 - it polls from outside
            await asyncio.sleep(0.05)


async def test_concurrent_streams_say_what_the_engine_says_alone(client: Client, root: Path) -> None:
    prompts = [f"{prompt}{i}" for i, prompt in itertools.product(range(4), PROMPTS)]
    answers = await asyncio.gather(*(client.complete(p, temperature=0, max_tokens=12) for p in prompts))
    assert len({answer.prompt.worker_id for answer in answers}) == 2
    for prompt, answer in list(zip(prompts, answers, strict=True))[::5]:
        ids = list(await client.tokenize(prompt))
        assert list(answer.outputs[0].token_ids) == alone(root, ids, max_tokens=12)
        assert answer.text == await client.detokenize(answer.outputs[0].token_ids)
        assert answer.usage.prompt_tokens == len(ids) == answer.prompt.num_tokens


async def test_a_seed_gives_the_same_text_on_any_worker(client: Client) -> None:
    answers = await asyncio.gather(*(client.complete("def ", seed=7, max_tokens=64) for _ in range(12)))
    assert len({answer.prompt.worker_id for answer in answers}) == 2
    assert len({answer.text for answer in answers}) == 1
    chosen = await client.complete("def ", max_tokens=16)
    again = await client.complete("def ", max_tokens=16, seed=chosen.prompt.seed)
    assert again.text == chosen.text


async def test_drafts_change_no_text(client: Client, cluster: Cluster) -> None:
    """Every worker is asked for the same, with drafts and without."""
    prompts = [f"def f{i}(a, b):\n    return a\n\ndef g{i}(a, b):\n    return a\n\n" for i in range(4)]
    ways: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.7, "seed": 5, "n": 2, "stop": ["\n\n\n"]}]
    for prompt, way in itertools.product(prompts, ways):
        plain = await client.complete(prompt, max_tokens=64, ignore_eos=True, speculation="off", **way)
        for _ in range(NUM_WORKERS):
            drafted = await client.complete(prompt, max_tokens=64, ignore_eos=True, **way)
            assert drafted.outputs == plain.outputs
    assert await total(cluster, "vllm:spec_decode_num_accepted_tokens_total") > 0


async def test_text_comes_as_it_is_made(client: Client) -> None:
    events = [event async for event in client.generate("import ", max_tokens=20, ignore_eos=True, seed=1)]
    assert len(events) > 5
    assert events[0].prompt is not None
    assert all(event.prompt is None for event in events[1:])
    assert [event.usage is not None for event in events] == [False] * (len(events) - 1) + [True]
    assert sum(len(output.token_ids) for event in events for output in event.outputs) == 20
    assert sum(output.finish is not None for event in events for output in event.outputs) == 1


async def test_several_outputs_stop_strings_and_logprobs(client: Client) -> None:
    answer = await client.complete("def f(x):\n    return", n=3, seed=3, max_tokens=24, stop=["\n"], logprobs=2)
    assert len(answer.outputs) == 3
    for output in answer.outputs:
        assert "\n" not in output.text
        assert len(output.logprobs) == len(output.token_ids)
        assert all(len(position.top) == 2 for position in output.logprobs)
        assert output.finish.reason in ("stop", "length")
    assert any(output.finish.stop == "\n" for output in answer.outputs)
    assert answer.usage.completion_tokens == sum(len(output.token_ids) for output in answer.outputs)


async def test_a_repeated_prompt_is_found_in_the_cache(client: Client) -> None:
    prompt = "class Cache:\n" + "".join(f"    def method_{i}(self):\n        return {i}\n" for i in range(20))
    usages = [(await client.complete(prompt, max_tokens=2)).usage for _ in range(4)]
    assert max(usage.cached_tokens for usage in usages) > 0.8 * usages[0].prompt_tokens


async def test_score_prefers_the_likelier_continuation(client: Client) -> None:
    scores = (await client.score("for i in range(10", ["):\n", " banana"])).scores
    assert scores[0].logprob > scores[1].logprob
    assert scores[0].logprob == pytest.approx(sum(scores[0].token_logprobs))
    assert [len(score.token_ids) == len(score.token_logprobs) for score in scores] == [True, True]


async def test_the_model_and_its_limits_are_listed(client: Client) -> None:
    [model] = await client.models()
    assert (model.name, model.vocab_size, model.num_workers) == ("target", 4096, 2)
    assert model.max_context >= 32_768


async def test_a_cancelled_stream_frees_its_pages(client: Client, cluster: Cluster) -> None:
    streams = [client.generate("while True:", max_tokens=30_000, ignore_eos=True) for _ in range(6)]
    for stream in streams:
        await anext(stream)
    assert await total(cluster, PAGES) >= 6
    for stream in streams:
        await stream.aclose()
    await idle(cluster)


async def test_a_client_that_goes_away_frees_its_pages(target: str, cluster: Cluster) -> None:
    async with Client(target) as leaver:
        streams = [leaver.generate("while True:", max_tokens=30_000, ignore_eos=True) for _ in range(4)]
        for stream in streams:
            await anext(stream)
        assert await total(cluster, PAGES) >= 4
    await idle(cluster)


async def test_a_client_that_is_killed_frees_its_pages(target: str, cluster: Cluster) -> None:
    command = [HEADWATER, "generate", "while True:", "--target", target, "--max-tokens", "30000", "--ignore-eos"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    assert await process.stdout.read(1)
    assert await total(cluster, PAGES) >= 1
    process.kill()
    await process.wait()
    await idle(cluster)


async def test_abort_ends_a_stream_with_its_reason(client: Client, cluster: Cluster) -> None:
    stream = client.generate("while True:", request_id="doomed", max_tokens=30_000, ignore_eos=True)
    await anext(stream)
    assert await client.abort("doomed")
    events = [event async for event in stream]
    assert [o.finish.reason for event in events for o in event.outputs if o.finish] == ["abort"]
    assert not await client.abort("doomed")
    await idle(cluster)


async def test_a_deadline_ends_a_stream_and_frees_its_pages(target: str, cluster: Cluster) -> None:
    async with Client(target, timeout_s=0.7) as hurried:
        with pytest.raises(DeadlineExceeded):
            await hurried.complete("while True:", max_tokens=30_000, ignore_eos=True)
    await idle(cluster)


async def test_overload_is_refused_at_once_and_nothing_else_is_lost(client: Client, cluster: Cluster) -> None:
    calls = [client.complete(PROMPTS[0], max_tokens=30, ignore_eos=True, seed=i) for i in range(160)]
    results: list[Completion | BaseException] = await asyncio.gather(*calls, return_exceptions=True)
    refused = [result for result in results if isinstance(result, BaseException)]
    served = [result for result in results if isinstance(result, Completion)]
    assert refused
    assert all(isinstance(error, Overloaded) and error.retry_after_s for error in refused), refused[:3]
    assert len(served) >= 80
    assert all(len(answer.outputs[0].token_ids) == 30 for answer in served)
    await idle(cluster)


BAD: list[tuple[dict[str, Any], type[HeadwaterError], str]] = [
    ({"prompt": ""}, EmptyPrompt, "prompt"),
    ({"prompt": "a", "token_ids": [1]}, InvalidParameter, "both|one of"),
    ({"token_ids": [4096]}, TokenOutOfRange, "4096"),
    ({"prompt": b"\xff\xfe"}, InvalidText, "UTF-8"),
    ({"token_ids": [1] * 41_000}, PromptTooLong, "40960"),
    ({"prompt": "a", "max_tokens": 50_000}, PromptTooLong, "50000"),
    ({"prompt": "a", "n": 0}, InvalidParameter, "n "),
    ({"prompt": "a", "n": 1000}, InvalidParameter, "1000"),
    ({"prompt": "a", "temperature": float("nan")}, InvalidParameter, "temperature"),
    ({"prompt": "a", "temperature": -1.0}, InvalidParameter, "temperature"),
    ({"prompt": "a", "top_k": 2**31}, InvalidParameter, "top_k"),
    ({"prompt": "a", "top_p": 0.0}, InvalidParameter, "top_p"),
    ({"prompt": "a", "min_p": 1.5}, InvalidParameter, "min_p"),
    ({"prompt": "a", "repetition_penalty": 0.0}, InvalidParameter, "repetition_penalty"),
    ({"prompt": "a", "presence_penalty": 3.0}, InvalidParameter, "presence_penalty"),
    ({"prompt": "a", "frequency_penalty": float("inf")}, InvalidParameter, "frequency_penalty"),
    ({"prompt": "a", "stop": ["x"] * 100}, InvalidParameter, "stop"),
    ({"prompt": "a", "stop": ["x" * 1000]}, InvalidParameter, "stop"),
    ({"prompt": "a", "model": "gpt"}, UnknownModel, "target"),
    ({"prompt": "a" * 5_000_000}, MessageTooLarge, "larger than max"),
]


@pytest.mark.parametrize(("arguments", "kind", "words"), BAD, ids=lambda value: getattr(value, "__name__", None))
async def test_bad_input_gets_a_typed_error(
    client: Client, arguments: dict[str, Any], kind: type[HeadwaterError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        await client.complete(**arguments)


async def test_bad_input_takes_nothing_from_others(client: Client) -> None:
    good = client.complete(PROMPTS[0], seed=1, max_tokens=30, ignore_eos=True)
    bad = [client.complete(**arguments) for arguments, _, _ in BAD[:-1]]
    answer, *errors = await asyncio.gather(good, *bad, return_exceptions=True)
    assert isinstance(answer, Completion)
    assert len(answer.outputs[0].token_ids) == 30
    assert [type(error) for error in errors] == [kind for _, kind, _ in BAD[:-1]]


async def test_a_live_request_id_is_refused(client: Client) -> None:
    stream = client.generate("while True:", request_id="mine", max_tokens=5_000, ignore_eos=True)
    await anext(stream)
    with pytest.raises(DuplicateRequest, match="mine"):
        await client.complete("a", request_id="mine")
    assert (await anext(stream)).outputs
    await stream.aclose()
