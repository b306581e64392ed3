"""The drafters' side of the pool: targets that say what a test wants, and drafters that count on."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NoReturn

import pytest

from protos import convert
from protos.errors import EngineFailure, SetupError
from protos.messages import Sampling
from protos.tls import Certificates
from protos.v1 import drafting_pb2 as pb
from tests.workers.speculative.pool.ends import (
    PATIENCE_S,
    TOKEN,
    VOCAB_SIZE,
    VOCABULARY,
    Counting,
    ScriptedTarget,
    hello,
    target_of,
    until,
)
from workers.speculative.copying import Copying
from workers.speculative.pool import server as module
from workers.speculative.pool.channel import LENGTH
from workers.speculative.pool.drafted import PATIENCE
from workers.speculative.pool.server import FIRST_NODES, MAX_STRANGERS, DraftServer
from workers.speculative.protocol import Context, Drafter
from workers.speculative.recycling import NUM_RANKS, Recycling
from workers.speculative.tree import MAX_NODES, ROOT, DraftTree


def make(*drafters: Drafter, max_sequences: int = 64, certificates: Certificates | None = None) -> DraftServer:
    return DraftServer(
        drafters,
        token=TOKEN,
        vocabulary=VOCABULARY,
        vocab_size=VOCAB_SIZE,
        max_sequences=max_sequences,
        certificates=certificates,
    )


@dataclass
class Serving:
    """A server that runs, and targets of it, until the test ends."""

    server: DraftServer
    exits: ExitStack
    certificates: Certificates | None = None
    address: str = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.server.start("127.0.0.1")
        self.exits.callback(self.server.stop)

    def target(self, *, greets: bool = True) -> ScriptedTarget:
        return self.exits.enter_context(target_of(self.address, greets=greets, certificates=self.certificates))


Serve = Callable[..., Serving]


@pytest.fixture
def serve(secrecy: Certificates | None) -> Iterator[Serve]:
    with ExitStack() as exits:
        yield lambda *drafters, **fields: Serving(make(*drafters, certificates=secrecy, **fields), exits, secrecy)


def opened(sequence: int, *tokens: int, max_nodes: int = 2, salt: str = "") -> pb.Open:
    token_ids = tokens or (1, 2, 3)
    return pb.Open(sequence=sequence, salt=salt, token_ids=token_ids, num_prompt=len(token_ids), max_nodes=max_nodes)


def commit(sequence: int, first: int, *tokens: int, **fields: object) -> pb.Commit:
    return pb.Commit(sequence=sequence, first=first, token_ids=tokens, **fields)  # type: ignore[arg-type]


def guesses(target: ScriptedTarget, sequence: int) -> list[tuple[int, list[int], list[int]]]:
    """Of a sequence: after how many tokens, what was assumed, what was drafted."""
    drafts = [one for one in target.drafts if one.sequence == sequence]
    return [(one.base_len, list(one.assumed), list(one.token_ids)) for one in drafts]


class Gate:
    """Holds a drafter up in `propose`, as long as it is shut."""

    def __init__(self, drafter: Counting) -> None:
        self._is_open = threading.Event()
        self._is_open.set()
        self.num_held = 0
        drafter.before = self._pass

    def shut(self) -> None:
        self._is_open.clear()

    def open(self) -> None:
        self._is_open.set()

    def await_held(self, count: int = 1) -> None:
        until(lambda: self.num_held >= count, "a drafter that is held up")

    def _pass(self, contexts: Sequence[Context]) -> None:
        if not self._is_open.is_set():
            self.num_held += 1
        assert self._is_open.wait(PATIENCE_S)


# Who may use it


def refusal_of(target: ScriptedTarget) -> str:
    target.await_end()
    [frame] = target.frames
    return frame.refusal


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        pytest.param({"token": "another"}, "the session token is missing or wrong", id="wrong token"),
        pytest.param({"token": ""}, "the session token is missing or wrong", id="no token"),
        pytest.param({"token": "schlüssel"}, "the session token is missing or wrong", id="token of other letters"),
        pytest.param({"vocabulary": b"w" * 32}, "another vocabulary", id="vocabulary"),
        pytest.param({"vocab_size": VOCAB_SIZE + 1}, "another vocabulary", id="size"),
    ],
)
def test_targets_that_do_not_belong_here_are_refused(serve: Serve, said: dict[str, object], reason: str) -> None:
    serving = serve(Counting())
    stranger, known = serving.target(greets=False), serving.target()
    stranger.send(say=hello(**said))
    assert reason in refusal_of(stranger)
    known.ask(open=[opened(1)])
    assert known.drafts
    assert serving.server.stats.num_targets == 1


def test_nothing_is_said_to_those_who_do_not_say_hello(serve: Serve) -> None:
    drafter = Counting()
    serving = serve(drafter)
    stranger = serving.target(greets=False)
    stranger.send(open=[opened(1)])
    assert refusal_of(stranger) == "say hello first"
    assert not drafter.asked


def test_strangers_are_bounded_in_number_and_drive_nobody_else_away(serve: Serve) -> None:
    serving = serve(Counting())
    friend = serving.target()
    strangers = []
    for number in range(MAX_STRANGERS + 3):
        strangers.append(serving.target(greets=False))
        expected = 1 + min(number + 1, MAX_STRANGERS)
        until(lambda expected=expected: serving.server.stats.num_targets == expected)  # type: ignore[misc]
    for stranger in strangers[:3]:
        stranger.await_end()
    friend.ask(open=[opened(1)])
    assert strangers[-1].greet() == pb.DrafterHello()


def test_the_greeting_asks_for_what_the_drafters_learn_from(serve: Serve) -> None:
    target = serve(Counting(), Recycling(), Counting(num_top_ids=3)).target(greets=False)
    assert target.greet().num_top_ids == NUM_RANKS
    assert serve(Copying()).target(greets=False).greet().num_top_ids == 0


# Drafts


def test_a_sequence_is_drafted_for_and_the_tree_grows_on(serve: Serve) -> None:
    drafter = Counting()
    target = serve(drafter).target()
    target.ask(open=[opened(1, 5, 6, 7)])
    assert guesses(target, 1)[0] == (3, [], [8, 9, 10, 11])
    until(lambda: len(guesses(target, 1)) >= 2 or target.read() is None, "more")
    assert guesses(target, 1)[1] == (3, [8, 9, 10, 11], [12, 13, 14, 15])
    [first], [ahead] = drafter.asked[:2]
    assert (first.tokens, first.num_guessed, first.num_prompt) == ([5, 6, 7], 0, 3)
    assert (ahead.tokens, ahead.num_guessed, ahead.key) == ([5, 6, 7, 8, 9, 10, 11], 4, first.key)
    assert all(frame.drafts.number == 1 for frame in target.frames[1:])


def test_drafts_end_where_the_tree_is_large_enough(serve: Serve) -> None:
    serving = serve(Counting(probability=1.0))
    target = serving.target()
    target.ask(open=[opened(1, max_nodes=2), opened(2, max_nodes=MAX_NODES), opened(3, max_nodes=0)])
    until(lambda: serving.server.stats.num_nodes >= 8 + 64, "the trees")
    target.ask()
    assert sum(len(tokens) for *_, tokens in guesses(target, 1)) == 8
    assert sum(len(tokens) for *_, tokens in guesses(target, 2)) == 64
    assert not guesses(target, 3)
    target.ask(commit=[commit(1, 3, 4), commit(3, 3, 4, max_nodes=1)])
    assert guesses(target, 3)[0] == (4, [], [5, 6, 7, 8])
    assert serving.server.stats.num_sequences == 3


def test_what_the_target_says_is_followed(serve: Serve) -> None:
    drafter = Counting(probability=0.2)  # too unsure to go on by itself
    target = serve(drafter).target()
    target.ask(open=[opened(1)])
    target.ask(commit=[commit(1, 3, 4)])
    assert len(drafter.asked) == 1  # what is left is the draft
    target.ask(commit=[commit(1, 4, 90)])
    assert guesses(target, 1)[-1] == (5, [], [91, 92, 93, 94])
    target.ask(commit=[commit(1, 2, 3, 4, 90, 300, 301)])  # some of it had been told
    assert guesses(target, 1)[-1] == (7, [], [302, 303, 304, 305])
    assert drafter.asked[-1][0].tokens == [1, 2, 3, 4, 90, 300, 301]


def test_how_the_target_draws_is_known_to_the_drafters(serve: Serve) -> None:
    drafter = Counting()
    target = serve(drafter).target()
    sampling = Sampling(seed=5, max_tokens=7, temperature=0.5, top_k=9)
    one = opened(1)
    one.sampling.CopyFrom(convert.sampling_to_proto(sampling))
    one.index = 2
    target.ask(open=[one, opened(2)])
    [sampled, greedy] = drafter.asked[0]
    assert sampled.draws is not None
    assert (sampled.draws.sampling, sampled.draws.output) == (sampling, 2)
    assert greedy.draws is None


def test_several_targets_are_drafted_for_together(serve: Serve) -> None:
    drafter = Counting()
    gate, serving = Gate(drafter), serve(drafter)
    targets = [serving.target() for _ in range(3)]
    gate.shut()
    targets[0].send(open=[opened(1)])
    gate.await_held()
    for number, target in enumerate(targets[1:], start=2):
        target.send(open=[opened(1, 100 * number), opened(2, 100 * number + 10)])
    time.sleep(0.1)  # for both to arrive
    gate.open()
    for number, target in enumerate(targets[1:], start=2):
        until(lambda target=target: len({one.sequence for one in target.drafts}) == 2 or target.read() is None)  # type: ignore[misc]
        assert guesses(target, 1)[0] == (1, [], [100 * number + step for step in (1, 2, 3, 4)])
    together = drafter.asked[1]
    assert len(together) == 4
    assert len({context.key for context in together}) == 4
    assert len({context.key[0] for context in together}) == 2


def test_who_waits_comes_before_who_goes_on(serve: Serve) -> None:
    drafter = Counting(probability=1.0)
    gate, serving = Gate(drafter), serve(drafter)
    first, second = serving.target(), serving.target()

    def hold(contexts: Sequence[Context]) -> None:
        if contexts[0].num_guessed == 8:
            gate.shut()
        gate._pass(contexts)

    drafter.before = hold
    first.send(open=[opened(1, max_nodes=MAX_NODES)])
    gate.await_held()
    second.send(open=[opened(1, 50)])
    time.sleep(0.1)  # for it to arrive
    drafter.before = gate._pass
    gate.open()
    until(lambda: len(drafter.asked) >= 6 and second.read() is not None)
    before, urgent, *after = drafter.asked[2:]
    assert [context.num_guessed for context in before] == [8]
    assert [(context.tokens, context.num_guessed) for context in urgent] == [([50], 0)]
    assert {context.key for contexts in after for context in contexts} >= {before[0].key, urgent[0].key}


def test_a_long_prompt_is_tried_again(serve: Serve) -> None:
    class Reading(Counting):
        """Has read the prompt only when it is asked for the third time."""

        def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
            drafts = super().propose(contexts, max_nodes)
            return drafts if len(self.asked) > 2 else [DraftTree()] * len(contexts)

    target = serve(Reading()).target()
    target.ask(open=[opened(1, *([1] * 2 * PATIENCE))])
    until(lambda: target.drafts or target.read() is None, "a draft")
    assert guesses(target, 1)[0] == (2 * PATIENCE, [], [2, 3, 4, 5])


def test_several_drafters_are_fused(serve: Serve) -> None:
    class Doubling(Counting):
        def _draft(self, last: int, size: int) -> DraftTree:
            return DraftTree.chain([last + 1, 2 * last], [0.5, 0.25])

    target = serve(Counting(size=2), Doubling()).target()
    target.ask(open=[opened(1, 10)])
    [first, *_] = target.drafts
    assert (list(first.token_ids), list(first.parents)) == ([11, 12, 20], [ROOT, 0, 0])
    assert list(first.probabilities) == pytest.approx([0.9, 0.9, 0.25])


def test_a_drafter_that_says_too_much_is_cut(serve: Serve) -> None:
    class Talking(Counting):
        def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
            assert max_nodes <= FIRST_NODES
            return [DraftTree.chain(range(100, 300), [0.99] * 200) for _ in contexts]

    target = serve(Talking()).target()
    target.ask(open=[opened(1)])
    assert len(guesses(target, 1)[0][2]) == MAX_NODES


# What it keeps


def test_the_sequences_told_of_last_are_kept(serve: Serve) -> None:
    drafter = Counting()
    serving = serve(drafter, max_sequences=2)
    target, other = serving.target(), serving.target()
    target.ask(open=[opened(1), opened(2)])
    target.ask(commit=[commit(1, 3, 4)])
    other.ask(open=[opened(1)])  # in place of the second
    target.ask(commit=[commit(1, 4, 9), commit(2, 3, 4), commit(3, 3, 4)])
    assert target.nacks == [2, 3]
    assert not other.nacks
    assert serving.server.stats.num_sequences == 2
    target.ask(open=[opened(4, 1, 2, 3, 4)])  # the second again, in place of the other target's
    target.ask(commit=[commit(4, 4, 7)])
    other.ask(commit=[commit(1, 3, 4)])
    assert target.nacks == [2, 3]
    assert other.nacks == [1]
    assert len(drafter.forgotten) == len(set(drafter.forgotten)) == 2


def test_a_gap_is_answered_with_a_nack(serve: Serve) -> None:
    drafter = Counting()
    target = serve(drafter).target()
    target.ask(open=[opened(1)])
    target.ask(commit=[commit(1, 4, 9)])
    assert target.nacks == [1]
    target.ask(commit=[commit(1, 3, 9)])  # nothing is known of it now
    assert target.nacks == [1, 1]
    assert len(drafter.forgotten) == 1


def test_closing_frees(serve: Serve) -> None:
    drafter, second = Counting(), Counting()
    serving = serve(drafter, second)
    target, other = serving.target(), serving.target()
    target.ask(open=[opened(1), opened(2), opened(3)])
    other.ask(open=[opened(1)])
    target.ask(close=[2, 77])
    [closed] = drafter.forgotten
    assert closed[1] == 2
    assert serving.server.stats.num_sequences == 3
    target.ask(open=[opened(1)])  # opened again: what was before is gone
    assert [key[1] for key in drafter.forgotten] == [2, 1]
    target.channel.close()
    until(lambda: serving.server.stats.num_targets == 1, "the target's end")
    assert [key[1] for key in drafter.forgotten[2:]] == [1, 3] or [key[1] for key in drafter.forgotten[2:]] == [3, 1]
    assert second.forgotten == drafter.forgotten
    assert serving.server.stats.num_sequences == 1
    other.ask(commit=[commit(1, 3, 9)])
    assert not other.nacks


# What its drafters learn


def test_what_was_verified_is_told_to_the_drafters(serve: Serve) -> None:
    drafter = Counting(num_top_ids=2)
    target = serve(drafter).target()
    target.ask(open=[opened(1, 1, 2, 3, salt="mine")])
    told = pb.Verification(
        num_new=3, token_ids=[4, 9, 5], parents=[ROOT, ROOT, 0], accepted=[0, 2], top_ids=[4, 1, 5, 2, 8, 7, 6, 3]
    )
    target.ask(commit=[commit(1, 3, 4, 5, 6, verification=told), commit(99, 3, 4, verification=told)])
    [one] = drafter.learnt
    assert (one.context.tokens, one.context.salt, one.context.num_prompt) == ([1, 2, 3, 4, 5, 6], "mine", 3)
    assert (one.num_new, one.nodes) == (3, (0, 2))
    assert (one.draft.tokens, one.draft.parents) == ((4, 9, 5), (ROOT, ROOT, 0))
    assert list(one.top_ids) == [[4, 1], [5, 2], [8, 7], [6, 3]]
    one.draft.check()


def test_an_output_may_end_with_an_accepted_token(serve: Serve) -> None:
    """A stop token within a draft: the step adds no token of the target's own."""
    drafter = Counting(num_top_ids=1)
    target = serve(drafter).target()
    target.ask(open=[opened(1)])
    told = pb.Verification(num_new=2, token_ids=[4, 5, 6], parents=[ROOT, 0, 1], accepted=[0, 1], top_ids=[4, 5, 6, 7])
    target.ask(commit=[commit(1, 3, 4, 5, verification=told)])
    assert [(one.num_new, one.nodes) for one in drafter.learnt] == [(2, (0, 1))]


def test_recycled_tokens_are_drafted_when_the_text_comes_again(serve: Serve) -> None:
    text = [(37 * step * step + 11 * step) % 4000 for step in range(40)]
    target = serve(Recycling()).target()
    target.ask(open=[opened(1, *text[:3], salt="mine")])
    for place in range(3, len(text)):
        told = pb.Verification(num_new=1, top_ids=[text[place], *range(4001, 4000 + NUM_RANKS)])
        target.ask(commit=[commit(1, place, text[place], verification=told)])
    target.ask(open=[opened(2, *text[:10], salt="mine"), opened(3, *text[:10], salt="another's")])
    until(lambda: any(one.assumed for one in target.drafts if one.sequence == 2) or target.read() is None)
    first, second, *_ = guesses(target, 2)
    assert first[2][0] == text[10]
    assert second[1] == text[10 : 10 + len(second[1])]
    assert not guesses(target, 3)


# What it does not accept

OUT = VOCAB_SIZE
MALFORMED: dict[str, pb.DraftBatch] = {
    "open of no tokens": pb.DraftBatch(number=2, open=[pb.Open(sequence=2, max_nodes=4)]),
    "open of another vocabulary": pb.DraftBatch(number=2, open=[opened(2, 1, OUT)]),
    "open without a prompt": pb.DraftBatch(number=2, open=[pb.Open(sequence=2, token_ids=[1], max_nodes=4)]),
    "a prompt beyond its tokens": pb.DraftBatch(number=2, open=[pb.Open(sequence=2, token_ids=[1], num_prompt=2)]),
    "commit of another vocabulary": pb.DraftBatch(number=2, commit=[commit(1, 3, 2**32 - 1)]),
} | {
    f"verification with {kind}": pb.DraftBatch(
        number=2, commit=[commit(1, 3, 4, 5, verification=pb.Verification(**{**valid, **changes}))]
    )
    for valid in [{"num_new": 2, "token_ids": [4, 8], "parents": [ROOT, 0], "accepted": [0], "top_ids": [4, 5, 6]}]
    for kind, changes in {
        "too few parents": {"parents": [ROOT]},
        "a later parent": {"parents": [1, ROOT]},
        "no parent": {"parents": [-2, 0]},
        "nothing new": {"num_new": 0, "accepted": []},
        "too much new": {"num_new": 3},
        "more than there is": {"num_new": 6, "accepted": [0] * 5},
        "what was not drafted accepted": {"accepted": [2]},
        "uneven rows": {"top_ids": [4, 5]},
        "tokens of another vocabulary": {"token_ids": [4, OUT]},
        "top tokens of another vocabulary": {"top_ids": [4, 5, OUT]},
    }.items()
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_cannot_be_ends_that_channel_alone(serve: Serve, kind: str) -> None:
    serving = serve(Counting(num_top_ids=1), Recycling())
    target, other = serving.target(), serving.target()
    target.ask(open=[opened(1)])
    target.channel.send(pb.TargetFrame(batch=MALFORMED[kind]).SerializeToString())
    target.await_end()
    other.ask(open=[opened(1)])
    assert other.drafts
    until(lambda: serving.server.stats.num_targets == serving.server.stats.num_sequences == 1)
    serving.server.check()


@pytest.mark.parametrize("data", [b"\xff" * 5, b"\x12\x05\x08"], ids=["garbage", "cut"])
def test_what_is_no_frame_ends_that_channel_alone(serve: Serve, data: bytes) -> None:
    serving = serve(Counting())
    target, other = serving.target(), serving.target()
    target.channel.send(data)
    target.await_end()
    assert "not a frame of this protocol" in target.frames[-1].refusal
    with socket.create_connection(tuple(serving.address.split(":"))) as raw:  # type: ignore[arg-type]
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")  # a length that no frame has
        raw.settimeout(PATIENCE_S)
        while raw.recv(10):  # in TLS, it is told why
            pass
    other.ask(open=[opened(1)])
    serving.server.check()


def test_an_empty_frame_is_a_batch_of_nothing(serve: Serve) -> None:
    serving = serve(Counting())
    target = serving.target()
    target.channel.send(b"")
    target.ask(open=[opened(1)])
    assert target.drafts


def test_the_last_words_of_a_target_are_no_reason_to_complain(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    serving = serve(Counting())
    target = serving.target()
    target.send(open=[opened(1)])
    target.send(close=[1])
    target.channel.close()
    until(lambda: serving.server.stats.num_targets == 0)
    assert not caplog.records


@pytest.mark.parametrize("secrecy", [None])
def test_a_target_that_does_not_read_is_dropped(serve: Serve) -> None:
    serving = serve(Counting())
    other = serving.target()
    serving.server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # channels take it over
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = serving.address.split(":")
        raw.connect((host, int(port)))
        raw.sendall(framed(pb.TargetFrame(hello=hello())))
        until(lambda: serving.server.stats.num_targets == 2)
        batch = framed(pb.TargetFrame(batch=pb.DraftBatch(number=1, open=[opened(number) for number in range(64)])))

        def is_dropped() -> bool:
            if serving.server.stats.num_targets == 2:
                with contextlib.suppress(OSError):
                    raw.sendall(batch)
            return serving.server.stats.num_targets == 1

        until(is_dropped, "the end of the channel")
    other.ask(open=[opened(1)])
    assert other.drafts
    until(lambda: serving.server.stats.num_sequences == 1)
    serving.server.check()


def framed(frame: pb.TargetFrame) -> bytes:
    data = frame.SerializeToString()
    return LENGTH.pack(len(data)) + data


# Beginning and end


def test_nothing_is_left_when_it_has_stopped() -> None:
    num_files, num_threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    drafter = Counting()
    server = make(drafter)
    address = server.start("127.0.0.1")
    with target_of(address) as target:
        target.ask(open=[opened(1), opened(2)])
        server.check()
        server.stop()
        server.stop()
        target.await_end()
    assert {key[1] for key in drafter.forgotten} == {1, 2}
    assert threading.active_count() == num_threads
    assert len(os.listdir("/proc/self/fd")) == num_files
    assert server.stats.num_targets == server.stats.num_sequences == 0
    server.check()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(tuple(address.split(":")))  # type: ignore[arg-type]


def test_stopping_what_was_never_started_does_nothing() -> None:
    server = make(Counting())
    server.stop()
    server.check()
    server._selector.close()


def test_an_address_that_cannot_be_bound_is_told() -> None:
    server = make(Counting())
    with pytest.raises(SetupError, match=r"cannot listen on 192\.0\.2\.1: .*; set drafter\.host"):
        server.start("192.0.2.1")
    server.stop()
    server._selector.close()


def test_a_drafter_that_fails_ends_the_server_and_check_says_so(serve: Serve) -> None:
    def fail(contexts: Sequence[Context]) -> NoReturn:
        raise RuntimeError("no more memory")

    drafter = Counting()
    serving = serve(drafter)
    target = serving.target()
    target.ask(open=[opened(1)])
    drafter.before = fail
    target.send(commit=[commit(1, 3, 90)])
    target.await_end()
    until(lambda: not serving.server._thread.is_alive())
    with pytest.raises(EngineFailure, match="the drafter failed: no more memory"):
        serving.server.check()
    serving.server.stop()


def test_a_drafter_that_hangs_is_found_out(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = Counting()
    gate, serving = Gate(drafter), serve(drafter)
    target = serving.target()
    gate.shut()
    target.send(open=[opened(1)])
    gate.await_held()
    serving.server.check()
    monkeypatch.setattr(module, "STALL_S", 0.0)
    with pytest.raises(EngineFailure, match="has been running for more than"):
        serving.server.check()
    monkeypatch.setattr(module, "STALL_S", 60.0)
    gate.open()
    until(lambda: target.read() and target.drafts)
    serving.server.check()


def test_what_it_does_is_counted(serve: Serve) -> None:
    serving = serve(Counting(probability=0.2))
    first, second = serving.target(), serving.target()
    first.ask(open=[opened(1), opened(2)])
    second.ask(open=[opened(1)])
    first.ask(commit=[commit(1, 3, 90)])
    stats = serving.server.stats
    assert (stats.num_targets, stats.num_sequences) == (2, 3)
    assert (stats.num_batches, stats.num_drafts, stats.num_nodes, stats.num_ahead) == (3, 4, 16, 0)
