"""The fake API server's storage: objects, who owns which of their fields, and the log that watches read."""

from __future__ import annotations

import base64
import copy
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from tests.deploy.api_fields import MISSING, Path, dotted, found, from_v1, leaves, merged, to_v1, without
from tests.deploy.api_schemas import Kind, built_in_kinds, custom_kinds

Object = dict[str, Any]
Key = tuple[str, str, str, str]  # group, plural, namespace, name
_DEFINITIONS = ("apiextensions.k8s.io", "customresourcedefinitions")


class Refused(Exception):
    """An answer that is not 2xx, as a Status."""

    def __init__(self, code: int, reason: str, message: str, *, causes: tuple[Mapping[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
            "details": {"causes": list(causes)},
        }


class Store:
    """Every object. Changed only under `changed`, which wakes whoever watches."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version = 1
        self.log: list[tuple[int, str, Key, Object]] = []
        self._objects: dict[Key, Object] = {}
        self._kinds = list(built_in_kinds())
        self._num_built_in = len(self._kinds)

    def kinds(self) -> list[Kind]:
        """Those served now."""
        return self._kinds

    def define(self, definition: Object) -> None:
        """Store a CustomResourceDefinition that needs no checks."""
        with self.changed:
            name = definition["metadata"]["name"]
            metadata = definition["metadata"] | {"uid": name, "resourceVersion": "1"}
            self._objects[(*_DEFINITIONS, "", name)] = definition | {"metadata": metadata}
            self._redefine()

    def _redefine(self) -> None:
        definitions = [value for key, value in self._objects.items() if key[:2] == _DEFINITIONS]
        custom = [kind for definition in definitions for kind in custom_kinds(definition)]
        self._kinds = self._kinds[: self._num_built_in] + custom

    def get(self, key: Key) -> Object:
        with self.changed:
            if key not in self._objects:
                raise Refused(404, "NotFound", f'{_resource(key)} "{key[3]}" not found')
            return copy.deepcopy(self._objects[key])

    def select(self, kind: Kind, namespace: str, matches: Callable[[Object], bool]) -> list[Object]:
        """Those of one kind; an empty namespace is all of them."""
        with self.changed:
            return [
                copy.deepcopy(value)
                for key, value in sorted(self._objects.items())
                if key[:2] == (kind.group, kind.plural) and namespace in ("", key[2]) and matches(value)
            ]

    def create(self, kind: Kind, namespace: str, value: Object, manager: str, *, is_dry: bool) -> Object:
        with self.changed:
            value = _read(value)
            metadata = value.setdefault("metadata", {})
            if "generateName" in metadata and "name" not in metadata:
                metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
            key = (kind.group, kind.plural, namespace, metadata.get("name", ""))
            if key in self._objects:
                raise Refused(409, "AlreadyExists", f'{_resource(key)} "{key[3]}" already exists')
            managed = _after_update({}, value, kind, manager, [])
            return self._put(kind, key, {}, value, managed, is_dry=is_dry)

    def update(self, kind: Kind, key: Key, value: Object, manager: str, *, part: str = "", is_dry: bool) -> Object:
        """`part`: "status" changes nothing else, "" all but the status."""
        with self.changed:
            live = self.get(key)
            stated = value.get("metadata", {}).get("resourceVersion")
            if stated and stated != live["metadata"]["resourceVersion"]:
                raise Refused(409, "Conflict", f"the object has been modified: {stated} is not the latest version")
            value = _confined(kind, live, _read(value), part)
            managed = _after_update(live, value, kind, manager, live["metadata"].get("managedFields", []), part)
            return self._put(kind, key, live, value, managed, is_dry=is_dry)

    def apply(
        self, kind: Kind, key: Key, applied: Object, manager: str, *, part: str = "", forces: bool, is_dry: bool
    ) -> Object:
        """Server-side."""
        with self.changed:
            applied = _read(applied)
            live = copy.deepcopy(self._objects.get(key, {}))
            entries = _owners(live)
            own, root = (manager, "Apply", part), kind.root
            paths = leaves(applied, root)
            for owner, theirs in entries.items():
                if owner != own:
                    entries[owner] = theirs - self._contested(owner, theirs & paths, live, applied, kind, forces=forces)
            value = merged(live, applied, root)
            kept = set().union(paths, *(theirs for owner, theirs in entries.items() if owner != own))
            for path in sorted(entries.get(own, set()) - kept, key=len, reverse=True):
                value = without(value, path, root)
            entries[own] = paths
            return self._put(kind, key, live, value, _managed(entries, kind, live), is_dry=is_dry)

    def _contested(
        self, owner: tuple[str, str, str], shared: set[Path], live: Object, applied: Object, kind: Kind, *, forces: bool
    ) -> set[Path]:
        """What is taken from another manager. Raises Refused if that must be forced."""
        root = kind.root
        taken = {
            path for path in shared if path[-1][0] != "k" and found(live, path, root) != found(applied, path, root)
        }
        if taken and not forces:
            causes = tuple(
                {
                    "reason": "FieldManagerConflict",
                    "message": f'conflict with "{owner[0]}" using {kind.api_version}',
                    "field": dotted(path),
                }
                for path in sorted(taken)
            )
            names = "\n".join(f"- {cause['field']}" for cause in causes)
            raise Refused(
                409,
                "Conflict",
                f'Apply failed with {len(causes)} conflicts: conflicts with "{owner[0]}":\n{names}',
                causes=causes,
            )
        return taken

    def delete(self, key: Key, *, orphans: bool = False, is_dry: bool = False) -> Object:
        """At once, or where there are finalizers, marked until the last of them is gone."""
        with self.changed:
            value = self.get(key)
            if is_dry:
                return value
            if value["metadata"].get("finalizers"):
                value["metadata"]["deletionTimestamp"] = _now()
                return self._record("MODIFIED", key, value)
            del self._objects[key]
            gone = self._record("DELETED", key, value)
            for other, dependent in list(self._objects.items()):
                owners = [owner["uid"] for owner in dependent["metadata"].get("ownerReferences", ())]
                is_inside = key[1] == "namespaces" and other[2] == key[3]
                if other in self._objects and (is_inside or (not orphans and value["metadata"]["uid"] in owners)):
                    self.delete(other)
            return gone

    def since(self, version: int) -> Iterator[tuple[int, str, Key, Object]]:
        """The log after a version."""
        with self.changed:
            yield from [entry for entry in self.log if entry[0] > version]

    def _put(self, kind: Kind, key: Key, live: Object, value: Object, managed: list[Object], *, is_dry: bool) -> Object:
        if kind.is_namespaced and ("", "namespaces", "", key[2]) not in self._objects:
            raise Refused(404, "NotFound", f'namespaces "{key[2]}" not found')
        value = kind.defaulted(value)
        value |= {"apiVersion": kind.api_version, "kind": kind.kind}
        value["metadata"] = self._metadata(key, live, value, managed)
        if fault := kind.fault(value):
            raise Refused(422, "Invalid", f'{kind.kind}.{kind.group} "{key[3]}" is invalid: {fault}')
        if is_dry or _is_same(live, value):
            return value if is_dry else live
        if value["metadata"].get("deletionTimestamp") and not value["metadata"].get("finalizers"):
            self._objects[key] = value
            return self.delete(key)
        return self._record("MODIFIED" if live else "ADDED", key, value)

    def _metadata(self, key: Key, live: Object, value: Object, managed: list[Object]) -> Object:
        old = live.get("metadata", {})
        changes = {name: part for name, part in value.items() if name not in ("metadata", "status")}
        is_changed = changes != {name: part for name, part in live.items() if name not in ("metadata", "status")}
        kept = {"name": key[3], "uid": old.get("uid") or str(uuid.uuid4())}
        kept |= {"namespace": key[2]} if key[2] else {}
        kept |= {"creationTimestamp": old.get("creationTimestamp") or _now()}
        kept |= {"generation": old.get("generation", 0) + is_changed, "managedFields": managed}
        kept |= {"resourceVersion": old.get("resourceVersion", "0")}
        kept |= {name: old[name] for name in ("deletionTimestamp",) if name in old}
        return value.get("metadata", {}) | kept

    def _record(self, event: str, key: Key, value: Object) -> Object:
        self.version += 1
        value["metadata"]["resourceVersion"] = str(self.version)
        if event != "DELETED":
            self._objects[key] = copy.deepcopy(value)
        self.log.append((self.version, event, key, copy.deepcopy(value)))
        if key[:2] == _DEFINITIONS:
            self._redefine()
        self.changed.notify_all()
        return value


def _read(value: Object) -> Object:
    """What a client may write: a Secret's plain strings are stored encoded, and null is nothing."""
    value = {name: part for name, part in copy.deepcopy(value).items() if part is not None}
    value.get("metadata", {}).pop("managedFields", None)
    for name in [name for name, part in value.get("metadata", {}).items() if part is None]:
        del value["metadata"][name]
    for name, text in value.pop("stringData", {}).items():
        value.setdefault("data", {})[name] = base64.b64encode(text.encode()).decode()
    return value


def _confined(kind: Kind, live: Object, value: Object, part: str) -> Object:
    if part == "status":
        return live | {"status": value.get("status", {})}
    has_status = kind.open_schema is not None or kind.kind in ("Pod", "Deployment", "Job", "Service", "Node")
    return value | {"status": live["status"]} if has_status and "status" in live else value


def _owners(live: Object) -> dict[tuple[str, str, str], set[Path]]:
    return {
        (entry["manager"], entry["operation"], entry.get("subresource", "")): set(from_v1(entry["fieldsV1"]))
        for entry in live.get("metadata", {}).get("managedFields", ())
    }


def _after_update(
    live: Object, value: Object, kind: Kind, manager: str, managed: list[Object], part: str = ""
) -> list[Object]:
    """What is new belongs to its writer alone; what is gone to nobody."""
    entries = _owners({"metadata": {"managedFields": managed}})
    root = kind.root
    there = leaves(value, root)
    changed = {path for path in there if found(live, path, root) != found(value, path, root)}
    for owner in entries:
        entries[owner] = {path for path in entries[owner] - changed if found(value, path, root) is not MISSING}
    own = (manager, "Update", part)
    entries[own] = entries.get(own, set()) | changed
    return _managed(entries, kind, live)


def _managed(entries: Mapping[tuple[str, str, str], set[Path]], kind: Kind, live: Object) -> list[Object]:
    times = {
        (entry["manager"], entry["operation"]): entry["time"]
        for entry in live.get("metadata", {}).get("managedFields", ())
    }
    return [
        {
            "manager": manager,
            "operation": operation,
            "apiVersion": kind.api_version,
            "time": times.get((manager, operation)) or _now(),
            "fieldsType": "FieldsV1",
            "fieldsV1": to_v1(paths),
        }
        | ({"subresource": part} if part else {})
        for (manager, operation, part), paths in entries.items()
        if paths
    ]


def _is_same(live: Object, value: Object) -> bool:
    return bool(live) and live == value


def _resource(key: Key) -> str:
    return f"{key[1]}.{key[0]}" if key[0] else key[1]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
