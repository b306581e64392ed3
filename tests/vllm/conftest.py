"""Fixtures for the tests of the vLLM engine, which are collected only where vLLM is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.vllm.models import save_model

collect_ignore_glob = [] if find_spec("vllm") else ["*"]


@pytest.fixture(scope="session")
def target_dir(root: Path) -> Path:
    """The shipped model."""
    return root / "models" / "target"


@pytest.fixture(scope="session")
def qwen3_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3."""
    return save_model(tmp_path_factory.mktemp("qwen3"), "qwen3", tokenizer_from=target_dir)


@pytest.fixture(scope="session")
def mistral_dir(target_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Mistral."""
    return save_model(tmp_path_factory.mktemp("mistral"), "mistral", tokenizer_from=target_dir)
