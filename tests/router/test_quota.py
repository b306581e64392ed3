"""Rates: what a tenant may use at once, in the long run, and when it may come again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import Overloaded
from router.quota import BURST_S, GRAIN_S, Quotas
from router.tenants import Tenant

rates = st.floats(0.01, 1e5)
amounts = st.integers(1, 10_000)
pauses = st.floats(0, 3)


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusal(quotas: Quotas, tenant: Tenant, num_tokens: int = 1, num_requests: int = 1) -> Overloaded | None:
    """The error of a charge, or None if it went through."""
    try:
        quotas.charge(tenant, num_tokens, num_requests=num_requests)
    except Overloaded as error:
        return error
    return None


def wait_s(quotas: Quotas, tenant: Tenant, num_tokens: int = 1, num_requests: int = 1) -> float:
    """When a charge that is refused now would not be."""
    error = refusal(quotas, tenant, num_tokens, num_requests)
    assert error is not None
    assert error.retry_after_s is not None
    return error.retry_after_s


def test_no_limits_means_none() -> None:
    quotas, tenant = Quotas(Clock()), Tenant("a")
    assert all(refusal(quotas, tenant, 10**9) is None for _ in range(1000))


def test_a_burst_is_one_second_of_requests() -> None:
    clock = Clock()
    quotas, tenant = Quotas(clock), Tenant("a", requests_per_s=4)
    assert [refusal(quotas, tenant) for _ in range(4)] == [None] * 4
    assert wait_s(quotas, tenant) == pytest.approx(0.25)
    clock.now += 0.25
    assert refusal(quotas, tenant) is None
    assert wait_s(quotas, tenant) == pytest.approx(0.25)


def test_less_than_one_request_a_second_is_one_at_a_time() -> None:
    clock = Clock()
    quotas, tenant = Quotas(clock), Tenant("a", requests_per_s=0.1)
    assert refusal(quotas, tenant) is None
    assert wait_s(quotas, tenant) == pytest.approx(10)
    clock.now += 10
    assert refusal(quotas, tenant) is None


def test_a_request_larger_than_the_burst_needs_a_full_bucket_and_is_paid_off() -> None:
    clock = Clock()
    quotas, tenant = Quotas(clock), Tenant("a", tokens_per_s=100)
    assert refusal(quotas, tenant, 1) is None
    assert wait_s(quotas, tenant, 500) == pytest.approx(0.01)
    clock.now += 0.01
    assert refusal(quotas, tenant, 500) is None
    assert wait_s(quotas, tenant, 1) == pytest.approx(4.01)


def test_both_rates_count_and_a_refused_charge_takes_nothing() -> None:
    quotas, tenant = Quotas(Clock()), Tenant("a", requests_per_s=2, tokens_per_s=100)
    assert refusal(quotas, tenant, 100) is None
    error = refusal(quotas, tenant, 50)
    assert error is not None
    assert "1 request with 50 tokens in all would exceed tokens_per_s 100 of tenant a" in error.message
    assert error.retry_after_s == pytest.approx(0.5)
    quotas.refund(tenant, 100, num_requests=0)
    assert refusal(quotas, tenant, 50) is None  # the refused one had taken no request
    error = refusal(quotas, tenant, 50)
    assert error is not None
    assert "requests_per_s 2" in error.message


def test_tenants_do_not_share_buckets() -> None:
    quotas = Quotas(Clock())
    assert refusal(quotas, Tenant("a", requests_per_s=1)) is None
    assert refusal(quotas, Tenant("b", requests_per_s=1)) is None
    assert refusal(quotas, Tenant("a", requests_per_s=1)) is not None


def test_a_changed_limit_counts_at_once() -> None:
    quotas = Quotas(Clock())
    assert refusal(quotas, Tenant("a", tokens_per_s=10), 10) is None
    assert wait_s(quotas, Tenant("a", tokens_per_s=10), 5) == pytest.approx(0.5)
    assert refusal(quotas, Tenant("a"), 10**6) is None


@given(rate=rates, charges=st.lists(st.tuples(pauses, amounts), max_size=40))
def test_the_hint_is_exact(rate: float, charges: list[tuple[float, int]]) -> None:
    clock = Clock()
    quotas, tenant = Quotas(clock), Tenant("a", tokens_per_s=rate)
    for pause, amount in charges:
        clock.now += pause
        error = refusal(quotas, tenant, amount)
        if error is None:
            continue
        assert error.retry_after_s is not None
        came = clock.now
        clock.now = came + error.retry_after_s - 2 * GRAIN_S
        if clock.now > came:
            assert refusal(quotas, tenant, amount) is not None
        clock.now = came + error.retry_after_s
        assert refusal(quotas, tenant, amount) is None


@given(rate=rates, charges=st.lists(st.tuples(pauses, amounts), min_size=1, max_size=60))
def test_in_any_time_no_more_goes_through_than_the_rate_and_one_burst(
    rate: float, charges: list[tuple[float, int]]
) -> None:
    clock = Clock()
    quotas, tenant = Quotas(clock), Tenant("a", tokens_per_s=rate)
    taken: list[tuple[float, int]] = []
    for pause, amount in charges:
        clock.now += pause
        if refusal(quotas, tenant, amount) is None:
            taken.append((clock.now, amount))
    for first, (begin, _) in enumerate(taken):
        for last in range(first, len(taken)):
            of_span = [amount for _, amount in taken[first : last + 1]]
            span_s = taken[last][0] - begin
            # The last one may be larger than the bucket; what it owes is paid after the span.
            most = rate * (span_s + BURST_S + 2 * GRAIN_S) + max(of_span)
            assert sum(of_span) <= most * (1 + 1e-9)


@given(rate=rates, charges=st.lists(st.tuples(pauses, amounts), max_size=30), amount=amounts)
def test_a_refund_undoes_a_charge(rate: float, charges: list[tuple[float, int]], amount: int) -> None:
    clock = Clock()
    plain, undone, tenant = Quotas(clock), Quotas(clock), Tenant("a", tokens_per_s=rate, requests_per_s=rate)
    for pause, charge in charges:
        clock.now += pause
        if refusal(undone, tenant, amount) is None:
            undone.refund(tenant, amount)
        errors = refusal(plain, tenant, charge), refusal(undone, tenant, charge)
        waits = [None if error is None else pytest.approx(error.retry_after_s, abs=1e-6) for error in errors]
        assert waits[0] == (errors[1] and errors[1].retry_after_s)


def test_a_refund_never_makes_a_bucket_more_than_full() -> None:
    quotas, tenant = Quotas(Clock()), Tenant("a", requests_per_s=2)
    assert refusal(quotas, tenant) is None
    for _ in range(5):
        quotas.refund(tenant, 0)
    assert [refusal(quotas, tenant) is None for _ in range(3)] == [True, True, False]


def test_tenants_that_are_gone_are_forgotten() -> None:
    clock = Clock()
    quotas = Quotas(clock)
    for number in range(1000):
        clock.now += 0.1
        quotas.charge(Tenant(f"t{number}", requests_per_s=1), 1)
        assert len(quotas) <= 2 * 10 + 2  # ten have had less than a second
    debtor = Tenant("debtor", tokens_per_s=1)
    quotas.charge(debtor, 50)
    for _ in range(40):
        clock.now += 1
        quotas.charge(Tenant("other", requests_per_s=1), 1)
    assert wait_s(quotas, debtor) == pytest.approx(10)
