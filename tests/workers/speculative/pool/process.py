"""A drafter in a process of its own, which a test may stop, wake and kill."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from workers.config import DrafterConfig
from workers.drafter import DrafterProcess

START_S = 60.0


class Spawned:
    """Runs from `start` to `kill`."""

    def __init__(self, root: Path, token: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._near, far = context.Pipe()
        self._process = context.Process(target=_draft, args=(far, root, token), daemon=True)
        self._process.start()
        far.close()

    def await_address(self) -> str:
        assert self._near.poll(START_S), "the drafter does not start"
        address: str = self._near.recv()
        return address

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Stopped or not. Idempotent."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._near.close()


def _draft(end: Connection, root: Path, token: str) -> None:
    section = {"draft_model": root / "models" / "drafter", "dtype": "float32", "kv": {"num_pages": 128}}
    config = DrafterConfig.model_validate({**section, "metrics": {"port": 0}})
    drafter = DrafterProcess(config, target=root / "models" / "target", token=token)
    end.send(drafter.start().channel)
    with contextlib.suppress(EOFError):
        end.recv()
    drafter.stop()
