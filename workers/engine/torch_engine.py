"""The torch engine: plan, execute, commit. One call of step() is one line of each."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from protos.errors import EngineFailure, HeadwaterError
from protos.messages import Failure, Load, ModelInfo, Pin, Request, TokenDelta
from workers.attention.planner import Planner, SharingMode
from workers.config import SharingSection, WorkerConfig
from workers.engine.models import load_model
from workers.engine.prefixes import Prefixes
from workers.engine.protocol import Adoption, EngineLimits, EngineStats, StepResult
from workers.kv.block import BlockFormat, HeldBlock
from workers.kv.cache import KVCache
from workers.kv.journal import Changes
from workers.model.batch import BatchBuilder
from workers.model.config import ModelConfig
from workers.model.fingerprint import weights_fingerprint
from workers.model.runner import Runner
from workers.model.scores import Model
from workers.scheduler.scheduler import Limits, Scheduler
from workers.scheduler.step import StepPlan
from workers.speculative.factory import make_speculator
from workers.speculative.pool.members import PoolAccess
from workers.speculative.protocol import Key

log = logging.getLogger(__name__)


class TorchEngine:
    """An Engine in plain torch. Owns the scheduler, the model and the store of keys and values."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        threads: int = 1,
        device: torch.device | None = None,
        pool: PoolAccess | None = None,
    ) -> None:
        device = device or torch.device("cpu")
        model = ModelConfig.from_directory(config.model.path)
        kv = config.engine.kv
        eos_token_ids = frozenset(model.eos_token_ids)
        self._info = ModelInfo(
            name=config.model.served_name,
            max_context=min(config.model.max_context or model.max_position_embeddings, model.max_position_embeddings),
            vocab_size=model.vocab_size,
            eos_token_ids=tuple(model.eos_token_ids),
        )
        self._cache = KVCache(
            num_pages=kv.num_pages,
            page_size=kv.page_size,
            prefix_cache=kv.prefix_cache,
            max_foreign_pages=int(kv.exchange.max_mapped * kv.num_pages),
        )
        limits = self._scheduler_limits(config)
        self._limits = EngineLimits(limits.max_running, limits.step_tokens)
        self._scheduler = Scheduler(limits, self._cache, eos_token_ids)
        loaded = load_model(config, model, max_context=self._info.max_context, threads=threads, device=device)
        self.kernels = loaded.kernels
        planner = Planner(loaded.cost, kv.page_size, mode=_sharing_mode(config.engine.sharing))
        self._builder = BatchBuilder(planner, loaded.cost, self._cache, page_size=kv.page_size, device=device)
        self._runner = Runner(loaded.model, self._builder, eos_token_ids)
        self._format = _block_format(config, loaded.model, max_context=self._info.max_context)
        max_pinned = int(kv.max_pinned * kv.num_pages) if kv.prefix_cache else 0
        self._prefixes = Prefixes(self._cache, loaded.model, self._format, max_pinned_pages=max_pinned)
        self._speculator = make_speculator(config, device=device, access=pool)
        log.info("%s: %s kernels, %s, %d threads", self._info.name, loaded.kernels, config.model.dtype, threads)

    @property
    def model(self) -> ModelInfo:
        return self._info

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def block_format(self) -> BlockFormat | None:
        return self._format

    def submit(self, request: Request) -> None:
        self._scheduler.add(request)
        needed = self._cache.pages_for(len(request.token_ids) + request.sampling.max_tokens)
        for request_id in self._prefixes.unpin_for(needed):
            self.cancel(request_id)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        for dropped in self._scheduler.cancel(request_id, index):
            self._forget((request_id, dropped))

    def step(self) -> StepResult:
        began = time.perf_counter()
        plan = self._scheduler.plan()
        if not plan.chunks:
            return StepResult()
        drafts = self._speculator.draft(plan) if self._speculator else None
        if drafts:
            plan = self._scheduler.attach(plan, drafts)
        num_top_ids = 0 if self._speculator is None or drafts is None else self._speculator.num_top_ids
        try:
            results = self._runner.execute(plan, num_top_ids=num_top_ids)
        except (RuntimeError, MemoryError) as error:
            log.exception("a step of %d tokens failed", plan.num_tokens)
            return StepResult(failures=self._fail(plan, error))
        deltas = self._settle(self._scheduler.commit(plan, results))
        if self._speculator is not None:
            self._speculator.learn(plan, results, time.perf_counter() - began, speculated=drafts is not None)
            for delta in deltas:
                if delta.finish is not None:
                    self._forget((delta.request_id, delta.index))
        started = dict.fromkeys([sequence.request.request_id for sequence in plan.started])
        return StepResult(
            deltas=deltas,
            started=tuple(started),
            num_tokens=plan.num_tokens,
            num_sequences=len(plan.chunks),
        )

    def wake(self) -> None:
        """A step computes: it is never cut short."""

    def load(self) -> Load:
        return self._scheduler.load()

    def stats(self) -> EngineStats:
        counters, cache, work = self._scheduler.counters, self._cache, self._builder.work
        return EngineStats(
            num_steps=counters.num_steps,
            num_preemptions=counters.num_preemptions,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            computed_tokens=counters.computed_tokens,
            prefix_queries_tokens=counters.prefix_queries_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            repeated_tokens=counters.repeated_tokens,
            budget_tokens=counters.budget_tokens,
            budget_used_tokens=counters.budget_used_tokens,
            attention_segments=work.num_segments,
            attention_keys=work.needed_keys,
            attention_read_keys=work.read_keys,
            kv_free_pages=cache.num_free,
            kv_cached_pages=cache.num_cached,
            kv_total_pages=cache.num_pages,
            kv_foreign_pages=cache.num_foreign,
            kv_pinned_pages=self._prefixes.num_pinned_pages,
            page_size=cache.page_size,
            speculation=None if self._speculator is None else self._speculator.stats,
        )

    def export_prefix(self, salt: str, token_ids: Sequence[int], payload: memoryview) -> bool:
        return self._prefixes.export(salt, token_ids, payload)

    def adopt_prefix(self, salt: str, token_ids: Sequence[int], block: HeldBlock) -> Adoption:
        return self._prefixes.adopt(salt, token_ids, block)

    def pin(self, pin: Pin) -> None:
        request = self._prefixes.pin(pin, largest_need=self._scheduler.largest_need)
        if request is None:
            return
        try:
            self._scheduler.add(request)
        except HeadwaterError as error:
            log.warning("a prefix is not pinned: %s", error.message)
            self._prefixes.lose(request.request_id)

    def unpin(self, pin_id: str) -> None:
        if request_id := self._prefixes.unpin(pin_id):
            self.cancel(request_id)

    def take_kv_changes(self) -> Changes:
        return self._cache.take_changes()

    def kv_blocks(self) -> list[int]:
        return self._cache.blocks()

    def check(self) -> None:
        """The invariants of scheduler and cache, between steps; for tests."""
        self._scheduler.check(self._prefixes.tables)

    def close(self) -> None:
        """End the channels to drafters; memory goes with the object."""
        if self._speculator is not None:
            self._speculator.close()

    def _scheduler_limits(self, config: WorkerConfig) -> Limits:
        scheduler = config.engine.scheduler
        return Limits(
            step_tokens=scheduler.step_tokens,
            max_running=scheduler.max_running,
            max_waiting=scheduler.max_waiting,
            max_context=self._info.max_context,
        )

    def _fail(self, plan: StepPlan, error: Exception) -> tuple[Failure, ...]:
        dropped = self._scheduler.rollback(plan)
        for request_id, indexes in dropped.items():
            for index in indexes:
                self._forget((request_id, index))
        for request_id in filter(self._prefixes.computes, dropped):
            self._prefixes.lose(request_id)
        self._prefixes.settle()
        return tuple(Failure(request_id, EngineFailure.__name__, f"the step failed: {error}") for request_id in dropped)

    def _settle(self, deltas: list[TokenDelta]) -> list[TokenDelta]:
        """After a step: keep the pinned prefixes that it completed, and unmap what it took from the cache."""
        self._prefixes.settle()
        if not self._prefixes.is_computing:
            return deltas
        for request_id in [delta.request_id for delta in deltas if self._prefixes.computes(delta.request_id)]:
            self._prefixes.keep(request_id)
            deltas = [delta for delta in deltas if delta.request_id != request_id]
        return deltas

    def _forget(self, key: Key) -> None:
        """The output has ended."""
        if self._speculator is not None:
            self._speculator.forget(key)


def _block_format(config: WorkerConfig, model: Model, *, max_context: int) -> BlockFormat | None:
    kv = config.engine.kv
    if kv.exchange.mode == "off" or not kv.prefix_cache:
        return None
    weights = weights_fingerprint(config.model.path, max_context=max_context)
    return BlockFormat(model.page_layout.fingerprint, weights, kv.page_size, model.page_layout.page_bytes)


def _sharing_mode(sharing: SharingSection) -> SharingMode:
    return "never" if sharing.deterministic else sharing.mode
