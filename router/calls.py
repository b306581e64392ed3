"""How every call of the public services begins and ends: who calls; its answer, or one typed error with its trailer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal, NoReturn, TypeVar

import grpc

from protos import errors
from router.identity import credentials
from router.metrics import RouterMetrics
from router.tenants import Tenant, Tenants

_Inference = Literal["Generate", "Score", "Tokenize", "Detokenize", "ListModels", "Abort"]
_Cluster = Literal["GetTopology", "ExplainRoute", "Drain", "PinPrefix", "UnpinPrefix", "ListPins"]
Method = _Inference | _Cluster
GENERATING: tuple[Method, ...] = ("Generate", "Score")
Context = grpc.aio.ServicerContext[Any, Any]
_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class Calls:
    """Asks who calls, ends calls and counts how. Shared by the services of one router."""

    def __init__(self, tenants: Tenants, metrics: RouterMetrics) -> None:
        self._tenants = tenants
        self._metrics = metrics

    async def answer(self, method: Method, context: Context, work: Callable[[Tenant], Awaitable[_T]]) -> _T:
        """What the work makes for the caller. Whatever it raises becomes the call's one typed error."""
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
        return result


async def _fail(context: Context, error: errors.HeadwaterError) -> NoReturn:
    before = tuple(context.trailing_metadata() or ())
    await context.abort(error.status, error.message, (*before, *errors.trailers(error)))
