"""The small model as a drafter: its drafts are what it says by itself, whatever the target did before."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from protos.errors import ModelError
from protos.messages import Sampling
from tests.workers.engine.drive import request, run, torch_engine
from tests.workers.speculative.trees import paths
from workers.config import EngineSection, KernelsSection, KVSection, ModelSection, WorkerConfig
from workers.speculative import draft_model as module
from workers.speculative.draft_model import DraftModel
from workers.speculative.factory import make_draft_model
from workers.speculative.protocol import Context, Draws

PROMPT = list(range(40, 120))


@pytest.fixture(autouse=True)
def never_unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are the model's own choices alone, to the last node."""
    monkeypatch.setattr(module, "LEAST", 0.0)
    monkeypatch.setattr(module, "LEAST_RUNNER_UP", 2.0)


@pytest.fixture(params=["auto", "off"])
def drafter(request: pytest.FixtureRequest, root: Path) -> DraftModel:
    """Native and torch."""
    return make(root, kernels=request.param)


def make(root: Path, *, kernels: str = "auto", num_pages: int = 64) -> DraftModel:
    config = WorkerConfig(
        model=ModelSection(path=root / "models" / "drafter", dtype="float32"),
        engine=EngineSection(
            kernels=KernelsSection(variant=kernels),  # type: ignore[arg-type]
            kv=KVSection(num_pages=num_pages),
        ),
    )
    return make_draft_model(config, target=root / "models" / "target", threads=1, device=torch.device("cpu"))


Says = Callable[[Sequence[int], int], list[int]]


@pytest.fixture(scope="module")
def says(root: Path) -> Says:
    """What the small model says by itself after these tokens."""
    engine, numbers = torch_engine(root / "models" / "drafter"), itertools.count()

    def said(tokens: Sequence[int], count: int) -> list[int]:
        name = f"{next(numbers)}"
        return run(engine, request(name, tokens, max_tokens=count, ignore_eos=True))[name, 0].tokens

    return said


def context(key: str, tokens: Sequence[int], num_guessed: int = 0) -> Context:
    return Context((key, 0), "", list(tokens), len(PROMPT), num_guessed)


def test_a_draft_is_the_models_own_greedy_text(drafter: DraftModel, says: Says) -> None:
    contexts = [context(f"{start}", PROMPT[start:]) for start in (0, 7, 30)]
    for one, draft in zip(contexts, drafter.propose(contexts, 6), strict=True):
        draft.check()
        assert list(draft.tokens) == says(one.tokens, 6)
        assert draft.is_chain
    drafter.check()


def test_drafts_go_on_from_whatever_the_target_chose(drafter: DraftModel, says: Says) -> None:
    source, tokens = random.Random(3), list(PROMPT)
    for _ in range(12):
        [draft] = drafter.propose([context("a", tokens)], 5)
        assert list(draft.tokens) == says(tokens, 5)
        num_right = source.randrange(len(draft) + 1)
        tokens = [*tokens, *draft.tokens[:num_right], source.randrange(4096)]
        drafter.check()


def test_sequences_that_come_and_go_do_not_disturb_each_other(drafter: DraftModel, says: Says) -> None:
    drafter.propose([context("a", PROMPT), context("b", PROMPT[20:])], 4)
    drafter.forget(("a", 0))
    drafter.forget(("never seen", 0))
    longer = [*PROMPT[20:], 9, 8]
    [draft] = drafter.propose([context("b", longer)], 4)
    assert list(draft.tokens) == says(longer, 4)
    drafter.check()


def test_it_stops_where_it_is_unsure(drafter: DraftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", 0.2)
    [draft] = drafter.propose([context("a", PROMPT)], 30)
    assert 1 <= len(draft) < 30
    *before, last = draft.path_probabilities
    assert all(path >= 0.2 for path in before)
    assert last < 0.2


def test_a_long_prompt_is_caught_up_with_bit_by_bit(
    drafter: DraftModel, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PROMPT_ROWS", 30)
    drafts = [drafter.propose([context("a", PROMPT)], 4)[0] for _ in range(3)]
    assert [len(draft) for draft in drafts] == [0, 0, 4]
    assert list(drafts[-1].tokens) == says(PROMPT, 4)


def test_without_memory_the_oldest_sequence_gives_way(root: Path, says: Says) -> None:
    drafter = make(root, num_pages=6)
    for key in "abcd":
        [draft] = drafter.propose([context(key, [*PROMPT, ord(key)])], 4)
        assert list(draft.tokens) == says([*PROMPT, ord(key)], 4)
        drafter.check()
    assert drafter.propose([context("too long", PROMPT * 4)], 4)[0].tokens == ()
    drafter.check()


@pytest.mark.parametrize("num_pages", [6, 7, 8])
def test_a_later_sequence_of_a_batch_may_take_an_earlier_ones_pages(root: Path, says: Says, num_pages: int) -> None:
    """Whoever lost them has no draft; the others' are right."""
    drafter, source = make(root, num_pages=num_pages), random.Random(num_pages)
    texts = {key: [ord(key), *PROMPT[: source.randrange(30, 80)]] for key in "abcde"}
    num_drafts = 0
    for _ in range(6):
        keys = source.sample("abcde", source.randint(2, 5))
        drafts = drafter.propose([context(key, texts[key]) for key in keys], 4)
        drafter.check()
        assert len(drafts[-1]), "the last one has taken what it needed"
        for key, draft in zip(keys, drafts, strict=True):
            draft.check()
            assert not len(draft) or list(draft.tokens) == says(texts[key], 4)
            num_drafts += len(draft) > 0
            texts[key] += [*draft.tokens[:2], source.randrange(4096)]
    assert 6 < num_drafts < 6 * 5


# Going on from guesses


@pytest.mark.parametrize("num_guessed", [1, 4, 30])
def test_a_draft_goes_on_from_guesses(drafter: DraftModel, says: Says, num_guessed: int) -> None:
    guesses = [[(7 * step + start) % 4096 for step in range(num_guessed)] for start in (1, 500)]
    contexts = [context(f"{guess[0]}", [*PROMPT, *guess], num_guessed) for guess in guesses]
    for _ in range(2):
        for guess, draft in zip(guesses, drafter.propose(contexts, 5), strict=True):
            assert list(draft.tokens) == says([*PROMPT, *guess], 5)
        drafter.check()


def test_whatever_was_guessed_the_target_may_say_another_thing(drafter: DraftModel, says: Says) -> None:
    """At any depth of what was guessed or drafted; drafts are those of the model alone."""
    source, known = random.Random(5), list(PROMPT)
    for _ in range(10):
        guessed: list[int] = []
        for _ in range(source.randrange(4)):
            [draft] = drafter.propose([context("a", [*known, *guessed], len(guessed))], 4)
            assert list(draft.tokens) == says([*known, *guessed], 4)
            drafter.check()
            kept = guessed[: source.randrange(len(guessed) + 1)]  # another branch now and then
            guessed = [*kept, *draft.tokens[: source.randrange(5)], *source.choices(range(4096), k=source.randrange(2))]
        known += [
            *guessed[: source.randrange(len(guessed) + 1)],
            *source.choices(range(4096), k=source.randrange(1, 3)),
        ]
        [draft] = drafter.propose([context("a", known)], 4)
        assert list(draft.tokens) == says(known, 4)
        drafter.check()


def test_no_page_with_a_guess_is_shared(drafter: DraftModel, says: Says) -> None:
    guessed = [(11 * step) % 4096 for step in range(70)]
    drafter.propose([context("a", [*PROMPT, *guessed], len(guessed))], 4)
    assert drafter._cache.measure("", [*PROMPT, *guessed], limit=150) == 64  # whole pages of what is known
    drafter.check()
    committed = [[*PROMPT, *guessed[:60], 9], [*PROMPT, *guessed[:17]]]
    contexts = [context("b", committed[0]), context("c", committed[1]), context("a", [*PROMPT, 5, *guessed])]
    for one, draft in zip(contexts, drafter.propose(contexts, 4), strict=True):
        assert list(draft.tokens) == says(one.tokens, 4)
    drafter.check()
    assert drafter._cache.measure("", committed[0], limit=150) == 128  # known from b


def test_guesses_that_others_know_do_not_lead_into_their_pages(drafter: DraftModel, says: Says, root: Path) -> None:
    """When they turn out wrong, what the target says instead is written where they stood."""
    known = [(11 * step) % 4096 for step in range(70)]
    whole = [*PROMPT, *known]
    drafter.propose([context("a", whole)], 4)
    assert drafter._cache.measure("", whole, limit=150) == 128
    drafter.propose([context("b", whole, len(known))], 4)
    otherwise = [*PROMPT, *[5, 6, 7] * 20]
    assert list(drafter.propose([context("b", otherwise)], 4)[0].tokens) == says(otherwise, 4)
    drafter.check()
    [fresh] = make(root).propose([context("a", [*whole, 9, 9])], 4)
    for key in "ac":
        [draft] = drafter.propose([context(key, [*whole, 9, 9])], 4)
        assert draft.tokens == fresh.tokens
        assert draft.probabilities == pytest.approx(fresh.probabilities, rel=1e-3)


def test_a_guess_that_came_true_is_shared(drafter: DraftModel, says: Says) -> None:
    guessed = [(11 * step) % 4096 for step in range(70)]
    whole = [*PROMPT, *guessed]
    drafter.propose([context("a", whole, len(guessed))], 4)
    drafter.propose([context("a", whole)], 4)
    [draft] = drafter.propose([context("a", [*whole, 8, 8])], 4)
    assert list(draft.tokens) == says([*whole, 8, 8], 4)
    assert drafter._cache.measure("", whole, limit=150) == 128
    drafter.check()


def test_what_is_drawn_does_not_hang_on_what_was_guessed_before(drafter: DraftModel, root: Path) -> None:
    source, tokens = random.Random(2), list(PROMPT)
    draws = Draws(Sampling(seed=3, max_tokens=99, temperature=1.0, repetition_penalty=1.2), 1)
    for _ in range(4):
        guessed = source.choices(range(4096), k=source.randrange(1, 6))
        found = []
        for asked in (context("a", [*tokens, *guessed], len(guessed)), context("a", tokens)):
            [draft] = drafter.propose([asked._replace(draws=draws)], 4)
            [fresh] = make(root).propose([asked._replace(num_guessed=0, draws=draws)], 4)
            assert draft.tokens == fresh.tokens
            found.append(draft)
        drafter.check()
        tokens += [*found[1].tokens[:2], *guessed[:1]]


# Runners-up


def second_best(
    root: Path, tokens: Sequence[int], count: int
) -> tuple[list[int], list[tuple[int, float]], list[float]]:
    """The model's choices, what came second at each place, with its probability, and the choices' probabilities."""
    engine = torch_engine(root / "models" / "drafter", kernels="off")
    output = run(engine, request("a", tokens, max_tokens=count, ignore_eos=True, logprobs=2))["a", 0]
    seconds = [position.top[1] for position in output.logprobs]
    chosen = [math.exp(position.logprob) for position in output.logprobs]
    return output.tokens, [(token_id, math.exp(value)) for token_id, value in seconds], chosen


@pytest.mark.parametrize("least", [0.0, 0.02])
def test_beside_each_choice_stands_the_second_best(
    drafter: DraftModel, root: Path, monkeypatch: pytest.MonkeyPatch, least: float
) -> None:
    monkeypatch.setattr(module, "LEAST_RUNNER_UP", least)
    for start in (0, 13, 40):
        chosen, seconds, sure = second_best(root, PROMPT[start:], 24)
        [draft] = drafter.propose([context(f"{start}", PROMPT[start:])], 24)
        draft.check()
        expected: dict[tuple[int, ...], float] = {}
        path = 1.0
        for depth, (token_id, probability) in enumerate(seconds):
            if path * probability >= least:
                expected[*chosen[:depth], token_id] = path * probability
            path *= sure[depth]
            expected[tuple(chosen[: depth + 1])] = path
        found = dict(zip(paths(draft), draft.path_probabilities, strict=True))
        assert len(found) == 24
        assert all(value == pytest.approx(expected[path], rel=1e-3) for path, value in found.items())
        left = [value for path, value in expected.items() if path not in found]
        assert max(left) <= min(found.values()) * 1.001  # the best of them all
        assert not draft.is_chain


@pytest.mark.parametrize("max_nodes", [1, 2, 3, 9, 63])
def test_runners_up_count_as_nodes(drafter: DraftModel, monkeypatch: pytest.MonkeyPatch, max_nodes: int) -> None:
    monkeypatch.setattr(module, "LEAST_RUNNER_UP", 0.0)
    contexts = [context(f"{start}", PROMPT[start:]) for start in (0, 7, 30)]
    for draft in drafter.propose(contexts, max_nodes):
        draft.check()
        assert len(draft) == max_nodes


def test_native_and_torch_drafts_are_alike(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_RUNNER_UP", 0.02)
    contexts = [context(f"{start}", PROMPT[start:]) for start in (0, 7, 30)]
    native, torch_drafts = (make(root, kernels=kernels).propose(contexts, 12) for kernels in ("auto", "off"))
    for one, other in zip(native, torch_drafts, strict=True):
        assert sorted(paths(one)) == sorted(paths(other))
        assert sorted(one.path_probabilities) == pytest.approx(sorted(other.path_probabilities), rel=1e-3)


# What does not fit


def test_a_model_with_another_vocabulary_is_refused(root: Path, tmp_path: Path) -> None:
    """Its tokens could be none of the target's, and the target's none of its."""
    drafter = root / "models" / "drafter"
    (tmp_path / "tokenizer.json").write_bytes((drafter / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text((drafter / "config.json").read_text().replace("4096", "4160"))
    own = WorkerConfig(model=ModelSection(path=tmp_path))
    with pytest.raises(ModelError, match="a vocabulary of 4160, its target one of 4096"):
        make_draft_model(own, target=root / "models" / "target", threads=1, device=torch.device("cpu"))
