"""The weights of a model directory: which file holds which tensor. Reads headers only; imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from protos.errors import ModelError
from workers.model.config import ModelConfig
from workers.model.json_object import JsonObject

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint and the file it is in."""

    file: Path
    shape: Shape


def open_checkpoint(directory: Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """The stored tensors by name, all those that the model needs among them.

    Raises ModelError, which names the file and the tensor, if a file is missing or truncated, or a tensor is missing,
    of another shape, or of a type that is not supported.
    """
    stored = _stored_tensors(directory)
    needed = tensor_shapes(config)
    for name, shape in needed.items():
        if name not in stored:
            raise ModelError(f"{directory}: no safetensors file holds {name}; copy or convert the whole model again")
        if stored[name].shape != shape:
            raise ModelError(
                f"{stored[name].file}: {name} has shape {list(stored[name].shape)}, config.json makes it "
                f"{list(shape)}; take config.json and weights of the same model"
            )
    return stored


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The name and shape of every tensor that a checkpoint of the architecture must hold; matrices are [out, in]."""
    hidden, inner, query, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    linears = (
        ("self_attn.q_proj", (query, hidden), config.qkv_bias),
        ("self_attn.k_proj", (kv, hidden), config.qkv_bias),
        ("self_attn.v_proj", (kv, hidden), config.qkv_bias),
        ("self_attn.o_proj", (hidden, query), config.o_bias),
        ("mlp.gate_proj", (inner, hidden), config.mlp_bias),
        ("mlp.up_proj", (inner, hidden), config.mlp_bias),
        ("mlp.down_proj", (hidden, inner), config.mlp_bias),
    )
    layer: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    layer |= {f"{name}.weight": shape for name, shape, _ in linears}
    layer |= {f"{name}.bias": shape[:1] for name, shape, biased in linears if biased}
    if config.qk_norm:
        layer |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    shapes: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return _read_header(single)
    if not index.exists():
        raise ModelError(f"{single}: is missing, and so is {index.name}; convert the weights to safetensors")
    weight_map = JsonObject.read(index).child("weight_map")
    names = {name: weight_map.text(name) for name in weight_map.values}
    shards = {shard: _read_header(directory / shard) for shard in sorted(set(names.values()))}
    for name, shard in names.items():
        if name not in shards[shard]:
            raise ModelError(f"{directory / shard}: {name} is missing, though {index.name} lists it; copy both again")
    return {name: shards[shard][name] for name, shard in names.items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file (format: huggingface.co/docs/safetensors: length in 8 bytes, JSON, data)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            data = file.read(min(length, _MAX_HEADER_BYTES))
        data_bytes = path.stat().st_size - 8 - length
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); copy the whole model directory") from error
    if data_bytes < 0:
        raise ModelError(f"{path}: truncated inside its header; copy the file again")
    header = JsonObject.parse(path, data)
    entries = {name: _read_entry(header.child(name)) for name in header.values if name != "__metadata__"}
    _check_length(path, (end for _, end in entries.values()), data_bytes)
    return {name: StoredTensor(path, shape) for name, (shape, _) in entries.items()}


def _read_entry(entry: JsonObject) -> tuple[Shape, int]:
    """A tensor's shape and where its data ends, bytes."""
    dtype, shape = entry.text("dtype"), entry.integers("shape")
    if dtype not in _DTYPE_BYTES:
        raise entry.error("dtype", f"{dtype!r} is not supported; supported: {', '.join(_DTYPE_BYTES)}")
    offsets = entry.integers("data_offsets")
    num_bytes = math.prod(shape) * _DTYPE_BYTES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise entry.error(
            "data_offsets", f"are {list(offsets)}, the shape makes {num_bytes} bytes; copy the file again"
        )
    return shape, offsets[1]


def _check_length(path: Path, ends: Iterable[int], data_bytes: int) -> None:
    expected = max(ends, default=0)
    if data_bytes != expected:
        fault = "truncated" if data_bytes < expected else "too long"
        raise ModelError(
            f"{path}: {fault}: holds {data_bytes} bytes of data, its header says {expected}; copy it again"
        )
