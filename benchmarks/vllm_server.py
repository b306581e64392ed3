"""vLLM's own server (`vllm serve`) as a process of its own, with the settings of a Headwater worker's engine."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.conditions import ROOT
from benchmarks.routing_cluster import POLL_S, ClusterFailedError, end, last_words
from benchmarks.vllm_http import Completions
from workers.config import WorkerConfig
from workers.engine.vllm.settings import engine_args, environment

HOST: Final = "127.0.0.1"
SAME: Final = (  # engine arguments that both have: all that says what is computed, and how
    *("model", "served_model_name", "dtype", "max_model_len", "tensor_parallel_size", "enforce_eager"),
    *("block_size", "num_gpu_blocks_override", "kv_cache_memory_bytes", "enable_prefix_caching"),
    *("prefix_caching_hash_algo", "max_num_seqs", "max_num_batched_tokens", "generation_config"),
)


@asynccontextmanager
async def vllm_serving(
    config: WorkerConfig, *, threads: int, timeout_s: float, variables: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Completions, int]]:
    """A healthy server on a free port, and its process id. When left, its processes are gone.

    `variables` of its environment go before this process's. Raises ClusterFailedError with what the server said.
    """
    with TemporaryDirectory(prefix="hwb-") as folder:
        arguments, own = engine_args(config, threads=threads, sockets=Path(folder)), config.engine.vllm
        server = Completions(HOST, free_port(), config.model.served_name)
        output = Path(folder) / "output"
        with output.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),  # `vllm` itself wants a package `vllm`
                *("--host", HOST, "--port", str(server.port), "--disable-uvicorn-access-log", "--disable-log-stats"),
                *flags({name: getattr(arguments, name) for name in SAME}),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=asyncio.subprocess.STDOUT,
                cwd=ROOT,
                env={
                    **os.environ,
                    **environment(threads=threads, tensor_parallel=own.tensor_parallel),
                    **(variables or {}),
                },
                start_new_session=True,
            )
        try:
            await _healthy(server, process, output, timeout_s)
            yield server, process.pid
        finally:
            await end(process)


def flags(settings: Mapping[str, Any]) -> Sequence[str]:
    """Settings as the command line has them; those that are None stay vLLM's own."""
    given: list[str] = []
    for name, value in settings.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            given.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            given += [f"--{option}", str(value)]
    return given


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


async def _healthy(server: Completions, process: asyncio.subprocess.Process, output: Path, timeout_s: float) -> None:
    ends_s = time.perf_counter() + timeout_s
    while not await server.is_healthy():
        if process.returncode is not None:
            raise ClusterFailedError(f"vLLM's server ended with {process.returncode}: {last_words(output)}")
        if time.perf_counter() > ends_s:
            raise ClusterFailedError(f"vLLM's server was not ready after {timeout_s:g} s: {last_words(output)}")
        await asyncio.sleep(POLL_S)
