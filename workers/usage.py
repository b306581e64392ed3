"""How much a worker has to do: what autoscaling goes by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """One worker's part of the load, now or on average over a while. Worker to Serve's controller."""

    queued_tokens: float = 0.0  # token-work that waits at all routers for any worker: each worker says the same
    pending_tokens: float = 0.0  # of prompts that this worker holds and has not computed
    kv_use: float = 0.0  # share of the store of keys and values that live outputs hold
    num_running: float = 0.0  # outputs
    max_running: float = 1.0  # outputs
    first_token_s: float = 0.0  # mean of those made lately, from arrival at the worker; 0: none
