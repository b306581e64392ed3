"""The router's metrics, in one private registry, and the HTTP endpoint that serves them.

The router owns the latencies a client feels: it sees every frame of every worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import prometheus_client as prometheus
from prometheus_client.samples import Sample

from protos.errors import SetupError

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
ITL_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
PACK_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
REQUEST_BUCKETS = (*(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),)

PREDICTION_ERROR_BUCKETS = (0, 16, 64, 256, 1024, 4096, 16384, 65536)

# Labels that are exported from the start: of a series that begins at 1, Prometheus would never see the first increase.
OUTCOMES = ("stop", "length", "EngineFailure", "WorkerLost", "NoWorker", "Overloaded")
LOSS_REASONS = ("silent", "closed", "connection", "protocol")


@dataclass(frozen=True, slots=True)
class WorkerSeries:
    """What the streams of one worker observe."""

    time_to_first_token: prometheus.Histogram
    inter_token_latency: prometheus.Histogram
    e2e_latency: prometheus.Histogram
    prompt_tokens: prometheus.Counter
    generation_tokens: prometheus.Counter


@dataclass(frozen=True, slots=True)
class RouterCounts:
    """What a router has counted since it started, for the overview."""

    first_tokens: Mapping[str, Sequence[int]]  # in the buckets of the time to first token, by worker
    next_tokens: Mapping[str, Sequence[int]]  # of the inter-token latency
    outcomes: Mapping[str, int]  # calls that ended, by how


@dataclass(frozen=True, slots=True)
class PackSeries:
    """How well prompts are packed."""

    requests: prometheus.Histogram
    tokens: prometheus.Counter
    budget_tokens: prometheus.Counter


class RouterMetrics:
    """Every series of one router. prometheus_client makes updates from any thread safe."""

    def __init__(self) -> None:
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = prometheus.CollectorRegistry()
        self._ttft = prometheus.Histogram(
            "headwater_time_to_first_token_seconds",
            "From a request's arrival to its first token, by the worker that ran it.",
            ["worker"],
            registry=registry,
            buckets=TTFT_BUCKETS,
        )
        self._itl = prometheus.Histogram(
            "headwater_inter_token_latency_seconds",
            "Between two deltas of one output, divided by the tokens of the later one.",
            ["worker"],
            registry=registry,
            buckets=ITL_BUCKETS,
        )
        self._e2e = prometheus.Histogram(
            "headwater_e2e_request_latency_seconds",
            "From a request's arrival to the end of its last output.",
            ["worker"],
            registry=registry,
            buckets=REQUEST_BUCKETS,
        )
        self.queue_time = prometheus.Histogram(
            "headwater_request_queue_time_seconds",
            "From a request's arrival to its placement on a worker.",
            registry=registry,
            buckets=TTFT_BUCKETS,
        )
        self.requests = prometheus.Counter(
            "headwater_requests",
            "Calls that ended: stop, length, abort, ok, cancelled, or the name of the error.",
            ["method", "outcome"],
            registry=registry,
        )
        self.tenant_requests = prometheus.Counter(
            "headwater_tenant_requests",
            "Generate and Score calls that ended, by who called.",
            ["tenant", "outcome"],
            registry=registry,
        )
        self.tenant_tokens = prometheus.Counter(
            "headwater_tenant_tokens",
            "Tokens of ended requests by who called: prompt, cached (of those) and generation.",
            ["tenant", "kind"],
            registry=registry,
        )
        self.worker_losses = prometheus.Counter(
            "headwater_worker_losses",
            "Sessions lost: silent, closed, connection or protocol.",
            ["reason"],
            registry=registry,
        )
        self.route_decisions = prometheus.Counter(
            "headwater_route_decisions",
            "Placements by why the worker was chosen: only, affinity, spread, cold, balanced, turn, random or hash.",
            ["reason"],
            registry=registry,
        )
        self.predicted_cached_tokens = prometheus.Counter(
            "headwater_route_predicted_cached_tokens",
            "Prompt tokens that the router expected in the cache of the worker it chose, of placements with a reply.",
            registry=registry,
        )
        self.cached_tokens = prometheus.Counter(
            "headwater_route_cached_tokens", "Prompt tokens that those workers then found there.", registry=registry
        )
        self.prediction_error = prometheus.Histogram(
            "headwater_route_prediction_error_tokens",
            "Between the two, of each placement, without its sign.",
            registry=registry,
            buckets=PREDICTION_ERROR_BUCKETS,
        )
        self.index_resyncs = prometheus.Counter(
            "headwater_index_resyncs",
            "Snapshots asked of workers: gap (events were lost) or error (predictions failed).",
            ["reason"],
            registry=registry,
        )
        self._index_blocks = prometheus.Gauge(
            "headwater_index_blocks", "Blocks in workers' caches that the router knows of.", registry=registry
        )
        self._prompt_tokens = prometheus.Counter(
            "headwater_prompt_tokens", "Prompt tokens of requests placed on a worker.", registry=registry
        )
        self._generation_tokens = prometheus.Counter(
            "headwater_generation_tokens", "Tokens that workers generated for clients.", registry=registry
        )
        self._requests_live = prometheus.Gauge(
            "headwater_requests_live",
            "Accepted requests that have not ended, waiting ones included.",
            registry=registry,
        )
        self._queue_requests = prometheus.Gauge(
            "headwater_queue_requests", "Requests that wait for a worker.", registry=registry
        )
        self._queue_tokens = prometheus.Gauge(
            "headwater_queue_tokens", "Prompt tokens that wait for a worker.", registry=registry
        )
        self._workers = prometheus.Gauge(
            "headwater_workers",
            "Workers by state: connecting, warming, ready or draining.",
            ["state"],
            registry=registry,
        )

        self.recoveries = prometheus.Counter(
            "headwater_recoveries",
            "Requests that lost their worker: resumed on another one, or given_up.",
            ["outcome"],
            registry=registry,
        )
        self._wanted = prometheus.Gauge(
            "headwater_processes_wanted",
            "Processes that the configuration asks for, of workers the fewest: router, worker and drafter.",
            ["role"],
            registry=registry,
        )
        self._max_queued_requests = prometheus.Gauge(
            "headwater_queue_max_requests", "Requests that may wait for a worker.", registry=registry
        )
        self._max_queued_tokens = prometheus.Gauge(
            "headwater_queue_max_tokens", "Prompt tokens that may wait for a worker.", registry=registry
        )
        self.packs = PackSeries(
            prometheus.Histogram(
                "headwater_pack_requests",
                "Requests that left together for a worker that was computing prompts.",
                registry=registry,
                buckets=PACK_BUCKETS,
            ),
            prometheus.Counter(
                "headwater_pack_tokens", "Prompt tokens in those packs, up to the budget of each.", registry=registry
            ),
            prometheus.Counter(
                "headwater_pack_budget_tokens", "Budgets of those packs: a step of the worker each.", registry=registry
            ),
        )
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        for outcome in OUTCOMES:
            self.requests.labels("Generate", outcome)
        for reason in LOSS_REASONS:
            self.worker_losses.labels(reason)
        for outcome in ("resumed", "given_up"):
            self.recoveries.labels(outcome)
        for reason in ("gap", "error"):
            self.index_resyncs.labels(reason)

    def worker(self, worker_id: str) -> WorkerSeries:
        """The series of one worker; they exist until `forget`."""
        return WorkerSeries(
            self._ttft.labels(worker_id),
            self._itl.labels(worker_id),
            self._e2e.labels(worker_id),
            self._prompt_tokens,
            self._generation_tokens,
        )

    def counts(self, methods: Collection[str]) -> RouterCounts:
        """What the overview needs; the outcomes are those of these methods. Takes a while with many workers."""
        outcomes = dict[str, int]()
        for sample in _samples(self.requests, "_total"):
            if sample.labels["method"] in methods:
                outcomes[sample.labels["outcome"]] = outcomes.get(sample.labels["outcome"], 0) + int(sample.value)
        return RouterCounts(_bucket_counts(self._ttft), _bucket_counts(self._itl), outcomes)

    def forget(self, worker_id: str) -> None:
        """Remove the series of a worker that left."""
        for histogram in (self._ttft, self._itl, self._e2e):
            histogram.remove(worker_id)

    def watch_queue(
        self, *, live: Callable[[], float], requests: Callable[[], float], tokens: Callable[[], float]
    ) -> None:
        """Read the queue's gauges from these at each scrape."""
        self._requests_live.set_function(live)
        self._queue_requests.set_function(requests)
        self._queue_tokens.set_function(tokens)

    def limit(self, *, max_queued_requests: int, max_queued_tokens: int) -> None:
        """What may wait, beside what does."""
        self._max_queued_requests.set(max_queued_requests)
        self._max_queued_tokens.set(max_queued_tokens)

    def want(self, processes: Mapping[str, int]) -> None:
        """How many there should be of each role, beside how many there are."""
        for role, count in processes.items():
            self._wanted.labels(role).set(count)

    def watch_index(self, num_blocks: Callable[[], float]) -> None:
        """Read the index's gauge from this at each scrape."""
        self._index_blocks.set_function(num_blocks)

    def observe_prediction(self, *, predicted_tokens: int, cached_tokens: int) -> None:
        """A reply told what was cached of a prompt."""
        self.predicted_cached_tokens.inc(predicted_tokens)
        self.cached_tokens.inc(cached_tokens)
        self.prediction_error.observe(abs(predicted_tokens - cached_tokens))

    def watch_workers(self, states: Mapping[str, Callable[[], float]]) -> None:
        """Read the number of workers in each state from these at each scrape."""
        for state, count in states.items():
            self._workers.labels(state).set_function(count)


def _samples(metric: prometheus.Counter | prometheus.Histogram, suffix: str) -> list[Sample]:
    return [sample for family in metric.collect() for sample in family.samples if sample.name.endswith(suffix)]


def _bucket_counts(histogram: prometheus.Histogram) -> dict[str, tuple[int, ...]]:
    """Of each worker, not cumulative."""
    cumulative = dict[str, list[float]]()
    for sample in _samples(histogram, "_bucket"):
        cumulative.setdefault(sample.labels["worker"], [0.0]).append(sample.value)
    return {worker: tuple(int(b - a) for a, b in pairwise(values)) for worker, values in cumulative.items()}


class MetricsServer:
    """Serves the metrics, and what else there is, over HTTP from a thread of its own. Owned by RouterServer."""

    def __init__(self, registry: prometheus.CollectorRegistry, *, host: str, port: int, site: WSGIApplication) -> None:
        """`site`: what answers. Raises SetupError if the port cannot be bound."""
        try:
            self._server, self._thread = prometheus.start_http_server(port, host, registry)
        except OSError as error:
            raise SetupError(
                f"the metrics port {host}:{port} cannot be bound ({error.strerror or error}); "
                "stop what uses it or set metrics.port to a free port"
            ) from error
        self._server.set_app(site)
        self.port = int(self._server.server_port)

    async def close(self) -> None:
        """Stop serving and join the thread."""
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()
        await asyncio.to_thread(self._thread.join)
