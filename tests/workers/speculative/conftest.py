"""What the tests of the law compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workers.engine.drive import Outputs, run, torch_engine
from tests.workers.speculative.test_law import CASES


@pytest.fixture(scope="session")
def plain(root: Path) -> Callable[[str], tuple[Outputs, int]]:
    """By case, the outputs and number of steps of an engine without drafts."""
    known: dict[str, tuple[Outputs, int]] = {}

    def results(case: str) -> tuple[Outputs, int]:
        if case not in known:
            engine = torch_engine(root / "models" / "target")
            outputs = run(engine, *CASES[case])
            known[case] = outputs, engine.stats().num_steps
        return known[case]

    return results
