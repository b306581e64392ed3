"""Each worker by itself: what its engine does, and what keeps it from doing more."""

from __future__ import annotations

from cluster.dashboards.panel import Board, Filter, Levels, Panel, Query, Row
from cluster.dashboards.promql import OF_WORKER, quantile, rate, ratio, value


def _rate(metric: str, *by: str) -> str:
    return rate(metric, "engine", *by, where=OF_WORKER)


def _value(metric: str) -> str:
    return value(metric, "engine", where=OF_WORKER)


def _each(expr: str) -> tuple[Query, ...]:
    return (Query(expr, "{{engine}}"),)


BOARD = Board(
    uid="headwater-workers",
    title="Headwater / Workers",
    description="Each worker by itself. A worker's id is that of `headwater topology` and of its log.",
    filters=(Filter("worker", "headwater_pending_prefill_tokens", "engine"),),
    rows=(
        Row(
            "Work",
            (
                Panel(
                    "Generated",
                    "tokens/s",
                    "Tokens made. One far below the others at the same load: a slower machine, or few requests; see "
                    "Running.",
                    _each(_rate("vllm:generation_tokens_total")),
                ),
                Panel(
                    "Computed",
                    "tokens/s",
                    "Tokens through the model, prompts and drafts too: what the hardware does.",
                    _each(_rate("headwater_computed_tokens_total")),
                ),
                Panel(
                    "Steps",
                    "per second",
                    "Zero with running outputs: the engine hangs, and the worker is replaced after "
                    "worker.engine.stall_s.",
                    _each(_rate("headwater_steps_total")),
                ),
            ),
        ),
        Row(
            "Load",
            (
                Panel(
                    "Running",
                    "short",
                    "Outputs in the batch. At worker.engine.scheduler.max_running: the engine is full.",
                    _each(_value("vllm:num_requests_running")),
                ),
                Panel(
                    "Waiting",
                    "short",
                    "Outputs that wait in the engine. Above zero for long: memory or max_running is the limit.",
                    _each(_value("vllm:num_requests_waiting")),
                ),
                Panel(
                    "Prompt tokens to compute",
                    "tokens",
                    "High: first tokens of this worker will be late.",
                    _each(_value("headwater_pending_prefill_tokens")),
                ),
            ),
        ),
        Row(
            "Memory",
            (
                Panel(
                    "Pages held by live outputs",
                    "percentunit",
                    "Near 100 % with preemptions: raise worker.engine.kv.num_pages or add workers.",
                    _each(_value("vllm:kv_cache_usage_perc")),
                    levels=Levels(attention=0.85, bad=0.95),
                ),
                Panel(
                    "Preemptions",
                    "per second",
                    "Outputs that lost their pages and are computed again.",
                    _each(_rate("vllm:num_preemptions_total")),
                ),
                Panel(
                    "Pages",
                    "short",
                    "In use, cached and free. In use above zero when idle: pages leak; report a bug.",
                    (
                        Query(_value("headwater_kv_pages_in_use"), "{{engine}} in use"),
                        Query(_value("headwater_kv_pages_cached"), "{{engine}} cached"),
                        Query(_value("headwater_kv_pages_free"), "{{engine}} free"),
                    ),
                ),
            ),
        ),
        Row(
            "Speed",
            (
                Panel(
                    "Time of a step, p95",
                    "s",
                    "Rising: larger steps or a busy machine.",
                    _each(quantile(0.95, "headwater_step_seconds", "engine", where=OF_WORKER)),
                ),
                Panel(
                    "Time to first token in the engine, p95",
                    "s",
                    "The routers' figure minus this is queueing and the network.",
                    _each(quantile(0.95, "vllm:time_to_first_token_seconds", "engine", where=OF_WORKER)),
                ),
                Panel(
                    "Time between tokens, p95",
                    "s",
                    "Of one request, in the engine.",
                    _each(quantile(0.95, "vllm:inter_token_latency_seconds", "engine", where=OF_WORKER)),
                ),
            ),
        ),
        Row(
            "Ends",
            (
                Panel(
                    "Outputs by how they ended",
                    "per second",
                    "stop: as the model or the caller wanted. length: at max_tokens.",
                    (Query(_rate("vllm:request_success_total", "finished_reason"), "{{engine}} {{finished_reason}}"),),
                ),
                Panel(
                    "Outputs per step",
                    "short",
                    "The batch that the engine really runs.",
                    _each(ratio(_rate("headwater_step_sequences_sum"), _rate("headwater_step_sequences_count"))),
                ),
                Panel(
                    "Shuts down",
                    "short",
                    "1 while a worker drains before it ends.",
                    _each(_value("headwater_worker_draining")),
                ),
            ),
        ),
    ),
)
