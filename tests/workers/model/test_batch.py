"""A batch that is moved on in place is the batch that would have been made anew, whoever joins, leaves or forks."""

import random
from collections.abc import Callable

import pytest
import torch

from protos.messages import Request, Sampling
from workers.attention.cost import DEFAULT_COST, Corrected
from workers.attention.planner import Planner, SharingMode
from workers.attention.protocol import StepBatch, check_segment
from workers.attention.segments import SegmentTable
from workers.kv.cache import KVCache
from workers.model.batch import AttentionWork, BatchBuilder
from workers.scheduler.scheduler import Limits, Scheduler
from workers.scheduler.step import ChunkResults, StepPlan

PAGE_SIZE = 4


class Steps:
    """A scheduler and a builder, and a check of every batch against the plan alone."""

    def __init__(self, *, num_pages: int = 64, mode: SharingMode = "all", max_running: int = 8) -> None:
        self.cache = KVCache(num_pages=num_pages, page_size=PAGE_SIZE)
        self.scheduler = Scheduler(Limits(64, max_running, 100, 1000), self.cache, frozenset())
        cost = Corrected(DEFAULT_COST)
        planner = Planner(cost, PAGE_SIZE, mode=mode)
        self.builder = BatchBuilder(planner, cost, self.cache, page_size=PAGE_SIZE, device=torch.device("cpu"))
        self.batches: list[StepBatch] = []
        self.work = AttentionWork()

    def add(self, name: str, prompt: range, *, num_tokens: int = 40, n: int = 1, priority: int = 0) -> None:
        sampling = Sampling(seed=0, max_tokens=num_tokens, n=n)
        self.scheduler.add(Request(name, tuple(prompt), sampling, priority=priority))

    def step(self, token: Callable[[int], int] = lambda index: 7) -> StepPlan:
        """`token(index)`: what the chunk of this index samples."""
        plan = self.scheduler.plan()
        if plan.chunks:
            batch = self.builder.build(plan)
            self.builder.check()
            self.compare(plan, batch)
            self.batches.append(batch)
            token_ids = [token(index) if chunk.samples else None for index, chunk in enumerate(plan.chunks)]
            self.scheduler.commit(plan, ChunkResults.of_tokens(token_ids))
        self.scheduler.check()
        return plan

    def compare(self, plan: StepPlan, batch: StepBatch) -> None:
        seen = keys_by_row(batch)
        rows = iter(batch.logit_rows.tolist())
        for chunk in plan.chunks:
            row = next(rows)  # the chunk's last
            pages = chunk.sequence.table.pages
            slots = [pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for at in range(chunk.stop)]
            assert batch.positions[row] == chunk.stop - 1
            assert batch.token_ids[row] == chunk.sequence.tokens[chunk.stop - 1]
            assert batch.slots[row] == slots[-1]
            assert sorted(seen[row]) == sorted(slots)
        read = sum(segment.num_keys for segment in batch.segments)
        needed = sum(chunk.stop for chunk in plan.chunks)
        self.work = self.work.plus(AttentionWork(len(batch.segments), needed, read))
        assert self.builder.work == self.work

    def num_batches(self) -> int:
        return len({id(batch) for batch in self.batches})


def keys_by_row(batch: StepBatch) -> dict[int, list[int]]:
    """The slots of the keys that each row sees."""
    seen: dict[int, list[int]] = {row: [] for row in range(len(batch.positions))}
    for segment in batch.segments:
        check_segment(segment, PAGE_SIZE)
        for i in range(segment.num_rows):
            later = segment.num_rows - 1 - i if segment.kind == "causal" else 0
            for at in range(segment.key_start, segment.key_start + segment.num_keys - later):
                seen[segment.row_start + i].append(segment.pages[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE)
    return seen


def test_a_batch_goes_on_over_the_ends_of_pages() -> None:
    steps = Steps(mode="never")
    for index, length in enumerate((3, 8, 13)):
        steps.add(f"{index}", range(100 * index, 100 * index + length))
    for _ in range(3 * PAGE_SIZE + 1):
        steps.step(lambda index: index)
    assert steps.num_batches() == 2  # the prompts, then one that went on


@pytest.mark.parametrize("mode", ["never", "all"])
def test_who_joins_and_leaves_in_the_middle_is_laid_out_anew(mode: SharingMode) -> None:
    steps = Steps(mode=mode)
    for name in "abc":
        steps.add(name, range(9))
    for _ in range(7):
        steps.step(lambda index: index)
    steps.scheduler.cancel("a")  # whose page table a share may have been read by
    for _ in range(3):
        steps.step(lambda index: index)
    steps.add("d", range(9))
    for _ in range(7):
        steps.step(lambda index: index)
    steps.scheduler.cancel("b")
    steps.add("b", range(50, 70))
    for _ in range(7):
        steps.step(lambda index: index)


def test_a_sequence_that_ends_as_another_begins_is_not_taken_for_it() -> None:
    steps = Steps(max_running=1)
    for name in "abcd":
        steps.add(name, range(5), num_tokens=6)
    for _ in range(40):
        steps.step()
    assert not steps.scheduler.has_work


def test_outputs_that_fork_and_go_on_alike_share_pages() -> None:
    steps = Steps()
    steps.add("a", range(10), n=4)
    for at in range(30):
        steps.step(lambda index, at=at: index if at > 12 else 1)  # type: ignore[misc]
    assert steps.builder.work.read_keys < steps.builder.work.needed_keys


def test_the_preempted_come_back_with_other_pages() -> None:
    steps = Steps(num_pages=16, mode="never")
    for name in "abc":
        steps.add(name, range(ord(name) * 20, ord(name) * 20 + 7), num_tokens=30)
    while steps.scheduler.has_work:
        steps.step(lambda index: index)
    assert steps.scheduler.counters.num_preemptions > 0


def test_a_table_that_is_emptied_ends_the_batch() -> None:
    steps = Steps(mode="never")
    steps.add("a", range(6))
    for _ in range(3):
        steps.step()
    before = steps.cache.version
    steps.scheduler.cancel("a")
    assert steps.cache.version > before


def test_a_failed_step_is_not_gone_on_from() -> None:
    steps = Steps()
    for name in "ab":
        steps.add(name, range(6))
    for _ in range(3):
        steps.step()
    plan = steps.scheduler.plan()
    steps.builder.build(plan)
    steps.work = steps.builder.work
    steps.scheduler.rollback(plan)
    for name in "ab":
        steps.add(name, range(6))
    for _ in range(6):
        steps.step()


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_events_gives_the_batch_of_the_plan(seed: int) -> None:
    random_ = random.Random(seed)
    steps = Steps(num_pages=random_.choice([20, 64]), mode=random_.choice(["all", "planned", "root"]))
    for number in range(120):
        if random_.random() < 0.15:
            start = random_.choice([0, 0, 500])
            length = random_.randint(1, 24)
            n = random_.choice([1, 1, 3])
            steps.add(f"{number}", range(start, start + length), num_tokens=random_.randint(1, 20), n=n)
        if random_.random() < 0.05:
            steps.scheduler.cancel(f"{random_.randrange(number + 1)}")
        steps.step(lambda index: random_.randint(0, 1))


def test_a_table_gives_the_segments_that_went_in() -> None:
    steps = Steps()
    steps.add("a", range(9), n=2)
    for _ in range(2):
        steps.step()
    segments = steps.batches[-1].segments
    assert isinstance(segments, SegmentTable)
    listed = [*segments]
    assert len(segments) == len(listed)
    assert listed[0] in segments
    assert [*SegmentTable(listed)] == listed
