"""What speculation gains, predicted: formulas against play and known figures, and the arithmetic of the check."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest

from benchmarks import drafting_check, speculation_model
from benchmarks.drafting_check import (
    CHAIN_ROWS,
    LONG_DRAFT,
    PLAIN_ROWS,
    SEQUENCES,
    SHORT_DRAFT,
    Gain,
    Inputs,
    Oracle,
    Point,
    Rig,
    Times,
    infer,
    points,
)
from benchmarks.drafting_rounds import (
    WAYS,
    Curve,
    Ready,
    Setting,
    StepTime,
    Way,
    best,
    best_draft,
    expected_tokens,
    predict,
    simulate,
)
from protos.errors import ModelError
from workers.speculative.protocol import Context

H200 = StepTime.with_knee(8e-3, 250)
KNEE = StepTime(Curve(((1, 8e-3), (20, 8e-3), (60, 20e-3))), per_sequence_s=1e-4)  # within reach of a few sequences
NUM_ROUNDS, NUM_SEEDS = 3000, 16


def setting(
    alpha: float = 0.8,
    num_sequences: int = 8,
    round_trip_ms: float = 1.0,
    *,
    step: StepTime = H200,
    draft_ms: float = 1.2,
    ready: Ready | None = None,
) -> Setting:
    draft, ready = Curve.level(draft_ms / 1000), ready or Ready(0.8, 0.8)
    return Setting(alpha, draft, step, num_sequences, round_trip_ms / 1000, ready=ready)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_expected_tokens_are_those_of_all_outcomes(alpha: float) -> None:
    for num_draft in range(1, 7):
        total = 0.0
        for outcome in itertools.product((True, False), repeat=num_draft):
            probability = math.prod(alpha if is_right else 1 - alpha for is_right in outcome)
            total += probability * (1 + len(list(itertools.takewhile(bool, outcome))))
        assert expected_tokens(alpha, num_draft) == pytest.approx(total)


PLAYED = [
    setting(0.8, 8, 4.0, step=KNEE),
    setting(0.5, 3, 1.0, step=KNEE, ready=Ready(0.9, 0.3)),
    setting(0.6, 1, 0.2, ready=Ready(0.6, 0.0)),
    setting(0.0, 2, 1.0, ready=Ready(0.5, 0.7)),
    setting(1.0, 4, 9.0, step=KNEE, ready=Ready(0.7, 0.0)),
    replace(setting(0.7, 2, 0.0), overhead_s=2e-3, draft=Curve(((1, 1e-3), (3, 5e-3)))),
]


@pytest.mark.parametrize("case", PLAYED, ids=range(len(PLAYED)))
@pytest.mark.parametrize("way", WAYS)
def test_formulas_say_what_play_gives(way: Way, case: Setting) -> None:
    expected = predict(way, case, 3)
    played = [simulate(way, case, 3, num_rounds=NUM_ROUNDS, seed=seed) for seed in range(NUM_SEEDS)]
    expect_mean([one.num_tokens for one in played], expected.num_tokens)
    expect_mean([one.seconds for one in played], expected.seconds)


def expect_mean(values: Sequence[float], expected: float) -> None:
    """Within five standard errors; the first rounds are not yet the long run's: one round in a thousand is allowed."""
    allowed = 5 * stdev(values) / math.sqrt(len(values)) + expected / 1000
    assert abs(fmean(values) - expected) < allowed
    assert allowed < 0.03 * expected, "the comparison says nothing"


def test_play_repeats_by_its_seed() -> None:
    first, again, other = (simulate("ahead", setting(), 4, num_rounds=50, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("round_trip_ms", "remote", "ahead"), [(0.2, 2.08, 3.33), (1.0, 1.97, 3.23), (4.0, 1.65, 2.59)]
)
def test_the_designs_figures(round_trip_ms: float, remote: float, ahead: float) -> None:
    case = setting(round_trip_ms=round_trip_ms)
    assert best("remote", case).gain == pytest.approx(remote, abs=0.006)
    assert best("ahead", case).gain == pytest.approx(ahead, abs=0.006)


def test_drafting_is_off_where_it_does_not_pay() -> None:
    busy = setting(alpha=0.6, num_sequences=128, round_trip_ms=4.0)
    assert best_draft("remote", busy).gain == pytest.approx(0.96, abs=0.006)
    assert best("remote", busy) == (0, 1.0)
    assert best("inside", setting(alpha=0.0)) == (0, 1.0)
    assert best("ahead", busy).num_draft > 0


@pytest.mark.parametrize("way", WAYS)
def test_the_best_length_is_the_best_of_all(way: Way) -> None:
    for case in (setting(), setting(0.6, 32, 4.0), setting(0.9, 4, 0.2, step=KNEE)):
        gains = {k: predict(way, case, k).gain(case) for k in range(1, 9)}
        choice = best(way, case, 8)
        assert choice.gain == max(gains.values()) == gains[choice.num_draft]


def test_what_hides_and_what_does_not() -> None:
    """With drafts that always serve, drafting costs nothing until it takes longer than the step."""
    certain = setting(ready=Ready(1, 1), round_trip_ms=2.0)
    for way in ("ahead", "ahead-together", "ahead-unwaiting"):
        assert predict(way, certain, 5).gain(certain) == pytest.approx(expected_tokens(0.8, 5))  # 5 x 1.2 + 2 = 8 ms
        assert predict(way, certain, 6).seconds == pytest.approx(9.2e-3)
    hopeless = replace(certain, ready=Ready(0, 0))
    assert predict("ahead", hopeless, 3) == predict("ahead-together", hopeless, 3) == predict("remote", hopeless, 3)
    assert predict("ahead-unwaiting", hopeless, 3).gain(hopeless) == pytest.approx(1)
    assert predict("inside", certain, 3).seconds == pytest.approx(predict("remote", certain, 3).seconds - 2e-3)


def test_waiting_together_is_worse_the_more_there_are() -> None:
    gains = [best("ahead-together", setting(num_sequences=size)).gain for size in (1, 2, 8, 32)]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] == best("ahead", setting(num_sequences=1)).gain
    assert gains[-1] == pytest.approx(best("remote", setting()).gain, abs=0.01)


def test_curves_are_straight_between_points_and_go_on() -> None:
    curve = Curve(((2, 10.0), (4, 20.0), (8, 24.0)))
    assert [curve(x) for x in (0, 2, 3, 4, 6, 8, 10)] == [10, 10, 15, 20, 22, 24, 26]
    assert Curve.level(3.0)(100) == 3
    step = StepTime.with_knee(8.0, 250)
    assert [step(rows, 1) for rows in (1, 250, 375, 1000)] == [8, 8, 12, 32]
    for wrong in ((), ((1, 1.0), (1, 2.0)), ((2, 1.0), (1, 2.0))):
        with pytest.raises(ValueError, match="curve"):
            Curve(wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"alpha": 1.1}, {"alpha": math.nan}, {"num_sequences": 0}, {"round_trip_s": -1.0}, {"overhead_s": math.inf}],
)
def test_a_setting_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must be|not a time"):
        replace(setting(), **wrong)
    with pytest.raises(ValueError, match="probability"):
        Ready(0.5, -0.1)


# The check


TRUE = Inputs(
    StepTime(Curve(tuple((rows, 2e-4 + 3e-5 * rows) for rows in sorted({1, 2, *CHAIN_ROWS}))), per_sequence_s=4e-5),
    overhead_s=1e-4,
    draft=Curve(tuple((size, 5e-5 * size) for size in SEQUENCES)),
    draft_fixed=Curve(tuple((size, 1e-4 + 1e-6 * size) for size in SEQUENCES)),
)


def times(factor: float = 1.0) -> Times:
    """What a machine measures that is as TRUE says; `factor`: something held all plain steps up."""

    def drafting(size: int, num_draft: int) -> float:
        return TRUE.draft_fixed(size) + num_draft * TRUE.draft(size)

    return Times(
        plain={rows: TRUE.step(rows, rows) * factor for rows in PLAIN_ROWS},
        chains={rows: TRUE.step(rows, 2) + TRUE.overhead_s for rows in CHAIN_ROWS},
        short_drafts={size: drafting(size, SHORT_DRAFT) for size in SEQUENCES},
        long_drafts={size: drafting(size, LONG_DRAFT) for size in SEQUENCES},
    )


DISTURBED = replace(times(), chains={**times().chains, 8: 1.0})  # one of those that the rest is inferred from


def test_inputs_are_found_again_from_what_is_measured() -> None:
    found = infer([times(), times(7.0), times()])  # the machine was busy once
    assert found.are_possible
    assert found.overhead_s == pytest.approx(TRUE.overhead_s)
    assert found.step.per_sequence_s == pytest.approx(TRUE.step.per_sequence_s)
    for rows in (1, 3, 9, 50, 144):
        assert found.step(rows, 4) == pytest.approx(TRUE.step(rows, 4))
    for size in SEQUENCES:
        assert found.draft(size) == pytest.approx(TRUE.draft(size))
        assert found.draft_fixed(size) == pytest.approx(TRUE.draft_fixed(size))
    assert not infer([DISTURBED]).are_possible


def test_a_points_prediction_is_the_formulas() -> None:
    plain_s, step_s = TRUE.step(4, 4), TRUE.step(12, 4) + 1e-4
    drafting_s = TRUE.draft_fixed(4) + 2 * TRUE.draft(4)
    free = Point(4, "inside", 0.5, 2, has_model=False)
    assert TRUE.gain(free) == pytest.approx(1.75 * plain_s / step_s)
    assert TRUE.gain(replace(free, has_model=True)) == pytest.approx(1.75 * plain_s / (step_s + drafting_s))
    remote = Point(4, "remote", 0.5, 2, has_model=True, round_trip_s=1e-3)
    assert TRUE.gain(remote) == pytest.approx(1.75 * plain_s / (step_s + drafting_s + 1e-3))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_oracle_is_right_as_often_as_it_is_told(alpha: float) -> None:
    truth, num_drafts = list(range(100, 200)), 2000
    oracle = Oracle({("a", 0): truth}, alpha=alpha, num_draft=4, seed=1)
    context = Context(("a", 0), "", [*range(7), *truth[:10]], 7)
    counts = [0] * 5
    for _ in range(num_drafts):
        [draft] = oracle.propose([context], 64)
        agreed = [token == true for token, true in zip(draft.tokens, truth[10:14], strict=True)]
        counts[len(list(itertools.takewhile(bool, agreed)))] += 1
        assert draft.is_chain
    law = [(1 - alpha) * alpha**num for num in range(4)] + [alpha**4]
    assert [count / num_drafts for count in counts] == pytest.approx(law, abs=0.005)


def test_a_window_makes_the_tokens_that_its_drafts_are_worth(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting_check, "SEQUENCES", (1, 2))
    monkeypatch.setattr(drafting_check, "PLAIN_ROWS", (1, 2))
    monkeypatch.setattr(drafting_check, "MAX_TOKENS", 24)
    rig = Rig(root / "models/target", root / "models/drafter", threads=1, seed=0)
    plain = rig.window(2, None, 5)
    assert (plain.num_steps, plain.num_tokens) == (5, 10)
    free, inside, remote = (Point(2, way, 1.0, 3, has, r) for way, has, r in KINDS)
    for point, gain in rig.measure([free, inside, remote], seed=0).items():
        assert gain.tokens_per_round == 4, point
        assert min(gain.tokens_per_s, gain.plain_step_s) > 0
    wrong = Point(1, "inside", 0.0, 3, has_model=False)
    assert rig.measure([wrong], seed=0)[wrong].tokens_per_round == 1


KINDS: list[tuple[Way, bool, float]] = [("inside", False, 0.0), ("inside", True, 0.0), ("remote", True, 1e-4)]


# The command line


class TrueRig:
    """A machine that is as TRUE says."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def calibrate(self) -> Times:
        return times()

    def measure(self, chosen: Sequence[Point], seed: int) -> dict[Point, Gain]:
        return {point: self._gain(point) for point in chosen}

    def _gain(self, point: Point) -> Gain:
        plain_step_s = TRUE.step(point.num_sequences, point.num_sequences)
        tokens_per_s = TRUE.gain(point) * point.num_sequences / plain_step_s
        return Gain(tokens_per_s, expected_tokens(point.alpha, point.num_draft), plain_step_s)


def test_the_check_prints_conditions_and_how_far_off_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drafting_check, "Rig", TrueRig)
    out = tmp_path / "rows"
    assert speculation_model.main(["--check", "--rounds", "2", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "commit" in printed
    num_points = sum(len(list(points(size))) for size in SEQUENCES)
    assert f"all: {num_points} points, off by 0.0% in the median and by 0.0% at worst" in printed
    assert "plain step of 16: measured 1.320 ms, predicted 1.320 ms" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0]["conditions"]["benchmark"] == "speculation_model"
    gains = {name: [row["value"] for row in rows if row.get("metric") == name] for name in ("gain", "predicted_gain")}
    assert len(gains["gain"]) == num_points
    assert gains["gain"] == pytest.approx(gains["predicted_gain"])


def test_a_check_that_cannot_be_made_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelError("there is no model")

    monkeypatch.setattr(drafting_check, "Rig", refuse)
    assert speculation_model.main(["--check"]) == 2
    assert "there is no model" in capsys.readouterr().err
    monkeypatch.setattr(TrueRig, "calibrate", lambda _: DISTURBED)
    monkeypatch.setattr(drafting_check, "Rig", TrueRig)
    assert speculation_model.main(["--check", "--quick"]) == 1
    assert "too busy" in capsys.readouterr().err


def test_the_table_is_of_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    assert speculation_model.main([]) == 0
    printed = capsys.readouterr().out
    assert "PREDICTIONS" in printed
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + 4 * 2 * 3
    found = {tuple(line[:3]): line[3:] for line in lines}
    assert found["8", "0.8", "1"][1:3] == ["1.97x (5)", "3.23x (6)"]
    assert found["128", "0.6", "4"][1] == "off (0.96x)"


def test_a_setting_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--alpha .8 --draft-ms 1.2 --step-ms 8 --round-trip-ms 1 --sequences 8"
    assert speculation_model.main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "PREDICTIONS" in printed
    for way, num_draft, gain in (("inside", 5, "2.11x"), ("remote", 5, "1.97x"), ("ahead", 6, "3.23x")):
        [line] = [line for line in printed.splitlines() if f" {way} |" in line]
        assert [cell.strip() for cell in line.split("|")[2:4]] == [str(num_draft), gain]
    assert speculation_model.main(["--alpha", "0.01"]) == 0
    assert "|      0 | 1.00x |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--alpha", "1.2"], "1.2 is not a probability"),
        (["--alpha", "nan"], "nan is not a probability"),
        (["--draft-ms", "-1"], "-1 is not a number of 0 or more"),
        (["--step-ms", "0"], "0 is not a number above 0"),
        (["--round-trip-ms", "far"], "far is not a number"),
        (["--sequences", "0"], "0 is below 1"),
        (["--check", "--alpha", "0.5"], "--check measures"),
    ],
)
def test_a_bad_option_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        speculation_model.main(arguments)
    assert said in capsys.readouterr().err
