"""Every object fits the schemas of Kubernetes 1.29 to 1.37, KubeRay's own, and what the Prometheus operator knows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy import chart
from tests.deploy.api_schemas import Kind, custom_kinds

VERSIONS = tuple(f"1.{minor}" for minor in range(29, 38))
CUSTOM = ("RayService", "PodMonitor", "PrometheusRule")
CRD = Path("../shared/k8s/crds/ray.io_rayservices.yaml")
ENDPOINT_KEYS = {"port", "path", "interval", "relabelings"}
RELABELING_KEYS = {"sourceLabels", "targetLabel", "replacement"}
RULE_KEYS = {"record", "alert", "expr", "for", "keep_firing_for", "labels", "annotations"}


def built_in(example: str) -> Iterator[chart.Object]:
    """Dashboards are many and alike: the first stands for all."""
    found = [one for one in chart.of_example(example) if one["kind"] not in (*CUSTOM, "ConfigMap")]
    yield from found + chart.kind(chart.of_example(example), "ConfigMap")[:1]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_largest_example_has_fits_every_version(version: str) -> None:
    for one in built_in("many-nodes-drafters"):
        kubernetes_validate.validate(one, version, strict=True)


def test_kubernetes_would_refuse_an_unknown_key() -> None:
    service = chart.kind(chart.objects(), "Service")[0]
    service["spec"]["port"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="port"):
        kubernetes_validate.validate(service, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("example", sorted(set(chart.EXAMPLES) - {"many-nodes-drafters"}))
def test_other_examples_fit(example: str) -> None:
    for version in (VERSIONS[0], VERSIONS[-1]):
        for one in built_in(example):
            kubernetes_validate.validate(one, version, strict=True)


@pytest.mark.parametrize("example", chart.EXAMPLES)
@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_pods_of_ray_fit(example: str, version: str) -> None:
    for name, group in chart.groups(chart.of_example(example)).items():
        metadata = {"name": name} | group["template"]["metadata"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, version, strict=True)


@pytest.fixture(scope="module")
def ray_service() -> Kind:
    if not CRD.exists():
        pytest.skip(f"KubeRay's RayService CRD is not at {CRD}")
    return next(custom_kinds(yaml.load(CRD.read_text(), yaml.CSafeLoader)))


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_the_ray_service_fits_kuberay(ray_service: Kind, example: str) -> None:
    (found,) = chart.kind(chart.of_example(example), "RayService")
    assert not ray_service.fault(ray_service.defaulted(found))


def test_kuberay_would_refuse_an_unknown_key(ray_service: Kind) -> None:
    (found,) = chart.kind(chart.objects(), "RayService")
    found["spec"]["rayClusterConfig"]["headGroupSpec"]["label"] = {}
    assert "label" in ray_service.fault(ray_service.defaulted(found))


def test_pod_monitors_select_pods_and_ports_that_there_are() -> None:
    found = chart.of_example("many-nodes-drafters")
    monitors = chart.kind(found, "PodMonitor")
    pods = [group["template"] for group in chart.groups(found).values()]
    assert len(monitors) == 4
    for monitor in monitors:
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        chosen = [pod for pod in pods if wanted <= pod["metadata"]["labels"].items()]
        assert chosen, monitor["metadata"]["name"]
        for pod in chosen:
            assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= port_names(pod)


def port_names(pod: chart.Object) -> set[str]:
    return {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}


def test_pod_monitors_have_only_fields_that_the_operator_knows() -> None:
    for monitor in chart.kind(chart.of_example("many-nodes-drafters"), "PodMonitor"):
        assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
        assert set(monitor["spec"]) == {"jobLabel", "selector", "namespaceSelector", "podMetricsEndpoints"}
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert set(endpoint) == ENDPOINT_KEYS
            assert all(set(rule) <= RELABELING_KEYS for rule in endpoint["relabelings"])


def test_the_rule_object_holds_the_rules_of_the_files() -> None:
    (found,) = chart.kind(chart.of_example("many-nodes-drafters"), "PrometheusRule")
    groups: list[dict[str, Any]] = []
    for path in sorted(Path("deploy/prometheus/rules").glob("*.yaml")):
        groups += yaml.safe_load(path.read_text())["groups"]
    assert found["spec"] == {"groups": groups}
    for group in groups:
        assert {"name", "rules"} <= set(group) <= {"name", "rules", "interval", "limit", "labels"}
        assert all(set(rule) <= RULE_KEYS for rule in group["rules"])
