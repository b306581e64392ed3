"""Around a step: who is asked, in which order, and how little is done while nobody is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from protos.v1 import drafting_pb2 as pb
from tests.workers.engine.drive import request, run, torch_engine
from tests.workers.speculative.oracle import Always
from workers.engine.torch_engine import TorchEngine
from workers.speculative.controller import Controller
from workers.speculative.pool.client import Pool
from workers.speculative.pool.members import Members
from workers.speculative.protocol import Context, Key, Verified
from workers.speculative.speculator import Speculator
from workers.speculative.tree import DraftTree

PROMPT = list(range(40, 60))


class Noting:
    """A drafter with the same guess for everyone. Remembers what it was asked."""

    num_top_ids = 0

    def __init__(self, name: str, probability: float, *, fails_at: str = "") -> None:
        self.name = name
        self._draft = DraftTree.chain([1, 2, 3, 4], [probability] * 4)
        self._fails_at = fails_at
        self.asked: list[Context] = []
        self.looks = 0

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        self._fail("propose")
        self.asked += contexts
        return [self._draft] * len(contexts)

    def learn(self, verified: Sequence[Verified]) -> None:
        self._fail("learn")

    def forget(self, key: Key) -> None:
        self._fail("forget")

    def is_sure(self, contexts: Sequence[Context]) -> bool:
        self.looks += 1
        self._fail("is_sure")
        return False

    def _fail(self, where: str) -> None:
        if where == self._fails_at:
            raise RuntimeError(where)


class Never(Controller):
    """Lets nobody draft, and says that this goes on."""

    def __init__(self) -> None:
        super().__init__(1, max_nodes=4)
        self.num_choices = 0

    def choose(self, num_sequences: int, **_: object) -> tuple[int, ...]:
        self.num_choices += 1
        return ()

    def rest(self, num_sequences: int, most: int) -> int:
        return most


def engine_with(
    directory: Path, *drafters: Noting | Pool, controller: Controller, pool: Pool | None = None
) -> TorchEngine:
    engine = torch_engine(directory)
    engine._speculator = Speculator(drafters, max_nodes=4, controller=controller, pool=pool)
    return engine


@pytest.mark.parametrize(("probability", "waits"), [(0.9, False), (0.2, True)])
def test_the_pool_is_not_waited_for_where_another_drafter_is_sure(
    target_dir: Path, probability: float, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is asked last, wherever it stands."""
    pool, seen = Pool(Members(), pb.TargetHello(), deadline_s=1.0), []
    local = Noting("local", probability)

    def propose(contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        assert len(local.asked) > len(seen)
        seen.extend(contexts)
        return [DraftTree()] * len(contexts)

    monkeypatch.setattr(pool, "propose", propose)
    engine = engine_with(target_dir, pool, local, controller=Always(2, max_nodes=4), pool=pool)
    run(engine, request("a", PROMPT, max_tokens=6, ignore_eos=True))
    assert seen
    assert {context.can_wait for context in seen} == {waits}


def test_nothing_is_chosen_while_plain_steps_follow(target_dir: Path) -> None:
    controller, drafter = Never(), Noting("a", 0.5)
    engine = engine_with(target_dir, drafter, controller=controller)
    run(engine, request("a", PROMPT, max_tokens=100, ignore_eos=True))
    assert 0 < controller.num_choices <= 8
    assert 0 < drafter.looks <= controller.num_choices
    first = controller.num_choices
    engine.submit(request("b", PROMPT, max_tokens=5, ignore_eos=True))
    run(engine, request("c", PROMPT, max_tokens=9, ignore_eos=True))
    assert controller.num_choices >= first + 2  # other sequences: it is asked anew


@pytest.mark.parametrize("where", ["propose", "learn", "forget", "is_sure"])
def test_a_drafter_that_fails_anywhere_is_left_out_and_harms_nobody(target_dir: Path, where: str) -> None:
    requests = [request(str(number), [*PROMPT, number], max_tokens=30, ignore_eos=True) for number in range(3)]
    expected = {key: output.tokens for key, output in run(torch_engine(target_dir), *requests).items()}
    controller = Never() if where == "is_sure" else Always(2, max_nodes=4)
    broken, whole = Noting("broken", 0.5, fails_at=where), Noting("whole", 0.5)
    engine = engine_with(target_dir, broken, whole, controller=controller)
    assert {key: output.tokens for key, output in run(engine, *requests).items()} == expected
    assert engine._speculator is not None
    assert engine._speculator._panel.broken == {0}
    assert whole.looks if where == "is_sure" else len(whole.asked) > len(requests)
