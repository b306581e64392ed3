"""Attention in vLLM on CPUs that reads shared prefixes once: our planner and native kernels behind vLLM's interfaces.

It takes the place of vLLM's own CPU backend, from which it inherits: what it cannot compute, that one does. Keys and
values stay in vLLM's memory, block for block, so that whoever zeroes or copies blocks may go on; only their order
within a block is ours. Therefore one of the two computes all layers of a model, which is settled once, before any key
is stored, by every builder alike.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from protos.errors import SetupError
from workers.attention.planner import Planner
from workers.engine.vllm.block_paths import BlockPaths
from workers.engine.vllm.flat_step import FlatStep, Requests
from workers.engine.vllm.settings import SECTION
from workers.kernels.borrowed import BorrowedAttention, torch_team
from workers.kernels.calibration import calibrated_cost
from workers.kernels.library import PAGE_MULTIPLE, Library, load
from workers.model.batch import AttentionWork

log = logging.getLogger(__name__)

HEAD_MULTIPLE: Final = 32  # the kernels round heads up to this, and a block of vLLM's has no room for more
DTYPES: Final = (torch.float32, torch.bfloat16)


def register() -> None:
    """Have vLLM take this backend for CPUs. In its worker process, before the model is made."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.SharedPrefixBackend")


def counts(model_runner: Any) -> dict[str, int] | None:
    """Running totals of one layer: `segments`, `keys` needed, and `read_keys`; None if vLLM's own backend computes."""
    groups = [group for groups in getattr(model_runner, "attn_groups", ()) for group in groups]
    builders = [group.get_metadata_builder() for group in groups]
    found = [b.sheet.work for b in builders if isinstance(b, SharedPrefixBuilder) and b.sheet is not None]
    return dict(zip(("segments", "keys", "read_keys"), found[0], strict=True)) if found else None


class Sheet:
    """Shared attention for the layers of one builder: those that keep as many keys. Mutated only by the worker."""

    def __init__(self, library: Library, layers: Mapping[str, Attention], settings: Mapping[str, Any]) -> None:
        """Planning and memory come with the first step, when vLLM has allocated its cache."""
        self._library = library
        self._layers = layers
        self._index = {name: index for index, name in enumerate(layers)}
        self._threads = int(settings.get("threads") or torch.get_num_threads())
        self._mode = settings.get("sharing", "planned")
        self._attention: BorrowedAttention | None = None
        self._planner: Planner | None = None
        self._paths = BlockPaths()
        self._begun: FlatStep | None = None
        self.work = AttentionWork()

    def plan(self, requests: Requests) -> FlatStep:
        """Group a step's requests, and count what that is worth."""
        if self._attention is None or self._planner is None:
            self._attention, self._planner = self._bind()
        page_size = self._attention.shape.page_size
        grouping = self._planner.group(requests.branches(self._paths, page_size))
        step = FlatStep(requests, grouping, page_size)
        self.work = self.work.plus(step.work(requests))
        return step

    def attend(self, layer: str, step: FlatStep, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        """Store the step's keys and values of a layer, and attend. Rows beyond the step's are padding."""
        assert self._attention is not None, "attention before a plan"
        if self._begun is not step:
            self._attention.begin(step)
            self._begun = step
        query, key, value = (_whole(heads[: step.num_rows]) for heads in (query, key, value))
        window = self._layers[layer].sliding_window
        self._attention.attend(self._index[layer], query, key, value, out, window=window)

    def _bind(self) -> tuple[BorrowedAttention, Planner]:
        """Takes some tenths of a second, for the costs are measured."""
        memory = [layer.kv_cache for layer in self._layers.values()]
        num_heads = next(iter(self._layers.values())).num_heads
        attention = BorrowedAttention(
            self._library, memory, num_heads=num_heads, threads=self._threads, team=torch_team()
        )
        cost = calibrated_cost(attention, attention.shape)
        log.info("shared attention with the %s kernels; costs %s", self._library.variant.name, cost)
        return attention, Planner(cost, attention.shape.page_size, mode=self._mode)


@dataclass(slots=True)
class SharedPrefixMetadata:
    """One step, for all layers of a builder."""

    sheet: Sheet
    step: FlatStep


class SharedPrefixBuilder(CPUAttentionMetadataBuilder):  # type: ignore[misc]
    """Turns vLLM's batches into steps of segments. `sheet`: None where vLLM's own backend computes."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.sheet: Sheet | None = None
        settings = vllm_config.additional_config.get(SECTION, {})
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
        try:
            check_model(vllm_config, layers)
            library = load("auto", _directory(settings))
        except SetupError as error:
            if next(iter(layers)) in layer_names:
                log.warning("vLLM's own attention is used: %s", error.message)
            return
        self.sheet = Sheet(library, {name: layers[name] for name in layer_names}, settings)
        for name in layer_names:
            layers[name].isa = library.build  # names the form of what is stored, as vLLM's own backend does

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SharedPrefixMetadata | CPUAttentionMetadata:
        """As vLLM says; called once a step, before the model runs."""
        if self.sheet is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("rows that see later ones; set worker.engine.vllm.attention to vllm")
        return SharedPrefixMetadata(self.sheet, self.sheet.plan(_requests(common_attn_metadata)))


class SharedPrefixImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """One layer's attention."""

    def forward(
        self,
        layer: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SharedPrefixMetadata | CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Tensors are [rows, heads, head_dim]; the result goes to `output`, which is returned."""
        if isinstance(attn_metadata, SharedPrefixMetadata):
            attn_metadata.sheet.attend(layer.layer_name, attn_metadata.step, query, key, value, output)
            return output
        if attn_metadata is not None:
            self._store(layer, key, value, kv_cache)
        return super().forward(  # type: ignore[no-any-return]
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )

    def _store(self, layer: Attention, key: Tensor | None, value: Tensor | None, kv_cache: Tensor) -> None:
        """What vLLM does before it calls a backend that does not store keys and values by itself."""
        slots = get_forward_context().slot_mapping.get(layer.layer_name)
        is_given = key is not None and value is not None and slots is not None
        if is_given and self.kv_sharing_target_layer_name is None:
            self.do_kv_cache_update(layer, key, value, kv_cache, slots)


class SharedPrefixBackend(CPUAttentionBackend):  # type: ignore[misc]
    """What vLLM knows of all this."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[SharedPrefixImpl]:
        return SharedPrefixImpl

    @staticmethod
    def get_builder_cls() -> type[SharedPrefixBuilder]:
        return SharedPrefixBuilder


def check_model(vllm_config: VllmConfig, layers: Mapping[str, AttentionLayerBase]) -> None:
    """Raises SetupError for a model with a layer that the native kernels cannot compute, or not in vLLM's blocks."""
    size, config = vllm_config.cache_config.block_size, vllm_config.model_config
    if size % PAGE_MULTIPLE:
        raise SetupError(f"block_size is {size}; shared attention needs a multiple of {PAGE_MULTIPLE}")
    if config.dtype not in DTYPES:
        raise SetupError(f"the model computes in {config.dtype}; shared attention does so in float32 and bfloat16")
    if vllm_config.parallel_config.decode_context_parallel_size > 1:
        raise SetupError("the context is split over workers; shared attention keeps it whole")
    if config.rswa_window is not None:
        raise SetupError("the window leaves out the prompt; shared attention knows plain windows")
    if len({getattr(layer, "num_heads", None) for layer in layers.values()}) > 1:
        raise SetupError("layers have different numbers of heads; in shared attention all have as many")
    for name, layer in layers.items():
        if reason := _unfit(layer, config.dtype):
            raise SetupError(f"{name} has {reason}, which shared attention has not")


def _unfit(layer: AttentionLayerBase, dtype: torch.dtype) -> str | None:
    """What of a layer the native kernels have not."""
    impl = getattr(layer, "impl", None)
    if type(layer) is not Attention or not isinstance(impl, SharedPrefixImpl):
        return f"attention of a kind of its own ({type(layer).__name__})"
    found = {
        f"attention of the type {impl.attn_type}": impl.attn_type != AttentionType.DECODER,
        f"heads of {layer.head_size} and {layer.head_size_v}": layer.head_size % HEAD_MULTIPLE
        or layer.head_size_v != layer.head_size,
        f"scores scaled by {impl.scale}": not math.isclose(impl.scale, layer.head_size**-0.5, rel_tol=1e-5),
        f"keys and values in {layer.kv_cache_dtype}": impl.is_fp8_kv_cache or layer.kv_cache_torch_dtype != dtype,
        "positions in its scores (ALiBi)": impl.alibi_slopes is not None,
        "capped scores": impl.logits_soft_cap,
        "attention sinks": impl.sinks is not None,
        "the keys and values of another layer": impl.kv_sharing_target_layer_name is not None,
        "spans that see one another": layer.use_mm_prefix,
    }
    return next((what for what, is_so in found.items() if is_so), None)


def _requests(common: CommonAttentionMetadata) -> Requests:
    """A step of vLLM's, without requests that only fill it up. The tables are a copy, as wide as this step needs."""
    starts = common.query_start_loc_cpu.numpy()
    num_rows = starts[1:] - starts[:-1]
    num_live = int((num_rows > 0).sum())  # those without rows come last
    num_keys = common.seq_lens.numpy()[:num_live].copy()
    page_size = PAGE_MULTIPLE  # the least; blocks are as large, or larger
    width = -(-int(num_keys.max()) // page_size)
    tables = common.block_table_tensor.numpy()[:num_live, :width].copy()
    slots = common.slot_mapping.numpy()[: starts[num_live]]
    return Requests(num_rows[:num_live], num_keys, tables, slots)


def _whole(heads: Tensor) -> Tensor:
    """[rows, heads, head_dim] with each row in one piece."""
    return heads if heads.stride()[1:] == (heads.shape[2], 1) else heads.contiguous()


def _directory(settings: Mapping[str, Any]) -> Path | None:
    return Path(found) if (found := settings.get("kernels")) else None
