"""From the traces of one run to its metrics.

Tokens are timed when their message arrives. The time to the first token ends with the first message that has tokens. A
later message with k tokens that came a gap after the one before counts as k gaps of gap/k: what a reader who paces the
text would see. The first message gives no gaps, however many tokens it holds. Latencies are of completed requests only;
throughput counts every token that arrived.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from benchmarks.benchmark import Measured
from benchmarks.percentiles import named_percentiles
from benchmarks.traffic import Trace
from protos import errors

REFUSALS = (errors.Overloaded, errors.Draining)


class NothingCompletedError(Exception):
    """Not one request of a run completed, so there is nothing to measure."""


def tally(traces: Sequence[Trace]) -> Measured:
    """All metrics of a run, with errors and refusals by kind. Raises NothingCompletedError, which names the kinds."""
    done = [trace for trace in traces if trace.error is None]
    refusals, wrong = _kinds(traces, refused=True), _kinds(traces, refused=False)
    if not done:
        raise NothingCompletedError(f"none of {len(traces)} requests completed: {dict(refusals + wrong)}")
    values = {
        "num_requests": len(traces),
        "num_completed": len(done),
        "num_refused": refusals.total(),
        "num_errors": wrong.total(),
        **_volume(traces, done),
        **_latencies(done),
    }
    return Measured(values, errors=wrong, refusals=refusals)


def token_gaps(arrivals: Sequence[tuple[float, int]]) -> Iterator[float]:
    """The time between neighbouring tokens of one request, seconds, one gap for each token after the first message."""
    for (before_s, _), (now_s, num_tokens) in pairwise(arrivals):
        yield from [(now_s - before_s) / num_tokens] * num_tokens


def _kinds(traces: Iterable[Trace], *, refused: bool) -> Counter[str]:
    failed = (trace.error for trace in traces if trace.error is not None)
    return Counter(type(error).__name__ for error in failed if isinstance(error, REFUSALS) == refused)


def _volume(traces: Sequence[Trace], done: Sequence[Trace]) -> Mapping[str, float]:
    wall_s = max(trace.ended_s for trace in traces) - min(trace.due_s for trace in traces)
    output_tokens = sum(number for trace in traces for _, number in trace.arrivals)
    prompt_tokens = sum(trace.prompt_tokens for trace in done)
    cached_tokens = sum(trace.cached_tokens for trace in done)
    return {
        "wall_s": wall_s,
        "output_tokens_per_s": output_tokens / wall_s,
        "prompt_tokens_per_s": prompt_tokens / wall_s,
        "requests_per_s": len(done) / wall_s,
        "output_tokens": output_tokens,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": cached_tokens,
        "cached_percent": 100 * cached_tokens / prompt_tokens if prompt_tokens else 0.0,
    }


def _latencies(done: Sequence[Trace]) -> Mapping[str, float]:
    first = [trace.arrivals[0][0] - trace.due_s for trace in done if trace.arrivals]
    gaps = [gap for trace in done for gap in token_gaps(trace.arrivals)]
    return {
        **named_percentiles("ttft", "ms", _ms(first)),
        **named_percentiles("itl", "ms", _ms(gaps)),
        **named_percentiles("e2e", "ms", _ms(trace.ended_s - trace.due_s for trace in done)),
        "client_lag_max_ms": max(_ms(trace.sent_s - trace.due_s for trace in done)),
    }


def _ms(times_s: Iterable[float]) -> list[float]:
    return [1000 * time_s for time_s in times_s]
