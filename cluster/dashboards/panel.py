"""What a dashboard is made of, as plain data: boards of rows of panels. Drawn by grafana.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["lines", "stack", "value", "heatmap"]
Unit = Literal["short", "s", "percentunit", "bytes", "tokens", "tokens/s", "requests", "requests/s", "per second"]


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression; `legend` names each series that it gives, with its labels as {{label}}."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Levels:
    """From where a value needs attention, and from where it is bad. `bad` below `attention`: little is bad."""

    attention: float
    bad: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture. The description says what it tells, and what to do about it."""

    title: str
    unit: Unit
    description: str
    queries: tuple[Query, ...]
    kind: Kind = "lines"
    levels: Levels | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels side by side, under a title."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Filter:
    """A choice at the top of a board: values of `label` of `metric`, as the variable `name`."""

    name: str
    metric: str
    label: str


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard. Its uid is in links and never changes."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    filters: tuple[Filter, ...] = ()

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)
