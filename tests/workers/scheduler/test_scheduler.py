"""The scheduler with a toy model: every plan is sound, whatever is shared, chunked, preempted or evicted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.errors import DuplicateRequest, EmptyPrompt, Overloaded, PromptTooLong
from protos.messages import ResumePoint
from tests.workers.scheduler.toy import Toy, expected

PROMPT = [1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_one_request() -> None:
    toy = Toy()
    toy.add("a", PROMPT)
    toy.run()
    assert toy.outputs["a", 0] == expected(PROMPT, 5)
    assert toy.finishes["a", 0].reason == "length"
    assert toy.cache.num_available == toy.cache.num_pages


def test_chunks_respect_the_budget() -> None:
    toy = Toy(step_tokens=8, max_running=8)
    toy.add("long", list(range(50)))
    plans = []
    while toy.scheduler.has_work:
        plans.append(toy.step().num_tokens)
    assert plans[:6] == [8] * 6
    assert toy.outputs["long", 0] == expected(range(50), 5)


def test_decoding_goes_on_while_a_long_prompt_is_chunked() -> None:
    toy = Toy(step_tokens=8)
    toy.add("short", [1, 2], max_tokens=20)
    toy.step()
    toy.add("long", list(range(40)), max_tokens=1)
    for _ in range(4):
        assert {chunk.sequence.request.request_id for chunk in toy.step().chunks} == {"short", "long"}


def test_prompts_that_share_a_prefix_in_one_step_compute_it_once() -> None:
    toy = Toy(step_tokens=64)
    for name in "abcd":
        toy.add(name, [*range(16), ord(name)], max_tokens=1)
    plan = toy.step()
    assert len(plan.chunks) == 4
    assert plan.num_tokens == 17 + 3 * 1
    assert all(toy.outputs[name, 0] == expected([*range(16), ord(name)], 1) for name in "abcd")


def test_outputs_of_one_prompt_share_it() -> None:
    toy = Toy(step_tokens=64)
    toy.add("a", list(range(17)), max_tokens=3, n=4)
    plan = toy.step()
    assert plan.num_tokens == 17 + 3
    toy.run()
    assert all(toy.outputs["a", i] == expected(range(17), 3, i) for i in range(4))


def test_a_second_turn_finds_prompt_and_answer() -> None:
    toy = Toy()
    toy.add("a", PROMPT, max_tokens=10)
    toy.run()
    turn = [*PROMPT, *toy.outputs["a", 0], 3]
    toy.add("b", turn)
    toy.run()
    assert next(d.cached_tokens for d in toy.deltas if d.request_id == "b") >= 20
    assert toy.outputs["b", 0] == expected(turn, 5)


def test_different_salts_share_nothing() -> None:
    toy = Toy()
    for name in "ab":
        toy.add(name, PROMPT, cache_salt=name)  # type: ignore[arg-type]
        toy.run()
    assert [d.cached_tokens for d in toy.deltas if d.cached_tokens is not None] == [0, 0]


def test_preemption_changes_no_output() -> None:
    toy = Toy(num_pages=10, step_tokens=32)
    prompts = {name: [ord(name)] * 6 for name in "abcd"}
    for name, prompt in prompts.items():
        toy.add(name, prompt, max_tokens=20)
    toy.run()
    assert toy.scheduler.counters.num_preemptions > 0
    assert all(toy.outputs[name, 0] == expected(prompt, 20) for name, prompt in prompts.items())


def test_the_most_urgent_runs_first_and_is_preempted_last() -> None:
    toy = Toy(num_pages=10, step_tokens=32)
    toy.add("low", [1] * 6, max_tokens=20)
    toy.add("high", [2] * 6, max_tokens=20, priority=1)
    toy.add("mid", [3] * 6, max_tokens=20)
    assert toy.step().chunks[0].sequence.request.request_id == "high"
    toy.run()
    assert next(iter(toy.finishes)) == ("high", 0)


def test_cancel_frees_every_page_at_once() -> None:
    toy = Toy(step_tokens=8)
    toy.add("a", list(range(30)), n=2)
    toy.add("b", PROMPT)
    toy.step()
    toy.scheduler.cancel("a")
    toy.scheduler.cancel("b")
    toy.scheduler.check()
    assert not toy.scheduler.has_work
    assert toy.cache.num_available == toy.cache.num_pages


def test_cancel_of_one_output_leaves_the_others() -> None:
    toy = Toy()
    toy.add("a", PROMPT, n=3)
    toy.step()
    toy.scheduler.cancel("a", 1)
    toy.run()
    assert set(toy.finishes) == {("a", 0), ("a", 2)}


def test_a_failed_step_loses_only_its_own_requests() -> None:
    toy = Toy(step_tokens=12, max_running=1)
    toy.add("bad", PROMPT)
    toy.add("good", PROMPT)
    plan = toy.scheduler.plan()
    assert toy.scheduler.rollback(plan) == {"bad": [0]}
    toy.scheduler.check()
    toy.run()
    assert toy.outputs["good", 0] == expected(PROMPT, 5)


def test_sequences_that_relied_on_a_cancelled_one_go_on() -> None:
    toy = Toy(step_tokens=64)
    prompts = {name: [*range(16), ord(name)] for name in "abc"}
    for name, prompt in prompts.items():
        toy.add(name, prompt)
    plan = toy.step()
    assert [chunk.num_tokens for chunk in plan.chunks] == [17, 1, 1]  # b and c use what a computes
    toy.scheduler.cancel("a")
    toy.add("d", [*range(16), 4])
    toy.run()
    assert all(toy.outputs[name, 0] == expected(prompts[name], 5) for name in "bc")
    assert toy.outputs["d", 0] == expected([*range(16), 4], 5)


def test_nothing_is_cancelled_while_a_plan_is_out() -> None:
    toy = Toy()
    toy.add("a", PROMPT)
    plan = toy.scheduler.plan()
    with pytest.raises(AssertionError, match="between plan and commit"):
        toy.scheduler.cancel("a")
    toy.scheduler.commit(plan, toy.compute(plan))
    toy.scheduler.cancel("a")
    assert not toy.scheduler.has_work


def test_a_resumed_request_continues_where_it_was() -> None:
    whole = expected(PROMPT, 8)
    toy = Toy()
    toy.add("a", PROMPT, max_tokens=8, resume=(ResumePoint(0, tuple(whole[:3])),))  # type: ignore[arg-type]
    toy.run()
    assert toy.outputs["a", 0] == whole[3:]
    toy.add("b", PROMPT, max_tokens=8, resume=(ResumePoint(0, tuple(whole[:3])),))  # type: ignore[arg-type]
    toy.run()
    cached = [(delta.request_id, delta.cached_tokens) for delta in toy.deltas if delta.cached_tokens is not None]
    assert cached == [("a", 0), ("b", len(PROMPT))]  # on the first delta, of the prompt alone


def test_requests_that_can_never_run_are_refused() -> None:
    toy = Toy(num_pages=4, max_context=100)
    with pytest.raises(EmptyPrompt):
        toy.add("a", [])
    with pytest.raises(PromptTooLong, match="context of 100"):
        toy.add("a", [1] * 99)
    with pytest.raises(PromptTooLong, match="KV memory of 16"):
        toy.add("a", [1] * 15)
    toy.add("a", PROMPT)
    with pytest.raises(DuplicateRequest):
        toy.add("a", PROMPT)


def test_a_full_queue_refuses_at_once() -> None:
    toy = Toy(max_waiting=2)
    toy.add("a", PROMPT, n=2)
    with pytest.raises(Overloaded) as refusal:
        toy.add("b", PROMPT)
    assert refusal.value.retry_after_s is not None


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=24),
        st.integers(1, 12),  # max_tokens
        st.integers(1, 3),  # n
        st.integers(0, 6),  # steps before the next arrives
        st.sampled_from(["run", "cancel", "fail"]),  # what happens after those steps
        st.integers(0, 1),  # priority
    ),
    min_size=1,
    max_size=10,
)


@given(requests, st.integers(9, 30), st.integers(4, 24), st.integers(2, 6))
@settings(max_examples=200, deadline=None)
def test_any_mix_gives_what_each_request_gives_alone(
    mix: list[tuple[list[int], int, int, int, str, int]], num_pages: int, step_tokens: int, max_running: int
) -> None:
    toy = Toy(num_pages=num_pages, step_tokens=max(step_tokens, max_running), max_running=max_running)
    ended = set()
    for number, (prompt, max_tokens, n, steps, event, priority) in enumerate(mix):
        toy.add(str(number), prompt, max_tokens=max_tokens, n=n, priority=priority)
        for _ in range(steps):
            toy.step()
        if event == "cancel":
            ended.add(str(number))
            toy.scheduler.cancel(str(number))
        elif event == "fail":
            ended.update(toy.fail())
    toy.run()
    for number, (prompt, max_tokens, n, _, _, _) in enumerate(mix):
        for index in range(n):
            made = toy.outputs.get((str(number), index), [])
            whole = expected(prompt, max_tokens, index)
            assert made == (whole[: len(made)] if str(number) in ended else whole)
    assert toy.cache.num_available == toy.cache.num_pages


@given(
    requests,
    st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=24), min_size=1, max_size=10),
    st.integers(9, 20),
    st.integers(4, 24),
    st.integers(0, 14),
)
@settings(max_examples=200, deadline=None)
def test_blocks_that_come_in_between_change_nothing(
    mix: list[tuple[list[int], int, int, int, str, int]],
    blocks: list[list[int]],
    num_pages: int,
    step_tokens: int,
    num_foreign: int,
) -> None:
    toy = Toy(num_pages=num_pages, step_tokens=step_tokens, max_running=4, num_foreign=num_foreign)
    ended = set()
    for number, (prompt, max_tokens, n, steps, event, priority) in enumerate(mix):
        block = (prompt + blocks[number % len(blocks)] if number % 2 else blocks[number % len(blocks)])[:24]
        toy.adopt(block[: len(block) // 4 * 4])
        toy.add(str(number), prompt, max_tokens=max_tokens, n=n, priority=priority)
        for _ in range(steps):
            toy.step()
        if event == "fail":
            ended.update(toy.fail())
    toy.run()
    for number, (prompt, max_tokens, n, _, _, _) in enumerate(mix):
        for index in range(n):
            made = toy.outputs.get((str(number), index), [])
            whole = expected(prompt, max_tokens, index)
            assert made == (whole[: len(made)] if str(number) in ended else whole)
    assert toy.cache.num_available == toy.cache.num_pages


def test_a_block_spares_its_tokens() -> None:
    toy = Toy(num_pages=8, num_foreign=16)
    assert toy.adopt(range(16))
    toy.add("a", [*range(16), 3], max_tokens=3)
    toy.run()
    assert toy.outputs["a", 0] == expected([*range(16), 3], 3)
    assert toy.num_computed == 3


def test_a_block_that_leaves_while_its_page_is_to_be_copied_is_read_before_it_goes() -> None:
    """The plan that copies the beginning of a foreign page also needs memory that only foreign pages keep."""
    toy = Toy(num_pages=4, num_foreign=8, step_tokens=64)
    for name, prefix in (("x", [0, 1, 2, 3]), ("y", [7, 7, 7, 7])):
        toy.add(name, prefix, max_tokens=1)
        toy.run()
        assert toy.adopt([*prefix, 4, 5, 6, 7])
    prompt = [0, 1, 2, 3, 4, 5, *[9] * 7]
    toy.add("a", prompt, max_tokens=2)
    plan = toy.step()
    assert [copy.source for copy in plan.copies] == [5]
    assert toy.blocks == {}
    toy.run()
    assert toy.outputs["a", 0] == expected(prompt, 2)
