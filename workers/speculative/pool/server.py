"""A drafter's process: it drafts for the sequences of many targets, one batch after the other.

One thread owns the channels, the sequences and the drafters. A round reads what has come, drafts for the sequences that
have nothing after their last token, because their targets may be waiting, and only if there are none for those whose
drafts can still grow. Targets learn by a number what has been answered.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import logging
import selectors
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from protos import convert
from protos.errors import EngineFailure, SetupError
from protos.tls import Certificates
from protos.tracing import Tracer
from protos.v1 import drafting_pb2 as pb
from workers.speculative.fusion import fuse
from workers.speculative.pool.channel import Channel
from workers.speculative.pool.drafted import Drafted
from workers.speculative.pool.stats import DrafterStats
from workers.speculative.protocol import Context, Drafter, Draws, Verified
from workers.speculative.tree import MAX_NODES, ROOT, DraftTree

log = logging.getLogger(__name__)

FIRST_NODES = 4  # drafted at once where a target may be waiting; the rest follows
AHEAD_NODES = 4
MAX_STRANGERS = 16  # channels that have not shown the token; beyond, the oldest is closed
IDLE_S = 0.5
STALL_S = 60.0


@dataclass(slots=True, eq=False)
class _Target:
    """One worker's channel. Mutated only by DraftServer."""

    number: int
    host: str
    channel: Channel
    is_known: bool = False  # has shown the token
    sequences: dict[int, Drafted] = field(default_factory=dict)
    frame: pb.DraftFrame = field(default_factory=pb.DraftFrame)  # being filled
    owes: bool = False  # a batch has not been answered


class DraftServer:
    """Listens from `start` to `stop`. Everything else happens on its own thread."""

    def __init__(
        self,
        drafters: Sequence[Drafter],
        *,
        token: str,
        vocabulary: bytes,
        vocab_size: int,
        max_sequences: int,
        certificates: Certificates | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`vocabulary`, `vocab_size`: the targets', which the drafters speak; others are refused.

        `certificates`: targets must show one of the same authority; None: plain text. `tracer` None: traces nothing.
        """
        self._tracer = tracer or Tracer(None, role="drafter", instance="")
        self._drafters = drafters
        self._numbers = range(len(drafters))
        self._token = token
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._max_sequences = max_sequences
        self._certificates = certificates
        self._selector = selectors.DefaultSelector()
        self._targets: dict[int, _Target] = {}
        self._sequences: OrderedDict[Drafted, tuple[_Target, int]] = OrderedDict()  # the latest told last
        self._wanting: dict[Drafted, None] = {}
        self._growing: dict[Drafted, None] = {}
        self._num_targets = itertools.count(1)
        self._refused: dict[str, str] = {}  # host to what was logged of it last
        self._stopping = False
        self._round_began: float | None = None
        self._failure: str | None = None
        self._stats = DrafterStats()
        self._thread = threading.Thread(target=self._run, name="drafter", daemon=True)

    @property
    def stats(self) -> DrafterStats:
        return self._stats._replace(num_targets=len(self._targets), num_sequences=len(self._sequences))

    def start(self, host: str) -> str:
        """Listen; returns host:port. Raises SetupError."""
        try:
            self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise SetupError(f"cannot listen on {host}: {error.strerror}; set drafter.host") from error
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._waker, wake = socket.socketpair()
        self._selector.register(wake, selectors.EVENT_READ)
        self._woken = wake
        self._thread.start()
        return f"{host}:{self._listener.getsockname()[1]}"

    def check(self) -> None:
        """Raises EngineFailure if drafting has failed or hangs."""
        if self._failure is not None:
            raise EngineFailure(self._failure)
        began = self._round_began
        if began is not None and time.monotonic() - began > STALL_S:
            raise EngineFailure(f"a round of drafting has been running for more than {STALL_S} s")

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread and every channel: targets go on without drafts. Idempotent."""
        if self._stopping or not self._thread.is_alive():
            return
        self._stopping = True
        with contextlib.suppress(OSError):  # it has just failed, and closed everything
            self._waker.send(b"x")
        self._thread.join(timeout_s)

    # On the drafting thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._round()
        except Exception as error:
            log.exception("the drafter failed")
            self._failure = f"the drafter failed: {error}"
        finally:
            for target in list(self._targets.values()):
                self._drop(target)
            for end in (self._listener, self._waker, self._woken):
                end.close()
            self._selector.close()

    def _round(self) -> None:
        self._round_began = None
        is_busy = bool(self._wanting or self._growing)
        ready = self._selector.select(0 if is_busy else IDLE_S)
        self._round_began = time.monotonic()
        for key, _ in ready:
            if key.fileobj is self._listener:
                self._accept()
            elif key.data is not None:
                self._read(key.data)
        if self._wanting:
            self._draft(self._wanting, FIRST_NODES)
        elif not any(target.owes for target in self._targets.values()) and self._growing:
            self._draft(self._growing, AHEAD_NODES)
        self._answer()

    def _accept(self) -> None:
        try:
            connection, (host, *_) = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # it has gone again
        strangers = [target for target in self._targets.values() if not target.is_known]
        if len(strangers) >= MAX_STRANGERS:
            self._drop(strangers[0])
        target = _Target(next(self._num_targets), host, Channel.accepted(connection, self._certificates))
        self._targets[target.number] = target
        self._selector.register(target.channel, selectors.EVENT_READ, target)

    def _read(self, target: _Target) -> None:
        try:
            for data in target.channel.receive():
                if target.channel.is_open:
                    self._handle(target, pb.TargetFrame.FromString(data))
        except (ValueError, DecodeError) as error:
            self._refuse(target, f"not a frame of this protocol: {error}")
        if not target.channel.is_open:
            if target.channel.trouble:
                self._complain(target, target.channel.trouble)
            self._drop(target)

    def _handle(self, target: _Target, frame: pb.TargetFrame) -> None:
        if frame.WhichOneof("kind") == "hello":
            self._greet(target, frame.hello)
        elif target.is_known:
            self._take(target, frame.batch)
        else:
            self._refuse(target, "say hello first")

    def _greet(self, target: _Target, hello: pb.TargetHello) -> None:
        if not hmac.compare_digest(hello.token.encode(), self._token.encode()):
            self._refuse(target, "the session token is missing or wrong; workers and drafters must share one")
        elif (hello.vocabulary, hello.vocab_size) != (self._vocabulary, self._vocab_size):
            self._refuse(target, "it serves a model with another vocabulary")
        else:
            target.is_known = True
            self._refused.pop(target.host, None)
            num_top_ids = max(drafter.num_top_ids for drafter in self._drafters)
            self._send(target, pb.DrafterFrame(hello=pb.DrafterHello(num_top_ids=num_top_ids)))

    def _take(self, target: _Target, batch: pb.DraftBatch) -> None:
        for number in batch.close:
            self._close(target, number)
        for opened in batch.open:
            self._open(target, opened)
        verified = [one for commit in batch.commit if (one := self._commit(target, commit)) is not None]
        if verified:
            for drafter in self._drafters:
                drafter.learn(verified)
        target.frame.number = batch.number
        target.owes = True

    def _open(self, target: _Target, opened: pb.Open) -> None:
        self._check_tokens(opened.token_ids)
        if not 0 < opened.num_prompt <= len(opened.token_ids):
            raise ValueError(f"a sequence of {len(opened.token_ids)} tokens, a prompt of {opened.num_prompt}")
        self._close(target, opened.sequence)
        while len(self._sequences) >= self._max_sequences:
            oldest = next(iter(self._sequences))
            self._close(*self._sequences[oldest])
        sequence = Drafted(
            (f"{target.number}", opened.sequence),
            opened.salt,
            list(opened.token_ids),
            opened.num_prompt,
            max_nodes=opened.max_nodes,
            draws=_draws(opened),
            traceparent=opened.traceparent,
        )
        target.sequences[opened.sequence] = sequence
        self._sequences[sequence] = target, opened.sequence
        self._wanting[sequence] = None

    def _commit(self, target: _Target, commit: pb.Commit) -> Verified | None:
        """What the drafters learn of it, if they want to."""
        for token_ids in (commit.token_ids, commit.verification.token_ids, commit.verification.top_ids):
            self._check_tokens(token_ids)
        sequence = target.sequences.get(commit.sequence)
        if sequence is None or not sequence.follow(commit.first, list(commit.token_ids)):
            self._close(target, commit.sequence)
            target.frame.nacks.add(sequence=commit.sequence)
            return None
        self._sequences.move_to_end(sequence)
        if commit.max_nodes:
            sequence.max_nodes = commit.max_nodes
        (self._wanting if sequence.is_wanting else self._growing)[sequence] = None
        return _verified(sequence, commit) if commit.HasField("verification") else None

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        """Raises ValueError for a token that no drafter knows."""
        if max(token_ids, default=0) >= self._vocab_size:
            raise ValueError(f"token {max(token_ids)} of a vocabulary of {self._vocab_size}")

    def _close(self, target: _Target, number: int) -> None:
        sequence = target.sequences.pop(number, None)
        if sequence is None:
            return
        for place in (self._sequences, self._wanting, self._growing):
            place.pop(sequence, None)
        self._trace(sequence)
        for drafter in self._drafters:
            drafter.forget(sequence.key)

    def _trace(self, sequence: Drafted) -> None:
        counts = {
            "headwater.drafted_tokens": sequence.num_drafted,
            "headwater.followed_tokens": len(sequence.tokens) - sequence.num_first,
        }
        now, begin = time.monotonic(), sequence.opened
        self._tracer.record("drafter", sequence.traceparent, begin=begin, end=now, attributes=counts)

    def _draft(self, sequences: dict[Drafted, None], max_nodes: int) -> None:
        """One step of all drafters for these sequences, each where it is worth most; they may grow on after it."""
        work = [(sequence, context) for sequence in sequences if (context := sequence.next()) is not None]
        sequences.clear()
        if not work:
            return
        contexts = [context for _, context in work]
        proposed = [drafter.propose(contexts, max_nodes) for drafter in self._drafters]
        num_nodes = 0
        for (sequence, _), *drafts in zip(work, *proposed, strict=True):
            assumed, new = sequence.grow(fuse(drafts, self._numbers).cut(MAX_NODES))
            self._growing[sequence] = None
            num_nodes += len(new)
            if len(new):
                target, number = self._sequences[sequence]
                target.frame.drafts.append(_draft_to_proto(number, sequence, assumed, new))
        self._stats = self._stats.plus(len(work), num_nodes, is_ahead=sequences is self._growing)

    def _answer(self) -> None:
        """Send what there is to say, and to those who may be waiting that this is all for now."""
        for target in list(self._targets.values()):
            if target.owes or target.frame.drafts or target.frame.nacks:
                self._send(target, pb.DrafterFrame(drafts=target.frame))
                target.frame = pb.DraftFrame(number=target.frame.number)
                target.owes = False

    def _send(self, target: _Target, frame: pb.DrafterFrame) -> None:
        target.channel.send(frame.SerializeToString())
        if target.channel.has_unsent or not target.channel.is_open:
            self._drop(target)  # it does not read: it shall come back when it can

    def _refuse(self, target: _Target, reason: str) -> None:
        self._complain(target, f"is refused: {reason}")
        target.channel.send(pb.DrafterFrame(refusal=reason).SerializeToString())
        self._drop(target)

    def _complain(self, target: _Target, trouble: str) -> None:
        if self._refused.get(target.host) == trouble:
            return  # said once, though it comes again and again
        log.warning("a target at %s %s", target.host, trouble)
        if len(self._refused) >= MAX_STRANGERS:
            self._refused.clear()
        self._refused[target.host] = trouble

    def _drop(self, target: _Target) -> None:
        if self._targets.pop(target.number, None) is None:
            return
        for number in list(target.sequences):
            self._close(target, number)
        self._selector.unregister(target.channel)
        target.channel.close()


def _draws(opened: pb.Open) -> Draws | None:
    if not opened.HasField("sampling"):
        return None
    return Draws(convert.sampling_from_proto(opened.sampling), opened.index)


def _verified(sequence: Drafted, commit: pb.Commit) -> Verified:
    """Raises ValueError for a verification that cannot be."""
    told = commit.verification
    tokens, parents, num_rows = tuple(told.token_ids), tuple(told.parents), len(told.token_ids) + 1
    width = len(told.top_ids) // num_rows
    is_tree = len(parents) == len(tokens) and all(ROOT <= parent < node for node, parent in enumerate(parents))
    is_new = told.num_new in (len(told.accepted), len(told.accepted) + 1) and 0 < told.num_new <= len(sequence.tokens)
    is_told = is_new and width * num_rows == len(told.top_ids)  # an output may end with an accepted token
    if not is_tree or not is_told or any(node >= len(tokens) for node in told.accepted):
        raise ValueError(f"a verification of {len(tokens)} nodes, {len(parents)} parents, {told.num_new} new tokens")
    return Verified(
        Context(sequence.key, sequence.salt, sequence.tokens, sequence.num_prompt),
        told.num_new,
        DraftTree(tokens, parents, (0.5,) * len(tokens), (1,) * len(tokens)),
        tuple(told.accepted),
        [list(told.top_ids[row * width : (row + 1) * width]) for row in range(num_rows)],
    )


def _draft_to_proto(number: int, sequence: Drafted, assumed: Sequence[int], draft: DraftTree) -> pb.Draft:
    return pb.Draft(
        sequence=number,
        base_len=len(sequence.tokens),
        assumed=assumed,
        token_ids=draft.tokens,
        parents=draft.parents,
        probabilities=draft.probabilities,
    )
