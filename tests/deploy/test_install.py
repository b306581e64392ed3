"""The tools that people have, against the fake API server: kubectl and Helm's own engine.

So it is shown that the server behaves as a real one does towards them, and that what we hand out can be installed.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest
import yaml

from tests.deploy.api_server import ApiServer
from tests.deploy.conftest import Deploy
from tests.deploy.rays import ray_service

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "headwater"
EXAMPLES = sorted((CHART / "ci").glob("*.yaml"))
PLAIN = sorted((ROOT / "deploy" / "kuberay").glob("*.yaml"))
SMALL = {
    "Chart.yaml": "apiVersion: v2\nname: small\nversion: 0.1.0\n",
    "values.yaml": "replicas: 1\n",
    "templates/all.yaml": """\
apiVersion: v1
kind: ConfigMap
metadata: {name: {{ .Release.Name }}-settings}
data: {replicas: {{ .Values.replicas | quote }}}
---
apiVersion: v1
kind: Service
metadata: {name: {{ .Release.Name }}-headwater}
spec: {selector: {app: headwater}, ports: [{name: grpc, port: 9000}]}
---
apiVersion: ray.io/v1
kind: RayService
metadata: {name: {{ .Release.Name }}}
spec:
  rayClusterConfig:
    headGroupSpec: {template: {spec: {containers: [{name: head, image: "headwater:1"}]}}}
    workerGroupSpecs:
      - groupName: worker
        replicas: {{ .Values.replicas }}
        template: {spec: {containers: [{name: worker, image: "headwater:1"}]}}
""",
}


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    (folder / "templates").mkdir(parents=True)
    for name, text in SMALL.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def configured(kube: ApiServer) -> Iterator[helm.Config]:
    with helm.Config(kube_apiserver=kube.url, kube_token="a-token", namespace="default", storage_driver="memory") as it:
        yield it


class Kubectl:
    """kubectl, with a kubeconfig that leads to the fake cluster."""

    def __init__(self, deploy: Deploy, cache: Path) -> None:
        self._options = ["--kubeconfig", str(deploy.kubeconfig), "--cache-dir", str(cache)]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["kubectl", *self._options, *arguments], capture_output=True, text=True, timeout=120, check=False
        )

    def lines(self, *arguments: str) -> list[str]:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()


@pytest.fixture
def kubectl(deploy: Deploy, tmp_path: Path) -> Kubectl:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not on the PATH")
    return Kubectl(deploy, tmp_path / "cache")


def objects(level: str = "1", num_workers: int = 2) -> list[dict[str, Any]]:
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"level": level}}
    ports = [{"name": "grpc", "port": 9000}, {"name": "metrics", "port": 9100}]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"ports": ports}}
    return [settings, service, ray_service(num_workers=num_workers)]


def test_kubectl_applies_compares_and_deletes(kube: ApiServer, deploy: Deploy, kubectl: Kubectl) -> None:
    file = deploy.file(*objects())
    created = ["configmap/settings created", "service/s created", "rayservice.ray.io/demo created"]
    assert kubectl.lines("apply", "-f", file) == created
    kubectl.lines("apply", "-f", file)
    assert kube.get("RayService", "demo")["metadata"]["generation"] == 1
    assert kubectl.run("diff", "-f", file).returncode == 0
    deploy.file(*objects(level="2", num_workers=3))
    difference = kubectl.run("diff", "-f", file)
    assert difference.returncode == 1
    assert '+  level: "2"' in difference.stdout
    assert "+      replicas: 3" in difference.stdout
    assert kube.get("ConfigMap", "settings")["data"] == {"level": "1"}
    kubectl.lines("apply", "-f", file)
    assert kubectl.lines("get", "configmap", "settings", "-o", "jsonpath={.data.level}") == ["2"]
    assert kubectl.lines("get", "rayservices", "-o", "name") == ["rayservice.ray.io/demo"]
    assert len(kubectl.lines("delete", "-f", file)) == 3
    assert not kube.has("RayService", "demo")


def test_kubectl_and_headwater_see_each_others_fields(kube: ApiServer, deploy: Deploy, kubectl: Kubectl) -> None:
    file = deploy.file(*objects())
    assert deploy.run("apply", "-f", file).exit_code == 0
    deploy.file(*objects(level="2"))
    refused = kubectl.run("apply", "--server-side", "-f", file)
    assert refused.returncode == 1
    assert 'conflicts with "headwater"' in refused.stderr
    assert ".data.level" in refused.stderr
    kubectl.lines("apply", "--server-side", "--force-conflicts", "-f", file)
    deploy.file(*objects(level="3"))
    done = deploy.run("apply", "-f", file)
    assert done.exit_code == 1
    assert "ConfigMap default/settings: .data.level is set by 'kubectl'" in done.stderr


def test_kubectl_is_refused_what_the_schemas_refuse(kube: ApiServer, deploy: Deploy, kubectl: Kubectl) -> None:
    wrong = ray_service()
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicaz"] = 2
    done = kubectl.run("apply", "-f", deploy.file(wrong))
    assert done.returncode == 1
    assert "replicaz" in done.stderr
    assert not kube.has("RayService", "demo")


def test_kubectl_waits_for_a_condition(kube: ApiServer, deploy: Deploy, kubectl: Kubectl) -> None:
    from tests.deploy.rays import service_status

    kube.add(ray_service())
    kube.set_status("RayService", "demo", service_status())
    assert kubectl.lines("wait", "rayservice/demo", "--for=condition=Ready", "--timeout=30s")


def test_helm_installs_upgrades_and_uninstalls(kube: ApiServer, configured: helm.Config, chart: Path) -> None:
    configured.install(str(chart), "demo", {"replicas": 1})
    assert kube.get("ConfigMap", "demo-settings")["data"] == {"replicas": "1"}
    configured.upgrade(str(chart), "demo", {"replicas": 3})
    group = kube.get("RayService", "demo")["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert group["replicas"] == 3
    configured.uninstall("demo")
    assert not any(kube.has(kind, name) for kind, name in (("RayService", "demo"), ("Service", "demo-headwater")))


def test_helm_is_refused_what_the_schemas_refuse(kube: ApiServer, configured: helm.Config, chart: Path) -> None:
    with pytest.raises(helm.HelmError, match="spec"):
        configured.install(str(chart), "demo", {"replicas": "many"})
    assert not kube.has("RayService", "demo")


def test_headwater_compares_with_what_helm_installed(
    deploy: Deploy, configured: helm.Config, chart: Path, tmp_path: Path
) -> None:
    configured.install(str(chart), "demo", {"replicas": 1})
    path = tmp_path / "rendered.yaml"
    with helm.Chart.load(str(chart)) as loaded:
        path.write_text("\n---\n".join(loaded.render({"replicas": 2}, name="demo", namespace="default").values()))
    done = deploy.run("diff", "-f", str(path))
    assert done.exit_code == 1, done.output
    assert "+      replicas: 2" in done.stdout
    refused = deploy.run("apply", "-f", str(path))
    assert refused.exit_code == 1
    assert "replicas" in refused.stderr


@pytest.mark.parametrize("values", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_every_example_of_the_chart_can_be_installed(kube: ApiServer, configured: helm.Config, values: Path) -> None:
    _serve_monitors(kube)
    configured.install(str(CHART), "demo", yaml.safe_load(values.read_text()) or {})
    [service] = kube.store.select(kube.kind({"kind": "RayService"}), "default", lambda _: True)
    configured.upgrade(str(CHART), "demo", yaml.safe_load(values.read_text()) or {})
    [same] = kube.store.select(kube.kind({"kind": "RayService"}), "default", lambda _: True)
    assert same["metadata"]["generation"] == service["metadata"]["generation"]
    configured.uninstall("demo")
    assert not kube.store.select(kube.kind({"kind": "RayService"}), "default", lambda _: True)


@pytest.mark.parametrize("manifests", PLAIN, ids=[path.stem for path in PLAIN])
def test_every_plain_manifest_can_be_applied_by_both(
    kube: ApiServer, deploy: Deploy, kubectl: Kubectl, manifests: Path
) -> None:
    _serve_monitors(kube)
    namespaces = {
        one["metadata"].get("namespace", "default") for one in yaml.safe_load_all(manifests.read_text()) if one
    }
    for name in namespaces - {"default"}:
        kube.add({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    assert deploy.run("apply", "-f", str(manifests)).exit_code == 0
    # By force: a list that is one value has got defaults, so that it differs from what the same manifest says.
    assert kubectl.lines("apply", "--server-side", "--force-conflicts", "-f", str(manifests))
    assert deploy.run("diff", "-f", str(manifests)).stdout == ""
    assert deploy.run("uninstall", "--yes", "--with-data", "-f", str(manifests)).exit_code == 0
    assert not kube.store.select(kube.kind({"kind": "RayService"}), "", lambda _: True)


@pytest.mark.skipif(not EXAMPLES, reason="the chart has no examples")
def test_the_chart_rendered_can_be_applied_by_headwater(kube: ApiServer, deploy: Deploy, tmp_path: Path) -> None:
    _serve_monitors(kube)
    folder = tmp_path / "rendered"
    folder.mkdir()
    with helm.Chart.load(str(CHART)) as loaded:
        rendered = loaded.render(yaml.safe_load(EXAMPLES[0].read_text()) or {}, name="demo", namespace="default")
    for name, text in rendered.items():
        if name.endswith(".yaml"):
            (folder / name.replace("/", "-")).write_text(text)
    done = deploy.run("apply", "-f", str(folder))
    assert done.exit_code == 0, (done.output, done.exception)
    assert deploy.run("diff", "-f", str(folder)).stdout == ""
    assert deploy.run("uninstall", "--yes", "--with-data").exit_code == 0
    assert not kube.store.select(kube.kind({"kind": "RayService"}), "default", lambda _: True)


def _serve_monitors(kube: ApiServer) -> None:
    """The kinds that a chart may use and that are neither built in nor KubeRay's."""
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    for group, version, kind in (
        ("monitoring.coreos.com", "v1", "PodMonitor"),
        ("monitoring.coreos.com", "v1", "ServiceMonitor"),
        ("monitoring.coreos.com", "v1", "PrometheusRule"),
        ("gateway.networking.k8s.io", "v1", "GRPCRoute"),
    ):
        plural = f"{kind.lower()}s"
        kube.add(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {
                    "name": f"{plural}.{group}",
                    "annotations": {"api-approved.kubernetes.io": "unapproved, for a test"},
                },
                "spec": {
                    "group": group,
                    "scope": "Namespaced",
                    "names": {"kind": kind, "plural": plural},
                    "versions": [{"name": version, "served": True, "storage": True, "schema": schema}],
                },
            }
        )
