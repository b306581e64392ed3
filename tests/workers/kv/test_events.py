"""What a session hears when: everything first and at once, changes with company or after a while."""

from protos.messages import KVEvents
from workers.kv.events import HOLD_S, EventFeed
from workers.kv.journal import Changes


def started(*blocks: int) -> EventFeed:
    """A feed whose first snapshot has been told."""
    feed = EventFeed()
    feed.restart(blocks)
    assert feed.take(0.0, at_once=False) == KVEvents(1, blocks, (), snapshot=True)
    return feed


def test_a_session_wants_a_snapshot_first_and_gets_it_at_once() -> None:
    assert EventFeed().needs_snapshot
    feed = started(1, 2)
    assert not feed.needs_snapshot
    assert feed.take(1e9, at_once=True) is None


def test_an_empty_cache_is_told_too() -> None:
    started()


def test_changes_wait_for_company_but_not_for_ever() -> None:
    feed = started(1)
    feed.add(Changes((2,), ()), 10.0)
    feed.add(Changes((3,), (1,)), 10.0 + 0.9 * HOLD_S)
    assert feed.take(10.0 + 0.9 * HOLD_S, at_once=False) is None
    assert feed.take(10.0 + 1.1 * HOLD_S, at_once=False) == KVEvents(2, (2, 3), (1,))
    feed.add(Changes((), (3,)), 20.0)
    assert feed.take(20.0, at_once=True) == KVEvents(3, (), (3,))


def test_the_wait_begins_with_the_first_change_that_is_left() -> None:
    feed = started()
    feed.add(Changes((2,), ()), 10.0)
    feed.add(Changes((), (2,)), 10.0)
    assert feed.take(99.0, at_once=True) is None
    feed.add(Changes((2,), ()), 20.0)
    assert feed.take(20.0 + 0.9 * HOLD_S, at_once=False) is None


def test_a_snapshot_holds_what_was_pending() -> None:
    feed = started(1)
    feed.add(Changes((2,), (1,)), 10.0)
    feed.needs_snapshot = True
    feed.restart([2])
    assert feed.take(10.0, at_once=False) == KVEvents(2, (2,), (), snapshot=True)
    assert feed.take(99.0, at_once=True) is None
    feed.add(Changes((), (2,)), 100.0)
    assert feed.take(100.0, at_once=True) == KVEvents(3, (), (2,))
