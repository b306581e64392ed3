"""What every engine promises the loop."""

from collections.abc import Callable
from pathlib import Path

import pytest

from protos.errors import DuplicateRequest
from protos.messages import ModelInfo, Pin, ResumePoint
from tests.workers.engine.drive import drain, request, run, settle, step, torch_engine
from workers.engine.fake import FakeEngine
from workers.engine.protocol import Engine

PROMPT = list(range(1, 40))
Make = Callable[[], Engine]


@pytest.fixture(params=["torch", "fake"])
def make(request: pytest.FixtureRequest, root: Path) -> Make:
    if request.param == "fake":
        return lambda: FakeEngine(ModelInfo("fake", 1000, 4096))
    return lambda: torch_engine(root / "models" / "target")


def test_an_idle_step_does_nothing(make: Make) -> None:
    assert make().step().deltas == ()


def test_every_output_ends_once_with_its_tokens(make: Make) -> None:
    outputs = run(make(), *(request(str(i), PROMPT[i:], max_tokens=i + 1, n=2, ignore_eos=True) for i in range(4)))
    assert {key: len(output.tokens) for key, output in outputs.items()} == {
        (str(i), index): i + 1 for i in range(4) for index in range(2)
    }
    assert all(output.finish and output.finish.reason == "length" for output in outputs.values())
    assert all(output.cached_tokens is not None for output in outputs.values())


def test_live_ids_are_unique_and_free_again_after_the_end(make: Make) -> None:
    engine = make()
    engine.submit(request("a", PROMPT))
    with pytest.raises(DuplicateRequest):
        engine.submit(request("a", PROMPT))
    drain(engine)
    assert run(engine, request("a", PROMPT))["a", 0].finish


def test_cancel_is_silent_and_idempotent(make: Make) -> None:
    engine = make()
    engine.submit(request("a", PROMPT, max_tokens=500, n=2))
    engine.submit(request("b", PROMPT, max_tokens=3, ignore_eos=True))
    step(engine, {})
    engine.cancel("a", 0)
    engine.cancel("a", 0)
    engine.cancel("unknown")
    engine.cancel("a")
    outputs = drain(engine)
    assert set(outputs) == {("b", 0)}
    assert engine.load().num_running == 0
    assert engine.load().kv_used_tokens == 0


def test_started_names_each_request_once(make: Make) -> None:
    engine = make()
    engine.submit(request("a", PROMPT, n=3))
    started: list[str] = []
    while engine.has_work:
        started += engine.step().started
    assert started == ["a"]


def test_a_resumed_output_goes_on_at_its_position(make: Make) -> None:
    asked = {"max_tokens": 9, "ignore_eos": True, "temperature": 1.0}
    whole = run(make(), request("a", PROMPT, n=2, **asked))  # type: ignore[arg-type]
    points = (ResumePoint(0, tuple(whole["a", 0].tokens[:4])), ResumePoint(1, (), finished=True))
    rest = run(make(), request("a", PROMPT, n=2, resume=points, **asked))  # type: ignore[arg-type]
    assert set(rest) == {("a", 0)}
    assert rest["a", 0].tokens == whole["a", 0].tokens[4:]


def test_stop_tokens_end_an_output(make: Make) -> None:
    plain = run(make(), request("a", PROMPT, max_tokens=6, ignore_eos=True))["a", 0].tokens
    stopped = run(make(), request("a", PROMPT, max_tokens=6, ignore_eos=True, stop_token_ids=(plain[2],)))["a", 0]
    assert stopped.tokens == plain[: plain.index(plain[2]) + 1]
    assert stopped.finish is not None
    assert stopped.finish.stop_token_id == plain[2]


def test_changes_of_the_prefix_cache_add_up_to_what_it_holds(make: Make) -> None:
    engine = make()
    settle(engine)
    told = set(engine.kv_blocks())
    for number in range(3):
        engine.submit(request(str(number), [*PROMPT, number], max_tokens=40, ignore_eos=True))
    while engine.load().num_running + engine.load().num_waiting:
        step(engine, {})
        stored, removed = engine.take_kv_changes()
        told = (told - set(removed)) | set(stored)
        assert told == set(engine.kv_blocks())
    stored, removed = settle(engine)
    told = (told - set(removed)) | set(stored)
    assert told == set(engine.kv_blocks())
    assert engine.take_kv_changes() == ((), ())
    assert len(told) == engine.stats().kv_cached_pages


def test_pins_leave_requests_alone_and_end_silently(make: Make) -> None:
    engine = make()
    engine.pin(Pin("p", "", tuple(PROMPT)))
    [output] = run(engine, request("a", PROMPT, max_tokens=4, ignore_eos=True)).values()
    assert len(output.tokens) == 4
    engine.unpin("p")
    engine.unpin("p")
    engine.unpin("unknown")
    assert not engine.has_work
    assert engine.load().kv_used_tokens == 0


def test_has_work_says_whether_a_step_would_do_anything(make: Make) -> None:
    engine = make()
    assert not engine.has_work
    engine.submit(request("a", PROMPT, max_tokens=2, ignore_eos=True))
    assert engine.has_work
    drain(engine)
    assert not engine.has_work


def test_a_prefix_that_is_not_there_is_not_exported(make: Make) -> None:
    payload = bytearray(b"untouched")
    assert not make().export_prefix("", PROMPT[:32], memoryview(payload))
    assert payload == b"untouched"


def test_limits_say_what_runs_at_once(make: Make) -> None:
    limits = make().limits
    assert limits.step_tokens >= limits.max_running > 0


def test_stats_account_for_every_page(make: Make) -> None:
    engine = make()
    before = engine.stats().generation_tokens
    run(engine, request("a", PROMPT, ignore_eos=True))
    stats = engine.stats()
    assert stats.kv_free_pages + stats.kv_cached_pages == stats.kv_total_pages
    assert stats.generation_tokens == before + 8


def test_closing_is_idempotent(make: Make) -> None:
    engine = make()
    engine.close()
    engine.close()
