"""What drafting gains, which drafters are right, and whether the pool keeps up."""

from __future__ import annotations

from cluster.dashboards.panel import Board, Levels, Panel, Query, Row
from cluster.dashboards.promql import rate, ratio, recorded, value

BOARD = Board(
    uid="headwater-speculation",
    title="Headwater / Speculation",
    description="Drafts that the model confirmed. Empty without worker.engine.speculation.drafters; the pool's panels "
    "without `pool` among them.",
    rows=(
        Row(
            "What it gains",
            (
                Panel(
                    "Drafted tokens that were right",
                    "percentunit",
                    "Falling: requests have changed; drafts become shorter by themselves.",
                    (Query(recorded("cluster:headwater_draft_acceptance:ratio5m"), "{{cluster}}"),),
                ),
                Panel(
                    "Tokens per output and step with a draft",
                    "tokens",
                    "1 would be without drafts. What it gains in time is a little less: verified tokens cost, too.",
                    (Query(recorded("cluster:headwater_draft_tokens_per_step:mean5m"), "{{cluster}}"),),
                ),
                Panel(
                    "Steps by who was asked",
                    "per second",
                    "Steps of decoding outputs alone. Mostly off: drafting does not pay at this load, and costs "
                    "next to nothing.",
                    (Query(rate("headwater_speculation_steps_total", "drafters"), "{{drafters}}"),),
                    kind="stack",
                ),
            ),
        ),
        Row(
            "Who is right",
            (
                Panel(
                    "Right, by drafter",
                    "percentunit",
                    "One far below the others: leave it out of worker.engine.speculation.drafters.",
                    (
                        Query(
                            ratio(
                                rate("headwater_accepted_draft_tokens_total", "drafter"),
                                rate("headwater_drafted_tokens_total", "drafter"),
                            ),
                            "{{drafter}}",
                        ),
                    ),
                ),
                Panel(
                    "Right, by place behind the last token",
                    "per second",
                    "Far places with next to nothing: max_nodes is larger than what pays.",
                    (Query(rate("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position"), "{{position}}"),),
                ),
                Panel(
                    "Drafted tokens",
                    "tokens/s",
                    "Drafted and of those right, of outputs that had a draft.",
                    (
                        Query(rate("vllm:spec_decode_num_draft_tokens_total"), "drafted"),
                        Query(rate("vllm:spec_decode_num_accepted_tokens_total"), "right"),
                        Query(rate("vllm:spec_decode_num_drafts_total"), "drafts"),
                    ),
                ),
            ),
        ),
        Row(
            "The pool, as workers see it",
            (
                Panel(
                    "Drafters connected",
                    "short",
                    "As of each worker's last step that asked. Below what is wanted: a drafter is down or refuses "
                    "the worker.",
                    (
                        Query(value("headwater_pool_drafters", "engine"), "{{engine}}"),
                        Query(value("headwater_processes_wanted", op="max", where='role="drafter"'), "wanted"),
                    ),
                ),
                Panel(
                    "Late",
                    "percentunit",
                    "Waits that reached the deadline, of steps that could draft. High: drafters are too slow or too "
                    "far "
                    "away; raise deadline_s, add drafters, or leave pool out.",
                    (Query(recorded("worker:headwater_pool_late:ratio5m"), "{{engine}}"),),
                    levels=Levels(attention=0.1, bad=0.2),
                ),
                Panel(
                    "Waiting",
                    "percentunit",
                    "Share of steps' time that went into waiting for drafts: what the pool's round trips cost.",
                    (
                        Query(
                            ratio(
                                rate("headwater_pool_wait_seconds_total", "engine"),
                                rate("headwater_step_seconds_sum", "engine"),
                            ),
                            "{{engine}}",
                        ),
                    ),
                ),
                Panel(
                    "In vain",
                    "per second",
                    "Drafts that came for what the model did not say, and outputs that a drafter had dropped. Many "
                    "dropped: raise drafter.max_sequences.",
                    (
                        Query(rate("headwater_pool_stale_total"), "stale"),
                        Query(rate("headwater_pool_nacks_total"), "dropped"),
                        Query(rate("headwater_pool_late_total"), "late"),
                    ),
                ),
            ),
        ),
        Row(
            "The pool's drafters",
            (
                Panel(
                    "Connected workers",
                    "short",
                    "Fewer than there are workers: see the logs of both sides.",
                    (Query(value("headwater_drafter_targets", "engine"), "{{engine}}"),),
                ),
                Panel(
                    "Outputs kept",
                    "short",
                    "At drafter.max_sequences the oldest are dropped, and told again when they are needed.",
                    (Query(value("headwater_drafter_sequences", "engine"), "{{engine}}"),),
                ),
                Panel(
                    "Steps made ahead",
                    "percentunit",
                    "While nobody could be waiting. Near none: the drafter is always behind its workers; add drafters.",
                    (
                        Query(
                            ratio(
                                rate("headwater_drafter_ahead_batches_total", "engine"),
                                rate("headwater_drafter_batches_total", "engine"),
                            ),
                            "{{engine}}",
                        ),
                    ),
                ),
                Panel(
                    "Outputs per step",
                    "short",
                    "How many outputs a drafter drafts for at a time.",
                    (
                        Query(
                            ratio(
                                rate("headwater_drafter_drafts_total", "engine"),
                                rate("headwater_drafter_batches_total", "engine"),
                            ),
                            "{{engine}}",
                        ),
                    ),
                ),
                Panel(
                    "Tokens drafted by the pool",
                    "tokens/s",
                    "Far above what workers verify: most drafting ahead is in vain.",
                    (
                        Query(rate("headwater_drafter_tokens_total"), "drafted"),
                        Query(rate("headwater_drafted_tokens_total", where='drafter="pool"'), "verified"),
                    ),
                ),
            ),
        ),
    ),
)
