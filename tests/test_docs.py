"""The docs say what the program does: every metric is described, and every described metric exists."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from protos.messages import Load
from router.metrics import RouterMetrics
from workers.engine.protocol import EngineStats
from workers.metrics import WorkerMetrics
from workers.speculative.pool.metrics import DrafterCollector
from workers.speculative.pool.stats import DrafterStats
from workers.speculative.stats import PoolStats, SpeculationStats


def exported(registry: CollectorRegistry) -> set[str]:
    """Names as a dashboard would write them."""
    suffix = {"counter": "_total", "info": "_info"}
    return {family.name + suffix.get(family.type, "") for family in registry.collect()}


def test_every_metric_is_documented_and_every_documented_one_exists(root: Path) -> None:
    workers = WorkerMetrics(model_name="m", worker_id="w")
    workers.watch(Load, lambda: EngineStats(kv_total_pages=1, speculation=SpeculationStats(pool=PoolStats())))
    drafters = CollectorRegistry()
    drafters.register(DrafterCollector("m", "d", DrafterStats))
    names = exported(RouterMetrics().registry) | exported(workers.registry) | exported(drafters)
    described = set(re.findall(r"^\| `([a-z_:0-9]+)` \|", (root / "docs" / "metrics.md").read_text(), re.MULTILINE))
    assert names == described


def test_links_in_docs_lead_somewhere(root: Path) -> None:
    pages = [root / "README.md", *root.glob("docs/**/*.md"), root / "models" / "README.md"]
    for page in pages:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
