"""The number of workers changes while streams run, by load or by a config deploy: a script, for Ray is one's own here.

`python -m tests.e2e.scaling SCENARIO FOLDER` keeps Ray's files in FOLDER, and prints what was seen as JSON.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from cluster.app import APP_NAME, QUIET, WORKER_NAME
from cluster.config import load
from cluster.lifecycle import Cluster
from protos.client import Client
from tests.metrics import scrape

MAX_WORKERS = 3
NUM_CALLERS = 24  # far more than one worker runs at once
NUM_TOKENS = 200
PATIENCE_S = 150.0  # for Serve to change the number of workers, on a busy machine
WAYS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.8, "seed": 11}]
PROMPTS = [f"def f{i}(a, b):\n    return a + {i}\n\n\ndef g{i}(" for i in range(4)]
ASKS = [(prompt, way) for prompt in PROMPTS for way in WAYS]
SETTINGS = (
    "cluster.ready_timeout_s=150",
    "cluster.drain_timeout_s=0",  # streams of a worker that leaves move at once
    "cluster.ray.num_cpus=4",
    "router.grpc.port=0",
    "router.metrics.port=0",
    "worker.metrics.port=0",
    "worker.engine.threads=1",
    "worker.engine.kv.num_pages=256",
    "worker.engine.scheduler.max_running=4",
)
QUICK = "target_queued_tokens: 256, upscale_delay_s: 0.5, downscale_delay_s: 2"
FROM_ONE = f"cluster.autoscaling={{min_workers: 1, max_workers: {MAX_WORKERS}, {QUICK}}}"
FROM_NONE = f"cluster.autoscaling={{min_workers: 0, max_workers: 2, {QUICK}}}"


@dataclass
class Outcome:
    """What the test wants to know."""

    expected: list[str] = field(default_factory=list)  # the undisturbed texts, ask by ask
    answers: list[tuple[int, str]] = field(default_factory=list)  # of asks, while the number of workers changed
    num_workers: list[int] = field(default_factory=list)  # connected, at the ends of the phases
    served: list[int] = field(default_factory=list)  # workers that answered, by phase
    routers: list[str] = field(default_factory=list)  # their ids, at the ends of the phases
    workers: list[list[str]] = field(default_factory=list)  # theirs
    num_resumed: float = 0.0  # streams that went on at another worker


class Callers:
    """Some who ask on and on, each its own ask again, until the block that they run beside ends."""

    def __init__(self, client: Client, outcome: Outcome) -> None:
        self._client, self._outcome = client, outcome
        self.workers: set[str] = set()  # that have answered
        self._is_enough = False

    @asynccontextmanager
    async def calling(self, number: int) -> AsyncIterator[None]:
        """What they began before the end is answered, too."""
        async with asyncio.TaskGroup() as tasks:
            for caller in range(number):
                tasks.create_task(self._call(caller % len(ASKS)))
            try:
                yield
            finally:
                self._is_enough = True
        self._outcome.served.append(len(self.workers))

    async def _call(self, number: int) -> None:
        while not self._is_enough:
            worker_id, text = await ask(self._client, number)
            self.workers.add(worker_id)
            self._outcome.answers.append((number, text))


async def ask(client: Client, number: int) -> tuple[str, str]:
    """The worker that began the answer, and its text."""
    prompt, way = ASKS[number]
    answer = await client.complete(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, **way)
    return answer.prompt.worker_id, answer.text


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what is awaited to hold."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def num_connected(client: Client) -> int:
    return sum(model.num_workers for model in await client.models())


async def router_status() -> Any:
    return await serve.get_app_handle(APP_NAME).status.remote()


async def replicas() -> int:
    """Worker processes of any state that Serve knows."""
    status = await asyncio.to_thread(serve.status)
    return sum(status.applications[APP_NAME].deployments[WORKER_NAME].replica_states.values())


async def resumed() -> float:
    status = await router_status()
    values = await asyncio.to_thread(scrape, status.metrics, outcome="resumed")
    return values.get("headwater_recoveries_total", 0.0)


async def grow_and_shrink(client: Client) -> Outcome:
    """Load makes three workers of one; with little of it left they become one again."""
    outcome = Outcome(expected=[(await ask(client, number))[1] for number in range(len(ASKS))])
    outcome.num_workers.append(await num_connected(client))
    callers = Callers(client, outcome)

    async def is_grown() -> bool:
        return await num_connected(client) == MAX_WORKERS and len(callers.workers) >= MAX_WORKERS

    async with callers.calling(NUM_CALLERS):
        await until(is_grown)
    outcome.num_workers.append(await num_connected(client))
    callers = Callers(client, outcome)

    async def is_shrunk() -> bool:
        return await num_connected(client) == 1

    async with callers.calling(2):
        await until(is_shrunk)
    outcome.num_workers.append(await num_connected(client))
    return outcome


async def wake_and_sleep(client: Client) -> Outcome:
    """With no worker a request waits until one has started; later there is none again, and the next one does too."""
    outcome = Outcome()

    async def is_asleep() -> bool:
        return await replicas() == 0

    for _ in range(2):
        await until(is_asleep)
        outcome.num_workers.append(await replicas())
        answers = await asyncio.gather(*(ask(client, number) for number in range(len(ASKS))))
        outcome.num_workers.append(min(await num_connected(client), 1))
        outcome.answers += enumerate(text for _, text in answers)
    outcome.expected = [(await ask(client, number))[1] for number in range(len(ASKS))]
    return outcome


async def deploy_and_deploy(client: Client) -> Outcome:
    """The same application with another number of workers, again and again, under load."""
    outcome = Outcome(expected=[(await ask(client, number))[1] for number in range(len(ASKS))])
    outcome.workers.append([*(await router_status()).workers])
    for number in (MAX_WORKERS, 1):
        callers = Callers(client, outcome)

        async def is_deployed(number: int = number, callers: Callers = callers) -> bool:
            return await num_connected(client) == number and len(callers.workers) >= number

        async with callers.calling(NUM_CALLERS):
            await asyncio.to_thread(deploy, number)
            await until(is_deployed)
        status = await router_status()
        outcome.num_workers.append(await num_connected(client))
        outcome.routers.append(status.router_id)
        outcome.workers.append([*status.workers])
    outcome.num_resumed = await resumed()
    return outcome


def deploy(num_workers: int) -> None:
    """As `serve deploy` and Kubernetes' RayService do: a file of applications, of which one number changes."""
    tree = load(None, [*SETTINGS, "cluster.num_workers=1"]).model_dump(mode="json")
    application = {
        "name": APP_NAME,
        "import_path": "cluster.app:build_app",
        "route_prefix": None,
        "args": tree,
        "deployments": [{"name": WORKER_NAME, "num_replicas": num_workers}],
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))


@contextmanager
def deployed(folder: Path) -> Iterator[str]:
    """One worker, deployed by a file. Gives the router's address."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": APP_NAME}
    ray.init(address="local", num_cpus=4, object_store_memory=100 << 20, _temp_dir=str(folder), **quiet)
    try:
        serve.start(proxy_location="Disabled", logging_config=QUIET)
        deploy(1)
        yield asyncio.run(ready())
        serve.shutdown()
    finally:
        ray.shutdown()


async def ready() -> str:
    """Where the router listens, as soon as it has its worker."""

    async def is_running() -> bool:
        status = await asyncio.to_thread(serve.status)
        application = status.applications.get(APP_NAME)
        assert application is None or "FAILED" not in application.status, application
        return application is not None and application.status == "RUNNING"

    await until(is_running)
    status = await router_status()
    return str(status.grpc)


@contextmanager
def served(folder: Path, *settings: str) -> Iterator[str]:
    """A cluster as `headwater serve` makes one. Gives the router's address."""
    with Cluster(load(None, [*SETTINGS, f"cluster.ray.temp_dir={folder}", *settings])) as cluster:
        yield cluster.endpoints[0].grpc


async def observe(scenario: Callable[[Client], Any], target: str) -> Outcome:
    async with Client(target, timeout_s=300) as client:
        outcome: Outcome = await scenario(client)
    return outcome


def main(scenario: str, folder: Path) -> None:
    match scenario:
        case "load":
            with served(folder, FROM_ONE) as target:
                outcome = asyncio.run(observe(grow_and_shrink, target))
        case "none":
            with served(folder, FROM_NONE, "router.limits.no_worker_grace_s=150") as target:
                outcome = asyncio.run(observe(wake_and_sleep, target))
        case "deploy":
            with deployed(folder) as target:
                outcome = asyncio.run(observe(deploy_and_deploy, target))
        case _:
            raise SystemExit(f"no scenario {scenario}")
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
