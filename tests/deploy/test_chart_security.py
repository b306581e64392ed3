"""Pods have no more rights than they need, and the network allows no more than the arrows of the design."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import chart

CHECKOV = Path(".venv-checkov/bin/checkov")
SKIPS = Path(__file__).with_name("checkov.yaml")
LARGE = "many-nodes-drafters"
RAY_PORTS = {6379, 6380, 6381, 6382, 6383, 8000, 8265, 52365, *range(10002, 11000)}
ANY_PORTS = set(range(32768, 61000))


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_every_container_is_restricted(example: str) -> None:
    for name, pod in chart.pods(chart.of_example(example)):
        assert pod["spec"]["securityContext"]["runAsNonRoot"], name
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "privileged": False,
                "readOnlyRootFilesystem": True,
                "runAsNonRoot": True,
                "runAsUser": 10001,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }, name
            assert set(container["resources"]) == {"requests", "limits"}, name


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_what_is_written_lies_in_volumes(example: str) -> None:
    for name, group in chart.groups(chart.of_example(example)).items():
        mounts = {
            mount["mountPath"]: mount.get("readOnly", False) for mount in chart.ray_container(group)["volumeMounts"]
        }
        writable = {path for path, is_read_only in mounts.items() if not is_read_only}
        assert writable == {"/tmp", "/tmp/ray", "/dev/shm", "/var/lib/headwater"}, name


def test_no_secret_is_in_the_environment() -> None:
    for _, pod in chart.pods(chart.of_example(LARGE)):
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            assert "envFrom" not in container
            assert not [one for one in container["env"] if "valueFrom" in one]


def allowed(source: str, target: str) -> set[int]:
    """Ports that pods of one role reach on those of another: what the one may send and the other may receive."""
    policies = [one["spec"] for one in chart.kind(chart.of_example(LARGE), "NetworkPolicy")]
    return ports(policies, source, target, "egress", "to") & ports(policies, target, source, "ingress", "from")


def ports(policies: list[Any], pod: str, peer: str, direction: str, word: str) -> set[int]:
    rules = [rule for spec in policies if selects(spec["podSelector"], pod) for rule in spec.get(direction, [])]
    return {
        number
        for rule in rules
        if any(
            "podSelector" in one and "namespaceSelector" not in one and selects(one["podSelector"], peer)
            for one in rule[word]
        )
        for port in rule["ports"]
        for number in range(port["port"], port.get("endPort", port["port"]) + 1)
        if port["protocol"] == "TCP"
    }


def selects(selector: Any, role: str) -> bool:
    labels = {
        "app.kubernetes.io/name": "headwater",
        "app.kubernetes.io/instance": "llm",
        "app.kubernetes.io/component": role,
    }
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels[rule["key"]] in rule["values"] for rule in selector.get("matchExpressions", [])
    )


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [
        ("router", "worker", RAY_PORTS | ANY_PORTS),  # sessions
        ("worker", "drafter", RAY_PORTS | ANY_PORTS),  # drafts
        ("worker", "worker", RAY_PORTS),  # prefixes, through Ray
        ("worker", "router", RAY_PORTS),
        ("router", "drafter", RAY_PORTS),
        ("drafter", "worker", RAY_PORTS),
        ("worker", "head", RAY_PORTS),
        ("head", "worker", RAY_PORTS),
    ],
)
def test_the_network_allows_just_the_arrows(source: str, target: str, found: set[int]) -> None:
    assert allowed(source, target) == found


def test_everybody_is_under_a_policy_in_both_directions() -> None:
    policies = [one["spec"] for one in chart.kind(chart.of_example(LARGE), "NetworkPolicy")]
    for role in ("head", "router", "worker", "drafter", "download"):
        mine = [spec["policyTypes"] for spec in policies if selects(spec["podSelector"], role)]
        assert ["Ingress", "Egress"] in mine, role


def test_rays_own_ports_are_those_that_the_policies_name() -> None:
    for name, group in chart.groups(chart.of_example(LARGE)).items():
        given = {key: int(port) for key, port in group["rayStartParams"].items() if key.endswith("port")}
        lowest, highest, metrics = (
            given.pop(key) for key in ("min-worker-port", "max-worker-port", "metrics-export-port")
        )
        assert {*given.values(), *range(lowest, highest + 1)} <= RAY_PORTS, name
        assert metrics == 8080


def test_clients_and_prometheus_come_from_where_the_values_say() -> None:
    clients, monitoring = [{"ipBlock": {"cidr": "10.1.0.0/16"}}], [{"namespaceSelector": {"matchLabels": {"a": "b"}}}]
    found = chart.objects({"networkPolicy": {"clients": clients, "monitoring": monitoring}})
    (router,) = [one for one in chart.kind(found, "NetworkPolicy") if one["metadata"]["name"].endswith("-router")]
    rules = {rule["ports"][0]["port"]: rule["from"] for rule in router["spec"]["ingress"]}
    assert rules == {9000: clients, 9100: monitoring}


def test_policies_can_be_left_to_others() -> None:
    assert not chart.kind(chart.objects({"networkPolicy": {"enabled": False}}), "NetworkPolicy")


@pytest.mark.skipif(
    not CHECKOV.exists(),
    reason=f"{CHECKOV} is not there: make it with `python3.11 -m venv .venv-checkov` and `pip install checkov`",
)
def test_checkov_finds_nothing_that_is_not_explained(tmp_path: Path) -> None:
    for example in chart.EXAMPLES:
        (tmp_path / f"{example}.yaml").write_text(yaml.safe_dump_all(lifted(example)))
    command = [
        CHECKOV,
        "--skip-download",
        "--framework",
        "kubernetes",
        "-d",
        tmp_path,
        "-o",
        "json",
        "--compact",
        "--quiet",
    ]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    skips = yaml.safe_load(SKIPS.read_text())
    found = {(one["check_id"], one["resource"]) for one in report["results"]["failed_checks"]}
    unexplained = {one for one in found if one[0] not in skips or not re.fullmatch(skips[one[0]]["where"], one[1])}
    assert report["summary"]["passed"] > 1000
    assert not report["summary"]["parsing_errors"]
    assert not unexplained
    assert {check for check, _ in found} == set(skips)  # an explanation that explains nothing is to be taken out


def lifted(example: str) -> list[chart.Object]:
    """The objects of an example, the pods out of the RayService, which checkov does not look into."""
    found = [one for one in chart.of_example(example) if one["kind"] not in ("RayService", "ConfigMap")]
    for name, group in chart.groups(chart.of_example(example)).items():
        metadata = {"name": f"{example}-{name}", "namespace": "headwater"} | group["template"]["metadata"]
        found.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group["template"]["spec"]})
    return found
