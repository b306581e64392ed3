"""A histogram of ours is, to a scraper, one of prometheus_client's."""

import prometheus_client
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.histogram import Histogram

BOUNDS = (0.5, 1, 2.5, 1000)
LABELS = {"model_name": "m", "engine": "w"}


def exposed(values: list[tuple[float, int]]) -> tuple[str, str]:
    """What a scrape reads of ours and of the library's, after the same observations."""
    registries = prometheus_client.CollectorRegistry(), prometheus_client.CollectorRegistry()
    ours = Histogram("vllm:time", "Some time.", LABELS, BOUNDS)
    registries[0].register(ours)
    family = prometheus_client.Histogram(
        "vllm:time", "Some time.", list(LABELS), buckets=BOUNDS, registry=registries[1]
    )
    for value, count in values:
        ours.observe(value, count)
        for _ in range(count):
            family.labels(**LABELS).observe(value)
    family.labels(**LABELS)
    first, second = (prometheus_client.generate_latest(registry).decode() for registry in registries)
    return first, second


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 2.5, 3.0, 1000.0, 4096.0]), st.integers(1, 4))))
@settings(max_examples=100, deadline=None)
def test_a_scrape_cannot_tell_them_apart(values: list[tuple[float, int]]) -> None:
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
    ours, theirs = exposed(values)
    assert ours == theirs
    assert 'le="+Inf"' in ours
