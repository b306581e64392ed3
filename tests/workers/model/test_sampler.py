"""Sampling: exact distributions, filters, penalties, and draws that depend on nothing but the row."""

import math
from typing import Any

import pytest
import torch

from protos.messages import Sampling
from workers.model.draws import draw_key, exponential
from workers.model.greedy import is_plain
from workers.model.sampler import Row, position_logprobs, sample

VOCAB = 50
CPU = torch.device("cpu")
GOLDEN_DRAWS = [
    3.777808319,
    0.741577332,
    2.99895546,
]  # from a scalar SplitMix64; a change would change every seeded text


def row(seed: int = 0, *, index: int = 0, tokens: tuple[int, ...] = (1,), num_prompt: int = 1, **fields: Any) -> Row:
    banned = fields.pop("banned_ids", ())
    return Row(Sampling(seed=seed, max_tokens=9, **fields), index, tokens, num_prompt, banned)


def some_logits(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0))


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom, over candidates expected at least five times."""
    expected = probs * counts.sum()
    kept = expected >= 5
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum()), int(kept.sum()) - 1


def frequencies(logits: torch.Tensor, num_draws: int = 8000, **fields: Any) -> torch.Tensor:
    chosen: list[int] = []
    for first in range(0, num_draws, 500):
        rows = [row(seed, **fields) for seed in range(first, first + 500)]
        chosen += sample(logits.expand(500, -1), rows)
    return torch.bincount(torch.tensor(chosen), minlength=VOCAB).double()


def nucleus_edge(probs: torch.Tensor, mass: float) -> torch.Tensor:
    """The least probability in the smallest set that holds the mass."""
    ordered = probs.sort(descending=True).values
    return ordered[int((ordered.cumsum(0) < mass).sum())]


def assert_distributed(counts: torch.Tensor, probs: torch.Tensor) -> None:
    statistic, freedom = chi_square(counts, probs)
    assert freedom > 0
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    assert counts[probs == 0].sum() == 0


def test_plain_sampling_follows_the_softmax() -> None:
    logits = some_logits()
    assert_distributed(frequencies(logits), logits[0].double().softmax(-1))


def test_temperature() -> None:
    logits = some_logits()
    assert_distributed(frequencies(logits, temperature=2.0), (logits[0].double() / 2).softmax(-1))


def test_positions_are_independent_draws() -> None:
    logits = some_logits().expand(4000, -1)
    chosen = sample(logits, [row(7, tokens=(1,) * (1 + position)) for position in range(4000)])
    assert_distributed(torch.bincount(torch.tensor(chosen), minlength=VOCAB).double(), logits[0].double().softmax(-1))


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 3}, lambda p: p >= p.sort(descending=True).values[2]),
        ({"top_p": 0.7}, lambda p: p >= nucleus_edge(p, 0.7)),
        ({"min_p": 0.2}, lambda p: p >= 0.2 * p.max()),
    ],
)
def test_filters_keep_the_right_candidates_in_proportion(fields: dict[str, float], kept: Any) -> None:
    logits = some_logits()
    probs = logits[0].double().softmax(-1)
    probs = torch.where(kept(probs), probs, 0.0)
    assert 0 < int((probs > 0).sum()) < VOCAB
    assert_distributed(frequencies(logits, **fields), probs / probs.sum())


def test_top_p_is_taken_after_top_k() -> None:
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1] + [1e-9] * (VOCAB - 4)]))
    counts = frequencies(logits, num_draws=2000, top_k=2, top_p=0.5)
    assert counts[0] == 2000  # 0.4 / 0.7 already holds half of what top-k left


def test_rows_do_not_depend_on_their_neighbours() -> None:
    logits = some_logits(6)
    rows = [
        row(1),
        row(2, temperature=0.0),
        row(3, top_k=5, top_p=0.9),
        row(4, repetition_penalty=1.3, tokens=(1, 2, 3), num_prompt=1),
        row(5, index=3),
        row(6, min_p=0.1),
    ]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], [rows[i]])[0] for i in range(6)]
    assert together == sample(logits.flip(0), rows[::-1])[::-1]


def test_greedy_is_the_argmax_and_leaves_logits_alone() -> None:
    logits = some_logits(3)
    before = logits.clone()
    assert sample(logits, [row(temperature=0.0, repetition_penalty=1.1)] * 3) is not None
    assert sample(logits, [row(temperature=0.0)] * 3) == logits.argmax(-1).tolist()
    assert torch.equal(logits, before)


def test_a_plain_row_needs_no_row() -> None:
    logits = some_logits(4)
    rows = [row(temperature=0.0), row(3), row(temperature=0.0, tokens=(1, 2), repetition_penalty=1.5), row(4, top_k=5)]
    assert sample(logits, [None, *rows[1:]]) == sample(logits, rows)
    assert sample(logits, [None] * 4) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("fields", "plain"),
    [
        ({}, True),
        ({"top_k": 5, "top_p": 0.5, "ignore_eos": True, "logprobs": 2}, True),
        ({"temperature": 0.7}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"min_tokens": 2}, False),
    ],
)
def test_plain_is_greedy_without_anything_that_moves_logits(fields: dict[str, Any], plain: bool) -> None:
    assert is_plain(Sampling(seed=0, max_tokens=9, **{"temperature": 0.0, **fields})) == plain


def test_penalties_bias_and_bans() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.0, 1.9
    greedy = {"temperature": 0.0}
    assert sample(logits, [row(**greedy)]) == [5]
    assert sample(logits, [row(tokens=(5,), repetition_penalty=1.2, **greedy)]) == [6]
    assert sample(logits, [row(tokens=(1, 5), num_prompt=1, presence_penalty=0.5, **greedy)]) == [6]
    assert sample(logits, [row(tokens=(5, 5), num_prompt=2, presence_penalty=0.5, **greedy)]) == [
        5
    ]  # prompt: no matter
    assert sample(logits, [row(tokens=(1, 5, 6, 6), frequency_penalty=0.2, **greedy)]) == [5]
    assert sample(logits, [row(logit_bias={7: 3.0}, **greedy)]) == [7]
    assert sample(logits, [row(banned_ids=(5,), **greedy)]) == [6]


def test_a_negative_logit_is_penalized_downwards() -> None:
    logits = torch.full((1, VOCAB), -1.0)
    logits[0, 5] = -0.9
    assert sample(logits, [row(tokens=(5,), repetition_penalty=2.0, temperature=0.0)]) != [5]


def test_draws_are_reproducible_across_versions() -> None:
    assert draw_key(1, 2, 3) == draw_key(1, 2, 3)
    assert len({draw_key(s, i, p) for s in range(9) for i in range(9) for p in range(9)}) == 729
    first = exponential([draw_key(0, 0, 0)], 3, CPU)
    assert first[0].tolist() == pytest.approx(GOLDEN_DRAWS, rel=1e-6)


def test_draws_are_standard_exponential() -> None:
    values = exponential([draw_key(seed, 0, 0) for seed in range(200)], 2000, CPU).double()
    assert float(values.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(values.var()) == pytest.approx(1.0, abs=0.03)
    assert float((values > 3).double().mean()) == pytest.approx(math.exp(-3), rel=0.03)
    assert bool((values > 0).all())


def test_logprobs_report_the_model_not_the_sampler() -> None:
    logits = some_logits(2)
    exact = logits.double().log_softmax(-1)
    first, second = position_logprobs(logits, [3, 4], [0, 2])
    assert (first.token_id, first.top) == (3, ())
    assert first.logprob == pytest.approx(float(exact[0, 3]), abs=1e-5)
    assert [token for token, _ in second.top] == exact[1].topk(2).indices.tolist()
