"""A run as people and programs read it: conditions, then tables, or one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.benchmark import unit_of
from benchmarks.conditions import Conditions
from benchmarks.results import Cell, cells, counts, failures
from benchmarks.trial import Trial, round_name

QUICK = "QUICK RUN: too short and too few rounds; not for quoting."
NO_VALUE = "-"
PIPED_WIDTH = 200


@dataclass(frozen=True, slots=True)
class Report:
    """What there is to tell."""

    conditions: Conditions
    trials: Sequence[Trial]
    arms: Sequence[str]  # in the benchmark's order
    baseline: str

    @property
    def is_quick(self) -> bool:
        return bool(self.conditions.options.get("quick"))


def rows(report: Report) -> Iterator[dict[str, object]]:
    """The report as JSON objects: conditions first, then metrics, counts of errors and refusals, failed trials."""
    yield {"conditions": report.conditions.as_json(), "quick": report.is_quick}
    for cell in cells(report.trials, report.baseline):
        yield {
            "workload": cell.workload,
            "arm": cell.arm,
            "metric": cell.metric,
            "value": cell.median,
            "min": min(cell.values),
            "max": max(cell.values),
            "unit": unit_of(cell.metric),
            "ratio": cell.ratio,
            "baseline": report.baseline,
            "values": cell.values,
        }
    for count in counts(report.trials):
        yield {"workload": count.workload, "arm": count.arm, count.mishap: count.kind, "number": count.number}
    for trial in failures(report.trials):
        yield {"workload": trial.workload, "arm": trial.arm, "round": trial.round_index, "failed": trial.error}


def write_json(report: Report, path: Path) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows(report)), encoding="utf-8")


def print_report(report: Report, file: TextIO) -> None:
    """Conditions and tables: coloured on a terminal, Markdown tables when piped."""
    console = Console(file=file, highlight=False)
    if not console.is_terminal:
        console = Console(file=file, highlight=False, width=PIPED_WIDTH, color_system=None)
    if report.is_quick:
        console.print(QUICK, style="bold yellow")
    for line in _described(report.conditions):
        console.print(escape(line), soft_wrap=True)
    for table in _tables(report, box.SIMPLE_HEAD if console.is_terminal else box.MARKDOWN):
        console.print(table)
    for trial in failures(report.trials):
        which = f"{round_name(trial.round_index)} · {trial.workload} · {trial.arm}"
        console.print(escape(f"FAILED  {which}: {trial.error}"), style="bold red", soft_wrap=True)


def _described(conditions: Conditions) -> Iterator[str]:
    machine = conditions.machine
    yield f"{conditions.benchmark} · {conditions.date} · commit {conditions.commit}{' (dirty)' * conditions.dirty}"
    yield f"cpu: {machine.cpu}, {machine.num_cores} cores, {machine.memory_gib} GiB; {' '.join(machine.cpu_flags)}"
    yield f"gpu: {'; '.join(machine.gpus) or 'none'}"
    yield f"load average: {_listed(conditions.load_begin)} at begin, {_listed(conditions.load_end)} at end"
    yield f"took {conditions.wall_s:.1f} s; this process used {conditions.own_cpu_percent} % of one core"
    yield f"{machine.python} on {machine.system}; {_pairs(machine.versions)}"
    yield f"options: {_pairs(conditions.options)}"
    for name, value in conditions.config.items():
        yield f"{name}: {_pairs(value) if isinstance(value, Mapping) else value}"


def _listed(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.2f}" for number in numbers)


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _tables(report: Report, style: box.Box) -> Iterator[Table]:
    found = cells(report.trials, report.baseline)
    for workload in dict.fromkeys(cell.workload for cell in found):
        yield _workload_table(workload, [cell for cell in found if cell.workload == workload], report, style)
    tallied = counts(report.trials)
    if tallied:
        table = Table("workload", "arm", "what", "kind", "number", title="errors and refusals, all rounds", box=style)
        for count in tallied:
            table.add_row(count.workload, count.arm, count.mishap, count.kind, str(count.number))
        yield table


def _workload_table(workload: str, found: Sequence[Cell], report: Report, style: box.Box) -> Table:
    arms = sorted(report.arms, key=lambda arm: arm != report.baseline)
    table = Table(title=escape(workload), box=style, title_justify="left")
    table.add_column("metric")
    table.add_column("unit")
    for arm in arms:
        table.add_column(escape(arm), justify="right")
        if arm != report.baseline:
            table.add_column(f"/ {escape(report.baseline)}", justify="right")
    by_key = {(cell.metric, cell.arm): cell for cell in found}
    for metric in dict.fromkeys(cell.metric for cell in found):
        texts = [text for arm in arms for text in _texts(by_key.get((metric, arm)), arm == report.baseline)]
        table.add_row(metric, unit_of(metric), *texts)
    return table


def _texts(cell: Cell | None, is_baseline: bool) -> list[str]:
    if cell is None:
        return [NO_VALUE] if is_baseline else [NO_VALUE, NO_VALUE]
    value = _short(cell.median)
    if len(cell.values) > 1 and min(cell.values) != max(cell.values):
        value += f" ({_short(min(cell.values))} to {_short(max(cell.values))})"
    if is_baseline:
        return [value]
    return [value, NO_VALUE if cell.ratio is None else f"{cell.ratio:.2f}x"]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == round(value) else f"{value:.3g}"
