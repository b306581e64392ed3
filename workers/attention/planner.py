"""The planner: which spans of keys the sequences of a step attend to together.

Stands between the prefix tree, which says who shares which pages, and the segments that a backend computes. Attending
together turns many reads of the same keys into one matrix product, but every further segment costs its start, and
every further part of a row costs a merge. What is worth while depends on the machine, so the costs come from outside.

The choice. The batch's paths form a trie; a vertex is a place where they part. Walking down, the keys since some page
`bound` are *pending*. At a vertex, some of the subtrees and branches below it are *cut*: their rows attend together to
the pending pages (one share), and start anew. The others *carry* the pending pages further down. A branch ends by
attending alone to what is pending and to the rest of its keys. The most seconds that the subtree of v can save,
against every branch attending alone from `bound` on, is

    saved(v, bound) = max over cuts T of  sum over c in T      of  rate(c) * span + saved(c, v.page)
                                        + sum over c not in T  of  saved(c, bound)
                                        - (fixed(rows of T) + merge(rows of T) + rate(rows of T) * span   if T else 0)

with span = v.page - bound, rate(m) the seconds per page of m rows, and rate(c) the sum of the rates of the branches
below c, had they attended alone. It is computed from the leaves upwards. Keys after a branch's last vertex do not
enter: the choice depends on the paths and on the numbers of rows alone.

How good it is. Instead of all subsets, T runs over the prefixes of the children sorted by gain per row. Where a
segment's fixed cost, its rate and its merge are together concave in the number of rows, the best T is among them, and
the plan is the best there is: the savings to maximise are then convex over the zonotope that the children's (rows,
gain) span, hence greatest at a corner, and the upper corners are those prefixes. Where rows cost in steps, plans of
random tries came within 1 % of the best, nearly all of them equal to it (tests). Branches that leave at one vertex with
equally many rows are equal in gain, and are one child.

How long it takes. For n branches there are fewer than n vertices with children, each with at most MAX_BOUNDS bounds,
and each of these sorts the children: O(MAX_BOUNDS * n log n), once the paths are sorted and followed. A trie with more
vertices than MAX_BOUNDS above one another is planned well, not perfectly. Once cutting everything is best for a bound
it is best for all bounds further up, and nothing is sorted for these: one segment costs no more a page than the several
that would take its place. Nothing recurses, so depth is no limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, assert_never

MAX_BOUNDS: Final = 32  # places above a vertex from which keys may be pending; more are hardly worth their time
MIN_GROWTH: Final = 32  # keys: a shorter span is seldom worth a segment
MAX_GROWTH: Final = 256  # keys: one plan in so many steps costs nothing that could be measured

Path = tuple[tuple[int, int], ...]
SharingMode = Literal["planned", "never", "root", "all"]


class CostModel(Protocol):
    """What attention costs on this machine. `segment` is affine in num_keys, or nearly so."""

    def segment(self, num_rows: int, num_keys: int) -> float:
        """Seconds of one layer for num_rows rows on num_keys keys that all of them see."""

    def merge(self, num_rows: int) -> float:
        """Seconds of one layer for adding one more part to each of num_rows rows."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One sequence's rows in a step, and the part of its path that others may share."""

    num_rows: int  # query rows in this step: the last of its keys
    num_keys: int  # keys that its last row sees, its own included
    path: Path  # shared tree nodes from the root down: (node id, page at which the node ends)


@dataclass(frozen=True, slots=True)
class Share:
    """A span of pages that consecutive branches (in the grouping's order) attend to together."""

    first: int  # the branches order[first : first + count]
    count: int
    start_page: int
    stop_page: int


@dataclass(frozen=True, slots=True)
class Grouping:
    """Which branches share what. A branch's keys are those of its shares, outermost first, then its own.

    Shares are nested or disjoint in `order`, and nested ones follow one another in pages without a gap.
    """

    order: tuple[int, ...]  # indices of branches: those that share stand side by side
    shares: tuple[Share, ...]  # outer before inner
    own_start: tuple[int, ...]  # by branch, not by place in the order: the page at which its own segment starts


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds that one layer of a step is expected to spend on attention."""

    segment_s: float
    merge_s: float

    @property
    def total_s(self) -> float:
        return self.segment_s + self.merge_s


@dataclass(frozen=True, slots=True)
class PlannerStats:
    """How often a grouping was asked for since the start."""

    num_plans: int  # and had to be worked out
    num_reuses: int  # and the last one still held


class Planner:
    """Groups the branches of each step. Mutated only by the runner that made it.

    `mode`: "planned" shares what pays by `cost`; "never" shares nothing, so every sequence is computed as if it were
    alone; "root" shares only the longest prefix of each group that has one; "all" shares wherever paths agree.
    """

    def __init__(self, cost: CostModel, page_size: int, *, mode: SharingMode = "planned") -> None:
        self._cost = cost
        self._page_size = page_size
        self._mode: SharingMode = mode
        self._planned: tuple[Branch, ...] = ()
        self._grouping = Grouping((), (), ())
        self._stats = PlannerStats(0, 0)

    @property
    def stats(self) -> PlannerStats:
        return self._stats

    def group(self, branches: Sequence[Branch]) -> Grouping:
        """What the branches share in this step; the very same object as before while only decoding went on.

        Paths are taken only as far as whole pages end before a branch's first row. The last grouping is reused while
        the same branches come in the same order with equally many rows, have grown little, and their paths have at
        most grown at the end: it then covers their keys as before, and is as good, as the choice does not depend on
        the keys at a path's end. Growth is limited (an eighth of the keys, within 32 to 256) because sequences that
        go on alike may share pages that they did not have then, and because costs are corrected while running.
        """
        if self._still_holds(branches):
            self._stats = PlannerStats(self._stats.num_plans, self._stats.num_reuses + 1)
            return self._grouping
        self._planned = tuple(branches)
        self._grouping = self._plan(self._planned)
        self._stats = PlannerStats(self._stats.num_plans + 1, self._stats.num_reuses)
        return self._grouping

    def _still_holds(self, branches: Sequence[Branch]) -> bool:
        return len(branches) == len(self._planned) and all(map(_continues, self._planned, branches))

    def _plan(self, branches: tuple[Branch, ...]) -> Grouping:
        alone = Grouping(tuple(range(len(branches))), (), (0,) * len(branches))
        if self._mode == "never" or len(branches) < 2:
            return alone
        vertices = _grow(branches, self._page_size)
        grouping = _lay_out(vertices[0], len(branches), self._choice(branches, vertices))
        return grouping if grouping.shares else alone

    def _choice(self, branches: tuple[Branch, ...], vertices: list[_Vertex]) -> _Choice:
        match self._mode:
            case "planned":
                prices = _Prices(self._cost, self._page_size, max(branch.num_keys for branch in branches))
                for vertex in reversed(vertices):
                    _weigh(vertex, prices)
                return _cut_as_weighed
            case "root":
                return _cut_first
            case "all":
                return _cut_all
            case "never":
                raise AssertionError("nothing to choose")
            case _:
                assert_never(self._mode)


def predict(grouping: Grouping, branches: Sequence[Branch], cost: CostModel, page_size: int) -> Prediction:
    """Seconds of one layer for a grouping. A row's first part needs no merge, so each share costs its rows one."""
    shared_rows = [
        sum(branches[index].num_rows for index in grouping.order[share.first : share.first + share.count])
        for share in grouping.shares
    ]
    own = sum(
        cost.segment(branch.num_rows, branch.num_keys - start * page_size)
        for branch, start in zip(branches, grouping.own_start, strict=True)
    )
    shared = sum(
        cost.segment(num_rows, (share.stop_page - share.start_page) * page_size)
        for num_rows, share in zip(shared_rows, grouping.shares, strict=True)
    )
    return Prediction(own + shared, sum(map(cost.merge, shared_rows)))


def _continues(old: Branch, new: Branch) -> bool:
    """Whether a branch has only been decoded a little since it was planned."""
    growth = new.num_keys - old.num_keys
    return (
        new.num_rows == old.num_rows
        and 0 <= growth <= min(MAX_GROWTH, max(MIN_GROWTH, old.num_keys // 8))
        and (new.path == old.path or _extends(old.path, new.path))
    )


def _extends(old: Path, new: Path) -> bool:
    """Whether a path goes on where another ends: in its last node, which only its own sequence can have grown."""
    if not old:
        return True
    last = len(old) - 1
    return (
        new[:last] == old[:last] and last < len(new) and new[last][0] == old[last][0] and new[last][1] >= old[last][1]
    )


@dataclass(slots=True, eq=False)
class _Vertex:
    """A place in the trie where branches part; or, without children, equal branches that leave it at their parent."""

    page: int  # where the keys that all below share end
    bounds: Sequence[int]  # pages from which keys may be pending here, nearest first
    num_rows: int = 0
    num_branches: int = 0
    children: list[_Vertex] = field(default_factory=list)
    branches: Sequence[int] = ()
    bounds_below: Sequence[int] = ()  # the bounds of the children
    index_below: Sequence[int] = ()  # for each of `bounds`, which of `bounds_below` to go by
    rate: float = 0.0  # seconds per page, if every branch below attends alone
    saved: Sequence[float] = ()  # seconds, for each of `bounds`
    cuts: Sequence[Sequence[_Vertex]] = ()  # the children to cut, for each of `bounds`


_Choice = Callable[[_Vertex, int, int], Sequence[_Vertex]]  # (vertex, pending from page, index in its bounds) -> cut
_Cut = tuple[float, Sequence[_Vertex]]  # seconds saved, children to cut
_NOTHING_SAVED: Final = (0.0,) * MAX_BOUNDS


def _cut_as_weighed(vertex: _Vertex, _start: int, index: int) -> Sequence[_Vertex]:
    return vertex.cuts[index]


def _cut_first(vertex: _Vertex, start: int, _index: int) -> Sequence[_Vertex]:
    return vertex.children if start == 0 and vertex.page > 0 else []


def _cut_all(vertex: _Vertex, start: int, _index: int) -> Sequence[_Vertex]:
    return vertex.children if vertex.page > start else []


def _grow(branches: Sequence[Branch], page_size: int) -> list[_Vertex]:
    """The trie of the branches' paths, parents before children. Nodes that part nobody belong to the next that does."""
    members: dict[Path, list[int]] = {}
    for index, branch in enumerate(branches):
        path, num_pages = branch.path, (branch.num_keys - branch.num_rows) // page_size
        if path and path[-1][1] > num_pages:
            path = _clipped(path, num_pages)
        members.setdefault(path, []).append(index)
    paths = sorted(members)
    root = _Vertex(0, [0])
    vertices = [root]
    stack = [(root, 0, len(paths), 0)]  # vertex, its paths[low:high], nodes in which they are known to agree
    while stack:
        vertex, low, high, depth = stack.pop()
        depth, is_inside = _agree(vertex, paths[low], paths[high - 1], depth)
        _set_bounds_below(vertex)
        leaving: list[int] = []
        while low < high:
            path = paths[low]
            if len(path) == depth or (is_inside and path[depth][1] == vertex.page):
                leaving += members[path]
                low += 1
                continue
            end = _run_end(paths, low, high, depth)
            if end - low == 1 and len(members[path]) == 1:
                leaving += members[path]
            else:
                child = _Vertex(0, vertex.bounds_below)
                vertex.children.append(child)
                vertices.append(child)
                stack.append((child, low, end, depth))
            low = end
        vertices += _add_leaves(vertex, leaving, branches)
    for vertex in reversed(vertices):
        for child in vertex.children:
            vertex.num_rows += child.num_rows
            vertex.num_branches += child.num_branches
    return vertices


def _clipped(path: Path, num_pages: int) -> Path:
    """The part of a path in the first pages; its last node may end early."""
    kept: list[tuple[int, int]] = []
    start = 0
    for node, end in path:
        if start >= num_pages:
            break
        kept.append((node, min(end, num_pages)))
        start = end
    return tuple(kept)


def _agree(vertex: _Vertex, first: Path, last: Path, depth: int) -> tuple[int, bool]:
    """Set the page at which sorted paths part, given the first and the last: all between agree as far as these.

    Returns the number of nodes in which they agree, and whether they part inside the next, where some are clipped.
    """
    size = len(first)
    if first is last:
        depth = size
    while depth < size and first[depth] == last[depth]:
        depth += 1
    is_inside = depth < size and first[depth][0] == last[depth][0]
    if is_inside:
        vertex.page = first[depth][1]
    elif depth:
        vertex.page = first[depth - 1][1]
    return depth, is_inside


def _run_end(paths: list[Path], low: int, high: int, depth: int) -> int:
    """The end of the paths from `low` on whose next node is the same."""
    node = paths[low][depth][0]
    if paths[high - 1][depth][0] == node:
        return high
    end = low + 1
    while paths[end][depth][0] == node:
        end += 1
    return end


def _set_bounds_below(vertex: _Vertex) -> None:
    """A vertex's own page joins the bounds of its children.

    Past MAX_BOUNDS the bound whose neighbours are closest gives way: what is pending from there is treated as if it
    were pending from the next, which is worth nearly the same.
    """
    bounds = vertex.bounds
    if vertex.page == bounds[0]:
        vertex.bounds_below, vertex.index_below = bounds, range(len(bounds))
        return
    below = [vertex.page, *bounds]
    vertex.bounds_below, vertex.index_below = below, range(1, len(below))
    if len(below) > MAX_BOUNDS:
        lost = min(range(1, len(below) - 1), key=lambda i: below[i - 1] - below[i + 1])
        del below[lost]
        vertex.index_below = [i - (i >= lost) for i in vertex.index_below]


def _add_leaves(vertex: _Vertex, leaving: list[int], branches: Sequence[Branch]) -> list[_Vertex]:
    """Branches that part from all others at a vertex become its children, together if they have equally many rows."""
    equal: dict[int, list[int]] = {}
    for index in leaving:
        equal.setdefault(branches[index].num_rows, []).append(index)
    leaves = [
        _Vertex(vertex.page, vertex.bounds_below, num_rows * len(indices), len(indices), branches=indices)
        for num_rows, indices in equal.items()
    ]
    vertex.children += leaves
    return leaves


class _Prices:
    """What a share costs by its number of rows, read off the cost model once per plan. Mutated only by itself."""

    def __init__(self, cost: CostModel, page_size: int, num_keys: int) -> None:
        self._cost = cost
        self._page_size = page_size
        self._long = max(2, num_keys // page_size)  # pages: the line goes through one page and this many
        self._known: dict[int, tuple[float, float]] = {}

    def of(self, num_rows: int) -> tuple[float, float]:
        """Seconds that do not depend on the keys, merge included, and seconds per page."""
        known = self._known.get(num_rows)
        if known is None:
            short = self._cost.segment(num_rows, self._page_size)
            rate = (self._cost.segment(num_rows, self._long * self._page_size) - short) / (self._long - 1)
            known = self._known[num_rows] = (max(0.0, short - rate) + self._cost.merge(num_rows), rate)
        return known


def _weigh(vertex: _Vertex, prices: _Prices) -> None:
    """The most that a vertex whose children are weighed can save, and the cuts that do so, for each of its bounds."""
    children = vertex.children
    if not children:
        vertex.rate = vertex.num_branches * prices.of(vertex.num_rows // vertex.num_branches)[1]
        vertex.saved = _NOTHING_SAVED
        return
    vertex.rate = sum([child.rate for child in children])
    best = _best_cuts(vertex, prices) if any(child.children for child in children) else _leaf_cuts(vertex, prices)
    vertex.saved, vertex.cuts = [saved for saved, _ in best], [cut for _, cut in best]


def _best_cuts(vertex: _Vertex, prices: _Prices) -> list[_Cut]:
    """The best cut for each bound, nearest first."""
    children = vertex.children
    fixed, rate = prices.of(vertex.num_rows)
    saved_anew = sum([child.saved[0] for child in children])
    best: list[_Cut] = []
    cut: Sequence[_Vertex] = ()
    for bound, below in zip(vertex.bounds, vertex.index_below, strict=True):
        span = vertex.page - bound
        if len(cut) == len(children):
            saved = (vertex.rate - rate) * span + saved_anew - fixed
        else:
            saved, cut = _best_cut(children, span, below, prices)
        best.append((saved, cut))
    return best


def _leaf_cuts(vertex: _Vertex, prices: _Prices) -> list[_Cut]:
    """The best cut for each bound where all children are leaves: the same few candidates for all of them."""
    leaves = sorted(vertex.children, key=lambda leaf: leaf.rate / leaf.num_rows, reverse=True)
    candidates: list[tuple[float, float, int]] = []  # seconds saved per page, seconds lost, children
    together, num_rows, num_branches = 0.0, 0, 0
    for count, leaf in enumerate(leaves, 1):
        together += leaf.rate
        num_rows += leaf.num_rows
        num_branches += leaf.num_branches
        if num_branches > 1:
            fixed, rate = prices.of(num_rows)
            candidates.append((together - rate, fixed, count))
    spans = [vertex.page - bound for bound in vertex.bounds]
    best = [max([(gain * span - fixed, count) for gain, fixed, count in candidates]) for span in spans]
    return [(saved, leaves[:count]) if saved > 0 else (0.0, ()) for saved, count in best]


def _best_cut(children: list[_Vertex], span: int, below: int, prices: _Prices) -> _Cut:
    """The most seconds saved, and the children to cut for it: none, or some that gain most per row."""
    carried = 0.0
    gains: list[tuple[float, int]] = []  # seconds per row, child
    for index, child in enumerate(children):
        saved = child.saved
        carried += saved[below]
        gain = child.rate * span + saved[0] - saved[below]
        if gain > 0:
            gains.append((gain / child.num_rows, index))
    gains.sort(reverse=True)
    best, num_cut = carried, 0
    total, num_rows = carried, 0
    for count, (gain, index) in enumerate(gains, 1):
        child = children[index]
        num_rows += child.num_rows
        total += gain * child.num_rows
        if count == 1 and (child.children or child.num_branches == 1):
            continue  # cutting one child alone only adds a segment to what the child can do itself
        fixed, rate = prices.of(num_rows)
        if total - fixed - rate * span > best:
            best, num_cut = total - fixed - rate * span, count
    return best, [children[index] for _, index in gains[:num_cut]]


def _lay_out(root: _Vertex, num_branches: int, choose: _Choice) -> Grouping:
    """Walk the trie from the root, cut children first, so that the branches of every share stand side by side."""
    order: list[int] = []
    shares: list[Share] = []
    own_start = [0] * num_branches
    stack = [(root, 0, 0)]  # vertex, page from which keys are pending, the nearest of the vertex's bounds
    while stack:
        vertex, start, index = stack.pop()
        for branch in vertex.branches:
            own_start[branch] = start
        order += vertex.branches
        if not vertex.children:
            continue
        cut = choose(vertex, start, index)
        if cut:
            shares.append(Share(len(order), sum(child.num_branches for child in cut), start, vertex.page))
        chosen, below = set(cut), vertex.index_below[index]
        stack += [(child, start, below) for child in reversed(vertex.children) if child not in chosen]
        stack += [(child, vertex.page, 0) for child in reversed(cut)]
    return Grouping(tuple(order), tuple(shares), tuple(own_start))
