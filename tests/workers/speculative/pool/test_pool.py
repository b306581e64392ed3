"""The worker's side of the pool: drafters that say what a test wants, wrong, late or never, cost time alone."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from protos import convert
from protos.messages import Sampling
from protos.tls import Certificates
from protos.v1 import drafting_pb2 as pb
from tests.workers.speculative.pool.ends import (
    PATIENCE_S,
    VOCAB_SIZE,
    Reply,
    ScriptedDrafter,
    chain,
    draft,
    hello,
    lanes,
    nothing,
    silent,
    until,
)
from tests.workers.speculative.trees import paths
from workers.speculative.pool import lane as lane_module
from workers.speculative.pool.client import Pool, _Entry
from workers.speculative.pool.lane import MAX_BEHIND, MAX_TOP_IDS
from workers.speculative.pool.members import Members
from workers.speculative.protocol import Context, Draws, Verified
from workers.speculative.tree import MAX_NODES, ROOT, DraftTree

Run = Callable[..., ScriptedDrafter]
MAX = 8  # nodes asked for
IN_PLAIN_TEXT = pytest.mark.parametrize("secrecy", [None])


class Told:
    """A sequence of the worker's."""

    def __init__(self, pool: Pool, name: str = "a", tokens: Sequence[int] = (1, 2, 3)) -> None:
        self.pool = pool
        self.tokens = list(tokens)
        self.context = Context((name, 0), "salt", self.tokens, 2)

    def propose(self, max_nodes: int = MAX) -> DraftTree:
        [found] = self.pool.propose([self.context], max_nodes)
        found.check()
        assert len(found) <= max_nodes
        return found

    def learn(self, *new: int, **fields: object) -> None:
        self.tokens += new
        told: dict[str, object] = {"draft": DraftTree(), "nodes": (), **fields}
        self.pool.learn([Verified(self.context, len(new), **told)])  # type: ignore[arg-type]

    def await_draft(self, *expected: tuple[int, ...]) -> None:
        until(lambda: sorted(paths(self.propose())) == sorted(expected), f"the draft {expected}")

    def warm(self, drafter: ScriptedDrafter) -> None:
        """Let a first draft come, and be used up: from now on there are waits for more."""
        reply, drafter.reply = drafter.reply, nothing
        self.propose()
        drafter.say(pb.DraftFrame(number=1, drafts=[draft(1, len(self.tokens), chain(50))]))
        self.await_draft((50,))
        self.learn(60)
        until(lambda: len(drafter.batches) == 2)
        drafter.reply = reply


@pytest.fixture
def run(secrecy: Certificates | None) -> Iterator[Run]:
    """Starts a drafter that ends with the test."""
    with ExitStack() as exits:
        yield lambda *args, **kwargs: exits.enter_context(ScriptedDrafter(*args, certificates=secrecy, **kwargs))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "RECONNECT_S", 0.01)


@pytest.fixture
def connect(secrecy: Certificates | None) -> Iterator[Callable[..., Pool]]:
    """A pool of these drafters, which have greeted it."""
    with ExitStack() as exits:

        def connected(*drafters: ScriptedDrafter, deadline_s: float = 0.002, **fields: object) -> Pool:
            members = Members({str(number): drafter.address for number, drafter in enumerate(drafters)})
            pool = Pool(members, hello(), deadline_s=deadline_s, make_lane=lanes(secrecy), **fields)  # type: ignore[arg-type]
            exits.callback(pool.close)
            await_drafters(pool, len(drafters))
            return pool

        yield connected


def await_drafters(pool: Pool, count: int) -> None:
    def are_there() -> bool:
        assert pool.propose([], MAX) == []
        return pool.stats.num_drafters == count

    until(are_there, f"{count} drafters")


def ticking(tick_s: float) -> Callable[[], float]:
    """A clock that goes on each time it is read."""
    ticks = itertools.count()
    return lambda: next(ticks) * tick_s


def batches(drafter: ScriptedDrafter, count: int) -> list[pb.DraftBatch]:
    until(lambda: len(drafter.batches) >= count, f"{count} batches")
    assert len(drafter.batches) == count
    return drafter.batches


# What drafters are told


def test_a_sequence_is_opened_told_of_and_closed(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run()
    pool = connect(drafter)
    told = Told(pool)
    assert told.propose(12) == DraftTree()
    told.learn(4, 5)
    told.propose(9)
    told.learn(6)
    pool.forget(told.context.key)
    pool.forget(("never seen", 0))
    assert drafter.hellos == [hello()]
    assert batches(drafter, 4) == [
        pb.DraftBatch(
            number=1, open=[pb.Open(sequence=1, salt="salt", token_ids=[1, 2, 3], num_prompt=2, max_nodes=12)]
        ),
        pb.DraftBatch(number=2, commit=[pb.Commit(sequence=1, first=3, token_ids=[4, 5], max_nodes=12)]),
        pb.DraftBatch(number=3, commit=[pb.Commit(sequence=1, first=5, token_ids=[6], max_nodes=9)]),
        pb.DraftBatch(number=4, close=[1]),
    ]


def test_tokens_that_came_in_plain_steps_are_told_when_a_draft_is_wanted_again(
    run: Run, connect: Callable[..., Pool]
) -> None:
    drafter = run()
    told = Told(connect(drafter))
    told.propose()
    told.tokens += [4, 5, 6]
    told.propose()
    told.propose()  # there is nothing to tell
    told.tokens += [7]
    told.learn(8)
    commits = [list(batch.commit) for batch in batches(drafter, 3)[1:]]
    assert commits == [
        [pb.Commit(sequence=1, first=3, token_ids=[4, 5, 6], max_nodes=MAX)],
        [pb.Commit(sequence=1, first=6, token_ids=[7, 8], max_nodes=MAX)],
    ]


def test_how_tokens_are_drawn_is_told(run: Run, connect: Callable[..., Pool]) -> None:
    drafter, sampling = run(), Sampling(seed=2**63 + 5, max_tokens=9, temperature=0.7, logit_bias={3: -1.5})
    told = Told(connect(drafter))
    told.context = told.context._replace(draws=Draws(sampling, 3))
    told.propose()
    [[opened]] = [list(batch.open) for batch in batches(drafter, 1)]
    assert opened.index == 3
    found = convert.sampling_from_proto(opened.sampling)
    assert (found.seed, found.logit_bias[3]) == (sampling.seed, -1.5)
    assert found.temperature == pytest.approx(0.7)


def test_verifications_go_to_who_learns_of_them(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run(num_top_ids=2)
    pool = connect(drafter)
    assert pool.num_top_ids == 2
    told = Told(pool)
    told.propose()
    fork = DraftTree((4, 9, 5), (ROOT, ROOT, 0), (0.5,) * 3, (1,) * 3)
    told.learn(4, 5, 6, draft=fork, nodes=(0, 2), top_ids=[[4, 1], [5, 2], [8, 7], [6, 3]])
    told.learn(7)  # a step that told of no tokens
    [first, second] = [batch.commit[0] for batch in batches(drafter, 3)[1:]]
    assert first.verification == pb.Verification(
        num_new=3, token_ids=[4, 9, 5], parents=[ROOT, ROOT, 0], accepted=[0, 2], top_ids=[4, 1, 5, 2, 8, 7, 6, 3]
    )
    assert not second.HasField("verification")


def test_what_drafters_ask_for_is_bounded_and_ends_with_them(run: Run, connect: Callable[..., Pool]) -> None:
    greedy = run(num_top_ids=2**31)
    pool = connect(greedy)
    assert pool.num_top_ids == MAX_TOP_IDS
    greedy.refusal = "no more"
    greedy.hang_up()
    await_drafters(pool, 0)
    assert pool.num_top_ids == 0


def test_outputs_that_end_together_take_one_batch(run: Run, connect: Callable[..., Pool]) -> None:
    """More would count as batches that the drafter owes answers to."""
    drafter = run(silent)
    pool = connect(drafter)
    ended = [Told(pool, str(number)) for number in range(3 * MAX_BEHIND)]
    last = Told(pool, "last")
    pool.propose([one.context for one in [*ended, last]], MAX)
    for one in ended:
        pool.forget(one.context.key)
    assert len(batches(drafter, 1)[0].open) == len(ended) + 1
    last.learn(4)
    assert list(batches(drafter, 2)[1].close) == list(range(1, len(ended) + 1))
    pool.forget(last.context.key)  # nobody is left to tell of it later
    assert list(batches(drafter, 3)[2].close) == [len(ended) + 1]


# Drafts


def test_drafts_are_hung_where_they_go_on(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run()
    told = Told(connect(drafter))
    told.propose()
    drafter.say(pb.DraftFrame(number=1, drafts=[draft(1, 3, chain(4, 5)), draft(1, 3, chain(6), [4, 5])]))
    told.await_draft((4,), (4, 5), (4, 5, 6))
    told.learn(4)
    assert paths(told.propose()) == [(5,), (5, 6)]  # of what is here already
    late = [draft(1, 3, chain(7), [4]), draft(1, 3, chain(4, 8, 9)), draft(1, 4, chain(2), [5, 6])]
    drafter.say(pb.DraftFrame(number=2, drafts=late))
    told.await_draft((5,), (5, 6), (5, 6, 2), (7,), (8,), (8, 9))
    told.learn(8, 9)
    assert told.propose() == DraftTree()
    drafter.say(pb.DraftFrame(number=3, drafts=[draft(1, 3, chain(1), [4, 8, 9])]))
    told.await_draft((1,))
    assert told.pool.stats.num_stale == 0


def test_the_best_nodes_are_proposed_and_the_others_kept(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run()
    told = Told(connect(drafter))
    told.propose()
    fork = DraftTree((4, 5, 6), (ROOT, ROOT, 1), (0.1, 0.8, 0.7), (1,) * 3)
    drafter.say(pb.DraftFrame(number=1, drafts=[draft(1, 3, fork)]))
    told.await_draft((4,), (5,), (5, 6))
    assert paths(told.propose(2)) == [(5,), (5, 6)]
    drafter.say(pb.DraftFrame(number=1, drafts=[draft(1, 3, chain(8), [4])]))
    told.await_draft((4,), (5,), (5, 6), (4, 8))


def test_drafts_for_what_was_not_said_are_dropped(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run()
    told = Told(connect(drafter))
    told.propose()
    told.learn(4, 5)
    stale = [draft(1, 3, chain(9)), draft(1, 3, chain(6), [4, 9]), draft(1, 4, chain(4, 5)), draft(1, 3, chain(4, 5))]
    drafter.say(pb.DraftFrame(number=2, drafts=[*stale, draft(99, 5, chain(1)), draft(1, 5, chain(8))]))
    told.await_draft((8,))
    assert told.pool.stats.num_stale == len(stale)
    assert told.pool.stats.num_drafters == 1


def test_a_drafter_that_goes_on_from_what_was_dropped_begins_anew(run: Run, connect: Callable[..., Pool]) -> None:
    """Drafts of a sequence that a step leaves out are lost; all that hung under them would be too."""
    drafter = run()
    pool = connect(drafter)
    told, other = Told(pool), Told(pool, "b")
    pool.propose([told.context, other.context], MAX)
    drafter.say(pb.DraftFrame(number=1, drafts=[draft(1, 3, chain(4, 5)), draft(2, 3, chain(4))]))
    other.await_draft((4,))
    assert told.propose() == DraftTree()
    drafter.say(pb.DraftFrame(number=1, drafts=[draft(1, 3, chain(6), [4, 5]), draft(1, 3, chain(7), [4, 5, 6])]))
    until(lambda: told.propose() == DraftTree() and len(drafter.batches) == 2, "another batch")
    [opened] = drafter.latest.open
    assert (opened.sequence, list(opened.token_ids), list(drafter.latest.close)) == (3, [1, 2, 3], [1])
    drafter.say(pb.DraftFrame(number=2, drafts=[draft(3, 3, chain(4, 5, 6))]))
    told.await_draft((4,), (4, 5), (4, 5, 6))
    assert len(drafter.batches) == 2
    assert pool.stats.num_stale == 1


# Nacks


def nacking(*numbers: int) -> Reply:
    """Does not know these sequences when it is told of them."""

    def reply(batch: pb.DraftBatch) -> pb.DraftFrame:
        nacks = [pb.Nack(sequence=one.sequence) for one in batch.commit if one.sequence in numbers]
        return pb.DraftFrame(number=batch.number, nacks=nacks)

    return reply


def test_a_sequence_that_is_not_known_any_more_is_opened_again(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run(nacking(1))
    pool = connect(drafter)
    told = Told(pool)
    told.propose()
    told.learn(4)
    until(lambda: told.propose() == DraftTree() and pool.stats.num_nacks == 1, "a nack")
    [opened] = batches(drafter, 3)[2].open
    assert opened == pb.Open(sequence=2, salt="salt", token_ids=[1, 2, 3, 4], num_prompt=2, max_nodes=MAX)
    told.learn(5)
    [commit] = batches(drafter, 4)[3].commit
    assert (commit.sequence, commit.first, list(commit.token_ids)) == (2, 4, [5])


def test_a_nack_during_the_wait_leads_to_a_draft_all_the_same(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run(nacking(1))
    pool = connect(drafter, deadline_s=PATIENCE_S)
    told = Told(pool)
    told.warm(drafter)
    told.tokens.append(61)
    assert told.propose() == DraftTree()  # answered with a nack
    assert pool.stats.num_nacks == 1
    told.learn(62)
    [opened] = batches(drafter, 4)[3].open
    assert (opened.sequence, list(opened.token_ids)) == (2, [*told.tokens])
    assert opened.max_nodes == MAX
    assert pool.stats.num_late == 0


def test_a_nack_of_a_sequence_that_is_not_asked_for_opens_it_when_it_is(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run(nacking(1))
    pool = connect(drafter)
    told, other = Told(pool), Told(pool, "b")
    told.propose()
    told.learn(4)
    until(lambda: other.propose() == DraftTree() and pool.stats.num_nacks == 1, "a nack")
    told.learn(5)  # nobody is told
    told.propose()
    until(lambda: drafter.latest.open and drafter.latest.open[0].sequence == 3, "the sequence")
    assert list(drafter.latest.open[0].token_ids) == [1, 2, 3, 4, 5]


def test_nacks_of_unknown_sequences_do_nothing(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run()
    pool = connect(drafter)
    told = Told(pool)
    told.propose()
    drafter.say(pb.DraftFrame(number=1, nacks=[pb.Nack(sequence=77), pb.Nack()], drafts=[draft(1, 3, chain(4))]))
    told.await_draft((4,))
    batches(drafter, 1)


# Waiting


def test_nobody_waits_for_drafters_that_have_not_read_the_sequence(run: Run, connect: Callable[..., Pool]) -> None:
    pool = connect(run(silent), deadline_s=PATIENCE_S)
    assert Told(pool).propose() == DraftTree()
    assert pool.stats.wait_s < PATIENCE_S / 2


def test_a_wait_ends_with_the_answer(run: Run, connect: Callable[..., Pool]) -> None:
    def answer(batch: pb.DraftBatch) -> pb.DraftFrame:
        time.sleep(0.02)
        [commit] = batch.commit
        return pb.DraftFrame(number=batch.number, drafts=[draft(1, commit.first + 1, chain(7))])

    drafter = run(answer)
    pool = connect(drafter, deadline_s=PATIENCE_S)
    told = Told(pool)
    told.warm(drafter)
    told.tokens.append(61)
    assert paths(told.propose()) == [(7,)]
    drafter.reply = nothing
    told.learn(62)
    assert told.propose() == DraftTree()  # it has nothing to say: that is an answer too
    assert pool.stats.num_late == 0
    assert 0 < pool.stats.wait_s < PATIENCE_S / 2


def test_there_is_no_wait_where_a_draft_is_here_already(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run(silent)
    pool = connect(drafter, deadline_s=PATIENCE_S)
    told = Told(pool)
    told.warm(drafter)
    drafter.say(pb.DraftFrame(number=2, drafts=[draft(1, 4, chain(4, 5))]))
    told.await_draft((4,), (4, 5))
    told.learn(4)
    assert paths(told.propose()) == [(5,)]
    assert pool.stats.num_late == 0


def test_after_a_wait_in_vain_there_is_none_until_the_drafter_has_caught_up(
    run: Run, connect: Callable[..., Pool]
) -> None:
    drafter = run(silent)
    deadline_s, tick_s = 0.02, 0.004
    pool = connect(drafter, deadline_s=deadline_s, clock=ticking(tick_s))
    told = Told(pool)
    told.warm(drafter)
    num_tokens = len(told.tokens)
    for _ in range(20):
        assert told.propose() == DraftTree()
        told.learn(70)
    assert pool.stats.num_late == 1
    assert deadline_s <= pool.stats.wait_s <= deadline_s + 2 * tick_s
    assert len(batches(drafter, 2 + MAX_BEHIND)) == drafter.latest.number
    waited = pool.stats.wait_s

    drafter.say(pb.DraftFrame(number=drafter.latest.number))
    until(lambda: told.propose() == DraftTree() and len(drafter.batches) > 2 + MAX_BEHIND, "another batch")
    [commit] = drafter.latest.commit
    assert list(commit.token_ids) == told.tokens[commit.first :]
    assert commit.first == num_tokens + MAX_BEHIND
    until(lambda: told.propose() == DraftTree() and pool.stats.num_late == 2, "another wait")
    assert pool.stats.wait_s - waited <= deadline_s + 2 * tick_s


def test_answers_to_what_was_not_asked_do_not_hide_that_a_drafter_hangs(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run(silent)
    pool = connect(drafter, deadline_s=0.02)
    told = Told(pool)
    told.warm(drafter)
    drafter.say(pb.DraftFrame(number=10**9, drafts=[draft(1, 4, chain(4))]))
    told.await_draft((4,))
    for _ in range(20):
        told.learn(70)
        told.propose()
    assert pool.stats.num_late == 1
    assert len(batches(drafter, 2 + MAX_BEHIND)) == 2 + MAX_BEHIND


def test_the_sequences_of_a_drafter_that_hangs_move_to_one_that_does_not(
    run: Run, connect: Callable[..., Pool]
) -> None:
    drafters = [run(), run()]
    pool = connect(*drafters)
    told = Told(pool)
    told.propose()
    until(lambda: any(drafter.batches for drafter in drafters))
    hung, other = sorted(drafters, key=lambda drafter: not drafter.batches)
    hung.reply = silent
    for _ in range(MAX_BEHIND):
        told.learn(4)
        told.propose()
    [[opened]] = [list(batch.open) for batch in batches(other, 1)]
    assert (opened.sequence, list(opened.token_ids)) == (2, told.tokens)
    other.say(pb.DraftFrame(number=1, drafts=[draft(2, len(told.tokens), chain(5))]))
    told.await_draft((5,))
    told.learn(6)
    batches(other, 2)
    assert len(batches(hung, 1 + MAX_BEHIND)) == hung.latest.number  # not even that it is closed

    hung.reply = nothing
    hung.say(pb.DraftFrame(number=hung.latest.number))
    until(lambda: told.propose() is not None and len(hung.batches) > 1 + MAX_BEHIND, "another batch")
    assert list(hung.latest.close) == [1]
    assert not hung.latest.open
    assert not hung.latest.commit


# Coming and going


def test_a_drafter_that_goes_takes_nothing_along_and_may_come_back(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run()
    pool = connect(drafter)
    told = Told(pool)
    told.propose()
    drafter.say(pb.DraftFrame(number=1, drafts=[draft(1, 3, chain(4, 5))]))
    told.await_draft((4,), (4, 5))
    batches(drafter, 1)
    drafter.hang_up()
    told.learn(4)
    assert paths(told.propose()) == [(5,)]
    until(lambda: told.propose() is not None and len(drafter.batches) == 2, "another batch")
    [opened] = drafter.latest.open
    assert (drafter.latest.number, opened.sequence, list(opened.token_ids)) == (1, 2, [1, 2, 3, 4])
    drafter.say(pb.DraftFrame(number=1, drafts=[draft(1, 3, chain(9)), draft(2, 4, chain(6))]))
    told.await_draft((6,))


def test_forgetting_and_learning_without_drafters_do_nothing(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run()
    pool = connect(drafter)
    told = Told(pool)
    told.propose()
    drafter.refusal = "gone"
    drafter.hang_up()
    await_drafters(pool, 0)
    told.learn(5)
    assert told.propose() == DraftTree()
    pool.forget(told.context.key)
    pool.close()
    pool.close()
    assert told.propose() == DraftTree()


@IN_PLAIN_TEXT
def test_drafters_that_are_no_members_any_more_are_left(run: Run) -> None:
    first, second = run(), run()
    members = Members()
    with contextlib.closing(Pool(members, hello(), deadline_s=0.002)) as pool:
        told = Told(pool)
        assert told.propose() == DraftTree()
        members.set({"x": first.address})
        await_drafters(pool, 1)
        told.propose()
        batches(first, 1)
        members.set({"x": second.address})  # it has moved
        until(lambda: told.propose() is not None and len(second.batches) == 1, "a batch")
        assert list(second.batches[0].open[0].token_ids) == told.tokens
        until(lambda: not first._channels, "the end of the old channel")
        members.set({})
        assert told.propose() == DraftTree()
        assert pool.stats.num_drafters == 0
        assert first.num_connections == second.num_connections == 1


@IN_PLAIN_TEXT
def test_nobody_answers(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with ScriptedDrafter() as gone:
        pass
    for address in (gone.address, "not an address", "127.0.0.1:port"):
        with contextlib.closing(Pool(Members({"0": address}), hello(), deadline_s=0.002)) as pool:
            for _ in range(10):
                assert Told(pool).propose() == DraftTree()
                time.sleep(0.003)
            assert pool.stats.num_drafters == pool.stats.num_late == 0
    assert sum("cannot be reached" in record.message for record in caplog.records) <= 3


@IN_PLAIN_TEXT
def test_a_drafter_that_refuses_is_logged_once_and_tried_again(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    drafter = run(refusal="another vocabulary")
    with contextlib.closing(Pool(Members({"0": drafter.address}), hello(), deadline_s=0.002)) as pool:
        told = Told(pool)
        until(lambda: told.propose() == DraftTree() and drafter.num_connections == 4, "another try")
        assert not drafter.batches
        drafter.refusal = ""
        until(lambda: told.propose() == DraftTree() and drafter.batches, "a batch")
    [record] = caplog.records
    assert record.getMessage() == f"the drafter at {drafter.address} refuses this worker: another vocabulary"


# What is no draft

VALID = draft(1, 3, chain(4, 5, 6))


def broken(**changes: object) -> pb.Draft:
    fields = {name.name: getattr(VALID, name.name) for name in pb.Draft.DESCRIPTOR.fields}
    return pb.Draft(**{**fields, **changes})  # type: ignore[arg-type]


NO_DRAFTS = {
    "its own parent": broken(parents=[ROOT, 0, 2]),
    "a later parent": broken(parents=[1, ROOT, 0]),
    "no parent": broken(parents=[-2, 0, 1]),
    "another vocabulary": broken(token_ids=[4, VOCAB_SIZE, 6]),
    "not a number": broken(probabilities=[0.5, math.nan, 0.5]),
    "negative": broken(probabilities=[0.5, -0.01, 0.5]),
    "too probable": broken(probabilities=[0.5, 1.5, 0.5]),
    "infinitely probable": broken(probabilities=[0.5, math.inf, 0.5]),
    "fewer parents": broken(parents=[ROOT, 0]),
    "no probabilities": broken(probabilities=[]),
    "too many nodes": draft(1, 3, chain(*range(100, 100 + MAX_NODES + 1))),
    "beyond the sequence": broken(base_len=4),
    "far beyond the sequence": broken(base_len=2**32 - 1),
}


@pytest.mark.parametrize("kind", NO_DRAFTS)
def test_what_is_no_draft_ends_the_channel_alone(run: Run, connect: Callable[..., Pool], kind: str) -> None:
    drafter = run()
    pool = connect(drafter)
    told = Told(pool)
    told.propose()
    drafter.say(pb.DraftFrame(number=1, drafts=[draft(1, 3, chain(8)), NO_DRAFTS[kind], NO_DRAFTS[kind], VALID]))
    told.await_draft((8,))
    until(lambda: told.propose() is not None and drafter.num_connections == 2, "another connection")
    until(lambda: told.propose() is not None and len(drafter.batches) == 2, "the sequence opened again")
    drafter.say(pb.DraftFrame(number=1, drafts=[draft(2, 3, chain(9))]))
    told.await_draft((9,))


@pytest.mark.parametrize("data", [b"\xff" * 9, b"\x0a", b""], ids=["garbage", "cut", "empty"])
def test_what_is_no_frame_ends_the_channel_at_most(
    run: Run, connect: Callable[..., Pool], data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    drafter = run()
    told = Told(connect(drafter))
    told.propose()
    drafter.say_raw(data)
    until(lambda: told.propose() is not None and drafter.num_connections == 1 + bool(data), "another connection")
    until(lambda: told.propose() is not None and told.pool.stats.num_drafters == 1, "the drafter")
    assert len(caplog.records) == bool(data)


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        pytest.param(broken(token_ids=[4, 4, 5], parents=[ROOT, ROOT, 1]), [(4,), (4, 5)], id="equal siblings"),
        pytest.param(broken(probabilities=[1.0005, 0.5, 0.5]), [(4,), (4, 5), (4, 5, 6)], id="rounded up"),
        pytest.param(broken(token_ids=[], parents=[], probabilities=[]), [(50,)], id="empty"),
    ],
)
def test_odd_drafts_are_drafts(
    run: Run, connect: Callable[..., Pool], odd: pb.Draft, expected: list[tuple[int, ...]]
) -> None:
    drafter = run()
    pool = connect(drafter)
    told = Told(pool)
    told.propose()
    drafter.say(pb.DraftFrame(number=1, drafts=[odd, draft(1, 3, chain(50))]))
    told.await_draft(*{*expected, (50,)})
    assert pool.stats.num_drafters == 1


def test_drafts_that_are_together_too_large_are_cut(run: Run, connect: Callable[..., Pool]) -> None:
    drafter = run()
    told = Told(connect(drafter))
    told.propose()
    tokens = list(range(100, 100 + MAX_NODES))
    more = DraftTree(tuple(range(200, 230)), (ROOT,) * 30, (0.001,) * 30, (1,) * 30)
    likely = DraftTree.chain(tokens, [1.0] * MAX_NODES)
    drafter.say(pb.DraftFrame(number=1, drafts=[draft(1, 3, likely), draft(1, 3, more, tokens[:1])]))
    until(lambda: len(told.propose(MAX_NODES)) == MAX_NODES, "the draft")
    assert told.propose(MAX_NODES).is_chain


# Several drafters


def test_sequences_are_spread_and_stay_where_they_are(run: Run, connect: Callable[..., Pool]) -> None:
    drafters = [run(), run(), run()]
    pool = connect(*drafters)
    all_told = [Told(pool, f"request {number}") for number in range(600)]

    def step() -> None:
        """Each has been answered before the next, or sequences would move."""
        pool.propose([told.context for told in all_told], MAX)
        for told in all_told:
            told.tokens.append(5)
        pool.learn([Verified(told.context, 1, DraftTree(), ()) for told in all_told])
        sent = [len(drafter.batches) for drafter in drafters]
        until(lambda: all(lane.num_behind == 0 for lane in pool._lanes.values()) or pool._receive(pool._lanes.values()))
        assert all(len(drafter.batches) >= count for drafter, count in zip(drafters, sent, strict=True))

    for _ in range(4):
        step()
    shares = [sum(len(batch.open) for batch in drafter.batches) for drafter in drafters]
    assert sum(shares) == len(all_told)
    assert all(150 < share < 250 for share in shares), shares
    for drafter, share in zip(drafters, shares, strict=True):
        assert all(len(batch.commit) == share for batch in drafter.batches[1:])
        assert not any(batch.close for batch in drafter.batches)


@pytest.mark.parametrize(("num_without", "waits"), [(0, False), (1, False), (2, True), (3, True)])
def test_a_step_waits_only_if_at_least_half_of_its_sequences_have_no_draft(num_without: int, waits: bool) -> None:
    """All others would wait with them."""
    pool, lane = Pool(Members(), hello(), deadline_s=1.0), SimpleNamespace(drafter_id="d", num_behind=1)
    for number in range(4):
        left = DraftTree() if number < num_without else chain(5)
        entry = _Entry(number, lane, 1, 3, 3, left, is_warm=True)  # type: ignore[arg-type]
        pool._asked[number] = entry, Context((str(number), 0), "", [1, 2, 3], 3)
    assert pool._waiting(set()) == ([lane] if waits else [])
    assert pool._waiting({"d"}) == []  # it is late
