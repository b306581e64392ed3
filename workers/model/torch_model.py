"""A Model of torch operations: runs wherever torch does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from workers.attention.protocol import PagedAttention, PageLayout, Segment, StepBatch
from workers.model.decoder import Decoder
from workers.model.scores import NUM_CHOICES, Continuations, Scores


class TorchModel:
    """A decoder and its attention backend. Mutated only by the engine that made it."""

    def __init__(self, decoder: Decoder, attention: PagedAttention, *, page_size: int) -> None:
        self._decoder = decoder
        self._attention = attention
        self._page_size = page_size

    def forward(self, batch: StepBatch, *, with_logits: bool, num_top_ids: int = 0) -> Scores:
        """As the protocol says; the logits are made in any case, so they are always given."""
        logits = self._decoder.forward(batch, self._attention)
        count = min(num_top_ids, logits.shape[1])
        return Scores([], logits, top_ids=logits.topk(count, dim=-1).indices.tolist() if count else None)

    @torch.inference_mode()
    def continue_greedily(self, batch: StepBatch, *, num_steps: int, least: float) -> Continuations:
        """As the protocol says."""
        made = Continuations([], [])
        paths = torch.ones(len(batch.positions), device=batch.positions.device)
        while True:
            best, chosen = self._decoder.forward(batch, self._attention).softmax(dim=-1).topk(NUM_CHOICES, dim=-1)
            made.token_ids.append([tuple(row) for row in chosen.tolist()])
            made.probabilities.append([tuple(row) for row in best.tolist()])
            paths = paths * best[:, 0]
            if len(made.token_ids) == num_steps or paths.max() < least:
                return made
            batch = self._advanced(batch, chosen[:, 0])

    def copy_page(self, source: int, target: int) -> None:
        self._attention.copy_page(source, target)

    def copy_token(self, source: int, target: int) -> None:
        self._attention.copy_token(source, target)

    @property
    def page_layout(self) -> PageLayout:
        return self._attention.page_layout

    @property
    def page_mapper(self) -> None:
        """Keys are gathered from one tensor: a page elsewhere has to be copied into it."""

    def export_pages(self, pages: Sequence[int], out: memoryview) -> None:
        self._attention.export_pages(pages, out)

    def import_pages(self, block: memoryview, pages: Sequence[int]) -> None:
        self._attention.import_pages(block, pages)

    def _advanced(self, batch: StepBatch, token_ids: torch.Tensor) -> StepBatch:
        """Each row one position on, at the token chosen for it."""
        size, positions = self._page_size, batch.positions + 1
        segments = [replace(segment, num_keys=segment.num_keys + 1) for segment in batch.segments]
        places = zip(segments, positions.tolist(), strict=True)
        slots = [_slot(segment, position, size) for segment, position in places]
        return replace(
            batch, token_ids=token_ids, positions=positions, slots=batch.slots.new_tensor(slots), segments=segments
        )


def _slot(segment: Segment, position: int, page_size: int) -> int:
    return segment.pages[position // page_size] * page_size + position % page_size
