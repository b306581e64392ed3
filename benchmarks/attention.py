"""What sharing is worth in attention alone: one step of decoding rows, with nothing shared up to all that can be.

    python -m benchmarks.attention                     # torch; every workload and shape
    python -m benchmarks.attention --backend native --threads 2
    python -m benchmarks.attention --workloads tree --shapes 8x4x128 --layers 4

Arms: `copies` gives each sequence pages of its own for its whole context, as a server without a prefix cache does;
`shared storage` stores a prefix once and reads it for each sequence; `one level` computes the outermost prefix of each
group once for all who share it; `all levels` every prefix; `planned` what the planner takes to be cheapest by costs
measured at the start; `no attention` only stores the new keys and values, the floor of all others. All arms of a round
attend to the same numbers. A prefix lies in consecutive pages, as a pool without history hands them out.

step_us is a whole step: plan_us (grouping and segments), then begin and every layer. num_keys_read are the keys that
the segments of a step name, per layer: the counted work, which no machine changes; num_pairs counts rows times keys.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, assert_never

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.benchmark import Arm, Benchmark, Measured, Workload
from benchmarks.options import add_options, positive, read_options
from workers.attention.cost import DEFAULT_COST, FittedCost, calibrate
from workers.attention.planner import Branch, CostModel, Grouping, Path, Planner, SharingMode
from workers.attention.protocol import AttentionBackend, KVShape, Segment, StepBatch
from workers.attention.torch_backend import TorchAttention

BackendName = Literal["torch", "native"]
Sharing = Literal["copies", "shared storage", "one level", "all levels", "planned", "no attention"]
MakeBackend = Callable[[KVShape], AttentionBackend]

SHARINGS: Final[tuple[Sharing, ...]] = (
    "copies",
    "shared storage",
    "one level",
    "all levels",
    "planned",
    "no attention",
)
BASELINE: Final[Sharing] = "shared storage"  # what servers do that have a prefix cache and no more
MODES: Final[dict[Sharing, SharingMode]] = {"one level": "root", "all levels": "all", "planned": "planned"}
PAGE_SIZE: Final = 32
FILLED_ROWS: Final = 2048  # rows stored at once
PROBE_KEYS: Final = 2048
PROBE_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a forest of contexts: its nodes in all, and each one's tokens, a multiple of the page size."""

    num_nodes: int  # a multiple of the level's above
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one layer."""

    num_kv_heads: int
    group: int  # query heads to a key head
    head_dim: int


@dataclass(frozen=True, slots=True)
class Load:
    """Sequences that decode: the last level's nodes are each one's own context before the first step."""

    levels: tuple[Level, ...]
    heads: Heads
    dtype: str
    num_layers: int
    num_steps: int

    @property
    def num_sequences(self) -> int:
        return self.levels[-1].num_nodes

    @property
    def context(self) -> int:
        """Tokens of each sequence before the first step."""
        return sum(level.num_tokens for level in self.levels)

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]


FORESTS: Final = {
    "shared 1K": (Level(1, 1024), Level(32, 64)),
    "shared 4K": (Level(1, 4096), Level(32, 64)),
    "shared 16K": (Level(1, 16384), Level(32, 64)),
    "tree": (Level(1, 1024), Level(4, 512), Level(32, 64)),
    "two groups": (Level(2, 2048), Level(32, 64)),
}
QUICK_FORESTS: Final = {
    "shared 256": (Level(1, 256), Level(8, 32)),
    "tree": (Level(1, 128), Level(2, 64), Level(8, 32)),
}
SHAPES: Final = {"4x2x64": Heads(4, 2, 64), "8x4x128": Heads(8, 4, 128)}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an arm's contexts lie."""

    num_pages: int
    tables: tuple[array[int], ...]  # of each sequence's pages, with room for the steps
    paths: tuple[Path, ...]  # of each sequence, for the planner; empty where nothing is shared
    places: tuple[tuple[int, ...], ...]  # of each node, level by level: the first page of each of its copies


def lay_out(load: Load, *, copies: bool) -> Layout:
    """Hand out consecutive pages to every node, or to every sequence's copy of every node."""
    own_pages = -(-load.num_steps // PAGE_SIZE)
    tables = [array("i") for _ in range(load.num_sequences)]
    paths: list[Path] = [() for _ in tables]
    places: list[tuple[int, ...]] = []
    num_pages = 0
    for index, level in enumerate(load.levels):
        is_own = index == len(load.levels) - 1
        size = level.num_tokens // PAGE_SIZE + own_pages * is_own
        below = load.num_sequences // level.num_nodes
        for node in range(level.num_nodes):
            readers = range(node * below, (node + 1) * below)
            firsts = range(num_pages, num_pages + size * (below if copies else 1), size)
            num_pages = firsts.stop
            places.append(tuple(firsts))
            for nth, reader in enumerate(readers):
                first = firsts[nth if copies else 0]
                tables[reader].extend(range(first, first + size))
                if not copies and not is_own:
                    paths[reader] = (*paths[reader], (len(places), len(tables[reader])))
    return Layout(num_pages, tuple(tables), tuple(paths), tuple(places))


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did."""

    output: Tensor  # [sequences, heads, head_dim], of the last layer
    segments: tuple[Segment, ...]
    plan_s: float
    attend_s: float


class Decoding:
    """Sequences of one load that decode a row a step, as one arm does it. Mutated only by the arm that made it."""

    def __init__(self, load: Load, sharing: Sharing, make: MakeBackend, cost: CostModel, seed: int) -> None:
        self._load = load
        self._sharing: Sharing = sharing
        self._layout = lay_out(load, copies=sharing == "copies")
        self._planner = Planner(cost, PAGE_SIZE, mode=MODES.get(sharing, "never"))
        self._backend = make(kv_shape(load, self._layout.num_pages))
        self._length = load.context
        self._generator = torch.Generator().manual_seed(seed)
        self._fill()
        heads = load.heads
        self._inputs = [
            (
                self._random(load.num_sequences, heads.num_kv_heads * heads.group),
                self._random(load.num_sequences, heads.num_kv_heads),
                self._random(load.num_sequences, heads.num_kv_heads),
            )
            for _ in range(load.num_layers)
        ]

    def step(self) -> Step:
        """Every sequence grows by one row."""
        self._length += 1
        begin_s = time.perf_counter()
        branches = [Branch(1, self._length, path) for path in self._layout.paths]
        grouping = self._planner.group(branches)
        batch = self._batch(grouping)
        planned_s = time.perf_counter()
        inputs = [[tensor[list(grouping.order)] for tensor in layer] for layer in self._inputs]
        output, attend_s = self._attend(batch, inputs)
        restored = torch.empty_like(output)
        restored[list(grouping.order)] = output
        return Step(restored, tuple(batch.segments), planned_s - begin_s, attend_s)

    def _attend(self, batch: StepBatch, inputs: Sequence[Sequence[Tensor]]) -> tuple[Tensor, float]:
        """The last layer's output, and the seconds of begin and of all layers."""
        begin_s = time.perf_counter()
        self._backend.begin(batch)
        for layer, (query, key, value) in enumerate(inputs):
            output = self._backend.attend(layer, query, key, value, window=None)
        return output, time.perf_counter() - begin_s

    def _batch(self, grouping: Grouping) -> StepBatch:
        """The step's rows in the grouping's order."""
        position = self._length - 1
        page, offset = divmod(position, PAGE_SIZE)
        slots = [self._layout.tables[index][page] * PAGE_SIZE + offset for index in grouping.order]
        segments = () if self._sharing == "no attention" else tuple(self._segments(grouping))
        return step_batch([position] * len(slots), slots, segments)

    def _segments(self, grouping: Grouping) -> Iterator[Segment]:
        tables = self._layout.tables
        for share in grouping.shares:
            start, num_keys = share.start_page * PAGE_SIZE, (share.stop_page - share.start_page) * PAGE_SIZE
            yield Segment(share.first, share.count, tables[grouping.order[share.first]], start, num_keys, "full")
        for row, index in enumerate(grouping.order):
            start = grouping.own_start[index] * PAGE_SIZE
            yield Segment(row, 1, tables[index], start, self._length - start)

    def _fill(self) -> None:
        """Store every node's keys and values, the same ones in all copies of it."""
        sizes = [level.num_tokens for level in self._load.levels for _ in range(level.num_nodes)]
        num_kv_heads = self._load.heads.num_kv_heads
        for num_tokens, firsts in zip(sizes, self._layout.places, strict=True):
            for start in range(0, num_tokens, FILLED_ROWS):
                num_rows = min(FILLED_ROWS, num_tokens - start)
                stored = [
                    (self._random(num_rows, num_kv_heads), self._random(num_rows, num_kv_heads))
                    for _ in range(self._load.num_layers)
                ]
                for first in firsts:
                    self._store(first * PAGE_SIZE + start, stored)

    def _store(self, slot: int, stored: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Store keys and values, by layer, from a slot on: rows of no segment are stored and attend to nothing."""
        num_rows, num_kv_heads, head_dim = stored[0][0].shape
        query = stored[0][0].new_zeros(num_rows, num_kv_heads * self._load.heads.group, head_dim)
        self._attend(step_batch(range(num_rows), range(slot, slot + num_rows), ()), [(query, *both) for both in stored])

    def _random(self, num_rows: int, num_heads: int) -> Tensor:
        size = (num_rows, num_heads, self._load.heads.head_dim)
        return torch.randn(size, generator=self._generator, dtype=torch.float32).to(self._load.torch_dtype)


class Probe:
    """Measures what a segment and a merge cost on a backend, in one layer. Mutated only by its maker."""

    def __init__(self, load: Load, make: MakeBackend) -> None:
        self._load = load
        self._backend = make(kv_shape(load, (2 * PROBE_KEYS + PROBE_ROWS) // PAGE_SIZE))

    def cost(self) -> FittedCost:
        return calibrate(self.segment_s, self.merge_s)

    def segment_s(self, num_rows: int, num_keys: int) -> float:
        """Seconds that one segment adds to a step without any."""
        return self._seconds(num_rows, [self._full(0, num_rows, 0, num_keys)]) - self._seconds(num_rows, [])

    def merge_s(self, num_rows: int) -> float:
        """Seconds that two segments take longer if they have their rows in common."""
        together = [self._full(0, num_rows, start, PROBE_KEYS) for start in (0, PROBE_KEYS)]
        apart = [self._full(row, num_rows, start, PROBE_KEYS) for row, start in ((0, 0), (num_rows, PROBE_KEYS))]
        return self._seconds(2 * num_rows, together) - self._seconds(2 * num_rows, apart)

    def _full(self, row_start: int, num_rows: int, start: int, num_keys: int) -> Segment:
        return Segment(row_start, num_rows, tuple(range(2 * PROBE_KEYS // PAGE_SIZE)), start, num_keys, "full")

    def _seconds(self, num_rows: int, segments: Sequence[Segment]) -> float:
        """Of one layer, after another one has prepared the step."""
        slots = range(2 * PROBE_KEYS, 2 * PROBE_KEYS + num_rows)
        self._backend.begin(step_batch([PROBE_KEYS] * num_rows, slots, segments))
        heads, dtype = self._load.heads, self._load.torch_dtype
        query = torch.ones(num_rows, heads.num_kv_heads * heads.group, heads.head_dim, dtype=dtype)
        key = torch.ones(num_rows, heads.num_kv_heads, heads.head_dim, dtype=dtype)
        self._backend.attend(0, query, key, key, window=None)
        begin_s = time.perf_counter()
        self._backend.attend(0, query, key, key, window=None)
        return time.perf_counter() - begin_s


class SharingArm:
    """Measures one way of sharing. Mutated only by the harness that calls it."""

    def __init__(self, sharing: Sharing, backend: BackendName, threads: int) -> None:
        self._sharing: Sharing = sharing
        self._backend: BackendName = backend
        self._threads = threads
        self._costs: dict[Heads, FittedCost] = {}

    def measure(self, workload: Workload[Load]) -> Measured:
        """The medians of a load's steps; the counted work is the first step's."""
        load = workload.params
        decoding = Decoding(load, self._sharing, self._maker(load), self._cost(load), workload.seed)
        steps = [decoding.step() for _ in range(load.num_steps)]
        segments = steps[0].segments
        return Measured(
            {
                "step_us": 1e6 * statistics.median(step.plan_s + step.attend_s for step in steps),
                "plan_us": 1e6 * statistics.median(step.plan_s for step in steps),
                "num_segments": len(segments),
                "num_keys_read": sum(segment.num_keys for segment in segments),
                "num_pairs": sum(segment.num_rows * segment.num_keys for segment in segments),
            }
        )

    def _cost(self, load: Load) -> CostModel:
        if self._sharing != "planned":
            return DEFAULT_COST  # not asked
        if load.heads not in self._costs:
            self._costs[load.heads] = Probe(load, self._maker(load)).cost()
        return self._costs[load.heads]

    def _maker(self, load: Load) -> MakeBackend:
        return lambda shape: make_backend(self._backend, shape, load.torch_dtype, self._threads)


def make_backend(name: BackendName, shape: KVShape, dtype: torch.dtype, threads: int) -> AttentionBackend:
    """A backend by name. Raises SetupError if the native one cannot be built here."""
    match name:
        case "torch":
            return TorchAttention(shape, dtype=dtype, device=torch.device("cpu"))
        case "native":
            from workers.kernels.attention import NativeAttention
            from workers.kernels.library import load

            return NativeAttention(load("auto"), shape, dtype=dtype, threads=threads)
        case _:
            assert_never(name)


def kv_shape(load: Load, num_pages: int) -> KVShape:
    return KVShape(load.num_layers, num_pages, PAGE_SIZE, load.heads.num_kv_heads, load.heads.head_dim)


def step_batch(positions: Sequence[int], slots: Sequence[int], segments: Sequence[Segment]) -> StepBatch:
    """A batch for attention alone: tokens and logits are nobody's."""
    rows = torch.arange(len(positions))
    return StepBatch(rows, torch.tensor(positions), torch.tensor(slots), tuple(segments), rows)


def workloads(args: argparse.Namespace) -> list[Workload[Load]]:
    """Every forest with every shape of heads."""
    forests = QUICK_FORESTS if args.quick else FORESTS
    num_steps = args.steps or (4 if args.quick else 24)
    return [
        Workload(f"{forest}, {shape}", Load(levels, SHAPES[shape], args.dtype, args.layers, num_steps))
        for shape in args.shapes or (["4x2x64"] if args.quick else SHAPES)
        for forest, levels in forests.items()
        if not args.workloads or forest in args.workloads
    ]


def arms(args: argparse.Namespace) -> list[Arm[Load]]:
    """One for each way of sharing."""
    return [Arm(sharing, SharingArm(sharing, args.backend, args.threads).measure) for sharing in SHARINGS]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=(__doc__ or "").partition("\n")[0]
    )
    made.add_argument("--backend", choices=("torch", "native"), default="torch")
    made.add_argument("--threads", type=positive, default=os.cpu_count() or 1, help="(default: one per core)")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    made.add_argument(
        "--layers", type=positive, default=1, help="layers of a step, each with its own store (default 1)"
    )
    made.add_argument("--steps", type=positive, help="decoded rows of each sequence (default 24; 4 if quick)")
    made.add_argument("--workloads", nargs="+", choices={**FORESTS, **QUICK_FORESTS}, help="(default: all)")
    made.add_argument("--shapes", nargs="+", choices=SHAPES, help="key heads x group x head size (default: all)")
    add_options(made, rounds=5)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the benchmark; the exit code."""
    command_line = parser()
    args = command_line.parse_args(arguments)
    torch.set_num_threads(args.threads)
    config = {"backend": args.backend, "threads": args.threads}
    try:
        benchmark = Benchmark("attention", workloads(args), arms(args), BASELINE, config)
    except ValueError as error:
        command_line.error(str(error))
    return harness.main(benchmark, read_options(args))


if __name__ == "__main__":
    sys.exit(main())
