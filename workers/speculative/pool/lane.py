"""One drafter, as a worker sees it: a channel, what has been sent over it, and whether its answers are worth a wait."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from google.protobuf.message import DecodeError

from protos.v1 import drafting_pb2 as pb
from workers.speculative.pool.channel import Channel

log = logging.getLogger(__name__)

MAX_BEHIND = 4  # batches without an answer; nothing more is sent to such a drafter until it answers
RECONNECT_S = 0.5
GREETING_S = 10.0  # a drafter that has not greeted by then does not speak this protocol, or hangs
MAX_TOP_IDS = 64  # of each row, whatever a drafter asks for


class Lane:
    """Mutated only by Pool. Connects by itself, again and again, until it is closed."""

    def __init__(
        self,
        drafter_id: str,
        address: str,
        hello: pb.TargetHello,
        *,
        connect: Callable[[str], Channel] = Channel.connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.drafter_id = drafter_id
        self.address = address
        self._hello = pb.TargetFrame(hello=hello).SerializeToString()
        self._connect = connect
        self._clock = clock
        self._retry_at = 0.0
        self._greets_by = 0.0
        self._channel: Channel | None = None
        self._is_closed = False
        self._trouble = ""  # as it was logged last
        self.epoch = 0  # connections so far: what was opened on an earlier one is not open now
        self.num_top_ids = 0
        self.is_ready = False  # greeted
        self.batch = pb.DraftBatch()  # being filled
        self._num_sent = 0
        self._num_answered = 0
        self._num_due = 0  # batches that were sent before the step at hand

    @property
    def is_late(self) -> bool:
        """Whether a batch of an earlier step has not been answered yet: a wait would be in vain."""
        return self._num_answered < self._num_due

    @property
    def num_behind(self) -> int:
        """Batches that have not been answered."""
        return self._num_sent - self._num_answered

    @property
    def takes_more(self) -> bool:
        return self.is_ready and self.num_behind < MAX_BEHIND

    @property
    def channel(self) -> Channel | None:
        """To wait for; None while there is none."""
        return self._channel

    def receive(self) -> list[pb.DraftFrame]:
        """What has come since the last call. Also connects, when it is time to."""
        if self._channel is None:
            self._open()
            return []
        channel, drafts = self._channel, []
        if channel.has_unsent:
            channel.flush()
        for data in channel.receive():
            try:
                frame = pb.DrafterFrame.FromString(data)
            except DecodeError as error:
                self._complain(f"sends what is no frame of this protocol: {error}")
                channel.close()
                break
            match frame.WhichOneof("kind"):
                case "hello":
                    self.is_ready, self._trouble = True, ""
                    self.num_top_ids = min(frame.hello.num_top_ids, MAX_TOP_IDS)
                case "drafts":
                    self._num_answered = max(self._num_answered, min(frame.drafts.number, self._num_sent))
                    drafts.append(frame.drafts)
                case "refusal":
                    self._complain(f"refuses this worker: {frame.refusal}")
        if not channel.is_open:
            if channel.trouble:
                self._complain(channel.trouble)
            self.lose()
        elif not self.is_ready and self._clock() > self._greets_by:
            self._complain(
                f"has not greeted within {GREETING_S:g} s; perhaps one of the two lacks cluster.tls, or hangs"
            )
            self.lose()
        return drafts

    def flush(self) -> None:
        """Send the batch that has been filled, if there is anything in it and the drafter keeps up."""
        batch = self.batch
        if self._channel is None or not self.takes_more or not (batch.open or batch.commit or batch.close):
            return
        self._num_sent += 1
        batch.number = self._num_sent
        self._channel.send(pb.TargetFrame(batch=batch).SerializeToString())
        self.batch = pb.DraftBatch()
        if not self._channel.is_open:
            self.lose()

    def note_due(self) -> None:
        """A step begins: what is not answered by its end is late."""
        self._num_due = self._num_sent

    def lose(self) -> None:
        """Give the connection up, and try another one after a while."""
        if self._channel is not None:
            self._channel.close()
        self._channel, self.is_ready, self.num_top_ids = None, False, 0
        self._num_sent = self._num_answered = self._num_due = 0
        self.batch = pb.DraftBatch()
        self._retry_at = self._clock() + RECONNECT_S

    def close(self) -> None:
        """For good. Idempotent."""
        self._is_closed = True
        self.lose()

    def _open(self) -> None:
        now = self._clock()
        if self._is_closed or now < self._retry_at:
            return
        self._retry_at = now + RECONNECT_S
        try:
            self._channel = self._connect(self.address)
        except (OSError, ValueError) as error:
            self._complain(f"cannot be reached: {error}")
            return
        self._greets_by = now + GREETING_S
        self.epoch += 1
        self._channel.send(self._hello)

    def _complain(self, trouble: str) -> None:
        if trouble != self._trouble:  # said once, though it is tried again
            log.error("the drafter at %s %s", self.address, trouble)
        self._trouble = trouble
