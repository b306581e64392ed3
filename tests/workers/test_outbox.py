"""What leaves an outbox when: nothing is lost, doubled or out of order, and what is urgent does not wait."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from protos.messages import Delta, Failure, Finish, PositionLogprobs
from workers.outbox import Outbox

LENGTH = Finish("length")


def token(request_id: str, position: int, *, index: int = 0, finish: Finish | None = None) -> Delta:
    """One token, the position its id; the first says what was cached."""
    cached = 3 if position == 0 else None
    logprobs = (PositionLogprobs(position, -0.5),)
    return Delta(request_id, index, f"{position} ", (position,), logprobs, finish, cached)


def paced(interval_s: float) -> Outbox:
    outbox = Outbox()
    outbox.interval_s = interval_s
    outbox.take(100.0)
    return outbox


def test_without_an_interval_everything_leaves_at_once() -> None:
    outbox = Outbox()
    for position in range(3):
        outbox.add(token("a", position))
        assert outbox.take(100.0) == [token("a", position)]
    assert outbox.take(100.0) == []


def test_first_tokens_and_ends_leave_at_once_and_alone() -> None:
    outbox = paced(1.0)
    outbox.add(token("a", 1))
    outbox.add(token("b", 0))
    assert outbox.take(100.1) == [token("b", 0)]
    outbox.add(token("b", 1))
    outbox.add(token("b", 2, finish=LENGTH))
    (last,) = outbox.take(100.2)
    assert isinstance(last, Delta)
    assert (last.request_id, last.token_ids, last.text, last.finish) == ("b", (1, 2), "1 2 ", LENGTH)
    assert outbox.take(101.0) == [token("a", 1)]


def test_tokens_of_an_interval_leave_together() -> None:
    outbox = paced(1.0)
    for position in (1, 2, 3):
        for index in (0, 1):
            outbox.add(token("a", position, index=index))
        assert outbox.take(100.9) == []
    taken = outbox.take(101.0)
    assert [delta.token_ids for delta in taken if isinstance(delta, Delta)] == [(1, 2, 3), (1, 2, 3)]
    assert [delta.index for delta in taken if isinstance(delta, Delta)] == [0, 1]
    assert isinstance(taken[0], Delta)
    assert [position.token_id for position in taken[0].logprobs] == [1, 2, 3]
    outbox.add(token("a", 4))
    assert outbox.take(101.9) == []  # an interval from one message to the next


def test_a_failure_comes_after_what_was_made() -> None:
    outbox = paced(1.0)
    outbox.add(token("a", 1))
    outbox.add(token("b", 1))
    outbox.fail(Failure("a", "EngineFailure", "broken"))
    assert outbox.take(100.1) == [token("a", 1), Failure("a", "EngineFailure", "broken")]
    assert outbox.take(101.0) == [token("b", 1)]


def test_nothing_comes_of_a_dropped_request() -> None:
    outbox = paced(1.0)
    outbox.add(token("a", 1))
    outbox.add(token("b", 1))
    outbox.drop("a")
    assert outbox.take(101.0) == [token("b", 1)]


@given(
    outputs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 1)), min_size=1, max_size=60),
    waits=st.lists(st.floats(0, 1), min_size=60, max_size=60),
    interval_s=st.sampled_from([0.0, 0.3, 2.0]),
)
@settings(max_examples=200, deadline=None)
def test_every_token_leaves_once_and_in_order(
    outputs: list[tuple[str, int]], waits: list[float], interval_s: float
) -> None:
    outbox, now = paced(interval_s), 100.0
    made: dict[tuple[str, int], int] = defaultdict(int)
    left: dict[tuple[str, int], list[int]] = defaultdict(list)

    def take() -> None:
        for delta in outbox.take(now):
            assert isinstance(delta, Delta)
            assert delta.text == "".join(f"{token_id} " for token_id in delta.token_ids)
            left[delta.request_id, delta.index] += delta.token_ids

    for key, wait in zip(outputs, waits, strict=False):
        outbox.add(token(key[0], made[key], index=key[1]))
        made[key] += 1
        now += wait
        take()
    for key in made:
        outbox.add(token(key[0], made[key], index=key[1], finish=LENGTH))
        made[key] += 1
    take()
    assert left == {key: list(range(num_tokens)) for key, num_tokens in made.items()}
