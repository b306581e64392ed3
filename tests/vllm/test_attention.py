"""Shared attention inside vLLM's interfaces, without an engine: against float64 and against vLLM's own CPU backend."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from protos.errors import SetupError
from workers.attention.cost import DEFAULT_COST
from workers.attention.planner import Branch, Planner
from workers.attention.protocol import KVShape, Segment, StepBatch
from workers.attention.reference import ReferenceAttention
from workers.engine.vllm import attention
from workers.engine.vllm.attention import SharedPrefixBackend, SharedPrefixBuilder, SharedPrefixMetadata, check_model
from workers.engine.vllm.block_paths import BlockPaths, shared_paths
from workers.engine.vllm.settings import SECTION

KV = KVShape(num_layers=2, num_pages=96, page_size=32, num_kv_heads=2, head_dim=64)
NUM_HEADS = 6
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
NULL = 0  # vLLM's null block


@dataclass(eq=False)
class Running:
    """A request: its block table, and how many of its tokens have been computed."""

    blocks: list[int]
    length: int = 0


@dataclass
class Scene:
    """Requests over vLLM's blocks, as its scheduler would leave them. Blocks are handed out from the far end."""

    free: list[int] = field(default_factory=lambda: list(range(1, KV.num_pages)))

    def new(self, behind: Running | None = None, num_shared: int = 0) -> Running:
        """A request that begins with the first blocks of another, all computed."""
        if behind is None:
            return Running([])
        return Running(behind.blocks[:num_shared], num_shared * KV.page_size)

    def grow(self, sequence: Running, num_tokens: int) -> None:
        sequence.length += num_tokens
        while len(sequence.blocks) * KV.page_size < sequence.length:
            sequence.blocks.append(self.free.pop())


@dataclass(frozen=True)
class BatchOf:
    """One step in vLLM's words and in ours."""

    common: CommonAttentionMetadata
    plain: StepBatch  # every request alone, in vLLM's order of rows

    @property
    def num_rows(self) -> int:
        return len(self.plain.positions)


def batch_of(growth: Sequence[tuple[Running, int]], *, width: int = 40) -> BatchOf:
    """Requests that have grown by so many rows. What is in a table behind its blocks is left over from others."""
    counts = [count for _, count in growth]
    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    lengths = torch.tensor([sequence.length for sequence, _ in growth], dtype=torch.int32)
    tables = torch.full((len(growth), width), 7, dtype=torch.int32)
    positions: list[int] = []
    slots: list[int] = []
    segments: list[Segment] = []
    for index, (sequence, count) in enumerate(growth):
        tables[index, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
        span = range(sequence.length - count, sequence.length)
        segments.append(Segment(len(positions), count, sequence.blocks, 0, sequence.length))
        positions += span
        slots += [sequence.blocks[p // KV.page_size] * KV.page_size + p % KV.page_size for p in span]
    rows, places = torch.tensor(positions), torch.tensor(slots)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(growth),
        num_actual_tokens=len(positions),
        max_query_len=max(counts),
        max_seq_len=int(lengths.max()),
        block_table_tensor=tables,
        slot_mapping=places,
    )
    return BatchOf(common, StepBatch(rows, rows, places, tuple(segments), rows[:0]))


@dataclass
class Backend:
    """The layers of a model with one of the two backends, and their cache."""

    config: VllmConfig
    layers: dict[str, Attention]
    builder: SharedPrefixBuilder

    def attend(self, batch: BatchOf, heads: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Every layer, called as a model calls it."""
        metadata = self.builder.build(0, batch.common)
        slots = dict.fromkeys(self.layers, batch.common.slot_mapping)
        per_layer = dict.fromkeys(self.layers, metadata)
        with (
            set_current_vllm_config(self.config),
            set_forward_context(per_layer, self.config, slot_mapping=slots, num_tokens=batch.num_rows),
        ):
            return [
                layer(*[part.flatten(1) for part in parts]).view(-1, NUM_HEADS, KV.head_dim)
                for layer, parts in zip(self.layers.values(), heads, strict=True)
            ]


def vllm_config(target_dir: Path, dtype: str, **changes: object) -> VllmConfig:
    settings = {"max_model_len": 2048, "block_size": 32, **changes}
    args = EngineArgs(
        model=str(target_dir),
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        additional_config={SECTION: {"threads": 2, "sharing": "all"}},  # by cost, toys share nothing
        **settings,
    )
    return args.create_engine_config()


def make_layers(
    config: VllmConfig, kind: type[CPUAttentionBackend], windows: Sequence[int | None], **changes: object
) -> dict[str, Attention]:
    names = [f"model.layers.{index}.self_attn.attn" for index in range(len(windows))]
    shape = {"num_kv_heads": KV.num_kv_heads, "scale": KV.head_dim**-0.5, **changes}
    with set_current_vllm_config(config):
        return {
            name: Attention(
                NUM_HEADS,
                KV.head_dim,
                cache_config=config.cache_config,
                per_layer_sliding_window=window,
                prefix=name,
                attn_backend=kind,
                **shape,
            )
            for name, window in zip(names, windows, strict=True)
        }


def make_backend(
    config: VllmConfig,
    windows: Sequence[int | None],
    kind: type[CPUAttentionBackend] = SharedPrefixBackend,
    **changes: object,
) -> Backend:
    dtype = config.model_config.dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layers = make_layers(config, kind, windows, **changes)
    finally:
        torch.set_default_dtype(before)
    spec = FullAttentionSpec(block_size=KV.page_size, num_kv_heads=KV.num_kv_heads, head_size=KV.head_dim, dtype=dtype)
    for layer in layers.values():
        layer.kv_cache = torch.zeros(KV.num_pages, KV.num_kv_heads, KV.page_size, 2 * KV.head_dim, dtype=dtype)
    with set_current_vllm_config(config):
        return Backend(config, layers, kind.get_builder_cls()(spec, list(layers), config, torch.device("cpu")))


@dataclass
class Duel:
    """Ours beside vLLM's and the float64 reference, fed the same steps."""

    ours: Backend
    theirs: Backend
    reference: ReferenceAttention
    windows: Sequence[int | None]
    generator: torch.Generator

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.ours.config.model_config.dtype
        return dtype

    def step(self, scene: Scene, growth: Sequence[tuple[Running, int]]) -> None:
        for sequence, count in growth:
            scene.grow(sequence, count)
        self.attend(batch_of(growth))

    def attend(self, batch: BatchOf) -> None:
        heads = [self._heads(batch.num_rows) for _ in self.windows]
        ours, theirs = self.ours.attend(batch, heads), self.theirs.attend(batch, heads)
        self.reference.begin(batch.plain)
        for layer, window in enumerate(self.windows):
            exact = self.reference.attend(layer, *heads[layer], window=window)
            error, allowed = (exact - ours[layer]).abs().max(), (exact - theirs[layer]).abs().max()
            rounding = exact.abs().max() * torch.finfo(self.dtype).eps
            least = rounding if self.dtype == torch.bfloat16 else 2e-6
            assert error <= max(2 * allowed, least), (layer, error, allowed)

    def _heads(self, num_rows: int) -> list[Tensor]:
        """Queries, keys and values, side by side in one tensor as a model's projection leaves them."""
        sizes = [NUM_HEADS, KV.num_kv_heads, KV.num_kv_heads]
        joined = torch.randn(num_rows, sum(sizes) * KV.head_dim, generator=self.generator).to(self.dtype)
        parts = joined.split([size * KV.head_dim for size in sizes], dim=1)
        return [part.unflatten(1, (size, KV.head_dim)) for part, size in zip(parts, sizes, strict=True)]


@pytest.fixture(params=["float32", "bfloat16"])
def dtype_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[(None, None), (45, None)], ids=["plain", "window"])
def duel(target_dir: Path, dtype_name: str, request: pytest.FixtureRequest) -> Duel:
    """One of two layers may have a window: they are of one builder."""
    theirs = make_backend(vllm_config(target_dir, dtype_name), request.param, CPUAttentionBackend)
    ours = make_backend(vllm_config(target_dir, dtype_name), request.param)
    return Duel(ours, theirs, ReferenceAttention(KV), request.param, torch.Generator().manual_seed(1))


def families(scene: Scene, duel: Duel) -> list[Running]:
    """Two groups behind prefixes of two levels, and two requests alone, all of them past their prompts."""
    roots = [scene.new() for _ in range(2)]
    duel.step(scene, [(roots[0], 100), (roots[1], 64)])
    branches = [scene.new(roots[0], 3), scene.new(roots[0], 3), scene.new(roots[1], 2)]
    duel.step(scene, [(branches[0], 70), (branches[1], 5), (branches[2], 33)])
    leaves = [scene.new(branches[0], 5), scene.new(branches[0], 5), scene.new(branches[2], 3), scene.new()]
    duel.step(scene, [(leaf, 3 + index) for index, leaf in enumerate(leaves)])
    return [*roots, *branches, *leaves]


def test_decoding_with_groups_and_levels(duel: Duel) -> None:
    scene = Scene()
    running = families(scene, duel)
    order = [running[index] for index in (4, 0, 7, 2, 6, 8, 1, 3, 5)]
    for _ in range(40):
        duel.step(scene, [(sequence, 1) for sequence in order])
    assert duel.ours.builder.sheet is not None
    work = duel.ours.builder.sheet.work
    assert 0 < work.read_keys < 0.75 * work.needed_keys


def test_prompts_in_chunks_beside_decoding(duel: Duel) -> None:
    scene = Scene()
    running = families(scene, duel)
    prompt = scene.new(running[0], 3)
    for chunk in (32, 7, 61, 1):
        duel.step(scene, [(running[5], 1), (prompt, chunk), (running[0], 1), (running[2], 1)])


def test_chains_of_drafts(duel: Duel) -> None:
    """Rows behind the last token, some of which are taken back: their places are written again."""
    scene = Scene()
    running = families(scene, duel)
    for accepted in (3, 0, 1):
        duel.step(scene, [(running[4], 4), (running[2], 1), (running[5], 3), (running[6], 4)])
        for sequence in (running[4], running[6]):
            sequence.length -= 3 - accepted


def test_a_request_computes_a_prefix_that_another_reads_in_the_same_step(duel: Duel) -> None:
    scene = Scene()
    first = scene.new()
    scene.grow(first, 64)
    second = scene.new(first, 2)
    scene.grow(second, 9)
    duel.attend(batch_of([(second, 9), (first, 64)]))


def test_blocks_that_have_left_the_window(target_dir: Path) -> None:
    """vLLM puts the null block in their places; no request shares it."""
    ours = make_backend(vllm_config(target_dir, "float32"), (45, 45))
    scene, reference = Scene(), ReferenceAttention(KV)
    running = [scene.new(), scene.new()]
    generator = torch.Generator().manual_seed(1)
    for count in (100, 1):
        for sequence in running:
            scene.grow(sequence, count)
        batch = batch_of([(sequence, count) for sequence in running])
        heads = [torch.randn(2 * count, size, KV.head_dim, generator=generator) for size in (6, 2, 2)]
        out = ours.attend(batch, [heads, heads])
        reference.begin(batch.plain)
        exact = reference.attend(0, *heads, window=45)
        assert (exact - out[0]).abs().max() <= 2e-6
        for sequence in running:
            sequence.blocks[0] = NULL
    assert ours.builder.sheet is not None
    assert ours.builder.sheet.work.num_segments == 4


def test_padding_is_left_alone(target_dir: Path) -> None:
    """Rows and requests beyond those of the step."""
    ours = make_backend(vllm_config(target_dir, "float32"), (None,))
    scene, sequence = Scene(), Running([])
    scene.grow(sequence, 3)
    batch = batch_of([(sequence, 3)])
    common, starts = batch.common, torch.tensor([0, 3, 3, 3], dtype=torch.int32)
    common.query_start_loc = common.query_start_loc_cpu = starts
    common.seq_lens = torch.tensor([3, 0, 0], dtype=torch.int32)
    common.block_table_tensor = common.block_table_tensor.expand(3, -1)
    common.slot_mapping = torch.cat([common.slot_mapping, torch.tensor([-1, -1])])
    heads = [torch.randn(5, size, KV.head_dim, generator=torch.Generator().manual_seed(2)) for size in (6, 2, 2)]
    (out,) = ours.attend(batch, [heads])
    reference = ReferenceAttention(KV)
    reference.begin(batch.plain)
    exact = reference.attend(0, *[part[:3] for part in heads], window=None)
    assert (exact - out[:3]).abs().max() <= 2e-6


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"logits_soft_cap": 30.0}, "capped scores"),
        ({"alibi_slopes": [0.5] * NUM_HEADS}, "ALiBi"),
        ({"sinks": torch.ones(NUM_HEADS)}, "sinks"),
        ({"scale": 1.0}, "scores scaled by 1.0"),
    ],
)
def test_what_it_cannot_do_is_left_to_vllm(
    target_dir: Path, changes: dict[str, object], complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    """All layers, said once; and vLLM's own backend then gives its own bits."""
    with caplog.at_level(logging.WARNING):
        fallen = make_backend(vllm_config(target_dir, "float32"), (None, None), **changes)
    assert fallen.builder.sheet is None
    (record,) = [record for record in caplog.records if record.name == attention.__name__]
    assert complaint in record.getMessage()
    theirs = make_backend(vllm_config(target_dir, "float32"), (None, None), CPUAttentionBackend, **changes)
    scene, sequence = Scene(), Running([])
    generator = torch.Generator().manual_seed(3)
    for count in (40, 1):
        scene.grow(sequence, count)
        batch = batch_of([(sequence, count)])
        heads = [[torch.randn(count, size, KV.head_dim, generator=generator) for size in (6, 2, 2)] for _ in range(2)]
        results = zip(fallen.attend(batch, heads), theirs.attend(batch, heads), strict=True)
        assert all(torch.equal(found, expected) for found, expected in results)


def test_a_model_in_half_precision_is_refused(target_dir: Path) -> None:
    with pytest.raises(SetupError, match=r"computes in torch\.float16"):
        check_model(vllm_config(target_dir, "float16"), {})


def test_a_size_of_blocks_is_refused(target_dir: Path) -> None:
    with pytest.raises(SetupError, match=r"block_size is 16; .* multiple of 32"):
        check_model(vllm_config(target_dir, "float32", block_size=16), {})


def test_vllm_takes_it_once_it_is_registered() -> None:
    attention.register()
    try:
        assert AttentionBackendEnum.CPU_ATTN.get_class() is SharedPrefixBackend
        assert AttentionBackendEnum[SharedPrefixBackend.get_name()] is AttentionBackendEnum.CPU_ATTN
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()


def test_warming_up_computes_nothing(target_dir: Path) -> None:
    """vLLM runs the model without metadata before it has a cache."""
    ours = make_backend(vllm_config(target_dir, "float32"), (None,))
    (layer,) = ours.layers.values()
    with (
        set_current_vllm_config(ours.config),
        set_forward_context(None, ours.config, slot_mapping={}, num_tokens=2),
    ):
        heads = [torch.zeros(2, size * KV.head_dim) for size in (6, 2, 2)]
        assert layer(*heads).shape == (2, NUM_HEADS * KV.head_dim)
    assert isinstance(ours.builder.build(0, batch_of([(Running([3], 1), 1)]).common), SharedPrefixMetadata)


def test_paths_of_block_tables() -> None:
    """Node by node: the first request that begins with it, and the blocks it ends after."""
    tables = np.array(
        [[5, 6, 7, 8, 9], [4, 1, 1, 1, 1], [5, 6, 7, 3, 9], [5, 6, 2, 8, 9], [4, 2, 2, 2, 2], [5, 6, 7, 8, 2]],
        dtype=np.int32,
    )
    num_blocks = np.array([5, 0, 4, 3, 5, 4], dtype=np.int32)
    assert shared_paths(tables, num_blocks) == [
        ((0, 2), (0, 3), (0, 4)),
        (),
        ((0, 2), (0, 3)),
        ((0, 2),),
        (),
        ((0, 2), (0, 3), (0, 4)),
    ]


def test_paths_agree_with_every_pair_of_tables() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        size, width = generator.integers(0, 12), 6
        tables = generator.integers(1, 3, (size, width)).astype(np.int32)
        num_blocks = generator.integers(0, width + 1, size).astype(np.int32)
        paths = shared_paths(tables, num_blocks)
        for i, path in enumerate(paths):
            begins = [[*tables[j, : num_blocks[j]]] for j in range(size)]
            ends = {_num_common(begins[i], other) for j, other in enumerate(begins) if j != i} - {0}
            assert path == tuple((_first_with(begins, begins[i][:end]), end) for end in sorted(ends))


def test_paths_hold_while_the_same_requests_go_on() -> None:
    tables = np.array([[5, 6, 7, 8], [5, 6, 9, 3]], dtype=np.int32)
    block_paths = BlockPaths()
    paths = block_paths.of(tables, np.array([2, 2], dtype=np.int32))
    assert paths == [((0, 2),), ((0, 2),)]
    assert block_paths.of(tables.copy(), np.array([3, 2], dtype=np.int32)) is paths
    assert block_paths.of(tables[:1], np.array([3], dtype=np.int32)) == [()]
    assert block_paths.of(tables, np.array([2, 2], dtype=np.int32)) == paths
    other = np.array([[5, 6, 7, 8], [5, 4, 9, 3]], dtype=np.int32)  # somebody else has come in its place
    assert block_paths.of(other, np.array([2, 2], dtype=np.int32)) == [((0, 1),), ((0, 1),)]
    assert block_paths.of(other, np.array([2, 0], dtype=np.int32)) == [(), ()]


def _num_common(one: list[int], other: list[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _first_with(tables: list[list[int]], prefix: list[int]) -> int:
    return next(index for index, table in enumerate(tables) if table[: len(prefix)] == prefix)


def test_the_planner_shares_what_the_paths_say() -> None:
    """Also where the same block stands behind different ones: those are different prefixes."""
    tables = np.array([[5, 6, 7], [5, 6, 9], [4, 6, 7], [4, 6, 8]], dtype=np.int32)
    paths = shared_paths(tables, np.array([3, 3, 3, 3], dtype=np.int32))
    grouping = Planner(DEFAULT_COST, 32, mode="all").group([Branch(1, 100, path) for path in paths])
    shares = [{*grouping.order[share.first : share.first + share.count]} for share in grouping.shares]
    assert sorted(map(sorted, shares)) == [[0, 1], [2, 3]]
    assert {share.stop_page for share in grouping.shares} == {2}
