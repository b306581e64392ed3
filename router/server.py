"""One router: the client-facing gRPC server, its health, its metrics, and the sessions behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from protos.errors import HeadwaterError, SetupError
from protos.overview import Overview
from protos.tls import Certificates, PeerTLS, server_credentials
from protos.tracing import Tracer, Tracing
from protos.v1 import cluster_pb2, cluster_pb2_grpc
from protos.v1 import inference_pb2 as pb
from protos.v1 import inference_pb2_grpc as pb_grpc
from router.admission import Admission
from router.calls import Calls
from router.config import GrpcSection, RouterConfig, TLSSection
from router.dispatch import Dispatcher
from router.fleet import Fleet
from router.forecast import Forecast
from router.inference import Inference
from router.metrics import MetricsServer, RouterMetrics
from router.operations import Operations
from router.pacer import Pacer
from router.page.site import Site
from router.pins import Pins
from router.quota import Quotas
from router.routing.accuracy import Accuracy
from router.routing.factory import make_policy
from router.routing.index import PrefixIndex
from router.session import RouterIdentity, Session, SessionLost, SessionState
from router.stream import Stream
from router.tenants import Tenants
from router.tokenizer import Tokenizer
from router.validation import Rules
from router.watch import Watch

INFERENCE_SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
CLUSTER_SERVICE = cluster_pb2.DESCRIPTOR.services_by_name["Cluster"].full_name
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
LAST_WORDS_S = 1.0  # for calls that ended to reach their clients when the server stops


@dataclass(frozen=True, slots=True)
class RouterAddress:
    """Where a router listens, each as host:port."""

    grpc: str
    metrics: str


class RouterServer:
    """Everything one router is. Started, fed and stopped by its deployment, on one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        model_name: str,
        tokenizer_dir: Path,
        session_token: str,
        router_id: str,
        peer_tls: PeerTLS | None = None,
        tracing: Tracing | None = None,
        on_demand: bool = False,
        wanted: Mapping[str, int] | None = None,
    ) -> None:
        """`peer_tls`: of the sessions with workers; None: plain text. `on_demand`: workers come when one is wanted.

        `wanted`: processes of each role that there should be, for the metrics alone.
        """
        self._config = config
        self._model_name = model_name
        self._tokenizer_dir = tokenizer_dir
        self._session_token = session_token
        self._router_id = router_id
        self._peer_tls = peer_tls
        self._tracing = tracing
        self._on_demand = on_demand
        self._wanted = wanted
        self._running: _Running | None = None

    async def start(self) -> RouterAddress:
        """Bind both ports and serve. Raises SetupError or ModelError, and then nothing is left behind."""
        assert self._running is None, "started twice"
        tokenizer = Tokenizer.load(self._tokenizer_dir)
        identity = RouterIdentity(
            self._router_id,
            self._session_token,
            self._model_name,
            Certificates.of_peer(self._peer_tls) if self._peer_tls else None,
        )
        tracer = Tracer(self._tracing, role="router", instance=self._router_id)
        running = _Running(self._config, identity, tokenizer, tracer, on_demand=self._on_demand)
        running.metrics.want(self._wanted or {})
        try:
            address = await running.start()
        except BaseException:
            await running.stop(grace_s=0)
            raise
        self._running = running
        return address

    def set_workers(self, workers: Mapping[str, str]) -> None:
        """The whole membership: worker id → session address. Workers that left finish what they hold."""
        assert self._running is not None, "not started"
        self._running.fleet.set_members(workers)

    @property
    def num_connected(self) -> int:
        """Workers with an open session."""
        return 0 if self._running is None else self._running.fleet.num_connected

    @property
    def wants_worker(self) -> bool:
        """Whether somebody waits, and no worker is connected."""
        return self._running is not None and self._running.wants_worker

    async def stop(self, grace_s: float) -> None:
        """Refuse new work, let live requests end for up to `grace_s`, then end everything. Idempotent."""
        running, self._running = self._running, None
        if running is not None:
            await running.stop(grace_s)

    def check(self) -> None:
        """Raise if a task died; state invariants."""
        if self._running is not None:
            self._running.check()


class _Running:
    """The parts of a started router. Owned by RouterServer."""

    def __init__(
        self, config: RouterConfig, identity: RouterIdentity, tokenizer: Tokenizer, tracer: Tracer, *, on_demand: bool
    ) -> None:
        self._config = config
        self._tracer = tracer
        self._on_demand = on_demand
        self.metrics = metrics = RouterMetrics()
        tenants, forecast = Tenants(config.tenants), Forecast()
        policy = make_policy(config.routing)
        index = PrefixIndex(config.routing.max_index_blocks)
        pins = Pins(config.limits.max_pinned_tokens)
        accuracy = Accuracy(clock=time.monotonic)
        self.fleet = Fleet(config.sessions, identity, metrics, index, pins, accuracy=accuracy, owner=self)
        self._dispatcher = Dispatcher(
            config.dispatch,
            self.fleet,
            policy,
            tenants=tenants,
            forecast=forecast,
            metrics=metrics,
        )
        self._admission = Admission(
            config.limits,
            config.recovery,
            fleet=self.fleet,
            dispatcher=self._dispatcher,
            quotas=Quotas(),
            forecast=forecast,
            metrics=metrics,
            on_demand=on_demand,
        )
        rules, calls = Rules(config.limits, identity.model_name), Calls(tenants, metrics, tracer)
        self._service = Inference(
            rules,
            tokenizer=tokenizer,
            tenants=tenants,
            admission=self._admission,
            fleet=self.fleet,
            calls=calls,
            pacer=Pacer(config.streaming, self.fleet.pace),
            tracer=tracer,
            router_id=identity.router_id,
        )
        self._overview_watch = Watch(
            metrics,
            self.fleet,
            router_id=identity.router_id,
            num_live=lambda: self._admission.num_live,
            num_waiting=lambda: self._dispatcher.num_waiting,
        )
        self._operations = Operations(
            rules,
            tokenizer=tokenizer,
            tenants=tenants,
            admission=self._admission,
            fleet=self.fleet,
            dispatcher=self._dispatcher,
            policy=policy,
            calls=calls,
            watch=self._overview_watch,
            router_id=identity.router_id,
        )
        self._server = grpc.aio.server(
            options=_server_options(config.grpc), maximum_concurrent_rpcs=config.grpc.max_concurrent_calls
        )
        self._health = health.aio.HealthServicer()
        self._health_due = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._metrics_server: MetricsServer | None = None

    @property
    def wants_worker(self) -> bool:
        return self._admission.wants_worker

    async def start(self) -> RouterAddress:
        pb_grpc.add_InferenceServicer_to_server(self._service, self._server)
        cluster_pb2_grpc.add_ClusterServicer_to_server(self._operations, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = (INFERENCE_SERVICE, CLUSTER_SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(services, self._server)
        await self._set_health()
        self._watch()
        metrics = self._config.metrics
        site = Site(self.metrics.registry, self._look if metrics.page else None)
        self._metrics_server = MetricsServer(self.metrics.registry, host=metrics.host, port=metrics.port, site=site)
        port = _bind(self._server, self._config.grpc)
        await self._server.start()
        self._tasks = [
            asyncio.create_task(self._keep_health(), name="router health"),
            asyncio.create_task(self._overview_watch.run(), name="router watch"),
        ]
        return RouterAddress(f"{self._config.grpc.host}:{port}", f"{metrics.host}:{self._metrics_server.port}")

    async def stop(self, grace_s: float) -> None:
        self._admission.drain()
        await self._health.enter_graceful_shutdown()
        await self._admission.finish(grace_s)
        await self._server.stop(LAST_WORDS_S if grace_s else None)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.fleet.close()
        self._admission.close()
        if self._metrics_server is not None:
            await self._metrics_server.close()
        await asyncio.to_thread(self._tracer.close)

    def check(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        self.fleet.check()
        self._admission.check()

    def fleet_changed(self) -> None:
        """See FleetOwner."""
        self._admission.fleet_changed()
        self._health_due.set()

    def streams_lost(self, session: Session, streams: Sequence[Stream], loss: SessionLost) -> None:
        """See FleetOwner."""
        self._admission.streams_lost(session, streams, loss)

    def stream_failed(self, session: Session, stream: Stream, error: HeadwaterError) -> None:
        """See FleetOwner."""
        self._admission.stream_failed(session, stream, error)

    def _look(self) -> Overview:
        return self._overview_watch.overview

    async def _keep_health(self) -> None:
        while True:
            await self._health_due.wait()
            self._health_due.clear()
            await self._set_health()

    async def _set_health(self) -> None:
        """SERVING only while a worker is connected or would come, so that load balancers look elsewhere otherwise."""
        response = health_pb2.HealthCheckResponse
        status = response.SERVING if self.fleet.num_connected or self._on_demand else response.NOT_SERVING
        for service in ("", INFERENCE_SERVICE, CLUSTER_SERVICE):
            await self._health.set(service, status)

    def _watch(self) -> None:
        admission, dispatcher, fleet = self._admission, self._dispatcher, self.fleet
        limits = self._config.limits
        self.metrics.limit(max_queued_requests=limits.max_queued_requests, max_queued_tokens=limits.max_queued_tokens)
        self.metrics.watch_queue(
            live=lambda: admission.num_live,
            requests=lambda: dispatcher.num_waiting,
            tokens=lambda: dispatcher.waiting_work.prefill_tokens,
        )
        states: tuple[SessionState, ...] = ("connecting", "warming", "ready", "draining")
        self.metrics.watch_index(lambda: fleet.index.num_blocks)
        self.metrics.watch_workers({state: lambda state=state: fleet.num_in(state) for state in states})  # type: ignore[misc]


def _server_options(config: GrpcSection) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # a second router on the port must fail, not share it silently
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _bind(server: grpc.aio.Server, config: GrpcSection) -> int:
    address = f"{config.host}:{config.port}"
    try:
        if config.tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, server_credentials(_certificates(config.tls)))
    except RuntimeError as error:
        raise SetupError(
            f"the gRPC port {address} cannot be bound; stop what uses it or set grpc.port to a free port"
        ) from error


def _certificates(tls: TLSSection) -> Certificates:
    """Raises SetupError for files that cannot be used."""
    return Certificates(
        tls.cert_file, tls.key_file, tls.client_ca_file, section="router.grpc.tls", ca_key="client_ca_file"
    )
