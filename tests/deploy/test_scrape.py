"""What the dashboards and rules ask for is what a running cluster tells, and a death is noticed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.deploy.scrape import FAULTS, OF_STATE, Outcome
from tests.e2e.script import lives, run

TIMEOUT_S = 280
NUM_OWN = 5  # two workers, a drafter, a router and Prometheus; the rest is Ray


@pytest.mark.timeout(TIMEOUT_S + 15)
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package `prometheus`")
def test_everything_has_data_and_every_death_is_noticed(root: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hwp-") as folder:  # short: sockets live there
        _, seen = run("tests.deploy.scrape", folder, root=root, directory=tmp_path, timeout_s=TIMEOUT_S)
    outcome = Outcome(**seen)
    assert outcome.silent_metrics == []
    assert outcome.silent_rules == []
    assert outcome.silent_panels == []
    assert outcome.unhealthy == []
    assert not OF_STATE & set(outcome.fired_in_health)
    for fault in FAULTS:
        assert set(fault.alerts) <= set(outcome.fired[fault.name]), fault.name
        assert min((outcome.moved[counter] for counter in fault.counters), default=1) > 0, fault.name
    assert not OF_STATE & set(outcome.firing_at_last)
    assert outcome.annotations
    assert [text for text in outcome.annotations if "<error" in text or "%!" in text] == []
    assert len(outcome.processes) > NUM_OWN
    assert [one for one in outcome.processes if lives(*one)] == []
