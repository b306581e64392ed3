"""The model: from a step's flat stream to logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.attention.protocol import AttentionBackend, StepBatch
from workers.model.config import ModelConfig
from workers.model.layers import Layer, Linear, RMSNorm
from workers.model.rope import Rope


@dataclass(frozen=True, slots=True)
class Decoder:
    """A Llama-family decoder without state of its own: keys and values are the attention backend's."""

    config: ModelConfig
    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: RMSNorm
    head: Linear  # [vocab, hidden]; shares the embedding's memory in a tied model
    rope: Rope

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @torch.inference_mode()
    def forward(self, batch: StepBatch, attention: AttentionBackend) -> Tensor:
        """Logits [logit_rows, vocab] float32 of the rows that the batch wants; stores every row's keys and values."""
        attention.begin(batch)
        hidden = F.embedding(batch.token_ids, self.embedding)
        cos, sin = self.rope.tables(batch.positions, hidden.dtype)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            query, key, value = layer.projection(layer.attention_norm(hidden), cos, sin)
            attended = attention.attend(index, query, key, value, window=layer.window)
            if index == last:  # the other rows were needed for their keys and values alone
                hidden, attended = hidden[batch.logit_rows], attended[batch.logit_rows]
            hidden = layer.finish(hidden, attended)
        return self.head(self.norm(hidden)).float()
