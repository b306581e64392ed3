"""Changes are net: a set that applies them is the set they came from, and nothing is told in vain."""

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.kv.journal import Changes, Journal


def test_what_came_and_went_is_not_told() -> None:
    journal = Journal()
    journal.store([1, 2])
    journal.remove([1])
    assert (journal.take(), journal.take()) == (Changes((2,), ()), Changes())
    journal.remove([2])
    journal.store([2])
    assert journal.take() == Changes()


def test_names_keep_their_order() -> None:
    journal = Journal()
    journal.store([5, 3, 9])
    journal.store([1])
    assert journal.take().stored == (5, 3, 9, 1)


@given(st.lists(st.one_of(st.sets(st.integers(0, 9)), st.none()), max_size=40))
@settings(max_examples=200, deadline=None)
def test_a_set_that_applies_the_changes_is_the_set_they_came_from(moves: list[set[int] | None]) -> None:
    """Each set of numbers changes sides, those outside coming in; None: the changes are taken."""
    journal, here, told = Journal(), set[int](), set[int]()
    for move in [*moves, None]:
        if move is not None:
            journal.store(sorted(move - here))
            journal.remove(sorted(move & here))
            here ^= move
            assert len(journal) == len(here ^ told)
            continue
        stored, removed = journal.take()
        assert set(stored) == here - told
        assert set(removed) == told - here
        told = set(here)
        assert len(journal) == 0
