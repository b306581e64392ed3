"""AsyncLLM on an event loop of its own thread: outputs go in from the engine's thread, and answers come back together.

vLLM answers all requests of a step one after another. Their deltas are handed over at once, so that a step is one
frame, and right where vLLM puts them down: to have a task for each output take them up would cost more than all else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple, TypeVar

from vllm import AsyncEngineArgs, RequestOutput, SamplingParams
from vllm.inputs import TokensInput
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

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
        self._arrived: SimpleQueue[Sequence[Answer]] = SimpleQueue()  # bursts; an empty one only wakes
        self._dead: str | None = None  # set once, by the loop
        self._fresh: list[Answer] = []  # of the burst at hand; the loop's
        self._collectors: dict[
            int, RequestOutputCollector | None
        ] = {}  # by identity of the output, None until vLLM has
        self._tasks: set[asyncio.Task[None]] = set()  # that vLLM is asked in; the loop's, like the two above
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
        self._loop.call_soon_threadsafe(self._cancel, output)

    def take(self, timeout_s: float) -> list[Answer]:
        """The answers that have come; waits for the first, unless woken. Raises EngineFailure once vLLM has ended."""
        answers: list[Answer] = []
        try:
            answers += self._arrived.get(timeout=0 if self._dead is not None else timeout_s)
            while True:
                answers += self._arrived.get_nowait()
        except Empty:
            pass
        if self._dead is not None and not answers:
            raise EngineFailure(self._dead)
        return answers

    def wake(self) -> None:
        """Have `take` return at once. Any thread."""
        self._arrived.put(())

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
        self._collectors.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._llm.shutdown(timeout=SHUTDOWN_S)

    def _open(self, output: Output) -> None:
        self._collectors[id(output)] = None
        self._spawn(self._begin(output))

    def _cancel(self, output: Output) -> None:
        if (collector := self._collectors.pop(id(output), None)) is not None:
            self._spawn(self._abort(collector))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A question to vLLM has ended: one that it did not take, once it is dead, is said to whoever waits."""
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, EngineDeadError):
            self._die(error)
        else:
            log.error("vLLM could not be asked", exc_info=error)

    async def _begin(self, output: Output) -> None:
        """Ask vLLM for an output, and hear of it where vLLM puts down what it has made."""
        try:
            collector = await self._llm.add_request(*self._asked(output), **self._options(output))
        except Exception as error:  # noqa: BLE001 - vLLM raises many kinds; each is told to whoever asked
            self._fail(output, error)
            return
        if id(output) not in self._collectors:  # nobody wants it any more
            await self._abort(collector)
            return
        self._collectors[id(output)] = collector
        collector.put = partial(self._hear, output)
        if collector.output is not None:
            self._hear(output, collector.output)

    async def _abort(self, collector: RequestOutputCollector) -> None:
        await self._llm.abort(collector.request_id, internal=True)

    def _hear(self, output: Output, said: RequestOutput | Exception) -> None:
        if isinstance(said, Exception):
            self._fail(output, said)
            return
        if said.finished:
            self._collectors.pop(id(output), None)
        self._hand_over(Answer(output, said))

    def _fail(self, output: Output, error: Exception) -> None:
        self._collectors.pop(id(output), None)
        if isinstance(error, EngineDeadError):
            self._die(error)
        else:
            log.error("an output of %d prompt tokens failed", len(output.prompt), exc_info=error)
            self._hand_over(Answer(output, _told(error)))

    def _asked(self, output: Output) -> tuple[str, TokensInput, SamplingParams]:
        return output.request_id, output.to_prompt(), output.to_params()

    def _options(self, output: Output) -> dict[str, Any]:
        """vLLM's smaller priorities run first."""
        return {"lora_request": self._lora, "priority": -output.request.priority}

    async def _exhaust(self, output: Output) -> None:
        request_id, prompt, params = self._asked(output)
        async for _ in self._llm.generate(prompt, params, request_id, **self._options(output)):
            pass

    def _hand_over(self, answer: Answer) -> None:
        """With all others of the same burst: vLLM puts them down before anything else is called."""
        if not self._fresh:
            self._loop.call_soon(self._flush)
        self._fresh.append(answer)

    def _flush(self) -> None:
        fresh, self._fresh = self._fresh, []
        self._arrived.put(fresh)

    def _die(self, error: BaseException) -> None:
        self._dead = f"vLLM's engine process has ended: {_told(error)}"
        self.wake()

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
