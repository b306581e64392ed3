"""The contract of attention backends, against the float64 reference."""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.workers.attention.script import PAGE_SIZE, Draft, Grown, Script, batch
from tests.workers.kernels.emulated import AMX_EMULATED
from workers.attention.protocol import MAX_TREE_ROWS, AttentionBackend, KVShape, Segment, SegmentKind, StepBatch
from workers.attention.reference import ReferenceAttention
from workers.attention.softmax import attend_by_matmul, attend_with_lse
from workers.attention.torch_backend import TorchAttention
from workers.kernels.attention import NativeAttention
from workers.kernels.build import COMPILERS, build
from workers.kernels.library import PAGE_MULTIPLE, Library
from workers.kernels.variants import VARIANTS, Variant, cpu_features

CPU = torch.device("cpu")
NUM_PAGES = 512


@dataclass(frozen=True)
class BackendCase:
    """A backend under test, with the type that it computes in and a page size that it takes."""

    make: Callable[[KVShape, torch.dtype], AttentionBackend]
    dtype: torch.dtype
    page_size: int


def make_torch(shape: KVShape, dtype: torch.dtype) -> AttentionBackend:
    return TorchAttention(shape, dtype=dtype, device=CPU)


def make_native(variant: Variant) -> Callable[[KVShape, torch.dtype], AttentionBackend]:
    return lambda shape, dtype: NativeAttention(Library(build(variant), variant), shape, dtype=dtype, threads=2)


HAS_COMPILER = any(map(shutil.which, COMPILERS))
NATIVE = [variant for variant in (*VARIANTS, AMX_EMULATED) if HAS_COMPILER and variant.runs_on(cpu_features())]
BACKENDS = {
    "torch-float32": BackendCase(make_torch, torch.float32, PAGE_SIZE),
    "torch-bfloat16": BackendCase(make_torch, torch.bfloat16, PAGE_SIZE),
    **{
        f"{variant.name}-{name}": BackendCase(make_native(variant), dtype, PAGE_MULTIPLE)
        for variant in NATIVE
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    },
}
WINDOWS = [None, 1, 5, 16, 60]


@dataclass
class Duel:
    """A backend beside the reference, fed the same steps."""

    backend: AttentionBackend
    reference: ReferenceAttention
    dtype: torch.dtype
    num_heads: int
    shape: KVShape
    generator: torch.Generator
    fp32_tolerance: float = 1e-5

    @property
    def page_size(self) -> int:
        return self.shape.page_size

    def script(self, seed: int) -> Script:
        return Script(seed, self.shape.num_pages, self.page_size)

    def page_slots(self, *pages: int) -> list[int]:
        return [page * self.page_size + offset for page in pages for offset in range(self.page_size)]

    def step(self, batch: StepBatch, *, window: int | None = None) -> None:
        """Run a step of random queries, keys and values in every layer, and compare."""
        self.backend.begin(batch)
        self.reference.begin(batch)
        for layer in range(self.shape.num_layers):
            self.attend(layer, *self.inputs(len(batch.positions)), window=window)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None = None) -> Tensor:
        expected = self.reference.attend(layer, query, key, value, window=window)
        actual = self.backend.attend(layer, query, key, value, window=window)
        assert actual.dtype == self.dtype
        assert actual.shape == query.shape
        error = (actual.double() - expected).abs().max().item()
        assert error <= self.tolerance(layer, query, expected, window), error
        return actual

    def tolerance(self, layer: int, query: Tensor, expected: Tensor, window: int | None) -> float:
        """Twice the error of torch's own attention, which neither splits nor merges.

        Where that is small by chance, bfloat16 may round the largest result, and float32 is allowed fp32_tolerance.
        """
        keys, values = self.reference.stored(layer)
        errors = [0.0]
        for row in range(len(query)):
            slots = self.reference.visible_slots(row, window)
            if not slots:
                continue
            key, value = keys[slots].to(self.dtype)[None], values[slots].to(self.dtype)[None]
            inputs = (query[row, None, None].transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
            unsplit = F.scaled_dot_product_attention(*inputs, enable_gqa=True)[0, :, 0]
            errors.append((unsplit.double() - expected[row]).abs().max().item())
        rounding = expected.abs().max().item() * torch.finfo(self.dtype).eps
        return max(2 * max(errors), rounding if self.dtype == torch.bfloat16 else self.fp32_tolerance)

    def inputs(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        num_kv_heads = self.shape.num_kv_heads
        return self.random(num_rows, self.num_heads), *(self.random(num_rows, num_kv_heads) for _ in range(2))

    def random(self, num_rows: int, num_heads: int) -> Tensor:
        return torch.randn(num_rows, num_heads, self.shape.head_dim, generator=self.generator).to(self.dtype)


def make_duel(name: str, *, num_kv_heads: int = 2, group: int = 3, head_dim: int = 32, num_layers: int = 1) -> Duel:
    case = BACKENDS[name]
    shape = KVShape(num_layers, NUM_PAGES, case.page_size, num_kv_heads, head_dim)
    generator = torch.Generator().manual_seed(7)
    backend = case.make(shape, case.dtype)
    return Duel(backend, ReferenceAttention(shape), case.dtype, num_kv_heads * group, shape, generator)


@pytest.fixture(params=BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def duel(backend_name: str) -> Duel:
    return make_duel(backend_name)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("window", WINDOWS)
def test_prompts_of_many_lengths_in_one_stream(duel: Duel, window: int | None) -> None:
    script = duel.script(1)
    duel.step(script.grow(*((Grown(), length) for length in (1, 5, 40, 17, 16, 1, 90, 8))), window=window)


@pytest.mark.parametrize("window", WINDOWS)
def test_chunked_prompts_beside_decodes(duel: Duel, window: int | None) -> None:
    script = duel.script(2)
    long, short, decoding = Grown(), Grown(), [Grown() for _ in range(4)]
    duel.step(script.grow(*((sequence, 3 + 20 * index) for index, sequence in enumerate(decoding))), window=window)
    for chunk in (40, 7, 1, 33):
        growth = [(long, chunk), *((sequence, 1) for sequence in decoding), (short, 2)]
        duel.step(script.grow(*growth), window=window)


@pytest.mark.parametrize("window", WINDOWS)
def test_many_decodes_of_random_lengths(duel: Duel, window: int | None) -> None:
    script = duel.script(3)
    sequences = [Grown() for _ in range(24)]
    duel.step(script.grow(*((sequence, script.random.randint(1, 100)) for sequence in sequences)), window=window)
    for _ in range(2):
        duel.step(script.grow(*((sequence, 1) for sequence in sequences)), window=window)


@pytest.mark.parametrize("window", [None, 5, 20, 60])
@pytest.mark.parametrize("seed", range(3))
def test_trees_of_shared_prefixes(duel: Duel, seed: int, window: int | None) -> None:
    script = duel.script(seed)
    root, step = script.prefix(start=0, end=6 * duel.page_size)
    duel.step(step, window=window)
    leaves: list[Grown] = [Grown((root,), length=root.end)]
    for _ in range(2):
        middle, step = script.prefix(start=root.end, end=root.end + 3 * duel.page_size, behind=(root,))
        duel.step(step, window=window)
        leaves += [Grown((root, middle), length=middle.end) for _ in range(script.random.randint(1, 5))]
    alone = Grown()
    for _ in range(3):
        growth = [(leaf, script.random.choice((1, 1, 2, 20))) for leaf in leaves]
        duel.step(script.grow((alone, script.random.randint(1, 30)), *growth), window=window)


def test_rows_see_keys_that_others_store_in_the_same_step(duel: Duel) -> None:
    """A prefix and what stands behind it, computed in one step."""
    end = 2 * duel.page_size
    prefix = [Segment(0, end, (5, 3), 0, end)]
    rest = [Segment(end, 2, (5, 3), 0, end, "full"), Segment(end, 2, (5, 3, 9), end, 2)]
    duel.step(batch(range(end + 2), duel.page_slots(5, 3, 9)[: end + 2], [*rest, *prefix]))


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
def test_head_shapes(backend_name: str, group: int, head_dim: int) -> None:
    duel = make_duel(backend_name, group=group, head_dim=head_dim)
    script = duel.script(4)
    root, step = script.prefix(start=0, end=2 * duel.page_size)
    duel.step(step)
    leaves = [Grown((root,), length=root.end) for _ in range(4)]
    duel.step(script.grow(*zip(leaves, (1, 4, 20, script.draft(5)), strict=True), (Grown(), 30)))
    duel.step(script.grow(*((leaf, 1) for leaf in leaves)))


def test_several_layers(backend_name: str) -> None:
    duel = make_duel(backend_name, num_layers=3)
    script = duel.script(4)
    sequences = [Grown() for _ in range(3)]
    duel.step(script.grow(*zip(sequences, (1, 4, 20), strict=True)))
    duel.step(script.grow(*((sequence, 1) for sequence in sequences)))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "shape", ["chain", "star", "random", "single", "forest", "largest"], ids=lambda shape: f"{shape}-drafts"
)
def test_draft_trees_behind_a_shared_prefix(duel: Duel, shape: str, window: int | None) -> None:
    """Draft trees beside a decode, a chunk of a prompt and a sequence of its own; then the drafts are overwritten."""
    script = duel.script(10)
    drafts = {
        "chain": [Draft(tuple(range(-1, size - 1))) for size in (2, 7, 30)],
        "star": [Draft((-1, *[0] * size)) for size in (1, 6, 29)],
        "random": [script.draft(size) for size in (2, 7, 30)],
        "single": [Draft((-1,)), Draft((-1,))],
        "forest": [Draft((-1,) * size) for size in (3, 16, 17)],
        "largest": [script.draft(MAX_TREE_ROWS), Draft(tuple(range(-1, MAX_TREE_ROWS - 1)))],
    }[shape]
    root, step = script.prefix(start=0, end=3 * duel.page_size)
    duel.step(step, window=window)
    leaves = [Grown((root,), length=root.end) for _ in range(len(drafts) + 2)]
    alone = Grown()
    duel.step(script.grow(*((leaf, 3 * index) for index, leaf in enumerate(leaves)), (alone, 40)), window=window)
    growth: list[int | Draft] = [*drafts, 1, 20]
    script.random.shuffle(growth)
    for own in (drafts[0], 1, drafts[-1]):
        duel.step(script.grow(*zip(leaves, growth, strict=True), (alone, own)), window=window)
    duel.step(script.grow(*((leaf, 1) for leaf in leaves), (alone, 2)), window=window)


def test_a_draft_tree_alone_in_its_sequence(duel: Duel) -> None:
    """No key stands before the tree: the first token of a prompt may be followed by drafts at once."""
    script = duel.script(11)
    for window in (None, 1, 2):
        duel.step(script.grow((Grown(), script.draft(20)), (Grown(), script.draft(5)), (Grown(), 3)), window=window)


@pytest.mark.parametrize("window", [None, 1, 2, 9])
def test_rows_of_a_draft_tree_see_only_their_ancestors(duel: Duel, window: int | None) -> None:
    """Each row equals the row of a plain sequence that holds its ancestors alone."""
    draft, script = Draft((-1, 0, 0, 1, 2, -1)), duel.script(12)
    sequence = Grown()
    duel.step(script.grow((sequence, 2 * duel.page_size - 3)))
    length, pages = sequence.length, sequence.pages
    query, key, value = duel.inputs(len(draft.parents))
    step = script.grow((sequence, draft))
    duel.backend.begin(step)
    together = duel.backend.attend(0, query, key, value, window=window)
    for node, path in enumerate(draft.paths):
        end = length + len(path)
        slots = duel.page_slots(*pages, *sequence.own_pages[len(pages) :])[length:end]
        chain = batch(range(length, end), slots, [Segment(0, len(path), sequence.pages, 0, end)])
        duel.backend.begin(chain)
        alone = duel.backend.attend(0, query[path], key[path], value[path], window=window)
        tolerance = 1e-5 if duel.dtype == torch.float32 else 0.02
        torch.testing.assert_close(together[node], alone[-1], atol=tolerance, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 5, 60, 100])
@pytest.mark.parametrize("seed", range(8))
def test_random_trees_of_prefixes_cut_into_random_segments(duel: Duel, seed: int, window: int | None) -> None:
    script = duel.script(100 + seed)
    tree = script.tree(lambda step: duel.step(step, window=window))
    leaves = list(tree.leaves())
    for _ in range(3):
        rows = [script.random.choice((0, 1, 1, 2, 18, script.draft(script.random.randint(1, 20)))) for _ in leaves]
        duel.step(script.grow_planned(tree, list(zip(leaves, rows, strict=True))), window=window)


@pytest.mark.parametrize("kind", ["causal", "full", "tree"])
def test_segments_without_rows_or_keys_do_nothing(duel: Duel, kind: SegmentKind) -> None:
    size = duel.page_size
    empty = [
        Segment(1, 0, (), 0, 0, kind),
        Segment(1, 0, (2,), 0, size, kind),
        Segment(0, 3, [], 0, 0, kind, (1, 2, 4) if kind == "tree" else ()),
        Segment(1, 1, array("i"), size, 0, kind, (1,) if kind == "tree" else ()),
    ]
    duel.step(batch(range(3), duel.page_slots(2)[:3], [*empty[:2], Segment(0, 3, (2,), 0, 3), *empty[2:]]))
    duel.step(batch(range(3), duel.page_slots(2)[:3], empty))
    duel.step(batch(range(3), duel.page_slots(2)[:3], []))


def test_a_step_without_rows(duel: Duel) -> None:
    query, key, value = duel.inputs(0)
    for segments in ([], [Segment(0, 0, (2,), 0, 4, "full")]):
        for backend in (duel.backend, duel.reference):
            backend.begin(batch([], [], segments))
            assert backend.attend(0, query, key, value, window=None).shape == query.shape


@pytest.mark.parametrize("num_prefixes", [1, 2])
def test_rows_whose_window_leaves_them_no_key_are_zero(duel: Duel, num_prefixes: int) -> None:
    """Row 0 is far behind the prefixes and has nothing else; row 1 sees the end of the last, row 2 its own key too."""
    size = duel.page_size
    step = batch(range(2 * size), duel.page_slots(4, 1), [Segment(0, 2 * size, (4, 1), 0, 2 * size)])
    duel.step(step, window=4)
    prefixes = [Segment(0, 3, (4, 1), page * size, size, "full") for page in range(2 - num_prefixes, 2)]
    positions, slots = [2 * size + 10, 2 * size + 1, 2 * size + 2], duel.page_slots(6)[:3]
    step = batch(positions, slots, [*prefixes, Segment(2, 1, (4, 1, 6), 2 * size, 3)])
    duel.backend.begin(step)
    duel.reference.begin(step)
    attended = duel.attend(0, *duel.inputs(3), window=4)
    assert attended[0].count_nonzero() == 0
    assert attended[1:].count_nonzero(dim=-1).min() > 0


def test_inputs_need_not_be_contiguous(duel: Duel) -> None:
    """Heads before rows, slices of one product for all three, and every other number."""
    heads, kv_heads = duel.num_heads, duel.shape.num_kv_heads
    script = duel.script(13)
    root, step = script.prefix(start=0, end=2 * duel.page_size)
    duel.step(step)
    leaves = [Grown((root,), length=root.end) for _ in range(4)]
    for growth in ((3, 1, 20, script.draft(4)), (1, 1, 1, 1), (1, 1, 1, 1)):
        step = script.grow(*zip(leaves, growth, strict=True))
        duel.backend.begin(step)
        duel.reference.begin(step)
        num_rows = len(step.positions)
        fused = duel.random(num_rows, heads + 2 * kv_heads)
        duel.attend(0, *fused.split([heads, kv_heads, kv_heads], dim=1))
        duel.attend(0, *(part.transpose(0, 1).contiguous().transpose(0, 1) for part in duel.inputs(num_rows)))
        duel.attend(0, *(part.mT.contiguous().mT for part in duel.inputs(num_rows)))
        duel.attend(0, *(part.repeat_interleave(2, dim=-1)[..., ::2] for part in duel.inputs(num_rows)))


def test_layers_of_one_step_may_differ_in_their_window(backend_name: str) -> None:
    duel = make_duel(backend_name, num_layers=3)
    step = duel.script(5).grow((Grown(), 50), (Grown(), 3))
    duel.backend.begin(step)
    duel.reference.begin(step)
    for layer, window in enumerate((None, 4, None)):
        duel.attend(layer, *duel.inputs(53), window=window)


@pytest.mark.parametrize("suffix_sign", [-1, 1])
def test_scores_of_plus_and_minus_eighty(duel: Duel, suffix_sign: int) -> None:
    """For each sequence's even heads the prefix's scores are near 80, for its odd heads near -80.

    The suffix's are the opposite, or the same. A merge that is not log-domain overflows or loses a side.
    """
    duel.fp32_tolerance = 80 * 8 * torch.finfo(torch.float32).eps  # scores of 80 are rounded that coarsely
    script = duel.script(6)
    root, step = script.prefix(start=0, end=2 * duel.page_size)
    scale = (80 / duel.shape.head_dim**0.5) ** 0.5  # query . key / sqrt(head_dim) is 80

    def attend(step: StepBatch, sign: int) -> None:
        num_rows = len(step.positions)
        duel.backend.begin(step)
        duel.reference.begin(step)
        query = torch.full((num_rows, duel.num_heads, duel.shape.head_dim), scale).to(duel.dtype)
        query[:, 1::2] *= -1
        key = torch.full((num_rows, duel.shape.num_kv_heads, duel.shape.head_dim), sign * scale).to(duel.dtype)
        key[::2] *= 0.98  # neighbours' weights differ
        attended = duel.attend(0, query, key, duel.random(num_rows, duel.shape.num_kv_heads))
        assert attended.isfinite().all()

    attend(step, 1)
    leaves = [Grown((root,), length=root.end) for _ in range(4)]
    attend(script.grow(*zip(leaves, (1, 3, 20, script.draft(6)), strict=True)), suffix_sign)


@pytest.mark.parametrize("slope", [-20, 20])
def test_scores_that_climb_or_fall_along_the_keys(duel: Duel, slope: int) -> None:
    """Sums that were begun at a low score are brought in line again and again, those at a high one never."""
    duel.fp32_tolerance = 40 * 20 * 8 * torch.finfo(torch.float32).eps  # scores are rounded that coarsely
    num_rows = min(40 * 16, 16 * duel.page_size)
    script, sequence = duel.script(21), Grown()
    for grown in (num_rows, 1, 3):
        step = script.grow((sequence, grown))
        duel.backend.begin(step)
        duel.reference.begin(step)
        query, key, value = duel.inputs(grown)
        level = step.positions.div(16, rounding_mode="floor") * slope / duel.shape.head_dim**0.5
        query = query * 0.1 + 1
        key = key * 0.1 + level[:, None, None]
        assert duel.attend(0, query.to(duel.dtype), key.to(duel.dtype), value).isfinite().all()


def test_copied_page_holds_the_source_in_every_layer(backend_name: str) -> None:
    duel = make_duel(backend_name, num_layers=2)
    size = duel.page_size
    duel.step(batch(range(size), range(size), [Segment(0, size, (0,), 0, size)]))
    for backend in (duel.backend, duel.reference):
        backend.copy_page(0, 7)
    duel.step(batch([size - 2], [8 * size - 2], [Segment(0, 1, (7,), 0, size - 1)]))
    original = [Segment(0, 1, (0,), 0, size, "full"), Segment(0, 1, (0, 1), size, 1)]
    duel.step(batch([size], [size], original))


def copy_tokens(duel: Duel, *copies: tuple[int, int]) -> None:
    """One after another: (source, target) slots."""
    for source, target in copies:
        duel.backend.copy_token(source, target)
        for layer in range(duel.shape.num_layers):
            for store in duel.reference.stored(layer):
                store[target] = store[source]


def test_copied_tokens_hold_the_source_in_every_layer(backend_name: str) -> None:
    """From every place of a page to every place of another, and nothing beside them is touched."""
    duel = make_duel(backend_name, num_layers=2)
    size = duel.page_size
    rows = range(3 * size)
    duel.step(batch(rows, rows, [Segment(0, 3 * size, (0, 1, 2), 0, 3 * size)]))
    copy_tokens(duel, *((size + (5 * place + 3) % size, 7 * size + place) for place in range(size)))
    copy_tokens(duel, (size - 1, 2 * size), (0, 2 * size + 3), (2 * size + 1, 3 * size - 1), (size, size))
    pages = [(7,), (0, 1, 2), (2,), (2, 7)]
    segments = [Segment(row, 1, table, 0, len(table) * size, "full") for row, table in enumerate(pages)]
    duel.step(batch(range(4), range(9 * size, 9 * size + 4), segments))


def test_tokens_copied_in_order_close_the_gaps_of_a_draft(backend_name: str) -> None:
    """As after a verified tree: each accepted node moves forward, none is overwritten before it has moved."""
    duel = make_duel(backend_name, num_layers=2)
    size = duel.page_size
    kept = [size - 2, *range(size - 1, 2 * size, 3)]
    duel.step(batch(range(2 * size), range(2 * size), [Segment(0, 2 * size, (0, 1), 0, 2 * size)]))
    copy_tokens(duel, *((source, size - 2 + depth) for depth, source in enumerate(kept) if source != size - 2 + depth))
    end = size - 2 + len(kept)
    duel.step(batch([end, end + 1], [end, end + 1], [Segment(0, 2, (0, 1), 0, end + 2)]))


def test_keys_beyond_a_segment_are_never_read(duel: Duel) -> None:
    """Pages come back full of another request's NaNs; padding to the longest must not let them in."""
    num_rows = 16 * duel.page_size
    ruined = torch.full((num_rows, duel.shape.num_kv_heads, duel.shape.head_dim), torch.nan).to(duel.dtype)
    duel.backend.begin(batch(range(num_rows), range(num_rows), [Segment(0, num_rows, range(16), 0, num_rows)]))
    duel.backend.attend(0, duel.random(num_rows, duel.num_heads), ruined, ruined, window=None)
    script = Script(8, 16, duel.page_size)
    script.free.remove(0)  # its slots stay ruined
    sequences = [Grown() for _ in range(4)]
    duel.step(script.grow(*zip(sequences, (9, 17, 3, 20), strict=True)))
    duel.step(script.grow(*((sequence, 1) for sequence in sequences)))
    duel.step(script.grow(*((sequence, 2) for sequence in sequences)), window=4)
    duel.step(script.grow(*((sequence, script.draft(3)) for sequence in sequences)))


def test_a_value_of_nan_ruins_no_other_sequence(duel: Duel) -> None:
    script = duel.script(14)
    root, step = script.prefix(start=0, end=duel.page_size)
    duel.step(step)
    sequences = [Grown((root,), length=root.end), *(Grown((root,), length=root.end) for _ in range(2)), Grown()]
    duel.backend.begin(script.grow(*((sequence, 1) for sequence in sequences)))
    query, key, value = duel.inputs(4)
    value[0] = torch.nan
    attended = duel.backend.attend(0, query, key, value, window=None)
    assert attended[0].isnan().all()
    assert attended[1:].isfinite().all()


def test_rows_of_no_segment_do_not_disturb_the_others(duel: Duel) -> None:
    """A step padded to a compile bucket has rows that nobody attends with; they come back as zeros."""
    step = batch([0, 1, 2, 0], [0, 1, 2, 5 * duel.page_size], [Segment(0, 3, (0,), 0, 3)])
    duel.backend.begin(step)
    query, key, value = duel.inputs(4)
    padded = duel.backend.attend(0, query, key, value, window=None)
    assert padded[3].count_nonzero() == 0
    alone = batch([0, 1, 2], [0, 1, 2], [Segment(0, 3, (0,), 0, 3)])
    duel.backend.begin(alone)
    assert torch.equal(padded[:3], duel.backend.attend(0, query[:3], key[:3], value[:3], window=None))


@pytest.mark.parametrize(("is_causal", "masked"), [(False, False), (False, True), (True, False)])
def test_matmul_attention_equals_the_fused_kernel(is_causal: bool, masked: bool) -> None:
    generator = torch.Generator().manual_seed(9)
    query = torch.randn(2, 6, 5, 32, generator=generator)
    key, value = (torch.randn(2, 2, 5, 32, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, 5, 5)
    mask[:, :, 1:, 0] = -torch.inf
    arguments = (query, key, value)
    output, lse = attend_by_matmul(*arguments, mask=mask if masked else None, is_causal=is_causal)
    fused_output, fused_lse = attend_with_lse(*arguments, mask=mask if masked else None, is_causal=is_causal)
    torch.testing.assert_close(output, fused_output, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, fused_lse, atol=1e-6, rtol=1e-5)
