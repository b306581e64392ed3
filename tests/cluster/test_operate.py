"""The operators' commands: what they ask, how they show it, and that JSON has all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from protos import errors
from protos.v1 import cluster_pb2 as pb
from protos.v1 import cluster_pb2_grpc as pb_grpc

TOPOLOGY = pb.GetTopologyResponse(
    router_id="r0",
    model="tiny",
    policy="prefix",
    workers=[
        pb.Worker(
            worker_id="worker-a",
            address="10.0.0.1:7",
            state=pb.WORKER_STATE_READY,
            num_running=12,
            num_waiting=3,
            reserved_outputs=5,
            kv_used_tokens=800,
            kv_capacity_tokens=65536,
            known_cached_tokens=640,
        ),
        pb.Worker(worker_id="b", state=pb.WORKER_STATE_WARMING),
    ],
    queue=pb.Queue(
        num_requests=4, num_tokens=900, tenants=[pb.TenantQueue(tenant="acme", num_waiting=4, num_running=9)]
    ),
)
EXPLANATION = pb.ExplainRouteResponse(
    worker_id="worker-a",
    reason="affinity",
    prompt_tokens=70,
    candidates=[
        pb.RouteCandidate(worker_id="worker-a", cost=41.5, cached_tokens=64, live_tokens=32, load_tokens=128),
        pb.RouteCandidate(worker_id="b", cost=100.2, has_room=True, fetchable_tokens=60),
    ],
)
PIN = pb.PinnedPrefix(pin_id="00ff", num_tokens=64, num_workers=2)


class Operated(pb_grpc.ClusterServicer):
    """Answers as written above, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def GetTopology(self, request: Any, context: Any) -> pb.GetTopologyResponse:  # noqa: N802
        return TOPOLOGY

    def ExplainRoute(self, request: pb.ExplainRouteRequest, context: Any) -> pb.ExplainRouteResponse:  # noqa: N802
        self.asked.append(request)
        return EXPLANATION if request.text != b"nobody" else pb.ExplainRouteResponse(prompt_tokens=3)

    def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:  # noqa: N802
        self.asked.append(request)
        if request.worker_id != "worker-a":
            error = errors.InvalidParameter("there is no such worker")
            context.set_trailing_metadata(errors.trailers(error))
            context.abort(error.status, error.message)
        return pb.DrainResponse(num_live=7)

    def PinPrefix(self, request: pb.PinPrefixRequest, context: Any) -> pb.PinPrefixResponse:  # noqa: N802
        self.asked.append(request)
        return pb.PinPrefixResponse(pin=PIN)

    def UnpinPrefix(self, request: pb.UnpinPrefixRequest, context: Any) -> pb.UnpinPrefixResponse:  # noqa: N802
        return pb.UnpinPrefixResponse(found=request.pin_id == PIN.pin_id)

    def ListPins(self, request: Any, context: Any) -> pb.ListPinsResponse:  # noqa: N802
        return pb.ListPinsResponse(pins=[PIN])


class Cluster:
    """One router, and the command line beside it."""

    def __init__(self, service: Operated, address: str) -> None:
        self.asked = service.asked
        self._address = address

    def run(self, *arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [*arguments, "--target", self._address], input=stdin)

    def json(self, *arguments: str) -> Any:
        [line] = self.run(*arguments, "--json").stdout.splitlines()
        return json.loads(line)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    service, server = Operated(), grpc.server(futures.ThreadPoolExecutor(2))
    pb_grpc.add_ClusterServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield Cluster(service, f"127.0.0.1:{port}")
    server.stop(None).wait()


def test_topology_is_a_table_of_workers_and_of_tenants(cluster: Cluster) -> None:
    assert cluster.run("topology").stdout.splitlines() == [
        "router r0: tiny, policy prefix, 4 requests wait (900 prompt tokens)",
        "worker      state  running  waiting  from here  KV tokens  cached tokens",
        "worker-a    ready       12        3          5  800/65536            640",
        "b         warming        0        0          0        0/0              0",
        "tenant  waiting  running",
        "acme          4        9",
    ]


def test_topology_as_json_has_everything(cluster: Cluster) -> None:
    shown = cluster.json("topology")
    assert (shown["router_id"], shown["num_waiting"], shown["num_waiting_tokens"]) == ("r0", 4, 900)
    assert [worker["state"] for worker in shown["workers"]] == ["ready", "warming"]
    assert shown["workers"][0].keys() == {field.name for field in pb.Worker.DESCRIPTOR.fields}
    assert shown["tenants"] == [{"tenant": "acme", "num_waiting": 4, "num_running": 9}]


def test_explain_shows_the_choice_and_the_candidates(cluster: Cluster) -> None:
    done = cluster.run("explain", "-", "--max-tokens", "9", stdin="once upon")
    assert done.stdout.splitlines() == [
        "worker-a: affinity, of 70 prompt tokens",
        "worker    cost  cached  live  to fetch  ahead  room",
        "worker-a    42      64    32         0    128    no",
        "b          100       0     0        60      0   yes",
    ]
    assert (cluster.asked[0].text, cluster.asked[0].max_tokens) == (b"once upon", 9)
    shown = cluster.json("explain", "once")
    assert (shown["worker_id"], shown["reason"]) == ("worker-a", "affinity")
    assert shown["candidates"][0].keys() == {field.name for field in pb.RouteCandidate.DESCRIPTOR.fields}


def test_explain_says_that_nobody_is_there(cluster: Cluster) -> None:
    assert cluster.run("explain", "nobody").stdout == "no worker is ready for the 3 prompt tokens\n"


def test_drain_and_resume(cluster: Cluster) -> None:
    assert cluster.run("drain", "worker-a").stdout == "worker-a gets no new work; it runs 7 requests\n"
    assert cluster.run("drain", "worker-a", "--resume").stdout == "worker-a gets work again; it runs 7 requests\n"
    assert [request.resume for request in cluster.asked] == [False, True]
    assert isinstance(cluster.run("drain", "worker-b").exception, errors.InvalidParameter)


def test_pins_are_made_listed_and_removed(cluster: Cluster) -> None:
    line = "00ff  64 tokens, on 2 workers\n"
    assert cluster.run("pin", "You are a helpful assistant.").stdout == line
    assert cluster.asked[0].text == b"You are a helpful assistant."
    assert cluster.run("pin", "--list").stdout == line
    assert cluster.json("pin", "--list") == {"pin_id": "00ff", "num_tokens": 64, "num_workers": 2}
    assert cluster.run("pin", "--remove", "00ff").exit_code == 0
    assert cluster.run("pin", "--remove", "00aa").exit_code == 2


@pytest.mark.parametrize("arguments", [(), ("text", "--list"), ("--list", "--remove", "00ff")])
def test_pin_wants_one_thing(cluster: Cluster, arguments: tuple[str, ...]) -> None:
    done = cluster.run("pin", *arguments)
    assert done.exit_code == 2
    assert "--remove" in done.stderr
