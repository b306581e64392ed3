"""The contract of attention backends, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.workers.attention.script import PAGE_SIZE, Grown, Script, batch
from workers.attention.protocol import AttentionBackend, KVShape, Segment, StepBatch
from workers.attention.reference import ReferenceAttention
from workers.attention.softmax import attend_by_matmul, attend_with_lse
from workers.attention.torch_backend import TorchAttention

CPU = torch.device("cpu")
NUM_PAGES = 512

BACKENDS: dict[str, tuple[Callable[[KVShape, torch.dtype], AttentionBackend], torch.dtype]] = {
    "torch-float32": (lambda shape, dtype: TorchAttention(shape, dtype=dtype, device=CPU), torch.float32),
    "torch-bfloat16": (lambda shape, dtype: TorchAttention(shape, dtype=dtype, device=CPU), torch.bfloat16),
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
    make, dtype = BACKENDS[name]
    shape = KVShape(num_layers, NUM_PAGES, PAGE_SIZE, num_kv_heads, head_dim)
    generator = torch.Generator().manual_seed(7)
    return Duel(make(shape, dtype), ReferenceAttention(shape), dtype, num_kv_heads * group, shape, generator)


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
    script = Script(1, NUM_PAGES)
    duel.step(script.grow(*((Grown(), length) for length in (1, 5, 40, 17, 16, 1, 90, 8))), window=window)


@pytest.mark.parametrize("window", WINDOWS)
def test_chunked_prompts_beside_decodes(duel: Duel, window: int | None) -> None:
    script = Script(2, NUM_PAGES)
    long, short, decoding = Grown(), Grown(), [Grown() for _ in range(4)]
    duel.step(script.grow(*((sequence, 3 + 20 * index) for index, sequence in enumerate(decoding))), window=window)
    for chunk in (40, 7, 1, 33):
        growth = [(long, chunk), *((sequence, 1) for sequence in decoding), (short, 2)]
        duel.step(script.grow(*growth), window=window)


@pytest.mark.parametrize("window", WINDOWS)
def test_many_decodes_of_random_lengths(duel: Duel, window: int | None) -> None:
    script = Script(3, NUM_PAGES)
    sequences = [Grown() for _ in range(24)]
    duel.step(script.grow(*((sequence, script.random.randint(1, 100)) for sequence in sequences)), window=window)
    for _ in range(2):
        duel.step(script.grow(*((sequence, 1) for sequence in sequences)), window=window)


@pytest.mark.parametrize("window", [None, 5, 20, 60])
@pytest.mark.parametrize("seed", range(3))
def test_trees_of_shared_prefixes(duel: Duel, seed: int, window: int | None) -> None:
    script = Script(seed, NUM_PAGES)
    root, step = script.prefix(start=0, end=6 * PAGE_SIZE)
    duel.step(step, window=window)
    leaves: list[Grown] = [Grown((root,), length=root.end)]
    for _ in range(2):
        middle, step = script.prefix(start=root.end, end=root.end + 3 * PAGE_SIZE, behind=(root,))
        duel.step(step, window=window)
        leaves += [Grown((root, middle), length=middle.end) for _ in range(script.random.randint(1, 5))]
    alone = Grown()
    for _ in range(3):
        growth = [(leaf, script.random.choice((1, 1, 2, 20))) for leaf in leaves]
        duel.step(script.grow((alone, script.random.randint(1, 30)), *growth), window=window)


def test_rows_see_keys_that_others_store_in_the_same_step(duel: Duel) -> None:
    """A prefix and what stands behind it, computed in one step."""
    pages = (5, 3, 9)
    prefix = [Segment(0, 16, pages[:2], 0, 16)]
    rest = [Segment(16, 2, pages[:2], 0, 16, "full"), Segment(16, 2, (9,), 16, 2)]
    slots = [page * PAGE_SIZE + offset for page in pages for offset in range(PAGE_SIZE)][:18]
    duel.step(batch(range(18), slots, [*rest, *prefix]))


@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (3, 64), (4, 32)])
def test_head_shapes_in_several_layers(backend_name: str, group: int, head_dim: int) -> None:
    duel = make_duel(backend_name, group=group, head_dim=head_dim, num_layers=2)
    script = Script(4, NUM_PAGES)
    root, step = script.prefix(start=0, end=4 * PAGE_SIZE)
    duel.step(step)
    leaves = [Grown((root,), length=root.end) for _ in range(3)]
    duel.step(script.grow(*zip(leaves, (1, 4, 20), strict=True), (Grown(), 30)))
    duel.step(script.grow(*((leaf, 1) for leaf in leaves)))


def test_layers_of_one_step_may_differ_in_their_window(backend_name: str) -> None:
    duel = make_duel(backend_name, num_layers=3)
    step = Script(5, NUM_PAGES).grow((Grown(), 50), (Grown(), 3))
    duel.backend.begin(step)
    duel.reference.begin(step)
    for layer, window in enumerate((None, 4, None)):
        duel.attend(layer, *duel.inputs(53), window=window)


@pytest.mark.parametrize("loud", ["prefix", "suffix", "both"])
def test_scores_of_plus_and_minus_eighty(duel: Duel, loud: str) -> None:
    """One side's scores are near 80, the other's near -80: a merge that is not log-domain overflows or loses a side."""
    duel.fp32_tolerance = 80 * 3 * torch.finfo(torch.float32).eps  # a log-sum-exp of 80 is rounded that coarsely
    script = Script(6, NUM_PAGES)
    root, step = script.prefix(start=0, end=2 * PAGE_SIZE)
    signs = {"prefix": (1, -1), "suffix": (-1, 1), "both": (1, 1)}[loud]
    scale = (80 * duel.shape.head_dim**0.5) ** 0.5 / duel.shape.head_dim**0.5  # query . key / sqrt(head_dim) is 80

    def attend(step: StepBatch, sign: int) -> None:
        num_rows = len(step.positions)
        duel.backend.begin(step)
        duel.reference.begin(step)
        query = torch.full((num_rows, duel.num_heads, duel.shape.head_dim), scale).to(duel.dtype)
        key = torch.full((num_rows, duel.shape.num_kv_heads, duel.shape.head_dim), sign * scale).to(duel.dtype)
        key[::2] *= 0.98  # neighbours' weights differ
        attended = duel.attend(0, query, key, duel.random(num_rows, duel.shape.num_kv_heads))
        assert attended.isfinite().all()

    attend(step, signs[0])
    attend(script.grow(*((Grown((root,), length=root.end), num_rows) for num_rows in (1, 3, 20))), signs[1])


def test_copied_page_holds_the_source_in_every_layer(backend_name: str) -> None:
    duel = make_duel(backend_name, num_layers=2)
    duel.step(batch(range(8), range(8), [Segment(0, 8, (0,), 0, 8)]))
    for backend in (duel.backend, duel.reference):
        backend.copy_page(0, 7)
    fork = batch([6], [7 * PAGE_SIZE + 6], [Segment(0, 1, (7,), 0, 7)])
    duel.step(fork)
    duel.step(batch([7], [1 * PAGE_SIZE], [Segment(0, 1, (0,), 0, 8, "full"), Segment(0, 1, (1,), 8, 1)]))


def test_keys_beyond_a_segment_are_never_read(duel: Duel) -> None:
    """Pages come back full of another request's NaNs; padding to the longest must not let them in."""
    ruined = torch.full((16 * PAGE_SIZE, duel.shape.num_kv_heads, duel.shape.head_dim), torch.nan).to(duel.dtype)
    everything = batch(
        range(16 * PAGE_SIZE), range(16 * PAGE_SIZE), [Segment(0, 16 * PAGE_SIZE, tuple(range(16)), 0, 128)]
    )
    query = duel.random(16 * PAGE_SIZE, duel.num_heads)
    duel.backend.begin(everything)
    duel.backend.attend(0, query, ruined, ruined, window=None)
    script = Script(8, 16)
    script.free.remove(0)  # its slots stay ruined
    sequences = [Grown() for _ in range(4)]
    duel.step(script.grow(*zip(sequences, (9, 17, 3, 20), strict=True)))
    duel.step(script.grow(*((sequence, 1) for sequence in sequences)))
    duel.step(script.grow(*((sequence, 2) for sequence in sequences)), window=4)


def test_rows_of_no_segment_do_not_disturb_the_others(duel: Duel) -> None:
    """A step padded to a compile bucket has rows that nobody attends with; they come back as zeros."""
    step = batch([0, 1, 2, 0], [0, 1, 2, 100], [Segment(0, 3, (0,), 0, 3)])
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
