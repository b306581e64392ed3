"""Runs a benchmark: interleaved rounds over all arms, so that whatever the machine does hits them alike.

    python -m benchmarks.<name> [--quick] [--rounds N] [--json FILE]

Each round takes every workload in turn and, within it, every arm, forwards and backwards by turns, so that no arm
always follows the same neighbour. Before each measurement there is a pause in which the previous arm's thread pools go
to sleep. A benchmark's own file builds a `Benchmark` and ends with `harness.main(benchmark, options)`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from typing import Generic, TypeVar

from benchmarks import report
from benchmarks.benchmark import Arm, Benchmark, Measured, Measurement, P, Workload
from benchmarks.conditions import Observation
from benchmarks.options import Options
from benchmarks.progress import Progress
from benchmarks.trial import Trial, round_name

T = TypeVar("T")

SETUP, TEARDOWN = "set-up", "teardown"  # in place of a workload


@dataclass(frozen=True)
class Step(Generic[P]):
    """A trial still to run."""

    round_index: int
    workload: Workload[P]
    arm: Arm[P]

    def __str__(self) -> str:
        return f"{round_name(self.round_index)} · {self.workload.name} · {self.arm.name}"


def schedule(benchmark: Benchmark[P], options: Options) -> Iterator[Step[P]]:
    """Every trial in the order in which it runs: rounds, then workloads, then arms, backwards in odd rounds."""
    for round_index in range(-options.warmup_rounds, options.rounds):
        arms = benchmark.arms[::-1] if round_index % 2 else benchmark.arms
        for workload in benchmark.workloads:
            for arm in arms:
                yield Step(round_index, workload.in_round(options.seed, round_index), arm)


async def run(
    benchmark: Benchmark[P], options: Options, on_step: Callable[[str], None] = lambda _: None
) -> list[Trial]:
    """Set all arms up, run every trial, tear them down. An arm's exception becomes a failed trial, never a lost one."""
    trials: list[Trial] = []
    ready: list[Arm[P]] = []
    try:
        for arm in benchmark.arms:
            failure = await _prepare(arm)
            if failure is None:
                ready.append(arm)
            else:
                trials.append(failure)
        for step in schedule(benchmark, options):
            on_step(str(step))
            if step.arm in ready:
                await asyncio.sleep(options.pause_s)
                trials.append(await _measure(step))
    finally:
        for arm in reversed(ready):
            trials.extend(await _tear_down(arm))
    return trials


async def _prepare(arm: Arm[P]) -> Trial | None:
    try:
        if arm.setup is not None:
            await _settle(arm.setup())
    except Exception as error:  # noqa: BLE001 - whatever an arm raises is a result to report
        return Trial(SETUP, arm.name, None, error=_described(error))
    return None


async def _measure(step: Step[P]) -> Trial:
    name, arm = step.workload.name, step.arm.name
    try:
        measured = _checked(await _settle(step.arm.measure(step.workload)))
    except Exception as error:  # noqa: BLE001 - whatever an arm raises is a result to report
        return Trial(name, arm, step.round_index, error=_described(error))
    return Trial(name, arm, step.round_index, measured=measured)


async def _tear_down(arm: Arm[P]) -> list[Trial]:
    try:
        if arm.teardown is not None:
            await _settle(arm.teardown())
    except Exception as error:  # noqa: BLE001 - whatever an arm raises is a result to report
        return [Trial(TEARDOWN, arm.name, None, error=_described(error))]
    return []


async def _settle(result: T | Awaitable[T]) -> T:
    return await result if inspect.isawaitable(result) else result


def _checked(measurement: Measurement) -> Measured:
    measured = measurement if isinstance(measurement, Measured) else Measured(measurement)
    wrong = [name for name, value in measured.values.items() if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"not a finite number: {', '.join(wrong)}; leave out what could not be measured")
    return measured


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


async def observe(benchmark: Benchmark[P], options: Options) -> report.Report:
    """Run the benchmark; what it found, and under which conditions."""
    config = {
        **benchmark.config,
        **{f"workload {w.name}": _config_of(w.params) for w in benchmark.workloads},
    }
    observation = Observation.begin(benchmark.name, options, config)
    num_steps = sum(1 for _ in schedule(benchmark, options))
    with Progress(num_steps) as progress:
        trials = await run(benchmark, options, progress.step)
    arms = [arm.name for arm in benchmark.arms]
    return report.Report(observation.end(), trials, arms, benchmark.baseline_arm)


async def execute(benchmark: Benchmark[P], options: Options) -> int:
    """Run the benchmark, print its report, write its JSON; the program's exit code."""
    return publish(await observe(benchmark, options), options)


def publish(result: report.Report, options: Options) -> int:
    """Print a report and write its JSON; the program's exit code."""
    report.print_report(result, sys.stdout)
    if options.json_path is not None:
        report.write_json(result, options.json_path)
    return 0 if all(trial.is_clean for trial in result.trials) else 1


def _config_of(params: object) -> object:
    return asdict(params) if is_dataclass(params) and not isinstance(params, type) else params


def main(benchmark: Benchmark[P], options: Options) -> int:
    """`execute` for a program that has no event loop yet."""
    return asyncio.run(execute(benchmark, options))
