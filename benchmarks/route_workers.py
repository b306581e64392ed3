"""A worker as the routing simulator sees it: a step takes as long as what it computes and reads, memory is blocks.

A step gives every running output one token and fills the rest of its budget with prompts, first come first served. A
prompt's blocks are found or taken when it starts, so siblings that start together compute what they share once.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from benchmarks.route_traces import Arrival
from protos.messages import KVEvents, Load


@dataclass(frozen=True, slots=True)
class Hardware:
    """One worker. The defaults are in the range of an 8B model in bf16 on one large GPU."""

    prefill_tokens_per_s: float = 20_000.0
    step_s: float = 0.010  # of any step: the weights are read
    row_s: float = 50e-6  # for each output in a step
    key_s: float = 40e-9  # for each key that a step reads
    step_tokens: int = 2048
    max_running: int = 128
    kv_tokens: int = 262_144
    block_size: int = 64
    shares_attention: bool = True  # a prefix is read once in a step for all outputs that share it


class Job:
    """A request on a worker. Mutated only by its worker, and by the router that placed it between two workers."""

    __slots__ = ("arrival", "cached_tokens", "done_tokens", "has_begun", "left_tokens", "new_blocks", "router")

    def __init__(self, arrival: Arrival, router: int) -> None:
        self.arrival = arrival
        self.router = router
        self.has_begun = False  # its first token was made, on whatever worker
        self.done_tokens = 0  # of the output, on workers that were lost
        self.cached_tokens = 0
        self.left_tokens = 0  # of the prompt, still to compute
        self.new_blocks: Sequence[int] = ()  # not in the cache when it started

    @property
    def rest_tokens(self) -> int:
        """Of the output, still to make when it was placed."""
        return self.arrival.output_tokens - self.done_tokens


class BlockCache:
    """Blocks by name, with reference counts; unused ones stay until room is needed, least recently used first.

    Mutated only by its worker. Blocks of answers have no name until they are finished.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._references: dict[int, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._num_nameless = 0
        self._stored: list[int] = []
        self._removed: list[int] = []
        self._told: set[int] = set()

    @property
    def num_used(self) -> int:
        """Blocks that requests hold."""
        return len(self._references) + self._num_nameless

    @property
    def num_shared(self) -> int:
        """Of those, blocks with a name, each counted once."""
        return len(self._references)

    def take(self, hashes: Sequence[int], num_nameless: int) -> int | None:
        """Hold these blocks; how many of the first ones were there. None, and nothing held, if they do not fit."""
        num_cached = next((i for i, name in enumerate(hashes) if not self._has(name)), len(hashes))
        num_new = sum(name not in self._references for name in hashes) + num_nameless
        if self.num_used and self.num_used + num_new > self._num_blocks:
            return None
        for name in hashes:
            self._unused.pop(name, None)
            self._references[name] = self._references.get(name, 0) + 1
        self._num_nameless += num_nameless
        self._shrink()
        return num_cached

    def tell(self, names: Sequence[int]) -> None:
        """These have been computed."""
        fresh = [name for name in names if name not in self._told]
        self._told.update(fresh)
        self._stored.extend(fresh)

    def give(self, hashes: Sequence[int], num_nameless: int, finished: Sequence[int]) -> None:
        """Let go of blocks that `take` gave; `finished` are names for some of the nameless ones."""
        self._num_nameless -= num_nameless
        for name in reversed(finished):  # the ends of chains go first
            self._leave(name, self._references.get(name, 0))
        for name in reversed(hashes):
            self._leave(name, self._references[name] - 1)
        self.tell(finished)
        self._shrink()

    def events(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What was stored and removed since the last time; nothing is in both."""
        stored, removed = self._stored, self._removed
        self._stored, self._removed = [], []
        gone = set(removed)
        kept = tuple(name for name in stored if name in self._told)
        return kept, tuple(gone - self._told)

    def snapshot(self) -> tuple[int, ...]:
        """Every name that was told and not taken back."""
        return tuple(self._told)

    def check(self) -> None:
        """Nothing is used and unused, and all fits but for a single request that is larger than the cache."""
        assert not self._references.keys() & self._unused.keys()
        assert len(self._unused) <= max(0, self._num_blocks - self.num_used)
        assert self._told <= self._references.keys() | self._unused.keys()

    def _has(self, name: int) -> bool:
        return name in self._references or name in self._unused

    def _leave(self, name: int, num_references: int) -> None:
        if num_references:
            self._references[name] = num_references
        else:
            self._references.pop(name, None)
            self._unused[name] = None
            self._unused.move_to_end(name)

    def _shrink(self) -> None:
        while self._unused and len(self._unused) + self.num_used > self._num_blocks:
            name, _ = self._unused.popitem(last=False)
            if name in self._told:
                self._told.discard(name)
                self._removed.append(name)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step did."""

    begun: Sequence[Job]  # got their first token
    ended: Sequence[Job]
    num_rows: dict[int, int]  # outputs that grew, by router


class Worker:
    """One simulated worker. Mutated only by the cluster that it is in."""

    def __init__(self, worker_id: str, hardware: Hardware) -> None:
        self.worker_id = worker_id
        self.busy_s = 0.0
        self.is_stepping = False  # or about to
        self.jobs: dict[Job, None] = {}  # all that it holds, in the order of arrival
        self.cache = BlockCache(hardware.kv_tokens // hardware.block_size)
        self._hardware = hardware
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[Job] = deque()
        self._decoding: dict[int, int] = {}  # outputs by router
        self._ends: list[tuple[int, int, Job]] = []  # a heap of last steps
        self._num_steps = 0
        self._num_begun = 0
        self._sequence = 0
        self._pending_tokens = 0
        self._own_keys = 0  # of running outputs, that nobody shares: made by themselves
        self._context_keys = 0  # of running outputs, their prompts

    @property
    def load(self) -> Load:
        """As it would report it now."""
        num_running = len(self._ends) + len(self._prefilling)
        used_tokens = self.cache.num_shared * self._hardware.block_size + self._own_keys
        return Load(num_running, len(self._waiting), self._pending_tokens, used_tokens, self._hardware.kv_tokens)

    def submit(self, job: Job) -> None:
        """A router placed a request here."""
        self.jobs[job] = None
        self._waiting.append(job)
        self._pending_tokens += job.arrival.num_tokens

    def begin(self) -> float:
        """Start a step; how long it takes."""
        self._admit()
        num_rows = len(self._ends)
        num_prefilled = self._prefill(max(0, self._hardware.step_tokens - num_rows))
        hardware = self._hardware
        shared_keys = self.cache.num_shared * hardware.block_size
        num_keys = self._own_keys + (shared_keys if hardware.shares_attention else self._context_keys)
        compute_s = num_prefilled / hardware.prefill_tokens_per_s + num_rows * hardware.row_s
        duration_s = hardware.step_s + compute_s + num_keys * hardware.key_s * (num_rows > 0)
        self.busy_s += duration_s
        return duration_s

    def commit(self) -> Outcome:
        """The step has ended."""
        self.is_stepping = False
        self._num_steps += 1
        self._own_keys += len(self._ends)
        num_rows = dict(self._decoding)
        ended = self._end()
        begun = []
        while self._prefilling and self._prefilling[0].left_tokens == 0:
            begun.append(self._begin_decoding(self._prefilling.popleft()))
        ended += self._end()  # an answer of one token
        return Outcome(begun, ended, num_rows)

    def lose(self) -> list[Job]:
        """The worker dies: what it held, each with the tokens that it had made."""
        for last_step, _, job in self._ends:
            job.done_tokens += job.rest_tokens - (last_step - self._num_steps)
        return list(self.jobs)

    def events(self) -> KVEvents | None:
        """What changed in the cache since the last time."""
        stored, removed = self.cache.events()
        if not stored and not removed:
            return None
        self._sequence += 1
        return KVEvents(self._sequence, stored, removed)

    def snapshot(self) -> KVEvents:
        """All that is in the cache."""
        return KVEvents(self._sequence, self.cache.snapshot(), snapshot=True)

    def _admit(self) -> None:
        hardware = self._hardware
        while self._waiting and len(self._ends) + len(self._prefilling) < hardware.max_running:
            job = self._waiting[0]
            num_cached = self.cache.take(job.arrival.hashes, self._nameless(job))
            if num_cached is None:
                return
            self._prefilling.append(self._waiting.popleft())
            job.new_blocks = job.arrival.hashes[num_cached:]
            job.cached_tokens = min(num_cached * hardware.block_size, job.arrival.num_tokens - 1)
            job.left_tokens = job.arrival.num_tokens - job.cached_tokens
            self._pending_tokens -= job.cached_tokens

    def _prefill(self, budget: int) -> int:
        left = budget
        for job in self._prefilling:
            num_tokens = min(left, job.left_tokens)
            job.left_tokens -= num_tokens
            left -= num_tokens
            if not left:
                break
        self._pending_tokens -= budget - left
        return budget - left

    def _begin_decoding(self, job: Job) -> Job:
        self._num_begun += 1
        self._decoding[job.router] = self._decoding.get(job.router, 0) + 1
        self._context_keys += job.arrival.num_tokens
        heappush(self._ends, (self._num_steps + job.rest_tokens - 1, self._num_begun, job))
        self.cache.tell(job.new_blocks)
        return job

    def _end(self) -> list[Job]:
        ended = []
        while self._ends and self._ends[0][0] <= self._num_steps:
            job = heappop(self._ends)[2]
            self._decoding[job.router] -= 1
            self._context_keys -= job.arrival.num_tokens
            self._own_keys -= job.rest_tokens - 1
            self.cache.give(job.arrival.hashes, self._nameless(job), job.arrival.output_hashes)
            del self.jobs[job]
            ended.append(job)
        return ended

    def _nameless(self, job: Job) -> int:
        return -(-job.arrival.max_tokens // self._hardware.block_size)
