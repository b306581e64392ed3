"""A real Prometheus over a real cluster, first under load, then with deaths: a script, with a Ray of its own.

`python -m tests.deploy.scrape FOLDER` keeps its files in FOLDER. It prints as JSON what had no data, what fired when,
and what became of the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.config import load
from cluster.lifecycle import Cluster
from protos.client import Client, RetryPolicy
from protos.errors import HeadwaterError
from router.api_key import key_hash, new_key
from tests.deploy.prometheus import Prometheus
from tests.deploy.promql import RULES, expressions, names, recorded, rules

ROOT = Path(__file__).parents[2]
NUM_WORKERS = 2
NUM_AT_ONCE = 12
LOAD_S, QUIET_S, ALERT_S, HEAL_S = 75.0, 3.0, 30.0, 60.0
SETTINGS = (
    f"cluster.num_workers={NUM_WORKERS}",
    "cluster.num_drafters=1",
    "cluster.drain_timeout_s=1",
    "cluster.ready_timeout_s=150",
    "router.grpc.port=0",
    "router.metrics.port=0",
    "router.limits.no_worker_grace_s=0.2",
    "router.dispatch.min_source_tokens=64",
    "router.routing.load_weight=2",
    "worker.metrics.port=0",
    "worker.engine.threads=1",
    "worker.engine.kv.num_pages=512",
    "worker.engine.kv.exchange.min_tokens=64",
    "worker.engine.scheduler.step_tokens=128",
    "worker.engine.scheduler.max_running=8",
    "worker.engine.speculation.drafters=[copy, pool]",
    "drafter.drafters=[recycle]",
    "drafter.metrics.port=0",
)
CONTEXTS = [
    "import os\n\n" + "".join(f"def step_{c}_{i}(x):\n    return x + {i}\n\n" for i in range(24)) for c in range(3)
]


@dataclass
class Outcome:
    """What the test wants to know."""

    silent_panels: list[str] = field(default_factory=list)  # queries without data under load
    silent_rules: list[str] = field(default_factory=list)  # recording rules without data under load
    silent_metrics: list[str] = field(default_factory=list)  # metrics that rules name, without data under load
    unhealthy: list[str] = field(default_factory=list)  # rules that could not be evaluated
    fired_in_health: list[str] = field(default_factory=list)
    fired: dict[str, list[str]] = field(default_factory=dict)  # alerts during each fault
    moved: dict[str, float] = field(default_factory=dict)  # counters of faults, at most
    annotations: list[str] = field(default_factory=list)
    firing_at_last: list[str] = field(default_factory=list)  # when all is well again
    processes: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Fault:
    """What is done to the cluster, and what must come of it."""

    name: str
    act: Callable[[], None]
    alerts: tuple[str, ...]
    counters: tuple[str, ...] = ()


class Watched:
    """The cluster with its Prometheus and its clients. Owns what of it is followed now."""

    def __init__(self, cluster: Cluster, prometheus: Prometheus, keys: Sequence[str]) -> None:
        self.cluster, self.prometheus, self._keys = cluster, prometheus, keys
        self._target = cluster.endpoints[0].grpc

    async def follow(self) -> None:
        """Ask and scrape the processes that there are now, as service discovery would have it."""
        [router] = await asyncio.to_thread(self.cluster.routers)
        workers = await asyncio.to_thread(self.cluster.worker_metrics)
        drafters = await asyncio.to_thread(self.cluster.drafter_metrics)
        self._target = router.grpc
        self.prometheus.watch([router.metrics, *workers, *drafters])

    async def healed(self) -> None:
        """Wait until everybody is there again, and follow."""
        deadline = time.monotonic() + HEAL_S
        while not await self._follow_well():
            assert time.monotonic() < deadline, "the cluster did not heal"
            await asyncio.sleep(0.5)

    async def _follow_well(self) -> bool:
        """Follow if everybody is there; whether that is so."""
        try:
            status = await asyncio.to_thread(self.cluster._status)
            drafters = await asyncio.to_thread(self.cluster.drafter_metrics)
            if status.num_connected != NUM_WORKERS or len(drafters) != 1:
                return False
            await self.follow()
        except Exception:  # noqa: BLE001 - Ray raises many kinds while a process comes back
            return False
        return True

    async def ask(self) -> None:
        """Requests of both tenants without end, in bursts: so there are steps of all kinds."""
        draw = random.Random(1)
        while True:
            await asyncio.gather(*(self._one(draw, number) for number in range(NUM_AT_ONCE)))

    async def move(self) -> None:
        """A prompt goes where its prefix is not, again and again: the worker that has it is put aside meanwhile."""
        async with Client(self._target, api_key=self._keys[0], timeout_s=60) as client:
            while True:
                prompt = f"# {random.random()}\n{CONTEXTS[0]}"
                owner = (await client.complete(prompt, max_tokens=1)).prompt.worker_id
                await client.drain(owner)
                try:
                    await client.complete(prompt, max_tokens=1)
                finally:
                    await client.drain(owner, resume=True)
                await asyncio.sleep(2)

    async def _one(self, draw: random.Random, number: int) -> None:
        prompt = draw.choice(CONTEXTS) + f"def f{draw.randint(0, 9)}("
        if number % 6 == 0:
            prompt = f"# {draw.random()}\n" + prompt  # nobody has this
        await asyncio.sleep(draw.random() * 0.1)
        options: dict[str, Any] = {
            "api_key": self._keys[number % 2],
            "timeout_s": 20,
            "retry": RetryPolicy(max_attempts=1),
        }
        with contextlib.suppress(HeadwaterError):
            async with Client(self._target, **options) as client:
                if number == 1:
                    await client.score(prompt, ["a", "b"])
                else:
                    await client.complete(prompt, max_tokens=draw.choice([8, 64, 160]), ignore_eos=True)


def replicas(deployment: str) -> list[psutil.Process]:
    """Those that run: one that hangs may take a while to be ended."""
    name = f"ServeReplica:headwater:{deployment}"
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(child.cmdline()) and child.status() != psutil.STATUS_STOPPED:
                found.append(child)
    return found


async def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether it came true."""
    deadline = time.monotonic() + timeout_s
    while not await asyncio.to_thread(condition):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.5)
    return True


def silent(prometheus: Prometheus, queries: Iterable[str]) -> list[str]:
    """Those that have no sample that is a number."""
    return [query for query in queries if not prometheus.query(query)]


def look(prometheus: Prometheus, outcome: Outcome) -> bool:
    """Whether everything has data."""
    read = sorted(set().union(*(names(rule["expr"]) for rule in rules(ROOT))))
    outcome.silent_panels = silent(prometheus, expressions())
    outcome.silent_rules = silent(prometheus, sorted(recorded(ROOT)))
    outcome.silent_metrics = silent(prometheus, read)
    return not (outcome.silent_panels or outcome.silent_rules or outcome.silent_metrics)


async def strike(watched: Watched, outcome: Outcome, fault: Fault) -> None:
    """Do harm, wait for its alerts while targets stay as they were, then until all is well and followed again."""
    prometheus = watched.prometheus
    began = time.time()
    await asyncio.to_thread(fault.act)
    await until(lambda: set(fault.alerts) <= prometheus.fired(began), ALERT_S)
    outcome.fired[fault.name] = sorted(await asyncio.to_thread(prometheus.fired, began))
    outcome.annotations += await asyncio.to_thread(prometheus.annotations)
    for counter in fault.counters:
        found = await asyncio.to_thread(prometheus.query, f"max(max_over_time({counter}[10m]))")
        outcome.moved[counter] = max((value for _, value in found), default=0.0)
    await watched.healed()


def kill(deployment: str, number: int) -> Callable[[], None]:
    def act() -> None:
        for victim in replicas(deployment)[:number]:
            victim.kill()

    return act


def hang() -> None:
    """One worker says nothing any more; Serve notices later than its router, and replaces it."""
    replicas("Worker")[0].send_signal(signal.SIGSTOP)


LOSSES, RECOVERIES = "headwater_worker_losses_total", "headwater_recoveries_total"
FAULTS = (
    Fault(
        "a worker dies",
        kill("Worker", 1),
        ("HeadwaterWorkersLost", "HeadwaterWorkersMissing", "HeadwaterWorkerMetricsMissing"),
        (f'{LOSSES}{{reason="connection"}}', f'{RECOVERIES}{{outcome="resumed"}}'),
    ),
    Fault("a worker hangs", hang, ("HeadwaterWorkerSilent",), (f'{LOSSES}{{reason="silent"}}',)),
    Fault(
        "all workers die",
        kill("Worker", NUM_WORKERS),
        ("HeadwaterNoWorkerReady", "HeadwaterRecoveriesGivenUp"),
        (f'{RECOVERIES}{{outcome="given_up"}}',),
    ),
    Fault("the drafter dies", kill("Drafter", 1), ("HeadwaterDraftersMissing",)),
    Fault("the router dies", kill("Router", 1), ("HeadwaterRouterAbsent",)),
)
ALL_UP = f"count(up == 1) == {NUM_WORKERS} + 2"
OF_STATE = {
    "HeadwaterRouterAbsent",
    "HeadwaterNoWorkerReady",
    "HeadwaterWorkersMissing",
    "HeadwaterWorkerMetricsMissing",
}


async def observe(watched: Watched, outcome: Outcome) -> None:
    prometheus = watched.prometheus
    await watched.follow()
    asking = asyncio.create_task(watched.ask())
    try:
        await until(lambda: bool(prometheus.query(ALL_UP)) and not OF_STATE & prometheus.firing(), ALERT_S)
        moving = asyncio.create_task(watched.move())
        await until(lambda: look(prometheus, outcome), LOAD_S)
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
        await until(lambda: not OF_STATE & prometheus.firing(), ALERT_S)
        began = time.time()
        await asyncio.sleep(QUIET_S)
        outcome.unhealthy = await asyncio.to_thread(prometheus.unhealthy)
        outcome.fired_in_health = sorted(await asyncio.to_thread(prometheus.fired, began))
        for fault in FAULTS:
            await strike(watched, outcome, fault)
        await until(lambda: not OF_STATE & prometheus.firing(), ALERT_S)
        outcome.firing_at_last = sorted(await asyncio.to_thread(prometheus.firing))
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


def tenants(folder: Path, keys: Sequence[str]) -> Path:
    file = folder / "tenants.yaml"
    known = {name: {"keys": [key_hash(key)], "is_admin": True} for name, key in zip("ab", keys, strict=True)}
    file.write_text(yaml.safe_dump({"tenants": known}))
    return file


def main(folder: Path) -> None:
    os.environ["RAY_TMPDIR"] = str(folder)
    keys, outcome = (new_key(), new_key()), Outcome()
    settings = [*SETTINGS, f"cluster.ray.temp_dir={folder}", f"router.tenants.file={tenants(folder, keys)}"]
    rules_of = [ROOT / "deploy" / "prometheus" / "rules" / name for name in RULES]
    with Cluster(load(None, settings)) as cluster, Prometheus(folder, rules_of) as prometheus:
        asyncio.run(observe(Watched(cluster, prometheus, keys), outcome))
        outcome.processes = [(p.pid, p.create_time()) for p in psutil.Process().children(recursive=True)]
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
