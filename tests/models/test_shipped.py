"""The models that ship are what models/README.md says."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from models.corpus import documents
from tests.workers.engine.drive import request, run, torch_engine
from workers.model.config import ModelConfig
from workers.model.directory import check_directory

MAX_FILE_BYTES = 16 << 20
NUM_TOKENS = 400


def scored(directory: Path, tokens: list[int]) -> tuple[float, list[int]]:
    """Mean loss over the tokens, and the model's greedy choice at each position."""
    asked = request("a", tokens, max_tokens=1, prompt_logprobs=1)
    positions = run(torch_engine(directory), asked)["a", 0].prompt_logprobs
    return -sum(p.logprob for p in positions) / len(positions), [p.top[0][0] for p in positions]


@pytest.mark.parametrize(("name", "least", "most"), [("target", 10, 25), ("drafter", 1, 3)])
def test_a_directory_is_complete_and_small(root: Path, name: str, least: int, most: int) -> None:
    directory = root / "models" / name
    config: ModelConfig = check_directory(directory)
    assert config.head_dim == 64
    assert config.num_kv_heads < config.num_heads
    assert config.max_position_embeddings > 32 * 1024
    files = list(directory.glob("*.safetensors"))
    assert all(file.stat().st_size < MAX_FILE_BYTES for file in files)
    num_parameters = sum(file.stat().st_size for file in files) / 2  # bf16
    assert least * 1e6 <= num_parameters <= most * 1e6


def test_both_have_the_same_tokenizer(root: Path) -> None:
    target, drafter = (root / "models" / name / "tokenizer.json" for name in ("target", "drafter"))
    assert target.read_bytes() == drafter.read_bytes()


def test_they_know_python_they_have_not_read(root: Path) -> None:
    tokenizer = Tokenizer.from_file(str(root / "models" / "target" / "tokenizer.json"))
    tokens = [tokenizer.encode(text).ids for text in documents("heldout")]
    windows = [ids[:NUM_TOKENS] for ids in tokens if len(ids) >= NUM_TOKENS][:4]
    assert len(windows) == 4
    agreed = num_positions = 0
    losses = []
    for window in windows:
        loss, choices = scored(root / "models" / "target", window)
        _, guesses = scored(root / "models" / "drafter", window)
        losses.append(loss)
        agreed += sum(a == b for a, b in zip(choices, guesses, strict=True))
        num_positions += len(choices)
    assert sum(losses) / len(losses) < 2.5
    assert agreed / num_positions > 0.35
