"""Where the time of a request goes, from its arrival at a router to its last token."""

from __future__ import annotations

from cluster.dashboards.panel import Board, Levels, Panel, Query, Row
from cluster.dashboards.promql import mean, quantile, quantiles, rate, value

FIRST, NEXT, END = (
    "headwater_time_to_first_token_seconds",
    "headwater_inter_token_latency_seconds",
    "headwater_e2e_request_latency_seconds",
)

BOARD = Board(
    uid="headwater-latency",
    title="Headwater / Latency",
    description="Where the time of a request goes. Routers measure what clients feel; engines, their part of it.",
    rows=(
        Row(
            "First tokens",
            (
                Panel(
                    "Time to first token",
                    "s",
                    "Arrival at the router to the first token. Rising with the wait for a worker: add workers. "
                    "Rising "
                    "alone: long prompts or cold caches; see Prefix sharing.",
                    quantiles(FIRST),
                    levels=Levels(attention=1, bad=2.5),
                ),
                Panel(
                    "Time to first token by worker, p95",
                    "s",
                    "One worker far above the others: see its steps on Workers.",
                    (Query(quantile(0.95, FIRST, "worker"), "{{worker}}"),),
                ),
                Panel(
                    "Time to first token, all requests",
                    "s",
                    "How many requests took how long. Two bands: cached and uncached prompts, or short and long ones.",
                    (Query(rate(f"{FIRST}_bucket", "le"), "{{le}}"),),
                    kind="heatmap",
                ),
            ),
        ),
        Row(
            "Where first tokens wait",
            (
                Panel(
                    "Wait for a worker",
                    "s",
                    "Arrival to placement. Above zero for long: every worker is full. Add workers.",
                    quantiles("headwater_request_queue_time_seconds"),
                ),
                Panel(
                    "In the engine, p95",
                    "s",
                    "Waiting in the engine, then computing the prompt. Waiting: memory or max_running is the limit. "
                    "Computing: long or uncached prompts.",
                    (
                        Query(quantile(0.95, "vllm:request_queue_time_seconds"), "waiting"),
                        Query(quantile(0.95, "vllm:request_prefill_time_seconds"), "prompt"),
                        Query(quantile(0.95, "vllm:time_to_first_token_seconds"), "arrival to first token"),
                    ),
                ),
                Panel(
                    "Prompt tokens to compute",
                    "tokens",
                    "What workers hold of prompts and have not computed. High: first tokens will be late.",
                    (Query(value("headwater_pending_prefill_tokens", "engine"), "{{engine}}"),),
                    kind="stack",
                ),
            ),
        ),
        Row(
            "Next tokens",
            (
                Panel(
                    "Time between tokens",
                    "s",
                    "Rising: large batches or long contexts. Lower max_running or step_tokens, or add workers.",
                    quantiles(NEXT),
                    levels=Levels(attention=0.1, bad=0.25),
                ),
                Panel(
                    "Time between tokens by worker, p95",
                    "s",
                    "One worker far above the others: a busier machine or a larger batch; see Workers.",
                    (Query(quantile(0.95, NEXT, "worker"), "{{worker}}"),),
                ),
                Panel(
                    "Between tokens in engines, mean",
                    "s",
                    "Between two tokens, per token of a whole request, and of one step. A gap to the routers' "
                    "figure is "
                    "the network or a busy router.",
                    (
                        Query(mean("vllm:inter_token_latency_seconds"), "between tokens"),
                        Query(mean("vllm:request_time_per_output_token_seconds"), "per token of a request"),
                        Query(mean("headwater_step_seconds"), "step"),
                    ),
                ),
            ),
        ),
        Row(
            "Whole requests",
            (
                Panel(
                    "Time to the end",
                    "s",
                    "Arrival at the router to the end of the last output. Read it beside the lengths.",
                    quantiles(END),
                ),
                Panel(
                    "Whole requests in the engine, p95",
                    "s",
                    "All of it, its steps, and its part after the first token.",
                    (
                        Query(quantile(0.95, "vllm:e2e_request_latency_seconds"), "all"),
                        Query(quantile(0.95, "vllm:request_inference_time_seconds"), "in steps"),
                        Query(quantile(0.95, "vllm:request_decode_time_seconds"), "after the first token"),
                    ),
                ),
                Panel(
                    "Lengths",
                    "tokens",
                    "Tokens of prompts and of what was made for them. A change here explains most changes above.",
                    (
                        Query(quantile(0.5, "vllm:request_prompt_tokens"), "prompt p50"),
                        Query(quantile(0.95, "vllm:request_prompt_tokens"), "prompt p95"),
                        Query(quantile(0.5, "vllm:request_generation_tokens"), "generated p50"),
                        Query(quantile(0.95, "vllm:request_generation_tokens"), "generated p95"),
                    ),
                ),
            ),
        ),
    ),
)
