"""Driving an engine by hand in tests: submit, step until idle, collect."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protos.messages import Finish, PositionLogprobs, Request, Sampling
from workers.config import (
    EngineSection,
    KernelsSection,
    KVSection,
    ModelSection,
    SchedulerSection,
    SharingSection,
    WorkerConfig,
)
from workers.engine.protocol import Engine
from workers.engine.torch_engine import TorchEngine
from workers.kv.journal import Changes, Journal


@dataclass
class Output:
    """Everything one output yielded."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish: Finish | None = None
    cached_tokens: int | None = None


Outputs = dict[tuple[str, int], Output]


def torch_engine(
    directory: Path,
    *,
    num_pages: int = 512,
    page_size: int = 32,
    step_tokens: int = 512,
    max_running: int = 64,
    dtype: str = "float32",
    prefix_cache: bool = True,
    kernels: str | None = None,
    sharing: str = "planned",
    deterministic: bool = False,
    threads: int = 1,
) -> TorchEngine:
    """Native kernels where their page size allows it, unless `kernels` names others."""
    model: dict[str, Any] = {"path": directory, "dtype": dtype}
    config = WorkerConfig(
        model=ModelSection(**model),
        engine=EngineSection(
            kernels=KernelsSection(variant=kernels or ("off" if page_size % 32 else "auto")),  # type: ignore[arg-type]
            sharing=SharingSection(mode=sharing, deterministic=deterministic),  # type: ignore[arg-type]
            kv=KVSection(num_pages=num_pages, page_size=page_size, prefix_cache=prefix_cache),
            scheduler=SchedulerSection(step_tokens=step_tokens, max_running=max_running),
        ),
    )
    return TorchEngine(config, threads=threads)


def request(request_id: str, prompt: Sequence[int], *, max_tokens: int = 8, seed: int = 0, **fields: Any) -> Request:
    """A request; what Sampling knows goes there, the rest to Request. Greedy unless a temperature is given."""
    names = Sampling.__dataclass_fields__
    sampling = {"temperature": 0.0, **{name: fields.pop(name) for name in list(fields) if name in names}}
    return Request(request_id, tuple(prompt), Sampling(seed=seed, max_tokens=max_tokens, **sampling), **fields)


def drain(engine: Engine, outputs: Outputs | None = None, *, max_steps: int = 10_000) -> Outputs:
    """Step until nothing is live, checking invariants and that every output ends once."""
    outputs = {} if outputs is None else outputs
    for _ in range(max_steps):
        load = engine.load()
        if load.num_running + load.num_waiting == 0:
            return outputs
        step(engine, outputs)
    raise AssertionError("the engine makes no progress")


def step(engine: Engine, outputs: Outputs) -> None:
    result = engine.step()
    assert not result.failures, result.failures
    for delta in result.deltas:
        output = outputs.setdefault((delta.request_id, delta.index), Output())
        assert output.finish is None
        output.tokens += delta.token_ids
        output.logprobs += delta.logprobs
        output.prompt_logprobs += delta.prompt_logprobs
        output.finish = delta.finish
        if delta.cached_tokens is not None:
            output.cached_tokens = delta.cached_tokens
    if isinstance(engine, TorchEngine):
        engine.check()


def settle(engine: Engine, *, quiet_s: float = 0.3) -> Changes:
    """What has changed in the prefix cache until nothing more does: other processes tell it a little later."""
    journal = Journal()
    quiet_at = time.monotonic() + quiet_s
    while time.monotonic() < quiet_at:
        if (changes := engine.take_kv_changes()) != Changes():
            journal.store(changes.stored)
            journal.remove(changes.removed)
            quiet_at = time.monotonic() + quiet_s
        time.sleep(quiet_s / 30)
    return journal.take()


def run(engine: Engine, *requests: Request) -> Outputs:
    for one in requests:
        engine.submit(one)
    return drain(engine)
