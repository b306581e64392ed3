"""The torch model's pages as blocks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.workers.model.tiny import CPU, PAGE_SIZE, VOCAB_SIZE, save_tiny
from workers.attention.protocol import KVShape, Segment, StepBatch
from workers.attention.torch_backend import TorchAttention
from workers.model.decoder import Decoder
from workers.model.loader import load_decoder
from workers.model.torch_model import TorchModel

PREFIX = [(7 * index + 3) % VOCAB_SIZE for index in range(3 * PAGE_SIZE)]
SUFFIX = [(5 * index + 1) % VOCAB_SIZE for index in range(PAGE_SIZE + 2)]
THERE, HERE, OWN = (5, 2, 7), (0, 6, 4), (3, 1)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory = tmp_path_factory.mktemp("model")
    save_tiny(directory, "llama")
    return load_decoder(directory, dtype=request.param, device=CPU)


def make(decoder: Decoder, *, num_pages: int = 8, page_size: int = PAGE_SIZE) -> TorchModel:
    config = decoder.config
    shape = KVShape(config.num_layers, num_pages, page_size, config.num_kv_heads, config.head_dim)
    return TorchModel(decoder, TorchAttention(shape, dtype=decoder.dtype, device=CPU), page_size=page_size)


def logits(model: TorchModel, tokens: Sequence[int], start: int, pages: Sequence[int]) -> Tensor:
    positions = range(start, start + len(tokens))
    slots = [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in positions]
    segments = (Segment(0, len(tokens), tuple(pages), 0, positions.stop),)
    numbers = [torch.tensor([*values]) for values in (tokens, positions, slots, range(len(tokens)))]
    batch = StepBatch(numbers[0], numbers[1], numbers[2], segments, numbers[3])
    found = model.forward(batch, with_logits=True).logits
    assert found is not None
    return found


def block_of(model: TorchModel, pages: Sequence[int]) -> memoryview:
    block = bytearray(len(pages) * model.page_layout.page_bytes)
    model.export_pages(pages, memoryview(block))
    return memoryview(block).toreadonly()


def test_an_imported_prefix_gives_the_bits_of_ones_own(decoder: Decoder) -> None:
    maker, user = make(decoder), make(decoder)
    logits(maker, PREFIX, 0, THERE)
    expected = logits(maker, SUFFIX, len(PREFIX), (*THERE, *OWN))
    user.import_pages(block_of(maker, THERE), HERE)
    assert torch.equal(logits(user, SUFFIX, len(PREFIX), (*HERE, *OWN)), expected)


def test_other_pages_stay_as_they_are(decoder: Decoder) -> None:
    maker, user = make(decoder), make(decoder)
    for model, start in ((maker, 0), (user, 1)):
        logits(model, [*PREFIX, *PREFIX, *PREFIX][start : start + 8 * PAGE_SIZE], 0, range(8))
    rest = [page for page in range(8) if page not in HERE]
    before, taken = block_of(user, rest), block_of(maker, THERE)
    user.import_pages(taken, HERE)
    assert block_of(user, rest) == before
    assert block_of(user, HERE) == taken != block_of(maker, HERE)


def test_a_block_may_begin_anywhere(decoder: Decoder) -> None:
    maker, user = make(decoder), make(decoder)
    logits(maker, PREFIX, 0, THERE)
    block = block_of(maker, THERE)
    user.import_pages(memoryview(b"x" + bytes(block))[1:], HERE)
    assert block_of(user, HERE) == block


def test_blocks_are_copied_not_mapped(decoder: Decoder) -> None:
    assert make(decoder).page_mapper is None


def test_layouts_are_equal_where_blocks_may_be_exchanged(decoder: Decoder) -> None:
    layout = make(decoder).page_layout
    assert layout == make(decoder, num_pages=3).page_layout
    assert layout.page_bytes == 2 * 3 * PAGE_SIZE * 2 * 16 * decoder.dtype.itemsize
    assert layout.fingerprint != make(decoder, page_size=2 * PAGE_SIZE).page_layout.fingerprint
    assert str(decoder.dtype).removeprefix("torch.") in layout.fingerprint
