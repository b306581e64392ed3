"""Rotary position embeddings: the angle a query or key is turned by, from its position and nothing else."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.model.rope_config import RopeConfig


class Rope:
    """The frequencies of one model (RoFormer, arXiv 2104.09864, equation 15). Never changes.

    A position's rotation depends on the position alone, so a chunked, shared, batched or resumed prompt is rotated as a
    whole one is. Every kind is equal to transformers', with one exception. `dynamic` there re-bases all positions as
    the longest sequence of the batch grows past max_position_embeddings; here the base is fixed by `max_context`, the
    longest sequence ever served. Up to max_position_embeddings both are the plain rotation and equal; beyond it, they
    are equal for a sequence of exactly max_context tokens run whole.
    """

    def __init__(
        self, config: RopeConfig, *, head_dim: int, device: torch.device, max_context: int | None = None
    ) -> None:
        self._attention_factor = config.attention_factor
        self._frequencies = frequencies(config, head_dim=head_dim, max_context=max_context).to(device)

    def tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each [tokens, 1, head_dim / 2], of positions [tokens]; computed in float32."""
        angles = positions[:, None, None].float() * self._frequencies
        return (angles.cos() * self._attention_factor).to(dtype), (angles.sin() * self._attention_factor).to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads [tokens, heads, head_dim] by Rope.tables; element i is paired with element i + head_dim / 2."""
    left, right = heads.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def frequencies(config: RopeConfig, *, head_dim: int, max_context: int | None = None) -> Tensor:
    """The angle per position of each pair, [head_dim / 2] float32."""
    match config.kind:
        case "default":
            return _plain(config.theta, head_dim)
        case "linear":
            return _plain(config.theta, head_dim) / config.factor
        case "dynamic":
            return _plain(_ntk_theta(config, head_dim, max_context or 0), head_dim)
        case "llama3":
            return _llama3(config, head_dim)
        case "yarn":
            return _yarn(config, head_dim)


def _plain(theta: float, head_dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def _ntk_theta(config: RopeConfig, head_dim: int, max_context: int) -> float:
    """The base for max_context positions (transformers' `_compute_dynamic_ntk_parameters`)."""
    stretch = config.factor * max(max_context, config.original_positions) / config.original_positions
    return float(config.theta * (stretch - (config.factor - 1)) ** (head_dim / (head_dim - 2)))


def _llama3(config: RopeConfig, head_dim: int) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, those between interpolated (Llama 3.1)."""
    plain = _plain(config.theta, head_dim)
    wavelengths = 2 * math.pi / plain
    low, high = config.low_freq_factor, config.high_freq_factor
    kept = ((config.original_positions / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / config.factor + kept * plain


def _yarn(config: RopeConfig, head_dim: int) -> Tensor:
    """Interpolation of slow pairs and extrapolation of fast ones (YaRN, arXiv 2309.00071, section 3.2)."""
    plain = _plain(config.theta, head_dim)
    low, high = _yarn_range(config, head_dim)
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / config.factor * interpolated + plain * (1 - interpolated)


def _yarn_range(config: RopeConfig, head_dim: int) -> tuple[float, float]:
    """The pairs that turn beta_fast and beta_slow times over the pretraining's positions."""

    def pair(turns: float) -> float:
        return head_dim * math.log(config.original_positions / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair(config.beta_fast), pair(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return (low, high) if low != high else (low, high + 0.001)  # transformers' guard against a division by zero
