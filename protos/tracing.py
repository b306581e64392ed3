"""One trace for each request, across router, worker and drafter: W3C trace context in, OTLP over gRPC out.

Off unless it is configured. A request carries its trace as a `traceparent` (W3C Trace Context, level 1), or as an empty
string when it is not to be traced; what is empty costs one comparison. A span is made when its work has ended, from the
times that are kept for metrics anyway, so that nothing of it is on the path of a token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc

from protos.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan

Attributes = Mapping[str, str | bool | int | float]

UNTRACED: Final = ""
TRACEPARENT: Final = "traceparent"
TRACESTATE: Final = "tracestate"
NANOSECONDS: Final = 1_000_000_000
MAX_QUEUED_SPANS: Final = 4096  # beyond, while the collector is slow or gone, spans are dropped
EXPORT_TIMEOUT_S: Final = 5.0
CLOSE_S: Final = 1.0  # for what is left at the end
FLUSH_S: Final = 1.0  # between two messages to the collector


@dataclass(frozen=True, slots=True)
class Tracing:
    """Where spans go, and of how many requests."""

    endpoint: str  # of an OTLP collector: host:port
    sample_ratio: float = 1.0  # of requests that come without a trace; others are traced if theirs is sampled
    is_tls: bool = False
    ca_file: Path | None = None  # None: the system's authorities


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at one time of a span."""

    name: str
    at: float  # as of time.monotonic


class Tracer:
    """Makes the spans of one process and sends them in the background. Owns the connection to the collector.

    Bounded, and never in the way: what a slow collector leaves is dropped. Safe from any thread.
    """

    def __init__(self, tracing: Tracing | None, *, role: str, instance: str) -> None:
        """None: no request is traced. Raises ConfigError for an authority's file that cannot be read."""
        self._provider = None if tracing is None else _provider(tracing, role, instance)
        self._tracer = None if self._provider is None else self._provider.get_tracer("headwater")

    @contextmanager
    def call(self, name: str, metadata: Sequence[tuple[str, str | bytes]]) -> Iterator[OpenSpan]:
        """A span around a call that has come with this metadata: of the caller's trace, or the first of a new one."""
        if self._tracer is None:
            yield UNTRACED_SPAN
            return
        from opentelemetry.trace import SpanKind

        carrier = {key: value for key, value in metadata if key in (TRACEPARENT, TRACESTATE) and isinstance(value, str)}
        span = self._tracer.start_span(name, context=_extracted(carrier), kind=SpanKind.SERVER)
        around = _CURRENT.set(OpenSpan(span))
        try:
            yield _CURRENT.get()
        finally:
            _CURRENT.reset(around)
            span.end()

    def record(
        self,
        name: str,
        parent: str,
        *,
        begin: float,
        end: float,
        attributes: Attributes | None = None,
        events: Sequence[Event] = (),
        failure: str = "",
    ) -> str:
        """A span that has ended, times as of time.monotonic; its own traceparent, for its children.

        `failure`: why the work failed; empty: it did not.
        """
        if self._tracer is None or not parent:
            return UNTRACED
        span = self._tracer.start_span(
            name,
            context=_extracted({TRACEPARENT: parent}),
            start_time=_wall_ns(begin),
            attributes=dict(attributes or {}),
        )
        for event in events:
            span.add_event(event.name, timestamp=_wall_ns(event.at))
        if failure:
            OpenSpan(span).fail(failure)
        span.end(end_time=_wall_ns(max(begin, end)))
        return _traceparent(span)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Send what is left, for so long at most. Idempotent."""
        if self._provider is not None:
            self._provider.force_flush(int(timeout_s * 1000))
            self._provider.shutdown()
            self._provider = self._tracer = None


class OpenSpan:
    """A span whose work goes on. None: not traced."""

    __slots__ = ("_span",)

    def __init__(self, span: OtelSpan | None) -> None:
        self._span = span

    @property
    def traceparent(self) -> str:
        """For those who work for it; empty unless it is sampled."""
        return UNTRACED if self._span is None else _traceparent(self._span)

    def note(self, attributes: Attributes) -> None:
        """Add what is known now."""
        if self._span is not None:
            self._span.set_attributes(dict(attributes))

    def happened(self, event: Event) -> None:
        """Add something that has happened."""
        if self._span is not None:
            self._span.add_event(event.name, timestamp=_wall_ns(event.at))

    def fail(self, reason: str) -> None:
        """The work has failed."""
        if self._span is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, reason))


UNTRACED_SPAN: Final = OpenSpan(None)
_CURRENT: Final = ContextVar("headwater_span", default=UNTRACED_SPAN)


def current() -> OpenSpan:
    """The span of the call that this is a part of."""
    return _CURRENT.get()


def _provider(tracing: Tracing, role: str, instance: str) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(tracing.sample_ratio)),
        resource=Resource({"service.name": f"headwater-{role}", "service.instance.id": instance}),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(
        endpoint=tracing.endpoint,
        insecure=not tracing.is_tls,
        credentials=_credentials(tracing) if tracing.is_tls else None,
        timeout=EXPORT_TIMEOUT_S,
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=MAX_QUEUED_SPANS,
            schedule_delay_millis=FLUSH_S * 1000,
            export_timeout_millis=EXPORT_TIMEOUT_S * 1000,
        )
    )
    return provider


def _credentials(tracing: Tracing) -> grpc.ChannelCredentials:
    if tracing.ca_file is None:
        return grpc.ssl_channel_credentials()
    try:
        return grpc.ssl_channel_credentials(tracing.ca_file.read_bytes())
    except OSError as error:
        raise ConfigError(f"`cluster.tracing.ca_file`: {tracing.ca_file} cannot be read ({error.strerror})") from None


def _extracted(carrier: Mapping[str, str]) -> Context:
    """The trace that it names; a new one where it names none, or what is none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(carrier, Context())


def _traceparent(span: OtelSpan) -> str:
    context = span.get_span_context()
    if not context.trace_flags.sampled:
        return UNTRACED
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _wall_ns(at: float) -> int:
    """Of a time of the monotonic clock."""
    return time.time_ns() - time.monotonic_ns() + int(at * NANOSECONDS)
