"""A cluster under load, looked at from outside: a script, for Ray is one's own here.

`python -m tests.deploy.watched FOLDER IMAGES SECONDS` keeps what it writes in FOLDER, photographs the page for IMAGES
when there has been load for some seconds, and prints what was seen as JSON. So the pictures of docs/watching.md are
made, with docs/images and 70 seconds.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from cluster.config import load
from cluster.lifecycle import Cluster
from protos.client import Client
from tests.metrics import scrape

NUM_CALLERS = 40
LOAD_S = 12.0
SCRAPE_S = 0.25
PATIENCE_S = 30.0
SETTINGS = (
    "cluster.num_workers=2",
    "cluster.drain_timeout_s=0",
    "cluster.ready_timeout_s=150",
    "router.grpc.port=0",
    "router.metrics.port=0",
    "worker.metrics.port=0",
    "worker.engine.threads=1",
    "worker.engine.kv.num_pages=512",
    "worker.engine.scheduler.max_running=24",
    "worker.engine.speculation.drafters=[copy]",
)
SHARED = '"""Exercises in plain Python.\n\nEach function is small and typed; its name says what it does.\n"""\n\n' * 6
OWN = "def add_{i}_{j}(a: int, b: int) -> int:\n    return a + {i} * b - {j}\n\n\n"
DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"
IMAGES = {
    "page-light.png": ("1180,860", LIGHT),
    "page-dark.png": ("1180,860", DARK),
    "page-phone.png": ("360,1650", LIGHT),
}


@dataclass
class Outcome:
    """What the test wants to know. Totals are router's and workers' /metrics, the workers' summed."""

    at_first: dict[str, float] = field(default_factory=dict)
    under_load: list[tuple[float, dict[str, float]]] = field(default_factory=list)  # by the clock
    looked_at: float = 0.0  # by the same clock
    overview: dict[str, Any] = field(default_factory=dict)  # then, under load
    at_last: dict[str, float] = field(default_factory=dict)
    overview_at_last: dict[str, Any] = field(default_factory=dict)
    page_at_last: str = ""  # the document as a browser has made it
    by_worker: dict[str, dict[str, float]] = field(default_factory=dict)  # at last
    top: dict[str, Any] = field(default_factory=dict)  # at last
    images: dict[str, int] = field(default_factory=dict)  # sizes, bytes


class Watched:
    """One cluster's addresses, and how it is looked at."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        [self.router] = cluster.endpoints
        self._workers = cluster.worker_metrics()
        self._folder = folder

    def totals(self) -> dict[str, float]:
        values = scrape(self.router.metrics)
        for address in self._workers:
            for name, value in scrape(address).items():
                values[name] = values.get(name, 0.0) + value
        return values

    def by_worker(self) -> dict[str, dict[str, float]]:
        return {worker["worker_id"]: self._of_worker(worker["worker_id"]) for worker in self.overview()["workers"]}

    def _of_worker(self, worker_id: str) -> dict[str, float]:
        found = [values for address in self._workers if (values := scrape(address, engine=worker_id))]
        return found[0]

    def overview(self) -> dict[str, Any]:
        with urlopen(f"http://{self.router.metrics}/overview.json", timeout=5) as reply:
            shown: dict[str, Any] = json.load(reply)
        return shown

    def document(self) -> str:
        return self._browse("--dump-dom", "--window-size=1180,1010").stdout

    def photograph(self, file: Path, size: str, *options: str) -> int:
        self._browse(f"--screenshot={file}", f"--window-size={size}", "--hide-scrollbars", *options)
        return file.stat().st_size

    def top(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "cluster.cli", "top", "--json", "--target", self.router.grpc]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        shown: dict[str, Any] = json.loads(done.stdout)
        return shown

    def _browse(self, *options: str) -> subprocess.CompletedProcess[str]:
        browser = shutil.which("chromium")
        assert browser is not None
        command = [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--disable-dev-shm-usage", f"--user-data-dir={self._folder / 'browser'}", "--virtual-time-budget=2500"),
            *options,
            f"http://{self.router.metrics}/",
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)


def prompt(number: int) -> str:
    """A beginning that all have, and a rest that none else has."""
    own = "".join(OWN.format(i=number, j=j) for j in range(3))
    return f"{SHARED}{own}def mul_{number}("


@asynccontextmanager
async def calling(target: str) -> AsyncIterator[None]:
    """Many ask on and on, until the block that they run beside ends; what they began is answered."""
    is_enough = False

    async def ask(client: Client, number: int) -> None:
        while not is_enough:
            await client.complete(prompt(number), max_tokens=64, ignore_eos=True, temperature=0.7)
            number += NUM_CALLERS

    async with Client(target, timeout_s=300) as client, asyncio.TaskGroup() as tasks:
        for number in range(NUM_CALLERS):
            tasks.create_task(ask(client, number))
        try:
            yield
        finally:
            is_enough = True


async def is_told(watched: Watched, outcome: Outcome) -> bool:
    """Whether everything that ended has reached the overview."""
    shown = await asyncio.to_thread(watched.overview)
    made = outcome.at_last["vllm:generation_tokens_total"] - outcome.at_first["vllm:generation_tokens_total"]
    return bool(shown["requests"]["live"] == 0 and shown["window"]["generation_tokens"] >= made)


async def observe(watched: Watched, images: Path, pose_s: float) -> Outcome:
    outcome = Outcome(at_first=watched.totals())
    async with calling(watched.router.grpc):
        until = time.monotonic() + LOAD_S
        while time.monotonic() < until:
            totals = await asyncio.to_thread(watched.totals)
            outcome.under_load.append((time.monotonic(), totals))
            await asyncio.sleep(SCRAPE_S)
        outcome.overview = await asyncio.to_thread(watched.overview)
        outcome.looked_at = time.monotonic()
        outcome.under_load.append((outcome.looked_at, await asyncio.to_thread(watched.totals)))
    outcome.at_last, outcome.by_worker = watched.totals(), watched.by_worker()
    async with asyncio.timeout(PATIENCE_S):
        while not await is_told(watched, outcome):  # noqa: ASYNC110
            await asyncio.sleep(0.2)
    outcome.overview_at_last, outcome.top = watched.overview(), watched.top()
    outcome.page_at_last = watched.document()
    async with calling(watched.router.grpc):
        await asyncio.sleep(pose_s)
        for name, (size, scheme) in IMAGES.items():
            outcome.images[name] = await asyncio.to_thread(watched.photograph, images / name, size, scheme)
    return outcome


def main(folder: Path, images: Path, pose_s: float) -> None:
    with Cluster(load(None, [*SETTINGS, f"cluster.ray.temp_dir={folder}"])) as cluster:
        outcome = asyncio.run(observe(Watched(cluster, folder), images, pose_s))
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).resolve(), float(sys.argv[3]))
