"""The client's calls to operate a cluster: which routers are asked, and how their answers become one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from protos import errors
from protos.client import Client, PinnedPrefix, RetryPolicy
from protos.v1 import cluster_pb2 as pb
from protos.v1 import cluster_pb2_grpc as pb_grpc
from protos.v1 import inference_pb2 as inference_pb
from protos.v1 import inference_pb2_grpc
from tests.protos.client.story import Story, lost, routers

ONCE = RetryPolicy(max_attempts=1)


class Router(pb_grpc.ClusterServicer):
    """One router: its pins, by id, with the workers that have each."""

    def __init__(self, name: str, pins: dict[str, int], error: errors.HeadwaterError | None = None) -> None:
        self.name = name
        self.pins = pins
        self.error = error
        self.asked: list[Any] = []

    async def GetTopology(self, request: Any, context: Any) -> pb.GetTopologyResponse:  # noqa: N802
        return pb.GetTopologyResponse(router_id=self.name, workers=[pb.Worker(worker_id="w0", state=9)])  # type: ignore[arg-type]

    async def GetOverview(self, request: Any, context: Any) -> pb.GetOverviewResponse:  # noqa: N802
        return pb.GetOverviewResponse(router_id=self.name, workers=[pb.WorkerOverview(worker_id="w0", state=9)])  # type: ignore[arg-type]

    async def ExplainRoute(self, request: Any, context: Any) -> pb.ExplainRouteResponse:  # noqa: N802
        self.asked.append(request)
        return pb.ExplainRouteResponse(reason="cold")

    async def Drain(self, request: Any, context: Any) -> pb.DrainResponse:  # noqa: N802
        self.asked.append(request)
        if self.error is not None:
            await context.abort(self.error.status, self.error.message, errors.trailers(self.error))
        return pb.DrainResponse(num_live=len(self.pins))

    async def PinPrefix(self, request: Any, context: Any) -> pb.PinPrefixResponse:  # noqa: N802
        self.asked.append(request)
        return pb.PinPrefixResponse(pin=pb.PinnedPrefix(pin_id="a", num_tokens=4, num_workers=self.pins["a"]))

    async def UnpinPrefix(self, request: pb.UnpinPrefixRequest, context: Any) -> pb.UnpinPrefixResponse:  # noqa: N802
        return pb.UnpinPrefixResponse(found=self.pins.pop(request.pin_id, None) is not None)

    async def ListPins(self, request: Any, context: Any) -> pb.ListPinsResponse:  # noqa: N802
        pins = [pb.PinnedPrefix(pin_id=pin_id, num_tokens=4, num_workers=count) for pin_id, count in self.pins.items()]
        return pb.ListPinsResponse(pins=pins)


Serve = Callable[..., Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts routers; gives a client of all of them."""
    servers: list[Any] = []

    async def start(*all_routers: Router) -> Client:
        addresses = []
        for router in all_routers:
            server = grpc.aio.server()
            pb_grpc.add_ClusterServicer_to_server(router, server)
            addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
            await server.start()
            servers.append(server)
        client = Client(addresses, retry=ONCE)
        clients.append(client)
        return client

    clients: list[Client] = []
    yield start
    for client in clients:
        await client.close()
    for server in servers:
        await server.stop(None)


async def test_every_router_shows_its_topology_in_order(serve: Serve) -> None:
    client = await serve(Router("r0", {}), Router("r1", {}))
    views = await client.topology()
    assert [view.router_id for view in views] == ["r0", "r1"]
    assert views[0].workers[0].state == "unknown"  # one that this version does not know


async def test_every_router_tells_its_overview_in_order(serve: Serve) -> None:
    client = await serve(Router("r0", {}), Router("r1", {}))
    views = await client.overview()
    assert [view.router_ids for view in views] == [("r0",), ("r1",)]
    assert views[0].workers[0].state == "unknown"


async def test_pins_of_several_routers_are_one_list(serve: Serve) -> None:
    client = await serve(Router("r0", {"a": 3, "b": 2}), Router("r1", {"b": 1, "c": 0}))
    assert await client.pins() == (PinnedPrefix("a", 4, 3), PinnedPrefix("b", 4, 1), PinnedPrefix("c", 4, 0))
    assert await client.unpin_prefix("c")
    assert not await client.unpin_prefix("c")
    assert [pin.pin_id for pin in await client.pins()] == ["a", "b"]


async def test_a_pin_goes_to_every_router_and_counts_as_the_least(serve: Serve) -> None:
    both = Router("r0", {"a": 3}), Router("r1", {"a": 2})
    client = await serve(*both)
    assert await client.pin_prefix([1, 2, 3, 4], model="m") == PinnedPrefix("a", 4, 2)
    for router in both:
        [request] = router.asked
        assert (list(request.tokens.ids), request.model) == ([1, 2, 3, 4], "m")


async def test_drain_asks_every_router_before_it_fails(serve: Serve) -> None:
    first, second = Router("r0", {}, errors.InvalidParameter("no such worker")), Router("r1", {"a": 1, "b": 1})
    client = await serve(first, second)
    with pytest.raises(errors.InvalidParameter, match="no such worker"):
        await client.drain("w0")
    assert len(second.asked) == 1
    first.error = None
    assert await client.drain("w0", resume=True) == 2
    assert [request.resume for request in second.asked] == [False, True]


async def test_one_router_explains(serve: Serve) -> None:
    both = Router("r0", {}), Router("r1", {})
    client = await serve(*both)
    assert (await client.explain_route("p", max_tokens=0)).reason == "cold"
    [request] = both[0].asked + both[1].asked
    assert (request.text, request.HasField("max_tokens"), request.max_tokens) == (b"p", True, 0)
    with pytest.raises(errors.InvalidParameter, match="max_tokens"):
        await client.explain_route("p", max_tokens=-1)
    with pytest.raises(errors.EmptyPrompt):
        await client.pin_prefix()


class Telling(inference_pb2_grpc.InferenceServicer):
    """Tells the route in the trailer."""

    async def Generate(self, request: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        finish = inference_pb.Finish(reason=inference_pb.FINISH_REASON_STOP)
        message = inference_pb.GenerateResponse(
            prompt=inference_pb.PromptInfo(seed=1),
            outputs=[inference_pb.OutputDelta(token_ids=[1], finish=finish)],
            usage=inference_pb.Usage(completion_tokens=1),
        )
        await context.write(message)
        context.set_trailing_metadata((("headwater-route", "cold w0 cost=5 cached=0"), ("other", "x")))


async def test_a_completion_knows_its_route() -> None:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Telling(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with Client(f"127.0.0.1:{port}", retry=ONCE) as client:
        assert (await client.complete("p")).route == "cold w0 cost=5 cached=0"
    await server.stop(None)


async def test_a_router_that_tells_no_route_is_no_error() -> None:
    story = Story(plan=[(1, lost(errors.WorkerLost("gone")))])
    async with routers(story) as [router], Client(router.address) as client:
        assert (await client.complete("p")).route == ""
