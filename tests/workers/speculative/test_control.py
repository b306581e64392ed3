"""What decides how much is drafted: step times, calibration, arms, and the controller's own rule."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.speculative.trees import trees
from workers.speculative.arms import (
    FIRST_PATIENCE,
    HOPELESS,
    LONGEST_WAIT,
    LOSS_SHARE,
    PATIENCE,
    PLAIN,
    POSTPONED,
    RETRIAL,
    SOON,
    WARM_UP,
    Arms,
)
from workers.speculative.calibration import HIGHEST, Calibration
from workers.speculative.controller import FEWEST, Controller
from workers.speculative.protocol import Key
from workers.speculative.step_times import DOUBT, GUESSED_SLOPE, OUTLIER, TRUSTED_AFTER, WEIGHT, StepTimes
from workers.speculative.tree import ROOT, DraftTree


def measured(seconds: dict[int, float]) -> StepTimes:
    """By number of rows, as often as is trusted."""
    times = StepTimes()
    for rows, taken in seconds.items():
        for _ in range(TRUSTED_AFTER):
            times.observe(rows, taken)
    return times


# Step times


def test_a_time_is_known_once_it_has_been_measured_often_enough() -> None:
    times = StepTimes()
    for seconds in (9.0, 1.0):
        times.observe(4, seconds)
        assert not times
    times.observe(4, 2.0)
    assert times
    assert times.estimate(4) == 2.0  # the median: the first steps are the slow ones


def test_a_known_time_follows_slowly_what_is_measured() -> None:
    times = measured({4: 1.0})
    times.observe(4, 2.0)
    assert times.estimate(4) == pytest.approx(1 + WEIGHT)
    for _ in range(100):
        times.observe(4, 2.0)
    assert times.estimate(4) == pytest.approx(2.0, rel=1e-3)


def test_an_outlier_counts_no_more_than_a_slow_step() -> None:
    times = measured({4: 1.0})
    times.observe(4, 1000.0)
    assert times.estimate(4) == pytest.approx(1 + WEIGHT * (OUTLIER - 1))


def test_between_known_times_lies_a_straight_line() -> None:
    times = measured({2: 1.0, 6: 3.0})
    assert times.estimate(3) == pytest.approx(1.5)
    assert times.estimate(4) == pytest.approx(2.0)
    assert times.beyond(2, 1.0, 6) == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])


def test_below_the_known_a_step_takes_as_long_as_the_smallest_known() -> None:
    assert measured({6: 3.0}).estimate(2) == 3.0


def test_beyond_the_known_each_row_is_guessed_to_cost_a_little() -> None:
    times = measured({4: 2.0})
    assert times.estimate(14) == pytest.approx(2 * (1 + 10 * GUESSED_SLOPE))
    assert StepTimes().beyond(1, 2.0, 3) == pytest.approx([2.0, 2 + 2 * GUESSED_SLOPE, 2 + 4 * GUESSED_SLOPE])


def test_steps_of_many_rows_are_counted_with_those_of_nearly_as_many() -> None:
    times = StepTimes()
    for rows in (17, 18, 20):
        times.observe(rows, 1.0)
    assert times.estimate(19) == 1.0


def test_doubt_makes_every_step_seem_faster() -> None:
    times = measured({2: 1.0, 6: 3.0})
    times.doubt()
    assert times.estimate(2) == pytest.approx(DOUBT)
    assert times.estimate(6) == pytest.approx(3 * DOUBT)


MEASUREMENTS = st.lists(st.tuples(st.integers(1, 300), st.floats(1e-4, 10)), max_size=60)


@given(MEASUREMENTS, st.integers(1, 100), st.floats(1e-4, 10), st.integers(0, 200))
@settings(deadline=None)
def test_times_beyond_a_step_never_fall(seen: list[tuple[int, float]], first: int, first_s: float, more: int) -> None:
    times = StepTimes()
    for rows, seconds in seen:
        for _ in range(TRUSTED_AFTER):
            times.observe(rows, seconds)
    guessed = times.beyond(first, first_s, first + more)
    assert len(guessed) == more + 1
    assert guessed[0] == first_s
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in pairwise(guessed))


@given(MEASUREMENTS)
@settings(deadline=None)
def test_a_step_of_more_rows_is_never_expected_to_be_faster(seen: list[tuple[int, float]]) -> None:
    times = measured(dict([(1, 1.0), *seen]))
    expected = [times.estimate(rows) for rows in range(1, 310)]
    assert all(later >= earlier * (1 - 1e-9) for earlier, later in pairwise(expected))


# Arms


def played(arms: Arms, gains: Sequence[float], num_steps: int, *, noise: float = 0.0, seed: int = 0) -> list[int]:
    """The arms chosen in a world where each has its gain, give or take."""
    draw, chosen = random.Random(seed), []
    for _ in range(num_steps):
        number = arms.choose()
        chosen.append(number)
        arms.learn(number, 1.0 if number == PLAIN else gains[number] * (1 + noise * draw.uniform(-1, 1)))
    return chosen


@pytest.mark.parametrize("gains", [(1.0, 2.0, 1.5, 0.5), (1.0, 1.5, 0.5, 2.0), (1.0, 0.5, 0.7, 0.9), (1.0, 1.2, 1.6)])
def test_every_arm_is_tried_and_the_best_is_used(gains: Sequence[float]) -> None:
    arms = Arms(len(gains))
    chosen = played(arms, gains, 3000, noise=0.3)
    best = max(range(len(gains)), key=gains.__getitem__)
    assert set(chosen) == set(range(len(gains)))
    assert arms.best == best
    assert chosen[-1000:].count(best) > 900
    assert arms.gains == pytest.approx(gains, rel=0.15)


def test_an_arm_that_does_not_pay_is_tried_ever_more_rarely_but_always_again() -> None:
    chosen = played(Arms(2), (1.0, 0.5), 10 * LONGEST_WAIT)
    trials = [step for step in range(1, len(chosen)) if chosen[step] != PLAIN and chosen[step - 1] == PLAIN]
    pauses = [later - earlier for earlier, later in pairwise(trials)]
    assert all(later >= earlier - RETRIAL - POSTPONED for earlier, later in pairwise(pauses))
    assert pauses[0] < LONGEST_WAIT
    assert LONGEST_WAIT - POSTPONED <= pauses[-1] < LONGEST_WAIT * 1.2
    assert chosen[-3 * LONGEST_WAIT :].count(PLAIN) > 0.98 * 3 * LONGEST_WAIT


def test_another_arm_is_used_once_it_has_become_better() -> None:
    arms = Arms(3)
    played(arms, (1.0, 2.0, 1.2), 1000, noise=0.2)
    assert arms.best == 1
    chosen = played(arms, (1.0, 0.6, 1.8), 6 * LONGEST_WAIT, noise=0.2)
    assert arms.best == 2
    assert chosen[-200:].count(2) > 150
    played(arms, (1.0, 0.6, 0.6), 6 * LONGEST_WAIT, noise=0.2)
    assert arms.best == PLAIN


def test_arms_that_are_reconsidered_are_tried_soon() -> None:
    arms = Arms(3)
    gains = (1.0, 0.9, HOPELESS - 0.2)
    played(arms, gains, 6 * LONGEST_WAIT)
    while 1 in played(arms, gains, 40):
        pass
    arms.reconsider()
    assert 1 in played(arms, gains, 2 * SOON)  # the other is not worth it
    assert arms.best == PLAIN


def test_little_is_lost_by_trials_however_often_they_are_asked_for() -> None:
    arms, gains, lost = Arms(4), (1.0, 1.5, 0.9, 0.8), 0.0
    played(arms, gains, 1000)
    for _ in range(500):
        arms.reconsider()
        lost += sum(1 - gains[number] / 1.5 for number in played(arms, gains, 10))
    assert 0 < lost <= 1.2 * LOSS_SHARE * 6000


def test_an_arm_that_beckons_is_tried_at_once() -> None:
    arms, gains = Arms(4), (1.0, 0.9, 0.9, 0.9)
    played(arms, gains, 2000)
    while set(played(arms, gains, 30)) != {PLAIN}:
        pass
    arms.beckon({2})
    assert played(arms, (1.0, 0.9, 3.0, 0.9), RETRIAL + 1) == [2] * RETRIAL + [2]
    assert arms.best == 2


def test_plain_steps_that_follow_in_any_case_can_be_taken_together() -> None:
    one, other, gains = Arms(3), Arms(3), (1.0, 0.7, 0.6)
    assert one.rest(7) == 0  # nothing is known yet
    for arms in (one, other):
        played(arms, gains, 2000)
    for _ in range(300):
        num_steps = one.rest(7)
        assert played(other, gains, num_steps) == [PLAIN] * num_steps
        chosen = played(one, gains, 1)
        assert chosen == played(other, gains, 1)
    assert one.gains == other.gains


def test_what_costs_little_to_try_is_tried_often() -> None:
    arms, gains, chosen = Arms(3), (1.0, 0.99, 0.8), []
    played(arms, gains, 1000)
    for _ in range(100):
        arms.reconsider()
        chosen += played(arms, gains, 20)
    assert chosen.count(1) > 0.1 * len(chosen)
    assert chosen.count(2) < 0.1 * len(chosen)


def test_another_size_of_batch_begins_with_what_is_known() -> None:
    known, arms = Arms(3), Arms(3)
    played(known, (1.0, 1.8, 0.5), 500)
    arms.inherit(known)
    assert arms.best == 1
    assert played(arms, (1.0, 1.8, 0.5), 300).count(1) > 280
    assert played(arms, (1.0, 0.6, 0.5), 2000)[-1] == PLAIN  # its own experience counts more


def test_steps_of_a_trial_before_the_first_draft_do_not_count() -> None:
    arms = Arms(2)
    while arms.choose() == PLAIN:
        arms.learn(PLAIN, 1.0)
    for _ in range(WARM_UP):
        arms.learn(1, 0.5, has_drafts=False)
        assert arms.choose() == 1
    assert arms.gains[1] == 1.0
    arms.learn(1, 0.5, has_drafts=False)  # it had its time
    assert arms.gains[1] == 0.5


def test_a_trial_that_is_hopeless_ends_early() -> None:
    arms = Arms(2)
    chosen = played(arms, (1.0, 0.1), 12 * LONGEST_WAIT)
    runs = [len(list(steps)) for number, steps in groupby(chosen) if number == 1]
    assert runs[0] == FIRST_PATIENCE
    assert runs[-2] == PATIENCE


def test_one_lucky_step_does_not_win() -> None:
    arms = Arms(2)
    played(arms, (1.0, 0.5), 200)
    arms.learn(1, 1000.0)
    played(arms, (1.0, 0.5), 400)
    assert arms.best == PLAIN


# Calibration


def lone(probability: float, source: int = 1) -> DraftTree:
    return DraftTree((5,), (ROOT,), (probability,), (source,))


def tried(calibration: Calibration, key: Key, *, claim: float, truth: float, num_steps: int, source: int = 1) -> None:
    draw = random.Random(3)
    for _ in range(num_steps):
        calibration.observe(key, lone(claim, source), (0,) if draw.random() < truth else ())


@pytest.mark.parametrize("claim", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("truth", [0.1, 0.5, 0.9])
def test_claims_become_frequencies(claim: float, truth: float) -> None:
    calibration = Calibration()
    assert calibration.path_probabilities(("new", 0), lone(claim)) == pytest.approx([claim])
    tried(calibration, ("old", 0), claim=claim, truth=truth, num_steps=1500)
    assert calibration.path_probabilities(("new", 0), lone(claim)) == pytest.approx([truth], abs=0.08)


def test_each_source_and_each_level_of_claims_has_its_own_frequency() -> None:
    calibration = Calibration()
    tried(calibration, ("old", 0), claim=0.5, truth=0.9, num_steps=500)
    tried(calibration, ("old", 0), claim=0.5, truth=0.1, num_steps=500, source=2)
    path = [calibration.path_probabilities(("new", 0), lone(0.5, source))[0] for source in (1, 2, 3)]
    assert path == pytest.approx([0.9, 0.1, 0.5], abs=0.1)
    assert calibration.path_probabilities(("new", 0), lone(0.25)) == pytest.approx([0.25])


def test_a_path_is_as_probable_as_its_nodes_together_and_nothing_is_certain() -> None:
    tree = DraftTree((1, 2, 3), (ROOT, 0, 0), (0.5, 0.5, 1.0), (1, 1, 1))
    assert Calibration().path_probabilities(("a", 0), tree) == pytest.approx([0.5, 0.25, 0.5 * HIGHEST])


def test_only_nodes_whose_parents_were_right_are_counted() -> None:
    calibration = Calibration()
    tree = DraftTree((1, 2, 3, 4), (ROOT, ROOT, 0, 1), (0.9, 0.5, 0.3, 0.1), (1, 1, 1, 1))
    for _ in range(400):
        calibration.observe(("a", 0), tree, (0,))
    found = [calibration.path_probabilities(("b", 0), lone(claim))[0] for claim in (0.9, 0.5, 0.3, 0.1)]
    assert found == pytest.approx([HIGHEST, 0.0, 0.0, 0.1], abs=0.02)


def test_a_sequence_whose_drafts_fail_is_believed_less_than_others() -> None:
    calibration = Calibration()
    for _ in range(30):
        calibration.observe(("good", 0), lone(0.5), (0,))
        calibration.observe(("bad", 0), lone(0.5), ())
    bad, good, new = (calibration.path_probabilities((name, 0), lone(0.5))[0] for name in ("bad", "good", "new"))
    assert bad < 0.6 * new
    assert good > 1.3 * new
    calibration.forget(("bad", 0))
    calibration.forget(("never seen", 0))
    assert calibration.path_probabilities(("bad", 0), lone(0.5)) == [new]


# The controller


def informed(num_sequences: int, times: Sequence[float], *, max_nodes: int = 24, num_drafters: int = 1) -> Controller:
    """Knows how long steps of num_sequences rows, and of up to len(times) - 1 more, take."""
    controller = Controller(num_drafters, max_nodes=max_nodes)
    for _ in range(TRUSTED_AFTER):
        controller.observe_plain(num_sequences, times[0])
        for more, seconds in enumerate(times[1:], start=1):
            controller.observe_drafted(num_sequences, num_sequences + more, num_sequences, seconds)
    return controller


def rate(num_sequences: int, probabilities: Sequence[float], times: Sequence[float]) -> float:
    return (num_sequences + sum(probabilities)) / times[len(probabilities)]


STEPS = st.lists(st.floats(0, 0.6), min_size=15, max_size=15)


@given(st.lists(trees(6), min_size=1, max_size=2), st.integers(0, 2), STEPS)
@settings(deadline=None)
def test_the_nodes_that_pay_most_are_admitted(drafts: list[DraftTree], num_others: int, slopes: list[float]) -> None:
    """Against brute force. Up to 16 rows are counted exactly, and nothing has proved a claim wrong."""
    num_sequences = len(drafts) + num_others
    times = [1.0]
    for slope in slopes[: 16 - num_sequences]:
        times.append(times[-1] + slope)
    controller = informed(num_sequences, times)
    asked = {(str(number), 0): _below(draft, HIGHEST) for number, draft in enumerate(drafts)}
    admitted = controller.admit(asked, num_sequences)
    for kept in admitted.values():
        assert len(kept)
        kept.check()
    everything = sorted([p for draft in asked.values() for p in draft.path_probabilities], reverse=True)
    taken = sorted([p for kept in admitted.values() for p in kept.path_probabilities], reverse=True)
    assert taken == pytest.approx(everything[: len(taken)])
    best = max(rate(num_sequences, everything[:count], times) for count in range(len(everything) + 1))
    assert rate(num_sequences, taken, times) == pytest.approx(best)


def _below(draft: DraftTree, highest: float) -> DraftTree:
    probabilities = tuple(min(probability, highest) for probability in draft.probabilities)
    return DraftTree(draft.tokens, draft.parents, probabilities, (1,) * len(draft))


SURE = DraftTree.chain([1, 2, 3, 4], [0.9] * 4)
UNSURE = DraftTree.chain([1, 2, 3, 4], [0.2] * 4)


def test_everything_is_admitted_where_rows_cost_nothing() -> None:
    controller = informed(2, [1.0] * 10)
    drafts = {("a", 0): SURE, ("b", 0): UNSURE}
    assert controller.admit(drafts, 2) == drafts


def test_nothing_is_admitted_where_each_row_costs_a_step() -> None:
    controller = informed(2, [1.0 + more for more in range(10)])
    assert controller.admit({("a", 0): SURE, ("b", 0): UNSURE}, 2) == {}
    assert controller.admit({}, 2) == {}
    assert controller.admit({("a", 0): DraftTree()}, 2) == {}


def test_a_sure_draft_is_admitted_deeper_than_an_unsure_one() -> None:
    controller = informed(2, [1.0 + 0.15 * more for more in range(10)])
    admitted = controller.admit({("a", 0): UNSURE, ("b", 0): SURE}, 2)
    assert admitted == {("b", 0): SURE}


def test_what_proves_wrong_is_not_admitted_any_more() -> None:
    controller = informed(1, [1.0 + 0.15 * more for more in range(10)])
    assert controller.admit({("a", 0): SURE}, 1)
    for _ in range(50):
        controller.verified(("a", 0), SURE, ())
    assert not controller.admit({("a", 0): SURE}, 1)
    assert not controller.admit({("b", 0): SURE}, 1)  # nor of another sequence: the source is known


def test_times_that_let_nothing_be_admitted_are_doubted() -> None:
    """They would never be measured again."""
    controller = informed(1, [1.0, 2.5, 2.5, 2.5, 2.5])
    assert any(controller.admit({("a", 0): lone(0.9)}, 1) for _ in range(200))


def test_an_unmeasured_machine_is_guessed_to_take_drafts() -> None:
    assert Controller(1, max_nodes=8).admit({("a", 0): SURE}, 1) == {("a", 0): SURE}


DEEP = DraftTree.chain(range(1, 13), [0.9] * 12)


@pytest.mark.parametrize("num_sequences", [1, 2, 7])
def test_more_nodes_are_proposed_where_all_are_admitted_and_fewer_where_none_is(num_sequences: int) -> None:
    def widths(times: Sequence[float]) -> list[int]:
        controller, found = informed(num_sequences, times), []
        for _ in range(15):
            found.append(controller.num_to_propose(num_sequences))
            controller.admit({(str(number), 0): DEEP for number in range(num_sequences)}, num_sequences)
        assert all(FEWEST <= width <= 24 for width in found)
        return found

    wider, narrower = widths([1.0] * 100), widths([10.0**more for more in range(100)])
    assert wider == sorted(wider)
    assert wider[-1] == 24
    assert narrower == sorted(narrower, reverse=True)
    assert narrower[-1] == FEWEST


@pytest.mark.parametrize("max_nodes", [1, 2, 63])
def test_no_more_nodes_are_proposed_than_a_draft_may_have(max_nodes: int) -> None:
    controller = informed(1, [1.0] * 100, max_nodes=max_nodes)
    for _ in range(20):
        assert 1 <= controller.num_to_propose(1) <= max_nodes
        controller.admit({("a", 0): DEEP}, 1)
    assert controller.num_to_propose(1) == max_nodes


def test_sizes_of_batches_are_judged_apart() -> None:
    controller = informed(2, [1.0] * 40)
    first = controller.num_to_propose(20)
    for _ in range(20):
        controller.admit({("a", 0): DEEP, ("b", 0): DEEP}, 2)
    assert controller.num_to_propose(2) > first
    assert controller.num_to_propose(20) == first


def driven(controller: Controller, gain: Callable[[tuple[int, ...]], float], num_steps: int) -> list[tuple[int, ...]]:
    """The drafters asked in steps of four sequences and one second, whose tokens depend on who was asked."""
    chosen = []
    for _ in range(num_steps):
        asked = controller.choose(4)
        chosen.append(asked)
        if asked:
            controller.observe_drafted(4, 8, round(4 * gain(asked)), 1.0)
        else:
            controller.observe_plain(4, 1.0)
    return chosen


def test_plain_steps_come_first_and_every_step_is_counted() -> None:
    controller = Controller(2, max_nodes=8)
    assert controller.num_steps == {(): 0, (0,): 0, (1,): 0, (0, 1): 0}
    chosen = driven(controller, len, 700)
    assert chosen[:TRUSTED_AFTER] == [()] * TRUSTED_AFTER
    assert controller.num_steps == {asked: chosen.count(asked) for asked in ((), (0,), (1,), (0, 1))}
    assert all(controller.num_steps.values())


@pytest.mark.parametrize("best", [(0,), (1,), (0, 1), ()])
def test_the_drafters_that_gain_most_are_asked(best: tuple[int, ...]) -> None:
    controller = Controller(2, max_nodes=8)
    chosen = driven(controller, lambda asked: 2.0 if asked == best else 0.5, 1500)
    assert chosen[-500:].count(best) > 450


def test_new_sequences_have_what_did_not_pay_tried_again_soon() -> None:
    controller = Controller(1, max_nodes=8)
    driven(controller, lambda _: 0.9, 3000)
    quiet = driven(controller, lambda _: 0.9, 30)
    assert controller.choose(4, has_new=True) == ()
    controller.observe_plain(4, 1.0)
    assert (0,) in driven(controller, lambda _: 0.9, 30)
    assert (0,) not in quiet


def test_a_lone_drafter_is_asked_alone_or_not_at_all() -> None:
    assert set(Controller(1, max_nodes=8).num_steps) == {(), (0,)}


def test_a_forgotten_sequence_is_judged_like_a_new_one() -> None:
    controller = informed(1, [1.0 + 0.3 * more for more in range(10)])
    for _ in range(40):
        controller.verified(("good", 0), lone(0.9), (0,))
        controller.verified(("bad", 0), lone(0.9), ())
    assert not controller.admit({("bad", 0): lone(0.9)}, 1)
    controller.forget(("bad", 0))
    assert controller.admit({("bad", 0): lone(0.9)}, 1)
