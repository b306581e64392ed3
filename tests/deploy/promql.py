"""Reading PromQL and rule files in tests, with promtool as the judge of what is right."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from cluster.dashboards.boards import BOARDS
from cluster.dashboards.panel import Panel
from protos.messages import Load
from router.metrics import RouterMetrics
from workers.engine.protocol import EngineStats
from workers.metrics import WorkerMetrics
from workers.speculative.pool.metrics import DrafterCollector
from workers.speculative.pool.stats import DrafterStats
from workers.speculative.stats import PoolStats, SpeculationStats

RULES = ("recording.yaml", "alerts.yaml")
PROMETHEUS_OWN = {"ALERTS"}
SUFFIXES = {"counter": ("_total",), "info": ("_info",), "histogram": ("_bucket", "_sum", "_count")}


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not on the PATH: install Debian's package `prometheus`")
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def rules(root: Path) -> list[dict[str, Any]]:
    """Every rule of every group of both files."""
    files = [yaml.safe_load((root / "deploy" / "prometheus" / "rules" / name).read_text()) for name in RULES]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def alerts(root: Path) -> list[dict[str, Any]]:
    return [rule for rule in rules(root) if "alert" in rule]


def recorded(root: Path) -> set[str]:
    return {rule["record"] for rule in rules(root) if "record" in rule}


def panels() -> list[Panel]:
    return [panel for board in BOARDS for panel in board.panels]


def expressions() -> list[str]:
    """Every query of every panel, its variables replaced as Grafana would for all clusters."""
    return [resolved(query.expr) for panel in panels() for query in panel.queries]


def resolved(expression: str) -> str:
    expression = expression.replace("$__rate_interval", "1m")
    return re.sub(r"\$\w+", ".*", expression)


def names(expression: str) -> set[str]:
    """The metrics that an expression reads."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"", "", expression)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    words = re.findall(r"[a-zA-Z_:][\w:]*(?!\s*\()\b", bare)
    return {word for word in words if word in PROMETHEUS_OWN or "headwater_" in word or ":" in word}


def exported() -> set[str]:
    """Every series that the program has, as a query would write it."""
    worker = WorkerMetrics(model_name="m", worker_id="w")
    worker.watch(Load, lambda: EngineStats(kv_total_pages=1, speculation=SpeculationStats(pool=PoolStats())))
    drafter = CollectorRegistry()
    drafter.register(DrafterCollector("m", "d", DrafterStats))
    return series((RouterMetrics().registry, worker.registry, drafter))


def series(registries: Iterable[CollectorRegistry]) -> set[str]:
    families = [family for registry in registries for family in registry.collect()]
    return {family.name + suffix for family in families for suffix in SUFFIXES.get(family.type, ("",))}
