"""An answer cut behind any of its deltas and resumed elsewhere is the same answer: tokens, text, scores and ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from protos.messages import Delta, Finish, Request, ResumePoint
from tests.workers.engine.drive import request, run, torch_engine
from workers.engine.protocol import Engine
from workers.resumption import take_up
from workers.text import TokenTexts, to_delta

NUM_TOKENS = 12
Answer = dict[int, list[Delta]]  # by output


@pytest.fixture(scope="module")
def engine(target_dir: Path) -> Engine:
    return torch_engine(target_dir)


def answer(engine: Engine, texts: TokenTexts, asked: Request) -> Answer:
    """As a worker answers: tokens of the engine with their text, and the ends it knows by itself."""
    taken = take_up(asked, texts, engine.model.eos_token_ids)
    told: Answer = {index: [] for index in range(asked.sampling.n)}
    for end in taken.ends:
        told[end.index].append(end)
    open_outputs = dict(taken.outputs)
    if open_outputs:
        engine.submit(taken.request)
    while open_outputs:
        for delta in engine.step().deltas:
            if (output := open_outputs.get(delta.index)) is None:
                continue
            told[delta.index].append(to_delta(delta, output, request_id=asked.request_id))
            if told[delta.index][-1].finish is not None:
                del open_outputs[delta.index]
                engine.cancel(asked.request_id, delta.index)
    return told


def point(index: int, deltas: list[Delta]) -> ResumePoint:
    tokens = tuple(token_id for delta in deltas for token_id in delta.token_ids)
    return ResumePoint(index, tokens, finished=bool(deltas) and deltas[-1].finish is not None)


def assert_same(got: list[Delta], expected: list[Delta]) -> None:
    for name in ("text", "token_ids", "finish"):
        assert [getattr(delta, name) for delta in got] == [getattr(delta, name) for delta in expected], name
    scored = [[position for delta in deltas for position in delta.logprobs] for deltas in (got, expected)]
    assert [position.token_id for position in scored[0]] == [position.token_id for position in scored[1]]
    assert [position.logprob for position in scored[0]] == pytest.approx([p.logprob for p in scored[1]], abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_cut_of_every_output(engine: Engine, tokenizer: Tokenizer, temperature: float) -> None:
    texts = TokenTexts(tokenizer)
    prompt = tokenizer.encode("Once upon a time there was a").ids
    plain = request("a", prompt, max_tokens=NUM_TOKENS, seed=3, n=3, temperature=temperature, ignore_eos=True)
    first = answer(engine, texts, plain)[0]
    stop = "".join(delta.text for delta in first[5:7])
    asked = replace(plain, sampling=replace(plain.sampling, stop=(stop,), logprobs=2))
    whole = answer(engine, texts, asked)
    last = whole[0][-1]
    assert last.finish == Finish("stop", stop=stop)
    assert len(stop) > len(texts.get(last.token_ids[0]) or "")  # it began in a token before
    num_deltas = max(len(deltas) for deltas in whole.values())
    for cut in range(num_deltas):
        points = [point(index, deltas[:cut]) for index, deltas in whole.items()]
        rest = answer(engine, texts, replace(asked, resume=tuple(points)))
        for index, deltas in whole.items():
            assert_same(rest[index], deltas[cut:])
        assert engine.load().num_running == 0


def test_outputs_cut_at_different_tokens(engine: Engine, tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer)
    prompt = tokenizer.encode("The old man").ids
    asked = request("a", prompt, max_tokens=NUM_TOKENS, n=3, temperature=0.8, presence_penalty=0.5, logprobs=0)
    whole = answer(engine, texts, asked)
    for cuts in [(0, 3, 7), (5, 0, 1), (2, 100, 4)]:
        points = [point(index, whole[index][:cut]) for index, cut in enumerate(cuts) if cut]
        rest = answer(engine, texts, replace(asked, resume=tuple(points)))
        for index, cut in enumerate(cuts):
            assert_same(rest[index], whole[index][cut:])


def test_the_prompt_is_scored_once_for_all_outputs(engine: Engine) -> None:
    outputs = run(engine, request("a", range(5, 15), max_tokens=2, n=3, prompt_logprobs=0))
    assert {index: len(output.prompt_logprobs) for (_, index), output in outputs.items()} == {0: 9, 1: 0, 2: 0}
