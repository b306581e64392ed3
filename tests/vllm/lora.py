"""A LoRA adapter of random weights, and the same model with the adapter merged into its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 8
ALPHA = 16.0
TARGETS = ("q_proj", "v_proj", "o_proj", "down_proj")


def save_adapter(model: Path, adapter: Path, merged: Path, *, seed: int = 0) -> None:
    """Make both for the model of one safetensors file; the adapter moves its logits a little."""
    adapter.mkdir()
    shutil.copytree(model, merged)
    weights, generator = load_file(model / "model.safetensors"), torch.Generator().manual_seed(seed)
    deltas: dict[str, torch.Tensor] = {}
    for name in [name for name in weights if name.endswith(".weight") and name.split(".")[-2] in TARGETS]:
        wide, narrow = weights[name].shape  # [out, in]
        down = torch.randn(RANK, narrow, generator=generator) * 0.2
        up = torch.randn(wide, RANK, generator=generator) * 0.2
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        deltas |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        weights[name] = weights[name] + ALPHA / RANK * (up @ down).to(weights[name].dtype)
    save_file(deltas, adapter / "adapter_model.safetensors")
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
