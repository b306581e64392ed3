"""vLLM's engine says what the torch engine says: every family, adapters, and a model split over processes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from protos.errors import ConfigError, ModelError
from tests.e2e.conftest import command
from tests.vllm.drive import vllm_engine
from tests.vllm.lora import save_adapter
from tests.vllm.quantised import save_int8
from tests.workers.engine.drive import Outputs, request, run, torch_engine
from workers.engine.protocol import Engine
from workers.engine.vllm.engine import VllmEngine

PROMPTS = [[(start + 13 * at) % 4000 + 1 for at in range(20 + 9 * start)] for start in range(6)]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "n": 2},
    "filtered": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    "penalised": {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    "biased": {"temperature": 0.6, "logit_bias": {7: 3.0, 11: -100.0}, "min_tokens": 6, "stop_token_ids": (7,)},
}


@contextmanager
def running(directory: Path, **options: Any) -> Iterator[VllmEngine]:
    engine = vllm_engine(directory, **options)
    try:
        yield engine
    finally:
        engine.close()


def answers(engine: Engine) -> Outputs:
    """Of every prompt in every way, all at once."""
    asked = [
        request(f"{name} {number}", prompt, max_tokens=24, seed=number, ignore_eos=True, **way)
        for name, way in WAYS.items()
        for number, prompt in enumerate(PROMPTS)
    ]
    return run(engine, *asked)


def tokens(outputs: Outputs) -> dict[tuple[str, int], list[int]]:
    return {key: output.tokens for key, output in outputs.items()}


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_tokens_are_those_of_the_torch_engine(family: str, request: pytest.FixtureRequest) -> None:
    directory = request.getfixturevalue(f"{family}_dir")
    expected = answers(torch_engine(directory))
    with running(directory) as engine:
        assert tokens(answers(engine)) == tokens(expected)


def test_a_compiled_model_split_over_two_processes_says_the_same(target_dir: Path) -> None:
    expected = answers(torch_engine(target_dir))
    with running(target_dir, tensor_parallel=2, enforce_eager=False) as engine:
        assert tokens(answers(engine)) == tokens(expected)
        assert engine.block_format is None


def test_shared_attention_drafts_and_compilation_together_say_the_same(target_dir: Path) -> None:
    expected = answers(torch_engine(target_dir))
    speculation = {"drafters": ("copy",), "max_nodes": 4}
    with running(target_dir, attention="shared", speculation=speculation, enforce_eager=False) as engine:
        assert tokens(answers(engine)) == tokens(expected)
        [counts] = engine._core.ask_workers("counts").result(30)
        assert 0 < counts["attention"]["read_keys"] < counts["attention"]["keys"]
        assert counts["speculation"]["accepted_tokens"] > 0


def test_an_adapter_gives_the_tokens_of_the_model_that_it_is_merged_into(qwen3_dir: Path, tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    save_adapter(qwen3_dir, adapter, merged)
    expected = tokens(answers(torch_engine(merged)))
    assert expected != tokens(answers(torch_engine(qwen3_dir)))
    with running(qwen3_dir, lora=adapter) as engine:
        assert tokens(answers(engine)) == expected


def test_a_quantised_model_says_nearly_what_the_whole_one_says(qwen3_dir: Path, tmp_path: Path) -> None:
    save_int8(qwen3_dir, tmp_path / "int8")
    asked = [request(str(number), prompt, max_tokens=1, prompt_logprobs=0) for number, prompt in enumerate(PROMPTS)]
    expected = run(torch_engine(qwen3_dir), *asked)
    with running(tmp_path / "int8", dtype="bfloat16") as engine:
        found = run(engine, *asked)
        assert tokens(run(engine, *asked)) == tokens(found)
    pairs = [
        (one.logprob, other.logprob)
        for key in expected
        for one, other in zip(found[key].prompt_logprobs, expected[key].prompt_logprobs, strict=True)
    ]
    errors = [abs(one - other) for one, other in pairs]
    assert 0 < sum(errors) / len(errors) < 0.3  # nats; it is another model, and nearly the same


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"max_num_seqs": 3}, "Headwater sets it"),
        ({"max_num_sequences": 3}, "does not know"),
        ({"logits_processors": ["a.B"]}, "replaced by Headwater's sampler"),
    ],
)
def test_arguments_that_are_not_to_be_set_stop_the_start(args: dict[str, Any], told: str, target_dir: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        vllm_engine(target_dir, args=args)


def test_what_keeps_vllm_from_starting_is_told(target_dir: Path) -> None:
    with pytest.raises(ModelError, match="vLLM does not start"):
        vllm_engine(target_dir, quantization="gguf")


def test_a_start_that_fails_late_leaves_no_process_and_no_file(
    qwen3_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(engine: VllmEngine) -> None:
        assert vllm_processes()
        raise RuntimeError("too late")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(VllmEngine, "_make_prefixes", fail)
    with pytest.raises(RuntimeError, match="too late"):
        vllm_engine(qwen3_dir)
    assert not vllm_processes()
    assert not list(tmp_path.glob("headwater-vllm-*"))


def vllm_processes() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if " ".join(command(child)).startswith("VLLM::")]
