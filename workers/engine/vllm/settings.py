"""What vLLM is started with: its engine arguments and its environment variables, from a worker's configuration."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vllm import AsyncEngineArgs
from vllm.config import KVEventsConfig, KVTransferConfig
from vllm.platforms import current_platform

from protos.errors import ConfigError
from workers.config import WorkerConfig

SECTION: Final = "headwater"  # of vLLM's additional_config: what our code in its processes must know
MIN_KV_BYTES: Final = 1 << 20
MAX_SOCKETS_PATH: Final = 107 - len("/00000000-0000-0000-0000-000000000000")  # a socket's name may have no more
REFUSED: Final[Mapping[str, str]] = {
    "logits_processors": "what would call them is replaced by Headwater's sampler",
    "data_parallel_size": "more workers are the way to more copies (cluster.num_workers)",
    "nnodes": "a worker is on one node",
}


def engine_args(config: WorkerConfig, *, threads: int, sockets: Path) -> AsyncEngineArgs:
    """Raises ConfigError for an argument of `worker.engine.vllm.args` that is unknown, or not to be set there.

    `sockets`: a private folder, for the events of vLLM's scheduler.
    """
    ours = _ours(config, threads=threads, sockets=sockets)
    reasons = {**dict.fromkeys(ours, "Headwater sets it"), **REFUSED}
    for name in config.engine.vllm.args:
        if name in reasons:
            raise ConfigError(f"worker.engine.vllm.args has {name}: {reasons[name]}; leave it out (docs/engines.md)")
        if name not in AsyncEngineArgs.__dataclass_fields__:
            raise ConfigError(f"worker.engine.vllm.args has {name}, which vLLM does not know; correct the name")
    return AsyncEngineArgs(**ours, **config.engine.vllm.args)


def environment(*, threads: int, tensor_parallel: int = 1, sockets: Path | None = None) -> dict[str, str]:
    """Variables that vLLM's processes read, and that no argument stands for. Those that the user has set stay.

    `sockets`: a folder for vLLM's own, if it is short enough for their names; where vLLM is killed they stay behind.
    """
    variables = {
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # whose sampler cannot be replaced
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CONFIGURE_LOGGING": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    if sockets is not None and len(str(sockets)) <= MAX_SOCKETS_PATH:
        variables["VLLM_RPC_BASE_PATH"] = str(sockets)
    if current_platform.is_cpu():
        variables |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else the first core of the machine is every engine's
            "OMP_NUM_THREADS": str(threads),
            # Scheduler and model in one process: two would pass steps through memory that both watch without a pause.
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(tensor_parallel > 1)),
            "LD_PRELOAD": ":".join(dict.fromkeys([*_preloaded(), *_libraries()])),
        }
    return {name: value for name, value in variables.items() if name not in os.environ or name == "LD_PRELOAD"}


def inside(config: WorkerConfig, *, threads: int) -> dict[str, Any]:
    """What our code in vLLM's worker process is told. Secrets are not: vLLM logs it."""
    speculation = config.engine.speculation
    return {
        "owner": os.getpid(),
        "threads": threads,
        "attention": config.engine.vllm.attention,
        "kernels": str(config.engine.kernels.directory or ""),
        "speculation": {
            "drafters": list(speculation.drafters),
            "max_nodes": speculation.max_nodes,
            "deadline_s": speculation.deadline_s,
            "target": str(config.model.path),
        },
    }


def _ours(config: WorkerConfig, *, threads: int, sockets: Path) -> dict[str, Any]:
    engine, own = config.engine, config.engine.vllm
    arguments: dict[str, Any] = {
        "model": str(config.model.path),
        "served_model_name": config.model.served_name,
        "skip_tokenizer_init": True,
        "dtype": config.model.dtype,
        "max_model_len": _max_context(config),
        "tensor_parallel_size": own.tensor_parallel,
        "enforce_eager": own.enforce_eager,
        "quantization": own.quantization,
        "enable_lora": own.lora is not None,
        "block_size": engine.kv.page_size,
        "num_gpu_blocks_override": engine.kv.num_pages + 1,  # one is never used
        "enable_prefix_caching": engine.kv.prefix_cache,
        "prefix_caching_hash_algo": "sha256_cbor",
        "kv_events_config": _events(config, sockets),
        "kv_transfer_config": _transfer(config),
        "max_num_seqs": engine.scheduler.max_running,
        "max_num_batched_tokens": engine.scheduler.step_tokens,
        "scheduling_policy": "priority",
        "async_scheduling": False,  # the sampler must know all tokens before
        "max_logprobs": -1,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "worker_cls": "workers.engine.vllm.worker.HeadwaterWorker",
        "speculative_config": _speculation(config),
        "additional_config": {SECTION: inside(config, threads=threads)},
    }
    if current_platform.is_cpu():
        arguments["kv_cache_memory_bytes"] = MIN_KV_BYTES  # the number of blocks is given; this only skips a profile
    return arguments


def _max_context(config: WorkerConfig) -> int:
    """vLLM refuses a context that its memory does not hold; -1: as much of the model's as fits."""
    wanted = config.model.max_context
    return -1 if wanted is None else min(wanted, config.engine.kv.capacity_tokens)


def _events(config: WorkerConfig, sockets: Path) -> KVEventsConfig | None:
    if not config.engine.kv.prefix_cache:
        return None
    events, replay = event_endpoints(sockets)
    return KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=events, replay_endpoint=replay)


def event_endpoints(sockets: Path) -> tuple[str, str]:
    """Where events come from, and where those that were missed are asked for."""
    return f"ipc://{sockets}/events", f"ipc://{sockets}/replay"


def _transfer(config: WorkerConfig) -> KVTransferConfig | None:
    if not config.engine.kv.prefix_cache:
        return None
    return KVTransferConfig(
        kv_connector="HeadwaterConnector",
        kv_connector_module_path="workers.engine.vllm.connector",
        kv_role="kv_both",
    )


def _speculation(config: WorkerConfig) -> dict[str, Any] | None:
    speculation = config.engine.speculation
    if not speculation.drafters:
        return None
    return {
        "method": "custom_class",
        "model": "workers.engine.vllm.proposer.Proposer",
        "num_speculative_tokens": speculation.max_nodes,
    }


def _preloaded() -> list[str]:
    return [path for path in os.environ.get("LD_PRELOAD", "").split(":") if path]


def _libraries() -> list[str]:
    """What vLLM computes faster with: Intel's OpenMP, which comes with vllm-cpu, unless another one is preloaded."""
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    is_taken = any(name in path for path in _preloaded() for name in ("libiomp", "libomp", "libgomp"))
    return [str(openmp)] if openmp.is_file() and not is_taken else []


@contextmanager
def exported(variables: Mapping[str, str]) -> Iterator[None]:
    """Set them for the processes that this one starts meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
