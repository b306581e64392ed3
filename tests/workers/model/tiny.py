"""Tiny random models that transformers makes, and a driver that feeds a Decoder through a page table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from workers.attention.protocol import KVShape, Segment, StepBatch
from workers.attention.torch_backend import TorchAttention
from workers.model.decoder import Decoder

VOCAB_SIZE = 96
MAX_POSITIONS = 128
PAGE_SIZE = 8
NUM_PAGES = 64
CPU = torch.device("cpu")

_FAMILIES: Mapping[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A model whose every weight is random: biases and norms too, so that none may be left out unnoticed."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    make_config, make_model = _FAMILIES[family]
    torch.manual_seed(11)
    model = make_model(make_config(**{**shape, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model


def save_tiny(directory: Path, family: str, **changes: Any) -> PreTrainedModel:
    model = tiny_model(family, **changes)
    model.save_pretrained(directory)
    return model


class Driver:
    """Runs sequences through a Decoder. Pages are handed out from the top and the bottom in turn, never in a row."""

    def __init__(self, decoder: Decoder) -> None:
        config = decoder.config
        shape = KVShape(config.num_layers, NUM_PAGES, PAGE_SIZE, config.num_kv_heads, config.head_dim)
        self._decoder = decoder
        self._attention = TorchAttention(shape, dtype=decoder.dtype, device=CPU)
        self._free = [
            page for pair in zip(range(NUM_PAGES // 2), range(NUM_PAGES - 1, 0, -1), strict=False) for page in pair
        ]
        self._pages: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    def step(self, growth: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Append tokens to sequences; returns the logits [tokens, vocab] of each one's new tokens."""
        positions: list[int] = []
        slots: list[int] = []
        segments = []
        for name, tokens in growth.items():
            start = self._lengths.get(name, 0)
            length = self._lengths[name] = start + len(tokens)
            pages = self._pages.setdefault(name, [])
            while len(pages) * PAGE_SIZE < length:
                pages.append(self._free.pop())
            segments.append(Segment(len(positions), len(tokens), tuple(pages), 0, length))
            positions += range(start, length)
            slots += [
                pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE for position in range(start, length)
            ]
        ids = torch.tensor([token for tokens in growth.values() for token in tokens])
        rows = torch.arange(len(ids))
        batch = StepBatch(ids, torch.tensor(positions), torch.tensor(slots), tuple(segments), rows)
        logits = self._decoder.forward(batch, self._attention)
        return dict(zip(growth, torch.split(logits, [len(tokens) for tokens in growth.values()]), strict=True))
