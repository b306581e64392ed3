"""The check-up behind `headwater deploy preflight`: everything that manifests need of a cluster before `apply`.

Each check yields what it found and, unless all is well, the remedy. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from cluster.kubernetes.api import Api, Refusal, Resource
from cluster.kubernetes.capacity import Node, available, nodes, total, unplaced
from cluster.kubernetes.manifests import Manifest
from cluster.kubernetes.needs import GPU, PodGroup, Reference, pod_groups, references, surge_percent
from workers.finding import Finding

VERBS: Final = ("get", "create", "patch")  # what a server-side apply needs
_SINCE: Final = {  # KubeRay's version that brought a field
    "authOptions": "1.6",
    "networkPolicy": "1.7",
    "tlsOptions": "1.7",
    "upgradeStrategy": "1.4",
    "gcsFaultToleranceOptions": "1.3",
}
_SOURCES: Final = {
    "ray.io": "install KubeRay's operator and CRDs (helm install kuberay-operator kuberay/kuberay-operator)",
    "monitoring.coreos.com": "install the Prometheus operator, or render the chart without monitors and rules",
    "gateway.networking.k8s.io": "install the Gateway API's CRDs, or render the chart without the route",
    "keda.sh": "install KEDA, or leave its objects out",
}
_NAMES: Final = {GPU: "GPUs", "cpu": "CPUs", "memory": "memory"}
_LACKING: Final = _NAMES | {"memory": "of memory"}
_ABSENT: Final = {
    "Secret": "kubectl create secret generic {name} -n {namespace} {keys}",
    "ConfigMap": "kubectl create configmap {name} -n {namespace} {keys}",
    "ServiceAccount": "kubectl create serviceaccount {name} -n {namespace}",
    "PersistentVolumeClaim": "create the claim, or name another",
    "StorageClass": "name one that `kubectl get storageclass` lists",
}
_API_VERSIONS: Final = {"StorageClass": "storage.k8s.io/v1"}


def examine(api: Api, manifests: Sequence[Manifest]) -> Iterator[Finding]:
    """Every check. Raises KubernetesError if the API server cannot be reached."""
    yield Finding.ok("API server", f"{api.version()} at {api.url}")
    yield from _namespaces(api, manifests)
    yield from _kinds(api, manifests)
    yield from _kuberay(api, manifests)
    yield from _rights(api, manifests)
    yield from _references(api, manifests)
    yield from _capacity(api, manifests)


def _namespaces(api: Api, manifests: Sequence[Manifest]) -> Iterator[Finding]:
    made = {manifest.name for manifest in manifests if manifest.kind == "Namespace"}
    for name in sorted({manifest.namespace or api.namespace for manifest in manifests} - made):
        try:
            is_there = api.find("v1", "Namespace", "", name) is not None
        except Refusal as refusal:
            yield Finding.warning("namespace", f"{name}: {refusal.message}", "make sure that it exists")
            continue
        if is_there:
            yield Finding.ok("namespace", name)
        else:
            yield Finding.failed("namespace", f"{name} does not exist", f"kubectl create namespace {name}")


def _kinds(api: Api, manifests: Sequence[Manifest]) -> Iterator[Finding]:
    defined = {_defined(manifest) for manifest in manifests if manifest.kind == "CustomResourceDefinition"}
    missing = {
        (manifest.api_version, manifest.kind)
        for manifest in manifests
        if (manifest.group, manifest.kind) not in defined and not api.resource(manifest.api_version, manifest.kind)
    }
    for api_version, kind in sorted(missing):
        group = api_version.rpartition("/")[0]
        remedy = _SOURCES.get(group, f"install what brings {group or 'it'}, or leave such objects out")
        yield Finding.failed("kinds", f"the cluster knows no {kind} of {api_version}", remedy)
    if not missing:
        yield Finding.ok("kinds", f"all {len({(one.api_version, one.kind) for one in manifests})} are served")


def _defined(manifest: Manifest) -> tuple[str, str]:
    spec = manifest.value.get("spec") or {}
    return (spec.get("group", ""), (spec.get("names") or {}).get("kind", ""))


def _kuberay(api: Api, manifests: Sequence[Manifest]) -> Iterator[Finding]:
    """The CRD's own schema says what the installed version can do; without its operator nothing happens."""
    ray = [one for one in manifests if one.group == "ray.io" and api.resource(one.api_version, one.kind)]
    for manifest in ray:
        yield from _features(api, manifest)
    if ray:
        yield _operator(api)


def _features(api: Api, manifest: Manifest) -> Iterator[Finding]:
    resource = api.resource(manifest.api_version, manifest.kind)
    try:
        definition = api.find(
            "apiextensions.k8s.io/v1", "CustomResourceDefinition", "", f"{resource.plural}.ray.io" if resource else ""
        )
    except Refusal as refusal:
        yield Finding.warning("KubeRay", refusal.message, "its fields are checked when the manifest is applied")
        return
    version = manifest.api_version.rpartition("/")[2]
    schemas = [
        served["schema"]["openAPIV3Schema"]
        for served in ((definition or {}).get("spec") or {}).get("versions") or ()
        if served["name"] == version
    ]
    unknown = list(_unknown(manifest.value.get("spec"), schemas[0]["properties"]["spec"], "spec")) if schemas else []
    for path in unknown:
        since = _SINCE.get(path.rpartition(".")[2])
        remedy = f"install KubeRay {since} or later" if since else "install a later KubeRay, or leave it out"
        yield Finding.failed("KubeRay", f"{manifest.title}: its CRD knows no {path}", remedy)
    if not unknown:
        yield Finding.ok("KubeRay", f"its {manifest.kind} knows every field of {manifest.name}")


def _unknown(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, dict):
        properties, others = schema.get("properties") or {}, schema.get("additionalProperties")
        for name, below in value.items():
            known = properties.get(name, others)
            if known is None and (properties or "type" in schema):
                yield f"{path}.{name}"
            elif isinstance(known, dict):
                yield from _unknown(below, known, f"{path}.{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown(item, schema.get("items") or {}, f"{path}[{index}]")


def _operator(api: Api) -> Finding:
    try:
        found = api.items("apps/v1", "Deployment", selector="app.kubernetes.io/name=kuberay-operator")
    except Refusal as refusal:
        return Finding.warning("operator", refusal.message, "make sure that KubeRay's operator runs")
    for deployment in found:
        image = deployment["spec"]["template"]["spec"]["containers"][0].get("image", "")
        if (deployment.get("status") or {}).get("availableReplicas"):
            return Finding.ok("operator", f"runs in {deployment['metadata']['namespace']}, {image}")
        where = f"{deployment['metadata']['namespace']}/{deployment['metadata']['name']}"
        return Finding.failed("operator", f"{where} has no available pod", f"kubectl describe deployment -n {where}")
    return Finding.warning(
        "operator", "no deployment is labelled app.kubernetes.io/name=kuberay-operator", _SOURCES["ray.io"]
    )


def _rights(api: Api, manifests: Sequence[Manifest]) -> Iterator[Finding]:
    wanted: dict[tuple[str, str], Resource] = {}
    for manifest in manifests:
        resource = api.resource(manifest.api_version, manifest.kind)
        if resource:
            namespace = (manifest.namespace or api.namespace) if resource.is_namespaced else ""
            wanted[resource.path(namespace), namespace] = resource
    is_allowed = True
    for (_, namespace), resource in sorted(wanted.items(), key=lambda pair: pair[0]):
        missing = [verb for verb in VERBS if not api.may(verb, resource, namespace)]
        if missing:
            is_allowed = False
            where = f"in {namespace}" if namespace else "in the whole cluster"
            named = f"{resource.plural}.{resource.group}".rstrip(".")
            yield Finding.failed(
                "rights", f"{', '.join(missing)} of {named} {where} is not allowed", "ask for a Role that allows it"
            )
    if is_allowed:
        yield Finding.ok("rights", f"{', '.join(VERBS)} of all {len(wanted)} kinds are allowed")


def _references(api: Api, manifests: Sequence[Manifest]) -> Iterator[Finding]:
    """Each of what is named once, whoever names it."""
    made = {(one.kind, _space(api, one), one.name): one for one in manifests}
    users: dict[tuple[str, str, str], list[Reference]] = {}
    for manifest in manifests:
        for reference in references(manifest, manifest.namespace or api.namespace):
            users.setdefault((reference.kind, reference.namespace, reference.name), []).append(reference)
    for key, named in sorted(users.items()):
        if key == ("ServiceAccount", key[1], "default"):
            continue
        wanted = frozenset[str]().union(*(reference.keys for reference in named))
        yield _reference(api, named[0], wanted, made.get(key))


def _space(api: Api, manifest: Manifest) -> str:
    return "" if manifest.kind == "StorageClass" else manifest.namespace or api.namespace


def _reference(api: Api, reference: Reference, keys: frozenset[str], made: Manifest | None) -> Finding:
    try:
        value = made.value if made else _found(api, reference)
    except Refusal as refusal:
        return Finding.warning(reference.kind, f"{reference.name}: {refusal.message}", "make sure that it exists")
    if value is None and reference.kind == "StorageClass" and not reference.name:
        return Finding.failed(
            "StorageClass", f"{reference.user} names none, and none is the default", _ABSENT["StorageClass"]
        )
    files = " ".join(f"--from-file={key}=FILE" for key in sorted(keys)) or "..."
    remedy = _ABSENT[reference.kind].format(name=reference.name, namespace=reference.namespace, keys=files)
    if value is None:
        return Finding.failed(reference.kind, f"{reference.name} does not exist, which {reference.user} needs", remedy)
    lacking = sorted(keys - {*(value.get("data") or {}), *(value.get("stringData") or {})})
    if lacking:
        return Finding.failed(
            reference.kind, f"{reference.name} has no {', '.join(lacking)}, which {reference.user} needs", remedy
        )
    return Finding.ok(reference.kind, reference.name or "the default one")


def _found(api: Api, reference: Reference) -> dict[str, Any] | None:
    if reference.kind == "StorageClass" and not reference.name:
        mark = "storageclass.kubernetes.io/is-default-class"
        classes = api.items("storage.k8s.io/v1", "StorageClass")
        marked = (one for one in classes if (one["metadata"].get("annotations") or {}).get(mark) == "true")
        return next(marked, None)
    return api.find(_API_VERSIONS.get(reference.kind, "v1"), reference.kind, reference.namespace, reference.name)


def _capacity(api: Api, manifests: Sequence[Manifest]) -> Iterator[Finding]:
    """New pods now, then an upgrade beside what runs, then the most that autoscaling may ask for."""
    try:
        found = nodes(api.items("v1", "Node"), api.items("v1", "Pod"))
    except Refusal as refusal:
        yield Finding.warning("capacity", refusal.message, "compare the pods' requests with the nodes yourself")
        return
    now: list[tuple[PodGroup, int]] = []
    surge: list[tuple[PodGroup, int]] = []
    most: list[tuple[PodGroup, int]] = []
    for manifest in manifests:
        groups, live = pod_groups(manifest), _live(api, manifest)
        added = [(group, -(-group.num * surge_percent(manifest) // 100)) for group in groups]
        if live is None:
            now += [(group, group.num) for group in groups]
            surge += added
        elif _is_renewed(live, manifest):
            now += added
        else:
            surge += added
        most += [(group, group.max_num - group.num) for group in groups]
    yield from _fits(found, now)
    yield from _upgrade(found, now, surge)
    yield from _growth(found, now, most)


def _live(api: Api, manifest: Manifest) -> dict[str, Any] | None:
    if not pod_groups(manifest):
        return None
    return api.find(manifest.api_version, manifest.kind, manifest.namespace or api.namespace, manifest.name)


def _is_renewed(live: Mapping[str, Any], manifest: Manifest) -> bool:
    """Whether applying it makes a new Ray cluster beside the one that runs."""
    wanted = (manifest.value.get("spec") or {}).get("rayClusterConfig")
    return manifest.kind == "RayService" and not _is_within(wanted, (live.get("spec") or {}).get("rayClusterConfig"))


def _is_within(wanted: Any, there: Any) -> bool:
    """Equal, but for what the API server has added."""
    if isinstance(wanted, dict) and isinstance(there, dict):
        return all(name in there and _is_within(value, there[name]) for name, value in wanted.items())
    if isinstance(wanted, list) and isinstance(there, list):
        return len(wanted) == len(there) and all(map(_is_within, wanted, there))
    return bool(wanted == there)


def _fits(found: Sequence[Node], groups: Sequence[tuple[PodGroup, int]]) -> Iterator[Finding]:
    is_short = False
    for name in _names(groups):
        needed, free = total(groups, name), available(found, name)
        text = f"{_amount(name, needed)} needed, {_amount(name, free)} free on {len(found)} nodes"
        if needed > free:
            is_short = True
            yield Finding.failed(_NAMES.get(name, name), text, "add nodes, free some, or ask for less")
        elif needed:
            yield Finding.ok(_NAMES.get(name, name), text)
    lacking = {} if is_short else unplaced(found, groups)
    for name, num in lacking.items():
        yield Finding.failed(
            "placement", f"{num} pods of {name} fit on no node", "see their nodeSelector, tolerations and requests"
        )


def _upgrade(
    found: Sequence[Node], now: Sequence[tuple[PodGroup, int]], surge: Sequence[tuple[PodGroup, int]]
) -> Iterator[Finding]:
    if not any(num for _, num in surge):
        return
    lacking = _lacking(found, [*now, *surge])
    if lacking:
        yield Finding.warning(
            "upgrade",
            f"a new cluster beside the old one would lack {lacking}",
            "keep that much free, or set upgradeStrategy.type to None (with downtime) or to incremental",
        )
    else:
        yield Finding.ok("upgrade", "a new cluster fits beside the old one")


def _growth(
    found: Sequence[Node], now: Sequence[tuple[PodGroup, int]], most: Sequence[tuple[PodGroup, int]]
) -> Iterator[Finding]:
    if not any(num for _, num in most):
        return
    lacking = _lacking(found, [*now, *most])
    if lacking:
        yield Finding.warning(
            "autoscaling",
            f"at the most replicas it would lack {lacking}",
            "lower maxReplicas, or let the cluster add nodes",
        )
    else:
        yield Finding.ok("autoscaling", "the most replicas fit")


def _lacking(found: Sequence[Node], groups: Sequence[tuple[PodGroup, int]]) -> str:
    """Such as "4 GPUs and 32 CPUs"; empty when all fit."""
    missing = {name: total(groups, name) - available(found, name) for name in _names(groups)}
    short = [f"{_amount(name, amount)} {_LACKING.get(name, name)}" for name, amount in missing.items() if amount > 0]
    if not short and (num := sum(unplaced(found, groups).values())):
        short = [f"a node for {num} pods"]
    return " and ".join(short)


def _names(groups: Sequence[tuple[PodGroup, int]]) -> list[str]:
    """The resources to count: what devices there are, then CPUs and memory."""
    devices = {name for group, num in groups if num for name in group.requests if "/" in name}
    return [*sorted(devices), "cpu", "memory"]


def _amount(name: str, amount: Decimal) -> str:
    return f"{amount / (1 << 30):.1f} GiB" if name == "memory" else f"{amount.normalize():f}"
