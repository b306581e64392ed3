"""The pool as a drafter: a worker's side of the drafters that run elsewhere.

After every step the pool is told what was verified, and goes on drafting while the target computes. What it sends hangs
under what it has sent before, so a sequence's draft is a tree that is walked down as the target's tokens come: where
the target goes on as the tree foresaw, the next draft is here already, and the round trip costs nothing. Only where
nothing is left is there a wait, of at most the deadline. A drafter that is late, hung, gone or wrong costs that much
and no more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from protos import convert
from protos.v1 import drafting_pb2 as pb
from workers.speculative.fusion import graft
from workers.speculative.pool.channel import wait_for_any
from workers.speculative.pool.lane import Lane
from workers.speculative.pool.members import Members
from workers.speculative.protocol import Context, Key, Verified
from workers.speculative.stats import PoolStats
from workers.speculative.tree import MAX_NODES, ROOT, DraftTree

log = logging.getLogger(__name__)

WAIT_BELOW = 2  # a step waits if at least one of so many sequences has no draft


@dataclass(slots=True)
class _Entry:
    """A sequence as one drafter knows it. Mutated only by Pool."""

    number: int
    lane: Lane
    epoch: int  # of the lane, when it was opened
    num_told: int  # tokens that the drafter has been told
    num_tokens: int  # tokens after which the draft begins
    draft: DraftTree
    is_warm: bool = False  # the drafter has read the sequence: its drafts are worth a wait

    @property
    def is_open(self) -> bool:
        return self.lane.is_ready and self.lane.epoch == self.epoch

    def advance(self, tokens: Sequence[int]) -> None:
        """The sequence has these tokens now."""
        if len(tokens) > self.num_tokens:
            self.draft = self.draft.after(tokens[self.num_tokens :])
            self.num_tokens = len(tokens)


class Pool:
    """A Drafter whose drafts come over channels. See the module."""

    name = "pool"

    def __init__(
        self,
        members: Members,
        hello: pb.TargetHello,
        *,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
        make_lane: Callable[[str, str, pb.TargetHello], Lane] = Lane,
    ) -> None:
        """`hello`: what drafters must know of the target; `deadline_s`: the longest wait for them in one step."""
        self._members = members
        self._followed: Mapping[str, str] | None = None
        self._hello = hello
        self._deadline_s = deadline_s
        self._clock = clock
        self._make_lane = make_lane
        self._lanes: dict[str, Lane] = {}
        self._entries: dict[Key, _Entry] = {}
        self._num_opened = 0
        self._max_nodes = 0  # of a draft, as last asked for
        self._asked: dict[int, tuple[_Entry, Context]] = {}  # by number, in the step at hand
        self._counts = PoolStats()

    @property
    def num_top_ids(self) -> int:
        return max([lane.num_top_ids for lane in self._lanes.values()], default=0)

    @property
    def stats(self) -> PoolStats:
        return self._counts._replace(num_drafters=sum(lane.is_ready for lane in self._lanes.values()))

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        """See Drafter. Waits for drafters that have kept up so far, and until the deadline at most."""
        self._follow_members()
        self._max_nodes = max_nodes
        entries = [self._entry(context) for context in contexts]
        self._asked = {
            entry.number: (entry, context)
            for entry, context in zip(entries, contexts, strict=True)
            if entry is not None
        }
        self._receive(self._lanes.values())
        late = {lane.drafter_id for lane in self._lanes.values() if lane.is_late}
        for entry, context in self._asked.values():
            if entry.num_told < len(context.tokens):
                self._tell(entry, context)
        self._flush()
        self._wait(late)
        self._asked = {}
        return [DraftTree() if entry is None else entry.draft.cut(max_nodes) for entry in entries]

    def learn(self, verified: Sequence[Verified]) -> None:
        """Tell the drafters at once: they go on while the next step is prepared."""
        for one in verified:
            entry = self._entries.get(one.context.key)
            if entry is not None and entry.is_open:
                entry.advance(one.context.tokens)
                self._tell(entry, one.context, one)
        self._flush()

    def forget(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None and entry.is_open:
            entry.lane.batch.close.append(entry.number)  # with what is said next, if there are others
            if not self._entries:
                self._receive(self._lanes.values())  # answers that make room: this may be the last call for long
                self._flush()

    def close(self) -> None:
        """End all channels. Idempotent."""
        for lane in self._lanes.values():
            lane.close()

    def _follow_members(self) -> None:
        addresses = self._members.addresses
        if addresses is self._followed:
            return
        self._followed = addresses
        for drafter_id, lane in list(self._lanes.items()):
            if addresses.get(drafter_id) != lane.address:
                self._lanes.pop(drafter_id).close()
        for drafter_id, address in addresses.items():
            if drafter_id not in self._lanes:
                self._lanes[drafter_id] = self._make_lane(drafter_id, address, self._hello)

    def _entry(self, context: Context) -> _Entry | None:
        """The sequence at a drafter that takes it; None if there is none."""
        entry = self._entries.get(context.key)
        if entry is None or not entry.is_open or not entry.lane.takes_more:
            lane = self._choose(context.key)
            if lane is None:
                return entry if entry is not None and entry.is_open else None
            if entry is not None and entry.is_open:
                entry.lane.batch.close.append(entry.number)
            entry = _Entry(self._new_number(), lane, lane.epoch, 0, len(context.tokens), DraftTree())
            self._entries[context.key] = entry
        entry.advance(context.tokens)
        return entry

    def _new_number(self) -> int:
        self._num_opened += 1
        return self._num_opened

    def _choose(self, key: Key) -> Lane | None:
        """Where a sequence goes, of the drafters that keep up: always the same while they are the same."""
        able = [lane for lane in self._lanes.values() if lane.takes_more]
        return max(able, key=lambda lane: blake2b(f"{lane.drafter_id} {key}".encode()).digest(), default=None)

    def _tell(self, entry: _Entry, context: Context, verified: Verified | None = None) -> None:
        """Put what the drafter does not know of a sequence into its lane's next batch."""
        lane, tokens = entry.lane, context.tokens
        if not lane.takes_more:
            return
        if entry.num_told == 0:
            opened = lane.batch.open.add(
                sequence=entry.number,
                salt=context.salt,
                token_ids=tokens,
                num_prompt=context.num_prompt,
                max_nodes=self._max_nodes,
                traceparent=context.traceparent,
            )
            if context.draws is not None:
                opened.index = context.draws.output
                opened.sampling.CopyFrom(convert.sampling_to_proto(context.draws.sampling))
        else:
            commit = lane.batch.commit.add(
                sequence=entry.number,
                first=entry.num_told,
                token_ids=tokens[entry.num_told :],
                max_nodes=self._max_nodes,
            )
            if verified is not None and lane.num_top_ids and verified.top_ids:
                commit.verification.CopyFrom(_verification(verified))
        entry.num_told = len(tokens)

    def _flush(self) -> None:
        for lane in self._lanes.values():
            lane.flush()

    def _receive(self, lanes: Iterable[Lane]) -> None:
        for lane in lanes:
            for frame in lane.receive():
                self._counts = self._counts._replace(num_nacks=self._counts.num_nacks + len(frame.nacks))
                for nack in frame.nacks:
                    self._reopen(nack.sequence)
                for draft in frame.drafts:
                    self._take(draft, lane)

    def _reopen(self, number: int) -> None:
        """What the drafter has of a sequence is not what it has been told: begin anew, with another number."""
        asked = self._asked.pop(number, None)
        if asked is None:
            self._entries = {key: entry for key, entry in self._entries.items() if entry.number != number}
            return
        entry, _ = asked
        entry.number, entry.num_told = self._new_number(), 0
        self._asked[entry.number] = asked

    def _take(self, draft: pb.Draft, lane: Lane) -> None:
        """Hang a draft where it belongs, if the sequence has gone on as it assumes."""
        entry, context = self._asked.get(draft.sequence, (None, None))
        if entry is None or context is None or not entry.is_open:
            return  # of a sequence that has ended, or that this step computes without drafts
        entry.is_warm = True
        try:
            placed = _place(draft, _tree(draft, self._hello.vocab_size), context.tokens, entry.draft)
        except ValueError as error:
            log.error("the drafter at %s sends what is no draft: %s; it is left alone for now", lane.address, error)
            lane.lose()
            return
        except LookupError:  # the drafter goes on from what was dropped here, and would do so for long
            lane.batch.close.append(entry.number)
            self._reopen(entry.number)
            placed = None
        if placed is None:
            self._counts = self._counts._replace(num_stale=self._counts.num_stale + 1)
        else:
            entry.draft = placed

    def _wait(self, late: set[str]) -> None:
        """Until every sequence has a draft, or its drafter has answered or should have."""
        began = now = self._clock()
        deadline = began + self._deadline_s
        while waiting := self._waiting(late):
            if now >= deadline:
                self._counts = self._counts._replace(num_late=self._counts.num_late + len(waiting))
                break
            wait_for_any([lane.channel for lane in waiting if lane.channel is not None], deadline - now)
            self._receive(waiting)
            now = self._clock()
        self._counts = self._counts._replace(wait_s=self._counts.wait_s + now - began)
        for lane in self._lanes.values():
            lane.note_due()

    def _waiting(self, late: set[str]) -> list[Lane]:
        """Lanes that owe an answer to a sequence that has no draft; none where most have one, for all would wait."""
        asked = self._asked.values()
        entries = [entry for entry, context in asked if entry.is_warm and context.can_wait and not len(entry.draft)]
        if WAIT_BELOW * len(entries) < len(self._asked):
            return []
        lanes = {entry.lane.drafter_id: entry.lane for entry in entries}
        return [lane for lane in lanes.values() if lane.num_behind and lane.drafter_id not in late]


def _verification(verified: Verified) -> pb.Verification:
    return pb.Verification(
        num_new=verified.num_new,
        token_ids=verified.draft.tokens,
        parents=verified.draft.parents,
        accepted=verified.nodes,
        top_ids=[token_id for row in verified.top_ids for token_id in row],
    )


def _tree(draft: pb.Draft, vocab_size: int) -> DraftTree:
    """Raises ValueError for anything that is not a tree of the target's tokens."""
    tokens, parents, probabilities = tuple(draft.token_ids), tuple(draft.parents), tuple(draft.probabilities)
    if not len(tokens) == len(parents) == len(probabilities) <= MAX_NODES:
        raise ValueError(f"{len(tokens)} tokens, {len(parents)} parents, {len(probabilities)} probabilities")
    if any(token_id >= vocab_size for token_id in tokens):
        raise ValueError(f"token {max(tokens)} of a vocabulary of {vocab_size}")
    if not all(ROOT <= parent < node for node, parent in enumerate(parents)):
        raise ValueError("a node before its parent")
    if not all(0 <= probability <= 1.001 for probability in probabilities):
        raise ValueError("a probability outside of 0 to 1")
    return DraftTree(tokens, parents, tuple([min(one, 1.0) for one in probabilities]), (1,) * len(tokens))


def _place(draft: pb.Draft, more: DraftTree, tokens: Sequence[int], known: DraftTree) -> DraftTree | None:
    """`known`, the draft after `tokens`, with `more` hung into it; None if the tokens went another way.

    Raises ValueError for a draft after tokens that there are not, LookupError if `known` lacks what it goes on from.
    """
    if draft.base_len > len(tokens):
        raise ValueError(f"a draft after {draft.base_len} tokens of {len(tokens)}")
    assumed, since = list(draft.assumed), list(tokens[draft.base_len :])
    num_common = min(len(assumed), len(since))
    if assumed[:num_common] != since[:num_common]:
        return None
    if len(since) > len(assumed):
        left = more.after(since[num_common:])
        return graft(known, left).cut(MAX_NODES) if len(left) else None
    at = known.find(assumed[num_common:])
    if at is None:
        raise LookupError("the place that the draft goes on from")
    return graft(known, more, at).cut(MAX_NODES)
