"""Why requests go where they go, and whether the router knows what workers cache."""

from __future__ import annotations

from cluster.dashboards.panel import Board, Levels, Panel, Query, Row
from cluster.dashboards.promql import quantile, quantiles, rate, recorded, value

ERROR = "headwater_route_prediction_error_tokens"

BOARD = Board(
    uid="headwater-routing",
    title="Headwater / Routing",
    description="Why requests go where they go. `headwater explain PROMPT` shows it for one prompt.",
    rows=(
        Row(
            "Choices",
            (
                Panel(
                    "Placements by reason",
                    "per second",
                    "cold near all of them: prompts share nothing, salts differ, or the index is empty. Much "
                    "spread: hot "
                    "prefixes; add workers, or raise router.routing.load_weight.",
                    (Query(rate("headwater_route_decisions_total", "reason"), "{{reason}}"),),
                    kind="stack",
                ),
                Panel(
                    "Prompt tokens found in caches",
                    "percentunit",
                    "Zero while the index is full: salts or page sizes differ, or prompts share nothing.",
                    (Query(recorded("cluster:headwater_cached_tokens:ratio5m"), "{{cluster}}"),),
                ),
                Panel(
                    "Expected and found",
                    "tokens/s",
                    "Cached tokens that routers expected, and that workers had. Expected above found: caches turn "
                    "over "
                    "fast; add workers or memory. Below: raise router.routing.max_index_blocks.",
                    (
                        Query(rate("headwater_route_predicted_cached_tokens_total"), "expected"),
                        Query(rate("headwater_route_cached_tokens_total"), "found"),
                    ),
                ),
            ),
        ),
        Row(
            "The index",
            (
                Panel(
                    "Error of predictions",
                    "tokens",
                    "Tokens between expected and found, of each placement. Most should be none.",
                    (
                        Query(quantile(0.5, ERROR), "p50"),
                        Query(quantile(0.95, ERROR), "p95"),
                    ),
                ),
                Panel(
                    "Blocks known",
                    "short",
                    "Of workers' caches, by router. Zero under load: runbook, HeadwaterCacheEventsMissing. At "
                    "max_index_blocks: the least recently matched are forgotten.",
                    (Query(value("headwater_index_blocks", "instance"), "{{instance}}"),),
                ),
                Panel(
                    "Snapshots asked",
                    "per second",
                    "gap: events were lost, the worker's log tells. error: predictions failed again and again. A few "
                    "after a worker's restart are normal.",
                    (Query(rate("headwater_index_resyncs_total", "reason"), "{{reason}}"),),
                ),
            ),
        ),
        Row(
            "What waits",
            (
                Panel(
                    "Requests without a worker",
                    "requests",
                    "Near router.limits.max_queued_requests: refusals are next.",
                    (
                        Query(value("headwater_queue_requests", "instance"), "{{instance}}"),
                        Query(value("headwater_queue_max_requests", op="max"), "limit of each"),
                    ),
                ),
                Panel(
                    "Share of the queue",
                    "percentunit",
                    "Of requests or of prompt tokens, whichever is fuller, at the fullest router.",
                    (Query(recorded("cluster:headwater_queue:use"), "{{cluster}}"),),
                    levels=Levels(attention=0.5, bad=0.8),
                ),
                Panel(
                    "Wait for a worker",
                    "s",
                    "Above zero for long: every worker is full. Add workers.",
                    quantiles("headwater_request_queue_time_seconds"),
                ),
            ),
        ),
        Row(
            "Loss and recovery",
            (
                Panel(
                    "Workers lost",
                    "per second",
                    "silent: hung. connection: died. closed, protocol: ended in order, or of another model. Read "
                    "that worker's log.",
                    (Query(rate("headwater_worker_losses_total", "reason"), "{{reason}}"),),
                ),
                Panel(
                    "Requests that lost their worker",
                    "requests/s",
                    "resumed: went on elsewhere. given_up: the client had an error; runbook, "
                    "HeadwaterRecoveriesGivenUp.",
                    (Query(rate("headwater_recoveries_total", "outcome"), "{{outcome}}"),),
                ),
                Panel(
                    "Workers by state",
                    "short",
                    "As each router sees them. Routers that differ for long: one of them does not reach a worker.",
                    (Query(value("headwater_workers", "state", "instance"), "{{state}} {{instance}}"),),
                ),
            ),
        ),
    ),
)
