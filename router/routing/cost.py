"""What a worker would pay for a group, counted in tokens of prefill: the one scale on which policies compare."""

from __future__ import annotations

from dataclasses import dataclass

from router.routing.protocol import Ask, Candidate, Estimate


@dataclass(frozen=True, slots=True)
class CostModel:
    """Cost = prompt to compute x (1 + ahead / `crowd_tokens`) + outputs + attention + `load_weight` x ahead.

    Ahead is the work that is there already, with what will not fit into memory. Whoever is there waits while a prompt
    is computed, so in a crowd computing is dear: where all are busy, copies of a prefix would only make more work, and
    where some are idle they are cheap. How many copies there are thus follows from how uneven the load is, relative to
    the load. Simulated (benchmarks/routing_simulator.py), this keeps the hits of consistent hashing and less than half
    of its waiting; with the load alone as the price, every queue makes copies, and copies make queues.

    What another worker has and can hand over costs `fetch_weight` of computing it.

    Attention while decoding reads keys from memory: `keys_per_token` of them take as long as one token of a prompt. (An
    8B model with 128 KiB of keys and values a token, at 3.3 TB/s and 400 TFLOP/s: 40 ns a key, 40 us a token.) Keys
    that requests already running there share are read for them anyway, so a group that stays together pays once.
    """

    load_weight: float = 0.25  # larger spreads sooner
    crowd_tokens: int = 1024  # larger spreads sooner
    keys_per_token: int = 1024
    fetch_weight: float = 0.15  # of a token taken from another worker's cache, in tokens computed
    foreign_output_tokens: int = 128  # guessed rest of an output that another router sent

    def load_tokens(self, candidate: Candidate) -> int:
        """Work ahead of a newcomer. A report repeats part of what we reserved, so the larger counts."""
        load, reserved = candidate.load, candidate.reserved
        foreign_outputs = max(0, load.num_running + load.num_waiting - reserved.num_outputs)
        prefill_tokens = max(load.pending_prefill_tokens, reserved.prefill_tokens)
        return prefill_tokens + reserved.decode_tokens + foreign_outputs * self.foreign_output_tokens

    def estimate(self, ask: Ask, candidate: Candidate) -> Estimate:
        """The cost of running the group there."""
        cached_tokens, live_tokens = candidate.cached_tokens, candidate.live_tokens
        load_tokens = self.load_tokens(candidate)
        ahead_tokens = load_tokens + self._overflow_tokens(ask, candidate, load_tokens)
        saved_tokens = cached_tokens + int((1 - self.fetch_weight) * candidate.fetchable_tokens)
        cost = self.total(ask, ahead_tokens, cached_tokens=saved_tokens, live_tokens=live_tokens)
        fetchable_tokens = candidate.fetchable_tokens
        return Estimate(candidate.worker_id, cost, cached_tokens, live_tokens, load_tokens, fetchable_tokens)

    def total(self, ask: Ask, ahead_tokens: int, *, cached_tokens: int = 0, live_tokens: int = 0) -> float:
        """The cost with so much ahead. Never falls when that grows. Outputs of a group share a step's reading."""
        prefill_tokens = max(0, ask.num_tokens - cached_tokens)
        num_steps = ask.decode_tokens / max(1, ask.num_outputs)
        num_keys = num_steps * max(0, ask.num_tokens - live_tokens)
        own = (
            prefill_tokens * (1 + ahead_tokens / self.crowd_tokens) + ask.decode_tokens + num_keys / self.keys_per_token
        )
        return own + self.load_weight * ahead_tokens

    def _overflow_tokens(self, ask: Ask, candidate: Candidate, load_tokens: int) -> int:
        """Tokens beyond the capacity once all work ahead and the group's own is done; 0 if no capacity is known."""
        capacity_tokens = candidate.load.kv_capacity_tokens
        if not capacity_tokens:
            return 0
        own_tokens = max(0, ask.num_tokens - candidate.live_tokens) + ask.decode_tokens
        return max(0, candidate.load.kv_used_tokens + load_tokens + own_tokens - capacity_tokens)
