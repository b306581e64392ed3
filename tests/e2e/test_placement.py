"""Workers and drafters on nodes of their own, as on a cluster of several machines."""

import tempfile
from pathlib import Path

from tests.e2e.nodes import NUM_DRAFTERS, NUM_WORKERS, Outcome, Place
from tests.e2e.script import lives, run

TIMEOUT_S = 270


def observed(root: Path, directory: Path, folder: str) -> tuple[int, Outcome]:
    """The script's process id and what it saw."""
    process_id, seen = run("tests.e2e.nodes", folder, root=root, directory=directory, timeout_s=TIMEOUT_S)
    for role in ("routers", "workers", "drafters"):
        seen[role] = [Place(place["node"], tuple(place["devices"]), place["visible"]) for place in seen[role]]
    return process_id, Outcome(**seen)


def test_workers_and_drafters_have_nodes_and_devices_of_their_own(root: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hwn-") as folder:  # short: sockets live there
        process, seen = observed(root, tmp_path, folder)
    assert [place.node for place in seen.routers] == [seen.nodes["router"]]
    assert [place.node for place in seen.workers] == [seen.nodes["worker"]] * NUM_WORKERS
    assert [place.node for place in seen.drafters] == [seen.nodes["drafter"]] * NUM_DRAFTERS
    assert len(set(seen.nodes.values())) == 3
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
