"""A fake Kubernetes API server on 127.0.0.1, for tests: what kubectl, Helm and the `kubernetes` client ask of one.

It stores, validates (built-in kinds by their published schemas, custom kinds by their CRDs, both strictly), applies
server-side with field managers, patches, watches and deletes. Nothing runs behind it: tests write the status.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from tests.deploy.api_fields import json_patched, merge_patched, strategically_patched
from tests.deploy.api_forward import forward
from tests.deploy.api_schemas import KUBERNETES, Kind
from tests.deploy.api_store import Key, Object, Refused, Store

CRDS = Path(__file__).parents[3] / "shared" / "k8s" / "crds"
VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
MAX_WATCH_S = 60.0


class ApiServer:
    """The server, its storage, what it forbids, and where the ports of pods lead. Started and stopped by `with`."""

    def __init__(self, *, with_kuberay: bool = True) -> None:
        self.store = Store()
        self.forbidden: set[tuple[str, str]] = set()  # verb, plural
        self.ports: dict[tuple[str, int], int] = {}  # pod and port, to a port of this machine
        self.asked: list[str] = []
        self.max_page = 500  # objects in one answer
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"server_of": self}))
        self._http.daemon_threads = True
        for name in ("default", "kube-system"):
            self.add({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        if with_kuberay:
            for definition in _kuberay():
                self.store.define(definition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), name="api-server", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def kubeconfig(self, path: Path, *, namespace: str = "default") -> Path:
        """Write one that leads here."""
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "fake",
                    "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
                    "users": [{"name": "me", "user": {"token": "a-token"}}],
                    "contexts": [
                        {"name": "fake", "context": {"cluster": "fake", "user": "me", "namespace": namespace}}
                    ],
                }
            )
        )
        return path

    def add(self, value: Object, *, manager: str = "test") -> Object:
        """Store an object, status included, as the control plane would."""
        kind = self.kind(value)
        return self.store.create(kind, _namespace(kind, value), value, manager, is_dry=False)

    def get(self, kind: str, name: str, namespace: str = "default") -> Object:
        """One object. Raises Refused."""
        return self.store.get(self._key(kind, name, namespace))

    def has(self, kind: str, name: str, namespace: str = "default") -> bool:
        with suppress(Refused):
            return bool(self.get(kind, name, namespace))
        return False

    def set_status(self, kind: str, name: str, status: Object, namespace: str = "default") -> None:
        """As a controller does."""
        value = self.get(kind, name, namespace) | {"status": status}
        self.store.update(
            self._named(kind), self._key(kind, name, namespace), value, "controller", part="status", is_dry=False
        )

    def delete(self, kind: str, name: str, namespace: str = "default") -> None:
        self.store.delete(self._key(kind, name, namespace))

    def release(self, kind: str, name: str, namespace: str = "default") -> None:
        """Take an object's finalizers away, as their controller does."""
        value = self.get(kind, name, namespace)
        value["metadata"].pop("finalizers", None)
        self.store.update(self._named(kind), self._key(kind, name, namespace), value, "controller", is_dry=False)

    def kind(self, value: Mapping[str, Any]) -> Kind:
        """Of an object. Raises Refused."""
        return self._named(value["kind"])

    def _named(self, name: str) -> Kind:
        for kind in self.store.kinds():
            if kind.kind == name:
                return kind
        raise Refused(404, "NotFound", f"no kind {name}")

    def _key(self, kind: str, name: str, namespace: str) -> Key:
        named = self._named(kind)
        return (named.group, named.plural, namespace if named.is_namespaced else "", name)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet: two would wait for each other
    disable_nagle_algorithm = True
    server_of: ApiServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        self.server_of.asked.append(format % args)

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            found = self._discovered(parts.path) or self._answered(
                [unquote(part) for part in parts.path.split("/")[1:]], raw
            )
        except Refused as refused:
            self._send(refused.code, refused.status)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        else:
            if found is not None:
                self._send(201 if self.command == "POST" else 200, found)

    def _send(self, code: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    # Discovery

    def _discovered(self, path: str) -> Any:
        kinds = self.server_of.store.kinds()
        groups = {kind.group: kind.version for kind in kinds} | {"authorization.k8s.io": "v1"}
        match path.strip("/").split("/"):
            case ["version"]:
                return {"major": "1", "minor": KUBERNETES[2:], "gitVersion": f"v{KUBERNETES}.0"}
            case ["api"]:
                return {"kind": "APIVersions", "versions": ["v1"]}
            case ["apis"]:
                return {
                    "kind": "APIGroupList",
                    "apiVersion": "v1",
                    "groups": [_group(*g) for g in groups.items() if g[0]],
                }
            case ["api", "v1"]:
                return _resources("v1", [kind for kind in kinds if not kind.group])
            case ["apis", group, version]:
                return _resources(f"{group}/{version}", [kind for kind in kinds if kind.group == group])
            case ["openapi", "v3"]:
                roots = [f"apis/{group}/{version}" if group else "api/v1" for group, version in groups.items()]
                return {"paths": {root: {"serverRelativeURL": f"/openapi/v3/{root}"} for root in roots}}
            case ["openapi", "v3", *root]:
                return _openapi([kind for kind in kinds if kind.api_version == "/".join(root[1:])])
        return None

    # Objects

    def _answered(self, parts: list[str], raw: bytes) -> Any:
        if parts[:3] == ["apis", "authorization.k8s.io", "v1"]:
            return self._reviewed(json.loads(raw))
        group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1] if len(parts) > 1 else "", parts[3:])
        namespace = ""
        if len(rest) > 2 and rest[0] == "namespaces" and rest[2] not in ("status", "finalize"):
            namespace, rest = rest[1], rest[2:]
        kinds = [kind for kind in self.server_of.store.kinds() if [kind.group, kind.plural] == [group, *rest[:1]]]
        if not kinds:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        name, part = [*rest[1:], "", ""][:2]
        self._allow(kinds[0], name, part)
        key = (group, kinds[0].plural, namespace, name)
        return self._object(kinds[0], key, part, raw) if name else self._collection(kinds[0], namespace, raw)

    def _allow(self, kind: Kind, name: str, part: str) -> None:
        verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
        verb = verbs.get(self.command) or ("get" if name else "watch" if "watch" in self.query else "list")
        resource = f"{kind.plural}/{part}" if part else kind.plural
        if (verb, resource) in self.server_of.forbidden:
            place = f' in API group "{kind.group}"'
            raise Refused(
                403, "Forbidden", f'{kind.plural} is forbidden: User "me" cannot {verb} resource "{resource}"{place}'
            )

    def _reviewed(self, review: Object) -> Object:
        asked = review["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource", ""))))
        allowed = (asked["verb"], resource) not in self.server_of.forbidden
        return review | {"status": {"allowed": allowed}}

    def _collection(self, kind: Kind, namespace: str, raw: bytes) -> Any:
        store = self.server_of.store
        if self.command == "POST":
            return store.create(kind, namespace, _parsed(raw), self._manager, is_dry=self._is_dry)
        if self.command == "DELETE":
            for value in store.select(kind, namespace, self._matches):
                store.delete((kind.group, kind.plural, namespace, value["metadata"]["name"]))
            return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        if self.query.get("watch") in ("1", "true"):
            return self._watch(kind, namespace)
        with store.changed:
            items = store.select(kind, namespace, self._matches)
            metadata = {"resourceVersion": str(store.version)}
        start = int(self.query.get("continue", 0))
        end = start + min(int(self.query.get("limit") or len(items)), self.server_of.max_page)
        metadata |= {"continue": str(end)} if "limit" in self.query and end < len(items) else {}
        items = items[start:end] if "limit" in self.query else items
        return {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": metadata, "items": items}

    def _object(self, kind: Kind, key: Key, part: str, raw: bytes) -> Any:
        store = self.server_of.store
        if part == "portforward":
            store.get(key)
            return forward(self, lambda port: self.server_of.ports.get((key[3], port)))
        match self.command:
            case "GET":
                return store.get(key)
            case "PUT":
                return store.update(kind, key, _parsed(raw), self._manager, part=part, is_dry=self._is_dry)
            case "DELETE":
                options = json.loads(raw) if raw else {}
                uid = (options.get("preconditions") or {}).get("uid")
                if uid not in (None, store.get(key)["metadata"]["uid"]):
                    raise Refused(409, "Conflict", f"the uid of {key[3]} is not {uid}")
                orphans = options.get("propagationPolicy", self.query.get("propagationPolicy")) == "Orphan"
                return store.delete(key, orphans=orphans, is_dry=self._is_dry or bool(options.get("dryRun")))
            case _:
                return self._patched(kind, key, part, raw)

    def _patched(self, kind: Kind, key: Key, part: str, raw: bytes) -> Object:
        store, patch = self.server_of.store, _parsed(raw)
        match self.headers.get("Content-Type", "").split(";")[0]:
            case "application/apply-patch+yaml" | "application/apply-patch+cbor":
                forces = self.query.get("force") == "true"
                return store.apply(kind, key, patch, self._manager, part=part, forces=forces, is_dry=self._is_dry)
            case "application/json-patch+json":
                value = json_patched(store.get(key), patch)
            case "application/merge-patch+json":
                value = merge_patched(store.get(key), patch)
            case "application/strategic-merge-patch+json" if kind.open_schema is None:
                value = strategically_patched(store.get(key), patch, kind.root)
            case other:
                raise Refused(415, "UnsupportedMediaType", f"{other} is not supported for {kind.kind}")
        return store.update(kind, key, value, self._manager, part=part, is_dry=self._is_dry)

    def _watch(self, kind: Kind, namespace: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.wfile.flush()
            for event in self._events(kind, namespace):
                line = json.dumps(event).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _events(self, kind: Kind, namespace: str) -> Iterator[Object]:
        store = self.server_of.store
        until = time.monotonic() + min(MAX_WATCH_S, float(self.query.get("timeoutSeconds", MAX_WATCH_S)))
        version = int(self.query.get("resourceVersion") or 0)
        if not version:
            with store.changed:
                version = store.version
                present = store.select(kind, namespace, self._matches)
            yield from ({"type": "ADDED", "object": value} for value in present)
        while (left := until - time.monotonic()) > 0:
            for at, event, key, value in store.since(version):
                version = at
                if key[:2] == (kind.group, kind.plural) and namespace in ("", key[2]) and self._matches(value):
                    yield {"type": event, "object": value}
            with store.changed:
                if store.version == version:
                    store.changed.wait(min(left, 1.0))

    def _matches(self, value: Object) -> bool:
        labels = value["metadata"].get("labels", {})
        terms = [term for term in self.query.get("labelSelector", "").split(",") if term]
        fields = [term for term in self.query.get("fieldSelector", "").split(",") if term]
        return all(_has_label(labels, term) for term in terms) and all(_has_field(value, term) for term in fields)

    @property
    def _manager(self) -> str:
        return self.query.get("fieldManager") or self.headers.get("User-Agent", "unknown").split("/")[0]

    @property
    def _is_dry(self) -> bool:
        return self.query.get("dryRun") == "All"


@functools.cache
def _kuberay() -> list[Object]:
    return [
        yaml.load((CRDS / f"ray.io_{name}.yaml").read_text(), yaml.CSafeLoader)
        for name in ("rayclusters", "rayservices")
    ]


def _parsed(raw: bytes) -> Any:
    try:
        return yaml.load(raw, yaml.CSafeLoader)
    except yaml.YAMLError as error:
        raise Refused(400, "BadRequest", f"cannot be read: {error}") from None


def _namespace(kind: Kind, value: Object) -> str:
    return str(value["metadata"].get("namespace", "default")) if kind.is_namespaced else ""


def _has_label(labels: Mapping[str, str], term: str) -> bool:
    if "!=" in term:
        name, _, wanted = term.partition("!=")
        return labels.get(name) != wanted
    name, has_value, wanted = term.replace("==", "=").partition("=")
    return labels.get(name) == wanted if has_value else name in labels


def _has_field(value: Any, term: str) -> bool:
    path, _, wanted = term.replace("==", "=").partition("=")
    for part in path.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    return (value or "") == wanted


def _group(name: str, version: str) -> Object:
    only = {"groupVersion": f"{name}/{version}", "version": version}
    return {"name": name, "versions": [only], "preferredVersion": only}


def _resources(api_version: str, kinds: list[Kind]) -> Object:
    if not kinds and not api_version.startswith("authorization"):
        raise Refused(404, "NotFound", "the server could not find the requested resource")
    whole = [
        {
            "name": kind.plural,
            "singularName": kind.kind.lower(),
            "namespaced": kind.is_namespaced,
            "kind": kind.kind,
            "verbs": VERBS,
        }
        for kind in kinds
    ]
    parts = [entry | {"name": f"{entry['name']}/status", "verbs": ["get", "patch", "update"]} for entry in whole]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": api_version, "resources": whole + parts}


def _openapi(kinds: list[Kind]) -> Object:
    """As much as kubectl reads: that the server checks fields and knows dry runs, so that kubectl need not."""
    names = ("dryRun", "fieldManager", "fieldValidation")
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in names]
    paths = {}
    for kind in kinds:
        gvk = {"group": kind.group, "version": kind.version, "kind": kind.kind}
        operation = {"parameters": parameters, "x-kubernetes-group-version-kind": gvk, "responses": {}}
        paths[f"/{kind.api_version}/{kind.plural}/{{name}}"] = {"patch": operation}
    return {
        "openapi": "3.0.0",
        "info": {"title": "fake", "version": "1"},
        "paths": paths,
        "components": {"schemas": {}},
    }
