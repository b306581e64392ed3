"""Drafts from elsewhere change speed only: whatever drafters say, whenever, outputs are those of a plain engine."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protos.messages import Request, ResumePoint
from protos.tls import Certificates
from protos.v1 import drafting_pb2 as pb
from tests.workers.engine.drive import Outputs, drain, run, step, torch_engine
from tests.workers.speculative.oracle import Always, Oracle, truth_of
from tests.workers.speculative.pool.ends import PATIENCE_S, TOKEN, ScriptedDrafter, lanes, until
from tests.workers.speculative.pool.process import Spawned
from tests.workers.speculative.test_law import (
    CASES,
    ORACLES,
    PROMPTS,
    asked,
    bounded_engine,
    counted,
    expect,
    expect_idle,
)
from workers.config import DrafterConfig
from workers.engine.torch_engine import TorchEngine
from workers.speculative.copying import Copying
from workers.speculative.factory import make_draft_server, target_hello
from workers.speculative.pool import lane as lane_module
from workers.speculative.pool.client import Pool
from workers.speculative.pool.members import Members
from workers.speculative.pool.server import DraftServer
from workers.speculative.protocol import Context, Drafter, Key, Verified
from workers.speculative.recycling import Recycling
from workers.speculative.speculator import Speculator
from workers.speculative.tree import MAX_NODES, DraftTree

PLAIN_AND_TLS = pytest.mark.parametrize("rig", ["plain", "tls"], indirect=True)
DEPTH = 3  # of an oracle's drafts: few enough tokens for them to be gone on from


class Distant:
    """An oracle in a drafter's process: it knows a sequence by its tokens alone."""

    def __init__(
        self, requests: Sequence[Request], truth: Mapping[Key, Sequence[int]], kind: str, *, depth: int = DEPTH
    ) -> None:
        style, alpha = ORACLES[kind]
        self.name, self.num_top_ids = kind, 0
        self._prompts = {one.request_id: one.token_ids for one in requests}
        self._truth = truth
        self._oracle = Oracle(truth, vocab_size=4096, style=style, alpha=alpha, depth=depth)
        self.before: Callable[[], object] = lambda: None

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        self.before()
        return self._oracle.propose([one._replace(key=self._key(one)) for one in contexts], max_nodes)

    def learn(self, verified: Sequence[Verified]) -> None:
        """It knows all there is to know."""

    def forget(self, key: Key) -> None:
        """It keeps nothing."""

    def _key(self, context: Context) -> Key:
        prompt, output = tuple(context.tokens[: context.num_prompt]), list(context.tokens[context.num_prompt :])
        for key, tokens in self._truth.items():
            if self._prompts[key[0]] == prompt and list(tokens[: len(output)]) == output:
                return key
        return "unknown", 0


class Patient:
    """The pool as a drafter that is waited for as long as it takes, so that what a test sees does not hang on time."""

    name = "pool"

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.learn = pool.learn
        self.forget = pool.forget

    @property
    def num_top_ids(self) -> int:
        return self._pool.num_top_ids

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        drafts = self._pool.propose(contexts, max_nodes)
        deadline = time.monotonic() + PATIENCE_S
        while any(lane.num_behind for lane in self._pool._lanes.values()):
            assert time.monotonic() < deadline
            time.sleep(0.0002)
            drafts = self._pool.propose(contexts, max_nodes)
        for draft in drafts:
            draft.check()
        return drafts


@dataclass
class Rig:
    """Drafters' servers and a pool of them, until the test ends."""

    exits: ExitStack
    hello: pb.TargetHello
    certificates: Certificates | None = None

    def serve(self, *drafters: Drafter, max_sequences: int = 64) -> tuple[DraftServer, str]:
        server = DraftServer(
            drafters,
            token=TOKEN,
            vocabulary=self.hello.vocabulary,
            vocab_size=self.hello.vocab_size,
            max_sequences=max_sequences,
            certificates=self.certificates,
        )
        address = server.start("127.0.0.1")
        self.exits.callback(server.stop)
        return server, address

    def pool(
        self, engine: TorchEngine, members: Members, *, is_patient: bool = True, deadline_s: float = 0.002
    ) -> Pool:
        """The engine's only drafter, which is asked in every step and believed."""
        pool = Pool(members, self.hello, deadline_s=deadline_s, make_lane=lanes(self.certificates))
        self.exits.callback(pool.close)
        drafters: list[Drafter] = [Patient(pool) if is_patient else pool]
        controller = Always(1, max_nodes=MAX_NODES)
        engine._speculator = Speculator(drafters, max_nodes=MAX_NODES, controller=controller, pool=pool)
        await_drafters(pool, len(members.addresses))
        return pool

    def drafted(self, engine: TorchEngine, *drafters: Drafter, max_sequences: int = 64) -> tuple[DraftServer, Pool]:
        """The engine with a pool of one process that hosts these drafters."""
        server, address = self.serve(*drafters, max_sequences=max_sequences)
        return server, self.pool(engine, Members({"0": address}))


def await_drafters(pool: Pool, count: int) -> None:
    until(lambda: pool.propose([], 1) == [] and pool.stats.num_drafters == count, f"{count} drafters")


@pytest.fixture
def rig(request: pytest.FixtureRequest, target_dir: Path, certificates: Certificates) -> Iterator[Rig]:
    """In plain text, but for tests that are marked PLAIN_AND_TLS."""
    is_tls = getattr(request, "param", "plain") == "tls"
    with ExitStack() as exits:
        yield Rig(exits, target_hello(target_dir, TOKEN), certificates if is_tls else None)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "RECONNECT_S", 0.01)


def expect_kept(pool: Pool, server: DraftServer) -> None:
    """Nothing was wrong with what went over the channel, and nothing is kept of what has ended."""
    assert [lane.epoch for lane in pool._lanes.values()] == [1]
    assert pool.stats.num_drafters == 1
    assert not pool._entries
    until(lambda: server.stats.num_sequences == 0, "the end of the sequences")
    server.check()


def steps_until(engine: TorchEngine, outputs: Outputs, is_done: Callable[[], bool]) -> None:
    while not is_done():
        assert engine.load().num_running + engine.load().num_waiting, "all has ended before"
        step(engine, outputs)


# Whatever is drafted

SOME = ("greedy", "sampled", "penalties")
MATRIX = [(case, "tree-half") for case in CASES]
MATRIX += [(case, kind) for case in SOME for kind in ("chain-right", "chain-wrong")]
MATRIX += [("logprobs", "wild-right"), ("mixed", "wild-half"), ("several-outputs", "chain-right")]


@pytest.mark.parametrize(("case", "kind"), MATRIX)
def test_outputs_are_those_of_a_run_without_drafts(
    rig: Rig, target_dir: Path, plain: Callable[[str], tuple[Outputs, int]], case: str, kind: str
) -> None:
    expected, num_plain_steps = plain(case)
    engine = torch_engine(target_dir)
    server, pool = rig.drafted(engine, Distant(CASES[case], truth_of(expected), kind))
    expect(run(engine, *CASES[case]), expected)
    expect_idle(engine)
    expect_kept(pool, server)
    stats = counted(engine)
    if kind.endswith("wrong"):
        assert stats.accepted_tokens < 0.05 * stats.drafted_tokens
        return
    assert stats.accepted_tokens > 0
    if kind == "chain-right":
        assert engine.stats().num_steps < 0.6 * num_plain_steps
        assert server.stats.num_ahead > 0
    assert pool.stats.num_nacks == 0


@pytest.mark.parametrize("where", [5, 12])
def test_a_stop_token_within_a_draft_ends_the_output(rig: Rig, target_dir: Path, where: int) -> None:
    """What was verified is told all the same: the channel stays."""
    free = asked(temperature=[0.0, 1.0, 1.0, 1.0], ignore_eos=True)
    longer = run(torch_engine(target_dir), *free)
    stops = [(longer[str(i), 0].tokens[where],) for i in range(len(PROMPTS))]
    stopped = asked(temperature=[0.0, 1.0, 1.0, 1.0], ignore_eos=True, stop_token_ids=stops)
    expected = run(torch_engine(target_dir), *stopped)
    for kind in ("chain-right", "tree-right"):
        engine = torch_engine(target_dir)
        server, pool = rig.drafted(engine, Distant(stopped, truth_of(longer), kind), Recycling())
        expect(run(engine, *stopped), expected)
        assert counted(engine).accepted_tokens > 0
        expect_kept(pool, server)


def test_a_context_may_be_filled_to_the_last_token(rig: Rig, target_dir: Path) -> None:
    prompt = PROMPTS[3]
    [full] = asked(max_tokens=64 - len(prompt), ignore_eos=True, logprobs=2)[3:]
    expected = run(bounded_engine(target_dir, 64, 32, 2), full)
    engine = bounded_engine(target_dir, 64, 32, 2)
    server, pool = rig.drafted(engine, Distant([full], truth_of(expected), "chain-right"), Copying())
    expect(run(engine, full), expected)
    assert counted(engine).accepted_tokens > 0
    expect_kept(pool, server)


@PLAIN_AND_TLS
def test_outputs_survive_preemption(rig: Rig, target_dir: Path) -> None:
    requests = asked(max_tokens=40, temperature=[0.0, 1.0, 0.0, 1.0], ignore_eos=True, logprobs=1)
    expected = run(torch_engine(target_dir, num_pages=7), *requests)
    engine = torch_engine(target_dir, num_pages=7)
    server, pool = rig.drafted(engine, Distant(requests, truth_of(expected), "tree-half"))
    expect(run(engine, *requests), expected)
    expect_idle(engine)
    assert engine.stats().num_preemptions > 0
    assert counted(engine).accepted_tokens > 0
    expect_kept(pool, server)


@PLAIN_AND_TLS
def test_outputs_cancelled_between_steps_leave_the_others_as_they_are(rig: Rig, target_dir: Path) -> None:
    requests = asked(n=2, temperature=1.0, max_tokens=40, ignore_eos=True)
    expected = run(torch_engine(target_dir), *requests)
    engine = torch_engine(target_dir, num_pages=64)
    server, pool = rig.drafted(engine, Distant(requests, truth_of(expected), "chain-right"))
    for one in requests:
        engine.submit(one)
    outputs: Outputs = {}
    for count in range(6):
        step(engine, outputs)
        if count in (2, 3):
            engine.cancel("1", count - 2)
        if count == 4:
            engine.cancel("3")
            assert {key[0] for key in pool._entries} == {"0", "2"}
    cut = {key: outputs.pop(key) for key in list(outputs) if key[0] in "13"}
    expect(drain(engine, outputs), {key: output for key, output in expected.items() if key[0] not in "13"})
    assert all(output.tokens == expected[key].tokens[: len(output.tokens)] for key, output in cut.items())
    expect_idle(engine)
    assert counted(engine).accepted_tokens > 0
    expect_kept(pool, server)


def test_a_resumed_output_goes_on_with_drafts(rig: Rig, target_dir: Path) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "n": 2, "max_tokens": 36, "ignore_eos": True, "logprobs": 1}
    whole = run(torch_engine(target_dir), *asked(**fields))
    points = [
        (ResumePoint(0, tuple(whole[str(i), 0].tokens[:7])), ResumePoint(1, (), finished=i % 2 == 0))
        for i in range(len(PROMPTS))
    ]
    requests = asked(**fields, resume=points)
    expected = run(torch_engine(target_dir), *requests)
    engine = torch_engine(target_dir)
    server, pool = rig.drafted(engine, Distant(requests, truth_of(whole), "chain-right"))
    expect(run(engine, *requests), expected)
    assert counted(engine).accepted_tokens > 0
    expect_kept(pool, server)


@pytest.mark.parametrize("case", ["greedy", "logprobs", "several-outputs", "min-tokens"])
def test_copied_and_recycled_drafts_change_nothing(
    rig: Rig, target_dir: Path, plain: Callable[[str], tuple[Outputs, int]], case: str
) -> None:
    expected, _ = plain(case)
    engine = torch_engine(target_dir)
    server, pool = rig.drafted(engine, Copying(), Recycling())
    assert pool.num_top_ids > 0
    expect(run(engine, *CASES[case]), expected)
    expect_idle(engine)
    assert counted(engine).accepted_tokens > 0
    expect_kept(pool, server)


@pytest.fixture(scope="module")
def model_server(root: Path) -> Iterator[tuple[DraftServer, str]]:
    """With the small model that ships with this one."""
    config = DrafterConfig(draft_model=root / "models" / "drafter", dtype="float32")
    server = make_draft_server(config, target=root / "models" / "target", token=TOKEN)
    address = server.start("127.0.0.1")
    yield server, address
    server.stop()


@pytest.mark.parametrize("case", ["greedy", "mixed", "penalties", "several-outputs", "logprobs"])
def test_the_shipped_draft_model_changes_nothing(
    rig: Rig,
    target_dir: Path,
    plain: Callable[[str], tuple[Outputs, int]],
    model_server: tuple[DraftServer, str],
    case: str,
) -> None:
    expected, num_plain_steps = plain(case)
    server, address = model_server
    engine = torch_engine(target_dir)
    pool = rig.pool(engine, Members({"0": address}))
    expect(run(engine, *CASES[case]), expected)
    expect_idle(engine)
    assert counted(engine).accepted_tokens > 0
    assert engine.stats().num_steps < num_plain_steps
    expect_kept(pool, server)


# Whatever is said at all


def any_drafts(draw: random.Random, known: dict[int, list[int]], batch: pb.DraftBatch) -> pb.DraftFrame:
    """Drafts of any shape for any sequence at any place: some of them are none at all."""
    for one in batch.open:
        known[one.sequence] = list(one.token_ids)
    for one in batch.commit:
        known.setdefault(one.sequence, []).extend(one.token_ids)
    frame = pb.DraftFrame(number=max(batch.number - draw.randrange(2), 0))
    for sequence, tokens in known.items():
        if draw.random() < 0.1:
            frame.nacks.add(sequence=sequence)
        num_nodes = draw.randrange(12)
        base_len = max(len(tokens) - draw.randrange(4), 0)
        frame.drafts.add(
            sequence=sequence,
            base_len=base_len,
            assumed=[*tokens[base_len:], *draw.sample(range(50), draw.randrange(3))],
            token_ids=[draw.randrange(5 if draw.random() < 0.5 else 4096) for _ in range(num_nodes)],
            parents=[draw.randrange(-1, node) if node else -1 for node in range(num_nodes)],
            probabilities=[draw.random() for _ in range(num_nodes)],
        )
    if draw.random() < 0.05:
        frame.drafts.add(sequence=max(known), token_ids=[1], parents=[7], probabilities=[0.5])
    return frame


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_over_the_channel_changes_nothing(
    rig: Rig, target_dir: Path, plain: Callable[[str], tuple[Outputs, int]], seed: int
) -> None:
    case = ["mixed", "logprobs", "several-outputs", "penalties"][seed]
    expected, _ = plain(case)
    draw, known = random.Random(seed), dict[int, list[int]]()
    drafter = rig.exits.enter_context(ScriptedDrafter(lambda batch: any_drafts(draw, known, batch), num_top_ids=8))
    engine = torch_engine(target_dir)
    rig.pool(engine, Members({"0": drafter.address}), is_patient=False)
    expect(run(engine, *CASES[case]), expected)
    expect_idle(engine)
    assert drafter.batches


# Whenever it comes


@PLAIN_AND_TLS
@pytest.mark.parametrize("kind", ["chain-right", "chain-wrong"])
def test_drafts_that_come_too_late_cost_one_wait_at_a_time(rig: Rig, target_dir: Path, kind: str) -> None:
    """Of right ones, the end still counts."""
    requests = asked(max_tokens=80, ignore_eos=True, temperature=[0.0, 1.0, 0.0, 1.0], logprobs=1)
    expected = run(torch_engine(target_dir), *requests)
    told, turns = Distant(requests, truth_of(expected), kind, depth=12), threading.Semaphore(0)
    told.before = lambda: turns.acquire(timeout=PATIENCE_S)
    server, address = rig.serve(told)
    rig.exits.callback(lambda: turns.release(1000))
    engine = torch_engine(target_dir)
    pool = rig.pool(engine, Members({"0": address}), is_patient=False)
    for one in requests:
        engine.submit(one)
    outputs: Outputs = {}
    num_steps = 0
    while engine.load().num_running + engine.load().num_waiting:
        step(engine, outputs)
        num_steps += 1
        if num_steps % 5 == 0:
            turns.release()
            time.sleep(0.01)  # the drafter's turn
    expect(outputs, expected)
    expect_idle(engine)
    assert pool.stats.num_late <= num_steps / 2  # there is none before the last one has been answered
    assert (pool.stats.num_stale > 0) == (kind == "chain-wrong")
    assert (num_accepted(engine) > 0) == (kind == "chain-right")
    assert server.stats.num_batches < num_steps


@PLAIN_AND_TLS
def test_sequences_that_push_each_other_out_are_opened_again_and_again(rig: Rig, target_dir: Path) -> None:
    requests = asked(temperature=[0.0, 1.0, 0.0, 0.8], logprobs=1)
    expected = run(torch_engine(target_dir), *requests)
    engine = torch_engine(target_dir)
    server, pool = rig.drafted(engine, Distant(requests, truth_of(expected), "chain-right"), max_sequences=1)
    expect(run(engine, *requests), expected)
    assert pool.stats.num_nacks > len(requests)
    assert counted(engine).accepted_tokens > 0
    expect_kept(pool, server)


@PLAIN_AND_TLS
def test_a_drafter_may_end_and_another_begin(rig: Rig, target_dir: Path) -> None:
    requests = asked(max_tokens=48, temperature=[0.0, 1.0, 0.0, 0.8], logprobs=1, ignore_eos=True)
    expected = run(torch_engine(target_dir), *requests)
    told = Distant(requests, truth_of(expected), "tree-half")
    server, address = rig.serve(told)
    engine, members = torch_engine(target_dir), Members({"0": address})
    pool = rig.pool(engine, members)
    for one in requests:
        engine.submit(one)
    outputs: Outputs = {}
    steps_until(engine, outputs, lambda: num_accepted(engine) > 2)
    server.stop()
    for _ in range(4):
        step(engine, outputs)
    await_drafters(pool, 0)
    before = num_accepted(engine)
    other, address = rig.serve(told)
    members.set({"1": address})
    await_drafters(pool, 1)
    expect(drain(engine, outputs), expected)
    expect_idle(engine)
    assert num_accepted(engine) > before
    expect_kept(pool, other)


def num_accepted(engine: TorchEngine) -> int:
    """Accepted so far."""
    stats = engine.stats().speculation
    assert stats is not None
    return stats.accepted_tokens


def test_the_sequences_of_a_drafter_that_hangs_go_on_at_another(rig: Rig, target_dir: Path) -> None:
    requests = asked(max_tokens=100, n=2, temperature=1.0, ignore_eos=True)
    expected = run(torch_engine(target_dir), *requests)
    drafters = [Distant(requests, truth_of(expected), "chain-half") for _ in range(2)]
    served = [rig.serve(drafter) for drafter in drafters]
    engine = torch_engine(target_dir)
    pool = rig.pool(engine, Members({str(i): address for i, (_, address) in enumerate(served)}), is_patient=False)
    for one in requests:
        engine.submit(one)
    outputs: Outputs = {}
    steps_until(engine, outputs, lambda: num_accepted(engine) > 0)
    assert all(entry.lane.drafter_id in "01" for entry in pool._entries.values())
    is_over = threading.Event()
    drafters[0].before = lambda: is_over.wait(PATIENCE_S)
    rig.exits.callback(is_over.set)
    num_late = pool.stats.num_late
    steps_until(engine, outputs, lambda: {entry.lane.drafter_id for entry in pool._entries.values()} == {"1"})
    moved = num_accepted(engine)
    expect(drain(engine, outputs), expected)
    expect_idle(engine)
    assert num_accepted(engine) > moved
    assert pool.stats.num_late - num_late < engine.stats().num_steps
    is_over.set()


# Processes


@pytest.fixture(scope="module")
def processes(root: Path) -> Iterator[list[Spawned]]:
    """Two, which start together."""
    spawned = [Spawned(root, TOKEN) for _ in range(2)]
    yield spawned
    for one in spawned:
        one.kill()


LONG = asked(max_tokens=120, temperature=[0.0, 0.0, 0.7, 0.0], ignore_eos=True, logprobs=1)
DEADLINE_S = 0.02
SLACK_S = 1.0  # of a machine that has much else to do


@pytest.fixture(scope="module")
def long_outputs(root: Path) -> Outputs:
    return run(torch_engine(root / "models" / "target"), *LONG)


def begin(rig: Rig, directory: Path, process: Spawned) -> tuple[TorchEngine, Pool, Outputs]:
    """An engine amid its outputs, with drafts of a process that are accepted."""
    engine, outputs = torch_engine(directory), Outputs()
    pool = rig.pool(engine, Members({"0": process.await_address()}), is_patient=False, deadline_s=DEADLINE_S)
    for one in LONG:
        engine.submit(one)
    steps_until(engine, outputs, lambda: num_accepted(engine) > 5)
    return engine, pool, outputs


def test_a_drafter_may_be_killed(rig: Rig, target_dir: Path, processes: list[Spawned], long_outputs: Outputs) -> None:
    engine, pool, outputs = begin(rig, target_dir, processes[0])
    before, num_steps = pool.stats, engine.stats().num_steps
    processes[0].send(signal.SIGKILL)
    expect(drain(engine, outputs), long_outputs)
    expect_idle(engine)
    assert engine.stats().num_steps - num_steps > 10
    until(lambda: pool.propose([], 1) == [] and pool.stats.num_drafters == 0)
    assert pool.stats.num_late - before.num_late <= 2
    assert pool.stats.wait_s - before.wait_s <= 2 * DEADLINE_S + SLACK_S


def test_a_drafter_may_be_stopped_and_wake_again(
    rig: Rig, target_dir: Path, processes: list[Spawned], long_outputs: Outputs
) -> None:
    engine, pool, outputs = begin(rig, target_dir, processes[1])
    before = pool.stats
    processes[1].send(signal.SIGSTOP)
    expect(drain(engine, outputs), long_outputs)
    hung = pool.stats
    assert hung.num_drafters == 1
    assert pool._lanes["0"].num_behind > 0
    assert hung.num_late - before.num_late <= 2  # an answer may have been on its way
    assert hung.wait_s - before.wait_s <= 2 * DEADLINE_S + SLACK_S

    accepted = num_accepted(engine)
    processes[1].send(signal.SIGCONT)
    for _ in range(20):
        found = run(engine, *LONG)
        assert {key: output.tokens for key, output in found.items()} == truth_of(long_outputs)
        if num_accepted(engine) > accepted:
            break
    assert num_accepted(engine) > accepted
    assert pool._lanes["0"].epoch == 1
