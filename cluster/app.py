"""The composition root: one configuration in, one Ray Serve application out."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from cluster.autoscaling import follow
from cluster.config import HeadwaterConfig, from_tree, load
from cluster.membership import MembershipFeed
from protos.errors import ConfigError
from protos.tls import PeerTLS
from protos.tracing import Tracing
from router.deployment import Router
from workers.deployment import Worker
from workers.drafter_deployment import Drafter

APP_NAME = "headwater"
WORKER_NAME = "Worker"
ROUTER_NAME = "Router"
DRAFTER_NAME = "Drafter"
QUIET = {"log_level": "WARNING", "enable_access_log": False}
SHUTDOWN_MARGIN_S = 2.0  # between the end of a drain and Serve's kill
MAX_CONTROL_CALLS = 100


def build(config: HeadwaterConfig, *, local: bool = False) -> Application:
    """Drafters, workers that follow them, and routers that follow those. `local`: all share one machine's cores."""
    token = session_token(config)
    drafters = _drafter(config, token) if config.cluster.num_drafters else None
    return _router(config, token, _worker(config, token, drafters, local=local), local=local)


def build_app(args: dict[str, Any]) -> Application:
    """For Serve config files and RayService: `args` is the tree itself, or {config: a file, set: [overrides]}."""
    if "config" in args:
        return build(load(Path(args["config"]), args.get("set", ())))
    return build(from_tree(args, source="the application's args"))


def session_token(config: HeadwaterConfig) -> str:
    """What routers show to workers: the file's content, or a new secret for this run. Raises ConfigError."""
    path = config.cluster.session_token_file
    if path is None:
        return secrets.token_urlsafe(32)
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"`cluster.session_token_file`: {path} cannot be read ({error.strerror})") from None
    if not token:
        raise ConfigError(f"`cluster.session_token_file`: {path} is empty; put a long random string in it")
    return token


def threads_per_worker(config: HeadwaterConfig, *, local: bool) -> int:
    """CPU threads of one engine: as configured, else its share of this machine, else what it reserves on its node."""
    if config.worker.engine.threads is not None:
        return config.worker.engine.threads
    if not local:
        return max(1, math.floor(config.cluster.worker_cpus))
    drafting = config.cluster.num_drafters * config.drafter.threads
    return max(1, (num_cores() - drafting) // config.cluster.max_workers)


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _drafter(config: HeadwaterConfig, token: str) -> Application:
    cluster = config.cluster
    return serve.deployment(
        Drafter,
        name=DRAFTER_NAME,
        num_replicas=cluster.num_drafters,
        ray_actor_options=_actor(
            cluster.drafter_cpus, cluster.drafter_gpus, cluster.drafter_labels, threads=config.drafter.threads
        ),
        request_router_config=RequestRouterConfig(request_router_class=MembershipFeed),
        **_life(config),
    ).bind(
        config.drafter,
        target=config.worker.model.path,
        session_token=token,
        tls=_peer_tls(config),
        tracing=_tracing(config),
    )


def _worker(config: HeadwaterConfig, token: str, drafters: Application | None, *, local: bool) -> Application:
    cluster, threads = config.cluster, threads_per_worker(config, local=local)
    return serve.deployment(
        Worker,
        name=WORKER_NAME,
        **_num_workers(config),
        ray_actor_options=_actor(cluster.worker_cpus, cluster.worker_gpus, cluster.worker_labels, threads=threads),
        request_router_config=RequestRouterConfig(request_router_class=MembershipFeed),
        **_life(config),
    ).bind(
        config.worker,
        drafters,
        session_token=token,
        threads=threads,
        drain_timeout_s=cluster.drain_timeout_s,
        tls=_peer_tls(config),
        tracing=_tracing(config),
    )


def _num_workers(config: HeadwaterConfig) -> dict[str, Any]:
    scaling = config.cluster.autoscaling
    return {"num_replicas": config.cluster.num_workers} if scaling is None else {"autoscaling_config": follow(scaling)}


def _router(config: HeadwaterConfig, token: str, workers: Application, *, local: bool) -> Application:
    placement = {} if local else {"max_replicas_per_node": 1}  # its ports are fixed
    return serve.deployment(
        Router,
        name=ROUTER_NAME,
        num_replicas=config.cluster.num_routers,
        ray_actor_options={"num_cpus": config.cluster.router_cpus} | _on(config.cluster.router_labels),
        **placement,
        **_life(config),
    ).bind(
        workers,
        config.router,
        model_name=config.worker.model.served_name,
        tokenizer_dir=config.worker.model.path,
        session_token=token,
        drain_timeout_s=config.cluster.drain_timeout_s,
        tls=_peer_tls(config),
        tracing=_tracing(config),
        on_demand=not config.cluster.min_workers,
        wanted=_wanted(config),
    )


def _wanted(config: HeadwaterConfig) -> dict[str, int]:
    cluster = config.cluster
    return {"router": cluster.num_routers, "worker": cluster.min_workers, "drafter": cluster.num_drafters}


def _peer_tls(config: HeadwaterConfig) -> PeerTLS | None:
    return config.cluster.tls.peer_tls if config.cluster.tls else None


def _tracing(config: HeadwaterConfig) -> Tracing | None:
    return config.cluster.tracing.tracing if config.cluster.tracing else None


def _actor(cpus: float, gpus: float, labels: Mapping[str, str], *, threads: int) -> dict[str, Any]:
    """What Ray is told about a process that computes: what it reserves, on which nodes, with how many threads."""
    environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}  # read once, when torch loads
    options = {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}
    return options | _on(labels)


def _on(labels: Mapping[str, str]) -> dict[str, Any]:
    """What Ray is told about where a process may run."""
    return {"label_selector": dict(labels)} if labels else {}


def _life(config: HeadwaterConfig) -> dict[str, Any]:
    """What Serve is told alike about every process."""
    return {
        "max_ongoing_requests": MAX_CONTROL_CALLS,
        "health_check_period_s": config.cluster.health_check_period_s,
        "health_check_timeout_s": config.cluster.health_check_timeout_s,
        "graceful_shutdown_timeout_s": config.cluster.drain_timeout_s + SHUTDOWN_MARGIN_S,
        "graceful_shutdown_wait_loop_s": 0.1,
        "logging_config": QUIET,
    }
