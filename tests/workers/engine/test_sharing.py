"""Attention computed together: the same tokens as apart, from fewer keys."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from protos.messages import PositionLogprobs, Request
from tests.workers.engine.drive import Output, Outputs, drain, request, run, step, torch_engine
from workers.engine.torch_engine import TorchEngine

PAGE = 32
KERNELS = ["auto", "off"]


@pytest.fixture(scope="module")
def target(root: Path) -> Path:
    return root / "models" / "target"


def tree_prompts(seed: int = 1) -> list[list[int]]:
    """Three levels: one system prompt, four blocks of examples, sixteen questions."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(1, 4000) for _ in range(count)]

    system, examples = tokens(4 * PAGE), [tokens(2 * PAGE) for _ in range(4)]
    return [system + examples[i % 4] + tokens(5 + 3 * i) for i in range(16)]


def answer(engine: TorchEngine, prompts: list[list[int]], **fields: Any) -> Outputs:
    return run(engine, *(request(str(i), prompt, max_tokens=12, **fields) for i, prompt in enumerate(prompts)))


def tokens(outputs: Outputs) -> dict[tuple[str, int], list[int]]:
    return {key: output.tokens for key, output in outputs.items()}


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_mode_gives_the_same_tokens_from_fewer_keys(target: Path, kernels: str) -> None:
    engines = {mode: torch_engine(target, kernels=kernels, sharing=mode) for mode in ("never", "root", "all")}
    answers = {mode: tokens(answer(engine, tree_prompts())) for mode, engine in engines.items()}
    assert answers["root"] == answers["never"]
    assert answers["all"] == answers["never"]
    stats = {mode: engine.stats() for mode, engine in engines.items()}
    assert stats["never"].attention_read_keys == stats["never"].attention_keys
    assert stats["all"].attention_read_keys < stats["root"].attention_read_keys < stats["never"].attention_read_keys
    assert stats["all"].attention_keys == stats["never"].attention_keys
    assert stats["never"].attention_segments < stats["all"].attention_segments


def test_the_planner_shares_a_long_prefix(target: Path) -> None:
    prefix = [(7 * i) % 3900 + 1 for i in range(64 * PAGE)]
    prompts = [[*prefix, 10 + i, 11] for i in range(8)]
    engine = torch_engine(target, sharing="planned", step_tokens=4096)
    planned = tokens(answer(engine, prompts))
    assert planned == tokens(answer(torch_engine(target, sharing="never", step_tokens=4096), prompts))
    assert engine.stats().attention_read_keys < engine.stats().attention_keys / 3


def test_the_outputs_of_one_request_share_their_prompt(target: Path) -> None:
    prompt = [(11 * i) % 3900 + 1 for i in range(4 * PAGE + 3)]
    engines = {mode: torch_engine(target, sharing=mode) for mode in ("all", "never")}
    asked = request("a", prompt, max_tokens=6, n=4, temperature=1.0, seed=3)
    answers = {mode: tokens(run(engine, asked)) for mode, engine in engines.items()}
    assert answers["all"] == answers["never"]
    assert engines["all"].stats().attention_read_keys < engines["never"].stats().attention_read_keys / 2


def test_sharing_follows_those_who_come_and_go(target: Path) -> None:
    """Requests that join, end and are cancelled in mid-flight change who shares, never what is said."""
    prompts = tree_prompts(seed=2)
    expected = tokens(answer(torch_engine(target, sharing="never"), prompts))
    engine, outputs = torch_engine(target, sharing="all"), dict[tuple[str, int], Output]()
    for index, prompt in enumerate(prompts):
        engine.submit(request(str(index), prompt, max_tokens=12))
        engine.submit(request(f"gone{index}", prompt[:-2], max_tokens=12))
        step(engine, outputs)
        if index % 2:
            engine.cancel(f"gone{index}")
    drain(engine, outputs)
    assert {key: made for key, made in tokens(outputs).items() if not key[0].startswith("gone")} == expected


def watched(prompt: list[int]) -> Request:
    return request("watched", prompt, max_tokens=10, logprobs=4, temperature=1.0, seed=7)


def seen(outputs: Outputs) -> tuple[list[int], list[PositionLogprobs]]:
    """What deterministic mode promises to repeat: tokens and their log-probabilities, to the last bit."""
    output = outputs["watched", 0]
    return output.tokens, output.logprobs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_repeats_every_bit_whatever_runs_beside(target: Path, dtype: str) -> None:
    prompts = tree_prompts(seed=3)
    asked = watched(prompts[5])

    def engine(**settings: Any) -> TorchEngine:
        return torch_engine(target, dtype=dtype, deterministic=True, **settings)

    alone = seen(run(engine(), asked))
    others = [request(str(i), prompt, max_tokens=4 + i) for i, prompt in enumerate(prompts)]
    settings: list[dict[str, Any]] = [{}, {"step_tokens": 64}, {"threads": 3}, {"prefix_cache": False}]
    for setting in settings:
        assert seen(run(engine(**setting), *others[:7], asked, *others[7:])) == alone, setting
    warm = engine()
    run(warm, *others)
    assert seen(run(warm, asked)) == alone


def test_bfloat16_tokens_differ_only_where_logits_nearly_tie(target: Path) -> None:
    """Sharing moves bfloat16 log-probabilities by no more than rounding does; greedy choices change only in a tie."""
    fields: dict[str, Any] = {"logprobs": 2, "ignore_eos": True}
    apart = answer(torch_engine(target, dtype="bfloat16", sharing="never"), tree_prompts(), **fields)
    together = answer(torch_engine(target, dtype="bfloat16", sharing="all"), tree_prompts(), **fields)
    num_compared = 0
    for key, output in apart.items():
        for left, right in zip(output.logprobs, together[key].logprobs, strict=True):
            if left.token_id != right.token_id:
                (_, first), (_, second) = left.top[:2]
                assert first - second < 0.1, (key, left, right)
                break  # what follows continues another text
            assert abs(left.logprob - right.logprob) < 0.1, (key, left, right)
            num_compared += 1
    assert num_compared > 100
