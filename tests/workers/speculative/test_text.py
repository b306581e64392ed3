"""Speculation under the text layer: stop strings, pieces of text and finishes are those of a run without drafts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from protos.messages import Delta, Failure, Finish, Request, Sampling
from tests.workers.engine.drive import request, run, torch_engine
from tests.workers.speculative.test_law import counted, oracle, speculate, truth_of
from workers.engine.torch_engine import TorchEngine
from workers.loop import EngineLoop, Frame
from workers.metrics import WorkerMetrics
from workers.speculative.protocol import Key

PROMPT = "def fibonacci(n):\n    if n < 2:\n        return"
Ends = dict[str, tuple[str, tuple[int, ...], Finish | None]]


def written(engine: TorchEngine, tokenizer: Tokenizer, requests: Sequence[Request]) -> Ends:
    """By request, its text, tokens and finish, as the engine loop gives them out."""
    found: dict[str, list[Delta]] = {one.request_id: [] for one in requests}
    done = threading.Event()

    def deliver(frames: list[Frame]) -> None:
        for delta in (delta for frame in frames for delta in frame.deltas):
            assert not isinstance(delta, Failure), delta
            found[delta.request_id].append(delta)
        if all(deltas and deltas[-1].finish for deltas in found.values()):
            done.set()

    metrics = WorkerMetrics(model_name="m", worker_id="w")
    loop = EngineLoop(engine, tokenizer, metrics, deliver=deliver, stall_s=60)
    loop.open(1)
    for one in requests:
        loop.submit(1, one)
    loop.start()
    try:
        assert done.wait(60)
    finally:
        loop.stop()
    return {
        key: ("".join(d.text for d in deltas), tuple(t for d in deltas for t in d.token_ids), deltas[-1].finish)
        for key, deltas in found.items()
    }


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer.encode(PROMPT).ids)


@pytest.fixture(scope="module")
def requests(prompt: list[int], target_dir: Path, tokenizer: Tokenizer) -> list[Request]:
    """Greedy and sampled, and they stop at strings which begin and end at any place of their texts."""
    engine, made = torch_engine(target_dir), []
    for number in range(6):
        sampling = {"temperature": float(number % 2), "max_tokens": 40, "seed": number, "ignore_eos": True}
        [output] = run(engine, request(f"{number}", prompt, **sampling)).values()
        text = tokenizer.decode(output.tokens)
        at = len(text) * (number + 1) // 9
        stop = (text[at : at + 2 + number], "never this")
        made.append(Request(f"{number}", tuple(prompt), Sampling(stop=stop, **sampling)))
    return made


@pytest.fixture(scope="module")
def expected(requests: list[Request], target_dir: Path, tokenizer: Tokenizer) -> Ends:
    found = written(torch_engine(target_dir), tokenizer, requests)
    assert all(finish and finish.reason == "stop" for _, _, finish in found.values())
    return found


@pytest.fixture(scope="module")
def truth(requests: list[Request], target_dir: Path) -> dict[Key, list[int]]:
    """What would have come without the stop strings, by the loop's names."""
    longer = truth_of(run(torch_engine(target_dir), *requests))
    return {(f"1/{key}", index): tokens for (key, index), tokens in longer.items()}


@pytest.mark.parametrize("kind", ["chain-right", "tree-half", "wild-half"])
def test_stop_strings_within_drafts_end_the_text_where_they_do_without(
    target_dir: Path,
    tokenizer: Tokenizer,
    requests: list[Request],
    expected: Ends,
    truth: dict[Key, list[int]],
    kind: str,
) -> None:
    engine = torch_engine(target_dir)
    speculate(engine, oracle(engine, truth, kind, depth=9))
    found = written(engine, tokenizer, requests)
    assert {key: (text, finish) for key, (text, _, finish) in found.items()} == {
        key: (text, finish) for key, (text, _, finish) in expected.items()
    }
    assert counted(engine).accepted_tokens > 0
    assert engine.load().kv_used_tokens == 0
