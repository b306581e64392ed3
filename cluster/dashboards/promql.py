"""PromQL of the dashboards: every expression is of the clusters chosen at the top, and works without such a label."""

from __future__ import annotations

from cluster.dashboards.panel import Query

CLUSTER = 'cluster=~"$cluster"'
OF_WORKER = 'engine=~"$worker"'
WINDOW = "[$__rate_interval]"


def recorded(rule: str, where: str = "") -> str:
    """What a recording rule has computed."""
    return _select(rule, where)


def value(metric: str, *by: str, op: str = "sum", where: str = "") -> str:
    """A gauge, put together over everything but the labels `by`."""
    return f"{op}{_by(by)} ({_select(metric, where)})"


def rate(metric: str, *by: str, where: str = "") -> str:
    """A counter's increase per second."""
    return f"sum{_by(by)} (rate({_select(metric, where)}{WINDOW}))"


def quantile(share: float, metric: str, *by: str, where: str = "") -> str:
    """Of a histogram."""
    return f"histogram_quantile({share:g}, {rate(f'{metric}_bucket', *by, 'le', where=where)})"


def mean(metric: str, *by: str, where: str = "") -> str:
    """Of a histogram."""
    return ratio(rate(f"{metric}_sum", *by, where=where), rate(f"{metric}_count", *by, where=where))


def ratio(part: str, whole: str) -> str:
    """One expression over another with the same labels."""
    return f"{part} / {whole}"


def quantiles(metric: str) -> tuple[Query, ...]:
    """The usual ones and the mean, of all clusters chosen together."""
    of = [Query(quantile(share, metric), f"p{share * 100:g}") for share in (0.5, 0.9, 0.95, 0.99)]
    return (*of, Query(mean(metric), "mean"))


def recorded_quantiles(metric: str) -> tuple[Query, ...]:
    """Those that have recording rules, of each cluster."""
    return tuple(
        Query(recorded(f"cluster:{metric}:p{share}_5m"), f"p{share} {{{{cluster}}}}") for share in (50, 95, 99)
    )


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


def _select(metric: str, where: str) -> str:
    return f"{metric}{{{', '.join(filter(None, (CLUSTER, where)))}}}"
