"""The conditions of a run: what a number means nothing without."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

from benchmarks.options import Options

ROOT = Path(__file__).parent.parent
CPUINFO = Path("/proc/cpuinfo")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "bf16", "i8mm", "sve")
DISTRIBUTIONS = (
    "headwater",
    "torch",
    "ray",
    "grpcio",
    "protobuf",
    "numpy",
    "tokenizers",
    "transformers",
    "triton",
    "vllm",
    "openvino-genai",
    "llama-cpp-python",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and the software on it."""

    cpu: str
    cpu_flags: tuple[str, ...]  # those of interest that it has
    num_cores: int  # that this process may use
    memory_gib: float
    gpus: tuple[str, ...]
    system: str
    python: str
    versions: Mapping[str, str]  # of installed distributions of interest


@dataclass(frozen=True, slots=True)
class Conditions:
    """Everything needed to repeat a run and to judge it."""

    benchmark: str
    date: str
    commit: str
    dirty: bool  # the tree differed from the commit
    machine: Machine
    options: Mapping[str, object]
    config: Mapping[str, object]
    load_begin: tuple[float, ...]  # load average over 1, 5 and 15 minutes
    load_end: tuple[float, ...]
    wall_s: float
    own_cpu_percent: float  # of one core: this process, its threads, not its children

    def as_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Observation:
    """Conditions begun and not yet ended."""

    benchmark: str
    options: Options
    config: Mapping[str, object]
    date: str
    load_begin: tuple[float, ...]
    wall_begin_s: float
    cpu_begin_s: float

    @classmethod
    def begin(cls, benchmark: str, options: Options, config: Mapping[str, object]) -> Observation:
        """Note the load and the time before the run."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(benchmark, options, config, date, psutil.getloadavg(), time.perf_counter(), time.process_time())

    def end(self) -> Conditions:
        """The conditions, after the run."""
        wall_s = time.perf_counter() - self.wall_begin_s
        cpu_s = time.process_time() - self.cpu_begin_s
        commit, dirty = revision()
        return Conditions(
            benchmark=self.benchmark,
            date=self.date,
            commit=commit,
            dirty=dirty,
            machine=machine(),
            options={name: _plain(value) for name, value in asdict(self.options).items()},
            config=self.config,
            load_begin=self.load_begin,
            load_end=psutil.getloadavg(),
            wall_s=round(wall_s, 3),
            own_cpu_percent=round(100 * cpu_s / wall_s, 1) if wall_s else 0.0,
        )


def machine() -> Machine:
    """The machine this runs on. Imports nothing to learn a version."""
    info = CPUINFO.read_text() if CPUINFO.exists() else ""
    return Machine(
        cpu=_field(info, "model name") or platform.processor() or platform.machine(),
        cpu_flags=cpu_flags(info),
        num_cores=len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else _num_cpus(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        gpus=_gpus(),
        system=platform.platform(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        versions=_versions(),
    )


def cpu_flags(info: str) -> tuple[str, ...]:
    """The flags of interest in the text of /proc/cpuinfo."""
    present = set((_field(info, "flags") or _field(info, "Features")).split())
    return tuple(flag for flag in FLAGS if flag in present)


def revision(root: Path = ROOT) -> tuple[str, bool]:
    """The commit checked out at `root`, and whether the tree differs from it; ("unknown", True) without git."""
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    if not commit:
        return "unknown", True
    return commit, bool(_output("git", "--no-optional-locks", "-C", str(root), "status", "--porcelain"))


def _field(info: str, name: str) -> str:
    lines = (line.partition(":") for line in info.splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _num_cpus() -> int:
    return os.cpu_count() or 1


def _gpus() -> tuple[str, ...]:
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return tuple(listed.splitlines())


def _versions() -> dict[str, str]:
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _output(program: str, *arguments: str) -> str:
    """What a program prints; empty if it is not there, fails, or takes longer than ten seconds."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        return subprocess.run([path, *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError):
        return ""


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
