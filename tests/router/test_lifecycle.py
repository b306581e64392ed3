"""Law 1 under random operations: each group ends once, its answer is whole, and nothing of it is left anywhere."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protos.blocks import block_hashes
from protos.convert import submit_from_proto
from protos.errors import HeadwaterError
from protos.messages import Delta, Failure, Finish, KVEvents, Load, Request
from protos.v1 import inference_pb2 as pb
from router.config import DispatchSection, LimitsSection, RecoverySection, RouterConfig, SessionsSection
from router.group import Group
from router.tenants import Tenant
from tests.router.offline import PAGE_SIZE, OfflineRouter, OfflineSession

TENANTS = [Tenant("a", weight=2.0), Tenant("b", max_running=3), Tenant("c", max_queued=2, requests_per_s=1000.0)]
PROMPTS = [(5,), tuple(range(2, 22)), (*range(2, 14), 90, 91), tuple(range(30, 47))]
WORKERS = ("w0", "w1", "w2")
FAILURES = ["EngineFailure", "Draining", "Overloaded", "PromptTooLong", "Nonsense"]
CONFIG = RouterConfig(
    limits=LimitsSection(max_queued_requests=12, max_queued_tokens=200, max_continuations=4),
    sessions=SessionsSection(max_in_flight=6, packing_window_s=0),
    dispatch=DispatchSection(max_affinity_wait_s=0),
    recovery=RecoverySection(max_losses=3),
)


class Running:
    """A request on a worker, and how far each of its outputs is there."""

    def __init__(self, request: Request) -> None:
        self.request = request
        points = {point.index: point for point in request.resume}
        self.made = {
            index: len(points[index].token_ids) if index in points else 0
            for index in range(request.sampling.n)
            if index not in points or not points[index].finished
        }

    def next(self, index: int, num_tokens: int) -> Delta:
        """The next tokens, at most as many as there are to come; the last with the finish."""
        start = self.made[index]
        self.made[index] = stop = min(start + num_tokens, self.request.sampling.max_tokens)
        is_last = stop == self.request.sampling.max_tokens
        if is_last:
            del self.made[index]
        tokens = tuple(10 + index + position for position in range(start, stop))
        return Delta(
            self.request.request_id,
            index,
            "".join(f"{token} " for token in tokens),
            tokens,
            finish=Finish("length") if is_last else None,
            cached_tokens=len(self.request.token_ids) // 2,
        )


class Lifecycle(RuleBasedStateMachine):
    """Clients, workers and operators do what they like, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.router: OfflineRouter = self.loop.run_until_complete(self._start())
        self.on_worker: dict[OfflineSession, dict[str, Running]] = {}
        self.sequences: dict[OfflineSession, int] = {}
        self.groups: dict[str, Group] = {}
        self.num_groups = 0

    async def _start(self) -> OfflineRouter:
        return OfflineRouter(CONFIG)

    @initialize(max_running=st.integers(0, 3))
    def begin(self, max_running: int) -> None:
        self.do(self.router.set_members, dict.fromkeys(WORKERS, "x"))
        for session in map(self.router.session, WORKERS[:2]):
            self.on_worker[session], self.sequences[session] = {}, 0
            self.do(session.greet, max_running=max_running, step_tokens=16)

    def do(self, action: Any, *args: Any, **options: Any) -> None:
        """On the event loop, and then whatever that has made ready."""

        async def run() -> None:
            action(*args, **options)
            await asyncio.sleep(0)

        self.loop.run_until_complete(run())

    def connected(self) -> list[OfflineSession]:
        return [s for s in self.router.fleet.sessions if isinstance(s, OfflineSession) and s.model is not None]

    def busy(self) -> list[tuple[OfflineSession, Running]]:
        return [(s, running) for s, held in self.on_worker.items() for running in held.values() if s.model is not None]

    # Workers

    @rule(members=st.sets(st.sampled_from(WORKERS), min_size=1), address=st.sampled_from("xxxy"))
    def members_change(self, members: set[str], address: str) -> None:
        self.do(self.router.set_members, dict.fromkeys(members, address))

    @rule(data=st.data(), max_running=st.integers(0, 3), step_tokens=st.sampled_from([0, 16]))
    def connect(self, data: st.DataObject, max_running: int, step_tokens: int) -> None:
        waiting = [s for s in self.router.fleet.sessions if s.model is None]
        if waiting:
            session = data.draw(st.sampled_from(waiting))
            assert isinstance(session, OfflineSession)
            self.on_worker[session], self.sequences[session] = {}, 0
            self.do(session.greet, max_running=max_running, step_tokens=step_tokens)

    @precondition(lambda self: self.connected())
    @rule(data=st.data(), reason=st.sampled_from(["connection", "silent", "closed", "protocol"]))
    def lose(self, data: st.DataObject, reason: Any) -> None:
        session = data.draw(st.sampled_from(self.connected()))
        self.on_worker[session] = {}
        self.do(session.lose, reason)

    @precondition(lambda self: self.connected())
    @rule(data=st.data(), is_held=st.booleans(), draining=st.booleans(), num_running=st.integers(0, 2))
    def worker_says(self, data: st.DataObject, is_held: bool, draining: bool, num_running: int) -> None:
        session = data.draw(st.sampled_from(self.connected()))
        self.do(session.hold, is_held)
        self.do(session.reports, Load(num_running=num_running, draining=draining))

    @precondition(lambda self: self.connected())
    @rule(data=st.data(), prompt=st.sampled_from(PROMPTS), tenant=st.sampled_from(TENANTS))
    def cache(self, data: st.DataObject, prompt: tuple[int, ...], tenant: Tenant) -> None:
        session = data.draw(st.sampled_from(self.connected()))
        self.sequences[session] += 1
        names = block_hashes(self.router.tenants.cache_salt(tenant), prompt, PAGE_SIZE)
        self.do(session.hears, events=KVEvents(self.sequences[session], tuple(names)))

    @rule()
    def frames_leave(self) -> None:
        for session, held in self.on_worker.items():
            for frame in session.sent():
                for request_id in [cancel.request_id for cancel in frame.cancel]:
                    held.pop(request_id, None)
            self.do(lambda: None)

    @precondition(lambda self: self.busy())
    @rule(data=st.data(), num_tokens=st.integers(1, 3))
    def step(self, data: st.DataObject, num_tokens: int) -> None:
        session, running = data.draw(st.sampled_from(self.busy()))
        self.do(session.says, *[running.next(index, num_tokens) for index in list(running.made)])
        if not running.made:
            del self.on_worker[session][running.request.request_id]

    @precondition(lambda self: self.busy())
    @rule(data=st.data(), kind=st.sampled_from(FAILURES))
    def fail(self, data: st.DataObject, kind: str) -> None:
        session, running = data.draw(st.sampled_from(self.busy()))
        del self.on_worker[session][running.request.request_id]
        self.do(session.says, Failure(running.request.request_id, kind, "no"))

    # Clients

    @rule(
        tenant=st.sampled_from(TENANTS),
        prompt=st.sampled_from(PROMPTS),
        n=st.integers(1, 3),
        num_streams=st.integers(1, 3),
        priority=st.integers(-1, 1),
    )
    def ask(self, tenant: Tenant, prompt: tuple[int, ...], n: int, num_streams: int, priority: int) -> None:
        self.num_groups += 1
        group = self.router.group(
            prompt,
            tenant=tenant,
            group_id=f"g~{self.num_groups}",
            num_streams=num_streams,
            n=1 if num_streams > 1 else n,
            priority=priority,
        )
        try:
            self.do(self.router.admission.admit, group)
        except HeadwaterError:
            assert all(stream.error is None for stream in group.streams)
        else:
            self.groups[group.group_id] = group

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), how=st.sampled_from(["leave", "abort", "expire"]))
    def give_up(self, data: st.DataObject, how: str) -> None:
        group_id = data.draw(st.sampled_from(sorted(self.groups)))
        group, admission = self.groups[group_id], self.router.admission
        match how:
            case "leave":
                self.do(admission.release, group)
                del self.groups[group_id]
            case "abort":
                self.do(admission.abort, group_id)
            case "expire":
                self.do(admission._expire, group)

    @rule()
    def read(self) -> None:
        """Every client whose answer is complete takes it."""
        for group_id, group in list(self.groups.items()):
            if not group.open_streams:
                for stream in group.streams:
                    self.loop.run_until_complete(self._read(stream))
                self.do(self.router.admission.release, group)
                del self.groups[group_id]

    async def _read(self, stream: Any) -> None:
        """It has one end, and tokens without a gap or a repetition."""
        responses: list[pb.GenerateResponse] = []
        try:
            while (response := await stream.next_response()) is not None:
                responses.append(response)
        except HeadwaterError:
            assert stream.error is not None
        assert sum(response.HasField("usage") for response in responses) == (stream.error is None)
        outputs = [output for response in responses for output in response.outputs]
        for index in range(stream.request.sampling.n):
            tokens = [token for output in outputs if output.index == index for token in output.token_ids]
            assert tokens == [10 + index + position for position in range(len(tokens))]
            finishes = [output.finish for output in outputs if output.index == index and output.HasField("finish")]
            assert len(finishes) == 1 or (stream.error is not None and len(finishes) == 0)
            if finishes and finishes[0].reason == pb.FINISH_REASON_LENGTH:
                assert len(tokens) == stream.request.sampling.max_tokens

    @invariant()
    def holds(self) -> None:
        self._take_submissions()
        self.router.check()
        live = {group_id for group_id, group in self.groups.items() if group.open_streams}
        assert live <= self.router.admission._entries.keys()
        for group_id in live:
            entry = self.router.admission._entries[group_id]
            assert (entry.session is None) == entry.is_waiting
            if entry.session is not None:
                assert {stream.request.request_id for stream in entry.group.open_streams} <= entry.session._live.keys()

        for session in self.router.fleet.sessions:
            placed = [entry for entry in self.router.admission._entries.values() if entry.session is session]
            holds = Counter(name for entry in placed for name in entry.block_hashes)
            holder = self.router.index._holders.get(session.worker_id)
            assert holds == ({} if holder is None else holder.held)

    def _take_submissions(self) -> None:
        """What has been placed reaches its worker; cancels wait for `frames_leave`."""
        for session, held in self.on_worker.items():
            if session.model is None:
                held.clear()
                continue
            for submit in session._pack.take():
                held[submit.request_id] = Running(submit_from_proto(submit))
            for request_id in [request_id for request_id in held if request_id not in session._live]:
                del held[request_id]

    def teardown(self) -> None:
        for group in list(self.groups.values()):
            self.do(self.router.admission.release, group)
        self.router.check_empty()
        self.loop.run_until_complete(self.router.close())
        self.loop.close()


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
