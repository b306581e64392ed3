"""`headwater serve` as a process of its own: started with settings, ended in order, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Final

import psutil

from benchmarks.conditions import ROOT

POLL_S: Final = 0.1
STOP_TIMEOUT_S: Final = 60.0
SHORT_FOLDER: Final = "/tmp"  # the names of Ray's sockets are limited
ADDRESS: Final = re.compile(r"^\s*gRPC\s+(\S+)$", re.MULTILINE)  # as `headwater serve` prints it
LAST_LINES: Final = 20


class ClusterFailedError(Exception):
    """A cluster ended or took too long to start."""


@dataclass(frozen=True, slots=True)
class Served:
    """A running cluster: where its first router listens, and the process that everything of it is below."""

    address: str
    pid: int


@asynccontextmanager
async def serving(
    settings: Mapping[str, object], *, timeout_s: float, variables: Mapping[str, str] | None = None
) -> AsyncIterator[Served]:
    """A cluster on free ports. When left, its processes and files are gone.

    `settings`: keys of the configuration with their values; `variables` of its environment go before this process's.
    Raises ClusterFailedError with what the cluster said.
    """
    with TemporaryDirectory(prefix="hwb-", dir=SHORT_FOLDER, ignore_cleanup_errors=True) as folder:
        output = Path(folder) / "output"
        with output.open("wb") as file:
            process = await _launch({**settings, **_private(Path(folder))}, file, variables or {})
        try:
            yield Served(await _address(process, output, timeout_s), process.pid)
        finally:
            await end(process)


def _private(folder: Path) -> Mapping[str, object]:
    """What no two clusters may share."""
    return {
        "cluster.log_dir": folder / "logs",
        "cluster.ray.temp_dir": folder,
        "router.grpc.port": 0,
        "router.metrics.port": 0,
        "worker.metrics.port": 0,
    }


async def _launch(
    settings: Mapping[str, object], output: IO[bytes], variables: Mapping[str, str]
) -> asyncio.subprocess.Process:
    """In a session of its own: a Ctrl-C in the terminal is for the benchmark, which then ends its clusters."""
    arguments = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster.cli", "serve", *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, **variables},
        start_new_session=True,
    )


async def _address(process: asyncio.subprocess.Process, output: Path, timeout_s: float) -> str:
    ends_s = time.perf_counter() + timeout_s
    while (found := _read_address(output)) is None:
        if process.returncode is not None:
            raise ClusterFailedError(f"`headwater serve` ended with {process.returncode}: {last_words(output)}")
        if time.perf_counter() > ends_s:
            raise ClusterFailedError(f"`headwater serve` was not ready after {timeout_s:g} s: {last_words(output)}")
        await asyncio.sleep(POLL_S)
    return found


def _read_address(output: Path) -> str | None:
    return printed_address(output.read_text())


def printed_address(output: str) -> str | None:
    """The first router's address in what `headwater serve` printed; None as long as it has not."""
    found = ADDRESS.search(output)
    return found and found.group(1)


def last_words(output: Path) -> str:
    """What a process has printed at the end."""
    return "\n".join(output.read_text().splitlines()[-LAST_LINES:])


async def end(process: asyncio.subprocess.Process) -> None:
    """As Ctrl-C does; by force what is left of it after a minute."""
    if process.returncode is not None:
        return
    ours = _tree(process.pid)
    process.send_signal(signal.SIGINT)
    with suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    for left in ours:
        with suppress(psutil.NoSuchProcess):
            left.kill()
    await process.wait()


def _tree(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []
