"""The composition root: what a configuration becomes, without a Ray."""

from pathlib import Path

import pytest
from ray.serve import Application
from ray.serve._private.build_app import build_app as flatten

from cluster.app import APP_NAME, ROUTER_NAME, WORKER_NAME, build_app, session_token, threads_per_worker
from cluster.config import load
from protos.errors import ConfigError


def deployments(application: Application) -> dict[str, int | None]:
    """Name to number of replicas."""
    built = flatten(application, name=APP_NAME)
    return {deployment.name: deployment.num_replicas for deployment in built.deployments}


def test_a_serve_config_file_gives_the_tree_or_names_a_file(root: Path, tmp_path: Path) -> None:
    tree = {"cluster": {"num_workers": 3, "num_routers": 2}}
    expected = {WORKER_NAME: 3, ROUTER_NAME: 2}
    assert deployments(build_app(tree)) == expected
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster: {num_workers: 1, num_routers: 2}\n")
    assert deployments(build_app({"config": str(file), "set": ["cluster.num_workers=3"]})) == expected


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.workers"):
        build_app({"cluster": {"workers": 3}})


def test_workers_and_routers_share_one_session_token(tmp_path: Path) -> None:
    first, second = session_token(load(None)), session_token(load(None))
    assert first != second
    assert len(first) >= 32
    file = tmp_path / "token"
    file.write_text("shared\n")
    assert session_token(load(None, [f"cluster.session_token_file={file}"])) == "shared"
    file.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        session_token(load(None, [f"cluster.session_token_file={file}"]))


def test_workers_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.app.num_cores", lambda: 8)
    assert threads_per_worker(load(None, ["cluster.num_workers=3"]), local=True) == 2
    assert threads_per_worker(load(None, ["cluster.num_workers=9"]), local=True) == 1
    assert threads_per_worker(load(None, ["worker.engine.threads=5"]), local=True) == 5
    assert threads_per_worker(load(None, ["cluster.worker_cpus=4"]), local=False) == 4
