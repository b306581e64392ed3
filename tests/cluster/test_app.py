"""The composition root: what a configuration becomes, without a Ray."""

from pathlib import Path
from typing import Any

import pytest
from ray.serve import Application
from ray.serve._private.build_app import build_app as flatten

from cluster.app import (
    APP_NAME,
    DRAFTER_NAME,
    ROUTER_NAME,
    WORKER_NAME,
    build,
    build_app,
    session_token,
    threads_per_worker,
)
from cluster.config import load
from protos.errors import ConfigError
from protos.tls import PeerTLS
from protos.tracing import Tracing

POOL = ("cluster.num_drafters=2", "worker.engine.speculation.drafters=[copy, pool]")


def actor_options(*overrides: str) -> dict[str, dict[str, Any]]:
    """By deployment, what Ray is told about its processes."""
    built = flatten(build(load(None, overrides)), name=APP_NAME)
    return {deployment.name: deployment.ray_actor_options for deployment in built.deployments}


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


def test_drafters_are_deployed_where_they_are_wanted() -> None:
    assert deployments(build(load(None))) == {WORKER_NAME: 2, ROUTER_NAME: 1}
    assert deployments(build(load(None, POOL))) == {DRAFTER_NAME: 2, WORKER_NAME: 2, ROUTER_NAME: 1}


def test_labels_and_devices_place_everybody() -> None:
    placed = actor_options(
        *POOL,
        "cluster.router_labels={headwater/role: router}",
        "cluster.worker_labels={headwater/role: worker}",
        "cluster.drafter_labels={headwater/role: drafter, gpu: small}",
        "cluster.worker_cpus=2",
        "cluster.worker_gpus=1",
        "cluster.drafter_cpus=0.5",
        "cluster.drafter_gpus=0.25",
        "drafter.threads=3",
    )
    worker, drafter = placed[WORKER_NAME], placed[DRAFTER_NAME]
    assert placed[ROUTER_NAME]["label_selector"] == {"headwater/role": "router"}
    assert worker["label_selector"] == {"headwater/role": "worker"}
    assert drafter["label_selector"] == {"headwater/role": "drafter", "gpu": "small"}
    assert (worker["num_cpus"], worker["num_gpus"]) == (2, 1)
    assert (drafter["num_cpus"], drafter["num_gpus"]) == (0.5, 0.25)
    assert worker["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "2"
    assert drafter["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"


def test_without_labels_any_node_will_do() -> None:
    placed = actor_options(*POOL)
    assert not placed[ROUTER_NAME].get("label_selector")
    assert not placed[WORKER_NAME].get("label_selector")
    assert not placed[DRAFTER_NAME].get("label_selector")


def test_workers_of_one_machine_leave_the_drafters_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.app.num_cores", lambda: 8)
    assert threads_per_worker(load(None, POOL), local=True) == 3
    assert threads_per_worker(load(None, [*POOL, "drafter.threads=2"]), local=True) == 2
    assert threads_per_worker(load(None, [*POOL, "drafter.threads=4"]), local=True) == 1
    assert threads_per_worker(load(None, [*POOL, "cluster.worker_cpus=4"]), local=False) == 4


def test_every_process_is_given_where_traces_go() -> None:
    tracing = ["cluster.tracing.endpoint=otel:4317", "cluster.tracing.sample_ratio=0.5", "cluster.tracing.ca_file=ca"]
    application = build(load(None, [*POOL, *tracing, "cluster.tracing.tls=true"]))
    expected = Tracing("otel:4317", 0.5, is_tls=True, ca_file=Path.cwd() / "ca")
    given = {built.name: built.init_kwargs["tracing"] for built in flatten(application, name=APP_NAME).deployments}
    assert given == dict.fromkeys((ROUTER_NAME, WORKER_NAME, DRAFTER_NAME), expected)


def test_every_process_is_given_the_certificates_of_members() -> None:
    files = {"cert_file": "member.pem", "key_file": "member.key", "ca_file": "ca.pem"}
    tls = [f"cluster.tls.{key}=/etc/headwater/{file}" for key, file in files.items()]
    for overrides, expected in (
        (POOL, None),
        ((*POOL, *tls), PeerTLS(*(Path("/etc/headwater") / file for file in files.values()))),
    ):
        built = flatten(build(load(None, overrides)), name=APP_NAME)
        given = {deployment.name: deployment.init_kwargs["tls"] for deployment in built.deployments}
        assert given == dict.fromkeys((DRAFTER_NAME, WORKER_NAME, ROUTER_NAME), expected)


def test_routers_export_how_many_of_each_there_should_be() -> None:
    def wanted(*overrides: str) -> dict[str, int]:
        built = flatten(build(load(None, overrides)), name=APP_NAME)
        [router] = [deployment for deployment in built.deployments if deployment.name == ROUTER_NAME]
        told: dict[str, int] = router.init_kwargs["wanted"]
        return told

    assert wanted(*POOL, "cluster.num_workers=3") == {"router": 1, "worker": 3, "drafter": 2}
    assert wanted("cluster.autoscaling={min_workers: 2, max_workers: 9}")["worker"] == 2
