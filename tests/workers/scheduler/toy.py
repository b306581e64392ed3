"""A toy model for the scheduler: what a slot holds is the prefix it stands for, so wrong sharing shows at once."""

from collections.abc import Sequence

from protos.messages import Finish, Request, Sampling, TokenDelta
from workers.kv.cache import KVCache
from workers.scheduler.scheduler import Limits, Scheduler
from workers.scheduler.step import ChunkResults, StepPlan

VOCAB = 5
EOS = 99


def oracle(tokens: Sequence[int], index: int) -> int:
    """The token that follows."""
    return hash((tuple(tokens), index)) % VOCAB


class Toy:
    """A scheduler with a store of prefixes in place of keys and values."""

    def __init__(
        self, *, num_pages: int = 64, page_size: int = 4, step_tokens: int = 16, num_foreign: int = 0, **limits: int
    ) -> None:
        self.cache = KVCache(num_pages=num_pages, page_size=page_size, max_foreign_pages=num_foreign)
        self.blocks: dict[int, int] = {}  # mapped: number of pages, by first page
        self.next_page = num_pages
        settings = {"max_running": 8, "max_waiting": 100, "max_context": 1000, **limits}
        self.scheduler = Scheduler(Limits(step_tokens=step_tokens, **settings), self.cache, frozenset({EOS}))
        self.store: dict[int, tuple[int, ...]] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.finishes: dict[tuple[str, int], Finish] = {}
        self.deltas: list[TokenDelta] = []
        self.num_computed = 0

    def add(self, request_id: str, prompt: Sequence[int], *, max_tokens: int = 5, **fields: int) -> None:
        sampling = Sampling(seed=0, max_tokens=max_tokens, n=fields.pop("n", 1))
        self.scheduler.add(Request(request_id, tuple(prompt), sampling, **fields))  # type: ignore[arg-type]

    def adopt(self, tokens: Sequence[int]) -> bool:
        """Map a block of these tokens, whole pages, and give it to the cache; False if there is no room."""
        num_pages = len(tokens) // self.cache.page_size
        if not self.cache.make_foreign_room(num_pages):
            return False
        self.settle()
        first, self.next_page = self.next_page, self.next_page + num_pages
        for position in range(len(tokens)):
            self.store[self.slot(first, position)] = tuple(tokens[: position + 1])
        self.blocks[first] = num_pages
        self.cache.adopt("", list(tokens), first, num_pages)
        self.settle()
        self.scheduler.check()
        return True

    def settle(self) -> None:
        """Unmap what is idle: whoever reads it afterwards fails."""
        for first in self.cache.take_idle_blocks():
            for slot in range(self.slot(first, 0), self.slot(first + self.blocks.pop(first), 0)):
                del self.store[slot]

    def step(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert plan.num_tokens <= self.scheduler._limits.step_tokens
        for copy in plan.copies:
            for offset in range(self.cache.page_size):
                self.store[self.slot(copy.target, offset)] = self.store[self.slot(copy.source, offset)]
        for delta in self.scheduler.commit(plan, self.compute(plan)):
            self.deltas.append(delta)
            self.outputs.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
            if delta.finish:
                assert (delta.request_id, delta.index) not in self.finishes
                self.finishes[delta.request_id, delta.index] = delta.finish
        self.settle()
        self.scheduler.check()
        return plan

    def fail(self) -> list[str]:
        """A step whose computing fails; returns the requests that ended with it."""
        dropped = self.scheduler.rollback(self.scheduler.plan())
        self.settle()
        self.scheduler.check()
        return list(dropped)

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")

    def slot(self, page: int, offset: int) -> int:
        return page * self.cache.page_size + offset

    def compute(self, plan: StepPlan) -> ChunkResults:
        """Write every chunk, then read what each row would attend to."""
        size = self.cache.page_size
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.stop):
                page = chunk.sequence.table.pages[position // size]
                assert page < self.cache.num_pages, "a foreign page is written"
                self.store[self.slot(page, position % size)] = tuple(chunk.sequence.tokens[: position + 1])
                self.num_computed += 1
        token_ids = []
        for chunk in plan.chunks:
            tokens, pages = chunk.sequence.tokens, chunk.sequence.table.pages
            for position in range(chunk.stop):
                held = self.store[self.slot(pages[position // size], position % size)]
                assert held == tuple(tokens[: position + 1]), "a row would attend to another prefix"
            token_ids.append(oracle(tokens, chunk.sequence.index) if chunk.samples else None)
        return ChunkResults.of_tokens(token_ids)


def expected(prompt: Sequence[int], num_tokens: int, index: int = 0) -> list[int]:
    """What the toy says alone."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(oracle(tokens, index))
    return tokens[len(prompt) :]
