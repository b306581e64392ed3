"""The number of workers follows the load, or a file, and no stream notices."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.e2e.scaling import ASKS, MAX_WORKERS, Outcome
from tests.e2e.script import run


def seen(scenario: str, root: Path, directory: Path) -> Outcome:
    """What the script saw."""
    with tempfile.TemporaryDirectory(prefix="hws-") as folder:  # short: sockets live there
        _, outcome = run("tests.e2e.scaling", scenario, folder, root=root, directory=directory, timeout_s=400)
    return Outcome(**outcome)


def wrong(outcome: Outcome) -> list[tuple[int, str]]:
    """Answers that are not what they would have been."""
    assert len(outcome.expected) == len(ASKS)
    return [(number, text) for number, text in outcome.answers if text != outcome.expected[number]]


@pytest.mark.timeout(450)
def test_workers_come_with_the_load_and_go_with_it(root: Path, tmp_path: Path) -> None:
    outcome = seen("load", root, tmp_path)
    assert outcome.num_workers == [1, MAX_WORKERS, 1]
    assert outcome.served[0] >= MAX_WORKERS, "a new worker got no requests"
    assert len(outcome.answers) > MAX_WORKERS
    assert wrong(outcome) == []


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_requests_wake_the_first_worker(root: Path, tmp_path: Path) -> None:
    outcome = seen("none", root, tmp_path)
    assert outcome.num_workers == [0, 1, 0, 1]
    assert len(outcome.answers) == 2 * len(ASKS)
    assert wrong(outcome) == []


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_deploying_another_number_of_workers_restarts_nothing(root: Path, tmp_path: Path) -> None:
    outcome = seen("deploy", root, tmp_path)
    assert outcome.num_workers == [MAX_WORKERS, 1]
    assert len(set(outcome.routers)) == 1
    first, grown, shrunk = map(set, outcome.workers)
    assert first < grown
    assert shrunk < grown
    assert outcome.num_resumed > 0, "no stream had to move"
    assert wrong(outcome) == []
