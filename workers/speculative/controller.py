"""How much to draft: as many nodes as pay for their rows in the target's step, none where speculation does not pay.

A node is worth the probability that all tokens up to it are right. Over the whole batch, the best nodes are admitted as
long as tokens per second grow: with B sequences, nodes of probabilities P1 >= P2 >= … and t(n) the time of n rows, the
number m that maximises (B + P1 + … + Pm) / t(B + m). That rule gives the depth, the shape and, under load, nothing.

Which drafters are asked at all is decided by what they have really gained, batch size by batch size (see arms.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from workers.speculative.arms import PLAIN, Arms
from workers.speculative.calibration import Calibration
from workers.speculative.protocol import Key
from workers.speculative.step_times import StepTimes
from workers.speculative.tree import DraftTree

FEWEST = 4  # nodes proposed for a sequence, at least
FIRST_WIDTH = 8  # nodes proposed for a sequence, at first
WIDEN_FROM = 0.7  # of the proposed nodes admitted: twice as many are proposed next time
NARROW_BELOW = 0.35  # of them admitted: a tenth less
DOUBT_AFTER = 16  # steps
FEW = 4  # sequences
PLAIN_FALLING = 0.3  # weight of a plain step that was faster than thought: where drafting pays there are few


@dataclass(slots=True)
class _Regime:
    """What is known of batches of about one size. Mutated only by Controller."""

    arms: Arms
    plain: StepTimes = field(default_factory=lambda: StepTimes(falling=PLAIN_FALLING))
    drafted: StepTimes = field(default_factory=StepTimes)
    width: float = FIRST_WIDTH  # nodes proposed for each sequence

    def adapt(self, num_proposed: int, num_admitted: int, max_width: int) -> None:
        """Nodes that are not admitted cost time too, and those that are not proposed might have been."""
        if num_admitted >= WIDEN_FROM * num_proposed:
            self.width = min(2 * self.width, max_width)
        elif num_admitted < NARROW_BELOW * num_proposed:
            self.width = max(0.9 * self.width, FEWEST)


class Controller:
    """Decides from step to step. Mutated only by Speculator."""

    def __init__(self, num_drafters: int, *, max_nodes: int, learning: Collection[int] = ()) -> None:
        """`max_nodes`: of one sequence's draft; `learning`: drafters that must learn before they gain."""
        self._max_nodes = max_nodes
        everyone = tuple(range(num_drafters))
        alone = [(number,) for number in everyone]
        self._choices: list[tuple[int, ...]] = [(), *alone, *([everyone] if num_drafters > 1 else [])]
        self._regimes: dict[tuple[bool, int], _Regime] = {}
        self._is_sampled = False  # the step at hand
        self._calibration = Calibration()
        self._num_steps = [0] * len(self._choices)
        self._learning = [
            number for number, choice in enumerate(self._choices) if len(choice) == 1 and choice[0] in learning
        ]
        self._num_declined = 0  # steps in a row for which drafts were made and none was admitted
        self._arm = PLAIN  # of the step at hand

    @property
    def num_steps(self) -> Mapping[tuple[int, ...], int]:
        """Steps that could have had drafts, by the drafters that were asked."""
        return dict(zip(self._choices, self._num_steps, strict=True))

    def choose(self, num_sequences: int, *, has_new: bool = False, is_sampled: bool = False) -> tuple[int, ...]:
        """The drafters to ask for the next step, of so many sequences that decode; none: a plain step.

        `has_new`: some of them have just begun. Where a few run, these are a new kind of work. `is_sampled`: most draw
        their tokens: such steps take longer, and fewer drafts are right.
        """
        self._is_sampled = is_sampled
        regime = self._regime(num_sequences)
        if has_new and num_sequences <= FEW:
            regime.arms.reconsider()
        self._arm = regime.arms.choose() if regime.plain else PLAIN
        self._num_steps[self._arm] += 1
        return self._choices[self._arm]

    def rest(self, num_sequences: int, most: int) -> int:
        """How many plain steps follow while the sequences stay the same, at most so many: no need to choose."""
        num_steps = self._regime(num_sequences).arms.rest(most)
        self._num_steps[PLAIN] += num_steps
        return num_steps

    def beckon(self, drafter: int, num_sequences: int) -> None:
        """This drafter is sure of a draft: it is to be asked soon, if it may."""
        arms = [number for number, choice in enumerate(self._choices) if drafter in choice]
        self._regime(num_sequences).arms.beckon(arms)

    def num_to_propose(self, num_sequences: int) -> int:
        """Nodes worth proposing for each of so many sequences."""
        return min(round(self._regime(num_sequences).width), self._max_nodes)

    def admit(self, drafts: Mapping[Key, DraftTree], num_sequences: int) -> dict[Key, DraftTree]:
        """The part of each draft that pays, in a step of so many sequences that decode; empty ones are left out."""
        ranked: list[tuple[float, int, Key]] = []
        for key, draft in drafts.items():
            paths = self._calibration.path_probabilities(key, draft)
            ranked += [(-probability, node, key) for node, probability in enumerate(paths)]
        ranked.sort()
        num_admitted = self._best(num_sequences, [-entry[0] for entry in ranked])
        if ranked:
            self._regime(num_sequences).adapt(len(ranked), num_admitted, self._max_nodes)
        self._doubt(num_sequences, is_declined=bool(ranked) and not num_admitted)
        chosen: dict[Key, list[int]] = {}
        for _, node, key in ranked[:num_admitted]:
            chosen.setdefault(key, []).append(node)
        for key in drafts.keys() - chosen.keys():
            self._calibration.relax(key)
        return {
            key: drafts[key] if len(nodes) == len(drafts[key]) else drafts[key].keep(nodes)
            for key, nodes in chosen.items()
        }

    def observe_plain(self, num_sequences: int, seconds: float) -> None:
        """A step without drafts of sequences that all decoded."""
        regime = self._regime(num_sequences)
        regime.plain.observe(num_sequences, seconds)
        regime.arms.learn(PLAIN, 1.0)

    def observe_drafted(self, num_sequences: int, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A step of sequences that all decoded, with the drafters chosen last; it made `num_tokens` tokens."""
        regime = self._regime(num_sequences)
        if num_rows > num_sequences:
            regime.drafted.observe(num_rows, seconds)
        if regime.plain:
            length = seconds / regime.plain.estimate(num_sequences)
            has_drafts = num_rows > num_sequences
            regime.arms.learn(self._arm, num_tokens / num_sequences / length, length=length, has_drafts=has_drafts)

    def verified(self, key: Key, draft: DraftTree, nodes: tuple[int, ...]) -> None:
        """What was right of a draft that had been admitted."""
        self._calibration.observe(key, draft, nodes)

    def forget(self, key: Key) -> None:
        self._calibration.forget(key)

    def _doubt(self, num_sequences: int, *, is_declined: bool) -> None:
        """Times that let nothing be admitted would never be measured again."""
        self._num_declined = self._num_declined + 1 if is_declined else 0
        if self._num_declined == DOUBT_AFTER:
            self._num_declined = 0
            self._regime(num_sequences).drafted.doubt()

    def _best(self, num_sequences: int, probabilities: list[float]) -> int:
        """How many nodes, best first, maximise tokens per second."""
        regime = self._regime(num_sequences)
        plain_s = regime.plain.estimate(num_sequences) if regime.plain else 1.0
        times = regime.drafted.beyond(num_sequences, plain_s, num_sequences + len(probabilities))
        tokens = float(num_sequences)
        best, best_rate = 0, tokens / times[0]
        for count, (probability, seconds) in enumerate(zip(probabilities, times[1:], strict=True), start=1):
            tokens += probability
            if tokens > best_rate * seconds:
                best, best_rate = count, tokens / seconds
        return best

    def _regime(self, num_sequences: int) -> _Regime:
        key = self._is_sampled, max(num_sequences, 1).bit_length()
        regime = self._regimes.get(key)
        if regime is None:
            regime = _Regime(Arms(len(self._choices), self._learning))
            nearest = min(self._regimes, key=lambda known: _distance(known, key), default=None)
            if nearest is not None:
                regime.arms.inherit(self._regimes[nearest].arms)
                regime.width = self._regimes[nearest].width
            self._regimes[key] = regime
        return regime


def _distance(one: tuple[bool, int], other: tuple[bool, int]) -> int:
    """How different two kinds of batches are: of the same kind by their size; another kind is farther."""
    return abs(one[1] - other[1]) + (0 if one[0] == other[0] else 100)
