"""A Model of torch operations: runs wherever torch does."""

from __future__ import annotations

from workers.attention.protocol import AttentionBackend, StepBatch
from workers.model.decoder import Decoder
from workers.model.scores import Scores


class TorchModel:
    """A decoder and its attention backend. Mutated only by the engine that made it."""

    def __init__(self, decoder: Decoder, attention: AttentionBackend) -> None:
        self._decoder = decoder
        self._attention = attention

    def forward(self, batch: StepBatch, *, with_logits: bool) -> Scores:
        """As the protocol says; the logits are made in any case, so they are always given."""
        return Scores([], self._decoder.forward(batch, self._attention))

    def copy_page(self, source: int, target: int) -> None:
        self._attention.copy_page(source, target)
