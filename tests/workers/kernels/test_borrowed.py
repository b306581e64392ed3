"""Attention over pages in memory of others: bit for bit what it is over pages of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from protos.errors import SetupError
from workers.attention.protocol import KVShape, Segment, StepBatch
from workers.kernels.attention import NativeAttention
from workers.kernels.borrowed import BorrowedAttention, torch_team
from workers.kernels.library import Library, NativeStep

KV = KVShape(num_layers=2, num_pages=8, page_size=32, num_kv_heads=2, head_dim=64)
NUM_HEADS = 6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def lent(dtype: torch.dtype, *, spare: int = 0) -> list[Tensor]:
    """Each layer's pages, with `spare` numbers between two of them."""
    size = KV.num_kv_heads * KV.page_size * 2 * KV.head_dim
    room = torch.zeros(KV.num_layers, KV.num_pages, size + spare, dtype=dtype)
    shape = (KV.num_pages, KV.num_kv_heads, KV.page_size, 2 * KV.head_dim)
    return [layer[:, :size].unflatten(1, shape[1:]) for layer in room]


def borrowed(library: Library, memory: Sequence[Tensor], *, team: int | None = None) -> BorrowedAttention:
    return BorrowedAttention(library, memory, num_heads=NUM_HEADS, threads=2, team=team)


def step(positions: Sequence[int], slots: Sequence[int], segments: tuple[Segment, ...]) -> StepBatch:
    rows = torch.tensor(positions)
    return StepBatch(rows, rows, torch.tensor(slots), segments, rows[:0])


def shared_steps() -> list[StepBatch]:
    """Two sequences behind one prefix of a page: the prefix, what they have of their own, and one row more of each."""
    first, second = (3, 6), (3, 1)
    prompt = [*range(32, 50)]
    return [
        step(range(32), range(96, 128), (Segment(0, 32, (3,), 0, 32),)),
        step(
            [*prompt, *prompt],
            [*range(192, 210), *range(32, 50)],
            (Segment(0, 36, first, 0, 32, "full"), Segment(0, 18, first, 32, 18), Segment(18, 18, second, 32, 18)),
        ),
        step(
            [50, 50],
            [210, 50],
            (Segment(0, 2, first, 0, 32, "full"), Segment(0, 1, first, 32, 19), Segment(1, 1, second, 32, 19)),
        ),
    ]


@dataclass
class Inputs:
    """Random heads. As another engine has them: queries, keys and values side by side in one tensor."""

    generator: torch.Generator
    dtype: torch.dtype

    def heads(self, num_rows: int) -> list[Tensor]:
        counts = [NUM_HEADS, KV.num_kv_heads, KV.num_kv_heads]
        joined = torch.randn(num_rows, sum(counts), KV.head_dim, generator=self.generator).to(self.dtype)
        return list(joined.split(counts, dim=1))


def attend(attention: BorrowedAttention, layer: int, heads: Sequence[Tensor], *, window: int | None = None) -> Tensor:
    out = torch.empty(len(heads[0]), NUM_HEADS, KV.head_dim, dtype=heads[0].dtype)
    attention.attend(layer, *heads, out, window=window)
    return out


@DTYPES
@pytest.mark.parametrize("spare", [0, 32])
@pytest.mark.parametrize("has_team", [False, True])
def test_it_gives_the_bits_of_a_store_of_its_own(
    library: Library, dtype: torch.dtype, spare: int, has_team: bool
) -> None:
    own = NativeAttention(library, KV, dtype=dtype, threads=2)
    other = borrowed(library, lent(dtype, spare=spare), team=torch_team() if has_team else None)
    inputs = Inputs(torch.Generator().manual_seed(3), dtype)
    for batch in shared_steps():
        own.begin(batch)
        other.begin(NativeStep(batch))
        for layer in range(KV.num_layers):
            heads = inputs.heads(len(batch.positions))
            for window in (None, 20):
                expected = own.attend(layer, *heads, window=window)
                assert expected.any()
                assert torch.equal(attend(other, layer, heads, window=window), expected)


def test_torch_has_a_team() -> None:
    """So that the test above runs in it."""
    assert torch_team() is not None


@DTYPES
def test_rows_stand_in_another_order_outside(library: Library, dtype: torch.dtype) -> None:
    plain, moved = (borrowed(library, lent(dtype)) for _ in range(2))
    inputs = Inputs(torch.Generator().manual_seed(4), dtype)
    for batch in shared_steps():
        count = len(batch.positions)
        places = torch.randperm(count, generator=inputs.generator)
        prepared = NativeStep(batch)
        prepared.struct.places = places.data_ptr()
        plain.begin(NativeStep(batch))
        moved.begin(prepared)
        for layer in range(KV.num_layers):
            heads = inputs.heads(count)
            shuffled = [torch.empty_like(part).index_copy(0, places, part) for part in heads]
            assert torch.equal(attend(moved, layer, shuffled)[places], attend(plain, layer, heads))


@DTYPES
def test_pages_travel_as_bytes(library: Library, dtype: torch.dtype) -> None:
    """Whoever owns the memory can copy a page to another, and zero one: it then holds zeros."""
    memory = lent(dtype)
    attention = borrowed(library, memory)
    inputs = Inputs(torch.Generator().manual_seed(5), dtype)
    attention.begin(NativeStep(shared_steps()[0]))
    attend(attention, 1, inputs.heads(32))
    memory[1][5] = memory[1][3]
    memory[1][3] = 0
    heads = inputs.heads(1)

    def read(page: int) -> Tensor:
        attention.begin(NativeStep(step([40], [0], (Segment(0, 1, (page,), 0, 32, "full"),))))
        return attend(attention, 1, heads)

    assert read(5).any()
    assert not read(3).any()


def test_rehearsals_change_nothing(generic: Library) -> None:
    memory = lent(torch.float32)
    attention = borrowed(generic, memory)
    attention.begin(NativeStep(shared_steps()[0]))
    attend(attention, 0, Inputs(torch.Generator(), torch.float32).heads(32))
    before = [layer.clone() for layer in memory]
    times = attention.rehearse(shared_steps()[1], num_times=5)
    assert times.segments_s > 0
    assert times.merges_s > 0
    assert all(map(torch.equal, memory, before))


def unlike() -> list[Tensor]:
    first, second = lent(torch.float32)
    return [first, second[:4]]


def of_width(head_dim: int, page_size: int = 32, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(4, 2, page_size, 2 * head_dim, dtype=dtype)]


@pytest.mark.parametrize(
    ("memory", "complaint"),
    [
        (unlike(), "layer 1 has memory .* unlike"),
        (of_width(48), "head_dim is 48; .* multiple of 32"),
        (of_width(64, 16), "page_size is 16"),
        (of_width(64, dtype=torch.float16), "float16"),
        ([of_width(64)[0].transpose(1, 2).contiguous().transpose(1, 2)], "not in one piece"),
        ([of_width(64)[0][:1].expand(4, -1, -1, -1)], "has 32768 bytes, and the memory offered 0"),
    ],
)
def test_memory_that_cannot_be_used(generic: Library, memory: list[Tensor], complaint: str) -> None:
    with pytest.raises(SetupError, match=complaint):
        borrowed(generic, memory)
