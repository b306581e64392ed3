"""The decoder against transformers: whole, packed, chunked and token by token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from protos.errors import ModelError
from tests.workers.model.tiny import CPU, MAX_POSITIONS, PAGE_SIZE, VOCAB_SIZE, Driver, save_tiny
from workers.attention.protocol import KVShape, Segment, StepBatch
from workers.attention.reference import ReferenceAttention
from workers.attention.torch_backend import TorchAttention
from workers.model.config import ModelConfig
from workers.model.loader import load_decoder, random_decoder

TOLERANCE = 1e-4


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **parameters}}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-derived-head-dim": ("llama", {"head_dim": None}),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "llama-dynamic": ("llama", rope("dynamic", factor=4.0)),
    "llama-llama3": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
    "llama-yarn-mscale": (
        "llama",
        rope(
            "yarn",
            rope_theta=100.0,  # puts both ends of the ramp between two pairs, where truncate matters
            factor=2.0,
            original_max_position_embeddings=64,
            mscale=1.2,
            mscale_all_dim=0.7,
            beta_fast=4.0,
            beta_slow=0.5,
            truncate=False,
        ),
    ),
    "llama-yarn-attention-factor": (
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=1.3),
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-bias-tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-layer-types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@dataclass
class Pair:
    """transformers' model and the directory it was saved to."""

    model: PreTrainedModel
    directory: Path

    def driver(self) -> Driver:
        return Driver(load_decoder(self.directory, dtype=torch.float32, device=CPU))

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        expected: Tensor = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
        return expected


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    family, changes = MODELS[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    return Pair(save_tiny(directory, family, **changes), directory)


@pytest.fixture
def llama(tmp_path: Path) -> Pair:
    return Pair(save_tiny(tmp_path, "llama"), tmp_path)


def tokens_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [int(token) for token in torch.randint(VOCAB_SIZE, (length,), generator=generator)]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


def test_a_whole_prompt(pair: Pair) -> None:
    tokens = tokens_of(MAX_POSITIONS)
    expected = pair.logits(tokens)
    assert expected.std() > 0.5, "a model this flat would hide mistakes"
    assert_same(pair.driver().step({"only": tokens})["only"], expected)


def test_several_sequences_in_one_stream(pair: Pair) -> None:
    prompts = {str(length): tokens_of(length, seed=length) for length in (1, 37, 2, 20, 50)}
    for name, logits in pair.driver().step(prompts).items():
        assert_same(logits, pair.logits(prompts[name]))


def test_chunks_beside_decodes(pair: Pair) -> None:
    long, short = tokens_of(70), tokens_of(8, seed=1)
    driver, chunks = pair.driver(), iter([(0, 30), (30, 31), (31, 53), (53, 70)])
    driver.step({"short": short[:4]})
    logits = [
        driver.step({"long": long[start:end], "short": short[index : index + 1]})
        for index, (start, end) in enumerate(chunks, start=4)
    ]
    assert_same(torch.cat([each["long"] for each in logits]), pair.logits(long))
    assert_same(torch.cat([each["short"] for each in logits]), pair.logits(short)[4:])


def test_token_by_token(pair: Pair) -> None:
    tokens = tokens_of(40)
    driver = pair.driver()
    first = driver.step({"only": tokens[:20]})["only"]
    rest = [driver.step({"only": [token]})["only"] for token in tokens[20:]]
    assert_same(torch.cat([first, *rest]), pair.logits(tokens))


def test_only_wanted_rows_get_logits(llama: Pair) -> None:
    decoder = load_decoder(llama.directory, dtype=torch.float32, device=CPU)
    attention = TorchAttention(KVShape(3, 8, PAGE_SIZE, 2, 16), dtype=torch.float32, device=CPU)
    tokens = tokens_of(12)

    def logits(rows: list[int]) -> Tensor:
        positions, segment = torch.arange(12), Segment(0, 12, (0, 1), 0, 12)
        wanted = torch.tensor(rows, dtype=torch.int64)
        return decoder.forward(StepBatch(torch.tensor(tokens), positions, positions, (segment,), wanted), attention)

    assert_same(logits([11, 3]), llama.logits(tokens)[[11, 3]])
    assert logits([]).shape == (0, VOCAB_SIZE)


def test_a_shared_prefix_changes_nothing(llama: Pair) -> None:
    """Two sequences that attend to one stored prefix by a joint segment, computed in the same step as the prefix."""
    decoder = load_decoder(llama.directory, dtype=torch.float32, device=CPU)
    shape = KVShape(3, 8, PAGE_SIZE, 2, 16)
    prefix, suffixes = tokens_of(16), (tokens_of(3, seed=1), tokens_of(5, seed=2))
    batch = StepBatch(
        token_ids=torch.tensor([*prefix, *suffixes[0], *suffixes[1]]),
        positions=torch.tensor([*range(16), *range(16, 19), *range(16, 21)]),
        slots=torch.tensor([*range(16), *range(24, 27), *range(40, 45)]),
        segments=(
            Segment(0, 16, (0, 1), 0, 16),
            Segment(16, 8, (0, 1), 0, 16, "full"),
            Segment(16, 3, (0, 1, 3), 16, 3),
            Segment(19, 5, (0, 1, 5), 16, 5),
        ),
        logit_rows=torch.arange(16, 24),
    )
    expected = torch.cat([llama.logits(prefix + suffix)[16:] for suffix in suffixes])
    assert_same(decoder.forward(batch, TorchAttention(shape, dtype=torch.float32, device=CPU)), expected)


def test_bfloat16_follows_transformers(llama: Pair) -> None:
    tokens = tokens_of(60)
    exact = llama.logits(tokens)
    theirs = (Pair(llama.model.bfloat16(), llama.directory).logits(tokens).float() - exact).abs().mean()
    driver = Driver(load_decoder(llama.directory, dtype=torch.bfloat16, device=CPU))
    ours = (driver.step({"only": tokens})["only"] - exact).abs().mean()
    assert ours < 1.2 * theirs


def test_sharded_weights(llama: Pair, tmp_path: Path) -> None:
    directory = tmp_path / "sharded"
    llama.model.save_pretrained(directory, max_shard_size="40KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    tokens = tokens_of(20)
    assert_same(Pair(llama.model, directory).driver().step({"only": tokens})["only"], llama.logits(tokens))


def test_config_of_before_transformers_5(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` with `type`, as the directories of most published models have them."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    pair = Pair(save_tiny(tmp_path, "llama", **rope("llama3", **scaling)), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["rope_parameters"]
    values |= {"rope_theta": 10_000.0, "rope_scaling": {"type": "llama3", **scaling}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    tokens = tokens_of(100)
    assert_same(pair.driver().step({"only": tokens})["only"], pair.logits(tokens))


def test_dynamic_rope_beyond_the_pretraining_is_based_on_max_context(tmp_path: Path) -> None:
    """A whole sequence of max_context tokens is rotated as transformers does."""
    length = 2 * MAX_POSITIONS
    pair = Pair(save_tiny(tmp_path, "llama", **rope("dynamic", factor=4.0)), tmp_path)
    tokens = tokens_of(length)
    driver = Driver(load_decoder(tmp_path, dtype=torch.float32, device=CPU, max_context=length))
    assert_same(driver.step({"only": tokens})["only"], pair.logits(tokens))
    plain = pair.driver().step({"only": tokens})["only"]
    assert (plain - pair.logits(tokens)).abs().max() > 0.1


def test_a_tied_checkpoint_may_repeat_its_embedding(tmp_path: Path) -> None:
    pair = Pair(save_tiny(tmp_path, "llama"), tmp_path)
    with torch.no_grad():
        pair.model.lm_head.weight.copy_(pair.model.model.embed_tokens.weight)
    pair.model.save_pretrained(tmp_path)
    set_tied(tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32, device=CPU)
    assert decoder.head.weight is decoder.embedding
    tokens = tokens_of(10)
    assert_same(Driver(decoder).step({"only": tokens})["only"], pair.logits(tokens))


def test_a_tied_checkpoint_with_another_head_is_refused(llama: Pair) -> None:
    set_tied(llama.directory)
    with pytest.raises(ModelError, match=r"model\.safetensors: lm_head\.weight differs .* tie_word_embeddings"):
        load_decoder(llama.directory, dtype=torch.float32, device=CPU)


def set_tied(directory: Path) -> None:
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))


def test_random_decoder_is_the_same_for_the_same_seed(llama: Pair) -> None:
    config = ModelConfig.from_directory(llama.directory)
    tokens = tokens_of(9)

    def logits(seed: int) -> Tensor:
        return Driver(random_decoder(config, dtype=torch.float32, device=CPU, seed=seed)).step({"only": tokens})["only"]

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert logits(1).isfinite().all()


def test_the_reference_backend_gives_the_same_logits(llama: Pair) -> None:
    decoder = load_decoder(llama.directory, dtype=torch.float32, device=CPU)
    tokens, rows = tokens_of(12), torch.arange(12)
    batch = StepBatch(torch.tensor(tokens), rows, rows, (Segment(0, 12, (0, 1), 0, 12),), rows)
    logits = decoder.forward(batch, Narrowed(ReferenceAttention(KVShape(3, 8, PAGE_SIZE, 2, 16))))
    assert_same(logits, llama.logits(tokens))


class Narrowed:
    """The reference backend with its results in the query's type."""

    def __init__(self, reference: ReferenceAttention) -> None:
        self._reference = reference

    def begin(self, batch: StepBatch) -> None:
        self._reference.begin(batch)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
        return self._reference.attend(layer, query, key, value, window=window).to(query.dtype)

    def copy_page(self, source: int, target: int) -> None:
        self._reference.copy_page(source, target)
