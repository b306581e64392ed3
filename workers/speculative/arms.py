"""Which drafters a batch of some size should use: whatever has really made the most tokens per second.

A choice between arms whose worth changes with the requests: the best so far is used, and now and then another is tried
for a few steps. One that does not pay is tried less and less often.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PLAIN = 0  # the arm without drafts
FIRST_TRIAL = 64  # steps, of an arm that has never been tried
PLAIN_TRIAL = 4
RETRIAL = 6
HOPELESS = 0.75  # a step of a trial that gained less counts against it
PATIENCE = 3  # such steps in a row end a trial, …
FIRST_PATIENCE = 32  # … or an arm's first one: some drafters must learn before they gain
FIRST_WAIT = 64  # steps of the best arm before another is tried again
LONGEST_WAIT = 512
SOON = 4  # steps
GAIN_WEIGHT = 0.05  # of one step
MARGIN = 1.03  # by which another arm must be better
HIGHEST_GAIN = 16.0


@dataclass(slots=True)
class _Arm:
    gain: float = 1.0  # tokens per second, against plain steps
    num_steps: int = 0
    wait: int = FIRST_WAIT
    due: int = FIRST_WAIT  # steps until it is tried again

    def learn(self, gain: float) -> None:
        self.num_steps += 1
        weight = max(GAIN_WEIGHT, 1 / self.num_steps)
        self.gain += weight * (min(gain, HIGHEST_GAIN) - self.gain)


@dataclass(slots=True)
class Arms:
    """The arms of batches of about one size. Mutated only by Controller."""

    num_arms: int
    best: int = PLAIN
    _arms: list[_Arm] = field(init=False)
    _trial: int = PLAIN
    _num_left: int = PLAIN_TRIAL  # steps of the trial still to come
    _num_bad: int = 0  # steps in a row of the trial that gained little

    def __post_init__(self) -> None:
        self._arms = [_Arm() for _ in range(self.num_arms)]

    @property
    def gains(self) -> list[float]:
        """By arm."""
        return [arm.gain for arm in self._arms]

    def choose(self) -> int:
        """The arm of the next step."""
        if self._num_left:
            self._num_left -= 1
            return self._trial
        for number, arm in enumerate(self._arms):
            if number == self.best or (number == PLAIN and arm.num_steps == 0):
                continue
            if arm.num_steps == 0:
                return self._try(number, FIRST_TRIAL)
            arm.due -= 1
            if arm.due <= 0:
                arm.wait = min(2 * arm.wait, LONGEST_WAIT)
                arm.due = arm.wait
                return self._try(number, RETRIAL)
        return self.best

    def reconsider(self) -> None:
        """The requests have changed: what did not pay for others may pay for them."""
        for arm in self._arms:
            if arm.gain >= HOPELESS:
                arm.due = min(arm.due, SOON)

    def learn(self, number: int, gain: float) -> None:
        """What a step of the arm made per second, against a plain step; of plain steps, 1."""
        arm = self._arms[number]
        arm.learn(gain)
        self._num_bad = self._num_bad + 1 if gain < HOPELESS else 0
        if self._num_bad >= (FIRST_PATIENCE if arm.num_steps < FIRST_TRIAL else PATIENCE):
            self._num_left = 0
        gains = self.gains
        challenger = max(range(self.num_arms), key=gains.__getitem__)
        if gains[challenger] > gains[self.best] * MARGIN:
            self.best = challenger
            self._arms[challenger].wait = FIRST_WAIT

    def _try(self, number: int, num_steps: int) -> int:
        self._trial, self._num_left, self._num_bad = number, num_steps - 1, 0
        return number
