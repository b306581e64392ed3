"""A drafter's Prometheus metrics, read from its totals at every scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from workers.families import Families
from workers.speculative.pool.stats import DrafterStats


class DrafterCollector(Collector):
    """Everything one drafter exports."""

    def __init__(self, model_name: str, drafter_id: str, stats: Callable[[], DrafterStats]) -> None:
        self._make = Families({"model_name": model_name, "engine": drafter_id})
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield self._make.gauge("headwater_drafter_targets", "Workers connected.", stats.num_targets)
        yield self._make.gauge("headwater_drafter_sequences", "Outputs that it keeps.", stats.num_sequences)
        yield self._make.counter("headwater_drafter_batches", "Steps of its drafters.", stats.num_batches)
        yield self._make.counter("headwater_drafter_ahead_batches", "Of those, before anybody waited.", stats.num_ahead)
        yield self._make.counter("headwater_drafter_drafts", "Outputs in those steps.", stats.num_drafts)
        yield self._make.counter("headwater_drafter_tokens", "Tokens drafted.", stats.num_nodes)
