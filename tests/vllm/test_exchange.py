"""A prefix that one vLLM worker has computed is another's, through shared memory or Ray's object store."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = ("worker.engine.kind=vllm", "worker.engine.vllm.enforce_eager=true", "cluster.ready_timeout_s=280")


@pytest.mark.parametrize("way", ["node", "network"])
def test_workers_exchange_prefixes(way: str, root: Path, tmp_path: Path) -> None:
    arena = tmp_path / "arena" if way == "node" else Path("/dev/null/nowhere")
    settings = [*SETTINGS, f"worker.engine.kv.exchange.directory={arena}"]
    command = [sys.executable, "-m", "tests.e2e.exchange", str(tmp_path), *settings]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=290)
    assert run.returncode == 0, run.stderr
    outcome = json.loads(run.stdout.splitlines()[-1])
    [num_made, text], [num_used, same] = outcome["made"], outcome["used"]
    assert (num_made, num_used, outcome["fetched"]) == (0, 512, 512)
    assert same == text
    assert outcome["cached"] >= 16
