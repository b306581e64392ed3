"""Drafts for sampled outputs: drawn as the target draws them, or drawn freely and verified by rejection."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from protos.errors import ModelError
from protos.messages import Request
from tests.workers.engine.drive import Outputs, request, run, torch_engine
from tests.workers.model.tiny import save_tiny
from tests.workers.speculative.oracle import Always
from tests.workers.speculative.test_law import CASES, counted, expect, expect_idle
from workers.config import EngineSection, KernelsSection, KVSection, ModelSection, WorkerConfig
from workers.engine.torch_engine import TorchEngine
from workers.speculative.factory import make_draft_model
from workers.speculative.protocol import Context, Draws
from workers.speculative.speculator import Speculator

VOCAB = 12
PROMPT = [3, 5, 7, 1, 9]
NUM_OUTPUTS = 3000


def drafted(
    directory: Path,
    drafter: Path,
    *,
    num_candidates: int = 0,
    max_nodes: int = 6,
    kernels: str = "auto",
    settings: Mapping[str, Any] | None = None,
) -> TorchEngine:
    """An engine that always verifies what the model in `drafter` drafts."""
    engine = torch_engine(directory, kernels=kernels, **(settings or {}))
    own = WorkerConfig(
        model=ModelSection(path=drafter),
        engine=EngineSection(kernels=KernelsSection(variant=kernels), kv=KVSection(num_pages=512)),  # type: ignore[arg-type]
    )
    cpu = torch.device("cpu")
    model = make_draft_model(own, target=directory, threads=1, device=cpu, num_candidates=num_candidates)
    engine._speculator = Speculator([model], max_nodes=max_nodes, controller=Always(1, max_nodes=max_nodes))
    return engine


# The walk


@pytest.mark.parametrize("case", ["sampled", "mixed", "penalties", "bias", "several-outputs", "logprobs", "min-tokens"])
def test_the_drafters_draws_change_no_token(target_dir: Path, root: Path, case: str) -> None:
    expected = run(torch_engine(target_dir), *CASES[case])
    engine = drafted(target_dir, root / "models" / "drafter")
    expect(run(engine, *CASES[case]), expected)
    expect_idle(engine)
    assert counted(engine).accepted_tokens > 0


@pytest.mark.parametrize("case", ["sampled", "penalties", "bias"])
def test_a_drafter_with_the_targets_distribution_foresees_every_draw(target_dir: Path, case: str) -> None:
    """The noise is the same, the penalties and filters are too: what is left is that its tokens are the target's."""
    engine = drafted(target_dir, target_dir)
    requests = [one for one in CASES[case] if one.sampling.temperature > 0]
    run(engine, *requests)
    stats = counted(engine)
    assert stats.accepted_tokens > 0.97 * stats.drafted_tokens


def test_the_same_noise_makes_more_drafts_right(target_dir: Path, root: Path) -> None:
    """Against a drafter that proposes what it finds most probable, as it does for greedy requests."""
    requests = [
        request(str(seed), [*range(40 + seed, 90 + seed)], seed=seed, temperature=1.0, max_tokens=48, ignore_eos=True)
        for seed in range(12)
    ]
    same = drafted(target_dir, root / "models" / "drafter", max_nodes=4)
    greedy = drafted(target_dir, root / "models" / "drafter", max_nodes=4)
    assert greedy._speculator is not None
    [model] = greedy._speculator._panel._drafters
    propose = model.propose
    model.propose = lambda contexts, max_nodes: propose(  # type: ignore[method-assign]
        [one._replace(draws=None) for one in contexts], max_nodes
    )
    assert {key: one.tokens for key, one in run(same, *requests).items()} == {
        key: one.tokens for key, one in run(greedy, *requests).items()
    }
    assert counted(same).accepted_tokens > 1.1 * counted(greedy).accepted_tokens


# Rejection


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and a drafter with few tokens, and different opinions on them."""
    directories = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("drafter")
    for directory, hidden in zip(directories, (48, 24), strict=True):
        save_tiny(directory, "llama", vocab_size=VOCAB, hidden_size=hidden, num_hidden_layers=2, eos_token_id=None)
        (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    return directories


def sampled(num_tokens: int, **fields: Any) -> list[Request]:
    return [
        request(str(seed), PROMPT, seed=seed, temperature=1.0, max_tokens=num_tokens, ignore_eos=True, **fields)
        for seed in range(NUM_OUTPUTS)
    ]


def tallied(outputs: Outputs, first: int, last: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(output.tokens[first:last]) for output in outputs.values())


def in_batches(make: Callable[[], TorchEngine], requests: list[Request]) -> tuple[Outputs, TorchEngine]:
    engine, outputs = make(), Outputs()
    for first in range(0, len(requests), 500):
        outputs |= run(engine, *requests[first : first + 500])
    return outputs, engine


def chi_squared(one: Counter[tuple[int, ...]], other: Counter[tuple[int, ...]]) -> tuple[float, int]:
    """Of two samples of the same size; outcomes that are rare in both are counted together. With the freedom."""
    rare = [outcome for outcome in {*one, *other} if one[outcome] + other[outcome] < 20]
    pairs = [(one[outcome], other[outcome]) for outcome in {*one, *other} if outcome not in rare]
    pairs += [(sum(one[outcome] for outcome in rare), sum(other[outcome] for outcome in rare))] if rare else []
    return sum((a - b) ** 2 / (a + b) for a, b in pairs if a + b), len(pairs) - 1


def limit(freedom: int) -> float:
    """The value that chi-squared passes once in ten thousand times (Wilson and Hilferty's approximation)."""
    return float(freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3)


@pytest.mark.parametrize("num_candidates", [1, 3], ids=["token", "recursive"])
def test_rejection_keeps_the_distribution(tiny: tuple[Path, Path], num_candidates: int) -> None:
    """Of the second to fourth token, the first that are drafted; seeds differ, so the samples are independent."""
    settings = {"page_size": 16, "max_running": 64}
    fields = {"top_p": 0.95} if num_candidates == 1 else {}
    plain, _ = in_batches(lambda: torch_engine(tiny[0], **settings), sampled(4, **fields))
    outputs, engine = in_batches(
        lambda: drafted(*tiny, num_candidates=num_candidates, kernels="off", settings=settings), sampled(4, **fields)
    )
    stats = counted(engine)
    assert stats.accepted_tokens > 0.2 * stats.num_drafts
    assert tallied(plain, 0, 1) == tallied(outputs, 0, 1)  # not drafted: drawn by the seed
    assert plain != outputs
    for first, last in ((1, 2), (1, 3), (2, 4)):
        value, freedom = chi_squared(tallied(plain, first, last), tallied(outputs, first, last))
        assert freedom > 5
        assert value < limit(freedom), (first, last)


def test_the_statistic_notices_another_distribution(tiny: tuple[Path, Path]) -> None:
    settings = {"page_size": 16, "max_running": 64}
    plain, _ = in_batches(lambda: torch_engine(tiny[0], **settings), sampled(3))
    other, _ = in_batches(lambda: torch_engine(tiny[0], **settings), sampled(3, top_p=0.93))
    value, freedom = chi_squared(tallied(plain, 1, 3), tallied(other, 1, 3))
    assert value > limit(freedom)


def test_what_is_drawn_from_the_targets_distribution_is_never_refused(target_dir: Path) -> None:
    engine = drafted(target_dir, target_dir, num_candidates=1, max_nodes=4)
    run(engine, *[one for one in CASES["sampled"] if one.sampling.temperature > 0])
    stats = counted(engine)
    assert stats.accepted_tokens > 0.97 * stats.drafted_tokens


def test_greedy_outputs_are_the_same_with_rejection(target_dir: Path, root: Path) -> None:
    expected = run(torch_engine(target_dir), *CASES["greedy"])
    engine = drafted(target_dir, root / "models" / "drafter", num_candidates=2)
    expect(run(engine, *CASES["greedy"]), expected)
    assert counted(engine).accepted_tokens > 0


@pytest.mark.parametrize("case", ["mixed", "several-outputs", "logprobs", "min-tokens", "short"])
def test_rejection_keeps_the_books(target_dir: Path, root: Path, case: str) -> None:
    """Lengths, log-probabilities and pages: whatever is drawn."""
    engine = drafted(target_dir, root / "models" / "drafter", num_candidates=2)
    outputs = run(engine, *CASES[case])
    expect_idle(engine)
    counted(engine)
    plain = run(torch_engine(target_dir), *CASES[case])
    assert outputs.keys() == plain.keys()
    for key, output in outputs.items():
        assert len(output.logprobs) == (len(output.tokens) if plain[key].logprobs else 0)
        assert all(one.token_id == token for one, token in zip(output.logprobs, output.tokens, strict=False))


def test_candidates_differ_and_tell_nothing_of_themselves(target_dir: Path) -> None:
    """Probabilities that depended on tokens would let a cut change the law."""
    own = WorkerConfig(model=ModelSection(path=target_dir), engine=EngineSection(kv=KVSection(num_pages=64)))
    model = make_draft_model(own, target=target_dir, threads=1, device=torch.device("cpu"), num_candidates=3)
    shapes = set()
    for seed in range(8):
        sampling = request("a", PROMPT, seed=seed, temperature=1.0).sampling
        context = Context((str(seed), 0), "", [3, 5, 7, 1, 9 + seed], 5, draws=Draws(sampling, 0))
        [draft] = model.propose([context], 6)
        draft.check()
        assert set(draft.drawn_from) <= {-1, 0, 3}
        assert all(q.sum() == pytest.approx(1.0) for q in draft.drawn_from.values())
        shapes.add((draft.parents, draft.probabilities))
    assert len(shapes) == 1


def test_a_cut_keeps_what_its_nodes_were_drawn_from(target_dir: Path) -> None:
    own = WorkerConfig(model=ModelSection(path=target_dir), engine=EngineSection(kv=KVSection(num_pages=64)))
    model = make_draft_model(own, target=target_dir, threads=1, device=torch.device("cpu"), num_candidates=1)
    sampling = request("a", PROMPT, seed=3, temperature=1.0).sampling
    [draft] = model.propose([Context(("a", 0), "", PROMPT, 5, draws=Draws(sampling, 0))], 6)
    assert list(draft.drawn_from) == [-1, 0, 1, 2, 3, 4]
    assert draft.cut(2).tokens == draft.tokens[:2]
    assert draft.cut(2).drawn_from[0] is draft.drawn_from[0]


def test_a_model_with_another_tokenizer_cannot_be_verified_by_rejection(target_dir: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((target_dir / name).read_text())
    (tmp_path / "tokenizer.json").write_text("{}")
    own = WorkerConfig(model=ModelSection(path=tmp_path))
    with pytest.raises(ModelError, match="set worker.engine.speculation.verification to walk".replace(".", r"\.")):
        make_draft_model(own, target=target_dir, threads=1, device=torch.device("cpu"), num_candidates=1)
