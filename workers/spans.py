"""What a worker adds to a request's trace: how long it waited, computed its prompt, and decoded."""

from __future__ import annotations

from typing import Protocol

from protos.tracing import Tracer


class Ended(Protocol):
    """A request that has ended, as EngineLoop kept it; times as of time.monotonic."""

    @property
    def traceparent(self) -> str: ...
    @property
    def num_prompt(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def arrived(self) -> float: ...
    @property
    def started(self) -> float | None: ...
    @property
    def first_token(self) -> float | None: ...
    @property
    def last_token(self) -> float | None: ...


def record(tracer: Tracer, request: Ended, outcome: str, now: float, *, is_failure: bool = False) -> None:
    """One span for the worker, and within it one for each phase that was reached."""
    if not request.traceparent:
        return
    tokens = {"gen_ai.usage.input_tokens": request.num_prompt, "gen_ai.usage.output_tokens": request.num_tokens}
    worker = tracer.record(
        "worker",
        request.traceparent,
        begin=request.arrived,
        end=now,
        attributes={**tokens, "headwater.outcome": outcome},
        failure=outcome if is_failure else "",
    )
    started, first, last = request.started, request.first_token, request.last_token
    tracer.record("queue", worker, begin=request.arrived, end=started or first or now)
    if started is not None:
        tracer.record("prefill", worker, begin=started, end=first or now)
    if first is not None and last is not None:
        tracer.record("decode", worker, begin=first, end=last)
