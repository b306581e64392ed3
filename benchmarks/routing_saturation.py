"""The highest rate at which a cluster keeps up: what the rates of a sweep are counted in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from benchmarks.traffic import Trace

STEPS: Final = (1.1, 0.95, 0.8, 0.65, 0.5)  # of the throughput with many clients, tried from the top
KEPT_UP: Final = 0.85  # of the rate of arrivals; the rest is the latency of the last requests


def keeps_up(traces: Sequence[Trace]) -> bool:
    """Whether requests ended as fast as they came, and none was refused or went wrong."""
    if len(traces) < 2 or any(trace.error is not None for trace in traces):
        return False
    begin_s = min(trace.due_s for trace in traces)
    arriving_s = max(trace.due_s for trace in traces) - begin_s
    return arriving_s >= KEPT_UP * (max(trace.ended_s for trace in traces) - begin_s)


def completed_per_s(traces: Sequence[Trace]) -> float:
    """Requests completed per second, from the first one's arrival to the last one's end; 0 without requests."""
    done = [trace for trace in traces if trace.error is None]
    if not done:
        return 0.0
    return len(done) / (max(trace.ended_s for trace in traces) - min(trace.due_s for trace in traces))


async def find_saturation(throughput_per_s: float, offer: Callable[[float], Awaitable[Sequence[Trace]]]) -> float:
    """The highest of STEPS, in requests per second, at which the cluster keeps up; the lowest if it never does.

    `throughput_per_s`: with many clients in a closed loop. `offer` sends requests at a rate.
    """
    for step in STEPS:
        if keeps_up(await offer(step * throughput_per_s)):
            return step * throughput_per_s
    return STEPS[-1] * throughput_per_s
