"""The vLLM engine keeps what every engine promises the loop: the same tests as for all others."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.blocks import block_hashes
from tests.vllm.drive import vllm_engine
from tests.workers.engine.drive import request, run, settle
from tests.workers.engine.test_contract import *  # noqa: F403 - every test of the contract, with this engine
from tests.workers.engine.test_contract import Make
from workers.engine.vllm.engine import VllmEngine
from workers.speculative.pool.members import Members, PoolAccess


@pytest.fixture(scope="module")
def members() -> Members:
    return Members()


@pytest.fixture(scope="module")
def shared(target_dir: Path, members: Members) -> Iterator[VllmEngine]:
    engine = vllm_engine(target_dir, pool=PoolAccess(members, token="secret"))  # as every worker has it
    yield engine
    engine.close()


def test_salts_keep_caches_apart(shared: VllmEngine) -> None:
    prompt = list(range(100, 170))
    cached = {}
    for number, salt in enumerate(["a", "b", "a"]):
        [output] = run(shared, request(str(number), prompt, max_tokens=1, cache_salt=salt)).values()
        cached[number] = output.cached_tokens
    assert cached == {0: 0, 1: 0, 2: 64}
    settle(shared)
    held = set(shared.kv_blocks())
    assert held >= {*block_hashes("a", prompt, 32), *block_hashes("b", prompt, 32)}
    assert not held & set(block_hashes("", prompt, 32))


def test_without_drafters_nothing_is_asked_of_vllms_worker(
    shared: VllmEngine, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(shared._core, "ask_workers", lambda method, *_: asked.append(method))
    members.set({"a drafter": "127.0.0.1:1"})
    run(shared, request("a", list(range(1, 40)), max_tokens=4, ignore_eos=True))
    assert not asked


@pytest.fixture
def make(request: pytest.FixtureRequest, target_dir: Path) -> Make:
    """The module's engine, which each test leaves idle; one of its own for what ends it."""
    if request.node.name == "test_closing_is_idempotent":
        return lambda: vllm_engine(target_dir)
    return lambda: request.getfixturevalue("shared")
