"""Shared attention in a whole vLLM engine: the same tokens as without it, and fewer keys read for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from vllm import LLM, SamplingParams

from workers.engine.vllm.settings import SECTION, environment

Prompt = list[int]
NEW_TOKENS = 40


class Run(NamedTuple):
    tokens: list[list[int]]
    counts: dict[str, int] | None


def greedy(model: Path, attention: str, prompts: Sequence[Prompt], prefixes: Sequence[Prompt]) -> Run:
    """An engine's tokens for prompts that come together, when prefixes of them have been computed before."""
    llm = LLM(
        model=str(model),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=1024,
        block_size=32,
        num_gpu_blocks_override=128,
        kv_cache_memory_bytes=1 << 20,
        max_num_batched_tokens=512,
        max_num_seqs=16,
        async_scheduling=False,
        worker_cls="benchmarks.vllm_attention_worker.AttentionWorker",
        additional_config={SECTION: {"attention": attention, "threads": 2, "sharing": "all"}},
    )
    try:
        for prefix in prefixes:
            llm.generate([{"prompt_token_ids": prefix}], params(1), use_tqdm=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params(NEW_TOKENS), use_tqdm=False)
        (counts,) = llm.collective_rpc("attention_counts")
    finally:
        llm.llm_engine.engine_core.shutdown()
    return Run([list(output.outputs[0].token_ids) for output in outputs], counts)


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def prompts_behind_two_prefixes() -> tuple[list[Prompt], list[Prompt]]:
    """Eight prompts, four behind each of two prefixes, two of which share more; and the prefixes."""
    generator = np.random.default_rng(5)

    def draw(count: int) -> Prompt:
        drawn: Prompt = generator.integers(1, 4096, count).tolist()
        return drawn

    roots = [draw(192), draw(96)]
    deeper = [roots[0] + draw(64), roots[1] + draw(32)]
    stems = [*roots, *deeper]
    return [stem + draw(5 + 9 * index) for index, stem in enumerate(stems * 2)], stems


@pytest.mark.timeout(400)
@pytest.mark.parametrize("family", ["target", "mistral"])
def test_tokens_are_those_of_vllms_own_attention(
    family: str, target_dir: Path, mistral_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # which takes one backend only
    for name, value in {**environment(threads=2), **own_process}.items():
        monkeypatch.setenv(name, value)
    model = {"target": target_dir, "mistral": mistral_dir}[family]
    prompts, prefixes = prompts_behind_two_prefixes()
    plain = greedy(model, "vllm", prompts, prefixes)
    shared = greedy(model, "shared", prompts, prefixes)
    assert plain.counts is None
    assert shared.counts is not None
    assert shared.tokens == plain.tokens
    assert len({tuple(tokens) for tokens in shared.tokens}) > 1
    steps = NEW_TOKENS - 1
    saved = shared.counts["keys"] - shared.counts["read_keys"]
    assert saved >= steps * (3 * (192 + 96) + 64 + 32)  # of two pairs, each with a deeper prefix
