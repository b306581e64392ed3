"""What applying would change, and applying it: server-side, under one field manager, in the order of kinds."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import yaml

from cluster.kubernetes.api import Api, Refusal, Resource
from cluster.kubernetes.manifests import Manifest
from protos.errors import KubernetesError, ManifestError

Outcome = Literal["created", "changed", "unchanged"]
_BOOKKEEPING: Final = ("managedFields", "resourceVersion", "generation", "uid", "creationTimestamp")
_MANAGER: Final = re.compile(r'conflict with "([^"]+)"')


@dataclass(frozen=True, slots=True)
class Change:
    """One object, before and after. `before` is None where there was none."""

    manifest: Manifest
    namespace: str
    before: dict[str, Any] | None
    after: dict[str, Any]

    @property
    def outcome(self) -> Outcome:
        if self.before is None:
            return "created"
        return "changed" if _stripped(self.before) != _stripped(self.after) else "unchanged"

    @property
    def title(self) -> str:
        """Such as "RayService default/headwater"."""
        return f"{self.manifest.kind} {self.namespace}/{self.manifest.name}".replace(" /", " ")

    def diff(self) -> list[str]:
        """Unified; empty when nothing changes. A Secret's values are not shown."""
        before, after = (_stripped(side) if side else {} for side in (self.before, self.after))
        if self.manifest.kind == "Secret":
            before, after = _masked(before, after)
        old, new = _lines(before), _lines(after)
        return list(difflib.unified_diff(old, new, f"live {self.title}", f"wanted {self.title}", lineterm=""))


@dataclass(frozen=True, slots=True)
class Conflict:
    """A field that somebody else has set to another value."""

    title: str
    field: str
    manager: str

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.title}: {self.field} is set by {self.manager!r}"


class Conflicts(KubernetesError):
    """Fields of the manifests belong to other managers."""

    def __init__(self, message: str, *, retry_after_s: float | None = None, conflicts: Sequence[Conflict] = ()) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.conflicts = tuple(conflicts)


def changes(api: Api, manifests: Sequence[Manifest], *, forces: bool = False) -> list[Change]:
    """What applying would do, by dry runs on the API server. Raises KubernetesError, or Conflicts with all of them."""
    found: list[Change] = []
    conflicts: list[Conflict] = []
    for manifest in manifests:
        try:
            found.append(_change(api, manifest, manifests, forces=forces))
        except Conflicts as error:
            conflicts += error.conflicts
    if conflicts:
        raise _conflicted(conflicts)
    return found


def apply(api: Api, manifests: Sequence[Manifest], *, forces: bool = False) -> Iterator[Change]:
    """Each object as it is applied. First all are tried in a dry run, so that a refusal changes nothing.

    Raises KubernetesError, or Conflicts unless `forces`.
    """
    tried = changes(api, manifests, forces=forces)
    for change in tried:
        resource = _resource(api, change.manifest)
        after = _applied(api, resource, change.manifest, change.namespace, forces=forces, is_dry=False)
        yield Change(change.manifest, change.namespace, change.before, after)


def _change(api: Api, manifest: Manifest, manifests: Sequence[Manifest], *, forces: bool) -> Change:
    resource = api.resource(manifest.api_version, manifest.kind)
    namespace = manifest.namespace or api.namespace
    if resource is None and _is_defined(manifest, manifests):
        return Change(manifest, namespace, None, manifest.marked(api.namespace))
    resource = _resource(api, manifest)
    namespace = namespace if resource.is_namespaced else ""
    before = api.get(resource, namespace, manifest.name)
    if before is None and _is_to_be_made(api, namespace, manifests):
        return Change(manifest, namespace, None, manifest.marked(api.namespace))
    after = _applied(api, resource, manifest, namespace, forces=forces, is_dry=True)
    return Change(manifest, namespace, before, after)


def _applied(
    api: Api, resource: Resource, manifest: Manifest, namespace: str, *, forces: bool, is_dry: bool
) -> dict[str, Any]:
    try:
        return api.apply(resource, namespace, manifest.marked(api.namespace), forces=forces, is_dry=is_dry)
    except Refusal as refusal:
        title = f"{manifest.kind} {namespace}/{manifest.name}".replace(" /", " ")
        if refusal.code == 409 and refusal.causes:
            raise _conflicted([_conflict(title, *cause) for cause in refusal.causes], is_dry=is_dry) from None
        if refusal.code == 403:
            raise
        remedy = f"; kubectl create namespace {namespace}" if refusal.code == 404 and namespace else ""
        raise KubernetesError(f"{title} ({manifest.source}): {refusal.message}{remedy}") from None


def _conflict(title: str, field: str, message: str) -> Conflict:
    named = _MANAGER.search(message)
    return Conflict(title, field, named[1] if named else message)


def _conflicted(conflicts: Sequence[Conflict], *, is_dry: bool = True) -> Conflicts:
    lines = "".join(f"\n  {conflict.text}" for conflict in conflicts)
    so_far = "nothing was changed" if is_dry else "what was applied before stays"
    return Conflicts(
        f"fields belong to others, {so_far}; leave them out of the manifests, "
        f"or take them with --force-conflicts:{lines}",
        conflicts=conflicts,
    )


def _resource(api: Api, manifest: Manifest) -> Resource:
    resource = api.resource(manifest.api_version, manifest.kind)
    if resource is None:
        api.forget(manifest.api_version)
        resource = api.resource(manifest.api_version, manifest.kind)
    if resource is None:
        raise ManifestError(
            f"{manifest.source}: the cluster knows no {manifest.kind} of {manifest.api_version}; "
            "`headwater deploy preflight` says what is missing"
        )
    return resource


def _is_defined(manifest: Manifest, manifests: Sequence[Manifest]) -> bool:
    """Whether its kind comes with the manifests themselves."""
    return any(
        other.kind == "CustomResourceDefinition"
        and other.value["spec"]["group"] == manifest.group
        and other.value["spec"]["names"]["kind"] == manifest.kind
        for other in manifests
    )


def _is_to_be_made(api: Api, namespace: str, manifests: Sequence[Manifest]) -> bool:
    made = any(other.kind == "Namespace" and other.name == namespace for other in manifests)
    return made and api.find("v1", "Namespace", "", namespace) is None


def _stripped(value: Mapping[str, Any]) -> dict[str, Any]:
    """Without the status and what the API server counts."""
    kept = {name: part for name, part in value.items() if name != "status"}
    metadata = {name: part for name, part in kept.get("metadata", {}).items() if name not in _BOOKKEEPING}
    return kept | {"metadata": metadata}


def _masked(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides, with no value of the Secret but where it differs."""
    sides = [copy.deepcopy(dict(side)) for side in (before, after)]
    for part in ("data", "stringData"):
        old, new = ({**(side.get(part) or {})} for side in sides)
        for name in {*old, *new}:
            differs = name in old and name in new and old[name] != new[name]
            for side, values, when in ((sides[0], old, "before"), (sides[1], new, "after")):
                if name in values:
                    side[part][name] = f"*** ({when})" if differs else "***"
    return sides[0], sides[1]


def _lines(value: Mapping[str, Any]) -> list[str]:
    return yaml.safe_dump(value, sort_keys=True, allow_unicode=True).splitlines() if value else []
