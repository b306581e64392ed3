"""The rules are right, every alert fires when it should, and each has its page in the runbook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.promql import alerts, exported, names, promtool, recorded, rules

SEVERITIES = {"critical", "warning"}
SECTION = re.compile(r"^## (Headwater\w+)$", re.MULTILINE)


@pytest.fixture
def scenarios(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "deploy" / "prometheus" / "tests").glob("*.yaml"))
    return [test for file in files for test in yaml.safe_load(file.read_text())["tests"]]


def firing(scenario: dict[str, Any]) -> set[str]:
    """The alerts that a scenario wants to fire."""
    samples = [sample for test in scenario["promql_expr_test"] for sample in test["exp_samples"]]
    return {name for sample in samples for name in re.findall(r'alertname="(\w+)"', sample["labels"])}


def test_the_rules_are_valid(root: Path) -> None:
    found = promtool("check", "rules", *(root / "deploy" / "prometheus" / "rules").glob("*.yaml"))
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_scenario_has_exactly_its_alerts(root: Path) -> None:
    files = sorted((root / "deploy" / "prometheus" / "tests").glob("*.yaml"))
    found = promtool("test", "rules", *files)
    assert files
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_alert_fires_in_a_scenario(root: Path, scenarios: list[dict[str, Any]]) -> None:
    assert {alert["alert"] for alert in alerts(root)} == set().union(*map(firing, scenarios))


def test_no_alert_fires_when_all_is_well(root: Path, scenarios: list[dict[str, Any]]) -> None:
    well = [scenario for scenario in scenarios if scenario["name"].startswith("all is well")]
    assert len(well) == 2
    for scenario in well:
        assert {"expr": "ALERTS", "eval_time": "90m", "exp_samples": []} in scenario["promql_expr_test"]
    fed = {name for entry in well[0]["input_series"] for name in names(entry["series"])}
    read = {name for alert in alerts(root) for name in names(alert["expr"])}
    wanted = {name for name in read if not name.startswith(("cluster:", "worker:", "headwater:"))}
    assert wanted <= fed, "what an alert reads is missing where all is well, so it could not have fired"


def test_every_alert_says_what_to_do(root: Path) -> None:
    for alert in alerts(root):
        name, notes = alert["alert"], alert["annotations"]
        assert name.startswith("Headwater"), name
        assert "for" in alert, name
        assert alert["labels"].keys() == {"severity"}, name
        assert alert["labels"]["severity"] in SEVERITIES, name
        assert notes.keys() == {"summary", "description", "runbook_url"}, name
        assert "$value" in notes["description"] or "absent(" in alert["expr"], name
        assert notes["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def test_every_alert_has_a_section_in_the_runbook_and_every_section_an_alert(root: Path) -> None:
    sections = SECTION.findall((root / "docs" / "runbook.md").read_text())
    assert sections == [alert["alert"] for alert in alerts(root)]


def test_the_runbook_names_only_metrics_and_rules_that_exist(root: Path) -> None:
    text = (root / "docs" / "runbook.md").read_text()
    named = set(re.findall(r"\b(?:cluster|worker|headwater|vllm):\w+(?::\w+)?|\bheadwater_\w+", text))
    assert named
    assert named - exported() - recorded(root) - {name.removesuffix("_bucket") for name in exported()} == set()


def test_rules_read_only_what_exists(root: Path) -> None:
    for rule in rules(root):
        unknown = names(rule["expr"]) - exported() - recorded(root)
        assert not unknown, rule


def test_names_of_recording_rules_tell_level_metric_and_operation(root: Path) -> None:
    for name in recorded(root):
        level, metric, operation = name.split(":")
        assert level in {"cluster", "worker", "headwater"}, name
        assert metric, name
        assert operation, name


def test_every_threshold_is_used(root: Path) -> None:
    used = set().union(*(names(rule["expr"]) for rule in rules(root)))
    thresholds = {name for name in recorded(root) if name.endswith(":objective")}
    assert thresholds
    assert thresholds <= used
