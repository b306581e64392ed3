"""`headwater deploy preflight`: every check is satisfied by what it asks for, and fails, with a remedy, without it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.deploy.api_server import ApiServer
from tests.deploy.conftest import Deploy
from tests.deploy.rays import add_node, add_operator, add_pod, changed, container, pod_status, ray_service


def findings(deploy: Deploy, *objects: dict[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
    """(status, found, remedy) by check."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for one in deploy.json("preflight", "-f", deploy.file(*objects)):
        found.setdefault(one["check"], []).append((one["status"], one["found"], one["remedy"]))
    return found


def secret(name: str, *keys: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": dict.fromkeys(keys, "x")}


def claim(**spec: Any) -> dict[str, Any]:
    whole = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}, **spec}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "cache"}, "spec": whole}


def storage_class(name: str, *, is_default: bool) -> dict[str, Any]:
    marks = {"storageclass.kubernetes.io/is-default-class": "true"} if is_default else {}
    metadata = {"name": name, "annotations": marks}
    return {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": metadata, "provisioner": "disks"}


def test_all_is_well_where_all_is_there(kube: ApiServer, deploy: Deploy) -> None:
    add_operator(kube)
    add_node(kube, "n1")
    done = deploy.run("preflight", "-f", deploy.file(ray_service()))
    assert done.exit_code == 0, done.output
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"ok"}
    assert "2 needed, 4 free on 1 nodes" in done.stdout
    assert not [line for line in kube.asked if "PATCH" in line or "DELETE" in line]


def test_too_few_gpus_are_a_finding_with_the_numbers(kube: ApiServer, deploy: Deploy) -> None:
    add_operator(kube)
    add_node(kube, "n1", gpus=4)
    file = deploy.file(ray_service(num_workers=3, gpus=2))
    done = deploy.run("preflight", "-f", file)
    assert done.exit_code == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("failed")]
    wanted = "failed GPUs 6 needed, 4 free on 1 nodes; add nodes, free some, or ask for less"
    assert " ".join(line.split()) == wanted


def test_what_pods_have_reserved_is_not_free(kube: ApiServer, deploy: Deploy) -> None:
    add_node(kube, "n1", gpus=2)
    busy = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "busy"}}
    kube.add(busy | {"spec": {"containers": [container(gpus=1)], "nodeName": "n1"}, "status": {"phase": "Running"}})
    [(status, found, _)] = findings(deploy, ray_service(num_workers=2))["GPUs"]
    assert (status, found) == ("failed", "2 needed, 1 free on 1 nodes")
    kube.set_status("Pod", "busy", {"phase": "Succeeded"})
    assert findings(deploy, ray_service(num_workers=2))["GPUs"][0][0] == "ok"


def test_an_upgrade_needs_its_surge(kube: ApiServer, deploy: Deploy) -> None:
    add_node(kube, "n1", gpus=3)
    [(status, found, remedy)] = findings(deploy, ray_service(num_workers=2))["upgrade"]
    assert status == "warning"
    assert "lack 1 GPUs" in found
    assert "upgradeStrategy" in remedy
    assert "upgrade" not in findings(deploy, ray_service(num_workers=2, upgrade="None"))
    add_node(kube, "n2", gpus=1)
    assert findings(deploy, ray_service(num_workers=2))["upgrade"][0][0] == "ok"


def test_an_upgrade_that_does_not_fit_now_fails(kube: ApiServer, deploy: Deploy) -> None:
    add_node(kube, "n1", gpus=3)
    kube.add(ray_service(num_workers=2))
    for index in range(2):
        add_pod(kube, f"w{index}", pod_status(is_ready=True))
    for name in ("w0", "w1"):
        kube.delete("Pod", name)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}
        kube.add(pod | {"spec": {"containers": [container(gpus=1)], "nodeName": "n1"}, "status": {"phase": "Running"}})
    same = findings(deploy, ray_service(num_workers=2))
    assert "GPUs" not in same
    assert same["upgrade"][0][0] == "warning"
    [(status, found, _)] = findings(deploy, ray_service(num_workers=2, priority=1))["GPUs"]
    assert (status, found) == ("failed", "2 needed, 1 free on 1 nodes")


def test_pods_that_fit_on_no_single_node_are_found(kube: ApiServer, deploy: Deploy) -> None:
    for name in ("n1", "n2"):
        add_node(kube, name, gpus=3)
    found = findings(deploy, ray_service(num_workers=3, gpus=2))
    assert found["GPUs"][0][0] == "ok"
    assert found["placement"][0][:2] == ("failed", "1 pods of demo worker fit on no node")


def test_other_devices_are_counted_by_their_own_name(kube: ApiServer, deploy: Deploy) -> None:
    add_node(kube, "n1")
    reserved = {"amd.com/gpu": "3"}
    service = ray_service(containers=[{"name": "ray", "image": "x", "resources": {"limits": reserved}}])
    [(status, found, _)] = findings(deploy, service)["amd.com/gpu"]
    assert (status, found) == ("failed", "6 needed, 0 free on 1 nodes")


def test_every_page_of_a_long_list_is_read(kube: ApiServer, deploy: Deploy) -> None:
    for index in range(5):
        add_node(kube, f"n{index}", gpus=1)
    kube.max_page = 2
    assert findings(deploy, ray_service(num_workers=5))["GPUs"][0][1] == "5 needed, 5 free on 5 nodes"


def test_selectors_and_taints_are_kept(kube: ApiServer, deploy: Deploy) -> None:
    add_node(kube, "n1", taints=[{"key": "gpu", "value": "yes", "effect": "NoSchedule"}])
    assert findings(deploy, ray_service())["placement"][0][0] == "failed"
    add_node(kube, "n2", gpus=0)
    tolerations = [{"key": "gpu", "operator": "Exists"}]
    assert "placement" not in findings(deploy, ray_service(tolerations=tolerations))
    elsewhere = {"kubernetes.io/hostname": "n2"}
    [lacking] = findings(deploy, ray_service(tolerations=tolerations, nodeSelector=elsewhere))["placement"]
    assert lacking[1] == "2 pods of demo worker fit on no node"


def test_autoscaling_up_to_the_most_replicas(kube: ApiServer, deploy: Deploy) -> None:
    add_node(kube, "n1", gpus=8)
    service = ray_service(num_workers=2)
    cluster = service["spec"]["rayClusterConfig"]
    cluster["enableInTreeAutoscaling"] = True
    cluster["workerGroupSpecs"][0]["maxReplicas"] = 8
    assert findings(deploy, service)["autoscaling"][0][0] == "ok"
    cluster["workerGroupSpecs"][0]["maxReplicas"] = 10
    status, found, _ = findings(deploy, service)["autoscaling"][0]
    assert (status, found) == ("warning", "at the most replicas it would lack 2 GPUs")


def test_secrets_must_exist_with_their_keys(kube: ApiServer, deploy: Deploy) -> None:
    key = {"name": "token", "key": "hf"}
    env = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": key}}]
    service = ray_service(containers=[container(env=env)])
    [(status, found, remedy)] = findings(deploy, service)["Secret"]
    assert (status, found) == ("failed", "token does not exist, which demo worker needs")
    assert remedy == "kubectl create secret generic token -n default --from-file=hf=FILE"
    kube.add(secret("token", "other"))
    assert findings(deploy, service)["Secret"][0][1] == "token has no hf, which demo worker needs"
    kube.delete("Secret", "token")
    assert findings(deploy, service, secret("token", "hf"))["Secret"][0][0] == "ok"
    key["optional"] = True  # type: ignore[assignment]
    assert "Secret" not in findings(deploy, service)


def test_what_volumes_and_accounts_name_must_exist(kube: ApiServer, deploy: Deploy) -> None:
    volumes = [
        {"name": "a", "persistentVolumeClaim": {"claimName": "cache"}},
        {"name": "b", "secret": {"secretName": "tls"}},
        {"name": "c", "projected": {"sources": [{"configMap": {"name": "settings"}}]}},
    ]
    found = findings(deploy, ray_service(volumes=volumes, serviceAccountName="runner"))
    for kind, name in (
        ("PersistentVolumeClaim", "cache"),
        ("Secret", "tls"),
        ("ConfigMap", "settings"),
        ("ServiceAccount", "runner"),
    ):
        assert found[kind][0][:2] == ("failed", f"{name} does not exist, which demo worker needs")


def test_a_claim_needs_its_storage_class(kube: ApiServer, deploy: Deploy) -> None:
    assert findings(deploy, claim())["StorageClass"][0][0] == "failed"
    kube.add(storage_class("slow", is_default=False))
    assert "none is the default" in findings(deploy, claim())["StorageClass"][0][1]
    assert findings(deploy, claim(storageClassName="slow"))["StorageClass"][0][0] == "ok"
    assert findings(deploy, claim(storageClassName="fast"))["StorageClass"][0][0] == "failed"
    kube.add(storage_class("disks", is_default=True))
    assert findings(deploy, claim())["StorageClass"][0][0] == "ok"


@pytest.mark.parametrize(
    ("verb", "resource"), [("patch", "rayservices"), ("create", "rayservices"), ("get", "rayservices")]
)
def test_missing_rights_are_named(kube: ApiServer, deploy: Deploy, verb: str, resource: str) -> None:
    assert findings(deploy, ray_service(upgrade="None"))["rights"][0][0] == "ok"
    kube.forbidden.add((verb, resource))
    if verb == "get":
        kube.delete("CustomResourceDefinition", "rayclusters.ray.io")  # of no use here, and not asked for
    [(status, found, _)] = findings(deploy, changed(ray_service(), suspend=False))["rights"]
    assert (status, found) == ("failed", f"{verb} of {resource}.ray.io in default is not allowed")


def test_what_may_not_be_read_is_a_warning(kube: ApiServer, deploy: Deploy) -> None:
    kube.forbidden |= {("list", "nodes"), ("get", "customresourcedefinitions"), ("list", "deployments")}
    found = findings(deploy, ray_service())
    for check in ("capacity", "KubeRay", "operator"):
        assert found[check][0][0] == "warning"
        assert "forbidden" in found[check][0][1]


def test_a_kind_that_is_not_served_names_what_brings_it(kube: ApiServer, deploy: Deploy) -> None:
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "metadata": {"name": "m"}, "spec": {}}
    [(status, found, remedy)] = findings(deploy, monitor)["kinds"]
    assert (status, found) == ("failed", "the cluster knows no PodMonitor of monitoring.coreos.com/v1")
    assert "Prometheus operator" in remedy


def test_an_old_kuberay_does_not_know_new_fields(kube: ApiServer, deploy: Deploy) -> None:
    service = ray_service()
    service["spec"]["rayClusterConfig"]["authOptions"] = {"mode": "token"}
    assert {one[0] for one in findings(deploy, service)["KubeRay"]} == {"ok"}
    definition = kube.get("CustomResourceDefinition", "rayservices.ray.io")
    for version in definition["spec"]["versions"]:
        spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
        spec["properties"].get("rayClusterConfig", spec)["properties"].pop("authOptions", None)
    kube.store.define(definition)
    [(status, found, remedy)] = findings(deploy, service)["KubeRay"]
    assert (status, found) == ("failed", "RayService demo: its CRD knows no spec.rayClusterConfig.authOptions")
    assert remedy == "install KubeRay 1.6 or later"


def test_without_kuberay_it_says_what_to_install(deploy: Deploy, kube: ApiServer) -> None:
    kube.delete("CustomResourceDefinition", "rayservices.ray.io")
    done = deploy.run("preflight", "-f", deploy.file(ray_service()))
    assert done.exit_code == 1
    assert "the cluster knows no RayService of ray.io/v1; install KubeRay's operator" in done.stdout


def test_an_operator_that_is_absent_or_down(kube: ApiServer, deploy: Deploy) -> None:
    assert findings(deploy, ray_service())["operator"][0][0] == "warning"
    add_operator(kube, num_available=0)
    assert findings(deploy, ray_service())["operator"][0][0] == "failed"


def test_a_namespace_is_there_or_made_or_missing(deploy: Deploy) -> None:
    service = ray_service()
    service["metadata"]["namespace"] = "llm"
    assert findings(deploy, service)["namespace"][0][:2] == ("failed", "llm does not exist")
    made = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "llm"}}
    assert "namespace" not in findings(deploy, made, service)
    assert findings(deploy, ray_service())["namespace"] == [("ok", "default", "")]
