"""What speculation is worth: an engine with each of the drafters, and with all, against the plain one.

    python -m benchmarks.speculation
    python -m benchmarks.speculation --arms plain,copy --workloads code-1,copy-1

Every arm is an engine loop of its own (scheduler, sampling and text in, no network), resident throughout, with as many
threads as the plain one; but where a drafter runs in a process of its own (`pool`), its thread is one of them, unless
it shall share the cores (`--share-cores`). A workload keeps so many requests running: as one ends, the next begins.
`code` continues Python that the models have not seen; in `copy` the prompt is a piece of code followed by the beginning
of its copy; `sampled` is `code` at temperature 0.8. The answers are the same for every arm up to rounding; that is
tested elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.options import add_options, positive, read_options
from benchmarks.prompts import Code
from protos.messages import Failure, Request, Sampling
from workers.config import DrafterConfig, WorkerConfig
from workers.drafter import DrafterProcess
from workers.engine.factory import make_engine
from workers.engine.protocol import Engine
from workers.loop import EngineLoop, Frame
from workers.metrics import WorkerMetrics
from workers.speculative.pool.members import Members, PoolAccess
from workers.speculative.stats import SpeculationStats

ARMS: Mapping[str, tuple[str, ...]] = {
    "plain": (),
    "again": (),  # plain once more: what differs is noise
    "copy": ("copy",),
    "recycle": ("recycle",),
    "model": ("model",),
    "all": ("copy", "recycle", "model"),
    "pool": ("pool",),
    "copy+pool": ("copy", "pool"),
}
DEFAULT_ARMS = ",".join(name for name in ARMS if name != "again")
SESSION = 1
TOKEN = "of this benchmark alone"
PROMPT_TOKENS = 300
COPIED_TOKENS = 400  # of code, of which COPY_BEGUN tokens follow again
COPY_BEGUN = 60
MAX_TOKENS = 128
REQUESTS_PER_CLIENT = 3
FEWEST_REQUESTS = 8


@dataclass(frozen=True, slots=True)
class Load:
    """A workload: how many requests run at once, and of which kind."""

    num_running: int
    temperature: float = 0.0
    is_copy: bool = False

    @property
    def num_requests(self) -> int:
        return max(FEWEST_REQUESTS, REQUESTS_PER_CLIENT * self.num_running)


WORKLOADS: Mapping[str, Load] = {
    "code-1": Load(1),
    "code-4": Load(4),
    "code-16": Load(16),
    "code-64": Load(64),
    "sampled-1": Load(1, temperature=0.8),
    "copy-1": Load(1, is_copy=True),
}


class Remote:
    """A drafter in a process of its own."""

    def __init__(self, config: DrafterConfig, target: Path) -> None:
        self._config = config
        self._target = target

    def start(self) -> PoolAccess:
        """Returns when it listens."""
        context = multiprocessing.get_context("spawn")
        near, far = context.Pipe()
        self._process = context.Process(target=_draft, args=(far, self._config, self._target), daemon=True)
        self._process.start()
        far.close()
        self._end = near
        return PoolAccess(Members({"0": near.recv()}), TOKEN)

    def stop(self) -> None:
        """End it in order."""
        self._end.close()
        self._process.join()


def _draft(end: Connection, config: DrafterConfig, target: Path) -> None:
    drafter = DrafterProcess(config, target=target, token=TOKEN)
    end.send(drafter.start().channel)
    with contextlib.suppress(EOFError):
        end.recv()
    drafter.stop()


class Contender:
    """One arm's engine loop. Requests are handed in and counted on the engine's thread, one at a time."""

    def __init__(self, config: WorkerConfig, drafter: DrafterConfig | None, threads: int) -> None:
        """`drafter`: of a process beside the engine, which has so many threads of its own."""
        self._config = config
        self._drafter = None if drafter is None else Remote(drafter, config.model.path)
        self._threads = threads
        self._changed = threading.Condition()
        self._todo: list[Request] = []
        self._num_open = 0
        self._num_tokens = 0
        self._failures: list[Failure] = []
        self._num_asked = 0

    def setup(self) -> None:
        """Load the models and start the loop."""
        pool = None if self._drafter is None else self._drafter.start()
        self._engine: Engine = make_engine(self._config, threads=self._threads, pool=pool)
        self._tokenizer = Tokenizer.from_file(str(self._config.model.path / "tokenizer.json"))
        metrics = WorkerMetrics(model_name=self._config.model.served_name, worker_id="0")
        stall_s = self._config.engine.stall_s
        self._loop = EngineLoop(self._engine, self._tokenizer, metrics, deliver=self._deliver, stall_s=stall_s)
        self._loop.start()
        self._loop.open(SESSION)

    def teardown(self) -> None:
        """Stop the loop and leave nothing behind."""
        self._loop.stop()
        self._engine.close()
        if self._drafter is not None:
            self._drafter.stop()

    def measure(self, workload: Workload[Load]) -> Measured:
        """All of the workload's requests, from the first one's arrival to the last one's end."""
        requests = self._requests(workload)
        before, steps_before = self._engine.stats().speculation, self._engine.stats().num_steps
        with self._changed:
            self._todo, self._num_open, self._num_tokens, self._failures = requests[::-1], len(requests), 0, []
        began = time.perf_counter()
        for _ in range(workload.params.num_running):
            self._next()
        with self._changed:
            self._changed.wait_for(lambda: not self._num_open)
        seconds = time.perf_counter() - began
        after, num_steps = self._engine.stats().speculation, self._engine.stats().num_steps - steps_before
        values = {"tokens_per_s": self._num_tokens / seconds, "tokens_per_step": self._num_tokens / num_steps}
        if before is not None and after is not None:
            values |= _drafting(before, after)
        return Measured(values, errors={"failed": len(self._failures)} if self._failures else {})

    def _requests(self, workload: Workload[Load]) -> list[Request]:
        source, code, load = random.Random(workload.seed), Code.heldout(), workload.params
        made = []
        for _ in range(load.num_requests):
            num_tokens = COPIED_TOKENS if load.is_copy else PROMPT_TOKENS
            tokens = self._tokenizer.encode(code.piece(source, num_tokens)).ids
            prompt = [*tokens, *tokens[:COPY_BEGUN]] if load.is_copy else tokens
            sampling = Sampling(
                seed=source.getrandbits(32), max_tokens=MAX_TOKENS, temperature=load.temperature, ignore_eos=True
            )
            self._num_asked += 1
            made.append(Request(str(self._num_asked), tuple(prompt), sampling))
        return made

    def _next(self) -> None:
        with self._changed:
            request = self._todo.pop() if self._todo else None
        if request is not None:
            self._loop.submit(SESSION, request)

    def _deliver(self, frames: list[Frame]) -> None:
        for delta in (delta for frame in frames for delta in frame.deltas):
            is_end = isinstance(delta, Failure) or delta.finish is not None
            if isinstance(delta, Failure):
                self._failures.append(delta)
            else:
                self._num_tokens += len(delta.token_ids)
            if is_end:
                self._next()
                with self._changed:
                    self._num_open -= 1
                    self._changed.notify_all()


def _drafting(before: SpeculationStats, after: SpeculationStats) -> dict[str, float]:
    num_drafts = after.num_drafts - before.num_drafts
    num_drafted = after.drafted_tokens - before.drafted_tokens
    num_accepted = after.accepted_tokens - before.accepted_tokens
    num_asked = sum(after.decisions.values()) - sum(before.decisions.values())
    num_off = after.decisions["off"] - before.decisions["off"]
    values = {"num_drafts": float(num_drafts), "drafted_steps_percent": 100 * (1 - num_off / max(num_asked, 1))}
    if num_drafted:
        values |= {
            "accepted_percent": 100 * num_accepted / num_drafted,
            "accepted_per_draft": num_accepted / num_drafts,
        }
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, rounds=5)
    parser.add_argument("--model", default="models/target", help="a Hugging Face directory (default models/target)")
    parser.add_argument("--draft-model", default="models/drafter", help="the small one (default models/drafter)")
    parser.add_argument("--threads", type=positive, default=2, help="CPU threads of each engine (default 2)")
    parser.add_argument("--share-cores", action="store_true", help="drafters of their own leave the engine its threads")
    parser.add_argument("--arms", default=DEFAULT_ARMS, help=f"of {', '.join(ARMS)} (default {DEFAULT_ARMS})")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help=f"of {', '.join(WORKLOADS)} (default all)")
    args = parser.parse_args(arguments)
    options = read_options(args)
    arms, workloads = _chosen(parser, args.arms, ARMS), _chosen(parser, args.workloads, WORKLOADS)
    benchmark = Benchmark(
        "speculation",
        [Workload(name, WORKLOADS[name]) for name in workloads],
        [_arm(name, args) for name in arms],
        config={
            "model": args.model,
            "draft_model": args.draft_model,
            "threads": args.threads,
            "share_cores": args.share_cores,
        },
    )
    return harness.main(benchmark, options)


def _chosen(parser: argparse.ArgumentParser, text: str, known: Mapping[str, object]) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{', '.join(unknown)}: there are {', '.join(known)}")
    return names


def _arm(name: str, args: argparse.Namespace) -> Arm[Load]:
    drafter = None
    if "pool" in ARMS[name]:
        section = {"draft_model": args.draft_model, "metrics": {"port": 0}}
        drafter = DrafterConfig.model_validate(section)
    own_core = drafter is not None and not args.share_cores
    threads = max(1, args.threads - 1) if own_core else args.threads
    contender = Contender(WorkerConfig.model_validate(_config(name, args)), drafter, threads)
    return Arm(name, contender.measure, setup=contender.setup, teardown=contender.teardown)


def _config(name: str, args: argparse.Namespace) -> dict[str, Any]:
    draft_model = Path(args.draft_model) if "model" in ARMS[name] else None
    return {
        "model": {"path": args.model, "dtype": "bfloat16"},
        "engine": {"speculation": {"drafters": ARMS[name], "draft_model": draft_model}},
    }


if __name__ == "__main__":
    sys.exit(main())
