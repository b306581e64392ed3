"""The same model with weights of eight bits, as compressed-tensors keeps them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

LEVELS = 127


def save_int8(model: Path, directory: Path) -> None:
    """Quantise the linear layers of a model of one safetensors file, by output channel; inputs as they come."""
    shutil.copytree(model, directory)
    weights = load_file(model / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].float().abs().amax(dim=1, keepdim=True) / LEVELS  # [out, 1]
        weights[name] = (weights[name].float() / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**bits, "strategy": "token", "dynamic": True},
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(config))
