"""Writes a Hugging Face directory of a Llama model as one GGUF file in bf16, without a vocabulary.

    python -m benchmarks.peers.convert_gguf DIRECTORY FILE

llama.cpp rotates neighbouring pairs where Hugging Face rotates halves, so the rows of query and key weights change
places. Norms are kept in fp32, as llama.cpp's own conversion does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found,unused-ignore]
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def convert(directory: Path, path: Path) -> None:
    """Write the file. Raises KeyError for a tensor that llama.cpp has no name for."""
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("no_vocab")
    for name, bits in _tensors(directory):
        _add(writer, name, bits, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, bits: Array, config: Mapping[str, Any]) -> None:
    if bits.ndim == 1:
        writer.add_tensor(_gguf_name(name), _float32(bits))
        return
    if ".q_proj." in name:
        bits = _interleaved(bits, config["num_attention_heads"])
    if ".k_proj." in name:
        bits = _interleaved(bits, config["num_key_value_heads"])
    rows = np.ascontiguousarray(bits).view(np.uint8)  # the writer halves the last dimension of raw bf16 by itself
    writer.add_tensor(_gguf_name(name), rows, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _tensors(directory: Path) -> Iterator[tuple[str, Array]]:
    """Every tensor's name and bf16 bits."""
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + size]).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path}: {name} is {entry['dtype']}; only BF16 is converted")
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data[8 + size + begin : 8 + size + end], dtype=np.uint16)
            yield name, values.reshape(entry["shape"])


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTER_NAMES:
        return f"{OUTER_NAMES[stem]}.weight"
    _, _, index, rest = stem.split(".", 3)
    return f"blk.{index}.{LAYER_NAMES[rest]}.weight"


def _interleaved(bits: Array, num_heads: int) -> Array:
    """Rows `[heads, 2, half]` as `[heads, half, 2]`."""
    rows, columns = bits.shape
    halves = bits.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def _float32(bits: Array) -> Array:
    return np.ascontiguousarray((bits.astype(np.uint32) << 16).view(np.float32))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
