"""The scheduler: plan() decides what the next step computes, commit() applies what it gave.

There is no prefill phase and no decode phase. Each sequence has tokens of which `num_computed` are in the cache; a plan
gives each runnable sequence some of its remaining tokens, within a budget. That one rule covers chunked prefill,
prefix hits, decoding, preemption (num_computed falls to zero) and resuming on another worker (tokens start longer).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

from protos.errors import DuplicateRequest, EmptyPrompt, Overloaded, PromptTooLong
from protos.messages import Finish, Load, Request, TokenDelta
from workers.kv.cache import KVCache, PageCopy, PageTable
from workers.scheduler.sequence import Sequence
from workers.scheduler.step import Chunk, ChunkResult, StepPlan

PROMPT_LOGPROB_ROWS = 256  # logits rows that one chunk may ask for beyond the sampled one


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
    prefix_queries_tokens: int = 0
    prefix_hit_tokens: int = 0


@dataclass(slots=True)
class _Draft:
    """A plan while it is being made."""

    budget: int
    chunks: list[Chunk] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.chunks.append(chunk)
        self.budget -= chunk.num_tokens


class Scheduler:
    """Owns every sequence and the KV cache. Used from one thread."""

    def __init__(self, limits: Limits, cache: KVCache, eos_token_ids: frozenset[int]) -> None:
        self.counters = Counters()
        self._limits = limits
        self._cache = cache
        self._eos = eos_token_ids
        self._waiting: list[Sequence] = []  # by urgency
        self._running: list[Sequence] = []  # by urgency; the last is preempted first
        self._live: dict[str, list[Sequence]] = {}
        self._arrivals = 0

    # Requests

    def add(self, request: Request) -> None:
        """Queue a request's outputs. Raises DuplicateRequest, PromptTooLong, Overloaded; then nothing has changed."""
        self._refuse(request)
        done = {point.index for point in request.resume if point.finished}
        resumed = {point.index: point.token_ids for point in request.resume}
        for index in range(request.sampling.n):
            if index not in done:
                tokens = [*request.token_ids, *resumed.get(index, ())]
                sequence = Sequence(request, index, self._arrivals, tokens, PageTable(request.cache_salt))
                self._arrivals += 1
                self._live.setdefault(request.request_id, []).append(sequence)
                insort(self._waiting, sequence, key=_urgency)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drop a request's outputs, or one of them, and free their pages."""
        for sequence in list(self._live.get(request_id, ())):
            if index is None or sequence.index == index:
                self._remove(sequence)

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def load(self) -> Load:
        pending = sum(s.num_remaining for s in self._waiting) + sum(
            s.num_remaining for s in self._running if s.is_prefilling
        )
        cache = self._cache
        return Load(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            pending_prefill_tokens=pending,
            kv_used_tokens=(cache.num_pages - cache.num_available) * cache.page_size,
            kv_capacity_tokens=cache.num_pages * cache.page_size,
        )

    def check(self) -> None:
        """The invariants between sequences and pages."""
        sequences = [sequence for group in self._live.values() for sequence in group]
        assert sorted(s.arrival for s in sequences) == sorted(s.arrival for s in [*self._waiting, *self._running])
        for sequence in self._waiting:
            assert not sequence.table.pages
            assert sequence.num_computed == 0
        for sequence in self._running:
            assert sequence.num_computed < len(sequence.tokens)
            assert len(sequence.table.pages) >= self._cache.pages_for(sequence.num_computed)
        self._cache.check(s.table for s in sequences)

    # A step

    def plan(self) -> StepPlan:
        """Fill the token budget: running sequences by urgency first, then waiting ones while memory allows."""
        draft = _Draft(self._limits.step_tokens)
        num_preemptions = self.counters.num_preemptions
        self._plan_running(draft)
        if self.counters.num_preemptions == num_preemptions:
            self._plan_waiting(draft)
        return StepPlan(tuple(draft.chunks), tuple(draft.copies), tuple(draft.started))

    def commit(self, plan: StepPlan, results: Ordered[ChunkResult]) -> list[TokenDelta]:
        """Apply a computed step: append the sampled tokens, end what has ended, and say what is new."""
        self._cache.commit()
        self.counters.num_steps += 1
        self.counters.computed_tokens += plan.num_tokens
        deltas = []
        for chunk, result in zip(plan.chunks, results, strict=True):
            delta = self._apply(chunk, result)
            if delta is not None:
                deltas.append(delta)
        return deltas

    def rollback(self, plan: StepPlan) -> list[str]:
        """Undo a plan whose computing failed: its requests are dropped and named, all others are as before."""
        request_ids = list(dict.fromkeys(chunk.sequence.request.request_id for chunk in plan.chunks))
        for request_id in request_ids:
            self.cancel(request_id)
        self._cache.rollback()
        return request_ids

    # Inside

    def _plan_running(self, draft: _Draft) -> None:
        planned = 0
        while planned < len(self._running) and draft.budget > 0:
            sequence = self._running[planned]
            self._extend_from_cache(sequence)
            while (num_tokens := self._take(sequence, draft.budget)) == 0:
                victim = self._running[-1]
                self._preempt(victim)
                if victim is sequence:
                    return
            draft.add(self._chunk(sequence, num_tokens))
            planned += 1

    def _plan_waiting(self, draft: _Draft) -> None:
        while draft.budget > 0 and self._waiting and len(self._running) < self._limits.max_running:
            sequence = self._waiting[0]
            copy = self._admit(sequence)
            num_tokens = self._take(sequence, draft.budget)
            if num_tokens == 0:
                self._reset(sequence)
                return
            self._waiting.pop(0)
            insort(self._running, sequence, key=_urgency)
            draft.copies += [copy] if copy else []
            draft.started += [] if sequence.started else [sequence]
            draft.add(self._chunk(sequence, num_tokens))

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

    def _take(self, sequence: Sequence, budget: int) -> int:
        """How many tokens the sequence computes in this step, with pages reserved; 0 if there is no memory for any."""
        num_tokens = min(sequence.num_remaining, budget)
        if sequence.request.sampling.prompt_logprobs is not None:
            unscored = sequence.first_needed_row - sequence.num_computed
            num_tokens = min(num_tokens, max(unscored, PROMPT_LOGPROB_ROWS))
        if num_tokens < sequence.num_remaining:
            whole_pages = (sequence.num_computed + num_tokens) // self._cache.page_size * self._cache.page_size
            num_tokens = max(whole_pages - sequence.num_computed, 0) or num_tokens
        return num_tokens if self._cache.reserve(sequence.table, sequence.num_computed + num_tokens) else 0

    def _chunk(self, sequence: Sequence, num_tokens: int) -> Chunk:
        start, stop = sequence.num_computed, sequence.num_computed + num_tokens
        self._cache.publish(sequence.table, sequence.tokens, stop, pending=True)
        first, scored = stop, 0
        if sequence.request.sampling.prompt_logprobs is not None:
            first = max(start, sequence.first_needed_row)
            scored = max(0, min(stop, sequence.num_prompt - 1) - first)
        samples = stop == len(sequence.tokens) and sequence.wants_output
        return Chunk(sequence, start, num_tokens, first, scored, samples)

    def _apply(self, chunk: Chunk, result: ChunkResult) -> TokenDelta | None:
        sequence = chunk.sequence
        if not sequence.started:
            self._count_start(sequence, chunk.start)
        sequence.num_computed = chunk.stop
        sequence.num_prompt_scored += chunk.num_scored_rows
        sequence.prompt_logprobs += result.prompt_logprobs
        self._cache.publish(sequence.table, sequence.tokens, chunk.stop, pending=False)
        if chunk.stop < len(sequence.tokens):
            return None
        is_first = sequence.num_output == 0
        if result.token_id is not None:
            sequence.tokens.append(result.token_id)
            self.counters.generation_tokens += 1
        finish = self._finish(sequence)
        delta = TokenDelta(
            request_id=sequence.request.request_id,
            index=sequence.index,
            token_ids=() if result.token_id is None else (result.token_id,),
            logprobs=() if result.logprobs is None else (result.logprobs,),
            finish=finish,
            cached_tokens=sequence.cached_tokens if is_first else None,
            prompt_logprobs=tuple(sequence.prompt_logprobs),
        )
        sequence.prompt_logprobs = []
        if finish is not None:
            self._remove(sequence)
        return delta

    def _count_start(self, sequence: Sequence, num_cached: int) -> None:
        sequence.started = True
        sequence.cached_tokens = min(num_cached, sequence.num_prompt)
        self.counters.prompt_tokens += sequence.num_prompt
        self.counters.prefix_queries_tokens += len(sequence.tokens)
        self.counters.prefix_hit_tokens += num_cached

    def _finish(self, sequence: Sequence) -> Finish | None:
        sampling = sequence.request.sampling
        if sequence.num_output and sequence.num_output >= sampling.min_tokens:
            last = sequence.tokens[-1]
            if last in sampling.stop_token_ids or (last in self._eos and not sampling.ignore_eos):
                return Finish("stop", stop_token_id=last)
        at_limit = sequence.num_output >= sampling.max_tokens or len(sequence.tokens) >= self._limits.max_context
        return Finish("length") if at_limit else None

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it waits and is computed again, from the cache as far as that lasts."""
        self.counters.num_preemptions += 1
        self._running.remove(sequence)
        self._reset(sequence)
        insort(self._waiting, sequence, key=_urgency)

    def _reset(self, sequence: Sequence) -> None:
        self._cache.release(sequence.table)
        sequence.num_computed = 0

    def _remove(self, sequence: Sequence) -> None:
        self._reset(sequence)
        (self._running if sequence in self._running else self._waiting).remove(sequence)
        group = self._live[sequence.request.request_id]
        group.remove(sequence)
        if not group:
            del self._live[sequence.request.request_id]


def _urgency(sequence: Sequence) -> tuple[int, int]:
    """Sorts the most urgent first."""
    return (-sequence.request.priority, sequence.arrival)
