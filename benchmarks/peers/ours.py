"""Headwater's engine, in process: the engine loop of a worker, with scheduler, sampling and text, and no network.

Options: a part of WorkerConfig's tree, laid over what the settings say; a feature is switched off here.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from benchmarks.conditions import revision
from benchmarks.peers.line import Settings, Tokens, main
from protos.messages import Delta, Failure, Request, Sampling
from workers.config import WorkerConfig
from workers.engine.factory import make_engine
from workers.loop import EngineLoop, Frame
from workers.metrics import WorkerMetrics

SESSION = 1
STEP_TOKENS = 2048
PAGE_SIZE = 32


class Ours:
    """The engine. Frames come in on the engine's thread, and `run` waits for the last of them."""

    def __init__(self, settings: Settings) -> None:
        config = WorkerConfig.model_validate(merged(base(settings), settings.options))
        self._options = settings.options
        self._engine = make_engine(config, threads=settings.threads)
        self._changed = threading.Condition()
        self._outputs: dict[str, Tokens] = {}
        self._num_open = 0
        self._failures: list[Failure] = []
        self._num_asked = 0
        tokenizer = Tokenizer.from_file(str(settings.model / "tokenizer.json"))
        metrics = WorkerMetrics(model_name=config.model.served_name, worker_id="0")
        self._loop = EngineLoop(self._engine, tokenizer, metrics, deliver=self._deliver, stall_s=config.engine.stall_s)
        self._loop.start()
        self._loop.open(SESSION)

    def facts(self) -> Mapping[str, object]:
        return {"commit": revision()[0], **self._options}

    def warm(self, prefixes: Sequence[Tokens]) -> None:
        for prefix in prefixes:
            self.run([prefix], 1)

    def run(self, prompts: Sequence[Tokens], max_tokens: int) -> list[Tokens]:
        names = [f"{self._num_asked + index}" for index in range(len(prompts))]
        self._num_asked += len(prompts)
        with self._changed:
            self._outputs = {name: [] for name in names}
            self._num_open, self._failures = len(names), []
        sampling = Sampling(seed=0, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        for name, prompt in zip(names, prompts, strict=True):
            self._loop.submit(SESSION, Request(name, tuple(prompt), sampling))
        with self._changed:
            self._changed.wait_for(lambda: not self._num_open)
            if self._failures:
                raise RuntimeError(
                    f"{len(self._failures)} of {len(names)} requests failed: {self._failures[0].message}"
                )
            return [self._outputs[name] for name in names]

    def _deliver(self, frames: list[Frame]) -> None:
        with self._changed:
            for delta in (delta for frame in frames for delta in frame.deltas):
                self._take(delta)
            if not self._num_open:  # a thread woken at every step would take its time from the engine
                self._changed.notify()

    def _take(self, delta: Delta | Failure) -> None:
        if isinstance(delta, Failure):
            self._failures.append(delta)
            self._num_open -= 1
            return
        self._outputs[delta.request_id] += delta.token_ids
        self._num_open -= delta.finish is not None


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid over it, section by section."""
    both = {key: merged(base[key], over[key]) for key in base.keys() & over.keys() if isinstance(over[key], Mapping)}
    return {**base, **over, **both}


def base(settings: Settings) -> dict[str, Any]:
    """The part of WorkerConfig's tree that follows from the settings."""
    return {
        "model": {"path": str(settings.model), "dtype": "bfloat16", "max_context": settings.max_context},
        "engine": {
            "kv": {"num_pages": settings.kv_tokens // PAGE_SIZE, "page_size": PAGE_SIZE},
            "scheduler": {"max_running": settings.max_batch, "step_tokens": STEP_TOKENS},
        },
    }


if __name__ == "__main__":
    main(Ours)
