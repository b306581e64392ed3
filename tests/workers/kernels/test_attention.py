"""The native attention backend's edges; its results are held to the contract in tests/workers/attention."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from protos.errors import SetupError
from workers.attention.protocol import KVShape, Segment, StepBatch
from workers.attention.torch_backend import TorchAttention
from workers.kernels.attention import NativeAttention
from workers.kernels.library import AttentionShape, DecoderShape, Library

KV = KVShape(num_layers=2, num_pages=8, page_size=32, num_kv_heads=2, head_dim=24)
CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
BEYOND_ANY_MACHINE = 2**31 - 1


def batch(rows: range, segments: tuple[Segment, ...], *, slots: Tensor | None = None) -> StepBatch:
    positions = torch.tensor(list(rows), dtype=torch.int64)
    return StepBatch(positions, positions, positions if slots is None else slots, segments, positions[:0])


def random_heads(num_rows: int, num_heads: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, num_heads, KV.head_dim, generator=generator).to(dtype)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def inputs(num_rows: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    query = random_heads(num_rows, 6, dtype, seed)
    return query, random_heads(num_rows, 2, dtype, seed + 1), random_heads(num_rows, 2, dtype, seed + 2)


@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_a_page_size_that_the_kernels_cannot_keep(generic: Library, page_size: int) -> None:
    with pytest.raises(SetupError, match=rf"engine\.kv\.page_size is {page_size}; .*multiple of 32"):
        NativeAttention(generic, KVShape(1, 8, page_size, 1, 16), dtype=torch.float32, threads=1)


def test_a_store_that_no_machine_holds(library: Library) -> None:
    shape = KVShape(64, BEYOND_ANY_MACHINE, 32, 64, 128)
    attention = NativeAttention(library, shape, dtype=torch.float32, threads=1)
    attention.begin(batch(range(1), ()))
    with pytest.raises(RuntimeError, match="bad_alloc"):
        attention.attend(0, *(torch.zeros(1, 64, 128) for _ in range(3)), window=None)


def test_the_store_is_claimed_when_it_is_made(library: Library) -> None:
    """The first step that writes to a page does not wait for the system to find it."""
    shape = KVShape(num_layers=2, num_pages=1024, page_size=32, num_kv_heads=4, head_dim=64)
    num_bytes = 2 * shape.num_layers * shape.num_pages * shape.page_size * shape.num_kv_heads * shape.head_dim * 4
    before = resident_bytes()
    attention = NativeAttention(library, shape, dtype=torch.float32, threads=1)
    rows = batch(range(1), (Segment(0, 1, (0,), 0, 1),))
    attention.begin(rows)
    heads = torch.zeros(1, 4, 64)
    attention.attend(0, heads, heads, heads, window=None)
    assert resident_bytes() - before >= 0.9 * num_bytes


def test_a_handle_that_cannot_be_made_is_none(generic: Library) -> None:
    attention = AttentionShape(64, BEYOND_ANY_MACHINE, 32, 64, 64, 128)
    assert generic.call("attention_new", ctypes.byref(attention), 0, 1) is None
    assert "bad_alloc" in generic.error()
    decoder = DecoderShape(attention, 96, 48, 80, 1e-6, 128)
    assert generic.call("decoder_new", ctypes.byref(decoder), 1, 1) is None


@DTYPES
def test_a_copied_page_holds_keys_and_values_of_every_layer(library: Library, dtype: torch.dtype) -> None:
    attention = NativeAttention(library, KV, dtype=dtype, threads=2)
    rows = range(32)
    attention.begin(batch(rows, (Segment(0, 32, (0,), 0, 32),)))
    for layer in range(KV.num_layers):
        attention.attend(layer, *inputs(32, dtype, seed=10 * layer), window=None)
    attention.copy_page(0, 5)

    def read(page: int, layer: int) -> Tensor:
        """One row that is stored elsewhere, and sees the page."""
        slots = torch.tensor([64])
        attention.begin(batch(range(1), (Segment(0, 1, (page,), 0, 32, "full"),), slots=slots))
        return attention.attend(layer, *inputs(1, dtype, seed=100), window=None)

    for layer in range(KV.num_layers):
        assert torch.equal(read(5, layer), read(0, layer))
        assert read(0, layer).abs().max() > 0
        assert not read(6, layer).any()


def test_a_copy_before_anything_is_stored(generic: Library) -> None:
    NativeAttention(generic, KV, dtype=torch.float32, threads=1).copy_page(0, 1)


@pytest.mark.parametrize(("slot", "page", "complaint"), [(256, 0, "slot 256 is not"), (0, 8, "page 8 is neither")])
def test_what_is_not_in_the_store_is_refused(generic: Library, slot: int, page: int, complaint: str) -> None:
    attention = NativeAttention(generic, KV, dtype=torch.float32, threads=1)
    attention.begin(batch(range(1), (Segment(0, 1, (page,), 0, 1),), slots=torch.tensor([slot])))
    with pytest.raises(RuntimeError, match=complaint):
        attention.attend(0, *inputs(1, torch.float32), window=None)


def test_a_page_that_is_not_there_cannot_be_copied(generic: Library) -> None:
    attention = NativeAttention(generic, KV, dtype=torch.float32, threads=1)
    attention.begin(batch(range(1), ()))
    attention.attend(0, *inputs(1, torch.float32), window=None)
    with pytest.raises(RuntimeError, match="page 8 is neither"):
        attention.copy_page(0, 8)
    with pytest.raises(RuntimeError, match="slot 256 is not"):
        attention.copy_token(256, 0)


@DTYPES
def test_rows_without_keys_get_zeros(library: Library, dtype: torch.dtype) -> None:
    attention = NativeAttention(library, KV, dtype=dtype, threads=2)
    segments = (
        Segment(0, 0, (), 0, 0),
        Segment(1, 2, (), 0, 0, "full"),
        Segment(0, 1, (0,), 0, 1),
        Segment(3, 0, (0,), 0, 1),
    )
    attention.begin(batch(range(3), segments))
    query, key, value = inputs(3, dtype)
    output = attention.attend(0, query, key, value, window=None)
    assert not output[1:].any()
    torch.testing.assert_close(output[0], value[0].repeat_interleave(3, dim=0), atol=1e-6, rtol=1e-2)


@DTYPES
def test_a_step_without_segments(library: Library, dtype: torch.dtype) -> None:
    attention = NativeAttention(library, KV, dtype=dtype, threads=2)
    attention.begin(batch(range(2), ()))
    assert not attention.attend(0, *inputs(2, dtype), window=None).any()
    attention.begin(batch(range(0), ()))
    assert attention.attend(0, *inputs(0, dtype), window=None).shape == (0, 6, 24)


def test_a_window_hides_the_64th_draft_too(library: Library) -> None:
    """The highest bit of a mask: the last row is near the root, out of the window of a deep row that names it."""
    mask = (*(1 << row for row in range(62)), 1 << 62 | 1 << 63, 1 << 63)
    segment = Segment(0, 64, (0, 1), 0, 64, "tree", mask)
    positions = torch.tensor([*range(63), 0])
    step = StepBatch(positions, positions, torch.arange(64), (segment,), positions[:0])
    native = NativeAttention(library, KV, dtype=torch.float32, threads=1)
    plain = TorchAttention(KV, dtype=torch.float32, device=CPU)
    native.begin(step)
    plain.begin(step)
    values = inputs(64, torch.float32)
    actual, expected = native.attend(0, *values, window=5), plain.attend(0, *values, window=5)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_pages_beyond_four_gibibytes(library: Library) -> None:
    """More elements than 32 bits count; no more memory than is written to."""
    shape = KVShape(num_layers=2, num_pages=18_000, page_size=32, num_kv_heads=8, head_dim=128)
    assert 2 * 2 * shape.num_layers * shape.num_pages * shape.page_size * 8 * 128 > 4 << 30
    attention = NativeAttention(library, shape, dtype=torch.bfloat16, threads=1)
    last = shape.num_pages - 1
    slots = torch.tensor([last * 32])
    attention.begin(batch(range(1), (Segment(0, 1, (last,), 0, 1),), slots=slots))
    heads = torch.linspace(-1, 1, 8 * 128).view(1, 8, 128).bfloat16()
    assert torch.equal(attention.attend(1, heads, heads, heads, window=None), heads)
    attention.copy_page(last, 0)
    attention.begin(batch(range(1), (Segment(0, 1, (0,), 0, 1, "full"),), slots=slots - 32))
    assert torch.equal(attention.attend(1, heads, heads, -heads, window=None), heads)


@DTYPES
def test_a_long_context(library: Library, dtype: torch.dtype) -> None:
    """131,072 keys: one page, over and over again, gives what the page gives once."""
    attention = NativeAttention(library, KV, dtype=dtype, threads=2)
    attention.begin(batch(range(32), (Segment(0, 32, (3,), 0, 32),), slots=torch.arange(96, 128)))
    attention.attend(0, *inputs(32, dtype), window=None)
    segments = (Segment(0, 3, (3,), 0, 32, "full"), Segment(3, 3, (3,) * 4096, 0, 4096 * 32, "full"))
    attention.begin(batch(range(6), segments))
    query, key, value = inputs(6, dtype, seed=3)
    query[3:] = query[:3]
    output = attention.attend(0, query, key, value, window=None).float()
    torch.testing.assert_close(output[3:], output[:3], atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@DTYPES
def test_what_others_left_in_a_page_is_gone(library: Library, dtype: torch.dtype) -> None:
    """Numbers that are none would otherwise reach whoever gets the page next."""
    attention = NativeAttention(library, KV, dtype=dtype, threads=2)
    attention.begin(batch(range(64), (Segment(0, 64, (1, 2), 0, 64),), slots=torch.arange(32, 96)))
    bad = tuple(torch.full_like(heads, torch.nan) for heads in inputs(64, dtype))
    attention.attend(0, *bad, window=None)
    attention.begin(
        batch(range(40), (Segment(0, 40, (2, 1), 0, 40),), slots=torch.tensor([*range(64, 96), *range(32, 40)]))
    )
    values = inputs(40, dtype)
    fresh = NativeAttention(library, KV, dtype=dtype, threads=1)
    fresh.begin(batch(range(40), (Segment(0, 40, (0, 1), 0, 40),)))
    assert torch.equal(attention.attend(0, *values, window=None), fresh.attend(0, *values, window=None))
