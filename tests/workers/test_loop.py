"""What sessions hear of the prefix cache: the engine loop, turn by turn, with a real engine."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from protos.blocks import block_hashes
from protos.messages import Delta, Failure, Request, Sampling
from tests.workers.engine.drive import torch_engine
from tests.workers.kv.mirror import Mirror
from workers.engine.torch_engine import TorchEngine
from workers.kv import events
from workers.loop import EngineLoop, Frame
from workers.metrics import WorkerMetrics

PAGE = 8
PROMPT = list(range(1, 3 * PAGE + 4))


class Story:
    """A loop that turns when told to, and what its sessions have got."""

    def __init__(self, engine: TorchEngine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        metrics = WorkerMetrics(model_name="m", worker_id="w")
        self.loop = EngineLoop(engine, tokenizer, metrics, deliver=self._deliver, stall_s=60)
        self.frames: defaultdict[int, list[Frame]] = defaultdict(list)
        self.mirrors: defaultdict[int, Mirror] = defaultdict(Mirror)
        self.outputs: defaultdict[tuple[int, str], list[int]] = defaultdict(list)

    def open(self, *sessions: int) -> None:
        for session in sessions:
            self.loop.open(session)
        self.turn()

    def submit(self, session: int, request_id: str, prompt: Sequence[int], *, salt: str = "", **sampling: int) -> None:
        settings = {"seed": 1, "max_tokens": 5, "ignore_eos": True, "temperature": 0.0, **sampling}
        self.loop.submit(session, Request(request_id, tuple(prompt), Sampling(**settings), cache_salt=salt))  # type: ignore[arg-type]

    def turn(self) -> None:
        self.loop._turn()
        self.engine.check()

    def finish(self) -> None:
        while self.loop.num_live:
            self.turn()

    @property
    def blocks(self) -> set[int]:
        return set(self.engine.kv_blocks())

    def lone(self, session: int) -> list[Frame]:
        """Frames that tell of the cache alone, but for snapshots."""
        return [f for f in self.frames[session] if not f.deltas and f.kv_events and not f.kv_events.snapshot]

    def _deliver(self, frames: list[Frame]) -> None:
        for frame in frames:
            assert frame.deltas or frame.kv_events, "an empty frame"
            self.frames[frame.session].append(frame)
            if frame.kv_events is not None:
                self.mirrors[frame.session].receive(frame.kv_events)
            for delta in frame.deltas:
                self._take(frame.session, delta)

    def _take(self, session: int, delta: Delta | Failure) -> None:
        assert isinstance(delta, Delta), delta
        self.outputs[session, delta.request_id] += delta.token_ids


Make = Callable[..., Story]


@pytest.fixture
def make(target_dir: Path, tokenizer: Tokenizer) -> Make:
    def story(**settings: int) -> Story:
        return Story(torch_engine(target_dir, page_size=PAGE, **settings), tokenizer)  # type: ignore[arg-type]

    return story


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes wait for a frame however long it takes."""
    monkeypatch.setattr(events, "HOLD_S", 1e9)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes wait for nothing."""
    monkeypatch.setattr(events, "HOLD_S", 0.0)


def test_a_session_begins_with_a_snapshot(make: Make) -> None:
    story = make()
    story.open(1)
    story.submit(1, "a", PROMPT)
    story.finish()
    held = story.blocks
    story.open(2)
    [frame] = story.frames[2]
    assert frame.kv_events is not None
    assert (frame.kv_events.snapshot, frame.deltas) == (True, ())
    assert story.mirrors[2].blocks == held == story.mirrors[1].blocks
    assert len(held) == (len(PROMPT) + 4) // PAGE


def test_cached_blocks_are_named_as_their_prompts_are(make: Make) -> None:
    story = make()
    story.open(1)
    prompts = [[7 * n + i for i in range(5 + 9 * n)] for n in range(5)]
    for number, prompt in enumerate([*prompts, PROMPT, [*PROMPT, 9, 9, 9]]):
        story.submit(1, str(number), prompt, max_tokens=1, salt="x" * (number % 2))
    story.finish()
    everything = [("x" * (n % 2), p) for n, p in enumerate([*prompts, PROMPT, [*PROMPT, 9, 9, 9]])]
    assert story.mirrors[1].blocks == {name for salt, p in everything for name in block_hashes(salt, p, PAGE)}


@pytest.mark.usefixtures("patient")
def test_blocks_are_told_with_the_first_deltas_of_their_step(make: Make) -> None:
    story = make()
    story.open(1)
    story.submit(1, "a", PROMPT)
    story.turn()
    frame = story.frames[1][-1]
    assert frame.kv_events is not None
    assert frame.kv_events.stored == tuple(block_hashes("", PROMPT, PAGE))
    assert [delta.token_ids for delta in frame.deltas if isinstance(delta, Delta)] == [
        tuple(story.outputs[1, "a"]),
    ]


@pytest.mark.usefixtures("patient")
def test_changes_cause_no_frames_of_their_own(make: Make) -> None:
    story = make()
    story.open(1)
    for number in range(4):
        story.submit(1, str(number), [number, *PROMPT], max_tokens=3 * PAGE)
    story.finish()
    told = [frame for frame in story.frames[1] if frame.kv_events]
    assert len(story.frames[1]) == 1 + 3 * PAGE
    assert (story.lone(1), len(told) > 4) == ([], True)
    assert story.mirrors[1].blocks == story.blocks


@pytest.mark.usefixtures("patient")
def test_a_paced_session_hears_of_changes_when_it_hears_of_tokens(make: Make) -> None:
    story = make()
    story.open(1)
    story.loop.pace(1, 1e9)
    story.submit(1, "a", PROMPT, max_tokens=5 * PAGE)
    story.finish()
    paced = story.frames[1][1:]
    assert all(frame.deltas for frame in paced)
    assert len(paced) < 4
    assert story.mirrors[1].blocks == story.blocks == set(block_hashes("", whole(story, "a"), PAGE))


@pytest.mark.usefixtures("hasty")
def test_changes_that_have_waited_long_enough_go_alone(make: Make) -> None:
    story = make()
    story.open(1)
    story.loop.pace(1, 1e9)
    story.submit(1, "a", PROMPT, max_tokens=5 * PAGE)
    while story.loop.num_live:
        story.turn()
        assert story.mirrors[1].blocks == story.blocks
    assert len(story.lone(1)) >= 3
    assert all(frame.load.num_running == 1 for frame in story.lone(1))


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("is_cancelled", [False, True])
def test_nothing_is_held_back_when_no_step_follows(make: Make, is_cancelled: bool) -> None:
    story = make()
    story.open(1, 2)
    story.submit(1, "a", PROMPT, max_tokens=2 * PAGE)
    story.turn()
    assert (story.mirrors[2].blocks, len(story.mirrors[1].blocks)) == (set(), 3)
    if is_cancelled:
        story.loop.cancel(1, "a")
    story.finish()
    assert story.mirrors[1].blocks == story.mirrors[2].blocks == story.blocks
    assert len(story.frames[2]) == 2


@pytest.mark.usefixtures("patient")
def test_a_resync_tells_everything_to_the_one_who_asks(make: Make) -> None:
    story = make()
    story.open(1, 2)
    story.submit(1, "a", PROMPT, max_tokens=3 * PAGE)
    story.turn()
    story.loop.resync(2)
    story.turn()
    assert story.mirrors[2].blocks == story.blocks
    assert [story.mirrors[session].num_snapshots for session in (1, 2)] == [1, 2]
    story.finish()
    assert story.mirrors[1].blocks == story.mirrors[2].blocks == story.blocks


def test_a_closed_session_gets_nothing_and_frees_what_it_had(make: Make) -> None:
    story = make()
    story.open(1, 2)
    story.submit(1, "a", PROMPT, max_tokens=100)
    story.turn()
    story.loop.close(1)
    story.submit(1, "late", PROMPT)
    story.loop.resync(1)
    num_frames = len(story.frames[1])
    story.turn()
    assert (story.loop.num_live, len(story.frames[1])) == (0, num_frames)
    assert story.engine.load().kv_used_tokens == 0
    assert story.mirrors[2].blocks == story.blocks


def test_a_cache_that_is_off_is_told_once_as_empty(target_dir: Path, tokenizer: Tokenizer) -> None:
    story = Story(torch_engine(target_dir, page_size=PAGE, prefix_cache=False), tokenizer)
    story.open(1)
    story.submit(1, "a", PROMPT, max_tokens=3 * PAGE)
    story.finish()
    [told] = [frame.kv_events for frame in story.frames[1] if frame.kv_events]
    assert (told.snapshot, told.stored) == (True, ())


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("seed", range(3))
def test_mirrors_stay_equal_whatever_is_asked_for(make: Make, seed: int) -> None:
    story, chance = make(num_pages=24, step_tokens=64), random.Random(seed)
    wander(story, chance, check=lambda: expect_equal(story))
    story.finish()
    expect_equal(story)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("seed", range(3))
def test_mirrors_that_hear_rarely_are_equal_in_the_end(make: Make, seed: int) -> None:
    story, chance = make(num_pages=24, step_tokens=64), random.Random(seed)
    wander(story, chance, check=lambda: expect_bounded(story))
    story.finish()
    expect_equal(story)


def wander(story: Story, chance: random.Random, *, check: Callable[[], None]) -> None:
    """Random submits, cancels, resyncs, sessions that come and go, and more prompts than there is memory for."""
    story.open(1)
    num_evicted = num_stored = 0
    for count in range(120):
        session = chance.randrange(1, 4)
        match chance.randrange(6):
            case 0 | 1:
                prompt = [chance.randrange(3) for _ in range(PAGE)] * chance.randrange(1, 5) + [count]
                story.submit(session, str(count), prompt, max_tokens=chance.randrange(1, 20), salt=chance.choice("ab"))
            case 2:
                story.loop.cancel(session, str(chance.randrange(count + 1)))
            case 3 if session not in story.loop._outboxes:
                story.mirrors.pop(session, None)
                story.loop.open(session)
            case 4 if chance.random() < 0.3:
                story.loop.close(session)
            case 5:
                story.loop.resync(session)
        before = story.blocks
        story.turn()
        num_stored += len(story.blocks - before)
        num_evicted += len(before - story.blocks)
        check()
    assert num_stored > num_evicted > 24, "nothing of interest has happened"


def expect_equal(story: Story) -> None:
    for session in story.loop._outboxes:
        assert story.mirrors[session].blocks == story.blocks


def expect_bounded(story: Story) -> None:
    for outbox in story.loop._outboxes.values():
        assert len(outbox.events._journal) <= 2 * 24


def whole(story: Story, request_id: str) -> list[int]:
    """The tokens of a request whose keys and values were computed: all but the last."""
    return [*PROMPT, *story.outputs[1, request_id]][:-1]
