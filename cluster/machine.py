"""What `headwater doctor` sees of the machine it runs on, read once."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import psutil

from protos.errors import SetupError
from workers.kernels.build import Compiler
from workers.kernels.variants import cpu_features

SHARED_MEMORY: Final = Path("/dev/shm")
IMPORT_TIMEOUT_S: Final = 120.0
_GPU_DEVICES: Final = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
_TCMALLOC: Final = ("tcmalloc_minimal", "tcmalloc")


@dataclass(frozen=True, slots=True)
class Machine:
    """Processor, memory, libraries, and what cannot be imported."""

    cpu_features: frozenset[str]  # as /proc/cpuinfo has them; empty: unknown
    has_gpu: bool
    memory_bytes: int
    available_bytes: int  # of memory
    shared_bytes: int  # free in shared memory
    compiler: str  # the path of a C++ compiler; empty: there is none
    openmp: str  # the path of Intel's OpenMP; empty likewise
    tcmalloc: str  # the name of the library; empty likewise
    import_errors: Mapping[str, str]  # by module, of those that were tried

    @classmethod
    def read(cls, modules: Iterable[str] = ()) -> Self:
        """This machine. Each of `modules` is imported in a process of its own, beside torch: that takes seconds."""
        memory = psutil.virtual_memory()
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"  # where the wheel puts it
        return cls(
            cpu_features=cpu_features(),
            has_gpu=any(device.exists() for device in _GPU_DEVICES),
            memory_bytes=memory.total,
            available_bytes=memory.available,
            shared_bytes=_free_bytes(SHARED_MEMORY),
            compiler=_compiler(),
            openmp=str(openmp) if openmp.exists() else "",
            tcmalloc=next(filter(None, map(ctypes.util.find_library, _TCMALLOC)), ""),
            import_errors={module: error for module in modules if (error := import_error(module))},
        )


def import_error(module: str) -> str:
    """Why `module` cannot be imported after torch, in one line; empty if it can. Takes seconds."""
    command = [sys.executable, "-c", f"import torch, {module}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"took longer than {IMPORT_TIMEOUT_S:.0f} s"
    if not done.returncode:
        return ""
    return next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")


def _compiler() -> str:
    try:
        return Compiler.find().path
    except SetupError:
        return ""


def _free_bytes(directory: Path) -> int:
    """Of the file system; nothing where there is no such folder."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize
