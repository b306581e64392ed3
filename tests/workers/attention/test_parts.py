"""How segments become calls: few of them, little padding, and no large mask where none is needed."""

from __future__ import annotations

import random

import pytest
import torch

from tests.workers.attention.script import PAGE_SIZE, Draft, Grown, Script, batch
from workers.attention.parts import CHUNK_ROWS, STACKED_BYTES, Part, PartBuilder
from workers.attention.protocol import KVShape, Segment, StepBatch, check_segment

SHAPE = KVShape(num_layers=1, num_pages=4096, page_size=PAGE_SIZE, num_kv_heads=1, head_dim=8)
MAX_KEYS = STACKED_BYTES // (8 * 4)


def build(batch: StepBatch, window: int | None = None) -> tuple[Part, ...]:
    return PartBuilder(batch, SHAPE, window=window, dtype=torch.float32, device=torch.device("cpu")).build()


def num_keys(part: Part) -> int:
    return part.keys.stop - part.keys.start if isinstance(part.keys, slice) else len(part.keys)


def decodes(lengths: list[int]) -> StepBatch:
    """One row for each sequence of the given lengths."""
    script = Script(0, SHAPE.num_pages)
    sequences = [Grown() for _ in lengths]
    script.grow(*((sequence, length - 1) for sequence, length in zip(sequences, lengths, strict=True) if length > 1))
    return script.grow(*((sequence, 1) for sequence in sequences))


def test_equal_decodes_are_one_call() -> None:
    assert len(build(decodes([100] * 32))) == 1


def test_decodes_of_any_lengths_are_few_calls_with_little_padding() -> None:
    for seed in range(20):
        generator = random.Random(seed)
        lengths = [int(2 ** generator.uniform(0, 9)) for _ in range(32)]
        parts = build(decodes(lengths))
        assert len(parts) <= 6
        assert sum(num_keys(part) for part in parts) <= 2 * sum(lengths)
        assert sum(part.num_segments for part in parts) == 32


def test_a_call_gathers_no_more_than_the_cache_holds() -> None:
    length = MAX_KEYS // 4
    parts = build(decodes([length] * 3 + [10] * 10 + [8 * length // 10]))
    assert all(num_keys(part) <= MAX_KEYS for part in parts)


def test_keys_in_consecutive_pages_are_read_in_place() -> None:
    script = Script(0, SHAPE.num_pages)
    script.free.sort(reverse=True)
    prompt = script.grow((Grown(), 50))
    assert [(part.rows, part.keys, part.is_causal) for part in build(prompt)] == [(slice(0, 50), slice(0, 50), True)]


def test_a_later_chunk_is_its_prefix_and_its_square_without_masks() -> None:
    script = Script(0, SHAPE.num_pages)
    sequence = Grown()
    script.grow((sequence, 300))
    prefix, square = build(script.grow((sequence, 100)))
    assert (num_keys(prefix), prefix.is_causal, prefix.mask) == (300, False, None)
    assert (num_keys(square), square.is_causal, square.mask) == (100, True, None)


def test_rows_that_share_prefixes_need_no_mask_of_their_own() -> None:
    """Padding is the same for every row of a segment: the heads that share a key head stay one product."""
    script = Script(0, SHAPE.num_pages)
    prefixes = [script.prefix(start=0, end=pages * PAGE_SIZE)[0] for pages in (6, 8)]
    leaves = [Grown((prefix,), length=prefix.end) for prefix in prefixes for _ in range(4)]
    shared = [part for part in build(script.grow(*((leaf, 1) for leaf in leaves))) if num_keys(part) > 8]
    assert [part.num_segments for part in shared] == [2]
    assert shared[0].mask is not None
    assert shared[0].mask.shape == (2, 1, 1, 8 * PAGE_SIZE)


def test_a_window_bounds_the_keys_read() -> None:
    script = Script(0, SHAPE.num_pages)
    window, sequence = 64, Grown()
    script.grow((sequence, 4000))
    for part in build(script.grow((sequence, 1000)), window):
        assert num_keys(part) <= window + CHUNK_ROWS + PAGE_SIZE
    (decode,) = build(script.grow((sequence, 1)), window)
    assert num_keys(decode) <= window + PAGE_SIZE


def test_a_prefix_out_of_every_row_s_window_is_not_computed() -> None:
    script = Script(0, SHAPE.num_pages)
    prefix, _ = script.prefix(start=0, end=10 * PAGE_SIZE)
    sequence = Grown((prefix,), length=prefix.end)
    script.grow((sequence, 40))

    def num_segments(window: int) -> int:
        return sum(part.num_segments for part in build(script.grow((sequence, 1)), window))

    assert num_segments(window=20) == 1
    assert num_segments(window=200) == 2


def test_a_draft_tree_masks_its_own_square_alone() -> None:
    script = Script(0, SHAPE.num_pages)
    sequence = Grown()
    script.grow((sequence, 3000))
    draft = script.draft(40)
    shared, square = build(script.grow((sequence, draft)))
    assert (num_keys(shared), shared.mask) == (3000, None)
    assert num_keys(square) == 40
    assert square.mask is not None
    seen = [[j for j in range(40) if square.mask[0, 0, row, j] == 0] for row in range(40)]
    assert seen == draft.paths


def test_small_draft_trees_and_chunks_of_as_many_rows_are_one_call() -> None:
    script = Script(0, SHAPE.num_pages)
    sequences = [Grown() for _ in range(8)]
    script.grow(*((sequence, 50) for sequence in sequences))
    (part,) = build(
        script.grow(*((sequence, 4 if index % 2 else script.draft(4)) for index, sequence in enumerate(sequences)))
    )
    assert part.num_segments == 8


def test_the_window_of_a_draft_tree_counts_positions_not_places() -> None:
    """64 siblings at one position: the last is as near to the sequence's end as the first."""
    script = Script(0, SHAPE.num_pages)
    sequence = Grown()
    script.grow((sequence, 2 * PAGE_SIZE))
    (part,) = build(script.grow((sequence, Draft((-1,) * 64))), window=3)
    assert num_keys(part) == PAGE_SIZE + 64  # the last page, for its last two keys
    assert part.mask is not None
    assert (part.mask == 0).sum(-1).unique().tolist() == [3]


def test_segments_without_rows_or_keys_make_no_call() -> None:
    segments = [Segment(0, 0, (), 0, 0), Segment(0, 2, (), 0, 0), Segment(0, 0, (1,), 0, 8, "full")]
    assert build(batch([0, 1], [8, 9], segments)) == ()
    assert build(batch([0, 1], [8, 9], segments), window=1) == ()


def test_a_segment_that_breaks_its_promise_is_refused() -> None:
    check_segment(Segment(0, 2, (0, 1), 8, 5, "tree", (1, 3)), PAGE_SIZE)
    for broken in (
        Segment(0, 2, (0, 1), 4, 5),
        Segment(0, 2, (0,), 8, 5),
        Segment(0, 2, (0,), 0, 1),
        Segment(0, -1, (0,), 0, 1),
        Segment(0, 2, (0, 1), 8, 5, "tree", (1,)),
        Segment(0, 2, (0, 1), 8, 5, "tree", (1, 1)),
        Segment(0, 2, (0, 1), 8, 5, "tree", (1, 6)),
        Segment(0, 65, range(20), 8, 70, "tree", tuple(1 << row for row in range(65))),
    ):
        with pytest.raises(AssertionError):
            check_segment(broken, PAGE_SIZE)
