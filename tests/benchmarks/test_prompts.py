"""Prompts: the same for the same seed, without a common beginning for another, shared exactly where they share."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from benchmarks.prompts import CHARS_PER_TOKEN, Code, RandomTokens, Shape, lengths, prompts

MIXED = Shape(num_prompts=12, shortest_tokens=16, longest_tokens=256)
SHARED = Shape(num_prompts=8, shortest_tokens=8, longest_tokens=32, prefix_tokens=100, num_prefixes=2)
TOKENS = RandomTokens(4096)


@pytest.fixture(scope="module")
def code() -> Code:
    return Code.heldout()


@pytest.mark.parametrize("shape", [MIXED, SHARED])
def test_the_same_seed_gives_the_same_prompts(shape: Shape, code: Code) -> None:
    assert prompts(shape, 7, TOKENS) == prompts(shape, 7, TOKENS)
    assert prompts(shape, 7, code) == prompts(shape, 7, code)


def test_token_prompts_share_no_beginning_within_and_across_seeds() -> None:
    made = [prompt for seed in range(3) for prompt in prompts(MIXED, seed, TOKENS)]
    assert all(a[:4] != b[:4] for a, b in combinations(made, 2))


def test_code_prompts_share_no_beginning_within_and_across_seeds(code: Code) -> None:
    made = [prompt for seed in range(3) for prompt in prompts(MIXED, seed, code)]
    assert all(a[:10] != b[:10] for a, b in combinations(made, 2))


def test_token_prompts_are_exactly_as_long_as_asked_and_in_the_vocabulary() -> None:
    made = prompts(MIXED, 1, RandomTokens(50, first_id=3))
    assert (min(map(len, made)), max(map(len, made))) == (16, 256)
    assert all(3 <= token < 50 for prompt in made for token in prompt)


def test_code_prompts_are_about_as_long_as_asked(code: Code) -> None:
    longest = max(prompts(MIXED, 1, code), key=len)
    assert len(longest) == round(MIXED.longest_tokens * CHARS_PER_TOKEN)


def test_groups_share_their_prefix_and_only_that() -> None:
    made = prompts(SHARED, 3, TOKENS)
    groups = {prompt[:100] for prompt in made}
    assert len(groups) == SHARED.num_prefixes
    assert [sum(prompt[:100] == group for prompt in made) for group in groups] == [4, 4]
    assert all(a[:104] != b[:104] for a, b in combinations(made, 2))


def test_lengths_differ_and_their_sum_does_not_depend_on_the_seed() -> None:
    one, other = (lengths(20, 16, 1024, random.Random(seed)) for seed in (1, 2))
    assert one != other
    assert sorted(one) == sorted(other)
    assert (min(one), max(one)) == (16, 1024)


def test_one_length_is_allowed() -> None:
    assert lengths(1, 5, 9, random.Random(0)) == [5]


@pytest.mark.parametrize(("shortest", "longest"), [(0, 5), (6, 5)])
def test_impossible_lengths_are_refused(shortest: int, longest: int) -> None:
    with pytest.raises(ValueError, match="lengths from"):
        lengths(3, shortest, longest, random.Random(0))


def test_no_source_text_is_refused() -> None:
    with pytest.raises(ValueError, match="no source text"):
        Code([])
