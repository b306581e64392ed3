"""The merge of parts by log-sum-exp."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.attention.merge import Merge

CPU = torch.device("cpu")
LSE = st.one_of(st.floats(-200, 200, width=32), st.just(-float("inf")))


def test_steps_and_rows_of_no_part() -> None:
    merge = Merge.of(torch.tensor([], dtype=torch.int64), num_tokens=3, device=CPU)
    assert torch.equal(merge.apply([torch.zeros(0, 2, 4)], [torch.zeros(0, 2)]), torch.zeros(3, 2, 4))
    assert not Merge.of(torch.tensor([], dtype=torch.int64), num_tokens=0, device=CPU).needs_lse


def test_no_row_reads_the_parts_of_another() -> None:
    """Rows of fewer parts are padded; the padding must not bring in what another sequence computed."""
    merge = Merge.of(torch.tensor([0, 0, 0, 1, 1]), num_tokens=2, device=CPU)
    ruined, own = torch.full((3, 1, 4), torch.nan), torch.ones(2, 1, 4)
    assert torch.equal(merge.apply([ruined, own], [torch.zeros(3, 1), torch.zeros(2, 1)])[1], own[0])


def test_a_row_whose_parts_hold_no_key_is_zero() -> None:
    merge = Merge.of(torch.tensor([0, 1, 0, 1]), num_tokens=2, device=CPU)
    lses = [torch.full((2, 1), -torch.inf), torch.tensor([[-torch.inf], [3.0]])]
    outputs = [torch.zeros(2, 1, 4), torch.tensor([[[0.0]], [[5.0]]]).expand(2, 1, 4)]
    assert merge.apply(outputs, lses).tolist() == [[[0.0] * 4], [[5.0] * 4]]


@given(st.lists(st.tuples(LSE, LSE), min_size=2, max_size=7), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_parts_merge_alike_in_any_order(lses: list[tuple[float, float]], rng: random.Random) -> None:
    order = list(range(len(lses)))
    rng.shuffle(order)
    values = _values(len(lses))
    merged = _merged(values, lses)
    shuffled = _merged(values[order], [lses[index] for index in order])
    torch.testing.assert_close(shuffled, merged, atol=1e-5, rtol=0)


@given(st.lists(st.tuples(LSE, LSE), min_size=3, max_size=7), st.data())
@settings(deadline=None)
def test_parts_merge_alike_however_they_are_bracketed(lses: list[tuple[float, float]], data: st.DataObject) -> None:
    """Any run of neighbours merged first, with the log-sum-exp of theirs, stands for them."""
    first = data.draw(st.integers(0, len(lses) - 2))
    last = data.draw(st.integers(first + 2, len(lses)))
    values = _values(len(lses))
    inner = _merged(values[first:last], lses[first:last])
    even, odd = torch.tensor(lses[first:last]).logsumexp(0).tolist()
    nested = _merged(
        torch.cat([values[:first], inner[None], values[last:]]), [*lses[:first], (even, odd), *lses[last:]]
    )
    torch.testing.assert_close(nested, _merged(values, lses), atol=1e-4, rtol=0)


def _values(num_parts: int) -> torch.Tensor:
    return torch.randn(num_parts, 2, 4, generator=torch.Generator().manual_seed(num_parts))


def _merged(values: torch.Tensor, lses: list[tuple[float, float]]) -> torch.Tensor:
    """One row of two heads, [2, head_dim], from as many parts as there are pairs."""
    merge = Merge.of(torch.zeros(len(lses), dtype=torch.int64), num_tokens=1, device=CPU)
    return merge.apply([part[None] for part in values], [torch.tensor([pair]) for pair in lses])[0]


def test_the_order_of_parts_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2]), torch.tensor([2]), torch.tensor([4])]
    outputs = [torch.randn(len(part), 3, 8, generator=generator) for part in rows]
    lses = [torch.randn(len(part), 3, generator=generator) * 20 for part in rows]

    def merged(order: list[int]) -> torch.Tensor:
        merge = Merge.of(torch.cat([rows[index] for index in order]), num_tokens=5, device=CPU)
        return merge.apply([outputs[index] for index in order], [lses[index] for index in order])

    torch.testing.assert_close(merged([0, 1, 2, 3]), merged([3, 2, 0, 1]), atol=1e-6, rtol=0)


def test_a_part_of_no_keys_has_no_weight() -> None:
    merge = Merge.of(torch.tensor([0, 0]), num_tokens=1, device=CPU)
    kept, empty = torch.full((1, 2, 4), 3.0), torch.full((1, 2, 4), 7.0)
    lses = [torch.full((1, 2), -80.0), torch.full((1, 2), -torch.inf)]
    assert torch.equal(merge.apply([kept, empty], lses), kept)


def test_merging_in_two_goes_equals_merging_in_one() -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = [torch.randn(1, 2, 4, generator=generator, dtype=torch.float32) for _ in range(3)]
    lses = [torch.tensor([[80.0, -80.0]]), torch.tensor([[79.0, -81.0]]), torch.tensor([[-80.0, 80.0]])]
    pair = Merge.of(torch.tensor([0, 0]), num_tokens=1, device=CPU)
    triple = Merge.of(torch.tensor([0, 0, 0]), num_tokens=1, device=CPU)
    inner = pair.apply(outputs[:2], lses[:2])
    inner_lse = torch.logaddexp(lses[0], lses[1])
    torch.testing.assert_close(
        pair.apply([inner, outputs[2]], [inner_lse, lses[2]]), triple.apply(outputs, lses), atol=1e-6, rtol=0
    )
