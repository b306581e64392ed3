"""How full steps and messages are, and what is computed twice."""

from __future__ import annotations

from cluster.dashboards.panel import Board, Levels, Panel, Query, Row
from cluster.dashboards.promql import mean, quantile, rate, recorded, value

BOARD = Board(
    uid="headwater-packing",
    title="Headwater / Packing",
    description="Prompts travel together and fill steps without padding: how full both are.",
    rows=(
        Row(
            "How full",
            (
                Panel(
                    "Steps that left work",
                    "percentunit",
                    "Tokens computed, of the budget of steps that left prompt tokens for later. Well below 100 %: "
                    "max_running or num_pages keeps prompts waiting, not step_tokens.",
                    (Query(recorded("cluster:headwater_step_budget:use5m"), "{{cluster}}"),),
                    levels=Levels(attention=0.9, bad=0.5),
                ),
                Panel(
                    "Packs",
                    "percentunit",
                    "Prompt tokens in packs, of a step each. Low with a long queue: "
                    "router.dispatch.prefill_window_steps "
                    "lets too little through.",
                    (Query(recorded("cluster:headwater_pack_budget:use5m"), "{{cluster}}"),),
                ),
                Panel(
                    "Requests per pack",
                    "requests",
                    "Mostly 1 under load: prompts come too rarely, or router.sessions.packing_window_s is too short.",
                    (
                        Query(mean("headwater_pack_requests"), "mean"),
                        Query(quantile(0.95, "headwater_pack_requests"), "p95"),
                    ),
                ),
            ),
        ),
        Row(
            "Steps",
            (
                Panel(
                    "Tokens of a step",
                    "tokens",
                    "At step_tokens: prompts are computed in chunks.",
                    (
                        Query(quantile(0.5, "vllm:iteration_tokens_total"), "p50"),
                        Query(quantile(0.95, "vllm:iteration_tokens_total"), "p95"),
                        Query(mean("vllm:iteration_tokens_total"), "mean"),
                    ),
                ),
                Panel(
                    "Outputs of a step",
                    "short",
                    "The batch that engines really run.",
                    (
                        Query(quantile(0.5, "headwater_step_sequences"), "p50"),
                        Query(quantile(0.95, "headwater_step_sequences"), "p95"),
                        Query(mean("headwater_step_sequences"), "mean"),
                    ),
                ),
                Panel(
                    "Time of a step",
                    "s",
                    "Rising: larger steps, or a busy machine.",
                    (
                        Query(quantile(0.5, "headwater_step_seconds"), "p50"),
                        Query(quantile(0.95, "headwater_step_seconds"), "p95"),
                    ),
                ),
            ),
        ),
        Row(
            "Work",
            (
                Panel(
                    "Computed",
                    "tokens/s",
                    "Tokens through the model, drafted ones too, and of them those computed before. There is no "
                    "padding.",
                    (
                        Query(rate("headwater_computed_tokens_total"), "computed"),
                        Query(rate("headwater_repeated_tokens_total"), "of them, again"),
                    ),
                ),
                Panel(
                    "Computed again",
                    "percentunit",
                    "Rising with preemptions: memory is too small for the batch.",
                    (Query(recorded("cluster:headwater_computed_tokens:repeated_ratio5m"), "{{cluster}}"),),
                    levels=Levels(attention=0.05, bad=0.2),
                ),
                Panel(
                    "Budgets",
                    "tokens/s",
                    "What the ratios above are made of: budgets of full steps and of packs, and what was in them.",
                    (
                        Query(rate("headwater_step_budget_tokens_total"), "steps, budget"),
                        Query(rate("headwater_step_budget_used_tokens_total"), "steps, used"),
                        Query(rate("headwater_pack_budget_tokens_total"), "packs, budget"),
                        Query(rate("headwater_pack_tokens_total"), "packs, used"),
                    ),
                ),
            ),
        ),
        Row(
            "What waits",
            (
                Panel(
                    "At routers",
                    "tokens",
                    "Prompt tokens without a worker. Near router.limits.max_queued_tokens: refusals are next.",
                    (
                        Query(value("headwater_queue_tokens"), "waiting"),
                        Query(value("headwater_queue_max_tokens"), "limit"),
                    ),
                ),
                Panel(
                    "In engines",
                    "tokens",
                    "Prompt tokens that workers hold and have not computed.",
                    (Query(value("headwater_pending_prefill_tokens", "engine"), "{{engine}}"),),
                    kind="stack",
                ),
                Panel(
                    "Preemptions",
                    "per second",
                    "Outputs that lost their pages. Rising: raise worker.engine.kv.num_pages or add workers.",
                    (Query(rate("vllm:num_preemptions_total", "engine"), "{{engine}}"),),
                ),
            ),
        ),
    ),
)
