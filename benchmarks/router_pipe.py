"""A program of the router benchmark in a process of its own: what it says and is asked, one JSON object a line.

The child ends in order when its input ends, so it never outlives the benchmark, however that ends.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import psutil

from benchmarks.conditions import ROOT

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 20.0

Message = Mapping[str, Any]


class ChildFailedError(Exception):
    """A process of the benchmark ended or said nothing; what it printed is above."""


class Child:
    """The parent's end. Made by `child`, which ends the process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._usage = psutil.Process(process.pid)

    async def hear(self) -> Message:
        """The next line that it says. Raises ChildFailedError."""
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), START_TIMEOUT_S)
        if not line:
            raise ChildFailedError(f"a process of the benchmark ended with {await self._process.wait()}")
        said: Message = json.loads(line)
        return said

    async def ask(self, **question: object) -> Message:
        """Its answer. Raises ChildFailedError."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        return await self.hear()

    @property
    def cpu_s(self) -> float:
        """CPU time of all its threads since it started, in user mode and in the kernel."""
        times = self._usage.cpu_times()
        return float(times.user + times.system)

    @property
    def rss_bytes(self) -> int:
        """Memory that it holds now."""
        return int(self._usage.memory_info().rss)


@asynccontextmanager
async def child(module: str, settings: Message) -> AsyncIterator[Child]:
    """`python -m module`, which gets the settings as its argument. When left, it is gone."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, json.dumps(settings)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,  # a Ctrl-C is for the benchmark
    )
    try:
        yield Child(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
            await process.wait()


async def obey(greeting: Message, answer: Callable[[Message], Message]) -> None:
    """The child's end: greet, then answer every question until the input ends."""
    print(json.dumps(greeting), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(answer(json.loads(line))), flush=True)
