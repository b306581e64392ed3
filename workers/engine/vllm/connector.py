"""Our part in vLLM's cache: prefixes that leave it, come into it, and stay, all asked for by requests of the engine.

vLLM makes two of these: one beside its scheduler, which knows the blocks of a prefix, and one beside its model, which
has their bytes. Both act only on requests that carry a section `headwater` in their transfer parameters, whose prompt
is the prefix and one token more: vLLM computes the last token of a prompt in any case.

    export  the blocks of the prefix are looked up when the request comes, and held; the next step copies them out
    import  the blocks that the cache lacks are copied in before the step that runs the request; they are vLLM's from
            then on, like blocks it has computed
    pin     when the request has ended, the blocks of its prefix get one more reference
    unpin   ... which goes when such a request comes

What a request asks for that cannot be had is left undone, and logged: the request runs like any other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

import torch
import vllm
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.platforms import current_platform
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.request import Request, RequestStatus

from workers.engine.vllm.block_bytes import BlockBytes
from workers.engine.vllm.handover import BadHandover, Outcome
from workers.engine.vllm.ledger import Copy, Ledger
from workers.engine.vllm.wish import SECTION, Wish

log = logging.getLogger(__name__)

_UNFIT: Final = "vLLM's cache has several groups, keeps no whole prefixes, is off, or is split over several GPUs"


@dataclass
class Copies(KVConnectorMetadata):  # type: ignore[misc]
    """Of one step."""

    copies: tuple[Copy, ...] = ()


class HeadwaterConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """A connector of vLLM. Owns a Ledger beside the scheduler, and the memory of blocks beside the model."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._page_size: int = vllm_config.cache_config.block_size
        self._config = vllm_config
        self._caches = kv_cache_config
        self._can_pin = _has_one_plain_group(kv_cache_config) and vllm_config.cache_config.enable_prefix_caching
        self._can_copy = self._can_pin and vllm_config.parallel_config.world_size == 1
        self._ledger: Ledger | None = None
        self._bytes: BlockBytes | None = None
        self._lost: set[int] = set()  # blocks of the last step that could not be copied in

    @property
    def requires_kv_delivery(self) -> bool:
        """Nobody waits for what is copied out: it is lost where it does not fit in."""
        return False

    # Beside the scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        if self._can_pin:
            self._ledger = Ledger(gpu_block_pool, self._page_size)

    def on_new_request(self, request: Request) -> None:
        params = request.kv_transfer_params
        if not isinstance(params, Mapping) or SECTION not in params:
            return
        try:
            wish = Wish.read(params[SECTION])
        except (KeyError, TypeError, ValueError) as error:
            log.warning("a request's wish for the cache is left undone: %s", error)
            return
        reason = self._refusal(wish, request.num_prompt_tokens)
        if self._ledger is None or reason is not None:
            log.warning("%s of %d pages is left undone: %s", wish.kind, wish.num_pages, reason)
            return
        self._ledger.begin(request.request_id, wish, request.block_hashes)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        if self._ledger is None:
            return 0, False
        return self._ledger.num_importable_tokens(request.request_id, num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if self._ledger is not None and num_external_tokens > 0:
            self._ledger.place(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Copies:
        return Copies(self._ledger.take()) if self._ledger is not None else Copies()

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._ledger is not None:
            is_whole = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
            self._ledger.end(request.request_id, block_ids[0], is_whole=is_whole)
        return False, None

    # Beside the model

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        reason = self._unfit(kv_caches)
        if reason is not None:
            log.warning("prefixes are not exchanged: %s", reason)
            return
        own = {cache.data_ptr(): cache for cache in kv_caches.values()}  # layers may share one
        self._bytes = BlockBytes(list(own.values()))

    def start_load_kv(self, forward_context: object, **_: object) -> None:
        self._lost = set()
        for copy in self._asked("import"):
            if not self._copy(copy, lambda blocks, payload, ids: blocks.write(ids, payload)):
                self._lost.update(copy.block_ids)

    def wait_for_save(self) -> None:
        for copy in self._asked("export"):
            self._copy(copy, lambda blocks, payload, ids: blocks.read(ids, payload))

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._lost

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers have been loaded when the step begins."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: object, **_: object) -> None:
        """All layers are saved when the step has ended."""

    def describe(self) -> dict[str, Any] | None:
        """See the function."""
        if self._bytes is None:
            return None
        return {"layout": self._layout(), "page_size": self._page_size, "page_bytes": self._bytes.page_bytes}

    def _asked(self, kind: Literal["export", "import"]) -> list[Copy]:
        if not self.has_connector_metadata():
            return []
        return [copy for copy in cast(Copies, self._get_connector_metadata()).copies if copy.kind == kind]

    def _copy(self, copy: Copy, move: Callable[[BlockBytes, memoryview, Sequence[int]], None]) -> bool:
        if self._bytes is None:
            return False
        size = self._bytes.page_bytes
        try:
            sheet = copy.ticket.open()
            end = (copy.first_page + len(copy.block_ids)) * size
            move(self._bytes, sheet.payload[copy.first_page * size : end], copy.block_ids)
            sheet.outcome = Outcome.COPIED
        except (BadHandover, RuntimeError, ValueError) as error:
            log.warning("%s of %d blocks failed: %s", copy.kind, len(copy.block_ids), error)
            return False
        return True

    def _refusal(self, wish: Wish, num_tokens: int) -> str | None:
        """Why this cannot be had, if it cannot."""
        if not (self._can_copy if wish.ticket is not None else self._can_pin):
            return _UNFIT
        if wish.num_pages * self._page_size >= num_tokens:
            return f"the prompt has only {num_tokens} tokens"
        return None

    def _unfit(self, kv_caches: Mapping[str, Tensor]) -> str | None:
        """Why these caches cannot be copied from and to, if they cannot."""
        if not self._can_copy:
            return _UNFIT
        for name, cache in kv_caches.items():
            shape = tuple(cache.shape)
            if len(shape) != 4 or shape[0] != self._caches.num_blocks or cache.stride(-1) != 1:
                return f"{name} has the shape {shape}, not [{self._caches.num_blocks} blocks, heads, tokens, content]"
        return None if kv_caches else "there is no cache"

    def _layout(self) -> str:
        """What two engines must have in common for the bytes of a page to mean the same, and to be rounded alike."""
        assert self._bytes is not None
        group = self._caches.kv_cache_groups[0]
        spec = cast(FullAttentionSpec, group.kv_cache_spec)
        layer = self._config.compilation_config.static_forward_context[group.layer_names[0]]
        words = (
            *("vllm", vllm.__version__, _device(), layer.get_attn_backend().__qualname__, getattr(layer, "isa", "-")),
            *(self._config.cache_config.kv_cache_layout, self._config.model_config.quantization),
            *(_name(self._config.model_config.dtype), self._config.cache_config.cache_dtype, _name(spec.dtype)),
            *(self._bytes.num_layers, spec.num_kv_heads, spec.head_size, self._page_size, self._bytes.page_bytes),
        )
        return " ".join(map(str, words))


def describe() -> dict[str, Any] | None:
    """How the cache of this worker process is laid out: `layout`, `page_size` (tokens), `page_bytes`.

    None: its prefixes cannot be exchanged.
    """
    connector = get_kv_transfer_group() if has_kv_transfer_group() else None
    return connector.describe() if isinstance(connector, HeadwaterConnector) else None


def _has_one_plain_group(config: KVCacheConfig) -> bool:
    """Whether every layer keeps all of a prefix, in blocks of the same numbers."""
    groups = config.kv_cache_groups
    return len(groups) == 1 and isinstance(groups[0].kv_cache_spec, FullAttentionSpec)


def _device() -> str:
    """Kinds of processors that round products alike, as far as is known."""
    name = torch.backends.cpu.get_cpu_capability() if current_platform.is_cpu() else current_platform.get_device_name()
    return str(name).replace(" ", "-")


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
