"""What the fake API server knows of kinds: their names in paths, their schemas, and whether an object fits them."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from referencing import Registry, Resource

KUBERNETES = "1.32"
_SCHEMAS = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
_BUILT_IN = """
v1 Namespace namespaces -
v1 Node nodes -
v1 PersistentVolume persistentvolumes -
v1 Pod pods namespaced
v1 Service services namespaced
v1 Endpoints endpoints namespaced
v1 ConfigMap configmaps namespaced
v1 Secret secrets namespaced
v1 ServiceAccount serviceaccounts namespaced
v1 PersistentVolumeClaim persistentvolumeclaims namespaced
v1 Event events namespaced
v1 ResourceQuota resourcequotas namespaced
apps/v1 Deployment deployments namespaced
apps/v1 StatefulSet statefulsets namespaced
apps/v1 DaemonSet daemonsets namespaced
apps/v1 ReplicaSet replicasets namespaced
batch/v1 Job jobs namespaced
batch/v1 CronJob cronjobs namespaced
policy/v1 PodDisruptionBudget poddisruptionbudgets namespaced
networking.k8s.io/v1 NetworkPolicy networkpolicies namespaced
networking.k8s.io/v1 Ingress ingresses namespaced
rbac.authorization.k8s.io/v1 Role roles namespaced
rbac.authorization.k8s.io/v1 RoleBinding rolebindings namespaced
rbac.authorization.k8s.io/v1 ClusterRole clusterroles -
rbac.authorization.k8s.io/v1 ClusterRoleBinding clusterrolebindings -
storage.k8s.io/v1 StorageClass storageclasses -
scheduling.k8s.io/v1 PriorityClass priorityclasses -
apiextensions.k8s.io/v1 CustomResourceDefinition customresourcedefinitions -
"""


class Schema:
    """One node of a schema: what may stand below, and how two lists are merged."""

    def __init__(self, node: Any, definitions: Mapping[str, Any]) -> None:
        if isinstance(node, dict) and "$ref" in node:
            node = node | definitions[node["$ref"].rpartition("/")[2]]
        self._node: dict[str, Any] = node if isinstance(node, dict) else {}
        self._definitions = definitions

    def below(self, name: str) -> Schema:
        """Of a map's value."""
        node = self._node.get("properties", {}).get(name) or self._node.get("additionalProperties")
        return Schema(node, self._definitions)

    @property
    def item(self) -> Schema:
        return Schema(self._node.get("items"), self._definitions)

    @property
    def is_atomic(self) -> bool:
        return self._node.get("x-kubernetes-map-type") == "atomic"

    @property
    def is_set(self) -> bool:
        return self._node.get("x-kubernetes-list-type") == "set"

    @property
    def keys(self) -> tuple[str, ...]:
        """What tells a list's items apart; empty for lists that are one value."""
        is_map = self._node.get("x-kubernetes-list-type") == "map"
        return tuple(self._node.get("x-kubernetes-list-map-keys", ())) if is_map else ()

    @property
    def merge_key(self) -> str | None:
        """Of a strategic merge patch."""
        merges = "merge" in self._node.get("x-kubernetes-patch-strategy", "")
        return self._node.get("x-kubernetes-patch-merge-key", "") if merges else None


@dataclass(frozen=True)
class Kind:
    """A kind, and where it is served. `open_schema`: a custom kind's, None for built-in ones."""

    group: str
    version: str
    kind: str
    plural: str
    is_namespaced: bool
    open_schema: Any = None

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @functools.cached_property
    def root(self) -> Schema:
        """Of whole objects. Metadata is everywhere that of built-in kinds."""
        if self.open_schema is None:
            return Schema(_file(f"{self.kind.lower()}-{_short(self.api_version)}.json"), _definitions())
        metadata = {"$ref": "/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
        node = self.open_schema | {"properties": self.open_schema.get("properties", {}) | {"metadata": metadata}}
        return Schema(node, _definitions())

    def fault(self, value: Mapping[str, Any]) -> str:
        """What is wrong with an object; empty when nothing is."""
        try:
            self._validator.validate(value)
        except jsonschema.ValidationError as error:
            return f"{'.'.join(str(part) for part in error.absolute_path) or 'object'}: {error.message[:300]}"
        return ""

    @functools.cached_property
    def _validator(self) -> jsonschema.Draft202012Validator:
        if self.open_schema is not None:
            return jsonschema.Draft202012Validator(_strict(self.open_schema))
        schema = _file(f"{self.kind.lower()}-{_short(self.api_version)}.json")
        return jsonschema.Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _registry())

    def defaulted(self, value: dict[str, Any]) -> dict[str, Any]:
        """With the defaults of a custom kind's schema."""
        return value if self.open_schema is None else _defaulted(copy.deepcopy(value), self.open_schema)


def built_in_kinds() -> Iterator[Kind]:
    """Those that are there before any custom kind."""
    for line in _BUILT_IN.split("\n")[1:-1]:
        api_version, kind, plural, scope = line.split()
        group, _, version = api_version.rpartition("/")
        yield Kind(group, version, kind, plural, scope == "namespaced")


def custom_kinds(definition: Mapping[str, Any]) -> Iterator[Kind]:
    """Those that a CustomResourceDefinition adds: its stored version."""
    spec = definition["spec"]
    for version in spec["versions"]:
        if version["storage"]:
            schema = version["schema"]["openAPIV3Schema"]
            names, is_namespaced = spec["names"], spec["scope"] == "Namespaced"
            yield Kind(spec["group"], version["name"], names["kind"], names["plural"], is_namespaced, schema)


@functools.cache
def _file(name: str) -> Any:
    return json.loads((_SCHEMAS / name).read_text())


@functools.cache
def _registry() -> Registry:
    registry: Registry = Resource.from_contents(_file("_definitions.json")) @ Registry()
    return registry


def _definitions() -> Mapping[str, Any]:
    definitions: Mapping[str, Any] = _file("_definitions.json")["$defs"]
    return definitions


def _short(api_version: str) -> str:
    """As the schemas' files are named: rbac.authorization.k8s.io/v1 is rbac-v1."""
    group, _, version = api_version.rpartition("/")
    return f"{group.split('.')[0]}-{version}" if group else version


def _strict(node: Any, *, is_root: bool = True) -> Any:
    """A custom kind's schema that refuses what the real server would prune."""
    if not isinstance(node, dict):
        return node
    strict = dict(node)
    if "properties" in node:
        names = node["properties"]
        strict["properties"] = {name: _strict(below, is_root=False) for name, below in names.items()}
        if is_root:
            strict["properties"]["metadata"] = {"type": "object"}
    for name in ("items", "additionalProperties"):
        strict[name] = _strict(node.get(name, True), is_root=False)
    if node.get("type") == "object" and "additionalProperties" not in node:
        strict["additionalProperties"] = bool(node.get("x-kubernetes-preserve-unknown-fields"))
    if node.get("nullable"):
        return {"anyOf": [strict, {"type": "null"}]}
    return strict


def _defaulted(value: Any, node: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        for name, below in node.get("properties", {}).items():
            if name not in value and "default" in below:
                value[name] = copy.deepcopy(below["default"])
        for name in value:
            below = node.get("properties", {}).get(name) or node.get("additionalProperties")
            value[name] = _defaulted(value[name], below if isinstance(below, dict) else {})
    elif isinstance(value, list):
        return [_defaulted(item, node.get("items", {})) for item in value]
    return value
