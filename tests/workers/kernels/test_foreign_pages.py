"""Pages of mapped blocks: read where they lie, to the same bits as own pages, by the same steps; never written."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.workers.kernels.stream import kv_shape, native_model, random_tokens
from tests.workers.model.tiny import CPU, VOCAB_SIZE, save_tiny
from workers.attention.protocol import Segment, StepBatch
from workers.kernels.decoder import NativeDecoder
from workers.kernels.library import Library
from workers.kv import block_file
from workers.kv.block import BlockLabel, pack
from workers.kv.block_file import BlockFile
from workers.model.decoder import Decoder
from workers.model.loader import load_decoder

PAGE_SIZE = 32
NUM_PAGES = 8
PREFIX = random_tokens(96, VOCAB_SIZE)
SUFFIX = random_tokens(45, VOCAB_SIZE, seed=1)
THERE = (5, 2, 7)  # where its maker has the prefix
OWN = (4, 1)

MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 70},  # ends within a page of the prefix
    "qwen3": {"head_dim": 80, "num_attention_heads": 2},  # padded
}
Load = Callable[[str, torch.dtype], Decoder]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    directories: dict[str, Path] = {}

    def loaded(family: str, dtype: torch.dtype) -> Decoder:
        if family not in directories:
            directories[family] = tmp_path_factory.mktemp(family)
            save_tiny(directories[family], family, **MODELS[family])
        return load_decoder(directories[family], dtype=dtype, device=CPU)

    return loaded


def model_of(library: Library, decoder: Decoder, *, num_pages: int = NUM_PAGES) -> NativeDecoder:
    kv = kv_shape(decoder, num_pages=num_pages, page_size=PAGE_SIZE)
    return NativeDecoder(library, decoder, kv, max_context=256, threads=2)


def batch_of(tokens: Sequence[int], start: int, pages: Sequence[int]) -> StepBatch:
    """One sequence grows by tokens; all of them get logits."""
    positions = range(start, start + len(tokens))
    slots = [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in positions]
    segments = (Segment(0, len(tokens), tuple(pages), 0, positions.stop),)
    numbers = [torch.tensor([*values]) for values in (tokens, positions, slots, range(len(tokens)))]
    return StepBatch(numbers[0], numbers[1], numbers[2], segments, numbers[3])


def run(model: NativeDecoder, batch: StepBatch) -> Tensor:
    logits = model.forward(batch, with_logits=True).logits
    assert logits is not None
    return logits


def suffix_logits(model: NativeDecoder, prefix_pages: Sequence[int]) -> Tensor:
    """Of the suffix behind the prefix: a chunk, then tokens one by one, over the end of a page."""
    pages, start = (*prefix_pages, *OWN), len(PREFIX)
    logits = [run(model, batch_of(SUFFIX[:30], start, pages))]
    logits += [run(model, batch_of([token], start + 30 + i, pages)) for i, token in enumerate(SUFFIX[30:])]
    return torch.cat(logits)


def block_of(model: NativeDecoder, pages: Sequence[int]) -> memoryview:
    """The pages in memory that begins with a page of it, to be read only."""
    memory = mmap.mmap(-1, len(pages) * model.page_layout.page_bytes)
    model.export_pages(pages, memoryview(memory))
    return memoryview(memory).toreadonly()


def mapped(model: NativeDecoder, block: memoryview) -> tuple[int, ...]:
    num_pages = block.nbytes // model.page_layout.page_bytes
    first = model.map_pages(block, num_pages)
    assert first is not None
    return tuple(range(first, first + num_pages))


@dataclass
class Pair:
    """A model that has computed the prefix, and one that has not."""

    maker: NativeDecoder
    user: NativeDecoder
    expected: Tensor  # what the maker goes on with

    @classmethod
    def of(cls, library: Library, decoder: Decoder) -> Pair:
        maker, user = model_of(library, decoder), model_of(library, decoder)
        run(maker, batch_of(PREFIX, 0, THERE))
        expected = suffix_logits(maker, THERE)
        assert expected.std() > 0.5, "logits this flat would hide mistakes"
        return cls(maker, user, expected)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture
def pair(library: Library, load: Load, dtype: torch.dtype) -> Pair:
    return Pair.of(library, load("llama", dtype))


@pytest.fixture
def plain(generic: Library, load: Load) -> Pair:
    """For what does not depend on the instruction set."""
    return Pair.of(generic, load("llama", torch.float32))


@pytest.mark.parametrize("family", MODELS)
def test_a_mapped_prefix_gives_the_bits_of_ones_own(
    library: Library, load: Load, dtype: torch.dtype, family: str
) -> None:
    pair = Pair.of(library, load(family, dtype))
    pages = mapped(pair.user, block_of(pair.maker, THERE))
    assert pages[0] >= NUM_PAGES
    assert torch.equal(suffix_logits(pair.user, pages), pair.expected)


def test_without_the_prefix_the_bits_are_others(pair: Pair) -> None:
    assert not torch.equal(suffix_logits(pair.user, (3, 6, 0)), pair.expected)


def test_greedy_continuations_behind_a_mapped_prefix(pair: Pair) -> None:
    pages = mapped(pair.user, block_of(pair.maker, THERE))
    batches = [batch_of(SUFFIX[:1], len(PREFIX), (*table, *OWN)) for table in (THERE, pages)]
    made = [
        model.continue_greedily(batch, num_steps=40, least=0.0)
        for model, batch in zip((pair.maker, pair.user), batches, strict=True)
    ]
    assert len(made[0].token_ids) == 40
    assert made[0] == made[1]


@pytest.mark.parametrize("num_drafts", [4, 60])
def test_rows_that_share_mapped_pages(pair: Pair, num_drafts: int) -> None:
    """Two sequences and a draft tree behind one prefix, which one segment attends to for all of them."""

    def logits(model: NativeDecoder, prefix: Sequence[int]) -> Tensor:
        rows = 2 + num_drafts
        drafts = range(num_drafts)
        chains = tuple((2 << node) - 1 for node in drafts)
        pages = [(*prefix, 0), (*prefix, 3), (*prefix, *OWN)]
        segments = (
            Segment(0, rows, tuple(prefix), 0, 64, "full"),
            Segment(0, 1, pages[0], 64, 33),
            Segment(1, 1, pages[1], 64, 33),
            Segment(2, num_drafts, pages[2], 64, 32 + num_drafts, "tree", chains),
        )
        tokens = torch.tensor((SUFFIX * 2)[:rows])
        positions = torch.tensor([96, 96, *(96 + node for node in drafts)])
        slots = torch.tensor([0, 96, *(OWN[node // 32] * PAGE_SIZE + node % 32 for node in drafts)])
        return run(model, StepBatch(tokens, positions, slots, segments, torch.arange(rows)))

    pages = mapped(pair.user, block_of(pair.maker, THERE))
    assert torch.equal(logits(pair.user, pages), logits(pair.maker, THERE))


def test_pages_of_several_blocks_and_own_ones_in_one_table(pair: Pair) -> None:
    last = mapped(pair.user, block_of(pair.maker, THERE[2:]))
    first = mapped(pair.user, block_of(pair.maker, THERE[:1]))
    pair.user.import_pages(block_of(pair.maker, THERE[1:2]), [6])
    assert torch.equal(suffix_logits(pair.user, (*first, 6, *last)), pair.expected)


def test_pages_that_were_copied_outlive_their_block(pair: Pair) -> None:
    memory = mmap.mmap(-1, 3 * pair.maker.page_layout.page_bytes)
    pair.maker.export_pages(THERE, memoryview(memory))
    pages = mapped(pair.user, memoryview(memory))
    for source, target in zip(pages, (6, 0, 3), strict=True):
        pair.user.copy_page(source, target)
    pair.user.unmap_pages(pages[0])
    memory[:] = b"\xff" * len(memory)
    assert torch.equal(suffix_logits(pair.user, (6, 0, 3)), pair.expected)


def test_import_takes_blocks_that_begin_anywhere(pair: Pair) -> None:
    block = b"x" + bytes(block_of(pair.maker, THERE))
    pair.user.import_pages(memoryview(block)[1:], (6, 0, 3))
    assert torch.equal(suffix_logits(pair.user, (6, 0, 3)), pair.expected)


def test_mapped_pages_can_be_given_away_again(pair: Pair) -> None:
    block = block_of(pair.maker, THERE)
    pages = mapped(pair.user, block)
    assert block_of(pair.user, pages) == block
    assert block_of(pair.user, pages[1:2]) == block_of(pair.maker, THERE[1:2])


def test_a_prefix_that_passes_through_a_file(plain: Pair, tmp_path: Path) -> None:
    """The file may go away at once; it stays mapped until the model has done with it."""
    layout = plain.maker.page_layout
    label = BlockLabel(layout.fingerprint, "tiny", 7, bytes(4 * 96), 3)
    packed = pack(label, 3 * layout.page_bytes, lambda out: plain.maker.export_pages(THERE, out))
    block_file.write(tmp_path / "block", packed)
    with BlockFile.open(tmp_path / "block", label) as file:
        (tmp_path / "block").unlink()
        pages = mapped(plain.user, file.payload)
        assert torch.equal(suffix_logits(plain.user, pages), plain.expected)
        with pytest.raises(BufferError):
            file.close()
        assert torch.equal(suffix_logits(plain.user, pages), plain.expected)
        plain.user.unmap_pages(pages[0])


def bad_tables(pair: Pair) -> Iterator[tuple[int, ...]]:
    """Page tables with a number that is no page's; the last one has been."""
    yield (THERE[0], -1, THERE[2])
    yield (THERE[0], NUM_PAGES, THERE[2])
    yield (THERE[0], 2**31 - 1, THERE[2])
    pages = mapped(pair.maker, block_of(pair.maker, THERE))
    yield (*pages[:2], pages[2] + 1)
    pair.maker.unmap_pages(pages[0])
    yield pages


def test_a_table_with_a_page_that_is_not_there_is_refused_and_costs_nothing(pair: Pair) -> None:
    for table in bad_tables(pair):
        with pytest.raises(RuntimeError, match=r"page -?\d+ is neither in the store nor mapped"):
            suffix_logits(pair.maker, table)
    assert torch.equal(suffix_logits(pair.maker, THERE), pair.expected)


def test_entries_of_a_table_that_are_not_read_may_be_anything(plain: Pair) -> None:
    pages = (*THERE, *OWN)
    batch = batch_of(SUFFIX[:5], len(PREFIX), (*pages[:4], -1, 99))
    assert torch.equal(run(plain.maker, batch), plain.expected[:5])
    nobody = Segment(0, 0, (-1,), 0, 32, "full")
    batch = batch_of(SUFFIX[:5], len(PREFIX), pages)
    batch = StepBatch(batch.token_ids, batch.positions, batch.slots, (*batch.segments, nobody), batch.logit_rows)
    assert torch.equal(run(plain.maker, batch), plain.expected[:5])


def test_mapped_pages_are_never_written(plain: Pair) -> None:
    block = block_of(plain.maker, THERE)
    before = bytes(block)
    pages = mapped(plain.user, block)
    slot = pages[1] * PAGE_SIZE
    writes: list[Callable[[], object]] = [
        lambda: plain.user.copy_page(0, pages[0]),
        lambda: plain.user.copy_token(0, slot),
        lambda: plain.user.copy_token(slot, 0),
        lambda: plain.user.import_pages(block, (0, 1, pages[2])),
        lambda: run(plain.user, batch_of([1], 32, pages)),
    ]
    for write in writes:
        with pytest.raises(RuntimeError, match=r"mapped.* only read"):
            write()
    assert bytes(block) == before


def test_a_continuation_stops_before_a_mapped_page(plain: Pair) -> None:
    pages = mapped(plain.user, block_of(plain.maker, THERE))
    with pytest.raises(RuntimeError, match="only read"):
        plain.user.continue_greedily(batch_of([1], 30, (0, pages[0])), num_steps=5, least=0.0)


def test_pages_that_are_not_there_cannot_be_copied(plain: Pair) -> None:
    block = block_of(plain.maker, THERE)
    for page in (-1, NUM_PAGES):
        for use in (
            lambda page=page: plain.maker.copy_page(page, 0),
            lambda page=page: plain.maker.copy_page(0, page),
            lambda page=page: block_of(plain.maker, (0, page)),
            lambda page=page: plain.maker.import_pages(block, (0, 1, page)),
        ):
            with pytest.raises(RuntimeError, match=f"page {page} is neither"):
                use()
    for slots in ((-1, 0), (0, NUM_PAGES * PAGE_SIZE), (2**62, 0)):
        with pytest.raises(RuntimeError, match="is not in the store"):
            plain.maker.copy_token(*slots)


def test_only_a_whole_block_is_unmapped(plain: Pair) -> None:
    pages = mapped(plain.user, block_of(plain.maker, THERE))
    for page in (pages[1], pages[-1] + 1, 0, -1):
        with pytest.raises(RuntimeError, match=f"no block is mapped at page {page}"):
            plain.user.unmap_pages(page)
    assert torch.equal(suffix_logits(plain.user, pages), plain.expected)
    plain.user.unmap_pages(pages[0])
    with pytest.raises(RuntimeError, match="no block is mapped"):
        plain.user.unmap_pages(pages[0])


def test_blocks_side_by_side_are_unmapped_one_by_one(plain: Pair) -> None:
    first, second = (mapped(plain.user, block_of(plain.maker, THERE)) for _ in range(2))
    assert second[0] == first[-1] + 1
    plain.user.unmap_pages(first[0])
    assert torch.equal(suffix_logits(plain.user, second), plain.expected)


def test_layouts_are_equal_where_blocks_may_be_exchanged(library: Library, generic: Library, load: Load) -> None:
    decoder = load("llama", torch.float32)
    layout = model_of(library, decoder).page_layout
    assert layout == model_of(library, decoder, num_pages=3).page_layout
    assert layout.page_bytes == 2 * 3 * 2 * PAGE_SIZE * 32 * 4, "16 dims are padded to 32"
    others = [
        model_of(library, load("llama", torch.bfloat16)).page_layout,
        native_model(library, decoder, kv_shape(decoder, page_size=64)).page_layout,
        model_of(library, load("qwen3", torch.float32)).page_layout,
    ]
    if library.variant != generic.variant:
        others.append(model_of(generic, decoder).page_layout)
    assert len({layout.fingerprint, *(other.fingerprint for other in others)}) == 1 + len(others)


@pytest.fixture(scope="module")
def filled(generic: Library, load: Load) -> tuple[NativeDecoder, list[memoryview]]:
    """A small store, and blocks of one page each, all different, that fit it."""
    model = model_of(generic, load("llama", torch.float32), num_pages=4)
    blocks = []
    for index in range(8):
        run(model, batch_of(random_tokens(PAGE_SIZE, VOCAB_SIZE, seed=index), 0, (index % 4,)))
        blocks.append(block_of(model, (index % 4,)))
    return model, blocks


def joined(blocks: Sequence[memoryview]) -> memoryview:
    """One block of the pages of all, in the layout that NativeDecoder gives away: heads outside, pages inside."""
    num_heads = 3 * 2
    size = blocks[0].nbytes // num_heads
    memory = mmap.mmap(-1, size * num_heads * len(blocks))
    memory.write(b"".join(bytes(block[h * size : (h + 1) * size]) for h in range(num_heads) for block in blocks))
    return memoryview(memory)


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(1, 7), st.integers(0, 20)), max_size=30))
def test_numbers_are_handed_out_and_taken_back(
    filled: tuple[NativeDecoder, list[memoryview]], steps: list[tuple[bool, int, int]]
) -> None:
    """Every mapped number names its block's page, none has two, and none is refused while there is room."""
    model, blocks = filled
    held: dict[int, list[memoryview]] = {}
    for maps, num_pages, pick in steps:
        if maps:
            parts = [blocks[(pick + i) % len(blocks)] for i in range(num_pages)]
            first = model.map_pages(joined(parts), num_pages)
            used = {page + i for page, pages in held.items() for i in range(len(pages))}
            starts = [at for at in range(4, 16 - num_pages + 1) if not used & {*range(at, at + num_pages)}]
            assert first == (starts[0] if starts else None)
            if first is not None:
                held[first] = parts
        elif held:
            first = sorted(held)[pick % len(held)]
            del held[first]
            model.unmap_pages(first)
        for first, parts in held.items():
            assert all(block_of(model, (first + i,)) == part for i, part in enumerate(parts))
    for first in held:
        model.unmap_pages(first)
