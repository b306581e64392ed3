"""Thousands of requests while routers and workers die, hang and drain: all are answered, and all answers are right."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.chaos import NUM_REQUESTS, NUM_WORKERS, Outcome
from tests.e2e.script import lives, run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_request_is_answered_as_if_nothing_had_happened(
    root: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with tempfile.TemporaryDirectory(prefix="hwc-") as folder:  # short: sockets live there
        _, seen = run("tests.e2e.chaos", folder, root=root, directory=tmp_path, timeout_s=840)
    outcome = Outcome(**seen)
    for name in ("faults", "recovered", "cached_by_other", "first_token_by_other_s", "first_token_by_self_s"):
        record_property(name, seen[name])  # of a prompt that only the other tenant, or the same, had sent
        print(name, seen[name])
    assert outcome.num_asked >= NUM_REQUESTS
    assert outcome.ended == {"answer": outcome.num_asked}
    assert outcome.wrong == []
    assert outcome.faults.get("router") == 1
    assert outcome.faults.keys() >= {"kill", "hang", "drain"}
    assert sum(outcome.faults.values()) >= 5
    assert outcome.recovered > 0
    assert outcome.cached_by_other == 0
    assert outcome.cached_by_self > 0
    assert set(outcome.live) == {0.0}
    assert outcome.pages_in_use == [0.0] * NUM_WORKERS
    assert len(outcome.processes) > 6
    assert [one for one in outcome.processes if lives(*one)] == []
