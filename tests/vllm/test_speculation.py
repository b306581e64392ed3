"""Drafts change the speed of the vLLM engine only: its outputs are those of the engine without drafts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from protos.messages import Request, ResumePoint
from tests.vllm.drive import vllm_config
from tests.workers.engine.drive import Outputs, drain, request, run, step
from tests.workers.speculative.pool.ends import TOKEN, until
from tests.workers.speculative.pool.process import Spawned
from tests.workers.speculative.test_law import expect_logprobs
from workers.config import DrafterConfig
from workers.engine.vllm.engine import VllmEngine
from workers.speculative.factory import make_draft_server
from workers.speculative.pool.members import Members, PoolAccess
from workers.speculative.pool.server import DraftServer

MAX_CONTEXT = 256
NUM_TOKENS = 120
SPECULATION = {"drafters": ("copy", "pool"), "max_nodes": 6, "deadline_s": 0.02}
PROMPTS = [[(7 * i + j) % 4000 + 1 for j in range(4 + 13 * i)] for i in range(4)]
MANY = 12  # runs of all prompts; what is to be seen is seen long before
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.6, "top_p": 0.9, "top_k": 50},
    "mixed": {"temperature": [0.0, 0.5, 0.0, 0.8]},
    "penalties": {"temperature": [0.0, 0.5, 0.0, 0.8], "repetition_penalty": 1.2, "presence_penalty": 0.3},
    "several-outputs": {"n": 2, "temperature": 0.7},
    "logprobs": {"temperature": [0.0, 0.5, 0.0, 0.8], "logprobs": 2},
}


def made(directory: Path, *, access: PoolAccess | None = None) -> VllmEngine:
    config = vllm_config(directory, speculation=SPECULATION if access else None)
    model = config.model.model_copy(update={"max_context": MAX_CONTEXT})
    return VllmEngine(config.model_copy(update={"model": model}), threads=1, pool=access)


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[DraftServer]:
    """A drafter's, in this process, with the small model that ships with the target."""
    config = DrafterConfig(draft_model=root / "models" / "drafter", dtype="float32")
    made = make_draft_server(config, target=root / "models" / "target", token=TOKEN)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def members(server: DraftServer) -> Members:
    return Members({"0": server.start("127.0.0.1")})


@pytest.fixture(scope="module")
def engine(root: Path, members: Members) -> Iterator[VllmEngine]:
    """With drafts."""
    engine = made(root / "models" / "target", access=PoolAccess(members, TOKEN))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(root: Path) -> Iterator[Callable[..., Outputs]]:
    """What an engine without drafters says."""
    engine = made(root / "models" / "target")
    yield lambda *requests: run(engine, *requests)
    engine.close()


def asked(**fields: Any) -> list[Request]:
    """One request per prompt, each with a seed of its own; a list gives each its own value."""
    common = {"max_tokens": NUM_TOKENS, "ignore_eos": True, **fields}
    each = [{name: v[i] if isinstance(v, list) else v for name, v in common.items()} for i in range(len(PROMPTS))]
    return [request(str(i), prompt, seed=i, **each[i]) for i, prompt in enumerate(PROMPTS)]


def expect_same(found: Outputs, expected: Outputs) -> None:
    """All but what the prefix cache had, which hangs on what ran before."""
    assert set(found) == set(expected)
    for key, output in expected.items():
        assert found[key].tokens == output.tokens, key
        assert found[key].finish == output.finish
        expect_logprobs(found[key].logprobs, output.logprobs)


def counts(engine: VllmEngine) -> dict[str, Any]:
    """What vLLM's worker has counted until now."""
    [told] = engine._core.ask_workers("counts").result(timeout=30)
    speculation: dict[str, Any] = told["speculation"]
    return speculation


def num_accepted(engine: VllmEngine, drafter: str | None = None) -> int:
    told = counts(engine)
    assert 0 <= told["accepted_tokens"] <= told["drafted_tokens"]
    return int(told["accepted_by"][drafter] if drafter else told["accepted_tokens"])


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_engine_without_drafts(
    engine: VllmEngine, plain: Callable[..., Outputs], case: str
) -> None:
    """Again and again, until drafts have been right."""
    requests = asked(**CASES[case])
    expected, before = plain(*requests), num_accepted(engine)
    for _ in range(MANY):
        expect_same(run(engine, *requests), expected)
        if num_accepted(engine) > before:
            return
    raise AssertionError(f"no draft was ever right: {counts(engine)}")


@pytest.mark.parametrize("drafter", ["copy", "pool"])
def test_each_drafter_is_right_now_and_then(engine: VllmEngine, plain: Callable[..., Outputs], drafter: str) -> None:
    requests = asked()
    expected = plain(*requests)
    for _ in range(MANY):
        if num_accepted(engine, drafter):
            return
        expect_same(run(engine, *requests), expected)
    raise AssertionError(f"{drafter} is never right: {counts(engine)}")


def test_requests_run_alone_say_what_they_say_together(engine: VllmEngine) -> None:
    requests, before = asked(temperature=[0.0, 0.5, 0.7, 0.8]), num_accepted(engine)
    together = run(engine, *requests)
    alone: Outputs = {}
    for one in requests:
        alone |= run(engine, one)
    expect_same(alone, together)
    assert num_accepted(engine) > before


def test_a_context_may_be_filled_to_the_last_token(engine: VllmEngine, plain: Callable[..., Outputs]) -> None:
    """And whoever runs beside it has drafts all the while."""
    requests = asked(max_tokens=[MAX_CONTEXT - len(prompt) for prompt in PROMPTS])
    before = num_accepted(engine)
    found = run(engine, *requests)
    expect_same(found, plain(*requests))
    assert {len(found[one.request_id, 0].tokens) + len(one.token_ids) for one in requests} == {MAX_CONTEXT}
    assert num_accepted(engine) > before


def test_a_stop_token_within_a_draft_ends_the_output(engine: VllmEngine, plain: Callable[..., Outputs]) -> None:
    longer = plain(*asked())
    stops = [(longer[str(i), 0].tokens[-20],) for i in range(len(PROMPTS))]
    requests = asked(stop_token_ids=stops)
    expected = plain(*requests)
    assert all(output.finish is not None and output.finish.reason == "stop" for output in expected.values())
    expect_same(run(engine, *requests), expected)


def test_a_resumed_output_goes_on_as_it_would_have(engine: VllmEngine, plain: Callable[..., Outputs]) -> None:
    fields: dict[str, Any] = {"temperature": [0.0, 0.5, 0.7, 0.8], "repetition_penalty": 1.1}
    whole = plain(*asked(**fields))
    points = [(ResumePoint(0, tuple(whole[str(i), 0].tokens[: 10 + i])),) for i in range(len(PROMPTS))]
    found = run(engine, *asked(**fields, resume=points))
    for i in range(len(PROMPTS)):
        assert found[str(i), 0].tokens == whole[str(i), 0].tokens[10 + i :]


def test_who_wants_no_drafts_has_none(engine: VllmEngine, plain: Callable[..., Outputs]) -> None:
    before = counts(engine)["drafted_tokens"]
    requests = asked(speculation="off")
    expect_same(run(engine, *requests), plain(*requests))
    assert counts(engine)["drafted_tokens"] == before


def test_drafters_forget_what_has_ended(engine: VllmEngine, server: DraftServer) -> None:
    engine.submit(asked()[0])
    for _ in range(20):
        engine.step()
    engine.cancel("0")
    run(engine, *asked(max_tokens=30))
    until(lambda: server.stats.num_sequences == 0, "the end of the sequences")
    server.check()


def test_a_drafter_may_be_killed(
    engine: VllmEngine, plain: Callable[..., Outputs], members: Members, server: DraftServer, root: Path
) -> None:
    requests = asked(temperature=[0.0, 0.5, 0.0, 0.7])
    expected, known, outputs = plain(*requests), members.addresses, Outputs()
    process = Spawned(root, TOKEN)
    try:
        members.set({"killed": process.await_address()})
        before = num_accepted(engine, "pool")
        for _ in range(MANY):
            expect_same(run(engine, *requests), expected)
            if num_accepted(engine, "pool") > before:
                break
        assert counts(engine)["pool"]["num_drafters"] == 1
        for one in requests:
            engine.submit(one)
        while len(outputs) < len(requests) or min(len(output.tokens) for output in outputs.values()) < NUM_TOKENS // 4:
            step(engine, outputs)
        process.send(signal.SIGKILL)
        expect_same(drain(engine, outputs), expected)
    finally:
        process.kill()
        members.set(known)
    assert num_accepted(engine, "pool") > before
    for _ in range(MANY):
        expect_same(run(engine, *requests), expected)
        if server.stats.num_targets:
            break
    assert server.stats.num_targets == 1, "the other drafter has no turn"
