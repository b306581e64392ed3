"""The first board to open: is it up, how much does it do, what do clients feel."""

from __future__ import annotations

from cluster.dashboards.panel import Board, Levels, Panel, Query, Row
from cluster.dashboards.promql import CLUSTER, rate, recorded, recorded_quantiles, value

WANTED = recorded("cluster:headwater_processes:wanted", where='role="worker"')
READY = recorded("cluster:headwater_workers:ready")

BOARD = Board(
    uid="headwater-overview",
    title="Headwater / Overview and throughput",
    description="Is it up, how much does it do, what do clients feel. Panels of rules need deploy/prometheus/rules.",
    rows=(
        Row(
            "Now",
            (
                Panel(
                    "Generated",
                    "tokens/s",
                    "Tokens made for clients, mean of five minutes: the cluster's throughput.",
                    (Query(recorded("cluster:headwater_generation_tokens:rate5m"), "{{cluster}}"),),
                    kind="value",
                ),
                Panel(
                    "Calls",
                    "requests/s",
                    "Calls of every kind that ended, mean of five minutes.",
                    (Query(recorded("cluster:headwater_requests:rate5m"), "{{cluster}}"),),
                    kind="value",
                ),
                Panel(
                    "Failed",
                    "percentunit",
                    "Calls that ended in EngineFailure, WorkerLost or NoWorker. Above 1 %: runbook, "
                    "HeadwaterErrorRatioHigh.",
                    (Query(recorded("cluster:headwater_errors:ratio5m"), "{{cluster}}"),),
                    kind="value",
                    levels=Levels(attention=0.001, bad=0.01),
                ),
                Panel(
                    "Refused",
                    "percentunit",
                    "Calls refused as Overloaded: the queue or a tenant's limit is full. Add workers, or raise the "
                    "limit.",
                    (Query(recorded("cluster:headwater_refusals:ratio5m"), "{{cluster}}"),),
                    kind="value",
                    levels=Levels(attention=0.001, bad=0.01),
                ),
                Panel(
                    "Workers not ready",
                    "short",
                    "Of those that are configured. Above 0 for minutes: runbook, HeadwaterWorkersMissing.",
                    (
                        Query(
                            f"clamp_min({WANTED} - on (cluster, namespace) group_left () {READY}, 0)",
                            "{{cluster}}",
                        ),
                    ),
                    kind="value",
                    levels=Levels(attention=1, bad=2),
                ),
                Panel(
                    "Live requests",
                    "requests",
                    "Accepted and not ended, waiting ones included. Falls to 0 when traffic stops; if not, report a "
                    "bug.",
                    (Query(value("headwater_requests_live"), "live"),),
                    kind="value",
                ),
                Panel(
                    "Queue",
                    "percentunit",
                    "Share of what may wait at the fullest router. At 100 % requests are refused.",
                    (Query(recorded("cluster:headwater_queue:use"), "{{cluster}}"),),
                    kind="value",
                    levels=Levels(attention=0.5, bad=0.8),
                ),
                Panel(
                    "Alerts",
                    "short",
                    "Alerts that fire. The runbook has a section for each.",
                    (Query('count(ALERTS{alertname=~"Headwater.*", alertstate="firing"}) or vector(0)', "firing"),),
                    kind="value",
                    levels=Levels(attention=1, bad=3),
                ),
            ),
        ),
        Row(
            "Throughput",
            (
                Panel(
                    "Tokens",
                    "tokens/s",
                    "Tokens of prompts that arrive, of those the ones that were cached, and tokens generated. "
                    "Generated "
                    "falling while prompts rise: workers compute prompts; see Latency and Packing.",
                    (
                        Query(rate("headwater_prompt_tokens_total"), "prompt"),
                        Query(rate("headwater_route_cached_tokens_total"), "prompt, cached"),
                        Query(rate("headwater_generation_tokens_total"), "generated"),
                    ),
                ),
                Panel(
                    "Calls by outcome",
                    "requests/s",
                    "How calls end. Overloaded: add workers. WorkerLost, EngineFailure: see Workers. Much cancelled: "
                    "clients give up; see Latency.",
                    (Query(rate("headwater_requests_total", "outcome"), "{{outcome}}"),),
                    kind="stack",
                ),
                Panel(
                    "Generated by worker",
                    "tokens/s",
                    "Tokens that each engine made. One far below the others at the same load: see Workers.",
                    (Query(rate("vllm:generation_tokens_total", "engine"), "{{engine}}"),),
                    kind="stack",
                ),
            ),
        ),
        Row(
            "What clients feel",
            (
                Panel(
                    "Time to first token",
                    "s",
                    "From a request's arrival to its first token. Above the objective: see Latency for where it waits.",
                    (
                        *recorded_quantiles("headwater_time_to_first_token_seconds"),
                        Query(
                            recorded("cluster:headwater_request_queue_time_seconds:p95_5m"),
                            "of it without a worker, p95 {{cluster}}",
                        ),
                    ),
                    levels=Levels(attention=1, bad=2.5),
                ),
                Panel(
                    "Time between tokens",
                    "s",
                    "Rising: large batches or long contexts. Add workers, or lower max_running or step_tokens.",
                    recorded_quantiles("headwater_inter_token_latency_seconds"),
                    levels=Levels(attention=0.1, bad=0.25),
                ),
                Panel(
                    "Time to the end",
                    "s",
                    "From arrival to the end of the last output; depends on how many tokens are asked for.",
                    recorded_quantiles("headwater_e2e_request_latency_seconds"),
                ),
            ),
        ),
        Row(
            "What is saved, and what is left",
            (
                Panel(
                    "Saved work",
                    "percentunit",
                    "Prompt tokens found in caches; attention that shared prefixes saved; drafted tokens that were "
                    "right. "
                    "See Prefix sharing and Speculation.",
                    (
                        Query(recorded("cluster:headwater_cached_tokens:ratio5m"), "prompts cached {{cluster}}"),
                        Query(
                            f"1 - 1 / {recorded('cluster:headwater_attention_keys:sharing_factor5m')}",
                            "attention shared {{cluster}}",
                        ),
                        Query(recorded("cluster:headwater_draft_acceptance:ratio5m"), "drafts accepted {{cluster}}"),
                    ),
                ),
                Panel(
                    "Who waits",
                    "requests",
                    "Requests without a worker, and outputs in engines. Waiting at routers for long: all workers "
                    "are full.",
                    (
                        Query(value("headwater_queue_requests"), "wait at routers"),
                        Query(value("vllm:num_requests_waiting"), "wait in engines"),
                        Query(value("vllm:num_requests_running"), "run"),
                    ),
                ),
                Panel(
                    "Memory of engines",
                    "percentunit",
                    "Share of pages that live outputs hold. Near 100 % with preemptions: raise "
                    "worker.engine.kv.num_pages "
                    "or add workers.",
                    (
                        Query(value("vllm:kv_cache_usage_perc", op="max"), "fullest worker"),
                        Query(value("vllm:kv_cache_usage_perc", op="avg"), "mean"),
                    ),
                    levels=Levels(attention=0.85, bad=0.95),
                ),
            ),
        ),
        Row(
            "Who is there",
            (
                Panel(
                    "Workers by state",
                    "short",
                    "As the router sees them that sees the most. connecting for long: workers cannot be reached or "
                    "do not start.",
                    (Query(value("headwater_workers", "state", op="max"), "{{state}}"),),
                    kind="stack",
                ),
                Panel(
                    "Processes",
                    "short",
                    "Processes that send metrics, and those that are configured. Fewer than configured: they do not "
                    "run, "
                    "or Prometheus does not reach them.",
                    (
                        Query(f"count(headwater_requests_live{{{CLUSTER}}})", "routers"),
                        Query(f"count(headwater_pending_prefill_tokens{{{CLUSTER}}})", "workers"),
                        Query(f"count(headwater_drafter_targets{{{CLUSTER}}})", "drafters"),
                        Query(value("headwater_processes_wanted", "role", op="max"), "{{role}}s wanted"),
                    ),
                ),
                Panel(
                    "Losses and recoveries",
                    "per second",
                    "Workers lost by how, and what became of their requests. given_up: clients had an error.",
                    (
                        Query(rate("headwater_worker_losses_total", "reason"), "lost: {{reason}}"),
                        Query(rate("headwater_recoveries_total", "outcome"), "requests {{outcome}}"),
                    ),
                ),
            ),
        ),
    ),
)
