"""CPU time of all processes of a server, by what each of them is for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Final, Literal

import psutil

Part = Literal["front", "router", "worker", "scheduler", "model", "rest"]

MARKS: Final[Mapping[str, Part]] = {
    "VLLM::EngineCore": "scheduler",
    "VLLM::Worker": "model",
    "ServeReplica:headwater:Router": "router",
    "ServeReplica:headwater:Worker": "worker",
    "vllm.entrypoints": "front",
}
CHILD_OF_PYTHON: Final = "multiprocessing."  # resource trackers and the like have their parent's words in their command


def part_of(command: str) -> Part:
    """What a process is for, from its command line: Ray's own, and all that only helps, are the rest."""
    if CHILD_OF_PYTHON in command:
        return "rest"
    return next((part for mark, part in MARKS.items() if mark in command), "rest")


class Processes:
    """A process and all below it. Remembers the CPU time of its last look."""

    def __init__(self, pid: int) -> None:
        root = psutil.Process(pid)
        found = [root, *root.children(recursive=True)]
        self._parts = {process: part for process in found if (part := _part(process)) is not None}
        self._before = self._seconds()

    def used(self) -> Mapping[Part, float]:
        """CPU seconds since this was made, or last asked."""
        now = self._seconds()
        used: dict[Part, float] = {}
        for process, part in self._parts.items():
            used[part] = used.get(part, 0.0) + now[process] - self._before[process]
        self._before = now
        return used

    def _seconds(self) -> Mapping[psutil.Process, float]:
        return {process: _seconds(process) for process in self._parts}


def _part(process: psutil.Process) -> Part | None:
    with suppress(psutil.NoSuchProcess):
        return part_of(" ".join(process.cmdline()))
    return None


def _seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0
