"""What the router adds to a request's trace: its wait for a worker, and what became of it."""

from __future__ import annotations

from protos.tracing import OpenSpan, Tracer
from router.group import Group
from router.routing.protocol import Decision


def record(tracer: Tracer, span: OpenSpan, group: Group, decision: Decision | None) -> None:
    """Complete the span of a call whose group has ended, or is given up."""
    if not span.traceparent:
        return
    streams = group.streams
    span.note(
        {
            "gen_ai.usage.input_tokens": group.num_tokens,
            "gen_ai.usage.output_tokens": sum(stream.num_completion_tokens for stream in streams),
            "headwater.cached_tokens": sum(stream.cached_tokens or 0 for stream in streams),
        }
    )
    if decision is not None:
        span.note({"headwater.worker": decision.worker_id, "headwater.route": str(decision)})
    for event in sorted((event for stream in streams for event in stream.events), key=lambda event: event.at):
        span.happened(event)
    placed = [stream.placed for stream in streams if stream.placed is not None]
    if placed:
        tracer.record("queue", span.traceparent, begin=streams[0].created, end=min(placed))
