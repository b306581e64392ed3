"""A small RayService and what stands around it, for the tests of `headwater deploy`."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from tests.deploy.api_server import ApiServer

GIB = 1 << 30


def container(name: str = "ray", *, gpus: int = 0, cpu: str = "1", memory: str = "2Gi", **more: Any) -> dict[str, Any]:
    reserved = {"cpu": cpu, "memory": memory} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {"name": name, "image": "headwater:1", "resources": {"limits": reserved, "requests": reserved}, **more}


def ray_service(
    name: str = "demo", *, num_workers: int = 2, gpus: int = 1, upgrade: str | None = None, **spec: Any
) -> dict[str, Any]:
    """A head and GPU workers. `spec`: of the workers' pods."""
    workers = {"containers": [container(gpus=gpus)], **spec}
    group = {
        "groupName": "worker",
        "replicas": num_workers,
        "minReplicas": num_workers,
        "maxReplicas": num_workers,
        "rayStartParams": {},
        "template": {"metadata": {"labels": {"app.kubernetes.io/component": "worker"}}, "spec": workers},
    }
    head = {"rayStartParams": {}, "template": {"spec": {"containers": [container("head")]}}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name},
        "spec": {
            "serveConfigV2": "applications: []\n",
            "rayClusterConfig": {"rayVersion": "2.60.0", "headGroupSpec": head, "workerGroupSpecs": [group]},
            **({"upgradeStrategy": {"type": upgrade}} if upgrade else {}),
        },
    }


def add_node(
    server: ApiServer, name: str, *, gpus: int = 4, cpu: str = "32", memory: str = "128Gi", **spec: Any
) -> None:
    server.add(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
            "spec": spec,
            "status": {"allocatable": {"nvidia.com/gpu": str(gpus), "cpu": cpu, "memory": memory, "pods": "110"}},
        }
    )


def add_operator(server: ApiServer, *, num_available: int = 1) -> None:
    labels = {"app.kubernetes.io/name": "kuberay-operator"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "o", "image": "operator:1.7.0"}]}}
    server.add(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "kuberay-operator", "labels": labels},
            "spec": {"selector": {"matchLabels": labels}, "template": template},
            "status": {"availableReplicas": num_available},
        }
    )


def add_pod(
    server: ApiServer,
    name: str,
    status: dict[str, Any],
    *,
    cluster: str = "demo-1",
    ports: Sequence[dict[str, Any]] = (),
    node: str = "n1",
    **labels: str,
) -> None:
    server.add(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"ray.io/cluster": cluster, **labels}},
            "spec": {"containers": [container(ports=list(ports))]} | ({"nodeName": node} if node else {}),
            "status": status,
        }
    )


def add_event(server: ApiServer, about: tuple[str, str], reason: str, message: str, *, kind: str = "Warning") -> None:
    server.add(
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{about[1]}."},
            "involvedObject": {"kind": about[0], "name": about[1], "namespace": "default"},
            "type": kind,
            "reason": reason,
            "message": message,
            "lastTimestamp": "2026-01-01T00:00:00Z",
        }
    )


def pod_status(*, is_ready: bool = False, phase: str = "Running", **more: Any) -> dict[str, Any]:
    return {"phase": phase, "conditions": [{"type": "Ready", "status": "True" if is_ready else "False"}], **more}


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    """The status of a pod whose container waits."""
    state = {
        "name": "ray",
        "image": "headwater:1",
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": {"waiting": {"reason": reason, "message": message}},
    }
    return pod_status(phase="Pending", containerStatuses=[state | more])


def service_status(
    *,
    is_ready: bool = True,
    application: str = "RUNNING",
    generation: int = 1,
    upgrading: bool = False,
    **deployments: str,
) -> dict[str, Any]:
    served = {name: {"status": status, "message": f"{name} says so"} for name, status in deployments.items()}
    applications = {"headwater": {"status": application, "serveDeploymentStatuses": served}}
    conditions = [("Ready", is_ready), ("UpgradeInProgress", upgrading)]
    return {
        "observedGeneration": generation,
        "numServeEndpoints": int(is_ready),
        "conditions": [
            {
                "type": kind,
                "status": str(value),
                "reason": "Because",
                "message": f"{kind} is {value}",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
            for kind, value in conditions
        ],
        "activeServiceStatus": {
            "rayClusterName": "demo-1",
            "applicationStatuses": applications,
            "rayClusterStatus": {},
        },
    }


def changed(value: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """A copy with other keys of its spec."""
    other = copy.deepcopy(value)
    other["spec"] |= spec
    return other
