"""What speculation gains, predicted: rounds of drafting and verifying, in closed form and played through.

A round drafts k tokens for each of b sequences and has the target verify them in one step of b(k + 1) rows. Each token
of a draft is right with probability alpha if all before it were; the target adds one of its own, so a round makes

    E = 1 + alpha + … + alpha^k = (1 - alpha^(k+1)) / (1 - alpha)

tokens of a sequence (Leviathan et al., arXiv 2211.17192, equation 1). How long it takes depends on who drafts, and
when; d is the time of a drafted token, t the step's, r the round trip, and what each step costs besides is left out:

    inside           on the target's device, one after the other: k d + t
    remote           elsewhere, one after the other:              k d + t + r
    ahead            elsewhere; as a step begins, the target sends what it verifies and the drafter goes on from that:
                     max(t, k d + r) where that draft serves, t + k d + r where it has to be made anew
    ahead-together   the same for a batch that steps together: it waits as soon as one of its drafts was lost
    ahead-unwaiting  the same, but nobody waits: a sequence whose draft was lost takes a plain token in the next step

`ahead` lets each sequence wait for its own draft alone: exact for one sequence, and more than a batch that steps
together and waits can have.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, assert_never

Way = Literal["inside", "remote", "ahead", "ahead-together", "ahead-unwaiting"]
WAYS: tuple[Way, ...] = ("inside", "remote", "ahead", "ahead-together", "ahead-unwaiting")
MAX_DRAFT = 16  # tokens, the longest that is looked at


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} {value} is no probability; it must be in [0, 1]")


@dataclass(frozen=True, slots=True)
class Curve:
    """A function known at some points: straight between them, level before the first, on at its last slope."""

    points: tuple[tuple[float, float], ...]  # by rising x

    def __post_init__(self) -> None:
        if not self.points:
            raise ValueError("a curve needs a point")
        if any(x >= after for (x, _), (after, _) in zip(self.points, self.points[1:], strict=False)):
            raise ValueError(f"the points of a curve must rise in x: {self.points}")

    @classmethod
    def level(cls, y: float) -> Curve:
        """The same everywhere."""
        return cls(((1.0, y),))

    def __call__(self, x: float) -> float:
        first_x, first_y = self.points[0]
        if x <= first_x or len(self.points) == 1:
            return first_y
        at = min(bisect_right(self.points, x, key=lambda point: point[0]), len(self.points) - 1)
        (left, low), (right, high) = self.points[at - 1 : at + 1]
        return low + (high - low) * (x - left) / (right - left)


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long the target's step takes, in seconds: t(rows), and what each sequence costs besides its rows."""

    by_rows: Curve
    per_sequence_s: float = 0.0

    @classmethod
    def with_knee(cls, floor_s: float, knee_rows: float) -> StepTime:
        """Bound by memory, the same for any number of rows, up to the knee; from there bound by arithmetic."""
        return cls(Curve(((knee_rows, floor_s), (2 * knee_rows, 2 * floor_s))))

    def __call__(self, num_rows: float, num_sequences: int) -> float:
        return self.by_rows(num_rows) + self.per_sequence_s * num_sequences


@dataclass(frozen=True, slots=True)
class Ready:
    """How often a draft made ahead serves, by what became of the draft it goes on from.

    Even after a draft that was right throughout, the target's own token has to be guessed: a drafter that follows
    nothing but its best guess has Ready(alpha, 0); one that enumerates outcomes has more of both.
    """

    accepted: float = 0.8  # all of it was right
    rejected: float = 0.8  # some of it was not, but the outcome had been enumerated

    def __post_init__(self) -> None:
        _check_probability("ready.accepted", self.accepted)
        _check_probability("ready.rejected", self.rejected)


@dataclass(frozen=True, slots=True)
class Setting:
    """What a prediction follows from. Raises ValueError for what cannot be."""

    alpha: float  # probability that the next drafted token is right
    draft: Curve  # d: number of sequences -> seconds of one drafted token of each
    step: StepTime  # t
    num_sequences: int = 1  # b, all with a draft of the same length
    round_trip_s: float = 0.0  # r, between target and drafter
    overhead_s: float = 0.0  # of each speculated step, whatever is drafted
    ready: Ready = Ready()

    def __post_init__(self) -> None:
        _check_probability("alpha", self.alpha)
        if self.num_sequences < 1:
            raise ValueError(f"{self.num_sequences} sequences: there must be at least one")
        if not (0 <= self.round_trip_s < math.inf and math.isfinite(self.overhead_s)):
            raise ValueError(f"round trip {self.round_trip_s} s, overhead {self.overhead_s} s: not a time")

    @property
    def plain_step_s(self) -> float:
        """A step without drafts."""
        return self.step(self.num_sequences, self.num_sequences)

    def step_s(self, num_drafted: float) -> float:
        """A speculated step that verifies so many drafted tokens, of all sequences."""
        return self.step(self.num_sequences + num_drafted, self.num_sequences) + self.overhead_s

    def draft_s(self, way: Way, num_draft: int) -> float:
        """From the wish for a draft of so many tokens to having it."""
        drafting_s = num_draft * self.draft(self.num_sequences)
        return drafting_s if way == "inside" else drafting_s + self.round_trip_s


class Round(NamedTuple):
    """A round on average."""

    num_tokens: float  # of one sequence
    seconds: float

    def gain(self, setting: Setting) -> float:
        """Tokens per second against plain decoding."""
        return self.num_tokens * setting.plain_step_s / self.seconds


class Choice(NamedTuple):
    """How much to draft, and what that gains."""

    num_draft: int  # tokens; 0: nothing
    gain: float


def expected_tokens(alpha: float, num_draft: int) -> float:
    """E: tokens of a sequence that a round with a draft makes."""
    if alpha == 1:
        return num_draft + 1.0
    return (1 - alpha ** (num_draft + 1)) / (1 - alpha)


def predict(way: Way, setting: Setting, num_draft: int) -> Round:
    """A round's mean tokens and seconds, in closed form. `num_draft`: k, at least 1."""
    tokens = expected_tokens(setting.alpha, num_draft)
    step_s = setting.step_s(num_draft * setting.num_sequences)
    draft_s = setting.draft_s(way, num_draft)
    served = _served(setting, num_draft)
    match way:
        case "inside" | "remote":
            return Round(tokens, draft_s + step_s)
        case "ahead":
            return Round(tokens, _waiting(served, step_s, draft_s))
        case "ahead-together":
            return Round(tokens, _waiting(served**setting.num_sequences, step_s, draft_s))
        case "ahead-unwaiting":
            return _unwaiting(setting, num_draft, tokens, served)
        case _:
            assert_never(way)


def best_draft(way: Way, setting: Setting, max_draft: int = MAX_DRAFT) -> Choice:
    """The draft length from 1 that gains most, even if that is a loss."""
    gains = [Choice(k, predict(way, setting, k).gain(setting)) for k in range(1, max_draft + 1)]
    return max(gains, key=lambda choice: choice.gain)


def best(way: Way, setting: Setting, max_draft: int = MAX_DRAFT) -> Choice:
    """The draft length that gains most; none where nothing pays."""
    choice = best_draft(way, setting, max_draft)
    return choice if choice.gain > 1 else Choice(0, 1.0)


def _served(setting: Setting, num_draft: int) -> float:
    """How often the draft made ahead serves after a round with a draft."""
    accepted = setting.alpha**num_draft
    return accepted * setting.ready.accepted + (1 - accepted) * setting.ready.rejected


def _waiting(served: float, step_s: float, draft_s: float) -> float:
    return served * max(step_s, draft_s) + (1 - served) * (step_s + draft_s)


def _unwaiting(setting: Setting, num_draft: int, tokens: float, served: float) -> Round:
    """A sequence has a draft or has none, from round to round: a chain of two states, in its long run.

    After a plain token, which is all there was to guess, a draft serves as after one that was right throughout. The
    sequences are independent of each other, so the number of those with a draft is binomial.
    """
    lost, found = 1 - served, setting.ready.accepted
    share = found / (found + lost) if lost else 1.0
    draft_s = setting.draft_s("ahead-unwaiting", num_draft)
    seconds = sum(
        probability * max(setting.step_s(num_draft * count), draft_s)
        for count, probability in enumerate(_binomial(setting.num_sequences, share))
    )
    return Round(share * tokens + (1 - share), seconds)


def _binomial(num: int, probability: float) -> Iterable[float]:
    return (math.comb(num, k) * probability**k * (1 - probability) ** (num - k) for k in range(num + 1))


def simulate(way: Way, setting: Setting, num_draft: int, *, num_rounds: int, seed: int) -> Round:
    """The same, played through round by round: when each draft was wished for, when it came, and what it was worth."""
    source = random.Random(seed)
    # Who waits for himself alone is one sequence, in steps as long as those of all.
    num_played = 1 if way == "ahead" else setting.num_sequences
    draft_s = setting.draft_s(way, num_draft)
    now = began = draft_s
    arrivals = [now] * num_played
    drafted = [num_draft] * num_played
    num_tokens = 0
    for _ in range(num_rounds):
        start = max(now, *arrivals)
        num_rows = sum(drafted) * setting.num_sequences // num_played
        now = start + setting.step_s(num_rows)
        for number, length in enumerate(drafted):
            num_right = _num_right(source, setting.alpha, length)
            num_tokens += num_right + 1
            is_ready = source.random() < (setting.ready.accepted if num_right == length else setting.ready.rejected)
            match way:
                case "inside" | "remote":
                    arrivals[number] = now + draft_s
                case "ahead" | "ahead-together":
                    arrivals[number] = (start if is_ready else now) + draft_s
                case "ahead-unwaiting":
                    arrivals[number] = start + draft_s
                    drafted[number] = num_draft if is_ready else 0
                case _:
                    assert_never(way)
    ended = max(now, *arrivals)
    return Round(num_tokens / num_rounds / num_played, (ended - began) / num_rounds)


def _num_right(source: random.Random, alpha: float, length: int) -> int:
    """Of a draft, the tokens before the first wrong one."""
    for number in range(length):
        if source.random() >= alpha:
            return number
    return length
