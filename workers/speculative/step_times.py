"""How long a step takes by its number of rows: measured while running, and guessed in between."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from statistics import median

WEIGHT = 0.1  # of a new measurement
TRUSTED_AFTER = 3  # measurements; their median counts
OUTLIER = 3.0  # a measurement beyond this multiple of what was expected counts as this multiple
DOUBT = 0.9  # what times are multiplied by that let nothing pay
GUESSED_SLOPE = 0.04  # of a step's time for each further row, until larger steps have been seen


class StepTimes:
    """Mutated only by Controller. Times never fall as rows are added, whatever was measured.

    False until anything has been measured often enough.
    """

    def __init__(self, *, falling: float = WEIGHT) -> None:
        """`falling`: the weight of a measurement below what is known. What disturbs a step makes it longer."""
        self._falling = falling
        self._rows: list[int] = []  # that have been measured, ascending
        self._seconds: list[float] = []
        self._first: dict[int, list[float]] = {}  # what has not been measured often enough

    def __bool__(self) -> bool:
        return bool(self._rows)

    def observe(self, num_rows: int, seconds: float) -> None:
        """A step has taken so long. Steps of many rows are counted together with those of nearly as many."""
        rows = _rounded(num_rows)
        at = bisect_left(self._rows, rows)
        if at < len(self._rows) and self._rows[at] == rows:
            known = self._seconds[at]
            weight = self._falling if seconds < known else WEIGHT
            self._seconds[at] = known + weight * (min(seconds, OUTLIER * known) - known)
            return
        first = self._first.setdefault(rows, [])
        first.append(seconds)
        if len(first) == TRUSTED_AFTER:
            self._rows.insert(at, rows)
            self._seconds.insert(at, median(self._first.pop(rows)))

    def estimate(self, num_rows: int) -> float:
        """Expected seconds of a step of so many rows. Something has been measured."""
        at = bisect_right(self._rows, num_rows)
        if at == 0:
            return self._seconds[0]
        return self.beyond(self._rows[at - 1], max(self._seconds[:at]), num_rows)[-1]

    def beyond(self, first: int, first_s: float, last: int) -> list[float]:
        """Expected seconds of every number of rows from `first`, which take `first_s`, to `last`."""
        at = bisect_right(self._rows, first)
        rows, seconds = first, first_s
        times = [first_s]
        while rows < last:
            if at < len(self._rows):
                next_rows, next_s = self._rows[at], max(self._seconds[at], seconds)
                at += 1
            else:
                next_rows, next_s = last, seconds * (1 + GUESSED_SLOPE * (last - rows))
            slope = (next_s - seconds) / (next_rows - rows)
            times += [seconds + slope * more for more in range(1, min(next_rows, last) - rows + 1)]
            rows, seconds = next_rows, next_s
        return times

    def doubt(self) -> None:
        """Nothing pays by these times: perhaps they are out of date, and steps have become faster."""
        self._seconds = [seconds * DOUBT for seconds in self._seconds]


def _rounded(num_rows: int) -> int:
    step = 1 if num_rows <= 16 else 4 if num_rows <= 64 else 16 if num_rows <= 256 else 64
    return -(-num_rows // step) * step
