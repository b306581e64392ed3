"""What attention costs here, by measurement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.workers.kernels.stream import Stream, kv_shape, logits_of, native_model, random_tokens
from tests.workers.model.tiny import CPU, VOCAB_SIZE, save_tiny
from workers.kernels.calibration import calibrated_cost
from workers.kernels.library import Library
from workers.model.decoder import Decoder
from workers.model.loader import load_decoder


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    save_tiny(tmp_path, "llama", max_position_embeddings=4096)
    return load_decoder(tmp_path, dtype=torch.float32, device=CPU)


def test_more_rows_and_more_keys_cost_more(generic: Library, decoder: Decoder) -> None:
    kv = kv_shape(decoder, num_pages=128)
    cost = calibrated_cost(native_model(generic, decoder, kv, threads=2), kv)
    assert cost.segment(64, 4096) > cost.segment(64, 256) > 0
    assert cost.segment(256, 2048) > cost.segment(1, 2048) > cost.segment(1, 0)
    assert cost.merge(64) > 0


@pytest.mark.parametrize("num_pages", [1, 3, 9, 80])
def test_a_small_store_can_be_measured(generic: Library, decoder: Decoder, num_pages: int) -> None:
    kv = kv_shape(decoder, num_pages=num_pages)
    cost = calibrated_cost(native_model(generic, decoder, kv), kv)
    assert cost.segment(64, 32 * num_pages) > 0


def test_the_stores_contents_stay(generic: Library, decoder: Decoder) -> None:
    kv = kv_shape(decoder, num_pages=128)
    tokens = random_tokens(3001, VOCAB_SIZE)
    whole = logits_of(
        native_model(generic, decoder, kv, threads=2), Stream(kv), [{"it": tokens[:3000]}, {"it": tokens[3000:]}]
    )
    model, stream = native_model(generic, decoder, kv, threads=2), Stream(kv)
    logits_of(model, stream, [{"it": tokens[:3000]}])
    calibrated_cost(model, kv)
    assert torch.equal(logits_of(model, stream, [{"it": tokens[3000:]}])["it"], whole["it"][3000:])
