"""The Kubernetes API, in the few verbs that a deployment needs, on plain objects; every refusal is one typed error."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import yaml

from protos.errors import KubernetesError

MANAGER: Final = "headwater"
TIMEOUT_S: Final = 30.0
_APPLY: Final = "application/apply-patch+yaml"
_JSON: Final = "application/json"
_WHERE: Final = re.compile(r"^\w+\([^)]*\): ")  # as urllib3 begins what it says


class Refusal(KubernetesError):
    """The API server answered, and said no. `causes`: (field, message) of each."""

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        code: int = 0,
        causes: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.code = code
        self.causes = tuple(causes)


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind as the API server serves it."""

    api_version: str
    kind: str
    plural: str
    is_namespaced: bool
    verbs: frozenset[str]

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]

    def path(self, namespace: str, name: str = "") -> str:
        """An empty namespace: of every namespace, or of a kind that has none."""
        root = f"/apis/{self.api_version}" if self.group else f"/api/{self.api_version}"
        inside = f"/namespaces/{quote(namespace)}" if self.is_namespaced and namespace else ""
        return f"{root}{inside}/{self.plural}" + (f"/{quote(name)}" if name else "")


class Api:
    """One cluster. Owns the connection, and what it has learned of the kinds served."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self._resources: dict[str, list[Resource]] = {}
        self.namespace = namespace

    @property
    def url(self) -> str:
        return str(self._client.configuration.host)

    @property
    def configuration(self) -> Any:
        """The `kubernetes` package's, for what it alone can do."""
        return self._client.configuration

    def close(self) -> None:
        self._client.close()

    def version(self) -> str:
        """The API server's. Raises KubernetesError."""
        return str(self.request("GET", "/version").get("gitVersion", "of no known version"))

    def resource(self, api_version: str, kind: str) -> Resource | None:
        """None where the cluster does not serve it."""
        return next((found for found in self._served(api_version) if found.kind == kind), None)

    def forget(self, api_version: str) -> None:
        """Ask again for its kinds, which may have been added."""
        self._resources.pop(api_version, None)

    def resources(self) -> list[Resource]:
        """Every kind served, in its preferred version."""
        groups = self.request("GET", "/apis").get("groups", [])
        versions = ["v1", *(group["preferredVersion"]["groupVersion"] for group in groups)]
        return [resource for version in versions for resource in self._served(version)]

    def get(self, resource: Resource, namespace: str, name: str) -> dict[str, Any] | None:
        """None: there is none. Raises KubernetesError."""
        try:
            return self.request("GET", resource.path(namespace, name))
        except Refusal as refusal:
            if refusal.code == 404:
                return None
            raise

    def find(self, api_version: str, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        """The same, of a kind that may not be served."""
        resource = self.resource(api_version, kind)
        return self.get(resource, namespace, name) if resource else None

    def items(self, api_version: str, kind: str, namespace: str = "", *, selector: str = "") -> list[dict[str, Any]]:
        """All of a kind; none where the kind is not served. Raises KubernetesError."""
        resource = self.resource(api_version, kind)
        return self.items_of(resource, namespace, selector=selector) if resource else []

    def items_of(self, resource: Resource, namespace: str = "", *, selector: str = "") -> list[dict[str, Any]]:
        """All of a kind, page by page. Raises KubernetesError."""
        query = {"limit": "500"} | ({"labelSelector": selector} if selector else {})
        found: list[dict[str, Any]] = []
        while True:
            page = self.request("GET", resource.path(namespace), query)
            found += page.get("items", [])
            following = page.get("metadata", {}).get("continue")
            if not following:
                return [item | {"apiVersion": resource.api_version, "kind": resource.kind} for item in found]
            query["continue"] = following

    def apply(
        self,
        resource: Resource,
        namespace: str,
        value: Mapping[str, Any],
        *,
        forces: bool = False,
        is_dry: bool = False,
    ) -> dict[str, Any]:
        """Server-side, as the manager "headwater"; the object as it is then. Raises Refusal with 409 on a conflict."""
        query = {"fieldManager": MANAGER, "force": "true" if forces else "false", "fieldValidation": "Strict"}
        query |= {"dryRun": "All"} if is_dry else {}
        path = resource.path(namespace, value["metadata"]["name"])
        return self.request("PATCH", path, query, json.dumps(value), content_type=_APPLY)

    def delete(self, resource: Resource, namespace: str, name: str, *, uid: str) -> None:
        """The very object, with what depends on it. One that is gone is no error. Raises KubernetesError."""
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": uid},
        }
        try:
            self.request("DELETE", resource.path(namespace, name), {}, options)
        except Refusal as refusal:
            if refusal.code not in (404, 409):
                raise

    def may(self, verb: str, resource: Resource, namespace: str) -> bool:
        """Whether whoever asks is allowed to. Raises KubernetesError."""
        attributes = {"verb": verb, "group": resource.group, "resource": resource.plural}
        attributes |= {"namespace": namespace} if resource.is_namespaced else {}
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        answer = self.request("POST", "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", {}, review)
        return bool(answer.get("status", {}).get("allowed"))

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        *,
        content_type: str = _JSON,
    ) -> dict[str, Any]:
        """One call, one object. Raises KubernetesError."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": _JSON, "Content-Type": content_type}
        call = self._client.param_serialize(
            method=method,
            resource_path=path,
            query_params=list((query or {}).items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            response = self._client.call_api(*call, _request_timeout=TIMEOUT_S)
            response.read()
        except (HTTPError, ApiException) as error:  # the latter: of certificates
            raise KubernetesError(_unreachable(self.url, error)) from None
        if response.status >= 400:
            raise _refusal(method, path, response.status, response.data)
        return _object(response.data, self.url)

    def _served(self, api_version: str) -> list[Resource]:
        if api_version not in self._resources:
            path = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
            try:
                listed = self.request("GET", path).get("resources", [])
            except Refusal as refusal:
                if refusal.code not in (404, 503):  # 503: an aggregated API whose server is away
                    raise
                listed = []
            self._resources[api_version] = [
                Resource(api_version, one["kind"], one["name"], one["namespaced"], frozenset(one["verbs"]))
                for one in listed
                if "/" not in one["name"]
            ]
        return self._resources[api_version]


def connect(*, kubeconfig: str | None, context: str | None, namespace: str | None) -> Api:
    """The cluster of a kubeconfig's context, or the one this pod is in. Asks it nothing. Raises KubernetesError."""
    from kubernetes import client, config

    settings = client.Configuration()
    settings.retries = False
    try:
        own = _configure(settings, kubeconfig, context)
    except config.ConfigException as error:
        if kubeconfig or context or not _is_inside(settings):
            raise KubernetesError(
                f"no usable kubeconfig: {error}; give --kubeconfig and --context, or set KUBECONFIG"
            ) from None
        own = _own_namespace()
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise KubernetesError(f"the kubeconfig cannot be read: {' '.join(str(error).split())}") from None
    return Api(client.ApiClient(settings), namespace or own or "default")


def _configure(settings: Any, kubeconfig: str | None, context: str | None) -> str:
    """Fill in a context's address and credentials; its namespace, which may be empty.

    Made of the package's parts, since its own function needs a current context even where another is asked for.
    """
    from kubernetes.config import ConfigException
    from kubernetes.config.kube_config import KUBE_CONFIG_DEFAULT_LOCATION, KubeConfigLoader, KubeConfigMerger

    merged = KubeConfigMerger(kubeconfig or KUBE_CONFIG_DEFAULT_LOCATION)
    if merged.config is None:
        raise ConfigException(f"there is none at {kubeconfig or KUBE_CONFIG_DEFAULT_LOCATION}")
    loader = KubeConfigLoader(
        merged.config, active_context=context, config_base_path=None, config_persister=merged.save_changes
    )
    loader.load_and_set(settings)
    return str(loader.current_context["context"].get("namespace") or "")


def _is_inside(settings: Any) -> bool:
    from kubernetes import config

    try:
        config.load_incluster_config(client_configuration=settings)
    except config.ConfigException:
        return False
    return True


def _own_namespace() -> str:
    with open("/var/run/secrets/kubernetes.io/serviceaccount/namespace", encoding="ascii") as file:
        return file.read().strip()


def _object(data: Any, url: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise KubernetesError(f"{url} is no Kubernetes API server: its answer is not an object")
    return value


def _unreachable(url: str, error: Exception) -> str:
    text = " ".join(str(getattr(error, "reason", None) or error).split())
    text = _WHERE.sub("", text)
    return f"the API server {url} cannot be reached ({text}); check --context, and that it is up"


def _refusal(method: str, path: str, code: int, data: Any) -> Refusal:
    try:
        status = json.loads(data)
    except ValueError:
        status = {"message": data.decode(errors="replace")[:200] if isinstance(data, bytes) else str(data)[:200]}
    causes = [
        (cause.get("field", ""), cause.get("message", ""))
        for cause in (status.get("details") or {}).get("causes") or ()
    ]
    message = status.get("message") or f"{method} {path}"
    return Refusal(_explained(code, message), code=code, causes=causes)


def _explained(code: int, message: str) -> str:
    match code:
        case 401:
            return f"the API server does not accept the credentials: {message}; log in again, or check --context"
        case 403:
            return f"forbidden: {message}; `headwater deploy preflight` lists every right that is missing"
        case _:
            return message
