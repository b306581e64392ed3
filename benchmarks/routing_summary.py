"""The routing benchmark in one table: each load with every policy, and its ratios to the baseline's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from benchmarks.results import Cell

COLUMNS = (
    *("load", "policy", "requests/s", "ratio", "output tokens/s", "ratio"),
    *("TTFT p50, ms", "p90, ms", "baseline's p90 / its", "cached, %", "refused", "client CPU, %"),
)
NO_VALUE = "-"


@dataclass(frozen=True, slots=True)
class Line:
    """One policy under one load: medians over rounds, ratios taken round by round."""

    workload: str
    policy: str
    requests_per_s: float | None = None
    requests_ratio: float | None = None
    output_tokens_per_s: float | None = None
    output_ratio: float | None = None
    ttft_p50_ms: float | None = None
    ttft_p90_ms: float | None = None
    ttft_times_lower: float | None = None  # the baseline's p90 in terms of this one
    cached_percent: float | None = None
    num_refused: float | None = None
    client_cpu_percent: float | None = None


def lines(cells: Sequence[Cell]) -> Iterator[Line]:
    """A line for each workload and policy, in the order of the cells. What was not measured is None."""
    found = {(cell.workload, cell.arm, cell.metric): cell for cell in cells}
    for workload, policy in dict.fromkeys((cell.workload, cell.arm) for cell in cells):
        of = {metric: cell for (where, arm, metric), cell in found.items() if (where, arm) == (workload, policy)}
        yield Line(
            workload,
            policy,
            requests_per_s=_median(of.get("requests_per_s")),
            requests_ratio=_ratio(of.get("requests_per_s")),
            output_tokens_per_s=_median(of.get("output_tokens_per_s")),
            output_ratio=_ratio(of.get("output_tokens_per_s")),
            ttft_p50_ms=_median(of.get("ttft_p50_ms")),
            ttft_p90_ms=_median(of.get("ttft_p90_ms")),
            ttft_times_lower=_inverse(_ratio(of.get("ttft_p90_ms"))),
            cached_percent=_median(of.get("cached_percent")),
            num_refused=_median(of.get("num_refused")),
            client_cpu_percent=_median(of.get("client_cpu_percent")),
        )


def table(cells: Sequence[Cell], style: box.Box) -> Table:
    """All lines, for people."""
    made = Table(title="medians; ratios to the baseline, round by round", box=style, title_justify="left")
    for name in COLUMNS:
        made.add_column(name, justify="left" if name in ("load", "policy") else "right")
    for line in lines(cells):
        made.add_row(
            line.workload,
            line.policy,
            _number(line.requests_per_s, ".1f"),
            _number(line.requests_ratio, ".2f"),
            _number(line.output_tokens_per_s, ",.0f"),
            _number(line.output_ratio, ".2f"),
            _number(line.ttft_p50_ms, ",.0f"),
            _number(line.ttft_p90_ms, ",.0f"),
            _number(line.ttft_times_lower, ".2f"),
            _number(line.cached_percent, ".0f"),
            _number(line.num_refused, "g"),
            _number(line.client_cpu_percent, ".0f"),
        )
    return made


def _median(cell: Cell | None) -> float | None:
    return None if cell is None else cell.median


def _ratio(cell: Cell | None) -> float | None:
    return None if cell is None else cell.ratio


def _inverse(ratio: float | None) -> float | None:
    return 1 / ratio if ratio else None


def _number(value: float | None, form: str) -> str:
    return NO_VALUE if value is None else format(value, form)
