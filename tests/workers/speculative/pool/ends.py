"""Ends of channels for tests: a drafter and a target that do and say what a test tells them, over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Self

from protos.tls import Certificates
from protos.v1 import drafting_pb2 as pb
from workers.speculative.pool.channel import Channel
from workers.speculative.pool.lane import Lane
from workers.speculative.protocol import Context, Key, Verified
from workers.speculative.tree import ROOT, DraftTree

TOKEN = "of these tests"
VOCABULARY = b"v" * 32
VOCAB_SIZE = 4096
PATIENCE_S = 20.0  # a test fails after it


def hello(**changes: object) -> pb.TargetHello:
    fields: dict[str, object] = {"token": TOKEN, "vocabulary": VOCABULARY, "vocab_size": VOCAB_SIZE, **changes}
    return pb.TargetHello(**fields)  # type: ignore[arg-type]


def until(is_done: Callable[[], object], what: str = "what was waited for") -> None:
    """Look again and again."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_done():
        assert time.monotonic() < deadline, f"{what} does not happen"
        time.sleep(0.0005)


def draft(sequence: int, base_len: int, tree: DraftTree, assumed: Sequence[int] = ()) -> pb.Draft:
    return pb.Draft(
        sequence=sequence,
        base_len=base_len,
        assumed=assumed,
        token_ids=tree.tokens,
        parents=tree.parents,
        probabilities=tree.probabilities,
    )


def chain(*tokens: int, probability: float = 0.5) -> DraftTree:
    return DraftTree.chain(tokens, [probability] * len(tokens))


def lanes(certificates: Certificates | None) -> Callable[..., Lane]:
    """How a pool makes lanes that show these."""
    return partial(Lane, connect=partial(Channel.connect, certificates=certificates))


Reply = Callable[[pb.DraftBatch], pb.DraftFrame | None]


def silent(batch: pb.DraftBatch) -> pb.DraftFrame | None:
    """A drafter that hangs."""
    return None


def nothing(batch: pb.DraftBatch) -> pb.DraftFrame | None:
    """A drafter that answers, and has no drafts."""
    return pb.DraftFrame(number=batch.number)


class ScriptedDrafter:
    """A drafter's end: greets, keeps what it is told, and answers each batch as `reply` says. Use with `with`."""

    def __init__(
        self,
        reply: Reply = nothing,
        *,
        num_top_ids: int = 0,
        refusal: str = "",
        certificates: Certificates | None = None,
    ) -> None:
        self.reply = reply
        self._certificates = certificates
        self.hellos: list[pb.TargetHello] = []
        self.batches: list[pb.DraftBatch] = []
        self.num_connections = 0
        self.num_top_ids = num_top_ids
        self.refusal = refusal
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._listener.settimeout(0.001)
        self._channels: list[Channel] = []
        self._lock = threading.Lock()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopping = True
        self._thread.join()

    @property
    def latest(self) -> pb.DraftBatch:
        return self.batches[-1]

    def say(self, frame: pb.DraftFrame) -> None:
        """Send drafts that nobody asked for."""
        self.say_raw(pb.DrafterFrame(drafts=frame).SerializeToString())

    def say_raw(self, data: bytes) -> None:
        with self._lock:
            for channel in self._channels:
                channel.send(data)

    def hang_up(self) -> None:
        """Close every channel; new ones are taken."""
        with self._lock:
            for channel in self._channels:
                channel.close()
            self._channels.clear()

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                pass
            else:
                with self._lock:
                    self._channels.append(Channel.accepted(connection, self._certificates))
                    self.num_connections += 1
            with self._lock:
                for channel in self._channels:
                    self._serve(channel)
                self._channels = [channel for channel in self._channels if channel.is_open]
        self.hang_up()
        self._listener.close()

    def _serve(self, channel: Channel) -> None:
        for data in channel.receive():
            frame = pb.TargetFrame.FromString(data)
            if frame.WhichOneof("kind") == "hello":
                self.hellos.append(frame.hello)
                if self.refusal:
                    channel.send(pb.DrafterFrame(refusal=self.refusal).SerializeToString())
                    channel.close()
                else:
                    greeting = pb.DrafterHello(num_top_ids=self.num_top_ids)
                    channel.send(pb.DrafterFrame(hello=greeting).SerializeToString())
                continue
            answer = self.reply(frame.batch)
            if answer is not None:
                channel.send(pb.DrafterFrame(drafts=answer).SerializeToString())
            self.batches.append(frame.batch)


class ScriptedTarget:
    """A target's end. Used from the test's thread."""

    def __init__(self, address: str, certificates: Certificates | None = None) -> None:
        self.channel = Channel.connect(address, certificates)
        self.frames: list[pb.DrafterFrame] = []
        self._num_batches = 0

    def send(self, *, say: pb.TargetHello | None = None, **fields: object) -> int:
        """A hello, or a batch, whose number is returned."""
        if say is not None:
            self.channel.send(pb.TargetFrame(hello=say).SerializeToString())
            return 0
        self._num_batches += 1
        batch = pb.DraftBatch(number=self._num_batches, **fields)  # type: ignore[arg-type]
        self.channel.send(pb.TargetFrame(batch=batch).SerializeToString())
        return self._num_batches

    def read(self) -> list[pb.DrafterFrame]:
        self.channel.flush()
        self.frames += [pb.DrafterFrame.FromString(data) for data in self.channel.receive()]
        return self.frames

    def greet(self) -> pb.DrafterHello:
        self.send(say=hello())
        until(lambda: self.read(), "a greeting")
        return self.frames[0].hello

    def ask(self, **fields: object) -> None:
        """Send a batch and wait for its answer."""
        number = self.send(**fields)
        until(lambda: self.read() and self.frames[-1].drafts.number >= number, "an answer")

    def await_end(self) -> None:
        """The other side closes."""
        until(lambda: self.read() is None or not self.channel.is_open, "the channel's end")

    @property
    def drafts(self) -> list[pb.Draft]:
        return [draft for frame in self.frames for draft in frame.drafts.drafts]

    @property
    def nacks(self) -> list[int]:
        return [nack.sequence for frame in self.frames for nack in frame.drafts.nacks]


@contextmanager
def target_of(
    address: str, *, greets: bool = True, certificates: Certificates | None = None
) -> Iterator[ScriptedTarget]:
    target = ScriptedTarget(address, certificates)
    try:
        if greets:
            target.greet()
        yield target
    finally:
        target.channel.close()


class Counting:
    """A Drafter that counts on: after token t comes t + 1. Keeps what it is asked and told."""

    name = "counting"

    def __init__(self, *, num_top_ids: int = 0, size: int = 4, probability: float = 0.9) -> None:
        self.num_top_ids = num_top_ids
        self._size = size
        self._probability = probability
        self.asked: list[list[Context]] = []
        self.learnt: list[Verified] = []
        self.forgotten: list[Key] = []
        self.before: Callable[[Sequence[Context]], None] = lambda contexts: None

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        self.before(contexts)
        self.asked.append([context._replace(tokens=list(context.tokens)) for context in contexts])
        return [self._draft(context.tokens[-1], min(max_nodes, self._size)) for context in contexts]

    def learn(self, verified: Sequence[Verified]) -> None:
        for one in verified:
            self.learnt.append(one._replace(context=one.context._replace(tokens=list(one.context.tokens))))

    def forget(self, key: Key) -> None:
        self.forgotten.append(key)

    def _draft(self, last: int, size: int) -> DraftTree:
        tokens = [(last + 1 + step) % VOCAB_SIZE for step in range(size)]
        return DraftTree.chain(tokens, [self._probability] * size)


def walk(tree: DraftTree) -> list[int]:
    """The tokens along a tree's first child, and so on."""
    tokens, node = [], ROOT
    while True:
        below = [number for number, parent in enumerate(tree.parents) if parent == node]
        if not below:
            return tokens
        node = below[0]
        tokens.append(tree.tokens[node])
