"""The harness on fake arms: order, warm-up, failures, what is printed and what is written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Measurement, Workload, unit_of
from benchmarks.conditions import Observation, cpu_flags, revision
from benchmarks.options import Options
from benchmarks.report import QUICK, Report, print_report, rows
from benchmarks.trial import Trial

OPTIONS = Options(rounds=2, warmup_rounds=1, pause_s=0.0)


@dataclass(frozen=True)
class Size:
    num_tokens: int


SMALL, LARGE = Workload("small", Size(1)), Workload("large", Size(100))


@dataclass
class Fake:
    """An arm that notes each call and answers with the next of its values."""

    name: str
    calls: list[str]
    values: list[float] = field(default_factory=lambda: [1.0])
    seeds: list[int] = field(default_factory=list)

    def measure(self, workload: Workload[Size]) -> Measurement:
        self.calls.append(f"{workload.name}/{self.name}")
        self.seeds.append(workload.seed)
        return {"speed_per_s": self.values[(len(self.seeds) - 1) % len(self.values)]}

    def arm(self) -> Arm[Size]:
        return Arm(self.name, self.measure)


def broken(_: Workload[Size]) -> Measurement:
    raise RuntimeError("out of tea")


def benchmark(*arms: Arm[Size], workloads: tuple[Workload[Size], ...] = (SMALL,)) -> Benchmark[Size]:
    return Benchmark("fake", workloads, arms)


def printed(trials: list[Trial], *, quick: bool = False) -> str:
    file = io.StringIO()
    options = Options(quick=quick)
    print_report(Report(Observation.begin("fake", options, {}).end(), trials, ["a", "b"], "a"), file)
    return file.getvalue()


async def test_rounds_interleave_all_arms_and_turn_their_order() -> None:
    calls: list[str] = []
    a, b = Fake("a", calls), Fake("b", calls)
    trials = await harness.run(benchmark(a.arm(), b.arm(), workloads=(SMALL, LARGE)), OPTIONS)
    warm_up, first, second = calls[:4], calls[4:8], calls[8:]
    assert warm_up == second == ["small/b", "small/a", "large/b", "large/a"]
    assert first == ["small/a", "small/b", "large/a", "large/b"]
    assert [trial.round_index for trial in trials] == [-1] * 4 + [0] * 4 + [1] * 4


async def test_arms_get_the_same_seed_and_rounds_and_workloads_another() -> None:
    a, b = Fake("a", []), Fake("b", [])
    await harness.run(benchmark(a.arm(), b.arm(), workloads=(SMALL, LARGE)), OPTIONS)
    assert a.seeds == b.seeds
    assert len(set(a.seeds)) == 6


async def test_async_arms_are_set_up_once_before_and_torn_down_once_after() -> None:
    events: list[str] = []

    def note(what: str) -> Callable[[], None]:
        return lambda: events.append(what)

    async def measure(workload: Workload[Size]) -> Measurement:
        events.append("measure")
        return {"num_tokens": workload.params.num_tokens}

    async def teardown() -> None:
        events.append("teardown")

    await harness.run(benchmark(Arm("a", measure, setup=note("setup"), teardown=teardown)), OPTIONS)
    assert events == ["setup", "measure", "measure", "measure", "teardown"]


async def test_a_failing_arm_is_reported_and_the_others_go_on() -> None:
    trials = await harness.run(benchmark(Fake("a", []).arm(), Arm("b", broken)), OPTIONS)
    assert [trial.error for trial in trials if trial.arm == "b"] == ["RuntimeError: out of tea"] * 3
    assert all(trial.is_clean for trial in trials if trial.arm == "a")
    text = printed(trials)
    assert "FAILED  round 1 · small · b: RuntimeError: out of tea" in text
    assert "FAILED  warm-up · small · b" in text


async def test_an_arm_that_cannot_be_set_up_fails_and_is_not_measured() -> None:
    a, b = Fake("a", []), Fake("b", [])

    def setup() -> None:
        raise OSError("no device")

    trials = await harness.run(benchmark(a.arm(), Arm("b", b.measure, setup=setup)), OPTIONS)
    assert [(trial.workload, trial.error) for trial in trials if trial.arm == "b"] == [
        (harness.SETUP, "OSError: no device")
    ]
    assert len(a.seeds) == 3
    assert not b.seeds


async def test_a_failing_teardown_is_reported() -> None:
    def teardown() -> None:
        raise OSError("stuck")

    trials = await harness.run(benchmark(Arm("a", Fake("a", []).measure, teardown=teardown)), OPTIONS)
    assert trials[-1] == Trial(harness.TEARDOWN, "a", None, error="OSError: stuck")


async def test_what_is_not_a_number_fails() -> None:
    trials = await harness.run(benchmark(Fake("a", [], values=[float("nan")]).arm()), OPTIONS)
    assert all("not a finite number: speed_per_s" in str(trial.error) for trial in trials)


@pytest.mark.parametrize(
    ("arm", "code"),
    [
        (Arm[Size]("a", lambda _: {"speed_per_s": 2.0}), 0),
        (Arm[Size]("a", lambda _: Measured({}, refusals={"Overloaded": 3})), 0),
        (Arm[Size]("a", lambda _: Measured({}, errors={"WorkerLost": 1})), 1),
        (Arm[Size]("a", broken), 1),
    ],
)
async def test_the_exit_code_tells_of_failures_and_errors_but_not_refusals(
    arm: Arm[Size], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await harness.execute(benchmark(arm), OPTIONS) == code
    assert capsys.readouterr().out


async def test_json_has_conditions_first_then_one_row_a_metric(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = Fake("a", [], values=[9, 1, 2, 4]), Fake("b", [], values=[9, 3, 2, 8])
    options = Options(rounds=3, warmup_rounds=1, pause_s=0.0, quick=True, json_path=tmp_path / "out.json")
    assert await harness.execute(benchmark(a.arm(), b.arm()), options) == 0
    first, *others = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert first["quick"] is True
    assert first["conditions"]["options"]["rounds"] == 3
    assert first["conditions"]["config"] == {"workload small": {"num_tokens": 1}}
    assert {row["arm"]: row for row in others}["b"] == {
        "workload": "small",
        "arm": "b",
        "metric": "speed_per_s",
        "value": 3,
        "min": 2,
        "max": 8,
        "unit": "1/s",
        "ratio": 2.0,
        "baseline": "a",
        "values": [3, 2, 8],
    }
    assert QUICK in capsys.readouterr().out


def test_json_counts_errors_refusals_and_failures() -> None:
    trials = [
        Trial("w", "a", 0, Measured({}, errors={"WorkerLost": 1}, refusals={"Overloaded": 2})),
        Trial("w", "a", 1, Measured({}, refusals={"Overloaded": 3})),
        Trial("w", "a", 2, error="OSError: gone"),
    ]
    found = list(rows(Report(Observation.begin("fake", OPTIONS, {}).end(), trials, ["a", "b"], "a")))[1:]
    assert found == [
        {"workload": "w", "arm": "a", "errors": "WorkerLost", "number": 1},
        {"workload": "w", "arm": "a", "refusals": "Overloaded", "number": 5},
        {"workload": "w", "arm": "a", "round": 2, "failed": "OSError: gone"},
    ]


def test_the_report_is_plain_markdown_when_piped() -> None:
    text = printed([Trial("w", "a", 0, Measured({"x_ms": 2.0})), Trial("w", "b", 0, Measured({"x_ms": 3.0}))])
    assert "\x1b" not in text
    assert "| x_ms" in text
    assert "1.50x" in text
    assert QUICK not in text


def test_quick_runs_say_so() -> None:
    assert QUICK in printed([], quick=True)


@pytest.mark.parametrize(
    ("metric", "unit"),
    [("tokens_per_s", "1/s"), ("wall_s", "s"), ("ttft_p50_ms", "ms"), ("num_refused", "count"), ("speedup", "")],
)
def test_a_metric_carries_its_unit_in_its_name(metric: str, unit: str) -> None:
    assert unit_of(metric) == unit


def test_a_benchmark_without_arms_or_with_two_of_one_name_is_refused() -> None:
    arm = Fake("a", []).arm()
    with pytest.raises(ValueError, match="needs a workload and an arm"):
        benchmark()
    with pytest.raises(ValueError, match="two arms of one name"):
        benchmark(arm, arm)
    with pytest.raises(ValueError, match="'c' is not an arm"):
        Benchmark("fake", [SMALL], [arm], baseline="c")


def test_conditions_name_the_flags_and_the_commit(tmp_path: Path) -> None:
    assert cpu_flags("model name\t: X\nflags\t\t: fpu avx2 amx_bf16 sse\n") == ("avx2", "amx_bf16")
    assert revision(tmp_path) == ("unknown", True)
    conditions = Observation.begin("fake", OPTIONS, {}).end()
    assert conditions.machine.num_cores >= 1
    assert "numpy" in conditions.machine.versions
    assert json.loads(json.dumps(conditions.as_json()))["benchmark"] == "fake"


def test_the_baseline_has_the_first_column() -> None:
    trials = [Trial("w", arm, 0, Measured({"x_ms": 2.0})) for arm in ("c", "b", "a")]
    file = io.StringIO()
    print_report(Report(Observation.begin("fake", OPTIONS, {}).end(), trials, ["a", "b", "c"], "b"), file)
    (header,) = [line for line in file.getvalue().splitlines() if line.startswith("| metric")]
    assert [cell.strip() for cell in header.split("|")[3:-1]] == ["b", "a", "/ b", "c", "/ b"]
