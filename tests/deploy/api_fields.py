"""Who set which field: server-side apply and the patches, on plain values and a schema that tells lists apart."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tests.deploy.api_schemas import Schema

Path = tuple[str, ...]  # as FieldsV1 has them: "f:name", 'k:{"name":"a"}', 'v:"a"'

MISSING = object()
_NOBODYS = {
    ("f:apiVersion",),
    ("f:kind",),
    *(
        ("f:metadata", f"f:{name}")
        for name in ("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "managedFields")
    ),
}


def leaves(value: Any, schema: Schema) -> set[Path]:
    """Every field that one manager can own."""
    return {path for path in _leaves(value, schema, ()) if path[:2] not in _NOBODYS and path not in _NOBODYS}


def _leaves(value: Any, schema: Schema, at: Path) -> Iterator[Path]:
    if isinstance(value, dict) and value and not schema.is_atomic:
        for name, below in value.items():
            yield from _leaves(below, schema.below(name), (*at, f"f:{name}"))
    elif isinstance(value, list) and value and schema.keys:
        for item in value:
            yield (*at, _key(item, schema))
            yield from _leaves(item, schema.item, (*at, _key(item, schema)))
    elif isinstance(value, list) and value and schema.is_set:
        yield from ((*at, f"v:{json.dumps(item)}") for item in value)
    else:
        yield at


def _key(item: Mapping[str, Any], schema: Schema) -> str:
    defaults = {"protocol": "TCP"}
    keys = {name: item[name] if name in item else defaults.get(name) for name in sorted(schema.keys)}
    return "k:" + json.dumps({name: key for name, key in keys.items() if key is not None}, separators=(",", ":"))


def found(value: Any, path: Path, schema: Schema) -> Any:
    """What stands there, or MISSING."""
    for part in path:
        if part.startswith("f:") and isinstance(value, dict):
            value, schema = value.get(part[2:], MISSING), schema.below(part[2:])
        elif part.startswith("k:") and isinstance(value, list):
            value = next((item for item in value if _key(item, schema) == part), MISSING)
            schema = schema.item
        elif part.startswith("v:") and isinstance(value, list):
            value = part if json.loads(part[2:]) in value else MISSING
        else:
            return MISSING
    return value


def merged(live: Any, applied: Any, schema: Schema) -> Any:
    """`live` with what is applied."""
    if isinstance(applied, dict) and isinstance(live, dict) and not schema.is_atomic:
        both = dict(live)
        for name, value in applied.items():
            both[name] = merged(live[name], value, schema.below(name)) if name in live else copy.deepcopy(value)
        return both
    if isinstance(applied, list) and isinstance(live, list) and schema.keys:
        items = {_key(item, schema): item for item in live}
        for item in applied:
            key = _key(item, schema)
            items[key] = merged(items[key], item, schema.item) if key in items else copy.deepcopy(item)
        return list(items.values())
    if isinstance(applied, list) and isinstance(live, list) and schema.is_set:
        return [*live, *(item for item in applied if item not in live)]
    return copy.deepcopy(applied)


def without(value: Any, path: Path, schema: Schema) -> Any:
    """The value with one field less, and without maps and lists that this empties."""
    head, rest = path[0], path[1:]
    if isinstance(value, dict) and head[2:] in value:
        below = without(value[head[2:]], rest, schema.below(head[2:])) if rest else None
        kept = {name: old for name, old in value.items() if name != head[2:]}
        return kept | {head[2:]: below} if below else kept
    if isinstance(value, list) and head.startswith("k:"):
        pairs = ((item, _key(item, schema) == head) for item in value)
        items = (without(item, rest, schema.item) if hit and rest else item for item, hit in pairs if rest or not hit)
        return [item for item in items if item]
    if isinstance(value, list) and head.startswith("v:"):
        return [item for item in value if item != json.loads(head[2:])]
    return value


def to_v1(paths: Iterable[Path]) -> dict[str, Any]:
    """As managedFields have them."""
    tree: dict[str, Any] = {}
    for path in sorted(paths):
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        if path[-1].startswith("k:"):
            node["."] = {}
    return tree


def from_v1(tree: Mapping[str, Any], at: Path = ()) -> Iterator[Path]:
    """The paths again."""
    for part, below in tree.items():
        if part == ".":
            yield at
        elif below:
            yield from from_v1(below, (*at, part))
        else:
            yield (*at, part)


def dotted(path: Path) -> str:
    """As a conflict names it: .spec.ports[port=80].name."""
    text = ""
    for part in path:
        if part.startswith("f:"):
            text += f".{part[2:]}"
        elif part.startswith("k:"):
            text += "[" + ",".join(f"{name}={json.dumps(key)}" for name, key in json.loads(part[2:]).items()) + "]"
        else:
            text += f"[={part[2:]}]"
    return text


def merge_patched(value: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    both = dict(value) if isinstance(value, dict) else {}
    for name, below in patch.items():
        if below is None:
            both.pop(name, None)
        else:
            both[name] = merge_patched(both.get(name), below)
    return both


def json_patched(value: Any, operations: Iterable[Mapping[str, Any]]) -> Any:
    """RFC 6902 with add, remove, replace and test."""
    value = copy.deepcopy(value)
    for operation in operations:
        parts = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        target = value
        for part in parts[:-1]:
            target = target[int(part)] if isinstance(target, list) else target[part]
        last: Any = parts[-1]
        if isinstance(target, list):
            last = len(target) if last == "-" else int(last)
        match operation["op"]:
            case "remove":
                del target[last]
            case "add" if isinstance(target, list):
                target.insert(last, operation["value"])
            case "add" | "replace":
                target[last] = operation["value"]
            case "test" if target[last] != operation["value"]:
                raise ValueError(f"{operation['path']} is {target[last]!r}")
    return value


def strategically_patched(value: Any, patch: Any, schema: Schema) -> Any:
    """Kubernetes' own patch: lists by their merge key, and `$patch: delete | replace`."""
    if isinstance(patch, dict):
        return _patched_map(value if isinstance(value, dict) else {}, patch, schema)
    if isinstance(patch, list) and schema.merge_key is not None:
        return _patched_list(value if isinstance(value, list) else [], patch, schema)
    return copy.deepcopy(patch)


def _patched_map(value: Mapping[str, Any], patch: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    both = {} if patch.get("$patch") == "replace" else dict(value)
    for name, below in patch.items():
        if name.startswith("$deleteFromPrimitiveList/"):
            target = name.partition("/")[2]
            both[target] = [item for item in both.get(target, []) if item not in below]
        elif name.startswith("$"):
            continue
        elif below is None:
            both.pop(name, None)
        else:
            both[name] = strategically_patched(both.get(name), below, schema.below(name))
    return both


def _patched_list(value: list[Any], patch: list[Any], schema: Schema) -> list[Any]:
    key = schema.merge_key
    if not key:
        return [*value, *(item for item in patch if item not in value)]
    items = {item.get(key): item for item in value}
    for item in patch:
        if item.get("$patch") == "delete":
            items.pop(item.get(key), None)
        else:
            items[item.get(key)] = strategically_patched(items.get(item.get(key)), item, schema.item)
    return list(items.values())
