"""Manifests: what is to be on a cluster, as read from files, folders or the standard input."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from protos.errors import ManifestError

MARK: Final = "headwater/deployment"  # the label of everything applied; its value is the deployment's namespace
_SUFFIXES: Final = (".yaml", ".yml", ".json")
_ORDER: Final = (
    "Namespace",
    "CustomResourceDefinition",
    "PriorityClass",
    "StorageClass",
    "ResourceQuota",
    "ServiceAccount",
    "Secret",
    "ConfigMap",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "NetworkPolicy",
    "Service",
    "PodDisruptionBudget",
    "Job",
    "RayCluster",
    "RayService",
)
_KEPT_HOOKS: Final = ("pre-install", "post-install", "pre-upgrade", "post-upgrade")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One object that is wanted, and where it was read. The value is never changed."""

    value: dict[str, Any]
    source: str

    @property
    def api_version(self) -> str:
        return str(self.value["apiVersion"])

    @property
    def group(self) -> str:
        """Empty for the core kinds."""
        return self.api_version.rpartition("/")[0]

    @property
    def kind(self) -> str:
        return str(self.value["kind"])

    @property
    def name(self) -> str:
        return str(self.value["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """Empty where the manifest leaves it open."""
        return str(self.value["metadata"].get("namespace") or "")

    @property
    def title(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def is_left_out(self) -> bool:
        """Whether it is for `helm test` or `helm uninstall` only."""
        hooks = (self.value["metadata"].get("annotations") or {}).get("helm.sh/hook", "")
        return bool(hooks) and not any(hook.strip() in _KEPT_HOOKS for hook in hooks.split(","))

    def marked(self, deployment: str) -> dict[str, Any]:
        """What is sent: with the label that `uninstall` finds it by."""
        value = copy.deepcopy(self.value)
        value["metadata"]["labels"] = {**(value["metadata"].get("labels") or {}), MARK: deployment}
        return value


def load(files: Sequence[str]) -> list[Manifest]:
    """Everything in them, in the order in which it is applied. Raises ManifestError."""
    found = [manifest for file in files for manifest in _read(file)]
    if not found:
        raise ManifestError(f"there is no object in {', '.join(files)}; give files such as deploy/kuberay/*.yaml")
    seen: dict[tuple[str, str, str, str], Manifest] = {}
    for manifest in found:
        key = (manifest.group, manifest.kind, manifest.namespace, manifest.name)
        if key in seen:
            raise ManifestError(
                f"{manifest.source}: {manifest.title} is in {seen[key].source} already; keep one of them"
            )
        seen[key] = manifest
    return sorted((manifest for manifest in found if not manifest.is_left_out), key=_rank)


def _rank(manifest: Manifest) -> int:
    return _ORDER.index(manifest.kind) if manifest.kind in _ORDER else len(_ORDER)


def _read(file: str) -> Iterator[Manifest]:
    if file == "-":
        yield from _parsed(sys.stdin.read(), "the standard input")
        return
    path = Path(file)
    if path.is_dir():
        for below in sorted(below for below in path.rglob("*") if below.suffix in _SUFFIXES and below.is_file()):
            yield from _read(str(below))
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from None
    yield from _parsed(text, str(path))


def _parsed(text: str, source: str) -> Iterator[Manifest]:
    documents = yaml.safe_load_all(text)
    number = 0
    while True:
        number += 1
        place = f"{source}, document {number}"
        try:
            document = next(documents)
        except StopIteration:
            return
        except yaml.YAMLError as error:
            raise ManifestError(f"{place}: not YAML: {_one_line(error)}") from None
        yield from _objects(document, place)


def _objects(document: Any, place: str) -> Iterator[Manifest]:
    if document is None:
        return
    if not isinstance(document, dict):
        raise ManifestError(f"{place}: a {type(document).__name__}, not an object with apiVersion and kind")
    for key in ("apiVersion", "kind"):
        if not isinstance(document.get(key), str):
            raise ManifestError(f"{place}: {key} is missing")
    if document["kind"].endswith("List") and isinstance(document.get("items"), list):
        for item in document["items"]:
            yield from _objects(item, place)
        return
    if not isinstance(document.get("metadata"), dict) or not document["metadata"].get("name"):
        raise ManifestError(f"{place}: {document['kind']} has no metadata.name")
    yield Manifest(document, place)


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())
