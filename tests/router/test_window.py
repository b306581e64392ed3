"""Rings of counts: windows, restarts, series that come and go, and bounded memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protos.messages import EngineTotals
from router.window import WINDOW_TICKS, BucketWindow, CounterWindow, EngineWindow


def told(seconds: float, tokens: int) -> EngineTotals:
    return EngineTotals(seconds=seconds, generation_tokens=tokens)


def test_what_was_before_the_first_telling_does_not_count() -> None:
    window = EngineWindow()
    window.tick(told(1000.0, 50_000))
    assert window.last() == EngineTotals()
    window.tick(told(1001.0, 50_030))
    assert window.last() == told(1.0, 30)


def test_a_restarted_engine_counts_from_nothing() -> None:
    window = EngineWindow()
    for totals in (told(10.0, 100), told(11.0, 150), told(0.5, 7), told(1.5, 20)):
        window.tick(totals)
    assert window.last() == told(1.0 + 0.5 + 1.0, 50 + 7 + 13)


def test_what_happens_while_nobody_listens_does_not_count() -> None:
    """A worker that comes back after an hour is no peak of throughput."""
    window = EngineWindow()
    for totals in (told(10.0, 100), told(11.0, 150), None, told(3600.0, 900_000), told(3601.0, 900_010)):
        window.tick(totals)
    assert window.last() == told(2.0, 60)


def test_a_window_forgets() -> None:
    window = EngineWindow()
    for second in range(WINDOW_TICKS + 20):
        window.tick(told(float(second), second * second))
    last = WINDOW_TICKS + 19
    assert window.last() == told(float(WINDOW_TICKS), last**2 - (last - WINDOW_TICKS) ** 2)
    assert window.last(5) == told(5.0, last**2 - (last - 5) ** 2)
    assert len(window._sums) == WINDOW_TICKS + 1
    for _ in range(WINDOW_TICKS):
        window.tick(None)
    assert window.last() == EngineTotals()


def test_buckets_survive_workers_that_go_and_come_back() -> None:
    window = BucketWindow(2)
    window.tick({"a": (1, 2)})
    window.tick({"a": (2, 2), "b": (5, 0)})
    window.tick({"b": (5, 1)})  # a has left, and its series with it
    assert window.last() == (7, 3)
    window.tick({"a": (1, 0), "b": (5, 1)})
    assert window.last() == (8, 3)
    window.tick({"a": (0, 1), "b": (5, 1)})  # another one of that name
    assert window.last() == (8, 4)


def test_counters_show_what_moved() -> None:
    window = CounterWindow()
    window.tick({"stop": 3, "Overloaded": 0})
    assert window.last() == {"stop": 3}
    for _ in range(WINDOW_TICKS):
        window.tick({"stop": 3, "Overloaded": 2})
    assert window.last() == {"Overloaded": 2}
    window.tick({"stop": 3, "Overloaded": 2})
    assert window.last() == {}


news = st.one_of(st.none(), st.tuples(st.booleans(), st.integers(0, 50), st.floats(0, 3)))


@given(st.lists(news, max_size=2 * WINDOW_TICKS))
def test_a_window_is_the_sum_of_its_ticks(ticks: list[tuple[bool, int, float] | None]) -> None:
    """Against the plain way: every tick's growth, added up."""
    window, grown, totals = EngineWindow(), list[int](), EngineTotals()
    is_known = False
    for tick in ticks:
        if tick is None:
            window.tick(None)
            is_known = False
            grown.append(0)
            continue
        restarts, tokens, seconds = tick
        before = totals.generation_tokens
        totals = told(seconds, tokens) if restarts else told(totals.seconds + seconds, before + tokens)
        has_reset = totals.generation_tokens < before or totals.seconds < window_seconds(window)
        grown.append((totals.generation_tokens if has_reset else totals.generation_tokens - before) if is_known else 0)
        window.tick(totals)
        is_known = True
    assert window.last().generation_tokens == sum(grown[-WINDOW_TICKS:])


def window_seconds(window: EngineWindow) -> float:
    return 0.0 if window._last is None else window._last.seconds
