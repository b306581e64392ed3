"""What prefixes in common save: storage, computation, attention, and moves between workers."""

from __future__ import annotations

from cluster.dashboards.panel import Board, Levels, Panel, Query, Row
from cluster.dashboards.promql import mean, rate, ratio, recorded, value

KEYS, READ = "headwater_attention_keys_total", "headwater_attention_read_keys_total"

BOARD = Board(
    uid="headwater-sharing",
    title="Headwater / Prefix sharing",
    description="Prompts that begin alike are stored once, computed once, and attended to together.",
    rows=(
        Row(
            "Found instead of computed",
            (
                Panel(
                    "Prompt tokens found in caches",
                    "percentunit",
                    "As routers were told. Near zero: prompts share nothing, salts differ, or the index is empty; "
                    "see Routing.",
                    (Query(recorded("cluster:headwater_cached_tokens:ratio5m"), "{{cluster}}"),),
                ),
                Panel(
                    "Found, by worker",
                    "percentunit",
                    "Hits over lookups of each worker's cache. Falling: prompts differ more, or the cache is too "
                    "small.",
                    (
                        Query(
                            ratio(
                                rate("vllm:prefix_cache_hits_total", "engine"),
                                rate("vllm:prefix_cache_queries_total", "engine"),
                            ),
                            "{{engine}}",
                        ),
                    ),
                ),
                Panel(
                    "Prompt tokens of started outputs",
                    "tokens/s",
                    "Those that were found, and all of them. The gap is what engines compute.",
                    (
                        Query(rate("vllm:prompt_tokens_total"), "all"),
                        Query(rate("vllm:prompt_tokens_cached_total"), "found"),
                        Query(rate("headwater_prefix_fetched_tokens_total"), "of other workers"),
                    ),
                ),
            ),
        ),
        Row(
            "Attended to together",
            (
                Panel(
                    "Sharing factor",
                    "short",
                    "Keys that outputs saw for each key that was read: 1 is no sharing, 4 means a quarter of the "
                    "reads. "
                    "At 1 although prompts begin alike: see worker.engine.sharing.mode, or whether they are spread.",
                    (
                        Query(recorded("cluster:headwater_attention_keys:sharing_factor5m"), "{{cluster}}"),
                        Query(ratio(rate(KEYS, "engine"), rate(READ, "engine")), "{{engine}}"),
                    ),
                ),
                Panel(
                    "Keys of attention",
                    "per second",
                    "Seen and read, in one layer. The gap is what sharing saves.",
                    (Query(rate(KEYS), "seen"), Query(rate(READ), "read")),
                ),
                Panel(
                    "Spans per step",
                    "short",
                    "Spans of keys attended to in a step. More for the same outputs: more levels of prompts are "
                    "shared.",
                    (
                        Query(
                            ratio(
                                rate("headwater_attention_segments_total", "engine"),
                                rate("headwater_steps_total", "engine"),
                            ),
                            "{{engine}}",
                        ),
                        Query(mean("headwater_step_sequences"), "outputs per step"),
                    ),
                ),
            ),
        ),
        Row(
            "The store",
            (
                Panel(
                    "Pages",
                    "short",
                    "Held by live outputs, by the cache alone, or free. Cached falls when memory gets tight: that "
                    "is what it is for.",
                    (
                        Query(value("headwater_kv_pages_in_use"), "in use"),
                        Query(value("headwater_kv_pages_cached"), "cached"),
                        Query(value("headwater_kv_pages_free"), "free"),
                    ),
                    kind="stack",
                ),
                Panel(
                    "Pages pinned",
                    "short",
                    "Of prefixes that stay. At worker.engine.kv.max_pinned of all pages further pins are refused.",
                    (Query(value("headwater_kv_pages_pinned", "engine"), "{{engine}}"),),
                ),
                Panel(
                    "Pages of other workers",
                    "short",
                    "Used where they lie. At worker.engine.kv.exchange.max_mapped the least recently used give way.",
                    (Query(value("headwater_kv_pages_foreign", "engine"), "{{engine}}"),),
                ),
            ),
        ),
        Row(
            "Moved between workers",
            (
                Panel(
                    "Prefixes that another worker had",
                    "per second",
                    "What became of them. failed: the worker's log says why. late: raise kv.exchange.timeout_s. "
                    "Mostly "
                    "computed: they do not pay.",
                    (Query(rate("headwater_prefix_fetches_total", "outcome"), "{{outcome}}"),),
                    kind="stack",
                ),
                Panel(
                    "Time of a fetch",
                    "s",
                    "What a request waits for a prefix. Far above 0.1 s: steps of the source are long.",
                    (
                        Query(
                            ratio(rate("headwater_prefix_fetch_seconds_total"), rate("headwater_prefix_fetches_total")),
                            "mean",
                        ),
                    ),
                ),
                Panel(
                    "Fetches that failed or were late",
                    "percentunit",
                    "A few while workers come and go are normal. More: runbook, HeadwaterPrefixFetchesFailing.",
                    (Query(recorded("cluster:headwater_prefix_fetch_failures:ratio5m"), "{{cluster}}"),),
                    levels=Levels(attention=0.05, bad=0.2),
                ),
                Panel(
                    "Shared memory left for others",
                    "bytes",
                    "Blocks of each worker in shared memory. At kv.exchange.max_bytes the oldest give way: raise it "
                    "if "
                    "exports rise as fast as fetches.",
                    (Query(value("headwater_arena_bytes", "engine"), "{{engine}}"),),
                ),
                Panel(
                    "Prefixes copied out",
                    "per second",
                    "For other workers; what lies there already is not copied again.",
                    (Query(rate("headwater_prefix_exports_total", "engine"), "{{engine}}"),),
                ),
            ),
        ),
    ),
)
