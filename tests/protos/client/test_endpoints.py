"""Which router is used next, and how one that failed rests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from protos import errors
from protos.client import Client, ClientTLS
from protos.client.endpoints import FIRST_REST_S, MAX_REST_S, Endpoint, Endpoints


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


Make = Callable[[int], tuple[Endpoints, list[Endpoint]]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def make(clock: Clock) -> AsyncIterator[Make]:
    made: list[Endpoints] = []

    def start(count: int) -> tuple[Endpoints, list[Endpoint]]:
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port + 1}") for port in range(count)]
        own = [Endpoint(str(number), channel, clock=clock) for number, channel in enumerate(channels)]
        made.append(Endpoints(own))
        return made[-1], own

    yield start
    for endpoints in made:
        await endpoints.close()


def addresses(endpoints: Endpoints, count: int) -> list[str]:
    return [endpoints.choose().address for _ in range(count)]


async def test_ready_routers_are_used_in_turn(make: Make) -> None:
    endpoints, _ = make(3)
    assert addresses(endpoints, 7) == ["0", "1", "2", "0", "1", "2", "0"]


async def test_one_that_failed_rests_and_is_then_tried_by_one_call(make: Make, clock: Clock) -> None:
    endpoints, own = make(2)
    own[0].rest()
    assert addresses(endpoints, 3) == ["1", "1", "1"]
    clock.now += FIRST_REST_S
    assert sorted(addresses(endpoints, 4)) == ["0", "1", "1", "1"]
    own[0].wake()
    assert sorted(addresses(endpoints, 4)) == ["0", "0", "1", "1"]


async def test_rests_grow_to_a_limit_and_begin_anew_after_an_answer(make: Make, clock: Clock) -> None:
    (own,) = make(1)[1]
    for count in range(12):
        limit_s = min(FIRST_REST_S * 2**count, MAX_REST_S)
        own.rest()
        assert limit_s / 2 <= own.rests_until - clock.now <= limit_s
        clock.now = own.rests_until
    own.wake()
    own.rest()
    assert own.rests_until - clock.now <= FIRST_REST_S


async def test_failures_at_one_time_are_one_failure(make: Make, clock: Clock) -> None:
    (own,) = make(1)[1]
    for _ in range(100):
        own.rest()
    assert own.rests_until - clock.now <= FIRST_REST_S


async def test_when_all_rest_the_first_to_end_is_used(make: Make, clock: Clock) -> None:
    endpoints, own = make(3)
    own[2].rest()
    clock.now += FIRST_REST_S / 4
    own[0].rest()
    own[1].rest()
    assert not endpoints.has_ready(but=[])
    assert endpoints.choose() is min(own, key=lambda one: one.rests_until)
    assert endpoints.choose(but=[own[0], own[2]]) is own[1]


async def test_targets() -> None:
    for target in ("a:1,b:2", " a:1 , b:2,", ["a:1", "b:2"], ("a:1", "b:2", "a:1")):
        endpoints = Endpoints.connect(target, None)
        assert [endpoint.address for endpoint in endpoints] == ["a:1", "b:2"]
        await endpoints.close()
    for nothing in ("", " ,", []):
        with pytest.raises(errors.InvalidParameter, match="names no router"):
            Client(nothing)


async def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pem"):
        Client("a:1", tls=ClientTLS(ca_file=tmp_path / "none.pem"))
