"""The target's choice after each sequence's last token, and on along its draft as far as the draft guessed it.

The sampled walk: at every node the target chooses its token as if there were no draft, and descends to the child that
guessed it. Choices are keyed by position, so the tokens are those of a run without drafts, greedy or sampled; a draft
only decides how many of them one step yields. No probabilities of the drafter's are needed. (For greedy choices this
is the tree verification of SpecInfer, arXiv 2305.09781, section 4.3.)

A draft whose drafter drew it at random and says what from is verified by rejection instead (see rejection.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from protos.messages import PositionLogprobs
from workers.model.greedy import is_plain
from workers.model.rejection import walk_with_rejection
from workers.model.sampler import Row, largest, position_logprobs, probabilities, sample
from workers.model.scores import Scores
from workers.scheduler.sequence import Sequence as RunningSequence
from workers.scheduler.step import Chunk, Walk
from workers.speculative.tree import ROOT, Distribution, DraftTree


@dataclass(slots=True)
class _Walker:
    """Where one chunk's walk has come. Lives within one call of `walk`."""

    chunk: Chunk
    first_row: int  # of the logits: that of the sequence's last token
    node: int = ROOT
    token_ids: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)

    @property
    def row(self) -> int:
        return self.first_row + self.node + 1

    @property
    def rows(self) -> list[int]:
        """Whose logits chose the tokens."""
        return [self.first_row, *[self.first_row + node + 1 for node in self.nodes]]

    def take(self, token_id: int) -> bool:
        """Whether the draft had guessed the token, and the walk goes on."""
        self.token_ids.append(token_id)
        draft = self.chunk.draft
        child = None if draft is None else draft.children.get((self.node, token_id))
        if child is None:
            return False
        self.node = child
        self.nodes.append(child)
        return True


def walk(chunks: Sequence[Chunk], first_rows: Sequence[int], scores: Scores, eos: frozenset[int]) -> list[Walk]:
    """The walks of chunks that sample; `first_rows` are the logit rows of their sequences' last tokens."""
    walkers = [_Walker(chunk, row) for chunk, row in zip(chunks, first_rows, strict=True)]
    chooser = _Chooser(scores, eos)
    active = []
    for walker in walkers:
        if walker.chunk.draft is not None and walker.chunk.draft.drawn_from:
            chooser.reject(walker, walker.chunk.draft)
        else:
            active.append(walker)
    while active:
        chosen = chooser.choose(active)
        active = [walker for walker, token_id in zip(active, chosen, strict=True) if walker.take(token_id)]
    return [Walk(tuple(walker.token_ids), tuple(walker.nodes), _logprobs(walker, scores.logits)) for walker in walkers]


def sampler_row(sequence: RunningSequence, eos: frozenset[int], ahead: Sequence[int] = ()) -> Row | None:
    """What the sampler must know to choose the token after the sequence and those `ahead`; None: it is plain."""
    sampling = sequence.request.sampling
    if is_plain(sampling):
        return None
    too_early = sequence.num_output + len(ahead) < sampling.min_tokens
    return Row(
        sampling=sampling,
        index=sequence.index,
        tokens=[*sequence.tokens, *ahead] if ahead else sequence.tokens,
        num_prompt=sequence.num_prompt,
        banned_ids=tuple({*eos, *sampling.stop_token_ids}) if too_early else (),
    )


class _Chooser:
    """Chooses tokens of a step's logit rows. Lives within one call of `walk`."""

    def __init__(self, scores: Scores, eos: frozenset[int]) -> None:
        self._logits = scores.logits
        self._greedy = scores.greedy
        self._eos = eos

    def choose(self, walkers: Sequence[_Walker]) -> list[int]:
        """The target's token after each walker's path."""
        rows = [sampler_row(walker.chunk.sequence, self._eos, walker.token_ids) for walker in walkers]
        asked = [number for number, row in enumerate(rows) if row is not None]
        chosen = [] if len(asked) == len(rows) else [self._largest[walker.row] for walker in walkers]
        if not asked:
            return chosen
        assert self._logits is not None, "sampled without logits"
        drawn = sample(self._logits[[walkers[number].row for number in asked]], [rows[number] for number in asked])
        if not chosen:
            return drawn
        for number, token_id in zip(asked, drawn, strict=True):
            chosen[number] = token_id
        return chosen

    def reject(self, walker: _Walker, draft: DraftTree) -> None:
        """The whole way along a draft that was drawn at random."""
        sequence, logits = walker.chunk.sequence, self._logits
        assert logits is not None, "sampled without logits"

        def target(row: int, ahead: Sequence[int]) -> Distribution:
            shape = sampler_row(sequence, self._eos, ahead)
            assert shape is not None, "a draft that was drawn for a greedy sequence"
            found: Distribution = probabilities(logits[[walker.first_row + row]], [shape])[0].cpu().numpy()
            return found

        seed = sequence.request.sampling.seed
        walked = walk_with_rejection(
            draft, draft.drawn_from, target, seed=seed, index=sequence.index, position=sequence.num_output
        )
        walker.token_ids, walker.nodes = list(walked.token_ids), list(walked.nodes)

    @property
    def _largest(self) -> list[int]:
        """The most probable token of every logit row."""
        if not self._greedy:
            assert self._logits is not None, "neither logits nor greedy tokens"
            self._greedy = largest(self._logits)
        return self._greedy


def _logprobs(walker: _Walker, logits: Tensor | None) -> tuple[PositionLogprobs, ...]:
    """Of the walker's tokens, if its request asked for them."""
    num_top = walker.chunk.sequence.request.sampling.logprobs
    if num_top is None:
        return ()
    assert logits is not None, "log-probabilities without logits"
    return tuple(position_logprobs(logits[walker.rows], walker.token_ids, [num_top] * len(walker.rows)))
