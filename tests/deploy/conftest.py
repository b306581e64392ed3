"""A fake Kubernetes cluster, and `headwater deploy` beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.kubernetes.api import Api, connect
from tests.deploy.api_server import CRDS, ApiServer


class Deploy:
    """The command line, with a kubeconfig that leads to the fake cluster."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self.kubeconfig = kubeconfig
        self._folder = folder

    def file(self, *objects: dict[str, Any], name: str = "manifests.yaml") -> str:
        """Write manifests."""
        path = self._folder / name
        path.write_text(yaml.safe_dump_all(objects))
        return str(path)

    def run(self, *arguments: str, stdin: str | None = None) -> Result:
        whole = ["deploy", *arguments, "--kubeconfig", str(self.kubeconfig)]
        return CliRunner().invoke(app, whole, input=stdin, env={"COLUMNS": "200", "NO_COLOR": "1"})

    def json(self, *arguments: str) -> list[Any]:
        return [json.loads(line) for line in self.run(*arguments, "--json").stdout.splitlines()]

    def connect(self) -> Api:
        return connect(kubeconfig=str(self.kubeconfig), context=None, namespace=None)


@pytest.fixture
def kube() -> Iterator[ApiServer]:
    """With KubeRay's custom kinds."""
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's CRDs are not in {CRDS}")
    with ApiServer() as server:
        yield server


@pytest.fixture
def deploy(kube: ApiServer, tmp_path: Path) -> Deploy:
    return Deploy(kube.kubeconfig(tmp_path / "kubeconfig"), tmp_path)
