"""Steps for attention backends: sequences that grow over shuffled pages, alone or behind shared prefixes."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from workers.attention.protocol import Segment, StepBatch

PAGE_SIZE = 8


@dataclass(frozen=True, eq=False)
class Prefix:
    """Positions [start, end), both multiples of the page size, and the table of pages that holds [0, end)."""

    start: int
    end: int
    pages: tuple[int, ...]


@dataclass
class Grown:
    """A sequence: the prefixes it stands behind, and what it has of its own."""

    behind: tuple[Prefix, ...] = ()
    own_pages: list[int] = field(default_factory=list)
    length: int = 0

    @property
    def own_start(self) -> int:
        return self.behind[-1].end if self.behind else 0

    @property
    def pages(self) -> tuple[int, ...]:
        """The table of pages that holds the sequence from position 0."""
        return (*(self.behind[-1].pages if self.behind else ()), *self.own_pages)


@dataclass(frozen=True)
class Draft:
    """A draft tree by each node's parent, which comes before it; -1: the sequence itself. Nothing of it stays."""

    parents: tuple[int, ...]

    @property
    def paths(self) -> list[list[int]]:
        """Each node's ancestors and itself."""
        paths: list[list[int]] = []
        for node, parent in enumerate(self.parents):
            paths.append([*(paths[parent] if parent >= 0 else ()), node])
        return paths

    @property
    def mask(self) -> tuple[int, ...]:
        return tuple(sum(1 << node for node in path) for path in self.paths)


Growth = tuple[Grown, int | Draft]


@dataclass(frozen=True)
class Run:
    """The rows with which one sequence grows in a step."""

    sequence: Grown
    row_start: int
    num_rows: int
    end: int  # one past the position of the last stored key
    draft: Draft | None = None


@dataclass(frozen=True)
class Branch:
    """A node of a tree of prefixes: what stands behind it."""

    behind: tuple[Prefix, ...]
    children: tuple[Branch | Grown, ...]

    def leaves(self) -> Iterator[Grown]:
        for child in self.children:
            yield from [child] if isinstance(child, Grown) else child.leaves()


class Script:
    """Hands out pages in random order and turns growth into batches. Mutated only by its test."""

    def __init__(self, seed: int, num_pages: int, page_size: int = PAGE_SIZE) -> None:
        self.random = random.Random(seed)
        self.page_size = page_size
        self.free = list(range(num_pages))
        self.random.shuffle(self.free)

    def grow(self, *growth: Growth) -> StepBatch:
        """Each sequence grows by so many rows; each prefix is one `full` segment per run of rows behind it."""
        runs, positions, slots = self._lay_out(growth)
        segments = [self._own(run, run.sequence.own_start) for run in runs]
        segments += [self._full(*shared) for shared in _shared(runs)]
        self.random.shuffle(segments)
        return batch(positions, slots, segments)

    def prefix(self, *, start: int, end: int, behind: tuple[Prefix, ...] = ()) -> tuple[Prefix, StepBatch]:
        """A new prefix behind others, and the batch that computes it."""
        sequence = Grown(behind, length=start)
        step = self.grow((sequence, end - start))
        return Prefix(start, end, sequence.pages), step

    def tree(self, run_step: Callable[[StepBatch], None], behind: tuple[Prefix, ...] = ()) -> Branch:
        """A random tree of prefixes, at most three deep, each computed by run_step, with sequences at its leaves."""
        children: list[Branch | Grown] = []
        start = behind[-1].end if behind else 0
        for _ in range(self.random.randint(1, 3)):
            if len(behind) == 3 or (behind and self.random.random() < 0.4):
                children.append(Grown(behind, length=start))
                continue
            end = start + self.random.randint(1, 3) * self.page_size
            prefix, step = self.prefix(start=start, end=end, behind=behind)
            run_step(step)
            children.append(self.tree(run_step, (*behind, prefix)))
        return Branch(behind, tuple(children))

    def grow_planned(self, tree: Branch, growth: Sequence[Growth]) -> StepBatch:
        """The leaves of a tree, in its order, grow; which prefixes become segments, and how cut, is random."""
        runs, positions, slots = self._lay_out(growth)
        segments = list(self._planned(tree, {id(run.sequence): run for run in runs}, 0))
        self.random.shuffle(segments)
        return batch(positions, slots, segments)

    def draft(self, num_nodes: int) -> Draft:
        """A random tree: each node's parent is any node before it, or the sequence itself."""
        return Draft(tuple(self.random.randrange(-1, node) for node in range(num_nodes)))

    def table(self, pages: Sequence[int]) -> Sequence[int]:
        """A table of pages as some caller may have it: of any kind, with more pages behind it or none."""
        longer = [*pages, *pages[: self.random.randint(0, 2)]]
        return self.random.choice((tuple(longer), longer, array("i", longer)))

    def _lay_out(self, growth: Sequence[Growth]) -> tuple[list[Run], list[int], list[int]]:
        """The runs, and the position and slot of each row."""
        runs: list[Run] = []
        positions: list[int] = []
        slots: list[int] = []
        for sequence, rows in growth:
            draft = rows if isinstance(rows, Draft) else None
            num_rows = rows if isinstance(rows, int) else len(rows.parents)
            depths = [len(path) - 1 for path in draft.paths] if draft else range(num_rows)
            end = sequence.length + num_rows
            runs.append(Run(sequence, len(positions), num_rows, end, draft))
            positions += [sequence.length + depth for depth in depths]
            slots += [self._slot(sequence, position) for position in range(sequence.length, end)]
            sequence.length = sequence.length if draft else end
        return runs, positions, slots

    def _planned(self, branch: Branch, runs: dict[int, Run], pending: int) -> Iterator[Segment]:
        """Segments of the keys from `pending` on, for the rows of all leaves below."""
        below = [runs[id(leaf)] for leaf in branch.leaves() if id(leaf) in runs]
        if branch.behind and below and self.random.random() < 0.6:
            yield from self._cut(branch.behind[-1], pending, below[0].row_start, sum(run.num_rows for run in below))
            pending = branch.behind[-1].end
        for child in branch.children:
            if isinstance(child, Branch):
                yield from self._planned(child, runs, pending)
            elif id(child) in runs:
                yield self._own(runs[id(child)], pending)

    def _cut(self, prefix: Prefix, start: int, row_start: int, num_rows: int) -> Iterator[Segment]:
        """Positions [start, the prefix's end) for the rows, cut at random pages and rows."""
        cuts = sorted({start, prefix.end, self.random.randrange(start, prefix.end, self.page_size)})
        for first, last in pairwise(cuts):
            before = self.random.randint(0, num_rows)
            for at, count in ((row_start, before), (row_start + before, num_rows - before)):
                yield Segment(at, count, self.table(prefix.pages), first, last - first, "full")

    def _own(self, run: Run, start: int) -> Segment:
        pages, num_keys = self.table(run.sequence.pages), run.end - start
        if run.draft is None:
            return Segment(run.row_start, run.num_rows, pages, start, num_keys)
        return Segment(run.row_start, run.num_rows, pages, start, num_keys, "tree", run.draft.mask)

    def _full(self, prefix: Prefix, row_start: int, num_rows: int) -> Segment:
        return Segment(row_start, num_rows, self.table(prefix.pages), prefix.start, prefix.end - prefix.start, "full")

    def _slot(self, sequence: Grown, position: int) -> int:
        page, offset = divmod(position - sequence.own_start, self.page_size)
        if page == len(sequence.own_pages):
            sequence.own_pages.append(self.free.pop())
        return sequence.own_pages[page] * self.page_size + offset


def batch(positions: Sequence[int], slots: Sequence[int], segments: Sequence[Segment]) -> StepBatch:
    return StepBatch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        segments=tuple(segments),
        logit_rows=torch.arange(len(positions)),
    )


def _shared(runs: Sequence[Run]) -> Iterator[tuple[Prefix, int, int]]:
    """Each prefix with the rows behind it, (prefix, row_start, num_rows), consecutive ones joined."""
    open_rows: dict[Prefix, tuple[int, int]] = {}
    for run in runs:
        behind = run.sequence.behind
        for prefix in [prefix for prefix in open_rows if prefix not in behind]:
            yield prefix, *open_rows.pop(prefix)
        for prefix in behind:
            row_start, num_rows = open_rows.get(prefix, (run.row_start, 0))
            open_rows[prefix] = (row_start, num_rows + run.num_rows)
    for prefix, rows in open_rows.items():
        yield prefix, *rows
