"""Runs a script that needs a Ray of its own: one process has one, and the tests' cluster is that of their process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil


def run(module: str, *arguments: str, root: Path, directory: Path, timeout_s: float) -> tuple[int, Any]:
    """Its process id and what it printed last, as JSON. Whatever happens, no process of it is left."""
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "RAY_ENABLE_AUTO_CONNECT": "0"}  # scripts import Ray first
    family: list[psutil.Process] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=directory, env=environment
    ) as process:
        try:
            printed, errors = process.communicate(timeout=timeout_s)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
    assert process.returncode == 0, errors
    return process.pid, json.loads(printed.splitlines()[-1])


def lives(process_id: int, created: float) -> bool:
    """Whether the process that was created then is still there."""
    try:
        process = psutil.Process(process_id)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
