"""Libraries of the native kernels, each compiled once for all the tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.workers.kernels.emulated import AMX_EMULATED
from workers.kernels.build import COMPILERS, build
from workers.kernels.library import Library
from workers.kernels.variants import GENERIC, VARIANTS, Variant, cpu_features


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this run's libraries are kept."""
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("no C++ compiler is on the PATH")
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(scope="session", params=[*VARIANTS, AMX_EMULATED], ids=lambda variant: variant.name)
def library(request: pytest.FixtureRequest, directory: Path) -> Library:
    """Every variant that this processor runs, and the code around the AMX tiles wherever AVX-512 runs."""
    variant: Variant = request.param
    if missing := variant.needs - cpu_features():
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    return Library(build(variant, directory), variant)


@pytest.fixture(scope="session")
def generic(directory: Path) -> Library:
    """For what does not depend on the instruction set."""
    return Library(build(GENERIC, directory), GENERIC)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Torch, whose results are the yardstick, leaves the cores to the kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
