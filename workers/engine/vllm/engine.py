"""vLLM behind the Engine protocol: outputs go to its processes, and what has come back since is a step."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from vllm import RequestOutput

from protos.errors import DuplicateRequest, EmptyPrompt, EngineFailure, Overloaded, PromptTooLong
from protos.messages import Failure, Load, ModelInfo, Pin, Request, TokenDelta
from workers.config import WorkerConfig
from workers.engine.protocol import Adoption, EngineLimits, EngineStats, StepResult
from workers.engine.vllm.core import CALL_TIMEOUT_S, Answer, Core
from workers.engine.vllm.events import KVEventReader
from workers.engine.vllm.prefixes import Prefixes, block_format
from workers.engine.vllm.requests import Output
from workers.engine.vllm.settings import engine_args, environment, event_endpoints, exported
from workers.kv.block import BlockFormat, HeldBlock
from workers.kv.journal import Changes
from workers.model.fingerprint import files_fingerprint
from workers.speculative.pool.members import PoolAccess
from workers.speculative.stats import PoolStats, SpeculationStats

log = logging.getLogger(__name__)

WAIT_S: Final = 0.25  # of a step for vLLM's next answers; then the loop looks whether there is something else to do
COUNTS_AGE_S: Final = 1.0  # counts of drafts and attention are in another process


class VllmEngine:
    """An Engine whose steps are vLLM's. Owns its processes, and every output that they make."""

    def __init__(self, config: WorkerConfig, *, threads: int = 1, pool: PoolAccess | None = None) -> None:
        """Raises ConfigError for arguments that vLLM does not take, and ModelError if it does not start.

        Whatever fails, nothing is left behind.
        """
        began = time.monotonic()
        self._config = config
        self._pool = pool if "pool" in config.engine.speculation.drafters else None
        self._live: dict[str, dict[int, Output]] = {}
        self._num_computed = 0  # rows, after the last step
        self._waiting_since = began  # for vLLM's next answer
        self._counts: Mapping[str, Any] = {}
        self._counts_asked = began
        self._asked: Future[list[Any]] | None = None
        self._members: Mapping[str, str] | None = None  # as vLLM's worker knows them
        log.info("%s: starting vLLM", config.model.served_name)
        with ExitStack() as exits:
            self._start(exits, threads)
            self._exits = exits.pop_all()
        log.info("%s: vLLM is ready after %.0f s", self._info.name, time.monotonic() - began)

    def _start(self, exits: ExitStack, threads: int) -> None:
        config, section = self._config, self._config.engine.vllm
        sockets = Path(exits.enter_context(TemporaryDirectory(prefix="headwater-vllm-")))
        args = engine_args(config, threads=threads, sockets=sockets)
        self._events = KVEventReader(*event_endpoints(sockets), config.engine.kv.page_size)
        exits.callback(self._events.close)
        with exported(environment(threads=threads, tensor_parallel=section.tensor_parallel, sockets=sockets)):
            self._core = Core(args, lora=section.lora, start_timeout_s=section.start_timeout_s)
        exits.callback(self._core.close)
        model = self._core.vllm_config.model_config
        self._info = ModelInfo(
            name=config.model.served_name,
            max_context=model.max_model_len,
            vocab_size=model.get_vocab_size(),
            eos_token_ids=_eos_token_ids(model, config.model.path),
        )
        self._eos = frozenset(self._info.eos_token_ids)
        self._num_pages = self._core.num_blocks
        self._prefixes = self._make_prefixes()
        exits.callback(self._prefixes.close)

    @property
    def model(self) -> ModelInfo:
        return self._info

    @property
    def limits(self) -> EngineLimits:
        scheduler = self._config.engine.scheduler
        return EngineLimits(scheduler.max_running, scheduler.step_tokens)

    @property
    def has_work(self) -> bool:
        return bool(self._live) or self._prefixes.has_work

    @property
    def block_format(self) -> BlockFormat | None:
        return self._prefixes.block_format

    def submit(self, request: Request) -> None:
        self._refuse(request)
        self._prefixes.settle()
        outputs = Output.all_of(request, self._eos)
        self._prefixes.unpin_for(self._pages_for(len(request.token_ids) + request.sampling.max_tokens))
        if not self._live:
            self._waiting_since = time.monotonic()
        self._live[request.request_id] = {output.index: output for output in outputs}
        for output in outputs:
            self._core.add(output)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        outputs = self._live.get(request_id, {})
        for found in [index] if index is not None else list(outputs):
            if (output := outputs.pop(found, None)) is not None:
                self._core.drop(output)
        if not outputs:
            self._live.pop(request_id, None)

    def step(self) -> StepResult:
        if not self.has_work:
            return StepResult()
        answers = self._core.take(WAIT_S)
        self._prefixes.settle()
        self._look_around()
        if not answers:
            if self._live:
                self._check_progress()
            return StepResult()
        self._waiting_since = time.monotonic()
        started = self._newly_started(answers)
        deltas, failures = self._read(answers)
        return StepResult(deltas, failures, started, self._num_computed_since(), len(deltas))

    def wake(self) -> None:
        self._core.wake()

    def load(self) -> Load:
        outputs = [output for outputs in self._live.values() for output in outputs.values()]
        waiting = [output for output in outputs if not output.is_started]
        return Load(
            num_running=len(outputs) - len(waiting),
            num_waiting=len(waiting),
            pending_prefill_tokens=sum([len(output.prompt) for output in outputs if not output.num_new]),
            kv_used_tokens=self._num_used_pages * self._config.engine.kv.page_size,
            kv_capacity_tokens=self._num_pages * self._config.engine.kv.page_size,
        )

    def stats(self) -> EngineStats:
        self._events.read()
        totals, attention = self._core.totals, self._counts.get("attention") or {}
        num_cached = len(self._events.names)
        num_used = self._num_used_pages
        return EngineStats(
            num_steps=totals.num_steps,
            num_preemptions=totals.num_preemptions,
            prompt_tokens=totals.prompt_tokens,
            generation_tokens=totals.generation_tokens,
            computed_tokens=totals.computed_tokens,
            prefix_queries_tokens=totals.prefix_queries_tokens,
            prefix_hit_tokens=totals.prefix_hit_tokens,
            attention_segments=attention.get("segments", 0),
            attention_keys=attention.get("keys", 0),
            attention_read_keys=attention.get("read_keys", 0),
            kv_free_pages=max(self._num_pages - num_used - num_cached, 0),
            kv_cached_pages=min(num_cached, self._num_pages - num_used),
            kv_total_pages=self._num_pages,
            kv_pinned_pages=self._prefixes.num_pinned_pages,
            page_size=self._config.engine.kv.page_size,
            speculation=self._speculation(),
        )

    def take_kv_changes(self) -> Changes:
        self._events.read()
        return self._events.names.take_changes()

    def kv_blocks(self) -> list[int]:
        return list(self._events.names)

    def export_prefix(self, salt: str, token_ids: Sequence[int], payload: memoryview) -> bool:
        return self._prefixes.export(salt, token_ids, payload)

    def adopt_prefix(self, salt: str, token_ids: Sequence[int], block: HeldBlock) -> Adoption:
        return self._prefixes.adopt(salt, token_ids, block)

    def pin(self, pin: Pin) -> None:
        self._prefixes.pin(pin, largest_need=self._largest_need())

    def unpin(self, pin_id: str) -> None:
        self._prefixes.unpin(pin_id)

    def close(self) -> None:
        self._live.clear()
        self._exits.close()

    def _refuse(self, request: Request) -> None:
        num_prompt, max_tokens = len(request.token_ids), request.sampling.max_tokens
        num_total, capacity = num_prompt + max_tokens, self._num_pages * self._config.engine.kv.page_size
        if request.request_id in self._live:
            raise DuplicateRequest(f"request {request.request_id!r} is running already; choose another id")
        if num_prompt == 0:
            raise EmptyPrompt("the prompt has no tokens; give at least one")
        if num_total > self._info.max_context:
            raise PromptTooLong(
                f"prompt {num_prompt} + max_tokens {max_tokens} = {num_total} tokens exceed the context of "
                f"{self._info.max_context}; shorten the prompt or lower max_tokens"
            )
        if num_total > capacity:
            raise PromptTooLong(
                f"prompt {num_prompt} + max_tokens {max_tokens} = {num_total} tokens exceed this worker's KV memory of "
                f"{capacity}; raise engine.kv.num_pages or ask for less"
            )
        num_waiting, max_waiting = self.load().num_waiting, self._config.engine.scheduler.max_waiting
        if num_waiting + request.sampling.n > max_waiting:
            raise Overloaded(
                f"{num_waiting} outputs wait and {request.sampling.n} more exceed the limit of {max_waiting}; "
                "try again later",
                retry_after_s=1.0,
            )

    # What comes back

    def _read(self, answers: Sequence[Answer]) -> tuple[tuple[TokenDelta, ...], tuple[Failure, ...]]:
        """Deltas of the outputs that are still wanted, and the requests that have failed."""
        deltas: list[TokenDelta] = []
        failures: list[Failure] = []
        for output, said in answers:
            request_id = output.request.request_id
            outputs = self._live.get(request_id, {})
            if outputs.get(output.index) is not output:
                continue
            if isinstance(said, RequestOutput):
                deltas.append(output.to_delta(said))
                if deltas[-1].finish is not None:
                    self._forget(output)
            else:
                failures.append(Failure(request_id, EngineFailure.__name__, f"vLLM failed on the request: {said}"))
                self.cancel(request_id)
        return tuple(deltas), tuple(failures)

    def _forget(self, output: Output) -> None:
        outputs = self._live[output.request.request_id]
        del outputs[output.index]
        if not outputs:
            del self._live[output.request.request_id]

    def _newly_started(self, answers: Sequence[Answer]) -> tuple[str, ...]:
        """Requests that run for the first time: those that are answered, and all others once nobody waits in vLLM."""
        runs = {id(answer.output) for answer in answers}
        nobody_waits, started = self._core.totals.num_waiting == 0, []
        for request_id, outputs in self._live.items():
            new = [o for o in outputs.values() if not o.is_started and (nobody_waits or id(o) in runs)]
            if new and not any(output.is_started for output in outputs.values()):
                started.append(request_id)
            for output in new:
                output.is_started = True
        return tuple(started)

    def _num_computed_since(self) -> int:
        """Rows that vLLM has computed since this was last asked."""
        before, self._num_computed = self._num_computed, self._core.totals.computed_tokens
        return self._num_computed - before

    def _check_progress(self) -> None:
        seconds = time.monotonic() - self._waiting_since
        if seconds > self._config.engine.stall_s:
            raise EngineFailure(f"vLLM has answered nothing for {seconds:.0f} s; see worker.engine.stall_s")

    # Memory

    @property
    def _num_used_pages(self) -> int:
        """That live outputs hold."""
        if not self._live:
            return 0
        return max(round(self._core.totals.kv_use * self._num_pages) - self._prefixes.num_pinned_pages, 0)

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.engine.kv.page_size)

    def _largest_need(self) -> int:
        """Pages that the longest of all live outputs needs to come to its end."""
        requests = [output.request for outputs in self._live.values() for output in outputs.values()]
        return max((self._pages_for(len(r.token_ids) + r.sampling.max_tokens) for r in requests), default=0)

    def _make_prefixes(self) -> Prefixes:
        kv, layouts = self._config.engine.kv, []
        if kv.exchange.mode != "off" and kv.prefix_cache:
            layouts = self._core.ask_workers("kv_layout").result(CALL_TIMEOUT_S)
        weights = _weights(self._config)
        max_pinned = int(kv.max_pinned * kv.num_pages) if kv.prefix_cache else 0
        return Prefixes(self._core, block_format(layouts, weights), max_pinned_pages=max_pinned)

    # vLLM's worker

    def _look_around(self) -> None:
        """Tell vLLM's worker of new drafters, and ask it what it has counted."""
        if self._pool is not None and self._members is not self._pool.members.addresses:
            self._members, tls = self._pool.members.addresses, self._pool.tls
            certificates = None if tls is None else {name: str(value) for name, value in asdict(tls).items()}
            asked = self._core.ask_workers("set_pool", dict(self._members), self._pool.token, certificates)
            asked.add_done_callback(_first)
        if self._asked is not None and self._asked.done():
            self._counts, self._asked = _first(self._asked) or self._counts, None
        if self._counts_something and self._asked is None and time.monotonic() - self._counts_asked > COUNTS_AGE_S:
            self._counts_asked, self._asked = time.monotonic(), self._core.ask_workers("counts")

    @property
    def _counts_something(self) -> bool:
        """Whether there are drafts or attention of ours. To ask holds up a step."""
        return bool(self._config.engine.speculation.drafters) or self._config.engine.vllm.attention == "shared"

    def _speculation(self) -> SpeculationStats | None:
        if not self._config.engine.speculation.drafters:
            return None
        counts = dict(self._counts.get("speculation") or {})
        pool = counts.pop("pool", None)
        return SpeculationStats(**counts, pool=None if pool is None else PoolStats(**pool))


def _first(asked: Future[list[Any]]) -> Any:
    """The first worker's answer; None, and said, where there is none."""
    if asked.cancelled():
        return None
    if (error := asked.exception()) is not None:
        log.warning("vLLM's worker does not answer: %s", error)
        return None
    return asked.result()[0]


def _eos_token_ids(model: Any, path: Path) -> tuple[int, ...]:
    """Of the model's configuration, and of its generation_config.json where that is."""
    file = path / "generation_config.json"
    told = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    found = [getattr(model.hf_text_config, "eos_token_id", None), told]
    ids = [entry if isinstance(entry, list) else [entry] for entry in found if entry is not None]
    return tuple(dict.fromkeys(token for entry in ids for token in entry))


def _weights(config: WorkerConfig) -> str:
    """Of all that keys and values follow from, beside the tokens."""
    directory, vllm = config.model.path, config.engine.vllm
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    settings = f"{config.model.dtype} {vllm.quantization} {vllm.lora} {sorted(vllm.args.items())}"
    return files_fingerprint(directory, files, note=settings)
