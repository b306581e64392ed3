"""How long vLLM takes to start: `vllm serve` against a Headwater cluster of one worker, from the command to ready.

    .venv-vllm/bin/python -m benchmarks.vllm_startup    # three starts each, about eight minutes

eager: the model is not compiled. cold: it is, with an empty compile cache. warm: it is, and the cache has it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Literal, get_args

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.conditions import ROOT
from benchmarks.options import add_options, positive, read_options
from benchmarks.routing_cluster import serving
from benchmarks.vllm_server import vllm_serving
from cluster.config import load

Way = Literal["eager", "cold", "warm"]

WAYS: Final = get_args(Way)
TIMEOUT_S: Final = 600.0


@dataclass(frozen=True, slots=True)
class Start:
    """How the model comes to be."""

    way: Way


class Starter:
    """Starts servers and ends them. Owns the folder of compiled models; one start runs at a time."""

    def __init__(self, caches: Path, threads: int) -> None:
        self._caches = caches
        self._threads = threads

    async def vllm(self, workload: Workload[Start]) -> Measured:
        """Of `vllm serve`, until it answers that it is healthy."""
        config = load(None, [f"{key}={value}" for key, value in self._settings(workload).items()])
        variables = self._variables("vllm", workload.params.way)
        began_s = time.perf_counter()
        running = vllm_serving(config.worker, threads=self._threads, timeout_s=TIMEOUT_S, variables=variables)
        async with running:
            return Measured({"ready_s": time.perf_counter() - began_s})

    async def headwater(self, workload: Workload[Start]) -> Measured:
        """Of `headwater serve`, until it says that it is ready."""
        variables = self._variables("headwater", workload.params.way)
        began_s = time.perf_counter()
        async with serving(self._settings(workload), timeout_s=TIMEOUT_S, variables=variables):
            return Measured({"ready_s": time.perf_counter() - began_s})

    def _settings(self, workload: Workload[Start]) -> Mapping[str, object]:
        return {
            "cluster.num_workers": 1,
            "cluster.drain_timeout_s": 2,
            "cluster.ready_timeout_s": TIMEOUT_S,
            "worker.model.path": ROOT / "models" / "target",
            "worker.model.dtype": "bfloat16",
            "worker.engine.kind": "vllm",
            "worker.engine.threads": self._threads,
            "worker.engine.vllm.enforce_eager": str(workload.params.way == "eager").lower(),
        }

    def _variables(self, name: str, way: Way) -> Mapping[str, str]:
        """Where compiled models are kept: each server has a folder, which a cold start empties."""
        folder = self._caches / name
        if way == "cold":
            shutil.rmtree(folder, ignore_errors=True)
        return {"VLLM_CACHE_ROOT": str(folder / "vllm"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="of starting (default all, in this order)")
    made.add_argument("--threads", type=positive, default=1, help="of the model (default 1)")
    add_options(made, rounds=3)
    made.set_defaults(warmup_rounds=0)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the benchmark; the exit code."""
    args = parser().parse_args(arguments)
    with TemporaryDirectory(prefix="hwb-") as folder:
        starter = Starter(Path(folder), args.threads)
        benchmark = Benchmark(
            "vllm_startup",
            [Workload(way, Start(way)) for way in args.ways],
            [Arm("vllm serve", starter.vllm), Arm("headwater", starter.headwater)],
            config={"threads": args.threads},
        )
        return harness.main(benchmark, read_options(args))


if __name__ == "__main__":
    sys.exit(main())
