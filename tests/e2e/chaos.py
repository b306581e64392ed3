"""A cluster whose processes die, hang and drain while thousands of requests run: a script, with a Ray of its own.

`python -m tests.e2e.chaos FOLDER` keeps its files in FOLDER. Two routers, three workers and a drafter speak mutual TLS;
two tenants ask. It prints as JSON how every request ended, whether each answer is the undisturbed one, and what died.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.config import load
from cluster.lifecycle import Cluster
from protos.client import Client, ClientTLS, Completion, RetryPolicy
from protos.errors import HeadwaterError
from router.api_key import key_hash, new_key
from tests.certificates import Authority
from tests.metrics import scrape

NUM_WORKERS, NUM_ROUTERS = 3, 2
NUM_REQUESTS = 2000
NUM_AT_ONCE = 24
PAUSE_S = (1.0, 3.0)  # between two faults
HANG_S = 3.0
DRAIN_S = 1.0
HEAL_S = 60.0
FAULTS = ("drain", "kill", "hang", "router", "drain", "kill")
CONTEXTS = [
    "import os\nimport sys\n" + "".join(f"def step_{c}_{i}(x):\n    return x + {i}\n\n" for i in range(16))
    for c in range(6)
]
TAILS = ["def ", "class ", "    return ", "import ", "for "]


@dataclass
class Outcome:
    """What the test wants to know."""

    num_asked: int = 0
    ended: dict[str, int] = field(default_factory=dict)  # "answer", or the error's name
    wrong: list[int] = field(default_factory=list)  # numbers of requests with another answer than undisturbed
    faults: dict[str, int] = field(default_factory=dict)
    recovered: float = 0.0
    cached_by_other: int = 0  # cached tokens of a prompt that only the other tenant had sent
    cached_by_self: int = 0
    first_token_by_other_s: float = 0.0
    first_token_by_self_s: float = 0.0
    live: list[float] = field(default_factory=list)  # requests left at each router
    pages_in_use: list[float] = field(default_factory=list)  # at each worker
    processes: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Access:
    """How clients get in."""

    targets: tuple[str, ...]
    tls: ClientTLS
    keys: tuple[str, str]

    def client(self, tenant: int = 0, **options: Any) -> Client:
        return Client(self.targets, tls=self.tls, api_key=self.keys[tenant], timeout_s=120, **options)


def secured(folder: Path) -> tuple[list[str], ClientTLS, tuple[str, str]]:
    """Settings of a cluster that trusts nobody unknown, and what lets a client in."""
    authority = Authority(folder / "authority")
    member, server = authority.issue("member"), authority.issue("server", host="localhost")
    keys = (new_key(), new_key())
    tenants = {name: {"keys": [key_hash(key)], "is_admin": True} for name, key in zip("ab", keys, strict=True)}
    file = folder / "tenants.yaml"
    file.write_text(yaml.safe_dump({"tenants": tenants}))
    settings = [
        f"cluster.tls={{cert_file: {member.cert_file}, key_file: {member.key_file}, ca_file: {authority.ca_file}}}",
        f"router.grpc.tls={{cert_file: {server.cert_file}, key_file: {server.key_file}}}",
        f"router.tenants.file={file}",
    ]
    return settings, ClientTLS(ca_file=authority.ca_file), keys


def settings(folder: Path) -> list[str]:
    return [
        f"cluster.num_workers={NUM_WORKERS}",
        f"cluster.num_routers={NUM_ROUTERS}",
        "cluster.num_drafters=1",
        "cluster.drain_timeout_s=2",
        "cluster.ready_timeout_s=240",
        f"cluster.ray.temp_dir={folder}",
        "router.grpc.port=0",
        "router.metrics.port=0",
        "worker.metrics.port=0",
        "drafter.metrics.port=0",
        "drafter.drafters=[recycle]",
        "worker.engine.threads=1",
        "worker.engine.kv.num_pages=1024",
        "worker.engine.speculation.drafters=[copy, pool]",
    ]


def requests(draw: random.Random) -> list[dict[str, Any]]:
    """Of all kinds, many with a shared beginning; each has one right answer."""
    greedy = {"temperature": 0.0}
    return [
        {
            "prompt": draw.choice(CONTEXTS) + draw.choice(TAILS),
            "max_tokens": draw.randint(8, 64),
            "ignore_eos": draw.random() < 0.5,
            **draw.choice([greedy, {"temperature": draw.choice([0.5, 1.0]), "top_p": 0.95, "seed": number}]),
            **draw.choice([{}, {}, {"n": 3}, {"stop": ["\n\n", "return"]}, {"logprobs": 1}]),
        }
        for number in range(NUM_REQUESTS)
    ]


def said(completion: Completion) -> Any:
    """What must be equal, however often the answer moved."""
    return [
        (output.text, output.token_ids, output.finish, [position.token_id for position in output.logprobs])
        for output in completion.outputs
    ]


async def answers(access: Access, asked: Sequence[dict[str, Any]]) -> list[Any]:
    """To each request what was said, or the name of its error; a bounded number at once, the tenants in turn."""
    found: list[Any] = [None] * len(asked)

    async def answer_some(tenant: int, left: Iterator[tuple[int, dict[str, Any]]]) -> None:
        async with access.client(tenant, retry=RetryPolicy(max_attempts=6)) as client:
            for number, request in left:
                try:
                    found[number] = said(await client.complete(**request))
                except HeadwaterError as error:
                    found[number] = type(error).__name__

    left = iter(enumerate(asked))
    async with asyncio.TaskGroup() as tasks:
        for number in range(NUM_AT_ONCE):
            tasks.create_task(answer_some(number % 2, left))
    return found


def processes(deployment: str) -> list[psutil.Process]:
    name = f"ServeReplica:headwater:{deployment}"
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


async def healed(access: Access) -> None:
    """Wait until a router has every worker ready."""
    async with asyncio.timeout(HEAL_S), access.client() as client:
        while [model.num_workers for model in await client.models()] != [NUM_WORKERS]:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def strike(fault: str, draw: random.Random, access: Access) -> None:
    """One worker dies, hangs for a while, or is drained for a while."""
    workers = await asyncio.to_thread(processes, "Worker")
    victim = draw.choice(workers)
    match fault:
        case "kill":
            victim.kill()
        case "hang":
            victim.send_signal(signal.SIGSTOP)
            await asyncio.sleep(HANG_S)
            victim.kill()
        case "drain":
            async with access.client() as client:
                workers_known = [worker for topology in await client.topology() for worker in topology.workers]
                worker_id = draw.choice(workers_known).worker_id
                await client.drain(worker_id)
                await asyncio.sleep(DRAIN_S)
                await client.drain(worker_id, resume=True)


async def disturb(access: Access) -> Counter[str]:
    """One fault after the other, never before the last wound has healed; what struck."""
    draw, struck = random.Random(3), Counter[str]()
    for fault in FAULTS:
        await asyncio.sleep(draw.uniform(*PAUSE_S))
        if fault == "router":
            (await asyncio.to_thread(processes, "Router"))[0].kill()
        else:
            try:
                await strike(fault, draw, access)
            except (psutil.NoSuchProcess, HeadwaterError):
                continue  # it was gone already
        struck[fault] += 1
        await healed(access)
    return struck


async def isolation(access: Access, outcome: Outcome) -> None:
    """What a long prompt costs the one who has not sent it, then the one who has: cached tokens, and seconds."""
    prompt = "# only one has asked this\n" + "x = [" + ", ".join(map(str, range(600))) + "]\n"
    async with access.client(0) as owner, access.client(1) as other:
        await owner.complete(prompt, max_tokens=1)
        began = time.perf_counter()
        stranger = await other.complete(prompt + "#", max_tokens=1)
        outcome.first_token_by_other_s, began = time.perf_counter() - began, time.perf_counter()
        again = await owner.complete(prompt + "#", max_tokens=1)
        outcome.first_token_by_self_s = time.perf_counter() - began
    outcome.cached_by_other, outcome.cached_by_self = stranger.usage.cached_tokens, again.usage.cached_tokens


async def observe(access: Access, cluster: Cluster) -> Outcome:
    asked, outcome, ended = requests(random.Random(1)), Outcome(), Counter[str]()
    undisturbed = await answers(access, asked)
    disturber = asyncio.create_task(disturb(access))
    while not disturber.done():  # all of them, again and again, as long as something happens
        disturbed = await answers(access, asked)
        outcome.num_asked += len(asked)
        ended.update(found if isinstance(found, str) else "answer" for found in disturbed)
        outcome.wrong += [number for number in range(len(asked)) if disturbed[number] != undisturbed[number]]
    outcome.ended, outcome.faults = dict(ended), dict(await disturber)
    await healed(access)
    await isolation(access, outcome)
    await asyncio.sleep(1)
    routers = await asyncio.to_thread(cluster.routers)
    scraped = [await asyncio.to_thread(scrape, router.metrics) for router in routers]
    outcome.live = [values["headwater_requests_live"] for values in scraped]
    outcome.recovered = sum(values.get("headwater_recoveries_total", 0.0) for values in scraped)
    workers = await asyncio.to_thread(cluster.worker_metrics)
    outcome.pages_in_use = [(await asyncio.to_thread(scrape, w))["headwater_kv_pages_in_use"] for w in workers]
    outcome.processes = [(p.pid, p.create_time()) for p in psutil.Process().children(recursive=True)]
    return outcome


def main(folder: Path) -> None:
    os.environ["RAY_TMPDIR"] = str(folder)
    security, tls, keys = secured(folder)
    with Cluster(load(None, [*settings(folder), *security])) as cluster:
        targets = tuple(router.grpc.replace("127.0.0.1", "localhost") for router in cluster.endpoints)
        outcome = asyncio.run(observe(Access(targets, tls, keys), cluster))
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
