"""The same bits, whatever else is in the step, however a prompt is cut, on any number of threads.

Deterministic mode rests on this: it never shares, and needs nothing else of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.stream import Growth, Stream, kv_shape, logits_of, native_model, random_tokens
from tests.workers.model.tiny import CPU, VOCAB_SIZE, save_tiny
from workers.kernels.library import Library
from workers.model.decoder import Decoder
from workers.model.loader import load_decoder

NUM_PAGES = 160
LONG = 2200  # tokens: beyond the 2048 keys after which a row's attention is merged from parts


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny(directory, "qwen3", max_position_embeddings=4096, num_hidden_layers=2, num_attention_heads=4)
    return directory


@pytest.fixture(scope="module")
def window_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("window")
    save_tiny(directory, "mistral", max_position_embeddings=4096, num_hidden_layers=2, sliding_window=150)
    return directory


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture
def decoder(model_dir: Path, dtype: torch.dtype) -> Decoder:
    return load_decoder(model_dir, dtype=dtype, device=CPU)


def run(library: Library, decoder: Decoder, steps: Sequence[Growth], *, threads: int = 1, seed: int = 0) -> Tensor:
    """The logits of the sequence called "it"."""
    kv = kv_shape(decoder, num_pages=NUM_PAGES)
    return logits_of(native_model(library, decoder, kv, threads=threads), Stream(kv, seed=seed), steps)["it"]


def beside(steps: Sequence[Growth], lengths: Sequence[int]) -> list[Growth]:
    """The steps with other sequences before and behind."""
    steps = [dict(step) for step in steps]
    for index, length in enumerate(lengths):
        tokens = random_tokens(length + len(steps), VOCAB_SIZE, seed=100 + index)
        cuts = [0, *range(length, length + len(steps))]
        parts = [tokens[a:b] for a, b in pairwise(cuts)]
        name = f"{index}"
        steps = [
            {name: part, **step} if index % 2 else {**step, name: part} for step, part in zip(steps, parts, strict=True)
        ]
    return steps


def cut(tokens: Sequence[int], *ends: int) -> list[Growth]:
    bounds = [0, *ends, len(tokens)]
    return [{"it": tokens[a:b]} for a, b in pairwise(bounds)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_alone_and_in_a_batch(library: Library, decoder: Decoder, threads: int) -> None:
    steps = cut(random_tokens(75, VOCAB_SIZE), 70, 71, 72, 73, 74)
    alone = run(library, decoder, steps)
    assert torch.equal(run(library, decoder, steps, threads=threads, seed=1), alone)
    for lengths in ([1], [3, 40], [250, 7, 19, 1, 1, 64], [1] * 70):
        assert torch.equal(run(library, decoder, beside(steps, lengths), threads=threads), alone)


def test_chunked_and_whole(library: Library, decoder: Decoder) -> None:
    tokens = random_tokens(300, VOCAB_SIZE)
    whole = run(library, decoder, [{"it": tokens}])
    for ends in ([1], [32, 64, 200], [31, 33, 95, 129, 131, 299], list(range(3, 300, 7))):
        assert torch.equal(run(library, decoder, cut(tokens, *ends), threads=2), whole)


def test_windows(library: Library, window_dir: Path, dtype: torch.dtype) -> None:
    decoder = load_decoder(window_dir, dtype=dtype, device=CPU)
    tokens = random_tokens(500, VOCAB_SIZE)
    whole = run(library, decoder, [{"it": tokens}])
    for ends in ([1], [31, 33, 95, 129, 131, 299, 498, 499], list(range(3, 500, 41))):
        assert torch.equal(run(library, decoder, cut(tokens, *ends), threads=2), whole)


def test_beyond_the_keys_of_one_tile(library: Library, decoder: Decoder) -> None:
    tokens = random_tokens(LONG, VOCAB_SIZE)
    whole = run(library, decoder, [{"it": tokens}], threads=2)
    for ends, lengths in (([2040, 2050, 2051], [33]), ([900, 2047, 2048, 2049, 2199], [1, 1])):
        assert torch.equal(run(library, decoder, beside(cut(tokens, *ends), lengths), threads=3, seed=2), whole)
