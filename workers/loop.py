"""The engine loop: one thread that owns the engine, steps it, and turns tokens into text.

Sessions hand work in from the event loop and get frames back, at most one per step; the event loop itself never waits
for a step. What the steps change in the prefix cache goes to every open session, with frames that it gets anyway.
Every request that was taken ends in exactly one finish per output, or in one failure.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import NamedTuple, assert_never

from tokenizers import Tokenizer

from protos.errors import DeadlineExceeded, Draining, EngineFailure, HeadwaterError
from protos.messages import Delta, Failure, KVEvents, Load, Pin, Request, TokenDelta
from protos.tracing import Tracer
from workers import spans
from workers.engine.protocol import Engine, EngineStats, StepResult
from workers.kv.block import HeldBlock
from workers.metrics import WorkerMetrics
from workers.outbox import Outbox
from workers.priority import give_way
from workers.resumption import take_up
from workers.text import OutputText, TokenTexts, to_delta

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row; then the engine is taken for broken
STATS_AGE_S = 0.1  # far less than between two scrapes
ENDED_DEADLINES = 1024  # deadlines of ended requests kept before they are cleared out
PROMPT_TOKENS = 128  # a step of so many tokens, and of so many for each output, tells how fast prompts are computed
PROMPT_TOKENS_PER_OUTPUT = 4
RATE_LEARNING = 0.2
NOTHING = StepResult()


class Frame(NamedTuple):
    """What the steps since the last frame gave the requests of one session, and changed in the prefix cache.

    Engine thread to event loop.
    """

    session: int
    step: int  # the latest
    deltas: tuple[Delta | Failure, ...]
    load: Load
    kv_events: KVEvents | None = None  # come before the deltas


@dataclass(frozen=True, slots=True)
class _Opened:
    session: int


@dataclass(frozen=True, slots=True)
class _Closed:
    session: int


@dataclass(frozen=True, slots=True)
class _Resynced:
    session: int


@dataclass(frozen=True, slots=True)
class _Submitted:
    session: int
    request: Request


@dataclass(frozen=True, slots=True)
class _Cancelled:
    session: int
    request_id: str


@dataclass(frozen=True, slots=True)
class _Paced:
    session: int
    interval_s: float


@dataclass(frozen=True, slots=True)
class _Pinned:
    session: int
    pin: Pin


@dataclass(frozen=True, slots=True)
class _Unpinned:
    session: int
    pin_id: str


@dataclass(frozen=True, slots=True)
class _Adopted:
    salt: str
    token_ids: Sequence[int]
    block: HeldBlock


@dataclass(frozen=True, slots=True)
class _Exported:
    salt: str
    token_ids: Sequence[int]
    payload: memoryview
    done: Future[bool]


@dataclass(slots=True)
class _Live:
    """A request that has not ended. Mutated only by EngineLoop."""

    session: int
    request_id: str  # the caller's
    num_prompt: int
    outputs: dict[int, OutputText]
    arrived: float
    traceparent: str = ""
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    num_tokens: int = 0


_OpenCommand = _Closed | _Resynced | _Submitted | _Cancelled | _Paced | _Pinned | _Unpinned  # only of open sessions
_Command = _Opened | _Adopted | _Exported | _OpenCommand
_Waits = dict[float, int]  # number of tokens, by seconds since the one before


class EngineLoop:
    """Runs one engine on a thread of its own until stopped."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        metrics: WorkerMetrics,
        *,
        deliver: Callable[[list[Frame]], None],
        stall_s: float,
        niceness: int = 0,
        tracer: Tracer | None = None,
    ) -> None:
        """`niceness`: by how much this thread gives way to others on shared cores; `tracer` None: traces nothing."""
        self._engine = engine
        self._tracer = tracer or Tracer(None, role="worker", instance="")
        self._niceness = niceness
        self._texts = TokenTexts(tokenizer)
        self._metrics = metrics
        self._deliver = deliver
        self._stall_s = stall_s
        self._inbox: deque[_Command] = deque()
        self._wake = threading.Condition()
        self._live: dict[str, _Live] = {}  # by the engine's id
        self._outboxes: dict[int, Outbox] = {}  # by open session
        self._pins: dict[int, set[str]] = {}  # the engine's ids, by open session
        self._held: set[int] = set()  # names of the blocks in the prefix cache, after the last step
        self._prefill_rate: float | None = None
        self._deadlines: list[tuple[float, str]] = []
        self._load = engine.load()
        self._stats = engine.stats()
        self._stats_taken = time.monotonic()
        self._stats_of: frozenset[str] = frozenset()  # who was live then
        self._step_began: float | None = None
        self._num_steps = 0
        self._num_failed_steps = 0
        self._draining = False
        self._stopping = False
        self._broken: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From the event loop

    @property
    def load(self) -> Load:
        """The load after the last step."""
        return self._load._replace(draining=True) if self._draining else self._load

    @property
    def stats(self) -> EngineStats:
        """The engine's totals after the last step; while the same requests run, up to STATS_AGE_S old."""
        return self._stats

    @property
    def num_live(self) -> int:
        return len(self._live) + len(self._inbox)

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """How fast steps with long prompts have gone of late; None before the first."""
        return self._prefill_rate

    def num_held(self, names: Sequence[int]) -> int:
        """How many leading blocks of a prompt, by name, the prefix cache had after the last step. Any thread."""
        return next((at for at, name in enumerate(names) if name not in self._held), len(names))

    def start(self) -> None:
        self._thread.start()

    def open(self, session: int) -> None:
        """Begin a session: frames go to it from now on, the first with a snapshot of the prefix cache."""
        self._put(_Opened(session))

    def close(self, session: int) -> None:
        """End a session and drop all its requests. Nothing comes back, not even for what it hands in later."""
        self._put(_Closed(session))

    def resync(self, session: int) -> None:
        """Tell a session the whole contents of the prefix cache again."""
        self._put(_Resynced(session))

    def submit(self, session: int, request: Request) -> None:
        """Hand a request in; what becomes of it comes back in frames."""
        self._put(_Submitted(session, request))

    def cancel(self, session: int, request_id: str) -> None:
        """Drop one request of a session. Nothing comes back."""
        self._put(_Cancelled(session, request_id))

    def pin(self, session: int, pin: Pin) -> None:
        """Compute a prefix and keep it, until it is unpinned or the session is closed."""
        self._put(_Pinned(session, pin))

    def unpin(self, session: int, pin_id: str) -> None:
        """End a pin of a session."""
        self._put(_Unpinned(session, pin_id))

    def adopt(self, salt: str, token_ids: Sequence[int], block: HeldBlock) -> None:
        """Hand the engine a block of these tokens, before whatever is submitted next. The block is the engine's."""
        self._put(_Adopted(salt, token_ids, block))

    def export(self, salt: str, token_ids: Sequence[int], payload: memoryview) -> Future[bool]:
        """Have the engine fill a block's payload, between two steps; see Engine.export_prefix. Safe from any thread."""
        done = Future[bool]()
        self._put(_Exported(salt, token_ids, payload, done))
        return done

    def pace(self, session: int, interval_s: float) -> None:
        """Let a session's tokens wait for others, but for an output's first and last: a frame every `interval_s`."""
        self._put(_Paced(session, interval_s))

    def drain(self) -> None:
        """Refuse new requests from now on; live ones go on."""
        self._draining = True

    def check(self) -> None:
        """Raises EngineFailure if the engine is broken or hangs."""
        if self._broken is not None:
            raise EngineFailure(self._broken)
        if not self._thread.is_alive() and not self._stopping:
            raise EngineFailure("the engine thread has ended")
        began = self._step_began
        if began is not None and time.monotonic() - began > self._stall_s:
            raise EngineFailure(f"a step has been running for more than {self._stall_s} s")

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the step it is in. The engine is its maker's to close."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._engine.wake()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _put(self, command: _Command) -> None:
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()
        self._engine.wake()

    # On the engine thread

    def _run(self) -> None:
        give_way(self._niceness)
        while self._wait_for_work():
            self._turn()

    def _turn(self) -> None:
        """Do what has been asked for, then a step, and send what came of it."""
        try:
            self._take_commands()
            self._expire()
            self._step()
            self._look()
            self._tell_changes()
        except Exception as error:
            log.exception("the engine loop failed")
            self._break(f"the engine failed: {error}")
        self._send()

    def _look(self) -> None:
        """Note the engine's state: the load for the step's frames, and old totals, or those of other requests, anew."""
        self._load = self._engine.load()
        now = time.monotonic()
        if not self._live or now - self._stats_taken > STATS_AGE_S or self._live.keys() != self._stats_of:
            self._stats, self._stats_taken, self._stats_of = self._engine.stats(), now, frozenset(self._live)

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._stopping and not self._inbox and not self._has_work:
                self._wake.wait()
            return not self._stopping

    @property
    def _has_work(self) -> bool:
        """Requests, or prefixes to be pinned."""
        return bool(self._live) or (self._broken is None and self._engine.has_work)

    def _take_commands(self) -> None:
        while self._inbox:
            command = self._inbox.popleft()
            if isinstance(command, _Opened):
                self._outboxes[command.session] = Outbox()
                self._pins[command.session] = set()
            elif isinstance(command, _Adopted):
                self._adopt(command)
            elif isinstance(command, _Exported):
                self._export(command)
            elif outbox := self._outboxes.get(command.session):
                self._obey(command, outbox)

    def _obey(self, command: _OpenCommand, outbox: Outbox) -> None:
        match command:
            case _Submitted(session, request):
                self._accept(session, request)
            case _Paced(_, interval_s):
                outbox.interval_s = interval_s
            case _Resynced():
                outbox.events.needs_snapshot = True
            case _Cancelled(session, request_id):
                self._drop(_engine_id(session, request_id))
            case _Pinned(session, pin):
                self._pin(session, pin)
            case _Unpinned(session, pin_id):
                self._unpin(session, _engine_id(session, pin_id))
            case _Closed(session):
                for pin_id in list(self._pins[session]):
                    self._unpin(session, pin_id)
                del self._pins[session]
                for engine_id in [key for key, live in self._live.items() if live.session == session]:
                    self._drop(engine_id)
                del self._outboxes[session]
            case _:
                assert_never(command)

    def _pin(self, session: int, pin: Pin) -> None:
        if self._broken is None and not self._draining:
            pin_id = _engine_id(session, pin.pin_id)
            self._pins[session].add(pin_id)
            self._engine.pin(replace(pin, pin_id=pin_id))

    def _unpin(self, session: int, pin_id: str) -> None:
        self._pins[session].discard(pin_id)
        self._engine.unpin(pin_id)

    def _adopt(self, command: _Adopted) -> None:
        """Losing a block costs speed only: it is not worth an engine."""
        if self._broken is not None:
            return
        try:
            adoption = self._engine.adopt_prefix(command.salt, command.token_ids, command.block)
        except (RuntimeError, MemoryError):
            log.exception("a block of %d tokens could not be used", len(command.token_ids))
            self._metrics.prefix_computed("failed")
        else:
            self._metrics.prefix_fetched(adoption)

    def _export(self, command: _Exported) -> None:
        if not command.done.set_running_or_notify_cancel():
            return
        try:
            is_filled = self._broken is None and self._engine.export_prefix(
                command.salt, command.token_ids, command.payload
            )
        except (RuntimeError, MemoryError) as error:
            command.done.set_exception(error)
        else:
            command.done.set_result(is_filled)

    def _accept(self, session: int, request: Request) -> None:
        engine_id = _engine_id(session, request.request_id)
        try:
            if self._broken is not None:
                raise EngineFailure(self._broken)
            if self._draining:
                raise Draining("this worker is shutting down; send the request again", retry_after_s=0.1)
            resumption = take_up(request, self._texts, self._engine.model.eos_token_ids)
            if resumption.outputs:
                self._engine.submit(replace(resumption.request, request_id=engine_id))
        except HeadwaterError as error:
            self._outboxes[session].fail(Failure(request.request_id, type(error).__name__, error.message))
            return
        for end in resumption.ends:
            self._outboxes[session].add(end)
        if not resumption.outputs:
            return
        self._live[engine_id] = _Live(
            session,
            request.request_id,
            len(request.token_ids),
            resumption.outputs,
            arrived=time.monotonic(),
            traceparent=request.traceparent,
        )
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, engine_id))
            self._forget_ended_deadlines()

    def _expire(self) -> None:
        now = time.time()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, engine_id = heapq.heappop(self._deadlines)
            if live := self._live.pop(engine_id, None):
                self._engine.cancel(engine_id)
                spans.record(self._tracer, live, DeadlineExceeded.__name__, time.monotonic(), is_failure=True)
                message = "the deadline passed while the request ran; allow more time or ask for fewer tokens"
                self._outboxes[live.session].fail(Failure(live.request_id, DeadlineExceeded.__name__, message))

    def _forget_ended_deadlines(self) -> None:
        if len(self._deadlines) > ENDED_DEADLINES + 2 * len(self._live):
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._live]
            heapq.heapify(self._deadlines)

    def _step(self) -> None:
        if not self._has_work:
            return
        self._step_began = began = time.monotonic()
        result = self._engine.step()
        self._step_began = None
        if result == NOTHING:
            return  # nobody has computed anything
        self._num_steps += 1
        now = time.monotonic()
        self._metrics.step(result.num_tokens, result.num_sequences, now - began)
        self._learn_rate(result, now - began)
        for engine_id in result.started:
            if live := self._live.get(engine_id):
                live.started = began
        waits: _Waits = {}
        for delta in result.deltas:
            self._emit(delta, now, waits)
        for seconds, num_tokens in waits.items():
            self._metrics.next_tokens(seconds, num_tokens)
        self._fail(result)

    def _learn_rate(self, result: StepResult, seconds: float) -> None:
        if result.num_tokens >= max(PROMPT_TOKENS, PROMPT_TOKENS_PER_OUTPUT * result.num_sequences):
            rate = result.num_tokens / seconds
            before = self._prefill_rate or rate
            self._prefill_rate = before + RATE_LEARNING * (rate - before)

    def _emit(self, token_delta: TokenDelta, now: float, waits: _Waits) -> None:
        live = self._live.get(token_delta.request_id)
        output = live.outputs.get(token_delta.index) if live else None
        if live is None or output is None:
            return  # ended by a stop string while the engine was a step ahead
        delta = to_delta(token_delta, output, request_id=live.request_id)
        if delta.token_ids:
            self._time_tokens(live, len(delta.token_ids), now, waits)
        self._outboxes[live.session].add(delta)
        if delta.finish is None:
            return
        del live.outputs[delta.index]
        if token_delta.finish is None:
            self._engine.cancel(token_delta.request_id, token_delta.index)
        if not live.outputs:
            del self._live[token_delta.request_id]
        self._observe_finish(live, delta, now)

    def _time_tokens(self, live: _Live, num_tokens: int, now: float, waits: _Waits) -> None:
        if live.last_token is None:
            live.first_token = now
            self._metrics.first_token(now - live.arrived)
        else:
            seconds = (now - live.last_token) / num_tokens
            waits[seconds] = waits.get(seconds, 0) + num_tokens
        live.last_token = now
        live.num_tokens += num_tokens

    def _observe_finish(self, live: _Live, delta: Delta, now: float) -> None:
        assert delta.finish is not None
        self._metrics.output_finished(delta.finish.reason)
        if live.outputs:
            return
        spans.record(self._tracer, live, delta.finish.reason, now)
        started = live.started or live.arrived
        self._metrics.request_finished(
            num_prompt=live.num_prompt,
            num_generated=live.num_tokens,
            queue_s=started - live.arrived,
            prefill_s=(live.first_token or now) - started,
            decode_s=now - (live.first_token or now),
            total_s=now - live.arrived,
        )

    def _fail(self, result: StepResult) -> None:
        for failure in result.failures:
            if live := self._live.pop(failure.request_id, None):
                spans.record(self._tracer, live, failure.kind, time.monotonic(), is_failure=True)
                self._outboxes[live.session].fail(replace(failure, request_id=live.request_id))
        self._num_failed_steps = self._num_failed_steps + 1 if result.failures else 0
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            self._break(f"{MAX_FAILED_STEPS} steps failed in a row")

    def _drop(self, engine_id: str) -> None:
        """Nobody waits for this request any more."""
        if live := self._live.pop(engine_id, None):
            spans.record(self._tracer, live, "cancelled", time.monotonic())
            self._engine.cancel(engine_id)
            self._outboxes[live.session].drop(live.request_id)

    def _break(self, reason: str) -> None:
        """End every live request: the engine's state cannot be trusted any more."""
        self._broken = reason
        self._step_began = None
        for live in self._live.values():
            spans.record(self._tracer, live, EngineFailure.__name__, time.monotonic(), is_failure=True)
            self._outboxes[live.session].fail(Failure(live.request_id, EngineFailure.__name__, reason))
        self._live.clear()

    def _tell_changes(self) -> None:
        """Note for every session what has changed in the prefix cache; those who need it get everything."""
        changes, now = self._engine.take_kv_changes(), time.monotonic()
        self._held.difference_update(changes.removed)
        self._held.update(changes.stored)
        for outbox in self._outboxes.values():
            if outbox.events.needs_snapshot:
                outbox.events.restart(self._engine.kv_blocks())
            elif changes.stored or changes.removed:
                outbox.events.add(changes, now)

    def _send(self) -> None:
        """Frames for those who have something to hear; when no step follows, nothing is held back for a later one."""
        now, load, is_idle, frames = time.monotonic(), self.load, not self._live, list[Frame]()
        for session, outbox in self._outboxes.items():
            deltas = outbox.take(now)
            events = outbox.events.take(now, at_once=is_idle or bool(deltas))
            if deltas or events:
                frames.append(Frame(session, self._num_steps, tuple(deltas), load, events))
        if frames:
            self._deliver(frames)


def _engine_id(session: int, request_id: str) -> str:
    """Unique among all sessions' requests."""
    return f"{session}/{request_id}"
