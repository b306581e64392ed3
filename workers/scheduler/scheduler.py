"""The scheduler: plan() decides what the next step computes, commit() applies what it gave.

There is no prefill phase and no decode phase. Each sequence has tokens of which `num_computed` are in the cache; a plan
gives each runnable sequence some of its remaining tokens, within a budget. That one rule covers chunked prefill,
prefix hits, decoding, preemption (num_computed falls to zero) and resuming on another worker (tokens start longer).

Prompts are packed into the budget one behind the other, without padding. The first of a step may be split. When a later
one is too long for what is left, prompts of its priority that fit whole are packed in before it, the longest first, and
it is split into the rest. Should that rest be too small, it waits for the next step, once, and then runs first.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from protos.errors import DuplicateRequest, EmptyPrompt, Overloaded, PromptTooLong
from protos.messages import Finish, Load, PositionLogprobs, Request, TokenDelta
from workers.kv.cache import KVCache, PageCopy, PageTable
from workers.scheduler.sequence import Sequence
from workers.scheduler.step import Chunk, ChunkResults, StepPlan, Walk
from workers.speculative.tree import DraftTree

PROMPT_LOGPROB_ROWS = 256  # logits rows that one chunk may ask for beyond the sampled one
PACKING_WINDOW = 16  # waiting prompts looked at to fill what is left of a budget


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler may do at once."""

    step_tokens: int
    max_running: int
    max_waiting: int
    max_context: int


@dataclass(slots=True)
class Counters:
    """Running totals. Mutated only by Scheduler."""

    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    computed_tokens: int = 0
    repeated_tokens: int = 0  # of those, computed before: lost to a preemption, or by another output at the same time
    budget_tokens: int = 0  # the budget of steps that left prompt tokens for later
    budget_used_tokens: int = 0  # of that, used
    prefix_queries_tokens: int = 0
    prefix_hit_tokens: int = 0


@dataclass(slots=True)
class _OpenPlan:
    """A plan while it is being made."""

    budget: int
    chunks: list[Chunk] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    num_prompts: int = 0  # chunks that are a prompt, or what is left of one
    leaves_prompt: bool = False

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.budget -= chunk.num_tokens

    def add_prompt(self, chunk: Chunk) -> None:
        self.add(chunk)
        self.num_prompts += 1
        self.leaves_prompt |= chunk.stop < len(chunk.sequence.tokens)


class Scheduler:
    """Owns every sequence and the KV cache. Used from one thread.

    A plan ends in a commit or a rollback before anything else is asked for: a cancel in between would free pages that
    others in the plan rely on and that nobody has computed yet.
    """

    def __init__(self, limits: Limits, cache: KVCache, eos_token_ids: frozenset[int]) -> None:
        self.counters = Counters()
        self._limits = limits
        self._cache = cache
        self._eos = eos_token_ids
        self._page_size = cache.page_size
        self._waiting: list[Sequence] = []  # by urgency
        self._num_waiting_tokens = 0
        self._running: list[Sequence] = []  # by urgency; the last is preempted first
        self._live: dict[str, list[Sequence]] = {}
        self._arrivals = 0
        self._is_planned = False  # a plan is out that has not been committed or rolled back

    # Requests

    def add(self, request: Request) -> None:
        """Queue a request's outputs. Raises DuplicateRequest, PromptTooLong, Overloaded; then nothing has changed."""
        self._refuse(request)
        stops = frozenset[int]() if request.sampling.ignore_eos else self._eos
        if request.sampling.stop_token_ids:
            stops = stops.union(request.sampling.stop_token_ids)
        done = {point.index for point in request.resume if point.finished}
        resumed = {point.index: point.token_ids for point in request.resume}
        for index in range(request.sampling.n):
            if index not in done:
                tokens = [*request.token_ids, *resumed.get(index, ())]
                sequence = Sequence(request, index, self._arrivals, tokens, PageTable(request.cache_salt), stops)
                self._arrivals += 1
                self._live.setdefault(request.request_id, []).append(sequence)
                self._enqueue(sequence)

    def cancel(self, request_id: str, index: int | None = None) -> list[int]:
        """Drop a request's outputs, or one of them, and free their pages; returns which. Not while a plan is out."""
        assert not self._is_planned, "cancelled between plan and commit"
        dropped = [s for s in self._live.get(request_id, ()) if index is None or s.index == index]
        for sequence in dropped:
            self._remove(sequence)
        return [sequence.index for sequence in dropped]

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def load(self) -> Load:
        remaining = [len(sequence.tokens) - sequence.num_computed for sequence in self._running]
        pending = self._num_waiting_tokens + sum([num_tokens for num_tokens in remaining if num_tokens > 1])
        cache = self._cache
        return Load(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            pending_prefill_tokens=pending,
            kv_used_tokens=(cache.num_pages - cache.num_available) * cache.page_size,
            kv_capacity_tokens=cache.num_pages * cache.page_size,
        )

    @property
    def largest_need(self) -> int:
        """Pages that the longest of all live outputs needs to come to its end."""
        groups = [sequence for group in self._live.values() for sequence in group]
        return max((self._cache.pages_for(sequence.max_length) for sequence in groups), default=0)

    def check(self, others: Iterable[PageTable] = ()) -> None:
        """The invariants between sequences and pages; `others` hold pages too."""
        sequences = [sequence for group in self._live.values() for sequence in group]
        assert sorted(s.arrival for s in sequences) == sorted(s.arrival for s in [*self._waiting, *self._running])
        for sequence in self._waiting:
            assert not sequence.table.pages
            assert sequence.num_computed == 0
        assert self._num_waiting_tokens == sum(s.num_remaining for s in self._waiting)
        for sequence in self._running:
            assert sequence.num_computed < len(sequence.tokens)
            assert len(sequence.table.pages) >= self._cache.pages_for(sequence.num_computed)
        self._cache.check([*(s.table for s in sequences), *others])

    # A step

    def plan(self) -> StepPlan:
        """Fill the token budget: running sequences by urgency first, then waiting ones while memory allows."""
        assert not self._is_planned, "planned twice"
        plan = _OpenPlan(self._limits.step_tokens)
        num_preemptions = self.counters.num_preemptions
        self._plan_running(plan)
        if self.counters.num_preemptions == num_preemptions:
            self._plan_waiting(plan)
        self._is_planned = bool(plan.chunks)
        leaves_prompt = plan.leaves_prompt or bool(self._waiting)
        num_tokens = self._limits.step_tokens - plan.budget
        return StepPlan(tuple(plan.chunks), tuple(plan.copies), tuple(plan.started), num_tokens, leaves_prompt)

    def attach(self, plan: StepPlan, drafts: Mapping[int, DraftTree]) -> StepPlan:
        """The plan with drafts behind its chunks, by their number, as far as they can be used.

        A draft ends where its sequence must end, and takes only what the step's budget and memory have left: nothing
        waits and nobody is preempted for a draft.
        """
        chunks, budget = list(plan.chunks), self._limits.step_tokens - plan.num_tokens
        for number, draft in drafts.items():
            chunk = self._with_draft(chunks[number], draft, budget)
            budget -= chunk.num_tokens - chunks[number].num_tokens
            chunks[number] = chunk
        num_tokens = self._limits.step_tokens - budget
        return replace(plan, chunks=tuple(chunks), num_tokens=num_tokens, num_drafted=num_tokens - plan.num_tokens)

    def commit(self, plan: StepPlan, results: ChunkResults) -> list[TokenDelta]:
        """Apply a computed step: append the sampled tokens, end what has ended, and say what is new."""
        self._is_planned = False
        self._cache.commit()
        self._count_step(plan)
        applied = [self._apply(*computed) for computed in zip(plan.chunks, *results[:4], strict=True)]
        return [delta for delta in applied if delta is not None]

    def rollback(self, plan: StepPlan) -> dict[str, list[int]]:
        """Undo a plan whose computing failed: its requests are dropped, all others are as before.

        Returns the outputs that were dropped, by request.
        """
        self._is_planned = False
        request_ids = dict.fromkeys(chunk.sequence.request.request_id for chunk in plan.chunks)
        dropped = {request_id: self.cancel(request_id) for request_id in request_ids}
        self._cache.rollback()
        return dropped

    # Inside

    def _plan_running(self, plan: _OpenPlan) -> None:
        running, page_size = self._running, self._page_size
        position = 0
        while position < len(running) and plan.budget > 0:
            sequence = running[position]
            position += 1
            length = len(sequence.tokens)
            if sequence.num_computed + 1 < length:
                self._plan_prompt(sequence, plan.budget - self._num_decoding(position), plan)
            elif length <= len(sequence.table.pages) * page_size or self._make_room(sequence, length):
                if length % page_size == 0:
                    self._cache.publish(sequence.table, sequence.tokens, length, pending=True)
                plan.add(Chunk(sequence, length - 1, 1, length, 0, sequence.wants_output))
        plan.leaves_prompt |= position < len(running)

    def _plan_prompt(self, sequence: Sequence, budget: int, plan: _OpenPlan) -> None:
        """Go on with a running sequence's prompt, within what the sequences behind it leave."""
        if budget <= 0:
            plan.leaves_prompt = True
            return
        self._extend_from_cache(sequence)
        num_tokens = self._chunk_size(sequence, budget)
        if self._make_room(sequence, sequence.num_computed + num_tokens):
            plan.add_prompt(self._chunk(sequence, num_tokens))

    def _num_decoding(self, first: int) -> int:
        """Running sequences from this one on that need one token's room in the step."""
        return sum(not sequence.is_prefilling for sequence in self._running[first:])

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Reserve a running sequence's pages at the expense of the least urgent; False if it was that itself."""
        while not self._cache.reserve(sequence.table, num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _plan_waiting(self, plan: _OpenPlan) -> None:
        while plan.budget > 0 and self._waiting and len(self._running) < self._limits.max_running:
            head = self._waiting[0]
            copy = self._admit(head)
            if plan.num_prompts and head.num_remaining > plan.budget and not head.was_passed:
                self._reset(head)
                self._fill_gap(plan, head)
                copy = self._admit(head)
                if plan.budget < min(head.num_remaining, self._page_size):  # too little to be worth a split
                    head.was_passed = True
                    self._reset(head)
                    return
            if not self._start(head, copy, plan):
                return

    def _fill_gap(self, plan: _OpenPlan, head: Sequence) -> None:
        """Start prompts that fit whole into the rest of the budget, longest first, before one that does not.

        They leave the head its place among the running and the pages it needs.
        """
        spare = self._cache.num_available - self._cache.pages_for(len(head.tokens))
        for num_tokens, sequence in self._behind(head):
            num_pages = self._cache.pages_for(len(sequence.tokens))
            if len(self._running) + 1 >= self._limits.max_running:
                return
            if num_tokens > plan.budget or num_pages > spare:
                continue
            copy = self._admit(sequence)
            if self._chunk_size(sequence, plan.budget) < sequence.num_remaining:
                self._reset(sequence)
            elif self._start(sequence, copy, plan):
                spare -= num_pages

    def _behind(self, head: Sequence) -> list[tuple[int, Sequence]]:
        """The next in the queue of the head's priority, with the tokens each would have to compute; longest first."""
        window = self._waiting[1 : 1 + PACKING_WINDOW]
        peers = [sequence for sequence in window if sequence.request.priority == head.request.priority]
        sized = [(len(s.tokens) - self._measure(s), s) for s in peers]
        return sorted(sized, key=lambda entry: -entry[0])

    def _measure(self, sequence: Sequence) -> int:
        """How many of a waiting sequence's tokens the cache has."""
        return self._cache.measure(sequence.table.salt, sequence.tokens, limit=sequence.first_needed_row)

    def _start(self, sequence: Sequence, copy: PageCopy | None, plan: _OpenPlan) -> bool:
        """Run a waiting sequence that has been admitted; False, and it goes on waiting, if there is no memory."""
        num_tokens = self._chunk_size(sequence, plan.budget)
        if not self._cache.reserve(sequence.table, sequence.num_computed + num_tokens):
            self._reset(sequence)
            return False
        self._dequeue(sequence)
        insort(self._running, sequence, key=_urgency)
        plan.copies += [copy] if copy else []
        plan.started += [] if sequence.started else [sequence]
        plan.add_prompt(self._chunk(sequence, num_tokens))
        return True

    def _refuse(self, request: Request) -> None:
        sampling, num_prompt = request.sampling, len(request.token_ids)
        num_total = num_prompt + sampling.max_tokens
        if request.request_id in self._live:
            raise DuplicateRequest(f"request {request.request_id!r} is running already; choose another id")
        if num_prompt == 0:
            raise EmptyPrompt("the prompt has no tokens; give at least one")
        if num_total > self._limits.max_context:
            raise PromptTooLong(
                f"prompt {num_prompt} + max_tokens {sampling.max_tokens} = {num_total} tokens exceed the context of "
                f"{self._limits.max_context}; shorten the prompt or lower max_tokens"
            )
        if self._cache.pages_for(num_total) > self._cache.num_pages:
            raise PromptTooLong(
                f"prompt {num_prompt} + max_tokens {sampling.max_tokens} = {num_total} tokens exceed this worker's KV "
                f"memory of {self._cache.num_pages * self._cache.page_size}; raise engine.kv.num_pages or ask for less"
            )
        if len(self._waiting) + sampling.n > self._limits.max_waiting:
            raise Overloaded(
                f"{len(self._waiting)} outputs wait and {sampling.n} more exceed the limit of "
                f"{self._limits.max_waiting}; try again later",
                retry_after_s=1.0,
            )

    def _extend_from_cache(self, sequence: Sequence) -> None:
        """Use what others have computed of this sequence's next tokens since it last ran."""
        if sequence.is_prefilling:
            limit = sequence.first_needed_row
            sequence.num_computed += self._cache.match(
                sequence.table, sequence.tokens, num_computed=sequence.num_computed, limit=limit
            )

    def _admit(self, sequence: Sequence) -> PageCopy | None:
        """Give a waiting sequence what the cache has of it."""
        limit = sequence.first_needed_row
        found = self._cache.match(sequence.table, sequence.tokens, num_computed=0, limit=limit)
        tail, copy = self._cache.match_tail(sequence.table, sequence.tokens, limit=limit)
        sequence.num_computed = found + tail
        return copy

    def _chunk_size(self, sequence: Sequence, budget: int) -> int:
        """How many tokens the sequence computes within the budget: all that remain, or whole pages if it can."""
        num_tokens = min(sequence.num_remaining, budget)
        if sequence.scores_prompt:
            unscored = sequence.first_needed_row - sequence.num_computed
            num_tokens = min(num_tokens, max(unscored, PROMPT_LOGPROB_ROWS))
        if num_tokens < sequence.num_remaining:
            whole_pages = (sequence.num_computed + num_tokens) // self._page_size * self._page_size
            num_tokens = max(whole_pages - sequence.num_computed, 0) or num_tokens
        return num_tokens

    def _chunk(self, sequence: Sequence, num_tokens: int) -> Chunk:
        start, stop = sequence.num_computed, sequence.num_computed + num_tokens
        self._cache.publish(sequence.table, sequence.tokens, stop, pending=True)
        first, scored = stop, 0
        if sequence.scores_prompt:
            first = max(start, sequence.first_needed_row)
            scored = max(0, min(stop, sequence.num_prompt - 1) - first)
        samples = stop == len(sequence.tokens) and sequence.wants_output
        return Chunk(sequence, start, num_tokens, first, scored, samples)

    def _with_draft(self, chunk: Chunk, draft: DraftTree, budget: int) -> Chunk:
        sequence = chunk.sequence
        assert takes_draft(chunk), "a draft behind a chunk that takes none"
        max_depth = sequence.max_length - len(sequence.tokens) - 1  # the target adds a token of its own
        fitting = [node for node, depth in enumerate(draft.depths) if depth <= max_depth][: max(budget, 0)]
        if not fitting or not self._cache.reserve(sequence.table, len(sequence.tokens) + len(fitting)):
            return chunk
        kept = draft if len(fitting) == len(draft) else draft.keep(fitting)
        return chunk._replace(num_tokens=1 + len(kept), draft=kept)

    def _apply(
        self,
        chunk: Chunk,
        token_id: int | None,
        logprobs: PositionLogprobs | None,
        scored: tuple[PositionLogprobs, ...],
        walk: Walk | None,
    ) -> TokenDelta | None:
        if walk is not None:
            return self._apply_walk(chunk.sequence, walk)
        sequence, start, num_tokens, _, num_scored_rows, _, _ = chunk
        tokens = sequence.tokens
        if not sequence.started:
            self._count_start(sequence, start)
        stop = sequence.num_computed = start + num_tokens
        if start < sequence.num_lost:
            self.counters.repeated_tokens += min(stop, sequence.num_lost) - start
        if stop // self._page_size > sequence.table.num_shared:
            num_adopted = self._cache.publish(sequence.table, tokens, stop, pending=False)
            self.counters.repeated_tokens += num_adopted * self._page_size
        if num_scored_rows:
            sequence.num_prompt_scored += num_scored_rows
            sequence.prompt_logprobs += scored
        if stop < len(tokens):
            return None
        cached_tokens = sequence.cached_tokens if stop == sequence.num_given else None
        prompt_logprobs: tuple[PositionLogprobs, ...] = ()
        if sequence.prompt_logprobs:
            prompt_logprobs, sequence.prompt_logprobs = tuple(sequence.prompt_logprobs), []
        token_ids: tuple[int, ...] = ()
        if token_id is not None:
            token_ids = (token_id,)
            tokens.append(token_id)
            self.counters.generation_tokens += 1
        finish = _finish(sequence)
        if finish is not None:
            self._remove(sequence)
        return TokenDelta(
            sequence.request.request_id,
            sequence.index,
            token_ids,
            () if logprobs is None else (logprobs,),
            finish,
            cached_tokens,
            prompt_logprobs,
        )

    def _apply_walk(self, sequence: Sequence, walk: Walk) -> TokenDelta:
        """Append what a draft's verification gave, up to a token that ends the output."""
        num_before, finish = len(sequence.tokens), None
        for token_id in walk.token_ids:
            sequence.tokens.append(token_id)
            finish = _finish(sequence)
            if finish is not None:
                break
        num_new = len(sequence.tokens) - num_before
        stop = sequence.num_computed = len(sequence.tokens) - 1
        if stop // self._page_size > sequence.table.num_shared:
            num_adopted = self._cache.publish(sequence.table, sequence.tokens, stop, pending=False)
            self.counters.repeated_tokens += num_adopted * self._page_size
        self.counters.generation_tokens += num_new
        if finish is not None:
            self._remove(sequence)
        return TokenDelta(
            sequence.request.request_id, sequence.index, walk.token_ids[:num_new], walk.logprobs[:num_new], finish
        )

    def _count_step(self, plan: StepPlan) -> None:
        counters, num_tokens = self.counters, plan.num_tokens
        counters.num_steps += 1
        counters.computed_tokens += num_tokens
        if plan.leaves_prompt:
            counters.budget_tokens += self._limits.step_tokens
            counters.budget_used_tokens += num_tokens

    def _count_start(self, sequence: Sequence, num_cached: int) -> None:
        sequence.started = True
        sequence.cached_tokens = min(num_cached, sequence.num_prompt)
        self.counters.prompt_tokens += sequence.num_prompt
        self.counters.prefix_queries_tokens += len(sequence.tokens)
        self.counters.prefix_hit_tokens += num_cached

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it waits and is computed again, from the cache as far as that lasts."""
        self.counters.num_preemptions += 1
        sequence.num_lost = max(sequence.num_lost, sequence.num_computed)
        self._running.remove(sequence)
        self._reset(sequence)
        self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_urgency)
        self._num_waiting_tokens += len(sequence.tokens)

    def _dequeue(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._num_waiting_tokens -= len(sequence.tokens)

    def _reset(self, sequence: Sequence) -> None:
        self._cache.release(sequence.table)
        sequence.num_computed = 0

    def _remove(self, sequence: Sequence) -> None:
        self._reset(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._dequeue(sequence)
        group = self._live[sequence.request.request_id]
        group.remove(sequence)
        if not group:
            del self._live[sequence.request.request_id]


def takes_draft(chunk: Chunk) -> bool:
    """Whether a draft may stand behind the chunk: it decodes an output that has begun, one token."""
    sequence = chunk.sequence
    return chunk.num_tokens == 1 and chunk.samples and sequence.started and chunk.start >= sequence.num_prompt


def _urgency(sequence: Sequence) -> tuple[int, int]:
    """Sorts the most urgent first."""
    return (-sequence.request.priority, sequence.arrival)


def _finish(sequence: Sequence) -> Finish | None:
    """Why the sequence ends after its last token, if it does."""
    length, last = len(sequence.tokens), sequence.tokens[-1]
    if last in sequence.stop_token_ids and length >= sequence.min_length:
        return Finish("stop", stop_token_id=last)
    return Finish("length") if length >= sequence.max_length else None
