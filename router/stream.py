"""One accepted request until its one end: from a worker's deltas to the messages a client reads.

Stands between the session, which delivers, and the servicer, which writes. Law 1 is kept here: a stream ends once, in
all its finishes or in one error, and whatever arrives later is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from protos.convert import logprobs_to_proto, output_to_proto
from protos.errors import EngineFailure, HeadwaterError
from protos.messages import Delta, Finish, FinishReason, Request, ResumePoint, joined
from protos.tracing import Event
from protos.v1 import inference_pb2 as pb
from router.metrics import WorkerSeries
from router.work import Work

Clock = Callable[[], float]


class Stream:
    """A live request. Mutated only on the event loop: by its Session (`place`, `deliver`) and by Admission.

    The router keeps everything a take-over by another worker needs: the request, and what each output has emitted.
    `request.request_id` is the id on the session, a new one after each take-over; `client_id` is the client's, which
    may be used again later.
    """

    def __init__(
        self,
        request: Request,
        *,
        client_id: str,
        group_id: str = "",
        model: str,
        created: float,
        prefill_tokens: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`created` is the clock's time of arrival; `prefill_tokens` is what of the prompt no other stream computes."""
        self.request = request
        self._first_id = request.request_id  # on the session; a client's part of it may have any characters
        self.group_id = group_id  # of the group it is of
        self._client_id = client_id
        self.worker_id = ""
        self.error: HeadwaterError | None = None
        self.was_sent = False  # to the worker that has it now
        self.has_progressed = False  # something came from that worker
        self.prefill_tokens = len(request.token_ids) if prefill_tokens is None else prefill_tokens
        self._model = model
        self._clock = clock
        self.created = created
        self.placed: float | None = None  # when a worker was chosen, the first time
        self._series: WorkerSeries | None = None
        self._pending: list[Delta] = []
        self._tokens = {point.index: list(point.token_ids) for point in request.resume}  # of each output so far
        self._finishes: dict[int, FinishReason] = {point.index: "stop" for point in request.resume if point.finished}
        self._num_given = len(self._tokens.get(0, ()))  # by the client
        self._prompt_is_scored = False
        self._resumed: list[float] = []  # when
        self._first_token_at = 0.0
        self._last_token: dict[int, float] = {}  # output index: when its latest tokens came
        self.cached_tokens: int | None = None  # of the prompt, as the first worker said
        self.num_completion_tokens = 0
        self._written = False
        self._wake = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the stream has had its one end."""
        return self.error is not None or len(self._finishes) == self.request.sampling.n

    @property
    def age_s(self) -> float:
        """Seconds since the request arrived."""
        return self._clock() - self.created

    @property
    def usage(self) -> pb.Usage:
        """Tokens counted so far."""
        return pb.Usage(
            prompt_tokens=len(self.request.token_ids),
            cached_tokens=self.cached_tokens or 0,
            completion_tokens=self.num_completion_tokens,
        )

    @property
    def outcome(self) -> str:
        """How the request ended, in one word: the error, or the least complete finish."""
        if self.error is not None:
            return type(self.error).__name__
        reasons = set(self._finishes.values())
        return next((reason for reason in ("abort", "length", "stop") if reason in reasons), "live")

    @property
    def events(self) -> list[Event]:
        """What has happened to it, for its trace."""
        first = [Event("first token", self._first_token_at)] if self._first_token_at else []
        return first + [Event("went on elsewhere", at) for at in self._resumed]

    @property
    def work(self) -> Work:
        """What a worker that has nothing of it must still compute."""
        sampling = self.request.sampling
        rest = [
            sampling.max_tokens - len(self._tokens.get(i, ())) for i in range(sampling.n) if i not in self._finishes
        ]
        repeated = sum(len(tokens) for index, tokens in self._tokens.items() if index not in self._finishes)
        return Work(self.prefill_tokens + repeated, sum(rest), len(rest))

    @property
    def decoded(self) -> tuple[int, float]:
        """Tokens of the first output after its first, and the seconds that they took."""
        num_tokens = len(self._tokens.get(0, ())) - self._num_given - 1
        return (num_tokens, self._last_token[0] - self._first_token_at) if 0 in self._last_token else (0, 0.0)

    @property
    def used_tokens(self) -> int:
        """Token-work done so far: prompt tokens that were not cached, once something has come, and tokens made."""
        prefill_tokens = 0 if self.cached_tokens is None else max(self.prefill_tokens - self.cached_tokens, 0)
        return prefill_tokens + self.num_completion_tokens

    @property
    def certain_tokens(self) -> int:
        """Tokens that an output has at the least: what could end it earlier is left out."""
        sampling = self.request.sampling
        is_certain = sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids
        return sampling.max_tokens if is_certain else sampling.min_tokens

    def place(self, worker_id: str, series: WorkerSeries) -> None:
        """A worker was chosen, the first one or another after a loss."""
        if self._series is None:
            series.prompt_tokens.inc(self.prefill_tokens)
        if self.placed is None:
            self.placed = self._clock()
        self.worker_id = worker_id
        self.was_sent = self.has_progressed = False
        self._series = series

    def resume(self) -> None:
        """Have the request go on where its outputs stand, on whatever worker takes it next (law 2)."""
        indexes = sorted({*self._tokens, *self._finishes})
        points = [ResumePoint(i, tuple(self._tokens.get(i, ())), finished=i in self._finishes) for i in indexes]
        sampling = self.request.sampling
        if self._prompt_is_scored:
            sampling = replace(sampling, prompt_logprobs=None)
        self._resumed.append(self._clock())
        request_id = f"{self._first_id}~{len(self._resumed)}"  # one that no worker has seen
        self.request = replace(self.request, request_id=request_id, resume=tuple(points), sampling=sampling)

    def deliver(self, delta: Delta) -> None:
        """New tokens of one output. A delta that breaks the protocol ends the stream in EngineFailure."""
        if self.ended:
            return
        if delta.index >= self.request.sampling.n or delta.index in self._finishes:
            self.fail(EngineFailure(f"worker {self.worker_id} sent output {delta.index} more than it may; report this"))
            return
        if len(self._tokens.get(delta.index, ())) + len(delta.token_ids) > self.request.sampling.max_tokens:
            self.fail(EngineFailure(f"worker {self.worker_id} sent more tokens than were asked for; report this"))
            return
        self.has_progressed = True
        self._prompt_is_scored |= bool(delta.prompt_logprobs)
        self._tokens.setdefault(delta.index, []).extend(delta.token_ids)
        self._count(delta)
        self._push(delta)

    def fail(self, error: HeadwaterError) -> None:
        """End the stream in an error, unless it has ended."""
        if not self.ended:
            self.error = error
            self._wake.set()

    def abort(self) -> None:
        """End every open output with finish reason ABORT."""
        if self.ended:
            return
        for index in range(self.request.sampling.n):
            if index not in self._finishes:
                self._push(Delta(self.request.request_id, index, "", (), finish=Finish("abort")))

    async def next_response(self) -> pb.GenerateResponse | None:
        """What is new since the last call, in one message; None after the end. Raises the error the stream ended in.

        A slow reader finds everything that came meanwhile in one message; `max_tokens` bounds it.
        """
        while not self._pending and not self.ended:
            self._wake.clear()
            await self._wake.wait()
        if self._pending or (self.error is None and not self._written):
            return self._take()
        if self.error is not None:
            raise self.error
        return None

    def _push(self, delta: Delta) -> None:
        self._pending.append(delta)
        if delta.finish is not None:
            self._finishes[delta.index] = delta.finish.reason
            if self.ended and self._series is not None:
                self._series.e2e_latency.observe(self.age_s)
        self._wake.set()

    def _count(self, delta: Delta) -> None:
        if self.cached_tokens is None:
            self.cached_tokens = delta.cached_tokens
        if not delta.token_ids or self._series is None:
            return
        now = self._clock()
        last = self._last_token.get(delta.index)
        if last is not None:
            self._series.inter_token_latency.observe((now - last) / len(delta.token_ids))
        elif not self._last_token:
            self._series.time_to_first_token.observe(now - self.created)
            self._first_token_at = now
        self._last_token[delta.index] = now
        self.num_completion_tokens += len(delta.token_ids)
        self._series.generation_tokens.inc(len(delta.token_ids))

    def _take(self) -> pb.GenerateResponse:
        deltas, self._pending = self._pending, []
        response = pb.GenerateResponse(
            outputs=coalesce(deltas),
            prompt_logprobs=[logprobs_to_proto(position) for delta in deltas for position in delta.prompt_logprobs],
        )
        if not self._written:
            response.prompt.CopyFrom(self._prompt_info())
            self._written = True
        if self.ended and self.error is None:
            response.usage.CopyFrom(self.usage)
        return response

    def _prompt_info(self) -> pb.PromptInfo:
        return pb.PromptInfo(
            request_id=self._client_id,
            model=self._model,
            num_tokens=len(self.request.token_ids),
            seed=self.request.sampling.seed,
            worker_id=self.worker_id,
        )


def coalesce(deltas: Sequence[Delta]) -> list[pb.OutputDelta]:
    """One delta per output, in order of first appearance: texts and tokens joined, the finish kept."""
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return [output_to_proto(joined(of_output)) for of_output in by_index.values()]
