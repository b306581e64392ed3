"""The layers of a Llama-family decoder: weights as plain tensors, and functions over the flat stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from workers.model.rope import rotate


@dataclass(frozen=True, slots=True)
class Linear:
    """hidden [tokens, in] to [tokens, out]."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension, in float32 where transformers is."""

    weight: Tensor  # broadcast against the input
    eps: float

    def __call__(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


@dataclass(frozen=True, slots=True)
class Projection:
    """A layer's queries, keys and values, from one product."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    linear: Linear  # rows: queries, keys, values
    norm: RMSNorm | None  # of queries and keys, weight [heads + kv_heads, head_dim]

    def __call__(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [tokens, heads, head_dim] and keys, and values, [tokens, kv_heads, head_dim]."""
        num_rotated = self.num_heads + self.num_kv_heads
        heads = self.linear(hidden).view(len(hidden), -1, self.head_dim)
        rotated, value = torch.split(heads, [num_rotated, self.num_kv_heads], dim=1)
        if self.norm is not None:
            rotated = self.norm(rotated)
        query, key = torch.split(rotate(rotated, cos, sin), [self.num_heads, self.num_kv_heads], dim=1)
        return query, key, value


@dataclass(frozen=True, slots=True)
class FeedForward:
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    gate_up: Linear  # rows: gate, up
    down: Linear

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the decoder. Its attention is the backend's."""

    attention_norm: RMSNorm
    projection: Projection
    attention_output: Linear
    feed_forward_norm: RMSNorm
    feed_forward: FeedForward
    window: int | None

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: hidden [tokens, hidden] and attended [tokens, heads, head_dim] to the next hidden."""
        hidden = hidden + self.attention_output(attended.flatten(1))
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))
