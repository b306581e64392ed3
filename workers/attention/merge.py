"""The merge of a step's parts: from each part's rows to the flat stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Merge:
    """Where each row of the flat stream is found in the parts' rows, one part after another ("part rows").

    Attention over several runs of keys is the sum of the attention over each, weighted by the softmax of their
    log-sum-exps (Hydragen, arXiv 2402.05099, equation 4). Rows of no part, and rows whose log-sum-exps are all -inf,
    become zero. No row reads another one's output, whatever that holds.
    """

    num_tokens: int
    in_order: bool  # the part rows are the flat stream's rows already
    single_rows: Tensor  # [single], rows of one part
    single_sources: Tensor  # [single], their part row
    shared_rows: Tensor  # [shared], rows of several parts
    shared_sources: Tensor  # [shared, parts], their part rows, padded with the row's first
    absent: Tensor  # [shared, parts, 1], true where padded

    @classmethod
    def of(cls, part_rows: Tensor, *, num_tokens: int, device: torch.device) -> Merge:
        """Prepare the merge of part rows [part_rows], which hold each part row's row of the flat stream."""
        counts = part_rows.bincount(minlength=num_tokens)
        order = part_rows.argsort(stable=True)
        first = counts.cumsum(0) - counts
        single, shared = (counts == 1).nonzero()[:, 0], (counts > 1).nonzero()[:, 0]
        nth = torch.arange(int(counts.max()) if num_tokens else 0)
        absent = nth >= counts[shared, None]
        sources = order[first[shared, None] + nth.masked_fill(absent, 0)]
        return cls(
            num_tokens=num_tokens,
            in_order=torch.equal(part_rows, torch.arange(num_tokens)),
            single_rows=single.to(device),
            single_sources=order[first[single]].to(device),
            shared_rows=shared.to(device),
            shared_sources=sources.to(device),
            absent=absent[..., None].to(device),
        )

    @property
    def needs_lse(self) -> bool:
        return len(self.shared_rows) > 0

    def apply(self, outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
        """The flat stream's rows [tokens, heads, head_dim], from each part's output [rows, heads, head_dim].

        `lses` [rows, heads] float32 are needed only where needs_lse; weights and sums are float32.
        """
        output = torch.cat(tuple(outputs)) if len(outputs) > 1 else outputs[0]
        if self.in_order:
            return output
        merged = output.new_zeros(self.num_tokens, *output.shape[1:])
        merged[self.single_rows] = output[self.single_sources]
        if self.needs_lse:
            merged[self.shared_rows] = self._weighted(output, torch.cat(tuple(lses))).to(output.dtype)
        return merged

    def _weighted(self, output: Tensor, lse: Tensor) -> Tensor:
        of_rows = lse[self.shared_sources].masked_fill(self.absent, -torch.inf)  # [shared, parts, heads]
        weights = of_rows.softmax(dim=1).masked_fill(of_rows == -torch.inf, 0)  # a row that sees no key has no softmax
        return torch.einsum("rph,rphd->rhd", weights, output[self.shared_sources].float())
