"""Metrics that are made at the moment of a scrape, all with the same labels."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


class Families:
    """Makes families of one sample each, or of one for each value of a further label."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = labels

    def gauge(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def counter(self, name: str, meaning: str, value: float) -> Metric:
        family = CounterMetricFamily(name, meaning, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def counters(self, name: str, meaning: str, label: str, values: Mapping[str, float]) -> Metric:
        """By value of the further label."""
        family = CounterMetricFamily(name, meaning, labels=[*self._labels, label])
        for value, count in values.items():
            family.add_metric([*self._labels.values(), value], count)
        return family
