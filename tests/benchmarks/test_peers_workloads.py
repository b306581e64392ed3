"""What engines are asked: lengths, what is shared, and that nothing else is."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest

from benchmarks.peers.models import MODEL_NAMES, Shape
from benchmarks.peers.workloads import WORKS, CodeTokens, Work, prefixes, prompts, seed_of, source, works

IDS = source("random")
TREE = Work(12, 4, 9, ((1, 40), (3, 20)))


@pytest.mark.parametrize("name", WORKS)
def test_prompts_have_their_lengths_and_only_the_prefix_in_common(name: str) -> None:
    work = WORKS[name]
    shared = prefixes(work, 1, IDS)
    made = prompts(work, shared, 2, IDS)
    own = [prompt[work.prefix_tokens :] for prompt in made]
    assert len(made) == work.batch
    assert (min(map(len, own)), max(map(len, own))) == (work.shortest_tokens, work.longest_tokens)
    assert all(one[:4] != other[:4] for one, other in combinations(own, 2))
    assert {prompt[: work.prefix_tokens] for prompt in made} == (set(shared) or {()})
    assert all(0 < token < 4096 for prompt in made for token in prompt)


def test_a_tree_has_its_nodes_and_deals_them_evenly() -> None:
    paths = prefixes(TREE, 1, IDS)
    assert len({path[:40] for path in paths}) == 1
    assert len({path[40:44] for path in paths}) == 3
    assert {len(path) for path in paths} == {TREE.prefix_tokens} == {60}
    assert TREE.distinct_prefix_tokens == 100
    assert set(Counter(prompt[:60] for prompt in prompts(TREE, paths, 2, IDS)).values()) == {4}


def test_other_seeds_share_nothing_with_one_another() -> None:
    work = WORKS["distinct-8"]
    made = [prompt for seed in range(4) for prompt in prompts(work, [], seed, IDS)]
    assert all(one[:4] != other[:4] for one, other in combinations(made, 2))


def test_the_same_seed_gives_the_same_prompts() -> None:
    assert prompts(TREE, prefixes(TREE, 1, IDS), 2, IDS) == prompts(TREE, prefixes(TREE, 1, IDS), 2, IDS)


def test_seeds_differ_with_every_part() -> None:
    assert len({seed_of(*parts) for parts in [(1, 2), (1, 3), (12,), (1, "2", ""), ("a", 2)]}) == 5


def test_code_is_exact_in_length_and_never_begins_alike() -> None:
    code = CodeTokens()
    made = prompts(Work(6, 16, 700), [], 5, code)
    assert sorted(map(len, made))[0] == 16
    assert max(map(len, made)) == 700
    assert all(one[:14] != other[:14] for one, other in combinations(made, 2))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_every_workload_fits_its_model_and_shrinks_when_quick(name: str) -> None:
    (model,) = [model for model in MODEL_NAMES if model == name]
    for work in works(model).values():
        assert work.context_tokens <= Shape.of(model).max_position_embeddings
        assert work.quick().context_tokens < work.context_tokens
        assert work.quick().prefix_tokens <= work.prefix_tokens
