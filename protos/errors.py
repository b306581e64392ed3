"""The error tree: every failure a user can meet, each leaf with one gRPC status.

    HeadwaterError
    ├── InvalidRequest          INVALID_ARGUMENT
    │   ├── EmptyPrompt
    │   ├── PromptTooLong
    │   ├── TokenOutOfRange
    │   ├── InvalidText
    │   └── InvalidParameter
    ├── UnknownModel            NOT_FOUND
    ├── DuplicateRequest        ALREADY_EXISTS
    ├── DeadlineExceeded        DEADLINE_EXCEEDED
    ├── Overloaded              RESOURCE_EXHAUSTED   retryable
    ├── MessageTooLarge         RESOURCE_EXHAUSTED
    ├── Aborted                 CANCELLED
    ├── WorkerLost              UNAVAILABLE          retryable
    ├── NoWorker                UNAVAILABLE          retryable
    ├── Draining                UNAVAILABLE          retryable
    ├── Unauthenticated         UNAUTHENTICATED
    ├── PermissionDenied        PERMISSION_DENIED
    ├── EngineFailure           INTERNAL
    └── SetupError              (never on the wire: the program ends with it)
        ├── ConfigError
        ├── ModelError
        ├── ManifestError
        └── KubernetesError

A message gives the value, the limit and the remedy.
"""

from __future__ import annotations

from typing import ClassVar

import grpc

from protos.v1 import inference_pb2 as pb

ERROR_TRAILER = "headwater-error-bin"
RETRY_TRAILER = "retry-after-ms"


class HeadwaterError(Exception):
    """Anything that can go wrong with a request or with the program's set-up."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidRequest(HeadwaterError):
    """The request can never succeed as it is."""

    status = grpc.StatusCode.INVALID_ARGUMENT


class EmptyPrompt(InvalidRequest):
    """There is no prompt, or it has no tokens."""


class PromptTooLong(InvalidRequest):
    """Prompt, or prompt and max_tokens together, exceed the model's context."""


class TokenOutOfRange(InvalidRequest):
    """A token id is not in the model's vocabulary."""


class InvalidText(InvalidRequest):
    """Text is not UTF-8."""


class InvalidParameter(InvalidRequest):
    """A parameter is outside its range, or two exclude each other."""


class UnknownModel(HeadwaterError):
    """The cluster does not serve the model asked for."""

    status = grpc.StatusCode.NOT_FOUND


class DuplicateRequest(HeadwaterError):
    """A live request has this id already."""

    status = grpc.StatusCode.ALREADY_EXISTS


class DeadlineExceeded(HeadwaterError):
    """The caller's deadline passed before the request ended."""

    status = grpc.StatusCode.DEADLINE_EXCEEDED


class Overloaded(HeadwaterError):
    """A bounded queue is full."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    retryable = True


class MessageTooLarge(HeadwaterError):
    """A message exceeds the size limit."""

    status = grpc.StatusCode.RESOURCE_EXHAUSTED


class Aborted(HeadwaterError):
    """The request was aborted before it had a stream to end."""

    status = grpc.StatusCode.CANCELLED


class WorkerLost(HeadwaterError):
    """The worker that ran the request died, hung or was cut off."""

    status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class NoWorker(HeadwaterError):
    """No worker is ready."""

    status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class Draining(HeadwaterError):
    """The process is shutting down and takes no new work."""

    status = grpc.StatusCode.UNAVAILABLE
    retryable = True


class Unauthenticated(HeadwaterError):
    """The caller's credentials are missing or wrong."""

    status = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(HeadwaterError):
    """The caller is known, but may not do this."""

    status = grpc.StatusCode.PERMISSION_DENIED


class EngineFailure(HeadwaterError):
    """The engine failed in a way that is not the request's fault."""


class SetupError(HeadwaterError):
    """The program cannot start; the message names the file or key and the remedy."""


class ConfigError(SetupError):
    """A configuration file or override is wrong."""


class ModelError(SetupError):
    """A model directory is missing, truncated or of a kind that is not supported."""


class ManifestError(SetupError):
    """A Kubernetes manifest cannot be read; the message names the file and the document in it."""


class KubernetesError(SetupError):
    """A Kubernetes cluster cannot be reached, or refuses what was asked of it."""


def _leaves(root: type[HeadwaterError]) -> dict[str, type[HeadwaterError]]:
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found.update(_leaves(child))
    return found


def to_detail(error: HeadwaterError) -> pb.ErrorDetail:
    """The error as a wire message."""
    detail = pb.ErrorDetail(kind=type(error).__name__, message=error.message, retryable=error.retryable)
    if error.retry_after_s is not None:
        detail.retry_after_s = error.retry_after_s
    return detail


def from_detail(detail: pb.ErrorDetail) -> HeadwaterError:
    """The typed error a wire message stands for; an unknown kind becomes EngineFailure."""
    kind = _leaves(HeadwaterError).get(detail.kind, EngineFailure)
    return kind(detail.message, retry_after_s=detail.retry_after_s if detail.HasField("retry_after_s") else None)


def trailers(error: HeadwaterError) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata that carries the error to a client."""
    detail: tuple[str, str | bytes] = (ERROR_TRAILER, to_detail(error).SerializeToString())
    if error.retry_after_s is None:
        return (detail,)
    return (detail, (RETRY_TRAILER, str(round(error.retry_after_s * 1000))))


def from_rpc_error(error: grpc.aio.AioRpcError) -> HeadwaterError:
    """The typed error behind a failed call: from its trailer, else from its status."""
    for key, value in error.trailing_metadata() or ():
        if key == ERROR_TRAILER:
            return from_detail(pb.ErrorDetail.FromString(value if isinstance(value, bytes) else value.encode()))
    details = error.details() or error.code().name
    match error.code():
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(details)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            return MessageTooLarge(f"{details}; send a shorter prompt or raise the receiver's max_message_bytes")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(details)
        case grpc.StatusCode.CANCELLED:
            return Aborted(details)
        case grpc.StatusCode.UNAVAILABLE:
            return NoWorker(details)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(details)
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated(details)
        case grpc.StatusCode.PERMISSION_DENIED:
            return PermissionDenied(details)
        case _:
            return EngineFailure(f"{error.code().name}: {details}")
