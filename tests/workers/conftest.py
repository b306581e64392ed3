"""Fixtures for worker tests: the shipped tokenizer and a model directory."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def target_dir() -> Path:
    return ROOT / "models" / "target"


@pytest.fixture(scope="session")
def tokenizer(target_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(target_dir / "tokenizer.json"))
