"""The instruction sets the native kernels are built for, and which of them this processor has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from protos.errors import SetupError

_AVX512: Final = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512")
_AVX512_CPU: Final = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma"})


@dataclass(frozen=True, slots=True)
class Variant:
    """One build of the kernels."""

    name: str
    flags: tuple[str, ...]  # for the compiler
    needs: frozenset[str]  # what /proc/cpuinfo must list

    def runs_on(self, features: frozenset[str]) -> bool:
        return self.needs <= features


AMX: Final = Variant(
    "amx",
    (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DHEADWATER_AMX"),
    _AVX512_CPU | {"avx512_bf16", "amx_tile", "amx_bf16"},
)
AVX512_BF16: Final = Variant("avx512_bf16", (*_AVX512, "-mavx512bf16"), _AVX512_CPU | {"avx512_bf16"})
AVX512: Final = Variant("avx512", _AVX512, _AVX512_CPU)
AVX2: Final = Variant("avx2", ("-mavx2", "-mfma"), frozenset({"avx2", "fma"}))
GENERIC: Final = Variant("generic", (), frozenset())

VARIANTS: Final = (AMX, AVX512_BF16, AVX512, AVX2, GENERIC)  # the fastest first


def named(name: str) -> Variant:
    """The variant of a name. Raises SetupError for a name that none has."""
    for variant in VARIANTS:
        if variant.name == name:
            return variant
    raise SetupError(f"no kernels are called {name!r}; choose one of {', '.join(v.name for v in VARIANTS)}")


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the processor says it has; nothing where the system does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
