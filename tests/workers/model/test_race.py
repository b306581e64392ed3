"""The race on the host: the same tokens as the batched draw, whatever the filters, and nothing that upsets it."""

import random

import numpy as np
import pytest
import torch

from protos.messages import Sampling
from workers.model import race
from workers.model.draws import counters, draw_key, draw_keys, exponential, exponential_of
from workers.model.sampler import draw_batch

CPU = torch.device("cpu")
VOCAB = 3000
FILTERS = {
    "none": {},
    "top_k": {"top_k": 40},
    "one": {"top_k": 1},
    "wide": {"top_k": 2500},
    "top_p": {"top_p": 0.9},
    "narrow": {"top_p": 0.001},
    "min_p": {"min_p": 0.02},
    "all": {"top_k": 60, "top_p": 0.95, "min_p": 0.01},
}


def both(logits: torch.Tensor, samplings: list[Sampling], position: int = 0) -> tuple[list[int], list[int]]:
    """What the host draws, and what the batched operations draw."""
    seeds = [sampling.seed for sampling in samplings]
    keys = draw_keys(seeds, [0] * len(seeds), [position] * len(seeds))
    return race.draw(logits.numpy(), samplings, keys), draw_batch(logits, samplings, keys.tolist())


@pytest.mark.parametrize("fields", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0, 30.0])
def test_the_host_draws_what_the_batch_draws(fields: dict[str, float], spread: float) -> None:
    logits = torch.randn(80, VOCAB, generator=torch.Generator().manual_seed(1)) * spread
    temperatures = random.Random(2)
    samplings = [
        Sampling(seed=seed << 40, max_tokens=1, temperature=temperatures.uniform(0.1, 2.0), **fields)  # type: ignore[arg-type]
        for seed in range(80)
    ]
    for position in range(2):
        host, batch = both(logits, samplings, position)
        assert host == batch


def test_equal_scores_are_raced_and_cut_in_order() -> None:
    logits = torch.zeros(50, VOCAB)
    for fields in ({}, {"top_k": 10}, {"top_p": 0.4999}):
        host, batch = both(logits, [Sampling(seed=seed, max_tokens=1, **fields) for seed in range(50)])  # type: ignore[arg-type]
        assert host == batch
        assert len(set(host)) > 5


def test_survivors_are_exactly_the_filters() -> None:
    scores = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], dtype=np.float32))
    cases: list[tuple[dict[str, float], list[int]]] = [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.75}, [1, 3, 4]),
        ({"top_p": 0.0}, [1]),
        ({"min_p": 0.3}, [1, 3, 4]),
        ({"top_k": 3, "top_p": 0.5}, [1, 3]),
        ({"top_k": 4, "top_p": 0.99, "min_p": 0.5}, [1, 3]),
    ]
    for fields, ids in cases:
        assert race.survivors(scores, Sampling(seed=0, max_tokens=1, **fields)).tolist() == ids  # type: ignore[arg-type]


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.full((300, VOCAB), -torch.inf)
    logits[:, 7] = -200.0
    logits[:, 9] = -200.5
    host, batch = both(logits, [Sampling(seed=seed, max_tokens=1) for seed in range(300)])
    assert host == batch
    assert set(host) == {7, 9}


@pytest.mark.parametrize("fields", FILTERS.values(), ids=FILTERS)
def test_logits_that_are_no_numbers_still_give_a_token(fields: dict[str, float]) -> None:
    logits = np.full((1, VOCAB), np.nan, dtype=np.float32)
    [token] = race.draw(logits, [Sampling(seed=0, max_tokens=1, **fields)], draw_keys([0], [0], [0]))  # type: ignore[arg-type]
    assert 0 <= token < VOCAB


def test_keys_made_together_are_the_keys_made_one_by_one() -> None:
    draw = random.Random(0)
    seeds = [0, 1, (1 << 64) - 1, *(draw.getrandbits(64) for _ in range(20))]
    indexes = [draw.randrange(128) for _ in seeds]
    positions = [draw.randrange(100_000) for _ in seeds]
    together = draw_keys(seeds, indexes, positions).tolist()
    assert together == [draw_key(*parts) for parts in zip(seeds, indexes, positions, strict=True)]


def test_single_draws_are_those_of_the_whole_vocabulary() -> None:
    keys = [draw_key(seed, 0, 0) for seed in range(5)]
    whole = exponential(keys, VOCAB, CPU)
    ids = np.array([0, 5, 77, 2999])
    for row, key in enumerate(keys):
        assert torch.equal(exponential_of(counters(VOCAB)[ids] + np.uint64(key)), whole[row, ids])
