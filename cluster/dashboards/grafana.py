"""Boards as Grafana knows them: JSON that any Grafana from version 10 on imports as it is."""

from __future__ import annotations

from typing import Any, assert_never

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as look
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from cluster.dashboards.panel import Board, Filter, Levels, Panel, Row, Unit

TAG = "headwater"
PANELS_OF_ROW = 100  # at most; a new panel changes the numbers, and so the links, of its own row alone
WIDTH = 24  # of a dashboard, in Grafana's columns
SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
ANYTHING = ".*"  # matches an absent label, too
GREEN, YELLOW, RED = "green", "yellow", "red"
UNITS: dict[Unit, str] = {
    "tokens": "short",
    "requests": "short",
    "tokens/s": "si:tok/s",
    "requests/s": "reqps",
    "per second": "ops",
}


def encode(board: Board) -> str:
    """The dashboard as text: the same for the same board."""
    text: str = JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(_dashboard(board).build())
    return text + "\n"


def _dashboard(board: Board) -> Any:
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags([TAG])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .link(_link())
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for choice in (Filter("cluster", "headwater_requests_live", "cluster"), *board.filters):
        made = made.with_variable(_variable(choice))
    for row_id, row in enumerate(board.rows, 1):
        made = made.with_row(dashboard.Row(row.title).id(row_id * PANELS_OF_ROW))
        height, width = _size(row)
        for panel_id, panel in enumerate(row.panels, row_id * PANELS_OF_ROW + 1):
            made = made.with_panel(_panel(panel).id(panel_id).height(height).span(width))
    return made


def _link() -> Any:
    """To all other boards, which show the same clusters and the same time."""
    link = dashboard.DashboardLink("Headwater").type(model.DashboardLinkType.DASHBOARDS).tags([TAG])
    return link.as_dropdown(True).include_vars(True).keep_time(True)


def _variable(choice: Filter) -> Any:
    return (
        dashboard.QueryVariable(choice.name)
        .label(choice.name)
        .datasource(SOURCE)
        .query(f"label_values({choice.metric}, {choice.label})")
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(ANYTHING)
        .current(model.VariableOption(selected=True, text="All", value="$__all"))
    )


def _size(row: Row) -> tuple[int, int]:
    """Height and width of each panel of a row: numbers in one line, pictures at most three."""
    if all(panel.kind == "value" for panel in row.panels):
        return 4, WIDTH // len(row.panels)
    return 8, WIDTH // min(len(row.panels), 3)


def _panel(panel: Panel) -> Any:
    made = _picture(panel).title(panel.title).description(panel.description).datasource(SOURCE)
    if panel.levels is not None:
        made = made.thresholds(_thresholds(panel.levels))
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(query.expr).legend_format(query.legend).datasource(SOURCE)
        made = made.with_target(target.format(PromQueryFormat.HEATMAP) if panel.kind == "heatmap" else target)
    return made


def _picture(panel: Panel) -> Any:
    unit = UNITS.get(panel.unit, panel.unit)
    match panel.kind:
        case "lines":
            return _lines(unit, panel.levels)
        case "stack":
            return _lines(unit, None).fill_opacity(40).stacking(common.StackingConfig().mode(look.StackingMode.NORMAL))
        case "value":
            return (
                stat.Panel()
                .unit(unit)
                .graph_mode(look.BigValueGraphMode.AREA)
                .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
            )
        case "heatmap":
            scale = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)
            return heatmap.Panel().color(scale).y_axis(heatmap.YAxisConfig().unit(unit))
    assert_never(panel.kind)


def _lines(unit: str, levels: Levels | None) -> Any:
    lines = (
        timeseries.Panel()
        .unit(unit)
        .min(0)
        .fill_opacity(8)
        .show_points(look.VisibilityMode.NEVER)
        .tooltip(common.VizTooltipOptions().mode(look.TooltipDisplayMode.MULTI).sort(look.SortOrder.DESCENDING))
        .legend(
            common.VizLegendOptions()
            .display_mode(look.LegendDisplayMode.TABLE)
            .placement(look.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["mean", "max", "lastNotNull"])
        )
    )
    dashed = common.GraphThresholdsStyleConfig().mode(look.GraphTresholdsStyleMode.DASHED)
    return lines if levels is None else lines.thresholds_style(dashed)


def _thresholds(levels: Levels) -> Any:
    first, second = levels.attention, levels.bad
    steps = [(None, GREEN), (first, YELLOW), (second, RED)]
    if second < first:
        steps = [(None, RED), (second, YELLOW), (first, GREEN)]
    made = [model.Threshold(value=start, color=color) for start, color in steps]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(made)
