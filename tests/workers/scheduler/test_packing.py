"""How a step's budget is filled: prompts back to back, best fit into gaps, and nobody kept waiting for it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from protos.messages import Request, Sampling
from tests.workers.scheduler.toy import Toy, expected
from workers.scheduler.step import StepPlan


def prompt(name: str, length: int) -> list[int]:
    """A prompt that shares nothing with others."""
    return [1000 * ord(name) + position for position in range(length)]


def sizes(plan: StepPlan) -> dict[str, int]:
    """The tokens each request computes."""
    return {chunk.sequence.request.request_id: chunk.num_tokens for chunk in plan.chunks}


def queue(toy: Toy, **lengths: int) -> None:
    for name, length in lengths.items():
        toy.add(name, prompt(name, length), max_tokens=3)


def test_a_gap_is_filled_with_the_longest_that_fits_whole() -> None:
    toy = Toy(step_tokens=32)
    queue(toy, a=20, b=30, c=5, d=11, e=3)
    assert sizes(toy.step()) == {"a": 20, "d": 11}  # the last token of room is less than a page
    assert sizes(toy.step())["b"] == 30


def test_a_prompt_is_split_at_a_page_if_none_fits_into_the_gap() -> None:
    toy = Toy(step_tokens=32)
    queue(toy, a=22, b=30, c=15)
    assert sizes(toy.step()) == {"a": 22, "b": 8}
    assert sizes(toy.step()) == {"a": 1, "b": 22, "c": 8}
    toy.run()
    assert all(toy.outputs[name, 0] == expected(prompt(name, size), 3) for name, size in [("b", 30), ("c", 15)])


def test_what_is_cached_does_not_count() -> None:
    toy = Toy(step_tokens=32)
    toy.add("warm", prompt("x", 29), max_tokens=1)
    toy.run()
    queue(toy, a=22, b=30, c=6)
    toy.add("long", prompt("x", 37), max_tokens=1)
    assert sizes(toy.step()) == {"a": 22, "long": 9}


def test_a_prompt_that_had_to_wait_for_room_runs_first_in_the_next_step() -> None:
    toy = Toy(step_tokens=32)
    queue(toy, a=30, b=40)
    assert sizes(toy.step()) == {"a": 30}
    queue(toy, c=10)
    assert sizes(toy.step()) == {"a": 1, "b": 28}


def test_it_runs_then_even_behind_a_prompt_that_takes_many_steps() -> None:
    toy = Toy(step_tokens=300, num_pages=1024)
    scoring = Sampling(seed=0, max_tokens=1, prompt_logprobs=0)
    toy.scheduler.add(Request("slow", tuple(prompt("s", 900)), scoring))
    queue(toy, b=60, c=43)
    assert sizes(toy.step()) == {"slow": 256, "c": 43}
    queue(toy, d=43)
    assert sizes(toy.step()) == {"slow": 256, "c": 1, "b": 40}


def test_less_urgent_prompts_never_pass() -> None:
    toy = Toy(step_tokens=32)
    for name, length, priority in [("a", 20, 1), ("b", 30, 1), ("c", 12, 0)]:
        toy.add(name, prompt(name, length), priority=priority)
    assert sizes(toy.step()) == {"a": 20, "b": 12}


def test_those_that_pass_leave_a_place_and_pages() -> None:
    few_places = Toy(step_tokens=32, max_running=2)
    queue(few_places, a=20, b=30, c=12)
    assert sizes(few_places.step()) == {"a": 20, "b": 12}
    few_pages = Toy(step_tokens=32, num_pages=14)
    queue(few_pages, a=20, b=30, c=12)
    assert sizes(few_pages.step()) == {"a": 20, "b": 12}


def test_a_long_prompt_does_not_hold_up_decoding_behind_it() -> None:
    toy = Toy(step_tokens=8)
    toy.add("low", prompt("l", 2), max_tokens=30)
    toy.step()
    toy.add("high", prompt("h", 40), priority=1)
    for _ in range(4):
        assert sizes(toy.step())["low"] == 1
    assert len(toy.outputs["low", 0]) == 5


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), min_size=1, max_size=20), st.integers(5, 40))
@settings(max_examples=150, deadline=None)
def test_a_prompt_is_passed_over_for_lack_of_room_once_at_most(arrivals: list[tuple[int, int]], budget: int) -> None:
    toy = Toy(step_tokens=budget, num_pages=4096, max_running=5)
    passed: dict[str, int] = {}
    for number, (length, steps) in enumerate(arrivals):
        toy.add(str(number), prompt(chr(64 + number), length), max_tokens=3)
        for _ in range(steps):
            observe(toy, passed)
    while toy.scheduler.has_work:
        observe(toy, passed)
    assert set(passed.values()) <= {1}


def observe(toy: Toy, passed: dict[str, int]) -> None:
    """Step, and note whether later requests started before the first that waits."""
    head = toy.scheduler._waiting[0] if toy.scheduler._waiting else None
    started = toy.step().started
    if head is not None and started and head not in started:
        name = head.request.request_id
        passed[name] = passed.get(name, 0) + 1


def test_steps_that_leave_prompts_are_full() -> None:
    toy = Toy(step_tokens=32, num_pages=1024, max_running=32)
    lengths = [(7 * number) % 29 + 3 for number in range(30)]
    queue(toy, **{chr(65 + number): length for number, length in enumerate(lengths)})
    toy.run()
    counters = toy.scheduler.counters
    assert counters.budget_tokens >= 32 * 8
    assert counters.budget_tokens - 3 * 8 * 4 <= counters.budget_used_tokens <= counters.budget_tokens
    assert counters.repeated_tokens == 0
    assert counters.computed_tokens == sum(lengths) + 2 * len(lengths)


def test_a_step_with_nothing_left_to_do_offers_no_budget() -> None:
    toy = Toy(step_tokens=32)
    queue(toy, a=20)
    toy.run()
    assert toy.scheduler.counters.budget_tokens == 0


def test_what_preemption_computes_again_is_counted() -> None:
    toy = Toy(num_pages=10, step_tokens=32)
    queue(toy, a=6, b=7, c=8, d=9)
    for name in "efg":
        toy.add(name, prompt(name, 6), max_tokens=20)
    toy.run()
    counters = toy.scheduler.counters
    assert counters.num_preemptions > 0
    assert counters.repeated_tokens > 0
    assert counters.computed_tokens - counters.repeated_tokens == (6 + 7 + 8 + 9) + 4 * 2 + 3 * (6 + 19)


def test_a_page_that_two_outputs_fill_at_once_is_counted() -> None:
    toy = Toy(step_tokens=32)
    for name in "ab":
        toy.add(name, prompt("p", 8), max_tokens=1)  # the second page's last logits are wanted by both
    assert sizes(toy.step()) == {"a": 8, "b": 4}
    assert toy.scheduler.counters.repeated_tokens == 4
