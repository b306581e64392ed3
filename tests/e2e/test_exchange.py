"""A prefix goes from worker to worker through Ray's object store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_workers_that_share_no_memory_exchange_prefixes(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.e2e.exchange", str(tmp_path)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout.splitlines()[-1])
    [num_made, text], [num_used, same] = outcome["made"], outcome["used"]
    assert (num_made, num_used, outcome["fetched"]) == (0, 512, 512)
    assert same == text
    assert (outcome["foreign"], outcome["cached"]) in ((16, 0), (0, 16))  # mapped, or without native kernels copied
