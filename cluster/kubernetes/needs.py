"""What manifests need of a cluster: the pods they lead to, and the Secrets, claims and classes that they name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from cluster.kubernetes.manifests import Manifest

GPU: Final = "nvidia.com/gpu"
_WORKLOADS: Final = ("Deployment", "StatefulSet", "ReplicaSet", "Job")
_DEFAULT_SURGE_PERCENT: Final = 100

Resources = Mapping[str, Decimal]


@dataclass(frozen=True, slots=True)
class PodGroup:
    """Pods that are alike: how many there will be, and how many there may be once scaled up."""

    name: str
    template: Mapping[str, Any]
    num: int
    max_num: int

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.template.get("spec") or {}

    @property
    def requests(self) -> Resources:
        return requests(self.spec)


@dataclass(frozen=True, slots=True)
class Reference:
    """Something that a pod or an object names, and cannot start without. `keys`: of a Secret or ConfigMap."""

    kind: str
    namespace: str
    name: str
    user: str
    keys: frozenset[str] = field(default=frozenset())


def requests(spec: Mapping[str, Any]) -> dict[str, Decimal]:
    """What a pod reserves: its containers together, or its greediest init container."""
    total: dict[str, Decimal] = {}
    for container in spec.get("containers") or ():
        for name, amount in _reserved(container).items():
            total[name] = total.get(name, Decimal()) + amount
    for container in spec.get("initContainers") or ():
        for name, amount in _reserved(container).items():
            total[name] = max(total.get(name, Decimal()), amount)
    return total


def _reserved(container: Mapping[str, Any]) -> dict[str, Decimal]:
    """A limit without a request is one."""
    resources = container.get("resources") or {}
    amounts = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    return {name: quantity(amount) for name, amount in amounts.items()}


def quantity(amount: Any) -> Decimal:
    """Such as "500m" or "16Gi"; what cannot be read is nothing, and the API server's to refuse."""
    from kubernetes.utils.quantity import parse_quantity

    try:
        return Decimal(parse_quantity(amount))
    except ValueError:
        return Decimal()


def pod_groups(manifest: Manifest) -> list[PodGroup]:
    """The pods that one object leads to; none for most kinds."""
    spec = manifest.value.get("spec") or {}
    if manifest.kind == "RayService":
        return _ray_groups(manifest.name, spec.get("rayClusterConfig") or {})
    if manifest.kind == "RayCluster":
        return _ray_groups(manifest.name, spec)
    if manifest.kind in _WORKLOADS:
        num = spec.get("parallelism" if manifest.kind == "Job" else "replicas", 1)
        return [PodGroup(manifest.name, spec.get("template") or {}, num, num)]
    if manifest.kind == "Pod":
        return [PodGroup(manifest.name, {"spec": spec}, 1, 1)]
    return []


def _ray_groups(name: str, spec: Mapping[str, Any]) -> list[PodGroup]:
    head = spec.get("headGroupSpec") or {}
    scales = bool(spec.get("enableInTreeAutoscaling"))
    groups = [PodGroup(f"{name} head", head.get("template") or {}, 1, 1)]
    for group in spec.get("workerGroupSpecs") or ():
        least = group.get("minReplicas") or 0
        num = max(group["replicas"] if group.get("replicas") is not None else least, least)
        hosts = group.get("numOfHosts") or 1
        most = max(num, group.get("maxReplicas") or 0) if scales else num
        title = f"{name} {group.get('groupName', 'workers')}"
        groups.append(PodGroup(title, group.get("template") or {}, num * hosts, most * hosts))
    return groups


def surge_percent(manifest: Manifest) -> int:
    """How much of a RayService's cluster an upgrade adds beside it; 0 for other kinds and where it replaces."""
    if manifest.kind != "RayService":
        return 0
    strategy = (manifest.value.get("spec") or {}).get("upgradeStrategy") or {}
    match strategy.get("type"):
        case "None":
            return 0
        case "NewClusterWithIncrementalUpgrade":
            options = strategy.get("clusterUpgradeOptions") or {}
            return int(options.get("maxSurgePercent", _DEFAULT_SURGE_PERCENT))
        case _:
            return 100


def references(manifest: Manifest, namespace: str) -> Iterator[Reference]:
    """What has to be there. What is marked optional is left out."""
    for group in pod_groups(manifest):
        yield from _pod_references(group, namespace)
    spec = manifest.value.get("spec") or {}
    claims = [spec] if manifest.kind == "PersistentVolumeClaim" else []
    claims += [template.get("spec") or {} for template in spec.get("volumeClaimTemplates") or ()]
    for claim in claims:
        if claim.get("storageClassName") != "":
            yield Reference("StorageClass", "", claim.get("storageClassName") or "", manifest.title)


def _pod_references(group: PodGroup, namespace: str) -> Iterator[Reference]:
    spec, user = group.spec, group.name

    def one(kind: str, named: Mapping[str, Any], name: str = "name", keys: Sequence[str] = ()) -> Iterator[Reference]:
        if named.get(name) and not named.get("optional"):
            yield Reference(kind, namespace, named[name], user, frozenset(keys))

    for secret in spec.get("imagePullSecrets") or ():
        yield from one("Secret", secret)
    yield from one("ServiceAccount", spec, "serviceAccountName")
    for volume in spec.get("volumes") or ():
        yield from one("PersistentVolumeClaim", volume.get("persistentVolumeClaim") or {}, "claimName")
        parts = [volume, *((volume.get("projected") or {}).get("sources") or ())]
        for part in parts:
            for source, kind in (("secret", "Secret"), ("configMap", "ConfigMap")):
                named = part.get(source) or {}
                keys = [item["key"] for item in named.get("items") or ()]
                yield from one(kind, named, "secretName" if "secretName" in named else "name", keys)
    for container in [*(spec.get("containers") or ()), *(spec.get("initContainers") or ())]:
        for source in container.get("envFrom") or ():
            yield from one("Secret", source.get("secretRef") or {})
            yield from one("ConfigMap", source.get("configMapRef") or {})
        for variable in container.get("env") or ():
            value = variable.get("valueFrom") or {}
            for source, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                named = value.get(source) or {}
                yield from one(kind, named, keys=[named["key"]] if "key" in named else [])
