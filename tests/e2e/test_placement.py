"""Workers and drafters on nodes of their own, as on a cluster of several machines."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from tests.e2e.nodes import NUM_DRAFTERS, NUM_WORKERS, Outcome, Place

TIMEOUT_S = 270


def run(root: Path, directory: Path, folder: str) -> tuple[int, Outcome]:
    """The script's process id and what it saw. Whatever happens, no process of it is left."""
    command = [sys.executable, "-m", "tests.e2e.nodes", folder]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    family: list[psutil.Process] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=directory, env=environment
    ) as process:
        try:
            printed, errors = process.communicate(timeout=TIMEOUT_S)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
    assert process.returncode == 0, errors
    seen = json.loads(printed.splitlines()[-1])
    for role in ("workers", "drafters"):
        seen[role] = [Place(place["node"], tuple(place["devices"]), place["visible"]) for place in seen[role]]
    return process.pid, Outcome(**seen)


def test_workers_and_drafters_have_nodes_and_devices_of_their_own(root: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hwn-") as folder:  # short: sockets live there
        process, seen = run(root, tmp_path, folder)
    assert [place.node for place in seen.workers] == [seen.nodes["worker"]] * NUM_WORKERS
    assert [place.node for place in seen.drafters] == [seen.nodes["drafter"]] * NUM_DRAFTERS
    assert seen.nodes["worker"] != seen.nodes["drafter"]
    devices = [(place.node, device) for place in seen.workers + seen.drafters for device in place.devices]
    assert len(set(devices)) == len(devices) == NUM_WORKERS + NUM_DRAFTERS
    assert all(place.visible == ",".join(place.devices) for place in seen.workers + seen.drafters)
    assert len(seen.plain) > 20
    assert all(texts == seen.plain for texts in seen.drafted)
    assert seen.connected == [NUM_DRAFTERS] * NUM_WORKERS
    assert len(seen.accepted) == NUM_WORKERS
    assert min(seen.accepted) > 0
    assert len(seen.drafts) == NUM_DRAFTERS
    assert min(seen.drafts) > 0, "the sequences are not spread over the drafters"
    assert len(seen.processes) > 6
    assert [one for one in seen.processes if lives(*one)] == []
    assert list(tmp_path.iterdir()) == []
    assert not list(Path(tempfile.gettempdir()).glob(f"hw-{process}-*"))


def lives(process_id: int, created: float) -> bool:
    try:
        process = psutil.Process(process_id)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
