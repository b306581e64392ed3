"""Taking a deployment away: what was applied by us and carries its mark, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cluster.kubernetes.api import MANAGER, Api, Refusal, Resource
from cluster.kubernetes.manifests import MARK, Manifest

POLL_S: Final = 1.0
KEPT_KINDS: Final = ("CustomResourceDefinition", "Namespace", "PersistentVolume", "PersistentVolumeClaim")


@dataclass(frozen=True, slots=True)
class Target:
    """One object that is there and is ours. Another one of the same name is not it."""

    resource: Resource
    namespace: str
    name: str
    uid: str

    @property
    def title(self) -> str:
        """Such as "RayService default/headwater"."""
        return f"{self.resource.kind} {self.namespace}/{self.name}".replace(" /", " ")

    @property
    def is_data(self) -> bool:
        """Whether others may live in it, or data that is lost with it."""
        return self.resource.kind in KEPT_KINDS


def applied(api: Api, manifests: Sequence[Manifest] = ()) -> list[Target]:
    """Everything of the namespace's deployment, or those of the manifests; in the order of removal.

    Kinds that may not be listed are passed over. Raises KubernetesError.
    """
    if manifests:
        found = [_named(api, manifest) for manifest in reversed(manifests)]
        return [target for target in found if target is not None]
    targets = [target for resource in api.resources() for target in _marked(api, resource)]
    return sorted(targets, key=lambda target: (target.is_data, target.resource.group != "ray.io", target.title))


def remove(
    api: Api, targets: Iterable[Target], *, timeout_s: float, on_change: Callable[[Sequence[Target]], None]
) -> list[Target]:
    """Delete them and wait until they are gone. Returns what is still there. Raises KubernetesError."""
    left = list(targets)
    for target in left:
        api.delete(target.resource, target.namespace, target.name, uid=target.uid)
    deadline = time.monotonic() + timeout_s
    while True:
        remaining = [target for target in left if _is_there(api, target)]
        if len(remaining) != len(left) or not remaining:
            on_change(remaining)
        left = remaining
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(min(POLL_S, max(0.0, deadline - time.monotonic())))


def _named(api: Api, manifest: Manifest) -> Target | None:
    resource = api.resource(manifest.api_version, manifest.kind)
    if resource is None:
        return None
    namespace = (manifest.namespace or api.namespace) if resource.is_namespaced else ""
    value = api.get(resource, namespace, manifest.name)
    return _target(resource, value) if value and _is_ours(value) else None


def _marked(api: Api, resource: Resource) -> list[Target]:
    if not {"list", "delete"} <= resource.verbs:
        return []
    for namespace in ("", api.namespace) if resource.is_namespaced else ("",):
        try:
            values = api.items_of(resource, namespace, selector=f"{MARK}={api.namespace}")
        except Refusal as refusal:
            if refusal.code not in (403, 404, 405):
                raise
        else:
            return [_target(resource, value) for value in values if _is_ours(value)]
    return []


def _target(resource: Resource, value: dict[str, Any]) -> Target:
    metadata = value["metadata"]
    return Target(resource, metadata.get("namespace", ""), metadata["name"], metadata["uid"])


def _is_ours(value: dict[str, Any]) -> bool:
    """Labels are copied, as from a Service to its Endpoints; what was applied is written down beside them."""
    managers = value["metadata"].get("managedFields") or ()
    return any(entry["manager"] == MANAGER and entry["operation"] == "Apply" for entry in managers)


def _is_there(api: Api, target: Target) -> bool:
    value = api.get(target.resource, target.namespace, target.name)
    return value is not None and value["metadata"]["uid"] == target.uid
