"""All boards, in the order in which somebody looks for a cause."""

from __future__ import annotations

from cluster.dashboards.latency import BOARD as LATENCY
from cluster.dashboards.overview import BOARD as OVERVIEW
from cluster.dashboards.packing import BOARD as PACKING
from cluster.dashboards.routing import BOARD as ROUTING
from cluster.dashboards.sharing import BOARD as SHARING
from cluster.dashboards.speculation import BOARD as SPECULATION
from cluster.dashboards.tenants import BOARD as TENANTS
from cluster.dashboards.workers import BOARD as WORKERS

BOARDS = (OVERVIEW, LATENCY, SHARING, PACKING, SPECULATION, ROUTING, TENANTS, WORKERS)
