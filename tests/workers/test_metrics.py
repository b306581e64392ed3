"""What a worker serves is what Prometheus stores."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.request import Request, urlopen

import pytest

from workers.metrics import FETCH_OUTCOMES, MetricsServer, WorkerMetrics

AS_PROMETHEUS_ASKS = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


@pytest.fixture
def address() -> Iterator[str]:
    server = MetricsServer(WorkerMetrics(model_name="m", worker_id="w").registry, host="127.0.0.1", port=0)
    yield server.address
    server.stop()


def scraped(address: str, accept: str) -> str:
    with urlopen(Request(f"http://{address}/metrics", headers={"Accept": accept}), timeout=5) as reply:
        text: str = reply.read().decode()
    return text


@pytest.mark.parametrize("accept", [AS_PROMETHEUS_ASKS, "text/plain", "*/*"])
def test_names_keep_their_colons_whatever_format_is_asked_for(address: str, accept: str) -> None:
    text = scraped(address, accept)
    assert 'vllm:time_to_first_token_seconds_count{engine="w",model_name="m"} 0.0' in text
    assert "vllm_" not in text


def test_outcomes_of_fetches_begin_at_zero(address: str) -> None:
    text = scraped(address, AS_PROMETHEUS_ASKS)
    for outcome in FETCH_OUTCOMES:
        assert f'headwater_prefix_fetches_total{{engine="w",model_name="m",outcome="{outcome}"}} 0.0' in text
