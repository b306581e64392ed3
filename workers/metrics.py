"""The worker's Prometheus metrics: the conventional `vllm:` names for what an engine does, `headwater_` for the rest.

One private registry per process. Totals that the engine keeps are read when Prometheus scrapes; what must be observed
as it happens (histograms) is observed by the engine loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    make_wsgi_app,
    start_http_server,
)
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from protos.errors import SetupError
from protos.messages import FinishReason, Load
from workers.engine.protocol import Adoption, EngineStats
from workers.families import Families
from workers.histogram import Histogram
from workers.speculative.stats import SpeculationStats

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
STEP_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
STEP_SECONDS_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
PORT_ATTEMPTS = 64

# From the start: of a series that begins at 1, Prometheus would never see the first increase.
FETCH_OUTCOMES = ("mapped", "copied", "unused", "computed", "failed", "late")


class WorkerMetrics:
    """Everything one worker exports. Observed by EngineLoop, and of prefixes by Exchange and Exports."""

    def __init__(self, *, model_name: str, worker_id: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": worker_id}
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_BUCKETS)
        self._itl = self._histogram("vllm:inter_token_latency_seconds", "Between tokens of one request.", TOKEN_BUCKETS)
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token after the first.", TOKEN_BUCKETS
        )
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to finish.", REQUEST_BUCKETS)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Waiting in the engine.", REQUEST_BUCKETS)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Start to first token.", REQUEST_BUCKETS)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First token to finish.", REQUEST_BUCKETS)
        self._inference = self._histogram("vllm:request_inference_time_seconds", "Start to finish.", REQUEST_BUCKETS)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", LENGTH_BUCKETS)
        self._generated = self._histogram("vllm:request_generation_tokens", "Tokens a request made.", LENGTH_BUCKETS)
        self._step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens of one step.", STEP_TOKENS_BUCKETS)
        self._step_seconds = self._histogram("headwater_step_seconds", "Time of one step.", STEP_SECONDS_BUCKETS)
        self._step_sequences = self._histogram(
            "headwater_step_sequences", "Outputs that took part in one step.", STEP_TOKENS_BUCKETS
        )
        self._fetches = Counter(
            "headwater_prefix_fetches",
            "Prefixes that another worker had, by what became of them.",
            [*self._labels, "outcome"],
            registry=self.registry,
        )
        for outcome in FETCH_OUTCOMES:
            self._fetches.labels(**self._labels, outcome=outcome)
        self._fetched_tokens = self._counter("headwater_prefix_fetched_tokens", "Tokens of fetched prefixes.")
        self._fetch_seconds = self._counter("headwater_prefix_fetch_seconds", "Waited for prefixes.")
        arena = Gauge("headwater_arena_bytes", "Of blocks left for others.", list(self._labels), registry=self.registry)
        self._arena_bytes = arena.labels(**self._labels)
        self._exports = self._counter("headwater_prefix_exports", "Prefixes copied out for other workers.")
        self._finished = Counter(
            "vllm:request_success",
            "Outputs that ended, by reason.",
            [*self._labels, "finished_reason"],
            registry=self.registry,
        )

    def watch(self, load: Callable[[], Load], stats: Callable[[], EngineStats]) -> None:
        """Read the engine's state at every scrape."""
        self.registry.register(_EngineCollector(self._labels, load, stats))

    def watch_arena(self, num_bytes: Callable[[], int]) -> None:
        """Read at every scrape how much the worker's folder in the arena holds."""
        self._arena_bytes.set_function(num_bytes)

    def prefix_fetched(self, adoption: Adoption) -> None:
        """A block came; this is what the engine made of it."""
        self._fetches.labels(**self._labels, outcome=adoption.way).inc()
        if adoption.way != "unused":
            self._fetched_tokens.inc(adoption.num_tokens)

    def prefix_computed(self, reason: Literal["computed", "failed", "late"]) -> None:
        """No block came; `computed`: that was the faster way."""
        self._fetches.labels(**self._labels, outcome=reason).inc()

    def prefix_waited(self, seconds: float) -> None:
        self._fetch_seconds.inc(seconds)

    def prefix_exported(self) -> None:
        self._exports.inc()

    def step(self, num_tokens: int, num_sequences: int, seconds: float) -> None:
        if num_tokens:
            self._step_tokens.observe(num_tokens)
            self._step_sequences.observe(num_sequences)
            self._step_seconds.observe(seconds)

    @property
    def steps(self) -> tuple[int, int]:
        """How many steps computed something, and how many outputs took part in them, in all."""
        num_steps, num_outputs = self._step_sequences.total
        return num_steps, round(num_outputs)

    @property
    def first_tokens(self) -> tuple[int, float]:
        """How many requests had a first token, and the seconds from their arrival to it, in all."""
        return self._ttft.total

    def first_token(self, seconds: float) -> None:
        self._ttft.observe(seconds)

    def next_tokens(self, seconds: float, num_tokens: int) -> None:
        """`num_tokens` tokens came, each `seconds` after one before it."""
        self._itl.observe(seconds, num_tokens)

    def output_finished(self, reason: FinishReason) -> None:
        self._finished.labels(**self._labels, finished_reason=reason).inc()

    def request_finished(
        self,
        *,
        num_prompt: int,
        num_generated: int,
        queue_s: float,
        prefill_s: float,
        decode_s: float,
        total_s: float,
    ) -> None:
        self._prompt.observe(num_prompt)
        self._generated.observe(num_generated)
        self._queue.observe(queue_s)
        self._prefill.observe(prefill_s)
        self._decode.observe(decode_s)
        self._inference.observe(prefill_s + decode_s)
        self._e2e.observe(total_s)
        if num_generated > 1:
            self._tpot.observe(decode_s / (num_generated - 1))

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(name, meaning, list(self._labels), registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(name, meaning, self._labels, buckets)
        self.registry.register(histogram)
        return histogram


class _EngineCollector(Collector):
    """Turns the engine's totals and state into metrics at the moment of a scrape."""

    def __init__(self, labels: dict[str, str], load: Callable[[], Load], stats: Callable[[], EngineStats]) -> None:
        self._labels, self._load, self._stats = labels, load, stats
        self._make = Families(labels)

    def collect(self) -> Iterator[Metric]:
        load, stats = self._load(), self._stats()
        held = stats.kv_total_pages - stats.kv_free_pages - stats.kv_cached_pages
        yield self._make.gauge("vllm:num_requests_running", "Outputs that run.", load.num_running)
        yield self._make.gauge("vllm:num_requests_waiting", "Outputs that wait in the engine.", load.num_waiting)
        yield self._make.gauge(
            "vllm:kv_cache_usage_perc", "Share of pages in use, 0 to 1.", held / stats.kv_total_pages
        )
        yield self._make.gauge("headwater_kv_pages_free", "Pages that hold nothing.", stats.kv_free_pages)
        yield self._make.gauge("headwater_kv_pages_cached", "Pages only the prefix cache holds.", stats.kv_cached_pages)
        yield self._make.gauge("headwater_kv_pages_foreign", "Pages of mapped blocks.", stats.kv_foreign_pages)
        yield self._make.gauge("headwater_kv_pages_pinned", "Pages of pinned prefixes.", stats.kv_pinned_pages)
        yield self._make.gauge("headwater_kv_pages_in_use", "Pages that live outputs hold.", held)
        yield self._make.gauge(
            "headwater_pending_prefill_tokens", "Prompt tokens to compute.", load.pending_prefill_tokens
        )
        yield self._make.gauge("headwater_worker_draining", "1 while the worker shuts down.", int(load.draining))
        yield self._make.counter("vllm:prompt_tokens", "Prompt tokens of started requests.", stats.prompt_tokens)
        yield self._make.counter("vllm:generation_tokens", "Tokens made.", stats.generation_tokens)
        yield self._make.counter("vllm:num_preemptions", "Outputs that lost their pages.", stats.num_preemptions)
        yield self._make.counter("vllm:prefix_cache_queries", "Tokens looked up.", stats.prefix_queries_tokens)
        yield self._make.counter("vllm:prefix_cache_hits", "Of those, found.", stats.prefix_hit_tokens)
        yield self._make.counter("vllm:prompt_tokens_cached", "Prompt tokens not computed.", stats.prefix_hit_tokens)
        yield self._make.counter("headwater_steps", "Engine steps.", stats.num_steps)
        yield self._make.counter("headwater_computed_tokens", "Tokens through the model.", stats.computed_tokens)
        yield self._make.counter("headwater_repeated_tokens", "Of those, computed before.", stats.repeated_tokens)
        yield self._make.counter(
            "headwater_step_budget_tokens", "Room of steps that left prompts.", stats.budget_tokens
        )
        yield self._make.counter("headwater_step_budget_used_tokens", "Of that, filled.", stats.budget_used_tokens)
        yield self._make.counter("headwater_attention_segments", "Spans attended to.", stats.attention_segments)
        yield self._make.counter("headwater_attention_keys", "Keys seen, output by output.", stats.attention_keys)
        yield self._make.counter("headwater_attention_read_keys", "Keys read for them.", stats.attention_read_keys)
        if stats.speculation is not None:
            yield from self._speculation(stats.speculation)
        info = InfoMetricFamily("vllm:cache_config", "The store of keys and values.", labels=list(self._labels))
        pages = {"block_size": str(stats.page_size), "num_gpu_blocks": str(stats.kv_total_pages)}
        info.add_metric(list(self._labels.values()), pages)
        yield info

    def _speculation(self, stats: SpeculationStats) -> Iterator[Metric]:
        yield self._make.counter("vllm:spec_decode_num_drafts", "Outputs and steps with a draft.", stats.num_drafts)
        yield self._make.counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", stats.drafted_tokens)
        yield self._make.counter("vllm:spec_decode_num_accepted_tokens", "Of those, right.", stats.accepted_tokens)
        depths = {str(depth): count for depth, count in enumerate(stats.accepted_by_depth)}
        by_depth = "vllm:spec_decode_num_accepted_tokens_per_pos"
        yield self._make.counters(by_depth, "Accepted tokens by depth.", "position", depths)
        yield self._make.counters("headwater_drafted_tokens", "Tokens drafted.", "drafter", stats.drafted_by)
        yield self._make.counters("headwater_accepted_draft_tokens", "Of those, right.", "drafter", stats.accepted_by)
        yield self._make.counters("headwater_speculation_steps", "Steps that could draft.", "drafters", stats.decisions)
        if stats.pool is not None:
            yield self._make.gauge("headwater_pool_drafters", "Drafters connected.", stats.pool.num_drafters)
            yield self._make.counter("headwater_pool_late", "Waits that reached the deadline.", stats.pool.num_late)
            yield self._make.counter("headwater_pool_stale", "Drafts that came too late.", stats.pool.num_stale)
            yield self._make.counter("headwater_pool_nacks", "Outputs a drafter had lost.", stats.pool.num_nacks)
            yield self._make.counter("headwater_pool_wait_seconds", "Waited for drafts.", stats.pool.wait_s)


class MetricsServer:
    """The HTTP endpoint Prometheus scrapes, on a thread of its own."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int, section: str = "worker.metrics") -> None:
        """Bind `port`, or the first free one after it; 0 takes any. Raises SetupError, naming `section`, if none is."""
        candidates = range(port, min(port + PORT_ATTEMPTS, 65536)) if port else (0,)
        for candidate in candidates:
            try:
                self._server, self._thread = start_http_server(candidate, addr=host, registry=registry)
            except OSError:
                continue
            self._server.set_app(_as_text(registry))
            self.address = f"{host}:{self._server.server_port}"
            return
        raise SetupError(f"no free metrics port from {port} on {host}; set {section}.host and {section}.port")

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _as_text(registry: CollectorRegistry) -> WSGIApplication:
    """Serves the text format, whatever is asked for: as OpenMetrics, prometheus_client writes `vllm_` for `vllm:`."""
    serve: WSGIApplication = make_wsgi_app(registry)
    return lambda environ, start: serve({**environ, "HTTP_ACCEPT": "text/plain"}, start)
