"""Which model computes: native kernels where they can be had, torch where not, and never in silence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from protos.errors import SetupError
from tests.workers.engine.drive import request, run
from workers.attention.cost import DEFAULT_COST, FittedCost
from workers.config import EngineSection, KernelsSection, KVSection, ModelSection, SchedulerSection, WorkerConfig
from workers.engine.models import LoadedModel, load_model
from workers.engine.torch_engine import TorchEngine
from workers.kernels import library as loading
from workers.kernels.decoder import NativeDecoder
from workers.kernels.variants import VARIANTS
from workers.model.config import ModelConfig
from workers.model.torch_model import TorchModel

PROMPTS = [[(11 * i + 3 * j) % 4000 + 1 for j in range(9 + 20 * i)] for i in range(4)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this module's kernels are kept: the simplest variant, compiled once."""
    return tmp_path_factory.mktemp("kernels")


def config(root: Path, *, page_size: int = 32, **kernels: Any) -> WorkerConfig:
    return WorkerConfig(
        model=ModelSection(path=root / "models" / "target"),
        engine=EngineSection(
            kernels=KernelsSection(**kernels),
            kv=KVSection(num_pages=64, page_size=page_size),
            scheduler=SchedulerSection(step_tokens=256),
        ),
    )


def loaded(config: WorkerConfig) -> LoadedModel:
    model = ModelConfig.from_directory(config.model.path)
    return load_model(config, model, max_context=512, threads=1, device=torch.device("cpu"))


def tokens(config: WorkerConfig) -> list[list[int]]:
    outputs = run(TorchEngine(config), *(request(str(i), prompt, max_tokens=12) for i, prompt in enumerate(PROMPTS)))
    return [outputs[str(i), 0].tokens for i in range(len(PROMPTS))]


@pytest.fixture
def plain_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with no vector instructions of its own: the simplest variant is the best."""
    monkeypatch.setattr(loading, "cpu_features", lambda: frozenset())


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="workers")
    return caplog


def test_a_cpu_runs_native_kernels_with_a_measured_cost(
    plain_processor: None, root: Path, directory: Path, warnings: pytest.LogCaptureFixture
) -> None:
    found = loaded(config(root, directory=directory))
    assert isinstance(found.model, NativeDecoder)
    assert found.kernels == found.model.kernels == "generic"
    assert isinstance(found.cost.base, FittedCost)
    assert found.cost.base is not DEFAULT_COST
    assert warnings.messages == []


def test_off_runs_torch(root: Path, warnings: pytest.LogCaptureFixture) -> None:
    found = loaded(config(root, variant="off"))
    assert isinstance(found.model, TorchModel)
    assert found.kernels == "torch"
    assert found.cost.base is DEFAULT_COST
    assert warnings.messages == []


def test_a_named_variant_runs(root: Path, directory: Path) -> None:
    assert loaded(config(root, variant="generic", directory=directory)).kernels == "generic"


def test_without_a_compiler_torch_runs_and_says_so_once(
    no_compiler: None, root: Path, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    found = tokens(config(root, directory=tmp_path))
    assert len(warnings.messages) == 1
    assert "torch path runs" in warnings.messages[0]
    assert "no C++ compiler is on the PATH" in warnings.messages[0]
    assert found == tokens(config(root, variant="off"))


def test_native_and_torch_give_the_same_tokens(root: Path, directory: Path) -> None:
    assert tokens(config(root, variant="generic", directory=directory)) == tokens(config(root, variant="off"))


def test_auto_falls_back_for_a_page_size_that_the_kernels_cannot_keep(
    root: Path, warnings: pytest.LogCaptureFixture
) -> None:
    assert loaded(config(root, page_size=16)).kernels == "torch"
    assert len(warnings.messages) == 1
    assert "engine.kv.page_size is 16" in warnings.messages[0]


def test_a_named_variant_refuses_what_auto_falls_back_from(no_compiler: None, root: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"engine\.kv\.page_size is 16"):
        loaded(config(root, variant="generic", page_size=16))
    with pytest.raises(SetupError, match=r"no C\+\+ compiler"):
        loaded(config(root, variant="generic", directory=tmp_path))


@pytest.mark.parametrize("name", [variant.name for variant in VARIANTS if variant.needs])
def test_a_named_variant_that_the_processor_lacks(plain_processor: None, root: Path, name: str) -> None:
    with pytest.raises(SetupError, match=f"cannot run the {name} kernels, it lacks"):
        loaded(config(root, variant=name))


def test_a_device_that_is_no_cpu_runs_torch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(choice: str, directory: Path | None) -> None:
        raise AssertionError("kernels were loaded for a device that cannot run them")

    monkeypatch.setattr("workers.engine.models.load", refused)
    model = ModelConfig.from_directory(root / "models" / "target")
    meta = torch.device("meta")
    assert load_model(config(root), model, max_context=512, threads=1, device=meta).kernels == "torch"
