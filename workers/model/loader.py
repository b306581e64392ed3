"""Makes a Decoder: from a directory's safetensors, or from a seed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor

from protos.errors import ModelError
from workers.model.checkpoint import StoredTensor, open_checkpoint, tensor_shapes
from workers.model.config import ModelConfig
from workers.model.decoder import Decoder
from workers.model.layers import FeedForward, Layer, Linear, Projection, RMSNorm
from workers.model.rope import Rope

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

Fill = Callable[[str, Tensor], object]  # writes the tensor of a name into memory that is there already


def load_decoder(
    directory: Path, *, dtype: torch.dtype, device: torch.device, max_context: int | None = None
) -> Decoder:
    """The model of a Hugging Face directory, each weight copied once, from its file to its place.

    `max_context`, tokens, matters to `dynamic` rotary scaling alone (see Rope). Raises ModelError, which names the
    file and the key or tensor.
    """
    config = ModelConfig.from_directory(directory)
    stored = open_checkpoint(directory, config)
    with ExitStack() as files:
        read = _reader(files, stored)
        if config.tie_word_embeddings and _HEAD in stored:
            _check_tied(stored[_HEAD].file, read)
        builder = _Builder(config, lambda name, out: out.copy_(read(name)), dtype=dtype, device=device)
        return builder.build(max_context)


def random_decoder(config: ModelConfig, *, dtype: torch.dtype, device: torch.device, seed: int) -> Decoder:
    """A model of the given shape with random weights, the same for the same seed and device: for benchmarks."""
    generator = torch.Generator(device).manual_seed(seed)

    def fill(name: str, out: Tensor) -> None:
        if "norm" in name:
            out.fill_(1.0)
        else:
            out.normal_(0.0, 0.02, generator=generator)

    return _Builder(config, fill, dtype=dtype, device=device).build(None)


def _reader(files: ExitStack, stored: dict[str, StoredTensor]) -> Callable[[str], Tensor]:
    paths = sorted({tensor.file for tensor in stored.values()})
    opened = {path: files.enter_context(safe_open(path, framework="pt")) for path in paths}
    return lambda name: cast(Tensor, opened[stored[name].file].get_tensor(name))


def _check_tied(path: Path, read: Callable[[str], Tensor]) -> None:
    """A tied checkpoint may repeat its embedding as the head, but not hold another head: which would be meant?"""
    if not torch.equal(read(_HEAD), read(_EMBEDDING)):
        raise ModelError(
            f"{path}: {_HEAD} differs from {_EMBEDDING}, though config.json sets tie_word_embeddings; set it to false"
        )


class _Builder:
    """Places the weights of one model. Used once."""

    def __init__(self, config: ModelConfig, fill: Fill, *, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._shapes = tensor_shapes(config)
        self._fill = fill
        self._dtype = dtype
        self._device = device

    def build(self, max_context: int | None) -> Decoder:
        config = self._config
        embedding = self._tensor(_EMBEDDING)
        head = embedding if config.tie_word_embeddings else self._tensor(_HEAD)
        return Decoder(
            config=config,
            embedding=embedding,
            layers=tuple(self._layer(index) for index in range(config.num_layers)),
            norm=self._norm("model.norm"),
            head=Linear(head),
            rope=Rope(config.rope, head_dim=config.head_dim, device=self._device, max_context=max_context),
        )

    def _layer(self, index: int) -> Layer:
        prefix = f"model.layers.{index}"
        attention, feed_forward = f"{prefix}.self_attn", f"{prefix}.mlp"
        return Layer(
            attention_norm=self._norm(f"{prefix}.input_layernorm"),
            projection=Projection(
                num_heads=self._config.num_heads,
                num_kv_heads=self._config.num_kv_heads,
                head_dim=self._config.head_dim,
                linear=self._linear(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
                norm=self._head_norm(attention),
            ),
            attention_output=self._linear(f"{attention}.o_proj"),
            feed_forward_norm=self._norm(f"{prefix}.post_attention_layernorm"),
            feed_forward=FeedForward(
                self._linear(f"{feed_forward}.gate_proj", f"{feed_forward}.up_proj"),
                self._linear(f"{feed_forward}.down_proj"),
            ),
            window=self._config.windows[index],
        )

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self._tensor(f"{name}.weight"), self._config.rms_norm_eps)

    def _head_norm(self, attention: str) -> RMSNorm | None:
        """One norm over query and key heads together: each head has its kind's weight."""
        if not self._config.qk_norm:
            return None
        query, key = self._tensor(f"{attention}.q_norm.weight"), self._tensor(f"{attention}.k_norm.weight")
        counts = (self._config.num_heads, self._config.num_kv_heads)
        weight = torch.cat([query.expand(counts[0], -1), key.expand(counts[1], -1)])  # [heads + kv_heads, head_dim]
        return RMSNorm(weight, self._config.rms_norm_eps)

    def _linear(self, *names: str) -> Linear:
        """One product for several of the checkpoint's, their rows one after another."""
        weight = self._tensor(*(f"{name}.weight" for name in names))
        biased = f"{names[0]}.bias" in self._shapes
        return Linear(weight, self._tensor(*(f"{name}.bias" for name in names)) if biased else None)

    def _tensor(self, *names: str) -> Tensor:
        shapes = [self._shapes[name] for name in names]
        counts = [shape[0] for shape in shapes]
        out = torch.empty(sum(counts), *shapes[0][1:], dtype=self._dtype, device=self._device)
        for name, rows in zip(names, torch.split(out, counts), strict=True):
            self._fill(name, rows)
        return out
