"""The small model as a drafter: its drafts are what it says by itself, whatever the target did before."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from protos.errors import ModelError
from tests.workers.engine.drive import request, run, torch_engine
from workers.config import EngineSection, KernelsSection, KVSection, ModelSection, WorkerConfig
from workers.speculative import draft_model as module
from workers.speculative.draft_model import DraftModel
from workers.speculative.factory import make_draft_model
from workers.speculative.protocol import Context

PROMPT = list(range(40, 120))


@pytest.fixture(autouse=True)
def never_unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", 0.0)


@pytest.fixture(params=["auto", "off"])
def drafter(request: pytest.FixtureRequest, root: Path) -> DraftModel:
    """Native and torch."""
    return make(root, kernels=request.param)


def make(root: Path, *, kernels: str = "auto", num_pages: int = 64) -> DraftModel:
    config = WorkerConfig(
        model=ModelSection(path=root / "models" / "target"),
        engine=EngineSection(
            kernels=KernelsSection(variant=kernels),  # type: ignore[arg-type]
            kv=KVSection(num_pages=num_pages),
        ),
    )
    return make_draft_model(config, root / "models" / "drafter", threads=1, device=torch.device("cpu"))


def alone(root: Path, tokens: list[int], count: int) -> list[int]:
    """What the small model says by itself."""
    engine = torch_engine(root / "models" / "drafter")
    return run(engine, request("a", tokens, max_tokens=count, ignore_eos=True))["a", 0].tokens


def context(key: str, tokens: list[int]) -> Context:
    return Context((key, 0), "", tokens, len(PROMPT))


def test_a_draft_is_the_models_own_greedy_text(drafter: DraftModel, root: Path) -> None:
    contexts = [context(f"{start}", PROMPT[start:]) for start in (0, 7, 30)]
    for one, draft in zip(contexts, drafter.propose(contexts, 6), strict=True):
        draft.check()
        assert list(draft.tokens) == alone(root, list(one.tokens), 6)
        assert draft.is_chain
    drafter.check()


def test_drafts_go_on_from_whatever_the_target_chose(drafter: DraftModel, root: Path) -> None:
    source, tokens = random.Random(3), list(PROMPT)
    for _ in range(12):
        [draft] = drafter.propose([context("a", tokens)], 5)
        assert list(draft.tokens) == alone(root, tokens, 5)
        num_right = source.randrange(len(draft) + 1)
        tokens = [*tokens, *draft.tokens[:num_right], source.randrange(4096)]
        drafter.check()


def test_sequences_that_come_and_go_do_not_disturb_each_other(drafter: DraftModel, root: Path) -> None:
    drafter.propose([context("a", PROMPT), context("b", PROMPT[20:])], 4)
    drafter.forget(("a", 0))
    drafter.forget(("never seen", 0))
    longer = [*PROMPT[20:], 9, 8]
    [draft] = drafter.propose([context("b", longer)], 4)
    assert list(draft.tokens) == alone(root, longer, 4)
    drafter.check()


def test_it_stops_where_it_is_unsure(drafter: DraftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", 0.2)
    [draft] = drafter.propose([context("a", PROMPT)], 30)
    assert 1 <= len(draft) < 30
    *before, last = draft.path_probabilities
    assert all(path >= 0.2 for path in before)
    assert last < 0.2


def test_a_long_prompt_is_caught_up_with_bit_by_bit(
    drafter: DraftModel, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PROMPT_ROWS", 30)
    drafts = [drafter.propose([context("a", PROMPT)], 4)[0] for _ in range(3)]
    assert [len(draft) for draft in drafts] == [0, 0, 4]
    assert list(drafts[-1].tokens) == alone(root, PROMPT, 4)


def test_without_memory_the_oldest_sequence_gives_way(root: Path) -> None:
    drafter = make(root, num_pages=6)
    for key in "abcd":
        [draft] = drafter.propose([context(key, [*PROMPT, ord(key)])], 4)
        assert list(draft.tokens) == alone(root, [*PROMPT, ord(key)], 4)
        drafter.check()
    assert drafter.propose([context("too long", PROMPT * 4)], 4)[0].tokens == ()
    drafter.check()


def test_a_model_with_other_tokens_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    config = WorkerConfig(model=ModelSection(path=root / "models" / "target"))
    with pytest.raises(ModelError, match="must have the tokenizer of its target"):
        make_draft_model(config, tmp_path, threads=1, device=torch.device("cpu"))


def test_a_model_with_another_vocabulary_is_refused(root: Path, tmp_path: Path) -> None:
    """Its tokens could be none of the target's, and the target's none of its."""
    drafter = root / "models" / "drafter"
    (tmp_path / "tokenizer.json").write_bytes((drafter / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text((drafter / "config.json").read_text().replace("4096", "4160"))
    config = WorkerConfig(model=ModelSection(path=root / "models" / "target"))
    with pytest.raises(ModelError, match="a vocabulary of 4160, its target one of 4096"):
        make_draft_model(config, tmp_path, threads=1, device=torch.device("cpu"))
