"""Tiny random models that vLLM can serve: its own sizes of heads, the shipped tokenizer, fp32."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.workers.model.tiny import save_tiny

VOCAB_SIZE = 4096  # of the shipped tokenizer
FAMILIES = ("qwen3", "mistral")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def save_model(directory: Path, family: str, *, tokenizer_from: Path, **changes: Any) -> Path:
    """A Hugging Face directory with random weights, two layers of two key heads of 32. `changes`: of its config."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "sliding_window": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    save_tiny(directory, family, **{**shape, **changes})
    for name in _TOKENIZER_FILES:
        shutil.copy(tokenizer_from / name, directory)
    return directory
