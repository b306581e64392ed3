"""The dashboards in the tree are those of the code, and ask only for what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from cluster.dashboards.__main__ import main
from cluster.dashboards.boards import BOARDS
from cluster.dashboards.grafana import encode
from tests.deploy.promql import (
    PROMETHEUS_OWN,
    SUFFIXES,
    alerts,
    exported,
    expressions,
    names,
    panels,
    promtool,
    recorded,
    rules,
)

# What engines export for dashboards that people have already; ours show the same otherwise.
FOR_OTHERS = {"vllm:cache_config_info"}


def test_the_files_are_those_of_the_code(root: Path, tmp_path: Path) -> None:
    main(tmp_path)
    made = {file.name: file.read_text() for file in tmp_path.iterdir()}
    kept = {file.name: file.read_text() for file in (root / "deploy" / "grafana").iterdir()}
    assert made == kept, "run `python -m cluster.dashboards`"


def test_every_query_is_valid(tmp_path: Path) -> None:
    """As a recording rule each, which promtool parses."""
    found = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(expressions())]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": found}]}))
    checked = promtool("check", "rules", file)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(found)} rules found" in checked.stdout


def test_queries_name_only_metrics_and_rules_that_exist(root: Path) -> None:
    known = exported() | recorded(root) | PROMETHEUS_OWN
    for expression in expressions():
        assert names(expression), expression
        assert names(expression) <= known, expression


def test_every_metric_is_on_a_dashboard(root: Path) -> None:
    """Or in a rule that is."""
    shown = set().union(*map(names, expressions()))
    for rule in rules(root):
        if rule.get("record") in shown:
            shown |= names(rule["expr"])
    suffixes = "|".join(SUFFIXES["histogram"])
    families = {re.sub(f"({suffixes})$", "", name) for name in exported()}
    assert families - {re.sub(f"({suffixes})$", "", name) for name in shown} == FOR_OTHERS


def test_every_rule_is_on_a_dashboard_or_in_an_alert(root: Path) -> None:
    used = set().union(*map(names, expressions()), *(names(alert["expr"]) for alert in alerts(root)))
    assert recorded(root) <= used


def test_every_query_is_of_the_clusters_chosen() -> None:
    for panel in panels():
        for query in panel.queries:
            selectors = query.expr.count("{") - query.expr.count("{}")
            assert query.expr.count('cluster=~"$cluster"') == selectors or "ALERTS" in query.expr, query.expr


def test_every_panel_says_what_it_tells() -> None:
    for panel in panels():
        assert panel.title
        assert panel.description.endswith("."), panel.title
        assert panel.queries, panel.title
        assert all(query.legend for query in panel.queries), panel.title


def test_boards_are_told_apart_and_lead_to_each_other() -> None:
    assert len({board.uid for board in BOARDS}) == len({board.title for board in BOARDS}) == len(BOARDS) == 8
    for board in BOARDS:
        made = json.loads(encode(board))
        assert made["uid"] == board.uid
        assert len({panel["id"] for panel in made["panels"]}) == len(made["panels"])
        assert made["links"][0]["tags"] == made["tags"] == ["headwater"]
        assert made["links"][0]["includeVars"]
        assert len({panel["title"] for panel in made["panels"] if panel["type"] != "row"}) == len(board.panels)


def test_no_data_source_is_named_and_no_cluster_need_have_a_label() -> None:
    for board in BOARDS:
        made = json.loads(encode(board))
        variables = {variable["name"]: variable for variable in made["templating"]["list"]}
        assert variables["datasource"]["type"] == "datasource"
        assert variables["cluster"]["allValue"] == ".*"
        sources = [panel["datasource"] for panel in made["panels"] if panel["type"] != "row"]
        assert {source["uid"] for source in sources} == {"${datasource}"}


def test_panels_neither_overlap_nor_stick_out() -> None:
    for board in BOARDS:
        taken: set[tuple[int, int]] = set()
        for panel in json.loads(encode(board))["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24, panel["title"]
            cells = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not cells & taken, panel["title"]
            taken |= cells
