"""Greedy tokens equal transformers' in fp32, whatever the engine shares, chunks, preempts or evicts."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.workers.engine.drive import request, run, torch_engine

NUM_PROMPTS = 50
NUM_TOKENS = 12
SIZE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TINY: dict[str, tuple[type, PretrainedConfig]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZE, head_dim=16, tie_word_embeddings=False)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZE, head_dim=16, sliding_window=24)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZE, head_dim=32)),
}


def prompts(vocab_size: int, longest: int) -> list[list[int]]:
    """Fifty prompts of mixed length, a third of which begin like another."""
    draw = random.Random(1)
    made: list[list[int]] = []
    for count in range(NUM_PROMPTS):
        prompt = [draw.randrange(1, vocab_size) for _ in range(draw.randint(1, longest))]
        made.append([*made[count - 1][: longest // 2], *prompt][:longest] if count % 3 == 2 else prompt)
    return made


@torch.inference_mode()
def greedy(directory: Path, asked: list[list[int]]) -> list[list[int]]:
    """What transformers generates."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    answers = []
    for prompt in asked:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0
        )
        answers.append(made[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module", params=["target", "drafter", *TINY])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, root: Path) -> Any:
    """A model directory, fifty prompts, and transformers' answers."""
    if request.param in TINY:
        kind, config = TINY[request.param]
        directory = tmp_path_factory.mktemp(request.param)
        torch.manual_seed(3)
        model = kind(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(4.0)  # away from the near-uniform logits of a fresh model
        model.save_pretrained(directory)
        asked = prompts(SIZE["vocab_size"], longest=90)
    else:
        directory = root / "models" / request.param
        asked = prompts(4096, longest=120)
    return directory, asked, greedy(directory, asked)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="batched"),
        pytest.param({"threads": 3}, id="three-threads"),
        pytest.param({"sharing": "all"}, id="sharing-all"),
        pytest.param({"sharing": "root"}, id="sharing-root"),
        pytest.param({"sharing": "never"}, id="sharing-never"),
        pytest.param({"deterministic": True}, id="deterministic"),
        pytest.param({"step_tokens": 40, "max_running": 16}, id="chunked"),
        pytest.param({"num_pages": 24, "max_running": 16, "step_tokens": 128}, id="preempted"),
        pytest.param({"prefix_cache": False}, id="uncached"),
        pytest.param({"kernels": "off"}, id="torch"),
        pytest.param({"kernels": "off", "page_size": 8, "sharing": "all"}, id="torch-sharing-all"),
        pytest.param({"num_pages": 40, "page_size": 8, "max_running": 16, "step_tokens": 128}, id="torch-preempted"),
    ],
)
def test_greedy_tokens_equal_transformers(case: Any, settings: dict[str, Any]) -> None:
    directory, asked, answers = case
    engine = torch_engine(directory, **settings)
    outputs = run(engine, *(request(str(i), prompt, max_tokens=NUM_TOKENS) for i, prompt in enumerate(asked)))
    assert [outputs[str(i), 0].tokens for i in range(NUM_PROMPTS)] == answers
    assert len({token for answer in answers for token in answer}) > 10
    stats = engine.stats()
    if "num_pages" in settings:
        assert stats.num_preemptions > 0
        assert stats.computed_tokens > sum(map(len, asked))  # evicted and computed again
    if "step_tokens" in settings:
        assert stats.num_steps > sum(map(len, asked)) / settings["step_tokens"] / 2
    assert (stats.prefix_hit_tokens > 0) == settings.get("prefix_cache", True)


def test_a_cache_hit_changes_nothing(case: Any) -> None:
    directory, asked, answers = case
    engine = torch_engine(directory, page_size=8)
    for attempt in ("cold", "warm"):
        outputs = run(
            engine, *(request(f"{attempt}{i}", prompt, max_tokens=NUM_TOKENS) for i, prompt in enumerate(asked[:16]))
        )
        assert [outputs[f"{attempt}{i}", 0].tokens for i in range(16)] == answers[:16]
    assert sum(output.cached_tokens or 0 for output in outputs.values()) > 0.8 * sum(map(len, asked[:16]))
