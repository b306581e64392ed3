"""Which drafters a batch of some size should use: whatever has really made the most tokens per second.

A choice between arms whose worth changes with the requests: the best so far is used, and now and then another is tried
for a few steps. One that does not pay is tried less and less often, and what is lost by trying is a small share of the
time. Batches of another size begin with what is known of the nearest one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

PLAIN = 0  # the arm without drafts
FIRST_TRIAL = 48  # steps, of an arm that has never been tried
PLAIN_TRIAL = 4
RETRIAL = 8
WARM_UP = 16  # steps of a trial that do not count until there are drafts: some drafters must read the prompts first
HOPELESS = 0.75  # a step of a trial that gained less counts against it
PATIENCE = 3  # such steps in a row end a trial, …
FIRST_PATIENCE = 16  # … or an arm's first one
LEARNING = 12  # times as long is the first trial of drafters that must learn before they gain
FIRST_WAIT = 64  # steps of the best arm before another is tried again
LONGEST_WAIT = 512
POSTPONED = 32  # steps, of a trial that would lose too much now
SOON = 4  # steps
GAIN_WEIGHT = 0.025  # of one step: what can be drafted comes in bursts
LOSS_SHARE = 0.01  # of the time, lost by trying again what has been tried before
INHERITED = 8  # steps that another size's knowledge counts for
MARGIN = 1.03  # by which another arm must be better
HIGHEST_GAIN = 16.0
LONGEST = 16.0  # plain steps; a step that took longer than so many was disturbed


@dataclass(slots=True)
class _Arm:
    first_trial: int  # steps
    gain: float = 1.0  # tokens per second, against plain steps
    length: float = 1.0  # of its steps, in plain ones
    num_steps: int = 0
    wait: int = FIRST_WAIT
    due: int = FIRST_WAIT  # steps until it is tried again

    def learn(self, gain: float, length: float) -> None:
        self.num_steps += 1
        weight = max(GAIN_WEIGHT, 1 / self.num_steps)
        self.gain += weight * (min(gain, HIGHEST_GAIN) - self.gain)
        self.length += weight * (min(length, LONGEST) - self.length)


@dataclass(slots=True)
class Arms:
    """The arms of batches of about one size. Mutated only by Controller."""

    num_arms: int
    learning: Collection[int] = ()  # arms of one drafter that must learn
    best: int = PLAIN
    _arms: list[_Arm] = field(init=False)
    _trial: int = PLAIN
    _num_steps: int = 0
    _num_lost: float = 0.0  # steps' worth of tokens that trials of what had been tried before did not make
    _is_retrial: bool = False
    _num_left: int = PLAIN_TRIAL  # steps of the trial still to come
    _num_bad: int = 0  # steps in a row of the trial that gained little
    _num_idle: int = WARM_UP  # steps of the trial before the first draft

    def __post_init__(self) -> None:
        longer = [LEARNING if number in self.learning else 1 for number in range(self.num_arms)]
        self._arms = [_Arm(FIRST_TRIAL * times) for times in longer]

    @property
    def gains(self) -> list[float]:
        """By arm."""
        return [arm.gain for arm in self._arms]

    def inherit(self, other: Arms) -> None:
        """Begin with what is known of batches of another size."""
        self.best = other.best
        for own, arm in zip(self._arms, other._arms, strict=True):
            own.gain, own.length, own.num_steps = arm.gain, arm.length, min(arm.num_steps, INHERITED)
            own.first_trial = INHERITED if arm.num_steps else own.first_trial

    def choose(self) -> int:
        """The arm of the next step."""
        self._num_steps += 1
        if self._num_left:
            self._num_left -= 1
            return self._trial
        can_lose = LOSS_SHARE * self._num_steps - self._num_lost
        self._is_retrial = False
        for number, arm in enumerate(self._arms):
            if number == self.best or (number == PLAIN and arm.num_steps == 0):
                continue
            if arm.num_steps == 0:
                return self._try(number, arm.first_trial)
            arm.due -= 1
            if arm.due > 0:
                continue
            arm.due = POSTPONED
            if RETRIAL * self._loss(arm.gain, arm.length) <= can_lose:
                arm.wait = min(2 * arm.wait, LONGEST_WAIT)
                arm.due = arm.wait
                self._is_retrial = True
                return self._try(number, PLAIN_TRIAL if number == PLAIN else RETRIAL)
        return self.best

    def rest(self, most: int) -> int:
        """How many plain steps follow in any case, at most so many; they are taken for made."""
        others = self._arms[PLAIN + 1 :]
        if self.best != PLAIN or self._num_left or any(arm.num_steps == 0 for arm in others):
            return 0
        num_steps = max(min([most, *[arm.due - 1 for arm in others]]), 0)
        self._num_steps += num_steps
        for arm in others:
            arm.due -= num_steps
        return num_steps

    def reconsider(self) -> None:
        """The requests have changed: what did not pay for others may pay for them."""
        for arm in self._arms[PLAIN + 1 :]:
            if arm.gain >= HOPELESS:
                arm.due = min(arm.due, SOON)

    def beckon(self, numbers: Collection[int]) -> None:
        """These are worth a trial now."""
        for number in numbers:
            self._arms[number].due = 0

    def learn(self, number: int, gain: float, *, length: float = 1.0, has_drafts: bool = True) -> None:
        """What a step of the arm made per second, against a plain step; of plain steps, 1.

        `length`: how many plain steps it took.
        """
        if self._is_retrial:
            self._num_lost += self._loss(gain, min(length, LONGEST))
        if not has_drafts and self._num_idle < WARM_UP:
            self._num_idle += 1
            self._num_left += 1
            return
        self._num_idle = WARM_UP
        arm = self._arms[number]
        arm.learn(gain, length)
        self._num_bad = self._num_bad + 1 if gain < HOPELESS else 0
        is_first = arm.num_steps < arm.first_trial
        if self._num_bad >= (FIRST_PATIENCE * arm.first_trial // FIRST_TRIAL if is_first else PATIENCE):
            self._num_left = 0
        gains = self.gains
        challenger = max(range(self.num_arms), key=gains.__getitem__)
        if gains[challenger] > gains[self.best] * MARGIN:
            self.best = challenger
            self._arms[challenger].wait = FIRST_WAIT

    def _loss(self, gain: float, length: float) -> float:
        """What a step of an arm loses against the best one: plain steps."""
        return length * max(0.0, 1 - gain / self._arms[self.best].gain)

    def _try(self, number: int, num_steps: int) -> int:
        self._trial, self._num_left, self._num_bad, self._num_idle = number, num_steps - 1, 0, 0
        return number
