"""Prefixes that one vLLM has computed and another uses, and prefixes that stay: through vLLM's own processes."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
from vllm.config import KVTransferConfig
from vllm.v1.engine.async_llm import AsyncLLM

from protos.messages import Pin
from workers.engine.protocol import Adoption
from workers.engine.vllm import prefixes as prefixes_module
from workers.engine.vllm.handover import Handover, Outcome
from workers.engine.vllm.prefixes import Prefixes, block_format
from workers.engine.vllm.wish import TRANSFER, Wish
from workers.kv.block import BlockFormat, BlockMemory, Packing

PAGE = 32
NUM_PAGES = 24
MAX_PINNED = 8
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}


class Answer(NamedTuple):
    tokens: list[int]
    num_cached: int


class Vllm:
    """One AsyncLLM on a thread of its own: a Core, and requests for comparison."""

    num_blocks = NUM_PAGES
    block_size = PAGE

    def __init__(self, model: Path) -> None:
        self._numbers = count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._llm = self._call(self._start(model))

    def run(self, token_ids: Sequence[int], salt: str, transfer: Mapping[str, Any]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(self._run(token_ids, salt, transfer), self._loop)

    def answer(self, token_ids: Sequence[int], salt: str = "", num_tokens: int = 8) -> Answer:
        return self._call(self._generate(token_ids, salt, num_tokens, {}))

    def answers(self, *prompts: Sequence[int], num_tokens: int = 8) -> list[Answer]:
        """All at once."""
        return self._call(self._gather([self._generate(prompt, "", num_tokens, {}) for prompt in prompts]))

    def layouts(self) -> list[Any]:
        return self._call(self._llm.collective_rpc(_described))

    def close(self) -> None:
        self._llm.shutdown(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self, model: Path) -> AsyncLLM:
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=str(model),
                skip_tokenizer_init=True,
                dtype="float32",
                max_model_len=NUM_PAGES * PAGE,
                enforce_eager=True,
                block_size=PAGE,
                num_gpu_blocks_override=NUM_PAGES + 1,
                kv_cache_memory_bytes=1 << 20,
                prefix_caching_hash_algo="sha256_cbor",
                max_num_batched_tokens=256,
                max_num_seqs=8,
                scheduling_policy="priority",
                async_scheduling=False,
                disable_log_stats=True,
                kv_transfer_config=KVTransferConfig(
                    kv_connector="HeadwaterConnector",
                    kv_connector_module_path="workers.engine.vllm.connector",
                    kv_role="kv_both",
                ),
            )
        )

    async def _run(self, token_ids: Sequence[int], salt: str, transfer: Mapping[str, Any]) -> None:
        await self._generate(token_ids, salt, 1, {TRANSFER: dict(transfer)}, priority=-1)

    async def _generate(
        self, token_ids: Sequence[int], salt: str, num_tokens: int, extra: dict[str, Any], priority: int = 0
    ) -> Answer:
        prompt = TokensPrompt(prompt_token_ids=list(token_ids), cache_salt=f"salt:{salt}")
        params = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, extra_args=extra
        )
        async for said in self._llm.generate(prompt, params, f"r{next(self._numbers)}", priority=priority):
            last = said
        return Answer(list(last.outputs[0].token_ids), last.num_cached_tokens or 0)

    async def _gather(self, asked: Sequence[Any]) -> list[Any]:
        return list(await asyncio.gather(*asked))

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(240)


def _described(_: object) -> Any:
    from workers.engine.vllm.connector import describe

    return describe()


class Engine(NamedTuple):
    core: Vllm
    format: BlockFormat

    def prefixes(self) -> Prefixes:
        """Of an engine that has none yet."""
        return Prefixes(self.core, self.format, max_pinned_pages=MAX_PINNED)


def tokens(num: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 4000) for _ in range(num)]


@pytest.fixture(scope="module")
def engines(target_dir: Path) -> Iterator[tuple[Engine, Engine]]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # the tests send a function
        cores = [Vllm(target_dir) for _ in range(2)]
        formats = [block_format(core.layouts(), "model") for core in cores]
        assert formats[0] == formats[1] is not None
        yield Engine(cores[0], formats[0]), Engine(cores[1], formats[0])
        for core in cores:
            core.close()


@pytest.fixture
def source(engines: tuple[Engine, Engine]) -> Engine:
    return engines[0]


@pytest.fixture
def target(engines: tuple[Engine, Engine]) -> Iterator[Engine]:
    """Its cache is what the tests before have left."""
    return engines[1]


@pytest.fixture
def pinning(target: Engine) -> Iterator[Prefixes]:
    """Ends the pins that a test has left."""
    prefixes = target.prefixes()
    yield prefixes
    prefixes.unpin_for(NUM_PAGES + 1)
    until(prefixes, lambda: not prefixes.has_work)


def until(prefixes: Prefixes, is_so: Callable[[], bool]) -> None:
    for _ in range(20_000):
        prefixes.settle()
        if is_so():
            return
        time.sleep(0.005)
    raise AssertionError("it never is")


def exported(engine: Engine, prefix: Sequence[int], salt: str = "") -> memoryview | None:
    """The packed block of a prefix that the engine has."""
    packing = Packing(engine.format.label(salt, prefix), len(prefix) // PAGE * engine.format.page_bytes)
    has_all = engine.prefixes().export(salt, prefix, packing.payload)
    assert has_all == any(packing.payload)
    return packing.seal() if has_all else None


def block_of(engine: Engine, prefix: Sequence[int], salt: str = "") -> BlockMemory:
    engine.core.answer([*prefix, 1], salt, 1)
    data = exported(engine, prefix, salt)
    assert data is not None
    return BlockMemory(data, engine.format.label(salt, prefix))


def adopted(engine: Engine, prefix: Sequence[int], block: BlockMemory, salt: str = "") -> Adoption:
    prefixes = engine.prefixes()
    adoption = prefixes.adopt(salt, prefix, block)
    until(prefixes, lambda: not prefixes.has_work)
    return adoption


def fill(engine: Engine, seed: int) -> None:
    """Use every page that is not pinned, in turn."""
    for number in range(4):
        engine.core.answer(tokens(10 * PAGE + 1, seed + number), num_tokens=1)


def test_an_adopted_prefix_gives_the_same_text_without_being_computed(source: Engine, target: Engine) -> None:
    prefix = tokens(5 * PAGE, 1)
    prompts = [[*prefix, *tokens(7 + 9 * number, number)] for number in range(3)]
    expected = [source.core.answer(prompt) for prompt in prompts]
    assert adopted(target, prefix, block_of(source, prefix)) == Adoption(len(prefix), "copied")
    found = target.core.answers(*prompts)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    assert [answer.num_cached for answer in found] == [len(prefix)] * 3


def test_what_was_adopted_goes_on_with_the_same_bits(source: Engine, target: Engine) -> None:
    prefix = tokens(6 * PAGE, 2)
    adopted(target, prefix, block_of(source, prefix))
    first = exported(source, prefix)
    assert first is not None
    assert exported(target, prefix) == first


def test_only_what_is_there_as_a_whole_is_exported(source: Engine) -> None:
    prefix = tokens(4 * PAGE, 3)
    source.core.answer([*prefix, 1], num_tokens=1)
    assert exported(source, tokens(2 * PAGE, 4)) is None
    assert exported(source, [*prefix[: 2 * PAGE], *tokens(PAGE, 4)]) is None
    part, whole = exported(source, prefix[: 2 * PAGE]), exported(source, prefix)
    assert part is not None
    assert whole is not None
    size = 2 * source.format.page_bytes
    assert part[-size:] == whole[-2 * size : -size]


def test_what_is_there_already_stays(source: Engine, target: Engine) -> None:
    prefix = tokens(5 * PAGE, 5)
    target.core.answer([*prefix[: 2 * PAGE], 1], num_tokens=1)
    assert adopted(target, prefix, block_of(source, prefix)).way == "copied"
    assert exported(target, prefix) == exported(source, prefix)
    assert adopted(target, prefix, block_of(source, prefix)) == Adoption(len(prefix), "unused")


def test_salts_keep_apart(source: Engine, target: Engine) -> None:
    prefix = tokens(3 * PAGE, 6)
    block = block_of(source, prefix, "a")
    assert exported(source, prefix, "b") is None
    adopted(target, prefix, block, "a")
    other, same = target.core.answer([*prefix, 1, 2], "b"), target.core.answer([*prefix, 1, 2], "a")
    assert (other.num_cached, same.num_cached) == (0, len(prefix))
    assert other.tokens == same.tokens


def test_prefixes_leave_and_come_while_requests_run(source: Engine, target: Engine) -> None:
    running = [tokens(40, 70 + number) for number in range(3)]
    expected = [answer.tokens for answer in source.core.answers(*running, num_tokens=60)]
    asked = threading.Thread(target=lambda: found.extend(target.core.answers(*running, num_tokens=60)))
    found: list[Answer] = []
    blocks = {seed: block_of(source, tokens(3 * PAGE, seed)) for seed in (80, 81)}
    asked.start()
    for seed, block in blocks.items():
        adopted(target, tokens(3 * PAGE, seed), block)
        assert exported(target, tokens(3 * PAGE, seed)) == exported(source, tokens(3 * PAGE, seed))
    asked.join()
    assert [answer.tokens for answer in found] == expected


@pytest.mark.parametrize("spoil", ["path", "secret", "num_bytes"])
def test_a_handover_that_is_not_there_costs_nothing_but_time(source: Engine, target: Engine, spoil: str) -> None:
    prefix = tokens(3 * PAGE, {"path": 7, "secret": 8, "num_bytes": 9}[spoil])
    expected = source.core.answer([*prefix, 1])
    with Handover(3 * target.format.page_bytes) as handover:
        params = Wish("import", 3, handover.ticket).to_params()
        params["headwater"]["ticket"][spoil] = {"path": "/proc/self/fd/0", "secret": "00" * 16, "num_bytes": 1 << 20}[
            spoil
        ]
        target.core.run([*prefix, 0], "salt", params).result(60)
        assert handover.outcome is Outcome.OPEN
    assert target.core.answer([*prefix, 1]).tokens == expected.tokens


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"headwater": None},
        {"headwater": {"kind": "swim"}},
        {"headwater": {"kind": "pin", "num_pages": 99, "pin": "x"}},
    ],
)
def test_a_wish_that_makes_no_sense_is_not_heard(target: Engine, params: dict[str, Any]) -> None:
    target.core.run([1, 2, 3], "", params).result(60)
    assert len(target.core.answer([1, 2, 3]).tokens) == 8


def test_an_import_of_the_wrong_size_ends_and_nothing_of_it_is_used(source: Engine, target: Engine) -> None:
    prefix = tokens(3 * PAGE, 10)
    with Handover(2 * target.format.page_bytes) as handover:
        target.core.run([*prefix, 0], "", Wish("import", 3, handover.ticket).to_params()).result(60)
        assert handover.outcome is Outcome.OPEN
    answer = target.core.answer([*prefix, 1])
    assert answer == (source.core.answer([*prefix, 1]).tokens, 0)


def test_a_prefix_that_is_still_to_come_is_there_for_what_is_asked_next(
    source: Engine, target: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tokens(5 * PAGE, 11)
    expected, block = source.core.answer([*prefix, 1]), block_of(source, prefix)
    monkeypatch.setattr(prefixes_module, "ADOPT_WAIT_S", 0.0)
    prefixes = target.prefixes()
    adoption = prefixes.adopt("", prefix, block)
    assert adoption == Adoption(len(prefix), "copied")
    assert target.core.answer([*prefix, 1]) == (expected.tokens, len(prefix))
    until(prefixes, lambda: not prefixes.has_work)


class Busy:
    """A Core that comes to nothing."""

    num_blocks = NUM_PAGES
    block_size = PAGE

    def run(self, token_ids: Sequence[int], salt: str, transfer: Mapping[str, Any]) -> Future[None]:
        return Future()


def test_no_more_comes_in_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes_module, "ADOPT_WAIT_S", 0.0)
    small = BlockFormat("layout", "model", PAGE, 64)
    prefixes = Prefixes(Busy(), small, max_pinned_pages=0)
    files, ways = len(os.listdir("/proc/self/fd")), []
    for seed in range(3):
        prefix = tokens(10 * PAGE, seed)
        label = small.label("", prefix)
        block = BlockMemory(Packing(label, 10 * small.page_bytes).seal(), label)
        ways.append(prefixes.adopt("", prefix, block).way)
    assert ways == ["copied", "copied", "unused"]
    assert len(os.listdir("/proc/self/fd")) > files
    prefixes.close()
    assert len(os.listdir("/proc/self/fd")) == files


def test_an_export_that_takes_too_long_is_given_up(source: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = tokens(5 * PAGE, 16)
    source.core.answer([*prefix, 1], num_tokens=1)
    with monkeypatch.context() as hasty:
        hasty.setattr(prefixes_module, "EXPORT_TIMEOUT_S", 0.0)
        assert exported(source, prefix) is None
    assert exported(source, prefix) is not None


def test_engines_of_other_layouts_have_other_formats(source: Engine) -> None:
    layouts = source.core.layouts()
    assert layouts[0]["page_bytes"] == source.format.page_bytes == 6 * 2 * PAGE * 64 * 2 * 4
    assert {"vllm", "float32", "CPUAttentionBackend"} <= set(layouts[0]["layout"].split())
    assert block_format([None], "model") is None
    assert block_format([*layouts, *layouts], "model") is None


def test_a_pin_survives_pressure(target: Engine, pinning: Prefixes) -> None:
    prefix = tokens(5 * PAGE, 20)
    pinning.pin(Pin("p", "s", (*prefix, 7)), largest_need=0)
    assert pinning.num_pinned_pages == 5
    until(pinning, lambda: not pinning.is_computing)
    fill(target, 30)
    assert target.core.answer([*prefix, 1], "s", 1).num_cached == len(prefix)
    fill(target, 40)
    assert exported(target, prefix, "s") is not None
    pinning.unpin("p")
    assert pinning.num_pinned_pages == 0
    fill(target, 50)
    assert exported(target, prefix, "s") is None


def test_pins_of_one_prefix_are_counted(target: Engine, pinning: Prefixes) -> None:
    prefix = tokens(4 * PAGE, 21)
    for pin_id in ("p", "q", "q"):
        pinning.pin(Pin(pin_id, "", tuple(prefix)), largest_need=0)
    assert pinning.num_pinned_pages == 4
    pinning.unpin("p")
    until(pinning, lambda: not pinning.is_computing)
    fill(target, 60)
    assert exported(target, prefix) is not None
    pinning.unpin("q")
    fill(target, 70)
    assert exported(target, prefix) is None


def test_a_pin_that_ends_while_it_is_computed_holds_nothing(target: Engine, pinning: Prefixes) -> None:
    for number in range(6):
        prefix = tokens(7 * PAGE, 90 + number)
        pinning.pin(Pin("p", "", tuple(prefix)), largest_need=0)
        assert pinning.is_computing
        time.sleep(0.004 * number)
        pinning.unpin("p")
        assert pinning.num_pinned_pages == 0
    until(pinning, lambda: not pinning.has_work)
    everything = tokens(NUM_PAGES * PAGE - 1, 100)
    assert len(target.core.answer(everything, num_tokens=1).tokens) == 1, "a page is held for good"


def test_pins_are_bounded(pinning: Prefixes) -> None:
    pinning.pin(Pin("p", "", tuple(tokens(5 * PAGE, 22))), largest_need=0)
    pinning.pin(Pin("q", "", tuple(tokens(4 * PAGE, 23))), largest_need=0)
    pinning.pin(Pin("r", "", tuple(tokens(3 * PAGE, 24))), largest_need=NUM_PAGES - 7)
    pinning.pin(Pin("s", "", tuple(tokens(3 * PAGE, 25))), largest_need=NUM_PAGES - 8)
    pinning.pin(Pin("none", "", (1, 2, 3)), largest_need=0)
    assert pinning.num_pinned_pages == 8
    for pin_id in "qrspx":
        pinning.unpin(pin_id)
    assert pinning.num_pinned_pages == 0


def test_a_request_that_has_no_room_beside_pins_runs(target: Engine, pinning: Prefixes) -> None:
    pinning.pin(Pin("p", "", tuple(tokens(5 * PAGE, 26))), largest_need=0)
    until(pinning, lambda: not pinning.is_computing)
    pinning.unpin_for(NUM_PAGES - 5)
    assert pinning.num_pinned_pages == 5
    pinning.unpin_for(NUM_PAGES - 4)
    assert pinning.num_pinned_pages == 0
    long = tokens((NUM_PAGES - 4) * PAGE - 3, 27)
    assert len(target.core.answer(long, num_tokens=3).tokens) == 3


def test_a_pin_that_cannot_be_computed_ends(pinning: Prefixes, monkeypatch: pytest.MonkeyPatch) -> None:
    failing: Future[None] = Future()
    failing.set_exception(RuntimeError("too long"))
    with monkeypatch.context() as broken:
        broken.setattr(pinning._core, "run", lambda *_: failing)
        pinning.pin(Pin("p", "", tuple(tokens(PAGE, 28))), largest_need=0)
        pinning.settle()
    assert pinning.num_pinned_pages == 0
    pinning.pin(Pin("p", "", tuple(tokens(PAGE, 28))), largest_need=0)
    assert pinning.num_pinned_pages == 1


def test_to_cancel_an_internal_request_ends_it(target: Engine) -> None:
    request = target.core.run(tokens(7 * PAGE, 29), "", {})
    request.cancel()
    with pytest.raises(CancelledError):
        request.result(60)
    assert len(target.core.answer(tokens(NUM_PAGES * PAGE - 1, 101), num_tokens=1).tokens) == 1
