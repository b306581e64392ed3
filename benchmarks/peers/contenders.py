"""The engines that are compared, each in its best setting, and how one workload is measured on one of them."""

from __future__ import annotations

import asyncio
import ctypes.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.benchmark import Arm, Measured, Workload
from benchmarks.peers.answers import Answers
from benchmarks.peers.environment import Environment, base_variables
from benchmarks.peers.floor import Floor, step_cost
from benchmarks.peers.models import Format, Model
from benchmarks.peers.process import Answer, Command, PeerError, PeerProcess, PeerSkipped
from benchmarks.peers.workloads import Work, prefixes, prompts, seed_of
from benchmarks.prompts import Source, TokenIds

GIB = 2**30
KV_TOKENS = 65536
CONTEXT_STEP = 1024
LLAMA_BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF", "PIP_NO_CACHE_DIR": "1"}


@dataclass(frozen=True)
class Contender:
    """One engine in one setting."""

    name: str
    program: str  # a module of this package
    environment: str | None = None  # None: the project's own
    form: Format = "directory"
    converter: str | None = None  # the environment that makes the form
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.environment is None


OURS = Contender("ours", "ours")
CLUSTER = Contender("cluster", "cluster")  # ours behind router, session and gRPC
PEERS = (
    Contender("vllm", "vllm", "vllm", options={"enforce_eager": False}),
    Contender("vllm-eager", "vllm", "vllm", options={"enforce_eager": True}),
    Contender(
        "openvino",
        "openvino",
        "openvino",
        form="openvino",
        converter="openvino-convert",
        options={
            "batch_tokens": 2048,
            "properties": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
        },
    ),
    Contender(
        "llamacpp",
        "llamacpp",
        "llamacpp",
        form="gguf",
        converter="llamacpp",
        options={"flash_attention": True, "kv_type": "f16", "ubatch_tokens": 512},
    ),
    Contender("transformers", "transformers", "transformers", options={"most_cells": 32 * 6000}),
)


@dataclass(frozen=True)
class Race:
    """What all contenders of one benchmark have in common."""

    model: Model
    works: Mapping[str, Work]  # by workload name
    pieces: Source[TokenIds]  # what prompts are made of
    run_seed: int
    floor: Floor
    answers: Answers
    cores: Sequence[int]  # those that engines may use
    answer_s: float  # the longest that one run may take

    @property
    def max_batch(self) -> int:
        return max(work.batch for work in self.works.values())

    @property
    def max_context(self) -> int:
        longest = max(work.context_tokens for work in self.works.values())
        return min(-(-longest // CONTEXT_STEP) * CONTEXT_STEP, self.model.shape.max_position_embeddings)

    @property
    def kv_gib(self) -> int:
        """Room for KV_TOKENS, in the whole GiB that some engines count in."""
        return math.ceil(KV_TOKENS * self.model.shape.kv_bytes_per_token / GIB)

    def shared(self, name: str) -> list[TokenIds]:
        """The prefixes of a workload: the same in every round, so that they stay warm."""
        return prefixes(self.works[name], seed_of(self.run_seed, name, "prefixes"), self.pieces)

    def prompts(self, name: str, seed: int, max_tokens: int) -> list[TokenIds]:
        """The prompts of one run: others in every round, and others for the run of one token."""
        return prompts(self.works[name], self.shared(name), seed_of(seed, max_tokens), self.pieces)


@dataclass
class Entrant:
    """A contender in a race: its process, and the workloads it failed on. Mutated only by its own arm."""

    contender: Contender
    race: Race
    say: Callable[[str], None]
    facts: Mapping[str, object] = field(default_factory=dict)
    _process: PeerProcess | None = None
    _failed: dict[str, str] = field(default_factory=dict)

    def arm(self) -> Arm[Work]:
        """As the harness knows it."""
        return Arm(self.contender.name, self.measure, setup=self.set_up, teardown=self.tear_down)

    async def set_up(self) -> None:
        """Make environment and model where they are missing, and start. Raises SetupFailedError, PeerError."""
        await asyncio.to_thread(prepare, self.contender, self.race.model, self.say)
        self._process = PeerProcess(command(self.contender, self.race))
        self.facts = await self._process.start()

    async def tear_down(self) -> None:
        if self._process is not None:
            await self._process.close()

    async def measure(self, workload: Workload[Work]) -> Measured:
        """One run to a single token and one to all. Raises PeerError; a workload that failed is not tried again."""
        if workload.name in self._failed:
            raise PeerError(f"not tried again: {self._failed[workload.name]}")
        try:
            return await self._measure(workload)
        except PeerSkipped as reason:
            return Measured({}, refusals={str(reason): 1})
        except PeerError as error:
            self._failed[workload.name] = str(error)
            raise

    async def _measure(self, workload: Workload[Work]) -> Measured:
        assert self._process is not None, "not set up"
        if not self._process.is_running:
            await self._process.close()
            await self._process.start()
        first, _ = await self._run(self._process, workload, 1)
        full, own_tokens = await self._run(self._process, workload, workload.params.max_tokens)
        values = speeds(workload.params, own_tokens, first_s=first.wall_s, full_s=full.wall_s)
        if self.contender.is_ours and full.wall_s > first.wall_s:
            step_s = (full.wall_s - first.wall_s) / (workload.params.max_tokens - 1)
            cost = step_cost(self.race.model.shape, workload.params, own_tokens)
            values = {**values, **cost.shares(self.race.floor, step_s)}
        return Measured(values)

    async def _run(self, process: PeerProcess, workload: Workload[Work], max_tokens: int) -> tuple[Answer, int]:
        """One run, prefixes warm, and the tokens of its prompts that were not."""
        shared = self.race.shared(workload.name)
        batch = self.race.prompts(workload.name, workload.seed, max_tokens)
        await process.warm(shared)
        answer = await process.run(batch, max_tokens)
        self.race.answers.note(workload.name, workload.seed, max_tokens, self.contender.name, answer.outputs)
        return answer, sum(map(len, batch)) - len(batch) * workload.params.prefix_tokens


def speeds(work: Work, own_tokens: int, *, first_s: float, full_s: float) -> dict[str, float]:
    """The metrics of two runs: to one token in `first_s`, to all in `full_s`.

    Decoding is left out where the longer run was not the longer one: noise is then all there is.
    """
    values = {
        "e2e_tokens_per_s": work.batch * work.max_tokens / full_s,
        "first_token_ms": 1000 * first_s,
        "prefill_tokens_per_s": own_tokens / first_s,
    }
    if full_s > first_s:
        values["decode_tokens_per_s"] = work.batch * (work.max_tokens - 1) / (full_s - first_s)
    return values


def environment(name: str, cache: Path) -> Environment:
    """The environment of this name, with what its installation needs."""
    return Environment(name, cache, LLAMA_BUILD) if name == "llamacpp" else Environment(name, cache)


def prepare(contender: Contender, model: Model, say: Callable[[str], None]) -> None:
    """Make the contender's environments and its form of the model, unless they are there. Raises SetupFailedError."""
    names = [name for name in (contender.environment, contender.converter) if name is not None]
    for name in dict.fromkeys(names):
        environment(name, model.cache).prepare(say)
    converter = environment(contender.converter, model.cache) if contender.converter else None
    model.prepare(contender.form, converter)


def command(contender: Contender, race: Race) -> Command:
    """How the contender's process is started."""
    cache = race.model.cache
    python = sys.executable if contender.environment is None else environment(contender.environment, cache).python
    settings = {
        "model": str(race.model.path(contender.form)),
        "threads": len(race.cores),
        "max_batch": race.max_batch,
        "max_context": race.max_context,
        "kv_tokens": KV_TOKENS,
        "options": {**contender.options, **({"cache_gib": race.kv_gib} if contender.program == "openvino" else {})},
    }
    return Command(
        arguments=[str(python), "-m", f"benchmarks.peers.{contender.program}", json.dumps(settings)],
        environment={**base_variables(), "HF_HUB_OFFLINE": "1", **_variables(contender, race)},
        log=cache / "logs" / f"{race.model.name}-{contender.name}.log",
        answer_s=race.answer_s,
    )


def _variables(contender: Contender, race: Race) -> dict[str, str]:
    """vLLM takes these from its environment alone: by default it leaves a core idle, and has another OpenMP."""
    if contender.program != "vllm":
        return {}
    cache = race.model.cache
    preload = [str(environment("vllm", cache).folder / "lib" / "libiomp5.so"), *_tcmalloc()]
    return {
        "LD_PRELOAD": ":".join(preload),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: no hop for every step
        "VLLM_CPU_OMP_THREADS_BIND": cpu_list(race.cores),
        "VLLM_CPU_KVCACHE_SPACE": str(race.kv_gib),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _tcmalloc() -> Iterable[str]:
    found = ctypes.util.find_library("tcmalloc_minimal")
    return [found] if found else []


def cpu_list(cores: Sequence[int]) -> str:
    """Cores as Linux lists them: a range where they follow one another."""
    ordered = sorted(cores)
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}-{ordered[-1]}"
    return ",".join(map(str, ordered))


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
