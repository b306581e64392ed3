"""What a benchmark is: workloads, and arms that each measure every one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Generic, TypeVar

P = TypeVar("P")


@dataclass(frozen=True)
class Workload(Generic[P]):
    """One thing to measure. `params` is the benchmark's own frozen dataclass; the harness prints it."""

    name: str
    params: P
    seed: int = 0  # set by the harness, another one for each workload and round

    def in_round(self, run_seed: int, round_index: int) -> Workload[P]:
        """The workload with this round's seed: equal for all arms, so that they are compared on the same prompts."""
        digest = hashlib.blake2b(f"{run_seed}/{self.name}/{round_index}".encode(), digest_size=6).digest()
        return replace(self, seed=int.from_bytes(digest, "big"))


@dataclass(frozen=True, slots=True)
class Measured:
    """What one measurement found.

    A metric's name ends in its unit (see `unit_of`). A metric that could not be measured is left out, never made up.
    `refusals` are requests declined for lack of room; `errors` are those that went wrong, and fail the benchmark.
    """

    values: Mapping[str, float]
    errors: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    refusals: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


Measurement = Measured | Mapping[str, float]


@dataclass(frozen=True)
class Arm(Generic[P]):
    """One contender. Every callable may be plain or async; plain ones run on the harness's thread.

    All arms are set up before the first measurement and torn down after the last one, so each is resident throughout.
    """

    name: str
    measure: Callable[[Workload[P]], Measurement | Awaitable[Measurement]]
    setup: Callable[[], Awaitable[None] | None] | None = None
    teardown: Callable[[], Awaitable[None] | None] | None = None


@dataclass(frozen=True)
class Benchmark(Generic[P]):
    """Workloads, arms, and the arm the others are compared with (default: the first)."""

    name: str
    workloads: Sequence[Workload[P]]
    arms: Sequence[Arm[P]]
    baseline: str = ""
    config: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not self.workloads or not self.arms:
            raise ValueError(f"benchmark {self.name!r} needs a workload and an arm")
        for what, names in (("workload", [w.name for w in self.workloads]), ("arm", [a.name for a in self.arms])):
            if len(set(names)) < len(names):
                raise ValueError(f"benchmark {self.name!r} has two {what}s of one name: {names}")
        if self.baseline and self.baseline not in [arm.name for arm in self.arms]:
            raise ValueError(f"baseline {self.baseline!r} is not an arm of benchmark {self.name!r}")

    @property
    def baseline_arm(self) -> str:
        return self.baseline or self.arms[0].name


_UNITS = (
    ("_per_s", "1/s"),
    ("_us", "us"),
    ("_ms", "ms"),
    ("_s", "s"),
    ("_bytes", "bytes"),
    ("_tokens", "tokens"),
    ("_percent", "%"),
)


def unit_of(metric: str) -> str:
    """The unit in which a metric is, from the end of its name; a `num_` metric is a count; else it has none."""
    if metric.startswith("num_"):
        return "count"
    return next((unit for suffix, unit in _UNITS if metric.endswith(suffix)), "")
