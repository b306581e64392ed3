"""vLLM's own counts of its steps, added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats


@dataclass(slots=True)
class Totals:
    """Running totals, and the scheduler's state after its last step. Mutated only by StepCounter, on vLLM's thread."""

    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries_tokens: int = 0
    prefix_hit_tokens: int = 0
    num_waiting: int = 0
    kv_use: float = 0.0  # share of blocks that requests hold

    @property
    def computed_tokens(self) -> int:
        return self.computed_prompt_tokens + self.generation_tokens


class StepCounter(PrometheusStatLogger):  # type: ignore[misc]  # untyped
    """A logger that vLLM calls after every step, in the place of its own metrics: those cost time in each."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: Sequence[int] | None = None) -> None:
        self.totals = Totals()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self._count_step(scheduler_stats)
        if iteration_stats is not None:
            self._count_tokens(iteration_stats)

    def log_engine_initialized(self) -> None:
        """Said elsewhere."""

    def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
        """It never sleeps."""

    def _count_step(self, stats: SchedulerStats) -> None:
        totals, found = self.totals, stats.prefix_cache_stats
        totals.num_steps += 1
        totals.num_waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        totals.kv_use = stats.kv_cache_usage
        totals.prefix_queries_tokens += found.queries
        totals.prefix_hit_tokens += found.hits

    def _count_tokens(self, stats: IterationStats) -> None:
        totals = self.totals
        totals.num_preemptions += stats.num_preempted_reqs
        totals.prompt_tokens += stats.prompt_token_stats.total
        totals.computed_prompt_tokens += stats.prompt_token_stats.computed
        totals.generation_tokens += stats.num_generation_tokens
