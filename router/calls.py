"""How every call of the public services begins and ends: who calls; its answer, or one typed error with its trailer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal, NoReturn, TypeVar

import grpc

from protos import errors
from protos.tracing import OpenSpan, Tracer, current
from router.identity import credentials
from router.metrics import RouterMetrics
from router.tenants import Tenant, Tenants

_Inference = Literal["Generate", "Score", "Tokenize", "Detokenize", "ListModels", "Abort"]
_Cluster = Literal["GetTopology", "GetOverview", "ExplainRoute", "Drain", "PinPrefix", "UnpinPrefix", "ListPins"]
Method = _Inference | _Cluster
GENERATING: tuple[Method, ...] = ("Generate", "Score")
SUCCESSES = ("ok", "stop", "length", "abort", "cancelled")
Context = grpc.aio.ServicerContext[Any, Any]
_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class Calls:
    """Asks who calls, ends calls and counts how. Shared by the services of one router."""

    def __init__(self, tenants: Tenants, metrics: RouterMetrics, tracer: Tracer) -> None:
        self._tenants = tenants
        self._metrics = metrics
        self._tracer = tracer

    async def answer(self, method: Method, context: Context, work: Callable[[Tenant], Awaitable[_T]]) -> _T:
        """What the work makes for the caller. Whatever it raises becomes the call's one typed error."""
        if method not in GENERATING:
            return await self._answer(method, context, work)
        with self._tracer.call(method, tuple(context.invocation_metadata() or ())):
            return await self._answer(method, context, work)

    async def _answer(self, method: Method, context: Context, work: Callable[[Tenant], Awaitable[_T]]) -> _T:
        outcome, tenant = "cancelled", None
        try:
            tenant = self._tenants.identify(*credentials(context))
            result = await work(tenant)
            outcome = result if isinstance(result, str) else "ok"
        except errors.HeadwaterError as error:
            outcome = type(error).__name__
            await _fail(context, error)
        except Exception as error:
            logger.exception("%s failed", method)
            outcome, kind = errors.EngineFailure.__name__, type(error).__name__
            message = f"the router failed on this request ({kind}); its log has the details"
            await _fail(context, errors.EngineFailure(message))
        finally:
            self._metrics.requests.labels(method, outcome).inc()
            if tenant is not None and method in GENERATING:
                self._metrics.tenant_requests.labels(tenant.name, outcome).inc()
            _note(current(), outcome)
        return result


def _note(span: OpenSpan, outcome: str) -> None:
    span.note({"headwater.outcome": outcome})
    if outcome not in SUCCESSES:
        span.fail(outcome)


async def _fail(context: Context, error: errors.HeadwaterError) -> NoReturn:
    before = tuple(context.trailing_metadata() or ())
    await context.abort(error.status, error.message, (*before, *errors.trailers(error)))
