"""The merge of parts by log-sum-exp."""

from __future__ import annotations

import torch

from workers.attention.merge import Merge

CPU = torch.device("cpu")


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
