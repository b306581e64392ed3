"""Prefixes that one engine has computed and another uses, and prefixes that stay."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.blocks import block_hashes
from protos.messages import Pin
from tests.workers.engine.drive import Output, Outputs, drain, request, run, step, torch_engine
from workers.engine.protocol import Adoption
from workers.engine.torch_engine import TorchEngine
from workers.kv.block import BlockLabel, BlockMemory, Packing

PAGE = 32
NUM_PAGES = 64
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.1}


def tokens(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 4000) for _ in range(count)]


PREFIX = tokens(5 * PAGE)
ANSWERS = [tokens(7 + 9 * i, seed=i + 1) for i in range(3)]


class Memory(BlockMemory):
    """Tells how often it was closed."""

    num_closed = 0

    def close(self) -> None:
        super().close()
        self.num_closed += 1


Make = Callable[..., TorchEngine]


@pytest.fixture(params=["auto", "off"])
def make(request: pytest.FixtureRequest, target_dir: Path) -> Make:
    """Engines that map blocks, and engines that copy them."""

    def engine(**settings: Any) -> TorchEngine:
        return torch_engine(target_dir, kernels=request.param, **{"num_pages": NUM_PAGES, **settings})

    return engine


def maps(engine: TorchEngine) -> bool:
    return engine.kernels != "torch"


def exported(engine: TorchEngine, prefix: Sequence[int], salt: str = "") -> memoryview | None:
    """The packed block of a prefix that the engine has."""
    assert engine.block_format is not None
    packing = Packing(engine.block_format.label(salt, prefix), len(prefix) // PAGE * engine.block_format.page_bytes)
    has_all = engine.export_prefix(salt, prefix, packing.payload)
    engine.check()
    assert has_all or not any(packing.payload)
    return packing.seal() if has_all else None


def opened(data: memoryview, expected: BlockLabel) -> Memory:
    memory = mmap.mmap(-1, data.nbytes)
    memory[:] = data
    return Memory(memoryview(memory).toreadonly(), expected)


def block_of(engine: TorchEngine, prefix: Sequence[int], salt: str = "") -> Memory:
    """From an engine that has the prefix."""
    data = exported(engine, prefix, salt)
    assert data is not None
    assert engine.block_format is not None
    return opened(data, engine.block_format.label(salt, prefix))


def with_prefix(engine: TorchEngine, prefix: Sequence[int] = PREFIX, salt: str = "") -> TorchEngine:
    run(engine, request("warm", [*prefix, 1], max_tokens=1, cache_salt=salt))
    return engine


def answers(engine: TorchEngine, **fields: Any) -> Outputs:
    asked = [request(str(i), [*PREFIX, *rest], seed=i, max_tokens=20, **fields) for i, rest in enumerate(ANSWERS)]
    return run(engine, *asked)


def said(outputs: Outputs) -> dict[tuple[str, int], list[int]]:
    return {key: output.tokens for key, output in outputs.items()}


@pytest.mark.parametrize("fields", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_an_adopted_prefix_gives_the_same_text_without_being_computed(make: Make, fields: dict[str, Any]) -> None:
    source, target = with_prefix(make()), make()
    adoption = target.adopt_prefix("", PREFIX, block_of(source, PREFIX))
    assert adoption == Adoption(len(PREFIX), "mapped" if maps(target) else "copied")
    target.check()
    found = answers(target, **fields)
    assert said(found) == said(answers(make(), **fields))
    assert [output.cached_tokens for output in found.values()] == [len(PREFIX)] * 3
    num_answered = sum(len(output.tokens) - 1 for output in found.values())
    assert target.stats().computed_tokens == sum(map(len, ANSWERS)) + num_answered


def test_what_was_adopted_goes_on_with_the_same_bits(make: Make) -> None:
    source, target = with_prefix(make()), make()
    target.adopt_prefix("", PREFIX, block_of(source, PREFIX))
    first, second = exported(source, PREFIX), exported(target, PREFIX)
    assert first is not None
    assert first == second


def test_only_what_is_there_as_a_whole_is_exported(make: Make) -> None:
    source = with_prefix(make())
    assert exported(source, tokens(2 * PAGE, seed=9)) is None
    assert exported(source, [*PREFIX[: 2 * PAGE], *tokens(PAGE, seed=9)]) is None
    data = exported(source, PREFIX[: 2 * PAGE])
    assert data is not None
    assert source.block_format is not None
    opened(data, source.block_format.label("", PREFIX[: 2 * PAGE]))
    assert source.load().kv_used_tokens == 0


def test_salts_keep_apart(make: Make) -> None:
    source, target = with_prefix(make(), salt="a"), make()
    assert exported(source, PREFIX, salt="b") is None
    target.adopt_prefix("a", PREFIX, block_of(source, PREFIX, salt="a"))
    prompt = [*PREFIX, 1, 2]
    [other] = run(target, request("x", prompt, cache_salt="b")).values()
    [same] = run(target, request("y", prompt, cache_salt="a")).values()
    assert (other.cached_tokens, same.cached_tokens) == (0, len(PREFIX))
    assert other.tokens == same.tokens


def test_routers_hear_of_what_was_adopted(make: Make) -> None:
    source, target = with_prefix(make()), make()
    target.adopt_prefix("", PREFIX, block_of(source, PREFIX))
    assert target.take_kv_changes() == (tuple(block_hashes("", PREFIX, PAGE)), ())


def test_a_block_that_lacks_nothing_new_is_closed(make: Make) -> None:
    source, target = with_prefix(make()), with_prefix(make())
    block = block_of(source, PREFIX)
    assert target.adopt_prefix("", PREFIX, block) == Adoption(len(PREFIX), "unused")
    assert block.num_closed == 1
    target.check()


def test_what_is_there_already_stays(make: Make) -> None:
    source, target = with_prefix(make()), with_prefix(make(), PREFIX[: 2 * PAGE])
    target.adopt_prefix("", PREFIX, block_of(source, PREFIX))
    assert target.stats().kv_foreign_pages == (3 if maps(target) else 0)
    assert said(answers(target)) == said(answers(make()))


def test_a_partly_equal_page_is_copied_from_a_foreign_one(make: Make) -> None:
    source, target, plain = with_prefix(make()), make(), make()
    target.adopt_prefix("", PREFIX, block_of(source, PREFIX))
    prompt = [*PREFIX[: 2 * PAGE + 20], *tokens(30, seed=5)]
    [found], [expected] = (list(run(one, request("a", prompt)).values()) for one in (target, plain))
    assert found.cached_tokens == 2 * PAGE + 20
    assert found.tokens == expected.tokens


def test_blocks_are_unmapped_when_the_last_page_is_out_of_use(target_dir: Path) -> None:
    source = torch_engine(target_dir, num_pages=NUM_PAGES)
    target = torch_engine(target_dir, num_pages=12)
    if not maps(target):
        pytest.skip("nothing is mapped without native kernels")
    blocks = []
    for number in range(4):
        prefix = tokens(5 * PAGE, seed=100 + number)
        with_prefix(source, prefix)
        blocks.append(block_of(source, prefix))
        assert target.adopt_prefix("", prefix, blocks[-1]).way == "mapped"
        assert target.stats().kv_foreign_pages <= 12
        target.check()
        run(target, request("a", [*prefix, 1], max_tokens=2))
    assert [block.num_closed for block in blocks] == [1, 1, 0, 0]
    assert target.stats().kv_free_pages + target.stats().kv_cached_pages == 12


def test_a_block_that_lies_askew_is_copied(make: Make) -> None:
    source, target = with_prefix(make()), make()
    data = exported(source, PREFIX)
    assert data is not None
    assert source.block_format is not None
    askew = np.empty(data.nbytes + 64, np.uint8)
    start = (-askew.ctypes.data) % 64 + 1
    askew[start : start + data.nbytes] = np.frombuffer(data, np.uint8)
    askew = askew[start : start + data.nbytes]
    block = Memory(memoryview(askew), source.block_format.label("", PREFIX))
    assert target.adopt_prefix("", PREFIX, block) == Adoption(len(PREFIX), "copied")
    assert block.num_closed == 1
    assert said(answers(target)) == said(answers(make()))


def test_a_block_in_use_is_not_given_up_for_another(target_dir: Path) -> None:
    source, target = torch_engine(target_dir, num_pages=NUM_PAGES), torch_engine(target_dir, num_pages=12)
    if not maps(target):
        pytest.skip("nothing is mapped without native kernels")
    long, other = tokens(7 * PAGE), tokens(6 * PAGE, seed=3)
    outputs: dict[tuple[str, int], Output] = {}
    with_prefix(with_prefix(source, long), other)
    used, late = block_of(source, long), block_of(source, other)
    target.adopt_prefix("", long, used)
    target.submit(request("a", [*long, 1], max_tokens=12, ignore_eos=True))
    step(target, outputs)
    assert target.adopt_prefix("", other, late) == Adoption(len(other), "copied")
    drain(target, outputs)
    assert (used.num_closed, late.num_closed) == (0, 1)
    plain = torch_engine(target_dir, num_pages=12)
    assert said(run(plain, request("a", [*long, 1], max_tokens=12, ignore_eos=True))) == said(outputs)


def test_without_memory_nothing_is_copied(target_dir: Path) -> None:
    source, target = (
        with_prefix(torch_engine(target_dir, kernels="off")),
        torch_engine(target_dir, kernels="off", num_pages=8),
    )
    outputs: dict[tuple[str, int], Output] = {}
    target.submit(request("a", tokens(4 * PAGE + 1, seed=3), max_tokens=4, ignore_eos=True))
    step(target, outputs)
    block = block_of(source, PREFIX)
    assert target.adopt_prefix("", PREFIX, block) == Adoption(0, "unused")
    assert block.num_closed == 1
    drain(target, outputs)
    target.check()


def test_a_pin_survives_pressure(make: Make) -> None:
    engine = make(num_pages=24)
    engine.pin(Pin("p", "", tuple(PREFIX)))
    drain(engine)
    assert set(block_hashes("", PREFIX, PAGE)) == set(engine.kv_blocks())
    for number in range(6):
        run(engine, request(str(number), tokens(9 * PAGE, seed=10 + number), max_tokens=3, n=2, temperature=1.0))
    assert set(block_hashes("", PREFIX, PAGE)) <= set(engine.kv_blocks())
    assert engine.stats().kv_pinned_pages == 5
    engine.unpin("p")
    run(engine, request("a", tokens(22 * PAGE, seed=1), max_tokens=3))
    assert not set(block_hashes("", PREFIX, PAGE)) <= set(engine.kv_blocks())
    assert engine.stats().kv_pinned_pages == 0


def test_a_pinned_prefix_is_computed_once_and_found(make: Make) -> None:
    engine = make()
    engine.pin(Pin("p", "s", (*PREFIX, 7)))
    drain(engine)
    assert engine.stats().computed_tokens == len(PREFIX)
    engine.pin(Pin("q", "s", tuple(PREFIX)))
    assert not engine.has_work
    [output] = run(engine, request("a", [*PREFIX, 1], cache_salt="s")).values()
    assert output.cached_tokens == len(PREFIX)


def test_pins_of_one_prefix_are_counted(make: Make) -> None:
    engine = make()
    for pin_id in ("p", "q", "q"):
        engine.pin(Pin(pin_id, "", tuple(PREFIX)))
    engine.unpin("p")
    assert engine.has_work, "computed for the other"
    drain(engine)
    assert engine.load().kv_used_tokens == len(PREFIX)
    engine.unpin("p")
    assert engine.load().kv_used_tokens == len(PREFIX)
    engine.unpin("q")
    assert engine.load().kv_used_tokens == 0
    engine.check()


def test_a_pin_that_ends_while_it_is_computed_is_not_computed_further(make: Make) -> None:
    engine = make(step_tokens=64)
    engine.pin(Pin("p", "", tuple(PREFIX)))
    step(engine, {})
    engine.unpin("p")
    assert not engine.has_work
    assert engine.load().kv_used_tokens == 0
    engine.check()


def test_pins_are_bounded(make: Make) -> None:
    engine = make(num_pages=24)  # six may be pinned
    engine.pin(Pin("p", "", tuple(PREFIX)))
    engine.pin(Pin("q", "", tuple(tokens(2 * PAGE, seed=4))))
    engine.pin(Pin("r", "", tuple(tokens(PAGE, seed=5))))
    engine.pin(Pin("none", "", (1, 2, 3)))
    drain(engine)
    assert engine.stats().kv_pinned_pages == 6
    for pin_id in "qprx":
        engine.unpin(pin_id)
    assert engine.load().kv_used_tokens == 0


def test_a_request_that_has_no_room_beside_pins_runs(make: Make) -> None:
    engine = make(num_pages=24)
    engine.pin(Pin("p", "", tuple(PREFIX)))
    drain(engine)
    long = request("a", tokens(20 * PAGE, seed=1), max_tokens=8, ignore_eos=True)
    [output] = run(engine, long).values()
    assert len(output.tokens) == 8
    assert engine.stats().kv_pinned_pages == 0
    engine.submit(long)
    engine.pin(Pin("p", "", tuple(PREFIX)))
    drain(engine)
    assert engine.stats().kv_pinned_pages == 0


def test_a_pin_whose_step_fails_ends(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    engine.pin(Pin("p", "", tuple(PREFIX)))

    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("not enough memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine._runner, "execute", out_of_memory)
        assert engine.step().failures
    engine.check()
    assert not engine.has_work
    assert engine.stats().kv_pinned_pages == 0
    engine.pin(Pin("p", "", tuple(PREFIX)))
    drain(engine)
    assert engine.stats().kv_pinned_pages == 5


def test_engines_of_other_weights_have_other_formats(make: Make, target_dir: Path) -> None:
    formats = {make().block_format, make(dtype="bfloat16").block_format, make(page_size=64).block_format}
    assert len(formats) == 3
    assert torch_engine(target_dir, prefix_cache=False).block_format is None
