"""What workers and clients may say, and what they may not: the index stays true, and nobody ends the router."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protos import errors
from protos.client import Client
from protos.messages import Delta, Finish, KVEvents
from protos.v1 import cluster_pb2 as cluster_pb
from protos.v1 import cluster_pb2_grpc, inference_pb2_grpc
from protos.v1 import inference_pb2 as pb
from protos.v1 import session_pb2 as session_pb
from router.config import RouterConfig, SessionsSection
from router.server import RouterServer
from router.session import SessionLost
from tests.router.conftest import ONCE, Cluster, router_config, until
from tests.router.offline import OfflineRouter, OfflineSession, whole
from tests.router.scripted_worker import ScriptedWorker, answer, hang
from tests.router.wild import wild

Start = Callable[..., Any]
CONFIG = RouterConfig(sessions=SessionsSection(packing_window_s=0))
NAMES = st.sets(st.integers(1, 12), max_size=4)


class Events(RuleBasedStateMachine):
    """A worker whose messages about its cache come in order, twice, late, not at all, or after a new beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.app, self.session = self.loop.run_until_complete(self._start())
        self.blocks: set[int] = set()
        self.sent: list[KVEvents] = []
        self.is_broken = False  # a message is missing since the last snapshot
        self.knows = False  # and a later one has come
        self.num_due = self.num_asked = 0

    async def _start(self) -> tuple[OfflineRouter, OfflineSession]:
        app = OfflineRouter(CONFIG)
        return app, app.workers("w0")[0]

    def change(self, names: set[int]) -> KVEvents:
        """Some blocks come, some go; the message of it, which has not been sent."""
        stored, removed = tuple(names - self.blocks), tuple(names & self.blocks)
        self.blocks = (self.blocks | set(stored)) - set(removed)
        message = KVEvents(len(self.sent) + 1, stored, removed)
        self.sent.append(message)
        return message

    def hear(self, message: KVEvents) -> None:
        if self.is_broken and not self.knows and message is self.sent[-1]:
            self.knows = True
            self.num_due += 1
        self.session.hears(events=message)

    @rule(names=NAMES)
    def in_order(self, names: set[int]) -> None:
        self.hear(self.change(names))

    @rule(first=NAMES, second=NAMES)
    def out_of_order(self, first: set[int], second: set[int]) -> None:
        early = self.change(first)
        late = self.change(second)
        self.is_broken = True
        self.hear(late)
        self.session.hears(events=early)

    @rule(names=NAMES)
    def lost(self, names: set[int]) -> None:
        self.change(names)
        self.is_broken = True

    @rule(data=st.data())
    def again(self, data: st.DataObject) -> None:
        changes = [message for message in self.sent if not message.snapshot]
        if changes and not self.is_broken:
            self.session.hears(events=data.draw(st.sampled_from(changes)))

    @rule()
    def snapshot(self) -> None:
        self.sent.append(KVEvents(len(self.sent) + 1, tuple(self.blocks), snapshot=True))
        self.session.hears(events=self.sent[-1])
        self.is_broken = self.knows = False

    @rule(has_cache=st.booleans())
    def reconnect(self, has_cache: bool) -> None:
        self.session.lose()
        assert self.app.index.num_blocks == 0
        self.session.greet()
        self.sent, self.is_broken, self.knows = [], False, False
        self.blocks = self.blocks if has_cache else set()
        if has_cache:
            self.snapshot()

    @invariant()
    def is_true(self) -> None:
        """Unless something is missing, the index has what the worker has; asked once for each gap, and no oftener."""
        self.app.check()
        self.num_asked += sum(frame.resync for frame in self.session.sent())
        assert self.num_asked == self.num_due
        if not self.is_broken:
            assert {n for n in range(1, 13) if self.app.index.match([n])} == self.blocks
            assert self.app.index.num_known("w0") == len(self.blocks)

    def teardown(self) -> None:
        self.loop.run_until_complete(self.app.close())
        self.loop.close()


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


async def test_steps_of_requests_that_are_not_there_change_nothing() -> None:
    app = OfflineRouter(CONFIG)
    [worker] = app.workers("w0")
    kept, cancelled, ended = (app.admit() for _ in range(3))
    requests = [group.streams[0].request for group in (kept, cancelled, ended)]
    app.admission.release(cancelled)
    worker.says(*whole(requests[2], 4, finish=True))
    worker.says(Delta("never", 0, "x", (1,), finish=Finish("stop")), *whole(requests[1], 1), *whole(requests[2], 1))
    worker.says(*whole(requests[0], 2))
    assert (kept.num_completion_tokens, cancelled.num_completion_tokens, ended.num_completion_tokens) == (2, 0, 4)
    for group in (kept, ended):
        app.admission.release(group)
    app.check_empty()
    await app.close()


async def test_requests_with_tildes_in_their_ids_stay_apart() -> None:
    """A resumed request has a new id on the session; the client's part of it is the client's."""
    app = OfflineRouter(CONFIG)
    first, second = app.workers("w0", "w1")
    second.hold(True)
    groups = [app.admit(group_id=group_id) for group_id in ("a~b", "a~c", "a")]
    second.hold(False)
    for group in groups:
        first.says(*whole(group.streams[0].request, 1))
    first.lose()
    assert len({request.request_id for request in second.submitted()}) == 3
    for group in groups:
        app.admission.release(group)
    app.check_empty()
    await app.close()


@pytest.mark.parametrize("frame", [{"heartbeat": session_pb.Heartbeat()}, {"events": KVEvents(1, (7,))}])
async def test_a_worker_that_speaks_before_its_hello_is_refused(frame: dict[str, Any]) -> None:
    app = OfflineRouter(CONFIG)
    app.set_members({"w0": "w0"})
    with pytest.raises(SessionLost, match="before its hello"):
        app.session("w0").hears(**frame)
    await app.close()


async def test_a_worker_that_greets_twice_is_refused() -> None:
    app = OfflineRouter(CONFIG)
    [worker] = app.workers("w0")
    app.fleet.pin("default", "default", range(8))
    with pytest.raises(SessionLost, match="twice"):
        worker.greet()
    await app.close()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_frame_of_a_worker_ends_the_router(data: st.DataObject) -> None:
    asyncio.run(_odd_frames(data))


async def _odd_frames(data: st.DataObject) -> None:
    app = OfflineRouter(CONFIG)
    odd, other = app.workers("odd", "other")
    groups = [app.admit((5 + i,), n=2) for i in range(6)]
    ids = st.sampled_from([stream.request.request_id for group in groups for stream in group.streams] + ["", "x"])
    for _ in range(5):
        frame = data.draw(wild(session_pb.WorkerFrame, ids))
        try:
            odd._receive(frame)
        except SessionLost as lost:
            odd._lose(lost)
            odd.greet()
        app.check()
    app.set_members({"other": "other"})
    odd.lose("retired")
    for group in groups:
        for stream in group.open_streams:
            for submit in other.submitted():
                other.says(*whole(submit, 1))
            other.says(*whole(stream.request, 1, finish=True))
        assert not group.open_streams
        app.admission.release(group)
    app.check_empty()
    await app.close()


@pytest.fixture(scope="module")
def directory(tokenizer_dir: Path) -> Path:
    return tokenizer_dir


class Served:
    """A router and its only worker, for one example."""

    def __init__(self, tokenizer_dir: Path, **options: Any) -> None:
        self.server = RouterServer(
            router_config(**options),
            model_name="tiny",
            tokenizer_dir=tokenizer_dir,
            session_token="secret",
            router_id="r0",
        )
        self.worker = ScriptedWorker("w0", answer(2))

    async def __aenter__(self) -> str:
        address = await self.server.start()
        self.server.set_workers({"w0": await self.worker.start()})
        await until(lambda: self.server.num_connected == 1)
        return address.grpc

    async def __aexit__(self, *_: object) -> None:
        self.server.check()
        await self.server.stop(0.0)
        await self.worker.kill()


REQUESTS = {
    "/headwater.v1.Inference/Generate": pb.GenerateRequest,
    "/headwater.v1.Inference/Score": pb.ScoreRequest,
    "/headwater.v1.Inference/Tokenize": pb.TokenizeRequest,
    "/headwater.v1.Inference/Detokenize": pb.DetokenizeRequest,
    "/headwater.v1.Inference/Abort": pb.AbortRequest,
    "/headwater.v1.Cluster/ExplainRoute": cluster_pb.ExplainRouteRequest,
    "/headwater.v1.Cluster/PinPrefix": cluster_pb.PinPrefixRequest,
    "/headwater.v1.Cluster/UnpinPrefix": cluster_pb.UnpinPrefixRequest,
    "/headwater.v1.Cluster/Drain": cluster_pb.DrainRequest,
}
CALLS = st.one_of(
    *(wild(kind).map(lambda message, path=path: (path, message.SerializeToString())) for path, kind in REQUESTS.items())
)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(calls=st.lists(CALLS, min_size=40, max_size=60))
def test_every_odd_call_ends_in_an_answer_or_one_typed_error(directory: Path, calls: list[tuple[str, bytes]]) -> None:
    asyncio.run(_odd_calls(directory, calls))


async def _odd_calls(directory: Path, calls: list[tuple[str, bytes]]) -> None:
    async with Served(directory) as address, grpc.aio.insecure_channel(address) as channel:
        endings = await asyncio.gather(*(_ending(channel, path, request) for path, request in calls))
        assert all(error is None or type(error) is not errors.EngineFailure for error in endings), endings
        async with Client(address, retry=ONCE) as client:
            assert (await client.complete("w5", max_tokens=2)).outputs[0].token_ids == (10, 11)


async def _ending(channel: grpc.aio.Channel, path: str, request: bytes) -> errors.HeadwaterError | None:
    try:
        async for _ in channel.unary_stream(path)(request, timeout=20):
            pass
    except grpc.aio.AioRpcError as error:
        failed = error
    else:
        return None
    keys = [key for key, _ in failed.trailing_metadata() or ()]
    assert keys.count(errors.ERROR_TRAILER) == 1, failed
    return errors.from_rpc_error(failed)


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(noise=st.lists(st.binary(min_size=1, max_size=40), min_size=5, max_size=10))
def test_noise_ends_a_call_or_a_session_and_no_more(directory: Path, noise: list[bytes]) -> None:
    asyncio.run(_noise(directory, noise))


async def _noise(directory: Path, noise: list[bytes]) -> None:
    served = Served(directory, no_worker_grace_s=10)
    async with served as address, grpc.aio.insecure_channel(address) as channel:
        for path in REQUESTS:
            for content in noise:
                try:
                    async for _ in channel.unary_stream(path)(content, timeout=20):
                        pass
                except grpc.aio.AioRpcError:
                    pass
        for content in noise:
            served.worker.send(content)
        async with Client(address) as client:
            assert (await client.complete("w5", max_tokens=2)).outputs[0].token_ids == (10, 11)


async def test_noise_of_one_worker_leaves_the_streams_of_another(start_cluster: Start) -> None:
    cluster: Cluster = await start_cluster()
    steady = await cluster.add_worker("w0", answer(20, delay_s=0.01))
    client = await cluster.client()
    stream = asyncio.create_task(client.complete("w5", max_tokens=20))
    await until(lambda: len(steady.submitted) == 1)
    odd = await cluster.add_worker("w1", hang())
    odd.send(b"\xff\xff\xff\xff")
    await until(lambda: odd.num_sessions == 2)
    assert (await stream).outputs[0].token_ids == tuple(range(10, 30))
    await cluster.wait_connected()


def test_every_request_type_is_tried() -> None:
    """A new call is not forgotten here. Those left out have no fields."""
    stubs = (inference_pb2_grpc.InferenceServicer, cluster_pb2_grpc.ClusterServicer)
    names = {name for stub in stubs for name in vars(stub) if not name.startswith("_")}
    assert names - {path.rpartition("/")[2] for path in REQUESTS} == {
        "ListModels",
        "GetTopology",
        "GetOverview",
        "ListPins",
    }
