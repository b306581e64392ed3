"""Reading a Prometheus endpoint in tests."""

from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families


def scrape(address: str, **labels: str) -> dict[str, float]:
    """Every sample of an endpoint that has these labels, summed over its other labels, by the sample's name."""
    with urlopen(f"http://{address}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values
