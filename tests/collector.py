"""An OTLP collector that keeps what it is sent: a real gRPC server, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as rpc


@dataclass(frozen=True)
class Span:
    """One that has come."""

    service: str
    name: str
    trace: str
    span: str
    parent: str  # empty: none
    begin_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: tuple[str, ...]
    is_error: bool


class Collector(rpc.TraceServiceServicer):  # type: ignore[misc]  # untyped
    """Listens on 127.0.0.1 within a `with` block."""

    def __init__(self, port: int = 0) -> None:
        """0: any free port."""
        self._spans: list[Span] = []
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(2))
        rpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0.5).wait()

    @property
    def spans(self) -> list[Span]:
        """In the order in which they ended."""
        with self._lock:
            return sorted(self._spans, key=lambda span: span.end_ns)

    def wait(self, is_enough: Callable[[list[Span]], bool], timeout_s: float = 30.0) -> list[Span]:
        """The spans, once there are enough of them."""
        deadline = time.monotonic() + timeout_s
        while not is_enough(found := self.spans):
            assert time.monotonic() < deadline, f"these spans have come: {[(s.service, s.name) for s in found]}"
            time.sleep(0.05)
        return found

    def Export(self, request: pb.ExportTraceServiceRequest, context: object) -> pb.ExportTraceServiceResponse:  # noqa: N802
        """Of the protocol."""
        found = [
            _span(_attributes(resource.resource)["service.name"], span)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._lock:
            self._spans += found
        return pb.ExportTraceServiceResponse()


def _span(service: str, span: Any) -> Span:
    return Span(
        service,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _attributes(span),
        tuple(event.name for event in span.events),
        span.status.code == 2,
    )


def _attributes(holder: Any) -> dict[str, Any]:
    return {entry.key: getattr(entry.value, entry.value.WhichOneof("value")) for entry in holder.attributes}
