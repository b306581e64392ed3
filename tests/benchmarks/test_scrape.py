"""What the serve benchmark tells of drafts: workers' counters before and after."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.scrape import NoMetricsError, drafting, totals
from protos.messages import Load
from workers.engine.protocol import EngineStats
from workers.metrics import MetricsServer, WorkerMetrics
from workers.speculative.stats import PoolStats, SpeculationStats


class Worker:
    """Metrics as a worker has them, of whatever the test says."""

    def __init__(self, name: str) -> None:
        self.speculation: SpeculationStats | None = None
        metrics = WorkerMetrics(model_name="m", worker_id=name)
        metrics.watch(Load, lambda: EngineStats(kv_total_pages=1, speculation=self.speculation))
        self.server = MetricsServer(metrics.registry, host="127.0.0.1", port=0)


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    made = [Worker("a"), Worker("b")]
    yield made
    for worker in made:
        worker.server.stop()


def stats(num_drafts: int, drafted: int, accepted: int, *, off: int, late: int) -> SpeculationStats:
    by = {"copy": drafted}, {"copy": accepted}
    return SpeculationStats(
        num_drafts, drafted, accepted, (accepted,), *by, {"off": off, "copy": num_drafts}, PoolStats(num_late=late)
    )


async def test_counters_of_all_workers_become_what_happened_in_between(workers: list[Worker]) -> None:
    endpoints = [worker.server.address for worker in workers]
    for worker in workers:
        worker.speculation = stats(10, 100, 50, off=1000, late=7)
    before = await totals(endpoints)
    workers[0].speculation = stats(30, 160, 80, off=1010, late=8)
    workers[1].speculation = stats(20, 140, 60, off=1000, late=7)
    assert drafting(before, await totals(endpoints)) == pytest.approx(
        {
            "drafted_steps_percent": 75.0,
            "tokens_per_drafted_step": 1 + 40 / 30,
            "copy_accepted_percent": 40.0,
            "late_drafts": 1.0,
            "stale_drafts": 0.0,
        }
    )


async def test_workers_that_do_not_speculate_have_nothing_to_tell(workers: list[Worker]) -> None:
    found = await totals([workers[0].server.address])
    assert drafting(found, found) == {}


async def test_a_wrong_endpoint_is_named() -> None:
    with pytest.raises(NoMetricsError, match=r"no metrics at 127.0.0.1:1 "):
        await totals(["127.0.0.1:1"])
