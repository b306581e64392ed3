"""A drafter's process: the drafters, the server that targets connect to, and a metrics endpoint."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, disable_created_metrics

from protos.tls import PeerTLS
from protos.tracing import Tracer, Tracing
from workers.config import DrafterConfig
from workers.metrics import MetricsServer
from workers.speculative.factory import make_draft_server
from workers.speculative.pool.metrics import DrafterCollector
from workers.speculative.pool.server import DraftServer


@dataclass(frozen=True, slots=True)
class DrafterAddress:
    """Where a drafter's two servers listen, as host:port."""

    channel: str
    metrics: str


class DrafterProcess:
    """Everything of one drafter but Ray."""

    def __init__(
        self,
        config: DrafterConfig,
        *,
        target: Path,
        token: str,
        tls: PeerTLS | None = None,
        tracing: Tracing | None = None,
        drafter_id: str = "0",
        local_rank: int = 0,
    ) -> None:
        """`target`: the directory of the model that is drafted for; `tls`: of its channels, None: plain text."""
        self._config = config
        self._target = target
        self._token = token
        self._tls = tls
        self._tracing = tracing
        self._drafter_id = drafter_id
        self._local_rank = local_rank
        self._server: DraftServer | None = None  # until started
        self._exits = ExitStack()

    def start(self) -> DrafterAddress:
        """Load the models and listen. Raises SetupError, and then nothing is left behind. Takes seconds."""
        config = self._config
        with ExitStack() as exits:
            tracer = Tracer(self._tracing, role="drafter", instance=self._drafter_id)
            exits.callback(tracer.close)
            server = make_draft_server(config, target=self._target, token=self._token, tls=self._tls, tracer=tracer)
            disable_created_metrics()  # type: ignore[no-untyped-call]
            registry = CollectorRegistry()
            registry.register(DrafterCollector(self._target.name, self._drafter_id, lambda: server.stats))
            port = config.metrics.port + self._local_rank if config.metrics.port else 0
            scrape = MetricsServer(registry, host=config.metrics.host, port=port, section="drafter.metrics")
            exits.callback(scrape.stop)
            channel = server.start(config.host)
            exits.callback(server.stop)
            self._server = server
            self._exits = exits.pop_all()
        return DrafterAddress(channel, scrape.address)

    def check(self) -> None:
        """Raises EngineFailure if drafting has failed or hangs."""
        if self._server is not None:
            self._server.check()

    def stop(self) -> None:
        """Idempotent."""
        self._exits.close()
