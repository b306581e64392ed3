"""AsyncLLM on an event loop of its own thread: outputs go in from the engine's thread, and answers come back together.

vLLM answers all requests of a step one after another. Their deltas are handed over at once, so that a step
is one frame.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from vllm import AsyncEngineArgs, RequestOutput
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from protos.errors import EngineFailure, ModelError
from protos.messages import Request, Sampling
from workers.engine.vllm.requests import Output
from workers.engine.vllm.statistics import StepCounter, Totals

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

CALL_TIMEOUT_S: Final = 30.0  # of a question to the worker process, which waits for the step that it is in
SHUTDOWN_S: Final = 10.0
FIRST: Final = 1 << 30  # a priority above all that requests have


class Answer(NamedTuple):
    """What vLLM says next of an output: some of it, or why there is no more."""

    output: Output
    said: RequestOutput | str


class Core:
    """One AsyncLLM and its processes. The thread and the loop are its own; all else is called from the engine's."""

    def __init__(self, args: AsyncEngineArgs, *, lora: Path | None, start_timeout_s: float) -> None:
        """Start vLLM and wait until it is ready. Raises ModelError with vLLM's own words if it does not come up."""
        self._args = args
        self._lora = None if lora is None else LoRARequest(lora.name, 1, str(lora))
        self._arrived = threading.Condition()
        self._answers: list[Answer] = []  # guarded by _arrived
        self._is_woken = False  # likewise
        self._dead: str | None = None  # likewise
        self._fresh: list[Answer] = []  # of the burst at hand; the loop's
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by identity of the output; the loop's
        self._numbers = count()  # of what is run for the connector
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._llm, self._counter = self._call(self._start(), start_timeout_s)
        except Exception as error:
            self._stop_loop()
            raise ModelError(f"vLLM does not start: {_told(error)}; its log has the details") from error

    @property
    def totals(self) -> Totals:
        """As of its last step."""
        return self._counter.totals

    @property
    def vllm_config(self) -> Any:
        """What vLLM has made of its arguments."""
        return self._llm.vllm_config

    @property
    def num_blocks(self) -> int:
        """That can hold something."""
        return int(self.vllm_config.cache_config.num_gpu_blocks) - 1

    @property
    def block_size(self) -> int:
        """In tokens."""
        return int(self.vllm_config.cache_config.block_size)

    def add(self, output: Output) -> None:
        """Have an output made; answers come until one is a finish or a failure."""
        self._loop.call_soon_threadsafe(self._open, output)

    def run(self, token_ids: Sequence[int], salt: str, transfer: Mapping[str, object]) -> Future[None]:
        """Have one token generated, for what the connector does then, ahead of all that wait; done at its end.

        To cancel the future drops it.
        """
        sampling = Sampling(seed=0, max_tokens=1, temperature=0.0, ignore_eos=True)
        request = Request(f"prefix/{next(self._numbers)}", tuple(token_ids), sampling, salt, FIRST, speculation="off")
        return self._submit(self._exhaust(Output(request, 0, frozenset(), request.token_ids, transfer)))

    def drop(self, output: Output) -> None:
        """Make no more of an output; answers that are under way may still come."""
        self._loop.call_soon_threadsafe(self._cancel, id(output))

    def take(self, timeout_s: float) -> list[Answer]:
        """The answers that have come; waits for the first, unless woken. Raises EngineFailure once vLLM has ended."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._answers or self._is_woken or self._dead, timeout_s)
            self._is_woken = False
            answers, self._answers = self._answers, []
            if self._dead is not None and not answers:
                raise EngineFailure(self._dead)
        return answers

    def wake(self) -> None:
        """Have `take` return at once. Any thread."""
        with self._arrived:
            self._is_woken = True
            self._arrived.notify()

    def ask_workers(self, method: str, *args: Any) -> Future[list[Any]]:
        """Call a method of every worker process, between two steps."""
        return self._submit(self._llm.collective_rpc(method, timeout=CALL_TIMEOUT_S, args=args))

    def close(self) -> None:
        """End vLLM's processes and the thread. Idempotent."""
        if self._thread.is_alive():
            try:
                self._call(self._shut_down(), 2 * SHUTDOWN_S)
            finally:
                del self._llm  # which would be shut down once more, later
                self._stop_loop()

    # On the loop

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _start(self) -> tuple[AsyncLLM, StepCounter]:
        llm = AsyncLLM.from_engine_args(self._args, stat_loggers=[StepCounter])
        [counter] = llm.logger_manager.stat_loggers
        return llm, counter

    async def _shut_down(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._llm.shutdown(timeout=SHUTDOWN_S)

    def _open(self, output: Output) -> None:
        task = self._loop.create_task(self._make(output))
        self._tasks[id(output)] = task
        task.add_done_callback(lambda _: self._tasks.pop(id(output), None))

    def _cancel(self, key: int) -> None:
        if (task := self._tasks.get(key)) is not None:
            task.cancel()

    def _generate(self, output: Output) -> AsyncGenerator[RequestOutput, None]:
        answers: AsyncGenerator[RequestOutput, None] = self._llm.generate(
            output.to_prompt(),
            output.to_params(),
            output.request_id,
            lora_request=self._lora,
            priority=-output.request.priority,  # vLLM's smaller ones run first
        )
        return answers

    async def _exhaust(self, output: Output) -> None:
        async for _ in self._generate(output):
            pass

    async def _make(self, output: Output) -> None:
        try:
            async for said in self._generate(output):
                self._hand_over(Answer(output, said))
        except EngineDeadError as error:
            self._die(error)
        except Exception as error:
            log.exception("an output of %d prompt tokens failed", len(output.prompt))
            self._hand_over(Answer(output, _told(error)))

    def _hand_over(self, answer: Answer) -> None:
        """With all others of the same burst: they are ready to run before what is called soon."""
        if not self._fresh:
            self._loop.call_soon(self._flush)
        self._fresh.append(answer)

    def _flush(self) -> None:
        fresh, self._fresh = self._fresh, []
        with self._arrived:
            self._answers += fresh
            self._arrived.notify()

    def _die(self, error: Exception) -> None:
        with self._arrived:
            self._dead = f"vLLM's engine process has ended: {_told(error)}"
            self._arrived.notify()

    # From other threads

    def _submit(self, coroutine: Coroutine[Any, Any, _Answer]) -> Future[_Answer]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _call(self, coroutine: Coroutine[Any, Any, _Answer], timeout_s: float) -> _Answer:
        return self._submit(coroutine).result(timeout_s)

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SHUTDOWN_S)
        if not self._thread.is_alive():
            self._loop.close()


def _told(error: BaseException) -> str:
    """The error and what it came from, in one line."""
    causes: list[str] = []
    found: BaseException | None = error
    while found is not None and len(causes) < 3:
        causes.append(f"{type(found).__name__}: {' '.join(str(found).split())}")
        found = found.__cause__
    return "; ".join(causes)
