"""What a Hugging Face directory's config.json says of its model. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from protos.errors import ModelError
from workers.model.json_object import JsonObject
from workers.model.rope_config import RopeConfig

Architecture = Literal["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]

_MISTRAL_WINDOW = 4096  # what transformers assumes when the key is absent
_QWEN3_HEAD_DIM = 128  # likewise


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a Llama-family decoder."""

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # queries and keys are normalised per head before they are rotated
    windows: tuple[int | None, ...]  # per layer, tokens; None: all
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]  # of config.json and generation_config.json

    @classmethod
    def from_directory(cls, path: Path) -> ModelConfig:
        """Read config.json, and generation_config.json where it is.

        Raises ModelError, which names the file and the key, if the directory or a key is missing, impossible, or asks
        for what is not supported.
        """
        if not path.is_dir():
            raise ModelError(
                f"{path}: no such directory; set worker.model.path or draft_model to a Hugging Face model directory"
            )
        config = JsonObject.read(path / "config.json")
        architecture = _architecture(config)
        _refuse_unsupported(config)
        num_layers = config.integer("num_hidden_layers")
        num_heads, num_kv_heads, head_dim = _heads(config, architecture)
        max_positions = config.integer("max_position_embeddings")
        vocab_size = config.integer("vocab_size")
        attention_bias = config.flag("attention_bias", default=False)
        llama = architecture == "LlamaForCausalLM"
        qwen3 = architecture == "Qwen3ForCausalLM"
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=config.integer("hidden_size"),
            intermediate_size=config.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.number("rms_norm_eps"),
            max_position_embeddings=max_positions,
            tie_word_embeddings=config.flag("tie_word_embeddings", default=False),
            qkv_bias=architecture == "Qwen2ForCausalLM" or ((llama or qwen3) and attention_bias),
            o_bias=(llama or qwen3) and attention_bias,
            mlp_bias=llama and config.flag("mlp_bias", default=False),
            qk_norm=qwen3,
            windows=_windows(config, architecture, num_layers),
            rope=RopeConfig.from_config(config, max_positions=max_positions),
            eos_token_ids=_eos_token_ids(config, path / "generation_config.json", vocab_size),
        )


def _architecture(config: JsonObject) -> Architecture:
    names = config.texts("architectures")
    supported = get_args(Architecture)
    if not names or names[0] not in supported:
        raise config.error("architectures", f"{list(names)} is not supported; supported: {', '.join(supported)}")
    return cast(Architecture, names[0])


def _refuse_unsupported(config: JsonObject) -> None:
    if config.has("quantization_config"):
        raise config.error("quantization_config", "quantised weights are not supported; take the unquantised model")
    activation = config.text("hidden_act", default="silu")
    if activation != "silu":
        raise config.error("hidden_act", f"{activation!r} is not supported; supported: silu")


def _heads(config: JsonObject, architecture: Architecture) -> tuple[int, int, int]:
    """Query heads, key heads, and the size of a head."""
    num_heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    num_kv_heads = config.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise config.error(
            "num_key_value_heads", f"is {num_kv_heads}; num_attention_heads, {num_heads}, must be a multiple of it"
        )
    if not config.has("head_dim") and architecture != "Qwen3ForCausalLM" and hidden_size % num_heads:
        raise config.error(
            "hidden_size", f"is {hidden_size}; set head_dim, or make it a multiple of num_attention_heads, {num_heads}"
        )
    derived = _QWEN3_HEAD_DIM if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads
    head_dim = config.integer("head_dim", default=derived)
    if head_dim % 2:
        raise config.error("head_dim", f"is {head_dim}; rotary embeddings need an even number")
    return num_heads, num_kv_heads, head_dim


def _windows(config: JsonObject, architecture: Architecture, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's sliding window, by the rules of the architecture's own config class in transformers."""
    match architecture:
        case "LlamaForCausalLM":
            return (None,) * num_layers
        case "MistralForCausalLM":
            if "sliding_window" in config.values and not config.has("sliding_window"):
                return (None,) * num_layers
            return (config.integer("sliding_window", default=_MISTRAL_WINDOW),) * num_layers
        case "Qwen2ForCausalLM" | "Qwen3ForCausalLM":
            return _qwen_windows(config, num_layers)


def _qwen_windows(config: JsonObject, num_layers: int) -> tuple[int | None, ...]:
    slides = config.flag("use_sliding_window", default=False) and config.has("sliding_window")
    window = config.integer("sliding_window") if slides else None
    if not config.has("layer_types"):
        first = config.integer("max_window_layers", default=28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    types = config.texts("layer_types")
    if len(types) != num_layers:
        raise config.error("layer_types", f"has {len(types)} entries; give one for each of {num_layers} layers")
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise config.error(
            "layer_types", f"{unknown[0]!r} is not supported; supported: full_attention, sliding_attention"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _eos_token_ids(config: JsonObject, generation: Path, vocab_size: int) -> tuple[int, ...]:
    sources = [config, JsonObject.read(generation)] if generation.exists() else [config]
    found: set[int] = set()
    for source in sources:
        if source.has("eos_token_id"):
            found.update(source.integers("eos_token_id"))
        if any(token >= vocab_size for token in found):
            raise source.error("eos_token_id", f"{max(found)} is not below vocab_size, {vocab_size}; correct it")
    return tuple(sorted(found))
