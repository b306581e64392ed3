"""What the torch engine promises beyond greedy text: seeds, forks, log-probabilities, stops."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.workers.engine.drive import drain, request, run, step, torch_engine

PROMPTS = [[(7 * i + j) % 4000 + 1 for j in range(5 + 9 * i)] for i in range(8)]
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def target(root: Path) -> Path:
    return root / "models" / "target"


def alone(target: Path, prompt: list[int], seed: int, **fields: object) -> list[int]:
    outputs = run(torch_engine(target), request("a", prompt, seed=seed, max_tokens=16, **{**SAMPLED, **fields}))
    return outputs["a", 0].tokens


def test_a_seed_gives_the_same_tokens_alone_batched_preempted_and_cached(target: Path) -> None:
    expected = [alone(target, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    assert len({tuple(made) for made in expected}) == len(PROMPTS)
    asked = [request(str(i), p, seed=i, max_tokens=16, **SAMPLED) for i, p in enumerate(PROMPTS)]

    batched = torch_engine(target)
    assert [o.tokens for o in sorted_outputs(run(batched, *asked))] == expected
    assert [o.tokens for o in sorted_outputs(run(batched, *asked))] == expected  # now every prompt is cached
    assert batched.stats().prefix_hit_tokens > 0

    tight = torch_engine(target, num_pages=16, page_size=8, step_tokens=64)
    assert [o.tokens for o in sorted_outputs(run(tight, *asked))] == expected
    assert tight.stats().num_preemptions > 0


def test_another_seed_gives_other_tokens(target: Path) -> None:
    made = {tuple(alone(target, PROMPTS[3], seed)) for seed in range(5)}
    assert len(made) == 5


def test_outputs_of_one_request_differ_and_each_is_reproducible(target: Path) -> None:
    fields = {"max_tokens": 12, "seed": 5, "n": 3, **SAMPLED}
    first = run(torch_engine(target), request("a", PROMPTS[4], **fields))  # type: ignore[arg-type]
    assert len({tuple(output.tokens) for output in first.values()}) == 3
    engine = torch_engine(target)
    second = run(engine, request("a", PROMPTS[4], **fields), *(request(str(i), p) for i, p in enumerate(PROMPTS)))  # type: ignore[arg-type]
    assert all(second["a", index].tokens == first["a", index].tokens for index in range(3))


def test_the_prompt_of_several_outputs_is_computed_once(target: Path) -> None:
    engine = torch_engine(target, page_size=8)
    run(engine, request("a", PROMPTS[7], max_tokens=1, n=8, temperature=1.0))
    assert engine.stats().computed_tokens < len(PROMPTS[7]) + 8 * 8


@torch.inference_mode()
def reference_logprobs(target: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    logprobs: torch.Tensor = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return logprobs


def test_logprobs_equal_transformers(target: Path) -> None:
    prompt = PROMPTS[5]
    engine = torch_engine(target, step_tokens=64)
    run(engine, request("warm", prompt))
    output = run(engine, request("a", prompt, max_tokens=6, logprobs=3, prompt_logprobs=2))["a", 0]
    exact = reference_logprobs(target, [*prompt, *output.tokens])
    assert len(output.prompt_logprobs) == len(prompt) - 1
    for position, found in enumerate(output.prompt_logprobs, start=1):
        assert found.token_id == prompt[position]
        assert found.logprob == pytest.approx(float(exact[position - 1, prompt[position]]), abs=1e-4)
        assert [token for token, _ in found.top] == exact[position - 1].topk(2).indices.tolist()
    for position, found in enumerate(output.logprobs, start=len(prompt)):
        assert found.top[0] == (found.token_id, pytest.approx(found.logprob))
        assert found.logprob == pytest.approx(float(exact[position - 1, found.token_id]), abs=1e-4)


def test_scoring_computes_the_shared_context_once(target: Path) -> None:
    context, engine = PROMPTS[7], torch_engine(target, page_size=8)
    continuations = [[i + 1, i + 2, i + 3] for i in range(6)]
    for i, continuation in enumerate(continuations):
        scoring = {"max_tokens": 0, "prompt_logprobs": 0, "prompt_logprobs_from": len(context)}
        engine.submit(request(str(i), [*context, *continuation], **scoring))  # type: ignore[arg-type]
    outputs = drain(engine)
    assert engine.stats().computed_tokens < len(context) + 6 * (3 + 8)
    for i, continuation in enumerate(continuations):
        exact = reference_logprobs(target, [*context, *continuation])
        found = outputs[str(i), 0].prompt_logprobs
        assert [position.token_id for position in found] == continuation
        for offset, position in enumerate(found):
            row = len(context) + offset - 1
            assert position.logprob == pytest.approx(float(exact[row, position.token_id]), abs=1e-4)


def test_stop_tokens_min_tokens_and_ignore_eos(target: Path) -> None:
    plain = run(torch_engine(target), request("a", PROMPTS[2], max_tokens=10))["a", 0].tokens
    stop = plain[3]
    stopped = run(torch_engine(target), request("a", PROMPTS[2], max_tokens=10, stop_token_ids=(stop,)))["a", 0]
    assert stopped.tokens == plain[: plain.index(stop) + 1]
    assert stopped.finish is not None
    assert (stopped.finish.reason, stopped.finish.stop_token_id) == ("stop", stop)

    later = run(torch_engine(target), request("a", PROMPTS[2], max_tokens=10, stop_token_ids=(stop,), min_tokens=8))[
        "a", 0
    ]
    assert stop not in later.tokens[:8]

    bias = {0: 100.0}
    ended = run(torch_engine(target), request("a", PROMPTS[2], max_tokens=10, logit_bias=bias))["a", 0]
    assert ended.tokens == [0]
    going = run(torch_engine(target), request("a", PROMPTS[2], max_tokens=10, logit_bias=bias, ignore_eos=True))["a", 0]
    assert going.tokens == [0] * 10


def test_cancel_stops_within_a_step_and_frees_every_page(target: Path) -> None:
    engine = torch_engine(target)
    for i, prompt in enumerate(PROMPTS):
        engine.submit(request(str(i), prompt, max_tokens=1000, ignore_eos=True))
    outputs: dict[tuple[str, int], object] = {}
    for _ in range(3):
        step(engine, outputs)  # type: ignore[arg-type]
    for i in range(len(PROMPTS)):
        engine.cancel(str(i))
    assert not engine.step().deltas
    assert engine.load().kv_used_tokens == 0
    stats = engine.stats()
    assert stats.kv_free_pages + stats.kv_cached_pages == stats.kv_total_pages


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = torch_engine(target)
    expected = run(engine, request("before", PROMPTS[3]))["before", 0].tokens

    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("not enough memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine._runner, "execute", out_of_memory)
        engine.submit(request("bad", PROMPTS[6]))
        [failure] = engine.step().failures
    assert (failure.request_id, failure.kind) == ("bad", "EngineFailure")
    assert "not enough memory" in failure.message
    assert run(engine, request("after", PROMPTS[3]))["after", 0].tokens == expected


def test_bf16_runs_and_stays_near_fp32(target: Path) -> None:
    prompt = PROMPTS[7]
    asked = {"max_tokens": 1, "prompt_logprobs": 0}
    exact = run(torch_engine(target), request("a", prompt, **asked))["a", 0]  # type: ignore[arg-type]
    rough = run(torch_engine(target, dtype="bfloat16"), request("a", prompt, **asked))["a", 0]  # type: ignore[arg-type]
    errors = [abs(a.logprob - b.logprob) for a, b in zip(exact.prompt_logprobs, rough.prompt_logprobs, strict=True)]
    assert 0 < sum(errors) / len(errors) < 0.15
    assert math.isfinite(max(errors))


def sorted_outputs(outputs: dict) -> list:  # type: ignore[type-arg]
    return [outputs[key] for key in sorted(outputs)]
