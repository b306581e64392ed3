"""How a model rotates its queries and keys, as its config.json says. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from workers.model.json_object import JsonObject

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One kind of rotary scaling with its parameters; those of other kinds keep their neutral value."""

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_positions: int = 0  # positions of the pretraining: llama3, yarn and dynamic
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn
    attention_factor: float = 1.0  # yarn: what cos and sin are multiplied by

    @classmethod
    def from_config(cls, config: JsonObject, *, max_positions: int) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).

        Raises ModelError for a kind that is not supported and for parameters that are missing or impossible.
        """
        rope = _parameters(config)
        kind_key = "rope_type" if rope.has("rope_type") else "type"
        kind = rope.text(kind_key, default="default")
        _refuse_unsupported(rope, kind_key, kind)
        theta = rope.number("rope_theta", default=config.number("rope_theta", default=10_000.0))
        original = _original_positions(config, rope, max_positions)
        match kind:
            case "linear":
                return cls("linear", theta, rope.number("factor"))
            case "dynamic":
                return cls("dynamic", theta, rope.number("factor"), original_positions=max_positions)
            case "llama3":
                return _llama3(rope, theta, original)
            case "yarn":
                return _yarn(rope, theta, original, max_positions)
            case _:
                return cls("default", theta)


def _parameters(config: JsonObject) -> JsonObject:
    for key in ("rope_scaling", "rope_parameters"):
        if config.values.get(key):
            return config.child(key)
    return JsonObject(config.path, {}, "rope_parameters.")


def _refuse_unsupported(rope: JsonObject, kind_key: str, kind: str) -> None:
    nested = [key for key, value in rope.values.items() if isinstance(value, dict)]
    if nested:
        raise rope.error(nested[0], "rotary parameters per layer type are not supported; serve it with the vllm engine")
    if kind not in get_args(RopeKind):
        raise rope.error(kind_key, f"{kind!r} is not supported; supported: {', '.join(get_args(RopeKind))}")
    if rope.number("partial_rotary_factor", default=1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "only 1.0 is supported: the whole head is rotated")


def _original_positions(config: JsonObject, rope: JsonObject, max_positions: int) -> int:
    key = "original_max_position_embeddings"
    return config.integer(key) if config.has(key) else rope.integer(key, default=max_positions)


def _llama3(rope: JsonObject, theta: float, original: int) -> RopeConfig:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", f"is {high}; set it above low_freq_factor, which is {low}")
    return RopeConfig("llama3", theta, rope.number("factor"), original, low, high)


def _yarn(rope: JsonObject, theta: float, original: int, max_positions: int) -> RopeConfig:
    if theta <= 1:
        raise rope.error("rope_theta", f"is {theta}; yarn needs it above 1")
    factor = rope.number("factor", default=max_positions / original)
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original,
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        truncate=rope.flag("truncate", default=True),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _yarn_attention_factor(rope: JsonObject, factor: float) -> float:
    if rope.has("attention_factor"):
        return rope.number("attention_factor")
    if rope.has("mscale") and rope.has("mscale_all_dim"):
        return _mscale(factor, rope.number("mscale")) / _mscale(factor, rope.number("mscale_all_dim"))
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    """The temperature of YaRN (arXiv 2309.00071, equation 22), weighted as DeepSeek-V3 does."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
