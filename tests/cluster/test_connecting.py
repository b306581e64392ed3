"""When this process starts or joins a Ray: when it says so, and at no other time."""

import os
import subprocess
import sys
from pathlib import Path

CALL = "import cluster, ray\nray.put(1)"


def test_a_call_without_ray_starts_none(root: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(root), "RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, "-c", CALL], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 1
    assert "Ray has not been started yet" in done.stderr
    assert not list(tmp_path.iterdir())
