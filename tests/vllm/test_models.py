"""The tiny models of these tests are what they say: directories that both engines load."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.vllm.models import VOCAB_SIZE
from workers.model.directory import check_directory


@pytest.mark.parametrize(
    ("fixture", "architecture"), [("qwen3_dir", "Qwen3ForCausalLM"), ("mistral_dir", "MistralForCausalLM")]
)
def test_a_tiny_model_has_the_sizes_that_vllm_knows(
    fixture: str, architecture: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(fixture)
    config = check_directory(path)
    assert (config.architecture, config.head_dim, config.num_kv_heads) == (architecture, 32, 2)
    assert config.windows == (None, None)
    assert Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size() == VOCAB_SIZE
