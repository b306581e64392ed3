"""How much of its rates a tenant has used: requests and tokens a second, as token buckets.

Stands before the queue: what is over a rate is refused at once, with the time when it would not be.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from protos.errors import Overloaded
from router.tenants import Tenant

BURST_S = 1.0  # of its rate that a tenant may use at once
GRAIN_S = 1e-3  # waits shorter than what a retry hint can say are none
NUM_LOOKED_AT = 2  # accounts at each charge, so that full ones go faster than new ones come


class Quotas:
    """What is left in every tenant's buckets. Owned by Admission; touched on the event loop only.

    A tenant whose buckets are full again is forgotten.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: OrderedDict[str, _Account] = OrderedDict()  # the longest not looked at first

    def __len__(self) -> int:
        """Tenants that are remembered."""
        return len(self._accounts)

    def charge(self, tenant: Tenant, num_tokens: int, *, num_requests: int = 1) -> None:
        """Take requests and tokens out of the tenant's buckets; all or nothing.

        Raises Overloaded; after its `retry_after_s` there is enough, unless others take it meanwhile. Whoever wants
        more than a bucket holds needs a full one and leaves a debt: the long run is limited, not the single request.
        """
        now = self._clock()
        self._forget_full(now)
        account = self._accounts.setdefault(tenant.name, _Account())
        wait_s, limit = max(
            (
                account.requests.wait_s(now, num_requests, tenant.requests_per_s),
                f"requests_per_s {tenant.requests_per_s}",
            ),
            (account.tokens.wait_s(now, num_tokens, tenant.tokens_per_s), f"tokens_per_s {tenant.tokens_per_s}"),
        )
        if wait_s > GRAIN_S:
            raise Overloaded(
                f"{_count(num_requests)} with {num_tokens} tokens in all would exceed {limit} of tenant {tenant.name}; "
                f"try again in {wait_s:.3f} s, or ask the operator for more",
                retry_after_s=wait_s,
            )
        account.requests.draw(now, num_requests, tenant.requests_per_s)
        account.tokens.draw(now, num_tokens, tenant.tokens_per_s)

    def refund(self, tenant: Tenant, num_tokens: int, *, num_requests: int = 1) -> None:
        """Put back what was charged and not used; a bucket never holds more than when it is full."""
        now, account = self._clock(), self._accounts.get(tenant.name)
        if account is not None:
            account.requests.draw(now, -num_requests, tenant.requests_per_s)
            account.tokens.draw(now, -num_tokens, tenant.tokens_per_s)

    def _forget_full(self, now: float) -> None:
        for _ in range(min(NUM_LOOKED_AT, len(self._accounts))):
            name, account = self._accounts.popitem(last=False)
            if not account.is_full(now):
                self._accounts[name] = account


@dataclass(slots=True)
class _Bucket:
    """A token bucket as one number. Its limit comes with each call, so that a changed file counts at once."""

    full_at: float = -math.inf  # when it will be full again, on the clock

    def wait_s(self, now: float, amount: float, rate: float | None) -> float:
        """Until `amount` can be drawn: until what is then missing is no more than what a burst leaves."""
        if rate is None or not amount:
            return 0.0
        return max(0.0, self.full_at - now - max(0.0, BURST_S - amount / rate))

    def draw(self, now: float, amount: float, rate: float | None) -> None:
        """Take `amount` out, or put it back if it is negative."""
        if rate is not None:
            self.full_at = max(self.full_at, now) + amount / rate


@dataclass(slots=True)
class _Account:
    """One tenant's buckets. Mutated only by Quotas."""

    requests: _Bucket = field(default_factory=_Bucket)
    tokens: _Bucket = field(default_factory=_Bucket)

    def is_full(self, now: float) -> bool:
        return max(self.requests.full_at, self.tokens.full_at) <= now


def _count(num_requests: int) -> str:
    return f"{num_requests} request{'' if num_requests == 1 else 's'}"
