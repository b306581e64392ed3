"""A cluster's life as one object: start Ray, deploy, wait until requests can be served, and leave nothing behind."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import ray
from ray import serve
from ray.serve import RunTarget
from ray.serve.schema import ApplicationStatusOverview

from cluster.app import APP_NAME, DRAFTER_NAME, QUIET, ROUTER_NAME, WORKER_NAME, build, num_cores
from cluster.config import HeadwaterConfig
from protos.errors import ConfigError, SetupError
from router.deployment import RouterStatus

logger = logging.getLogger(__name__)

POLL_S = 0.1
LOOK_S = 1.0  # between two looks at Ray's processes, which cost a hundredth of a core if they are taken at every poll
PATIENCE_S = 10.0  # of somebody who watches a start, between two signs of life
CALL_TIMEOUT_S = 5.0
STOP_MARGIN_S = 10.0  # Serve's own part of a stop, after the drain
KILL_TIMEOUT_S = 5.0
MAX_TEMP_PATH = 107 - len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store.sock")  # a socket's name
TEMP_PREFIX = "hw-"


class Interrupted(Exception):
    """Somebody asked for a stop while the cluster was starting."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where one router listens, host:port."""

    grpc: str
    metrics: str


def _ignore(_: str) -> None:
    """For callers that do not follow the progress."""


class Cluster:
    """Owns this process's Ray connection, its Serve application and its temporary folder. One per process at a time.

    Enter (or `start`) returns when every router has every worker; leave (or `stop`) returns when all is gone.
    With `handle_signals`, SIGINT and SIGTERM mean `interrupt` from `start` until the process ends.
    """

    def __init__(
        self,
        config: HeadwaterConfig,
        *,
        on_progress: Callable[[str], None] = _ignore,
        handle_signals: bool = False,
    ) -> None:
        self._config = config
        self._handle_signals = handle_signals
        self._on_progress = on_progress
        self._num_interrupts = 0
        self._temp_dir: Path | None = None
        self._foreign: set[psutil.Process] = set()  # children of this process that are not ours to end
        self._daemons: list[psutil.Process] = []  # a local Ray's own
        self._started = False
        self._deployed = False
        self._stage = "Ray"
        self._num_ready = -1
        self._num_drafting = 0
        self.endpoints: tuple[Endpoints, ...] = ()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Bring everything up. Raises SetupError or Interrupted, with nothing left running."""
        self._started = True
        try:
            self._take_signals()
            self._start_ray()
            self._take_signals()  # Ray has put a handler of its own in place
            self._check_interrupted()
            self._deploy()
            self._wait_ready()
        except BaseException as error:
            if isinstance(error, SetupError):
                self._keep_logs()
            self.stop()
            raise

    def routers(self) -> tuple[Endpoints, ...]:
        """Where routers listen now: one that was restarted listens elsewhere if its port is any free one."""
        found: dict[str, Endpoints] = {}
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while len(found) < self._config.cluster.num_routers and time.monotonic() < deadline:
            status = self._status()  # of whichever Serve picks
            found[status.router_id] = Endpoints(status.grpc, status.metrics)
        return tuple(found.values())

    def worker_metrics(self) -> tuple[str, ...]:
        """The metrics endpoints of the workers there are now, host:port."""
        return tuple(sorted(self._status().workers.values()))

    def drafter_metrics(self) -> tuple[str, ...]:
        """The metrics endpoints of the drafters that the workers know now, host:port."""
        if not self._config.cluster.num_drafters:
            return ()
        known: dict[str, str] = serve.get_app_handle(APP_NAME).drafters.remote().result(timeout_s=CALL_TIMEOUT_S)
        return tuple(sorted(known.values()))

    def interrupt(self) -> None:
        """Ask for a stop; a second time: without waiting for live streams. Safe in a signal handler."""
        self._num_interrupts += 1

    def wait(self) -> None:
        """Return when `interrupt` was called. Raises SetupError if Ray dies underneath: nothing can be served then."""
        looked = -math.inf
        while not self._num_interrupts:
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                if not self._ray_lives():
                    self._keep_logs()
                    raise SetupError(f"Ray died; its logs are kept in {self._kept_logs()}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End every process and remove every file of this cluster. Bounded in time; does nothing the second time."""
        if not self._started:
            return
        self._started = False
        if self._deployed and self._ray_lives():
            self._leave_serve()
        ours = self._processes()
        ray.shutdown()
        _end(ours)
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)

    def _take_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM) if self._handle_signals else ():
            signal.signal(number, lambda *_: self.interrupt())

    def _start_ray(self) -> None:
        options = self._config.cluster.ray
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": APP_NAME}
        self._foreign = set(psutil.Process().children(recursive=True))
        if not options.is_local:
            self._attempt(lambda: ray.init(address=options.address, **quiet))
            self._report(f"Joined Ray at {options.address}")
            return
        self._temp_dir = _temp_dir(options.temp_dir)
        self._attempt(
            lambda: ray.init(
                address="local",
                num_cpus=options.num_cpus or num_cores(),
                include_dashboard=options.dashboard,
                object_store_memory=options.object_store_bytes,
                _temp_dir=str(self._temp_dir),
                _system_config={"worker_niceness": 0},  # engines step back by themselves (worker.engine.niceness)
                **quiet,
            )
        )
        self._daemons = [process for process in psutil.Process().children() if process not in self._foreign]
        self._report("Ray started")

    def _attempt(self, init: Callable[[], object]) -> None:
        try:
            init()
        except Exception as error:  # noqa: BLE001 - Ray raises many kinds; all of them mean that it did not start
            raise SetupError(f"Ray did not start: {' '.join(str(error).split())}") from None

    def _deploy(self) -> None:
        self._stage = "router"
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        application = build(self._config, local=self._config.cluster.ray.is_local)
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        self._check_interrupted()
        target = RunTarget(target=application, name=APP_NAME, route_prefix=None, logging_config=QUIET)
        serve.run_many([target], wait_for_applications_running=False)
        self._deployed = True

    def _wait_ready(self) -> None:
        """Poll until everybody has found everybody. Raises SetupError with the replica's own words when one fails."""
        began = time.monotonic()
        deadline, told = began + self._config.cluster.ready_timeout_s, began
        routers: dict[str, RouterStatus] = {}
        while len(routers) < self._config.cluster.num_routers:
            self._check_interrupted()
            if time.monotonic() > deadline:
                raise SetupError(self._too_late())
            application = serve.status().applications.get(APP_NAME)
            if application is not None:
                _raise_failure(application)
                self._follow(application)
                routers |= self._connected_routers(application)
            if time.monotonic() > told + PATIENCE_S:
                told += PATIENCE_S
                self._report_waiting(told - began)
            time.sleep(POLL_S)
        self.endpoints = tuple(Endpoints(status.grpc, status.metrics) for status in routers.values())
        self._report("Ready")

    def _report_waiting(self, seconds: float) -> None:
        """That nothing is wrong, where somebody waits for long."""
        if self._stage == "workers" and max(self._num_ready, 0) < (wanted := self._config.cluster.min_workers):
            reason = "; vLLM takes half a minute or more" if self._config.worker.engine.kind == "vllm" else ""
            self._report(f"After {seconds:.0f} s: {max(self._num_ready, 0)} of {wanted} workers ready{reason}")

    def _follow(self, application: ApplicationStatusOverview) -> None:
        if self._stage == "router" and _num_running(application, ROUTER_NAME):
            self._stage = "workers"
            self._report("Router up")
        num_drafting, num_drafters = _num_running(application, DRAFTER_NAME), self._config.cluster.num_drafters
        if num_drafting > self._num_drafting:
            self._num_drafting = num_drafting
            self._report(f"Drafter {num_drafting}/{num_drafters} ready")
        num_ready = _num_running(application, WORKER_NAME)
        if self._stage == "workers" and num_ready > max(self._num_ready, 0):
            self._num_ready = num_ready
            self._report(f"Worker {num_ready}/{max(num_ready, self._config.cluster.min_workers)} ready")

    def _connected_routers(self, application: ApplicationStatusOverview) -> dict[str, RouterStatus]:
        """The status of the router that Serve picks, if it has every worker, and a worker that it asks every drafter.

        Repeated calls meet all routers.
        """
        cluster = self._config.cluster
        is_complete = (
            _num_running(application, WORKER_NAME) >= cluster.min_workers
            and _num_running(application, DRAFTER_NAME) >= cluster.num_drafters
        )
        if self._stage != "workers" or not is_complete:
            return {}
        try:
            status, num_drafters = self._status(), len(self.drafter_metrics())
        except (TimeoutError, ray.exceptions.RayError):  # it died or is slow: the next poll tells
            return {}
        knows_drafters = num_drafters >= cluster.num_drafters or not cluster.min_workers  # workers know them
        is_connected = status.num_connected >= cluster.min_workers and knows_drafters
        return {status.router_id: status} if is_connected else {}

    def _status(self) -> RouterStatus:
        status: RouterStatus = serve.get_app_handle(APP_NAME).status.remote().result(timeout_s=CALL_TIMEOUT_S)
        return status

    def _too_late(self) -> str:
        cluster, num_ready = self._config.cluster, max(self._num_ready, 0)
        late = f"the {self._stage} did not come up"
        if self._stage == "workers" and num_ready >= cluster.min_workers and self._num_drafting < cluster.num_drafters:
            late = f"the drafters did not come up ({self._num_drafting} of {cluster.num_drafters} ready)"
        elif self._stage == "workers":
            late += f" ({num_ready} of {cluster.min_workers} ready)"
        return (
            f"{late} within cluster.ready_timeout_s = {cluster.ready_timeout_s:g} s; "
            f"Ray's logs are kept in {self._kept_logs()}"
        )

    def _check_interrupted(self) -> None:
        if self._num_interrupts:
            raise Interrupted

    def _report(self, stage: str) -> None:
        logger.info(stage)
        self._on_progress(stage)

    def _leave_serve(self) -> None:
        """Drain and end the application, for as long as nobody interrupts again."""
        deadline = time.monotonic() + self._config.cluster.drain_timeout_s + STOP_MARGIN_S
        patience = max(self._num_interrupts, 1)
        try:
            serve.delete(APP_NAME, _blocking=False)
            while APP_NAME in serve.status().applications and time.monotonic() < deadline:
                if self._num_interrupts > patience or not self._ray_lives():
                    return
                time.sleep(POLL_S)
        except Exception as error:  # noqa: BLE001 - on the way out; what is left is ended by force next
            logger.warning("Serve did not leave in order: %s", error)

    def _ray_lives(self) -> bool:
        return all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in self._daemons)

    def _processes(self) -> list[psutil.Process]:
        """The processes that a local Ray started: they are this process's descendants."""
        if not self._config.cluster.ray.is_local:
            return []
        return [process for process in psutil.Process().children(recursive=True) if process not in self._foreign]

    def _kept_logs(self) -> Path:
        return self._config.cluster.log_dir.resolve() / "ray"

    def _keep_logs(self) -> None:
        """Save Ray's logs from the temporary folder, which is about to go."""
        if self._temp_dir is None:
            return
        shutil.rmtree(self._kept_logs(), ignore_errors=True)
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(self._temp_dir / "session_latest" / "logs", self._kept_logs(), symlinks=True)


def _num_running(application: ApplicationStatusOverview, name: str) -> int:
    deployment = application.deployments.get(name)
    return deployment.replica_states.get("RUNNING", 0) if deployment else 0


def _raise_failure(application: ApplicationStatusOverview) -> None:
    """SetupError if a replica's constructor failed or Serve gave up."""
    for name, deployment in application.deployments.items():
        if "failed to start" in deployment.message:
            raise SetupError(f"{name.lower()}: {_last_words(deployment.message)}")
    if application.status == "DEPLOY_FAILED":
        raise SetupError(_last_words(application.message))


def _last_words(message: str) -> str:
    """What the replica itself said, out of the tracebacks that Ray and Serve wrapped around it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+: ", line) and not line.startswith("ray::")]
    own = [line for line in errors if line.startswith("protos.errors.")]
    return (own or errors or lines or ["no message"])[-1].rpartition("protos.errors.")[2]


def _temp_dir(parent: Path | None) -> Path:
    """A new folder whose path is short enough for the sockets inside. Also clears those whose driver was killed."""
    root = parent or Path(tempfile.gettempdir())
    if parent is None and len(str(root)) + len(TEMP_PREFIX) + 16 > MAX_TEMP_PATH:
        root = Path("/tmp")
    for left in root.glob(f"{TEMP_PREFIX}*-*"):
        owner = left.name.removeprefix(TEMP_PREFIX).partition("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    try:
        path = Path(tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}{os.getpid()}-", dir=root))
    except OSError as error:
        raise ConfigError(f"`cluster.ray.temp_dir`: {root} cannot be written ({error.strerror})") from None
    if len(str(path)) > MAX_TEMP_PATH:
        path.rmdir()
        raise ConfigError(
            f"`cluster.ray.temp_dir`: {root} is too long by {len(str(path)) - MAX_TEMP_PATH} characters: sockets live "
            "there and their names are limited; give a shorter one such as /tmp"
        )
    return path


def _end(processes: list[psutil.Process]) -> None:
    """Wait for processes that were told to end, and kill those that do not."""
    _, alive = psutil.wait_procs(processes, timeout=KILL_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=KILL_TIMEOUT_S)
