"""A fake engine: the real scheduler's contract with arithmetic in place of a model. For tests of what stands around it.

The token at position p of output i is `next_token(prompt, i, p)`, so a test knows every answer in advance.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from protos.errors import DuplicateRequest
from protos.messages import Finish, Load, ModelInfo, Pin, Request, TokenDelta
from workers.engine.protocol import Adoption, EngineLimits, EngineStats, StepResult
from workers.kv.block import HeldBlock
from workers.kv.journal import Changes

PAGE_SIZE = 32
LIMITS = EngineLimits(max_running=64, step_tokens=2048)


def next_token(prompt: Sequence[int], index: int, position: int, vocab_size: int) -> int:
    """The token the fake makes."""
    return (sum(prompt) * 31 + index * 17 + position * 7) % vocab_size


class FakeEngine:
    """An Engine that yields one known token per output and step. Owns its requests.

    It says that it has limits, and runs all that comes. It has no prefix cache.
    """

    def __init__(
        self,
        model: ModelInfo,
        *,
        limits: EngineLimits = LIMITS,
        capacity_tokens: int = 65_536,
        step_s: float = 0.0,
    ) -> None:
        self._model = model
        self._limits = limits
        self._capacity_tokens = capacity_tokens
        self._step_s = step_s
        self._live: dict[str, tuple[Request, dict[int, int]]] = {}  # request, tokens made by output
        self._num_steps = 0
        self._num_tokens = 0

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    def submit(self, request: Request) -> None:
        if request.request_id in self._live:
            raise DuplicateRequest(f"request {request.request_id!r} is running already; choose another id")
        made = dict.fromkeys(range(request.sampling.n), 0)
        for point in request.resume:
            made[point.index] = len(point.token_ids)
            if point.finished:
                del made[point.index]
        self._live[request.request_id] = (request, made)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        if request_id not in self._live:
            return
        _, made = self._live[request_id]
        made.pop(index, None) if index is not None else made.clear()
        if not made:
            del self._live[request_id]

    def step(self) -> StepResult:
        if self._step_s:
            time.sleep(self._step_s)
        self._num_steps += 1
        started = tuple(key for key, (_, made) in self._live.items() if not any(made.values()))
        deltas = [self._advance(request, index) for request, made in list(self._live.values()) for index in list(made)]
        self._num_tokens += len(deltas)
        return StepResult(tuple(deltas), started=started, num_tokens=len(deltas), num_sequences=len(deltas))

    def wake(self) -> None:
        """A step computes: it is never cut short."""

    def load(self) -> Load:
        used = sum(len(request.token_ids) + sum(made.values()) for request, made in self._live.values())
        return Load(num_running=len(self._live), kv_used_tokens=used, kv_capacity_tokens=self._capacity_tokens)

    def stats(self) -> EngineStats:
        used_pages = -(-self.load().kv_used_tokens // PAGE_SIZE)
        total_pages = self._capacity_tokens // PAGE_SIZE
        return EngineStats(
            num_steps=self._num_steps,
            generation_tokens=self._num_tokens,
            computed_tokens=self._num_tokens,
            kv_free_pages=total_pages - used_pages,
            kv_total_pages=total_pages,
            page_size=PAGE_SIZE,
        )

    def take_kv_changes(self) -> Changes:
        return Changes()

    def kv_blocks(self) -> list[int]:
        return []

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def block_format(self) -> None:
        """It exchanges nothing."""

    def export_prefix(self, salt: str, token_ids: Sequence[int], payload: memoryview) -> bool:
        return False

    def adopt_prefix(self, salt: str, token_ids: Sequence[int], block: HeldBlock) -> Adoption:
        block.close()
        return Adoption(0, "unused")

    def pin(self, pin: Pin) -> None:
        """Nothing is kept."""

    def unpin(self, pin_id: str) -> None:
        """Nothing was kept."""

    def close(self) -> None:
        self._live.clear()

    def _advance(self, request: Request, index: int) -> TokenDelta:
        _, made = self._live[request.request_id]
        position, sampling = made[index], request.sampling
        token_id = next_token(request.token_ids, index, position, self._model.vocab_size)
        made[index] += 1
        stops = token_id in sampling.stop_token_ids and made[index] >= sampling.min_tokens
        finish = Finish("stop", stop_token_id=token_id) if stops else None
        if finish is None and made[index] >= sampling.max_tokens:
            finish = Finish("length")
        if finish is not None:
            self.cancel(request.request_id, index)
        return TokenDelta(
            request.request_id, index, (token_id,), finish=finish, cached_tokens=0 if position == 0 else None
        )
