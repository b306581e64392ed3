"""Speculation changes speed only: whatever is drafted, outputs are those of an engine without drafts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from protos.messages import Request, ResumePoint
from tests.workers.engine.drive import Output, Outputs, drain, request, run, step, torch_engine
from tests.workers.model.tiny import save_tiny
from tests.workers.speculative.oracle import Always, Oracle, Style, truth_of
from workers.config import EngineSection, KVSection, ModelSection, WorkerConfig
from workers.engine.torch_engine import TorchEngine
from workers.speculative.copying import Copying
from workers.speculative.protocol import Drafter, Key
from workers.speculative.recycling import Recycling
from workers.speculative.speculator import Speculator
from workers.speculative.stats import SpeculationStats
from workers.speculative.tree import MAX_NODES

Settings = Mapping[str, Any]
NUM_TOKENS = 32
PROMPTS = [[(7 * i + j) % 4000 + 1 for j in range(4 + 13 * i)] for i in range(4)]
ORACLES: dict[str, tuple[Style, float]] = {
    "chain-right": ("chain", 1.0),
    "chain-half": ("chain", 0.5),
    "chain-wrong": ("chain", 0.0),
    "tree-right": ("tree", 1.0),
    "tree-half": ("tree", 0.5),
    "wild-right": ("wild", 1.0),
    "wild-half": ("wild", 0.5),
}
SOME = ["chain-right", "tree-right", "wild-half"]


def asked(**fields: Any) -> list[Request]:
    """One request per prompt, each with a seed of its own; a list gives each its own value."""
    common = {"max_tokens": NUM_TOKENS, **fields}
    each = [{name: v[i] if isinstance(v, list) else v for name, v in common.items()} for i in range(len(PROMPTS))]
    return [request(str(i), prompt, seed=i, **each[i]) for i, prompt in enumerate(PROMPTS)]


CASES: dict[str, list[Request]] = {
    "greedy": asked(),
    "sampled": asked(temperature=[0.8, 1.0, 1.0, 1.0], top_p=[0.9, 1.0, 0.95, 1.0], top_k=[50, 0, 20, 0], min_p=0.02),
    "mixed": asked(temperature=[0.0, 1.0, 0.0, 0.8]),
    "penalties": asked(
        temperature=[0.0, 0.0, 1.0, 0.8],
        repetition_penalty=[1.3, 1.0, 1.2, 1.1],
        presence_penalty=[0.0, 0.6, 0.5, 0.0],
        frequency_penalty=[0.0, 0.4, 0.0, 0.7],
    ),
    "bias": asked(temperature=[0.0, 0.0, 1.0, 0.8], logit_bias={3: 4.0, 7: -100.0, 300: 5.0}),
    "several-outputs": asked(n=3, temperature=1.0),
    "equal-outputs": asked(n=2),
    "logprobs": asked(temperature=[0.0, 0.0, 1.0, 0.8], logprobs=[3, None, 3, 0], prompt_logprobs=[None, 2, 1, None]),
    "min-tokens": asked(temperature=[0.0, 1.0, 1.0, 0.0], min_tokens=[20, 8, 0, 31], stop_token_ids=(3, 10, 17)),
    "short": asked(max_tokens=[1, 2, 3, 4], ignore_eos=True),
    "long-enough-to-end-a-page": asked(max_tokens=48, temperature=[0.0, 1.0, 0.0, 0.8], ignore_eos=True),
}


def expect(found: Outputs, expected: Outputs) -> None:
    """All that a client can tell."""
    assert set(found) == set(expected)
    for key, output in expected.items():
        assert found[key].tokens == output.tokens, key
        assert found[key].finish == output.finish
        assert found[key].cached_tokens == output.cached_tokens
        for name in ("logprobs", "prompt_logprobs"):
            expect_logprobs(getattr(found[key], name), getattr(output, name))


def expect_logprobs(found: Sequence[Any], expected: Sequence[Any]) -> None:
    assert [position.token_id for position in found] == [position.token_id for position in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token_id for token_id, _ in one.top] == [token_id for token_id, _ in other.top]
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


def speculate(engine: TorchEngine, *drafters: Drafter, max_nodes: int = MAX_NODES) -> TorchEngine:
    """The engine with these drafters, which are asked and believed in every step."""
    controller = Always(len(drafters), max_nodes=max_nodes)
    engine._speculator = Speculator(drafters, max_nodes=max_nodes, controller=controller)
    return engine


def oracle(engine: TorchEngine, truth: Mapping[Key, Sequence[int]], kind: str = "tree-right", **fields: Any) -> Oracle:
    style, alpha = ORACLES[kind]
    return Oracle(truth, vocab_size=engine.model.vocab_size, style=style, alpha=alpha, **fields)


def counted(engine: TorchEngine) -> SpeculationStats:
    """What was drafted, which is never nothing."""
    stats = engine.stats().speculation
    assert stats is not None
    assert stats.drafted_tokens > 0
    assert stats.drafted_tokens >= stats.accepted_tokens == sum(stats.accepted_by_depth)
    return stats


def expect_idle(engine: TorchEngine) -> None:
    """Nothing is left: every page is free or cached."""
    stats = engine.stats()
    assert engine.load().kv_used_tokens == 0
    assert stats.kv_free_pages + stats.kv_cached_pages == stats.kv_total_pages


def expect_law(
    make: Callable[[], TorchEngine], requests: Sequence[Request], kinds: Iterable[str], **fields: Any
) -> list[TorchEngine]:
    """Run without drafts, and with the drafts of each kind of oracle; the engines that had drafts."""
    plain = make()
    expected = run(plain, *requests)
    engines = []
    for kind in kinds:
        drafted = make()
        speculate(drafted, oracle(drafted, truth_of(expected), kind, **fields))
        expect(run(drafted, *requests), expected)
        expect_idle(drafted)
        assert counted(drafted).accepted_tokens > 0 or kind.endswith("wrong"), kind
        assert drafted.stats().generation_tokens == plain.stats().generation_tokens
        engines.append(drafted)
    return engines


MATRIX = [
    (case, kind)
    for case in CASES
    for kind in ORACLES
    if case in ("greedy", "sampled", "logprobs") or kind in ("chain-half", "tree-right", "wild-half")
]


@pytest.mark.parametrize(("case", "kind"), MATRIX)
def test_outputs_are_those_of_a_run_without_drafts(
    target_dir: Path, plain: Callable[[str], tuple[Outputs, int]], case: str, kind: str
) -> None:
    expected, num_plain_steps = plain(case)
    engine = torch_engine(target_dir)
    speculate(engine, oracle(engine, truth_of(expected), kind))
    expect(run(engine, *CASES[case]), expected)
    expect_idle(engine)
    stats, num_steps = counted(engine), engine.stats().num_steps
    if kind.endswith("wrong"):
        assert stats.accepted_tokens < 0.05 * stats.drafted_tokens
        return
    assert stats.accepted_tokens > 0
    if case != "short":
        limit = 0.3 if kind in ("chain-right", "tree-right") else 0.9
        assert num_steps < limit * num_plain_steps


def test_the_cases_are_what_they_are_called(plain: Callable[[str], tuple[Outputs, int]]) -> None:
    greedy = {key: output.tokens for key, output in plain("greedy")[0].items()}
    for case in ("sampled", "penalties", "bias", "min-tokens"):
        assert any(output.tokens != greedy[key] for key, output in plain(case)[0].items())
    assert len({tuple(output.tokens) for output in plain("several-outputs")[0].values()}) == 3 * len(PROMPTS)
    assert len({tuple(output.tokens) for output in plain("equal-outputs")[0].values()}) == len(PROMPTS)
    assert len(plain("logprobs")[0]["0", 0].logprobs) == NUM_TOKENS
    assert any(output.finish and output.finish.reason == "stop" for output in plain("min-tokens")[0].values())
    lengths = {len(output.tokens) for output in plain("short")[0].values()}
    assert lengths == {1, 2, 3, 4}


# Where an output ends


@pytest.mark.parametrize("where", [5, 6, 12])
def test_a_stop_token_within_a_draft_ends_the_output(target_dir: Path, where: int) -> None:
    """The oracle goes on beyond the stop, and is right about what would have come."""
    free = asked(temperature=[0.0, 1.0, 1.0, 1.0], ignore_eos=True)
    longer = run(torch_engine(target_dir), *free)
    stops = [(longer[str(i), 0].tokens[where],) for i in range(len(PROMPTS))]
    stopped = asked(temperature=[0.0, 1.0, 1.0, 1.0], ignore_eos=True, stop_token_ids=stops)
    expected = run(torch_engine(target_dir), *stopped)
    for kind in ("chain-right", "tree-right"):
        engine = torch_engine(target_dir)
        speculate(engine, oracle(engine, truth_of(longer), kind, depth=9))
        expect(run(engine, *stopped), expected)
        expect_idle(engine)
        assert counted(engine).accepted_tokens > 0
    for i, [stop] in enumerate(stops):
        output = expected[str(i), 0]
        assert output.finish is not None
        assert (output.finish.reason, output.finish.stop_token_id) == ("stop", stop)
        assert output.tokens[-1] == stop
        assert len(output.tokens) <= where + 1


@pytest.mark.parametrize("min_tokens", [0, 9])
def test_the_end_of_text_within_a_draft_ends_the_output(target_dir: Path, min_tokens: int) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "logit_bias": {0: 6.0}}
    longer = run(torch_engine(target_dir), *asked(**fields, ignore_eos=True))
    ending = asked(**fields, min_tokens=min_tokens)
    expected = run(torch_engine(target_dir), *ending)
    assert any(output.finish and output.finish.reason == "stop" for output in expected.values())
    assert all(len(output.tokens) > min_tokens for output in expected.values())
    for truth, kind in ((longer, "chain-right"), (longer, "tree-half"), (expected, "tree-right")):
        engine = torch_engine(target_dir)
        speculate(engine, oracle(engine, truth_of(truth), kind, depth=9))
        expect(run(engine, *ending), expected)
        expect_idle(engine)
        counted(engine)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 7])
def test_a_draft_never_goes_beyond_the_last_token(target_dir: Path, max_tokens: int) -> None:
    """One token of the step is the target's own, so a draft of the last needs none and the last but one neither."""
    requests = asked(max_tokens=max_tokens, ignore_eos=True, logprobs=1)
    longer = run(torch_engine(target_dir), *asked(max_tokens=16, ignore_eos=True))
    expected = run(torch_engine(target_dir), *requests)
    for kind in ("chain-right", "tree-right", "wild-right"):
        engine = torch_engine(target_dir)
        speculate(engine, oracle(engine, truth_of(longer), kind, depth=12))
        expect(run(engine, *requests), expected)
        stats = engine.stats()
        assert stats.generation_tokens == max_tokens * len(PROMPTS)
        assert stats.speculation is not None
        assert (stats.speculation.drafted_tokens > 0) == (max_tokens > 2)
        if kind != "wild-right":
            assert (stats.speculation.accepted_tokens > 0) == (max_tokens > 2)
            assert stats.num_steps == min(max_tokens, 2)


def bounded_engine(directory: Path, max_context: int, page_size: int, num_pages: int) -> TorchEngine:
    kv = KVSection(num_pages=num_pages, page_size=page_size)
    config = WorkerConfig(model=ModelSection(path=directory, max_context=max_context), engine=EngineSection(kv=kv))
    return TorchEngine(config)


def test_a_context_may_be_filled_to_the_last_token(target_dir: Path) -> None:
    """There is no position, and no page, for what a draft would hold beyond."""
    prompt = PROMPTS[3]
    full = request("a", prompt, max_tokens=64 - len(prompt), ignore_eos=True, logprobs=2)
    expect_law(lambda: bounded_engine(target_dir, 64, 32, 2), [full], ORACLES, depth=15)


# Memory, budgets, prefixes


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"num_pages": 7}, id="native"),
        pytest.param({"num_pages": 12, "page_size": 16}, id="torch"),
        pytest.param({"num_pages": 7, "prefix_cache": False}, id="uncached"),
    ],
)
def test_outputs_survive_preemption(target_dir: Path, settings: Settings) -> None:
    requests = asked(max_tokens=40, temperature=[0.0, 1.0, 0.0, 1.0], ignore_eos=True, logprobs=1)
    engines = expect_law(lambda: torch_engine(target_dir, **settings), requests, ORACLES)
    assert all(engine.stats().num_preemptions > 0 for engine in engines)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"page_size": 16}, id="torch"),
        pytest.param({"page_size": 32, "kernels": "off"}, id="torch-32"),
        pytest.param({"page_size": 4}, id="torch-4"),
        pytest.param({"page_size": 64}, id="native-64"),
        pytest.param({"prefix_cache": False}, id="uncached"),
        pytest.param({"page_size": 16, "prefix_cache": False}, id="torch-uncached"),
        pytest.param({"threads": 2}, id="two-threads"),
        pytest.param({"deterministic": True}, id="deterministic"),
        pytest.param({"max_running": 2}, id="two-at-once"),
    ],
)
def test_the_law_holds_in_every_configuration(target_dir: Path, settings: Settings) -> None:
    requests = asked(temperature=[0.0, 1.0, 0.0, 0.8], logprobs=[2, None, None, 1], n=[1, 1, 2, 1], max_tokens=36)
    expect_law(lambda: torch_engine(target_dir, **settings), requests, SOME)


@pytest.mark.parametrize("num_spare", [1, 2, 9])
def test_a_step_budget_nearly_full_cuts_drafts(target_dir: Path, num_spare: int) -> None:
    step_tokens, requests = len(PROMPTS) + num_spare, asked(temperature=[0.0, 1.0, 0.0, 1.0], logprobs=1)

    def make() -> TorchEngine:
        return torch_engine(target_dir, max_running=len(PROMPTS), step_tokens=step_tokens)

    for engine in expect_law(make, requests, ["chain-right", "tree-half"]):
        stats = engine.stats()
        assert stats.computed_tokens <= stats.num_steps * step_tokens


def test_a_full_step_budget_leaves_no_room_for_drafts(target_dir: Path) -> None:
    settings: Settings = {"max_running": len(PROMPTS), "step_tokens": len(PROMPTS)}
    plain, full = torch_engine(target_dir, **settings), torch_engine(target_dir, **settings)
    expected = run(plain, *asked(ignore_eos=True))
    speculate(full, oracle(full, truth_of(expected), "chain-right"))
    expect(run(full, *asked(ignore_eos=True)), expected)
    assert counted(full).drafted_tokens < counted(full).num_drafts * len(PROMPTS)


COMMON = [(11 * j) % 4000 + 1 for j in range(80)]


@pytest.mark.parametrize("page_size", [32, 16])
@pytest.mark.parametrize("sharing", ["planned", "all"])
def test_drafts_stand_behind_shared_prefixes(target_dir: Path, sharing: str, page_size: int) -> None:
    prompts = [[*COMMON[: 80 - 8 * (i // 3)], *range(100 * i + 1, 100 * i + 4 + i)] for i in range(6)]
    requests = [
        request(str(i), prompt, max_tokens=28, temperature=float(i % 2), logprobs=1) for i, prompt in enumerate(prompts)
    ]
    settings: Settings = {"sharing": sharing, "page_size": page_size}
    for engine in expect_law(lambda: torch_engine(target_dir, **settings), requests, SOME):
        stats = engine.stats()
        assert stats.prefix_hit_tokens > 0
        assert stats.attention_read_keys < stats.attention_keys or sharing == "planned"


@pytest.mark.parametrize("page_size", [32, 4])
def test_equal_sequences_hand_over_the_pages_that_they_both_fill(target_dir: Path, page_size: int) -> None:
    """Each fills the same page in other steps; whoever is second gives its own up while it holds a draft behind."""
    requests = [request(name, PROMPTS[1], max_tokens=40, n=2, ignore_eos=True, logprobs=1) for name in "ab"]
    engines = expect_law(lambda: torch_engine(target_dir, page_size=page_size), requests, [*SOME, "tree-half"])
    assert all(engine.stats().repeated_tokens > 0 for engine in engines)


def test_what_drafts_have_left_in_the_cache_is_what_plain_steps_leave(target_dir: Path) -> None:
    """A prompt that goes on where an output ended finds its keys and values."""
    plain, drafted = torch_engine(target_dir), torch_engine(target_dir)
    expected = run(plain, *asked(max_tokens=70, ignore_eos=True))
    truth = truth_of(expected)
    speculate(drafted, oracle(drafted, truth))
    expect(run(drafted, *asked(max_tokens=70, ignore_eos=True)), expected)
    again = [
        request(f"again {i}", [*prompt, *truth[str(i), 0], 5, 6], max_tokens=8, logprobs=2)
        for i, prompt in enumerate(PROMPTS)
    ]
    expected = run(plain, *again)
    drafted._speculator = None
    expect(run(drafted, *again), expected)
    assert all((output.cached_tokens or 0) >= 64 for output in expected.values())


def test_a_window_sees_drafts_by_their_depth(tmp_path: Path) -> None:
    """Siblings share a position, so an accepted node stands nearer than its place in the draft says."""
    save_tiny(tmp_path, "mistral", sliding_window=9)
    prompts = [[(5 * i + j) % 90 + 3 for j in range(6 + 9 * i)] for i in range(3)]
    requests = [
        request(str(i), prompt, max_tokens=40, temperature=float(i % 2), logprobs=2, ignore_eos=True)
        for i, prompt in enumerate(prompts)
    ]
    expect_law(lambda: torch_engine(tmp_path), requests, ORACLES)
    expect_law(lambda: torch_engine(tmp_path, page_size=8), requests, ORACLES)


# What happens beside drafts


@pytest.mark.parametrize("kind", ["chain-right", "tree-half", "wild-half"])
def test_outputs_cancelled_between_steps_leave_the_others_as_they_are(target_dir: Path, kind: str) -> None:
    requests = asked(n=2, temperature=1.0, max_tokens=40, ignore_eos=True)
    expected = run(torch_engine(target_dir), *requests)
    engine = torch_engine(target_dir, num_pages=64)
    asked_oracle = oracle(engine, truth_of(expected), kind, depth=4)
    speculate(engine, asked_oracle)
    for one in requests:
        engine.submit(one)
    outputs: Outputs = {}
    for count in range(6):
        step(engine, outputs)
        if count in (2, 3):
            before = counted(engine).drafted_tokens
            engine.cancel("1", count - 2)
            engine.check()
            assert before > 0
        if count == 4:
            engine.cancel("3")
            engine.check()
    cut = {key: outputs.pop(key) for key in list(outputs) if key[0] in "13"}
    kept = {key: output for key, output in expected.items() if key[0] not in "13"}
    expect(drain(engine, outputs), kept)
    expect_idle(engine)
    assert all(output.tokens == expected[key].tokens[: len(output.tokens)] for key, output in cut.items())
    assert all(output.finish is None for output in cut.values())
    assert {("1", 0), ("1", 1), ("3", 0), ("3", 1)} <= set(asked_oracle.forgotten)


@pytest.mark.parametrize("num_made", [1, 7, 30])
def test_a_resumed_output_goes_on_with_drafts(target_dir: Path, num_made: int) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "n": 2, "max_tokens": 36, "ignore_eos": True, "logprobs": 1}
    whole = run(torch_engine(target_dir), *asked(**fields))
    points = [
        (ResumePoint(0, tuple(whole[str(i), 0].tokens[:num_made])), ResumePoint(1, (), finished=i % 2 == 0))
        for i in range(len(PROMPTS))
    ]
    requests = asked(**fields, resume=points)
    expected = run(torch_engine(target_dir), *requests)
    assert expected["0", 0].tokens == whole["0", 0].tokens[num_made:]
    for kind in ("chain-right", "tree-half"):
        engine = torch_engine(target_dir)
        speculate(engine, oracle(engine, truth_of(whole), kind))
        expect(run(engine, *requests), expected)
        assert counted(engine).accepted_tokens > 0


def test_whatever_comes_and_goes_the_law_holds(target_dir: Path) -> None:
    """Requests of random kinds arrive at random times, some are cancelled, memory is short."""
    for seed in range(4):
        draw = random.Random(seed)
        requests = [any_request(draw, str(number)) for number in range(10)]
        expected = run(torch_engine(target_dir), *requests)
        page_size, num_pages = [(32, 12), (16, 20)][seed % 2]
        engine = torch_engine(target_dir, num_pages=num_pages, page_size=page_size, step_tokens=48, max_running=8)
        truth = truth_of(expected)
        drafters = [oracle(engine, truth, kind, seed=seed, name=kind) for kind in ("tree-half", "chain-half")]
        speculate(engine, *drafters, max_nodes=31)
        cancelled = {str(draw.randrange(10)) for _ in range(2)}
        found = arriving(engine, draw, requests, cancelled)
        for key, output in found.items():
            if key[0] in cancelled:
                assert output.tokens == expected[key].tokens[: len(output.tokens)]
            else:
                assert (output.tokens, output.finish) == (expected[key].tokens, expected[key].finish)
                expect_logprobs(output.logprobs, expected[key].logprobs)
        assert {key for key in expected if key[0] not in cancelled} <= set(found)
        expect_idle(engine)
        assert counted(engine).accepted_tokens > 0


def any_request(draw: random.Random, name: str) -> Request:
    prompt = [*COMMON[: draw.choice([0, 20, 40])], *(draw.randrange(1, 4096) for _ in range(draw.randint(1, 40)))]
    return request(
        name,
        prompt,
        seed=draw.randrange(100),
        max_tokens=draw.randint(1, 40),
        n=draw.choice([1, 1, 2]),
        temperature=draw.choice([0.0, 0.8, 1.0]),
        repetition_penalty=draw.choice([1.0, 1.2]),
        logprobs=draw.choice([None, 2]),
        priority=draw.choice([0, 0, 1]),
        min_tokens=draw.choice([0, 5]),
        stop_token_ids=draw.choice([(), (3, 17)]),
    )


def arriving(engine: TorchEngine, draw: random.Random, requests: Sequence[Request], cancelled: set[str]) -> Outputs:
    outputs: Outputs = {}
    for one in requests:
        engine.submit(one)
        for _ in range(draw.randrange(4)):
            step(engine, outputs)
        live = [key for key, output in outputs.items() if key[0] in cancelled and output.finish is None]
        if live and draw.random() < 0.5:
            engine.cancel(live[0][0])
            engine.check()
    return drain(engine, outputs)


def test_requests_that_refuse_drafts_get_none(target_dir: Path) -> None:
    requests = asked(speculation=["auto", "off", "auto", "off"], temperature=1.0, ignore_eos=True)
    expected = run(torch_engine(target_dir), *requests)
    engine = torch_engine(target_dir)
    told = oracle(engine, truth_of(expected))
    speculate(engine, told)
    expect(run(engine, *requests), expected)
    assert counted(engine).accepted_tokens > 0
    assert {one.context.key[0] for one in told.learnt if len(one.draft)} == {"0", "2"}


# The drafters


@pytest.mark.parametrize("max_nodes", [1, 8, MAX_NODES])
def test_too_many_nodes_are_cut(target_dir: Path, max_nodes: int) -> None:
    """A drafter can be wrong in how many nodes it may make, too; together they may have more than a step can take."""
    requests = asked(logprobs=1)
    expected = run(torch_engine(target_dir), *requests)
    engine = torch_engine(target_dir)
    drafters = [
        oracle(engine, truth_of(expected), kind, depth=20, seed=seed, name=f"{kind} {seed}")
        for seed, kind in enumerate(["wild-right", "wild-half", "chain-right", "tree-right", "wild-half"])
    ]
    speculate(engine, *drafters, max_nodes=max_nodes)
    expect(run(engine, *requests), expected)
    stats = counted(engine)
    assert stats.drafted_tokens <= stats.num_drafts * max_nodes
    assert max(len(one.draft) for one in drafters[0].learnt) == max_nodes


REAL: dict[str, Callable[[], list[Drafter]]] = {
    "copy": lambda: [Copying()],
    "recycle": lambda: [Recycling()],
    "both": lambda: [Copying(), Recycling()],
}


@pytest.mark.parametrize("drafters", REAL)
@pytest.mark.parametrize("case", ["greedy", "penalties", "several-outputs", "logprobs", "min-tokens"])
def test_real_drafters_change_nothing(
    target_dir: Path, plain: Callable[[str], tuple[Outputs, int]], drafters: str, case: str
) -> None:
    expected, _ = plain(case)
    engine = speculate(torch_engine(target_dir), *REAL[drafters](), max_nodes=24)
    expect(run(engine, *CASES[case]), expected)
    expect_idle(engine)
    assert counted(engine).accepted_tokens > 0


@pytest.mark.parametrize("settings", [{}, {"page_size": 16}], ids=["native", "torch"])
def test_real_drafters_under_the_real_controller_change_nothing(target_dir: Path, settings: Settings) -> None:
    """Long enough for every drafter to have been tried."""
    requests = asked(max_tokens=240, ignore_eos=True, temperature=[0.0, 0.0, 0.0, 0.8])
    expected = run(torch_engine(target_dir, **settings), *requests)
    engine = torch_engine(target_dir, **settings)
    engine._speculator = Speculator([Copying(), Recycling()], max_nodes=24)
    expect(run(engine, *requests), expected)
    expect_idle(engine)
    stats = counted(engine)
    assert stats.accepted_tokens > 0
    assert stats.decisions["off"] > 0
    assert stats.decisions["copy"] > 0
    assert sum(stats.decisions.values()) <= engine.stats().num_steps


def test_an_output_that_repeats_itself_takes_few_steps(target_dir: Path) -> None:
    [one, *_] = asked(max_tokens=64, ignore_eos=True)
    engine = speculate(torch_engine(target_dir), Copying(), max_nodes=8)
    run(engine, one)
    assert engine.stats().num_steps < 32


def test_drafters_hear_what_every_step_added(target_dir: Path) -> None:
    requests = asked(n=2, temperature=1.0, ignore_eos=True)
    expected = run(torch_engine(target_dir), *requests)
    engine = torch_engine(target_dir)
    told = oracle(engine, truth_of(expected), "tree-half")
    speculate(engine, told)
    run(engine, *requests)
    heard: dict[Key, int] = dict.fromkeys(expected, 1)  # the first token comes of the prompt
    for one in told.learnt:
        assert len(one.nodes) <= one.num_new <= len(one.nodes) + 1
        guessed = [one.draft.tokens[node] for node in one.nodes]
        assert guessed == one.context.tokens[-one.num_new :][: len(guessed)]
        heard[one.context.key] += one.num_new
    assert heard == {key: len(output.tokens) for key, output in expected.items()}
    assert sorted(told.forgotten) == sorted(expected)


def test_a_failed_step_forgets_every_output_of_its_requests(target_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those too that waited: the request's id may come back with another prompt."""
    engine = torch_engine(target_dir, num_pages=3)
    told = oracle(engine, {}, "chain-wrong")
    speculate(engine, told)
    engine.submit(request("a", PROMPTS[0], n=2, temperature=1.0, max_tokens=60, ignore_eos=True))
    outputs: Outputs = {}
    for _ in range(100):
        if engine.stats().num_preemptions == 0:
            step(engine, outputs)
    assert engine.load().num_waiting == engine.load().num_running == 1
    assert {one.context.key for one in told.learnt} == {("a", 0), ("a", 1)}
    assert not told.forgotten

    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("not enough memory")

    with monkeypatch.context() as broken:
        broken.setattr(engine._runner, "execute", out_of_memory)
        assert [failure.request_id for failure in engine.step().failures] == ["a"]
    assert engine.load().num_waiting == 0
    assert set(told.forgotten) == {("a", 0), ("a", 1)}


# That these tests can fail


def moves(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch, *, is_broken: bool = False) -> list[tuple[int, int]]:
    """Every token that is copied from now on; a broken engine copies none."""
    model, seen = engine._runner._model, list[tuple[int, int]]()
    copy_token = model.copy_token

    def noted(source: int, target: int) -> None:
        seen.append((source, target))
        if not is_broken:
            copy_token(source, target)

    monkeypatch.setattr(model, "copy_token", noted)
    return seen


@pytest.mark.parametrize("page_size", [32, 16])
def test_nodes_behind_wrong_siblings_are_moved_and_chains_are_not(
    target_dir: Path, monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    requests = asked(logprobs=1)
    expected = run(torch_engine(target_dir, page_size=page_size), *requests)
    for kind, is_moved in (("tree-right", True), ("chain-right", False)):
        engine = torch_engine(target_dir, page_size=page_size)
        speculate(engine, oracle(engine, truth_of(expected), kind))
        seen = moves(engine, monkeypatch)
        expect(run(engine, *requests), expected)
        assert (len(seen) > 20) == is_moved
        assert all(source != target for source, target in seen)


@pytest.mark.parametrize("page_size", [32, 16])
def test_an_engine_that_moves_nothing_is_found_out(
    target_dir: Path, monkeypatch: pytest.MonkeyPatch, page_size: int
) -> None:
    requests = asked(logprobs=1)
    expected = run(torch_engine(target_dir, page_size=page_size), *requests)
    engine = torch_engine(target_dir, page_size=page_size)
    speculate(engine, oracle(engine, truth_of(expected)))
    assert moves(engine, monkeypatch, is_broken=True) == []
    with pytest.raises(AssertionError):
        expect(run(engine, *requests), expected)


def test_other_tokens_are_found_out() -> None:
    with pytest.raises(AssertionError):
        expect({("a", 0): Output([1, 2])}, {("a", 0): Output([1, 3])})
