"""How a RayService stands: its conditions, Serve, the pods and the events, joined into one reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cluster.kubernetes.api import Api
from protos.errors import KubernetesError

_PULLING: Final = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
_CONFIG: Final = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_BAD_SERVE: Final = ("DEPLOY_FAILED", "UNHEALTHY")
_MAX_CHARS: Final = 300
# The lower the rank, the nearer to the cause.
_IMAGE, _CONFIGURATION, _MEMORY, _CRASH, _PLACE, _VOLUME, _SERVE, _PROBE, _CLUSTER, _CONDITION, _WAITING = range(11)


@dataclass(frozen=True, slots=True)
class Pod:
    """One pod of a Ray cluster. `trouble` is empty where it is ready."""

    name: str
    component: str
    phase: str
    is_ready: bool
    num_restarts: int
    trouble: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """One Serve deployment, as the Ray cluster reports it."""

    application: str
    name: str
    status: str
    message: str


@dataclass(frozen=True, slots=True)
class State:
    """One RayService at one moment. `reason`: why it is not ready, in one line; empty where it is."""

    name: str
    namespace: str
    is_ready: bool
    reason: str
    num_endpoints: int
    clusters: tuple[str, ...]
    deployments: tuple[Deployment, ...]
    pods: tuple[Pod, ...]


def states(api: Api, name: str | None = None) -> list[State]:
    """Of one RayService, or of all in the namespace. Raises KubernetesError if there is none."""
    resource = api.resource("ray.io/v1", "RayService")
    if resource is None:
        raise KubernetesError("the cluster knows no RayService; `headwater deploy preflight` says what is missing")
    services = api.items_of(resource, api.namespace)
    found = [service for service in services if name in (None, service["metadata"]["name"])]
    if not found:
        what = f"RayService {name}" if name else "RayService"
        raise KubernetesError(f"there is no {what} in namespace {api.namespace}; see --namespace")
    pods = api.items("v1", "Pod", api.namespace, selector="ray.io/cluster")
    events = api.items("v1", "Event", api.namespace)
    return [state(service, pods, events) for service in found]


def state(service: Mapping[str, Any], pods: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> State:
    """The same of objects already read. `pods` and `events` may be others' too."""
    metadata, status = service["metadata"], service.get("status") or {}
    parts = [status.get(part) or {} for part in ("activeServiceStatus", "pendingServiceStatus")]
    clusters = tuple(part["rayClusterName"] for part in parts if part.get("rayClusterName"))
    own = [pod for pod in pods if (pod["metadata"].get("labels") or {}).get("ray.io/cluster") in clusters]
    warnings = _warnings(events)
    troubles = [trouble for pod in own for trouble in _pod_troubles(pod, warnings)]
    troubles += [trouble for part in parts for trouble in (*_serve_troubles(part), *_cluster_troubles(part))]
    troubles += _service_troubles(service, clusters, warnings)
    is_ready = _is_ready(service)
    return State(
        name=metadata["name"],
        namespace=metadata.get("namespace", ""),
        is_ready=is_ready,
        reason="" if is_ready else _one_line(min(troubles, key=lambda trouble: trouble[0])[1]),
        num_endpoints=status.get("numServeEndpoints") or 0,
        clusters=clusters,
        deployments=tuple(deployment for part in parts for deployment in _deployments(part)),
        pods=tuple(_pod(pod, warnings) for pod in own),
    )


def _is_ready(service: Mapping[str, Any]) -> bool:
    """Whether it serves, all of it, what its newest spec says."""
    status = service.get("status") or {}
    conditions = {condition["type"]: condition["status"] for condition in status.get("conditions") or ()}
    is_seen = status.get("observedGeneration", 0) >= service["metadata"].get("generation", 0)
    is_upgrading = conditions.get("UpgradeInProgress") == "True"
    applications = ((status.get("activeServiceStatus") or {}).get("applicationStatuses") or {}).values()
    is_running = all(application.get("status") == "RUNNING" for application in applications)
    return conditions.get("Ready") == "True" and is_seen and not is_upgrading and is_running and bool(applications)


def _warnings(events: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """(reason, message) by the object's kind and name, the latest first."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for event in sorted(events, key=_time, reverse=True):
        if event.get("type") == "Warning":
            about = event.get("involvedObject") or {}
            key = (about.get("kind", ""), about.get("name", ""))
            found.setdefault(key, []).append((event.get("reason", ""), event.get("message", "")))
    return found


def _time(event: Mapping[str, Any]) -> str:
    return event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or ""


Trouble = tuple[int, str]
Warnings = Mapping[tuple[str, str], Sequence[tuple[str, str]]]


def _pod(pod: Mapping[str, Any], warnings: Warnings) -> Pod:
    status, labels = pod.get("status") or {}, pod["metadata"].get("labels") or {}
    troubles = list(_pod_troubles(pod, warnings))
    return Pod(
        name=pod["metadata"]["name"],
        component=labels.get("app.kubernetes.io/component") or labels.get("ray.io/node-type", ""),
        phase=status.get("phase", "Pending"),
        is_ready=_condition(status, "Ready") == "True",
        num_restarts=sum(container.get("restartCount", 0) for container in status.get("containerStatuses") or ()),
        trouble=_one_line(min(troubles, key=lambda trouble: trouble[0])[1]) if troubles else "",
    )


def _pod_troubles(pod: Mapping[str, Any], warnings: Warnings) -> Iterator[Trouble]:
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    if _condition(status, "Ready") == "True" or status.get("phase") == "Succeeded":
        return
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition.get("reason") == "Unschedulable":
            yield _PLACE, f"pod {name} cannot be scheduled: {condition.get('message', '')}"
    for container in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        yield from _container_troubles(name, container, pod)
    is_placed = bool((pod.get("spec") or {}).get("nodeName"))
    has_started = any("running" in (one.get("state") or {}) for one in status.get("containerStatuses") or ())
    for reason, message in warnings.get(("Pod", name), ()):  # events stay when what they tell is over
        if reason == "Unhealthy":
            yield _PROBE, f"pod {name}: {message}"
        elif reason in ("FailedMount", "FailedAttachVolume") and not has_started:
            yield _VOLUME, f"pod {name}: {message}"
        elif reason == "FailedScheduling" and not is_placed:
            yield _PLACE, f"pod {name} cannot be scheduled: {message}"
    yield _WAITING, f"pod {name} is not ready ({status.get('reason') or status.get('phase', 'Pending')})"


def _container_troubles(pod_name: str, container: Mapping[str, Any], pod: Mapping[str, Any]) -> Iterator[Trouble]:
    where = f"pod {pod_name}, container {container['name']}"
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    ended = [(container.get(when) or {}).get("terminated") or {} for when in ("state", "lastState")]
    last = next((one for one in ended if one and one.get("reason") != "Completed"), {})
    if reason in _PULLING:
        yield _IMAGE, f"{where}: {reason}: {message or container.get('image', '')}"
    elif reason in _CONFIG:
        yield _CONFIGURATION, f"{where}: {reason}: {message}"
    if last.get("reason") == "OOMKilled":
        yield _MEMORY, f"{where}: OOMKilled, its memory limit is {_limit(pod, container['name'])}; raise it"
    elif reason == "CrashLoopBackOff" or (last and container.get("restartCount")):
        code, detail = last.get("exitCode", "unknown"), last.get("message") or last.get("reason") or ""
        text = f"{where}: crashes, exit code {code} after {container.get('restartCount', 0)} restarts"
        yield _CRASH, f"{text}: {detail}" if detail else f"{text}; see kubectl logs --previous {pod_name}"


def _limit(pod: Mapping[str, Any], name: str) -> str:
    containers = (pod.get("spec") or {}).get("containers") or ()
    found: Mapping[str, Any] = next((container for container in containers if container["name"] == name), {})
    return str(((found.get("resources") or {}).get("limits") or {}).get("memory", "not set"))


def _serve_troubles(part: Mapping[str, Any]) -> Iterator[Trouble]:
    for name, application in (part.get("applicationStatuses") or {}).items():
        bad = [deployment for deployment in _deployments(part) if deployment.status in _BAD_SERVE]
        for deployment in bad:
            if deployment.application == name:
                yield _SERVE, f"Serve deployment {deployment.name} is {deployment.status}: {deployment.message}"
        status = application.get("status", "NOT_STARTED")
        if status != "RUNNING":
            rank = _SERVE if status in _BAD_SERVE else _CLUSTER
            slow = [one.name for one in _deployments(part) if one.application == name and one.status != "HEALTHY"]
            detail = application.get("message") or (f"waiting for {', '.join(slow)}" if slow else "")
            yield rank, f"Serve application {name} is {status}: {detail}".removesuffix(": ")


def _deployments(part: Mapping[str, Any]) -> list[Deployment]:
    return [
        Deployment(application, name, one.get("status", ""), one.get("message", ""))
        for application, status in (part.get("applicationStatuses") or {}).items()
        for name, one in (status.get("serveDeploymentStatuses") or {}).items()
    ]


def _cluster_troubles(part: Mapping[str, Any]) -> Iterator[Trouble]:
    cluster = part.get("rayClusterStatus") or {}
    if cluster.get("reason"):
        yield _CLUSTER, f"RayCluster {part.get('rayClusterName', '')}: {cluster['reason']}"
    for condition in cluster.get("conditions") or ():
        if condition["status"] != "True" and condition["type"] in ("HeadPodReady", "RayClusterProvisioned"):
            text = condition.get("message") or condition.get("reason", "")
            yield _CONDITION, f"RayCluster {part.get('rayClusterName', '')}: {text}"


def _service_troubles(service: Mapping[str, Any], clusters: Sequence[str], warnings: Warnings) -> Iterator[Trouble]:
    name, status = service["metadata"]["name"], service.get("status") or {}
    for kind, named in (("RayService", name), *(("RayCluster", cluster) for cluster in clusters)):
        for reason, message in warnings.get((kind, named), ())[:1]:
            yield _CLUSTER, f"{kind} {named}: {reason}: {message}"
    for condition in status.get("conditions") or ():
        if condition["type"] == "Ready" and condition["status"] != "True":
            rank = _CLUSTER if condition.get("reason") == "ValidationFailed" else _CONDITION
            yield rank, f"RayService {name}: {condition.get('message') or condition.get('reason', '')}"
        if condition["type"] == "UpgradeInProgress" and condition["status"] == "True":
            yield (
                _CONDITION,
                f"RayService {name}: an upgrade to {clusters[-1] if clusters else 'a new cluster'} goes on",
            )
    if not status:
        yield _WAITING - 1, f"KubeRay's operator has not taken up RayService {name}; is it running?"
    yield _WAITING + 1, f"RayService {name}: KubeRay has not yet seen the newest spec, or no application runs"


def _condition(status: Mapping[str, Any], name: str) -> str:
    return next((one["status"] for one in status.get("conditions") or () if one["type"] == name), "")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_CHARS else f"{line[: _MAX_CHARS - 1]}…"
