"""The routing benchmark: its requests, its loads, the search for a saturation, its table. No cluster is started."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich import box
from rich.console import Console

from benchmarks import routing
from benchmarks.benchmark import Measured
from benchmarks.prompts import Code, RandomTokens
from benchmarks.results import cells
from benchmarks.routing_cluster import printed_address
from benchmarks.routing_saturation import STEPS, completed_per_s, find_saturation, keeps_up
from benchmarks.routing_summary import COLUMNS, lines, table
from benchmarks.routing_traces import Case, Lengths, Tenants, make_asks, make_contexts
from benchmarks.traffic import Trace
from benchmarks.trial import Trial
from protos import errors

LENGTHS = Lengths(context=40, query=8, output=4)
TOKENS = RandomTokens(1000)
UNIFORM = Case("uniform", 6)
NOTHING = Case("nothing-shared", 0)


def contexts(num: int = 6) -> list[tuple[int, ...]]:
    return make_contexts(num, LENGTHS.context, 1, TOKENS)


def test_every_prompt_is_a_context_of_a_tenant_and_a_query_of_its_own() -> None:
    asks = make_asks(UNIFORM, contexts(), LENGTHS, num=200, seed=2, source=TOKENS)
    prompts = [ask.prompt for ask in asks]
    assert {prompt[: LENGTHS.context] for prompt in prompts} == set(contexts())
    assert len({prompt[LENGTHS.context :] for prompt in prompts}) == len(prompts)
    assert {(len(ask.prompt), ask.max_tokens) for ask in asks} == {(48, 4)}


def test_contexts_stay_when_the_requests_change() -> None:
    first, second = (make_asks(UNIFORM, contexts(), LENGTHS, num=20, seed=seed, source=TOKENS) for seed in (2, 3))
    assert first == make_asks(UNIFORM, contexts(), LENGTHS, num=20, seed=2, source=TOKENS)
    assert not {ask.prompt for ask in first} & {ask.prompt for ask in second}
    assert contexts() == contexts()
    assert contexts() != make_contexts(6, LENGTHS.context, 2, TOKENS)


def test_where_nothing_is_shared_prompts_are_as_long_and_begin_differently() -> None:
    asks = make_asks(NOTHING, contexts(), LENGTHS, num=50, seed=2, source=TOKENS)
    assert {len(ask.prompt) for ask in asks} == {LENGTHS.prompt}
    assert len({ask.prompt[:8] for ask in asks}) == 50


def test_prompts_may_be_code() -> None:
    code = Code(["def f(x):\n    return x + 1\n"])
    made = make_contexts(3, 40, 1, code)
    asks = make_asks(Case("uniform", 3), made, LENGTHS, num=20, seed=2, source=code)
    assert all(any(str(ask.prompt).startswith(context) for context in made) for ask in asks)


@given(num_tenants=st.integers(1, 50), zipf=st.floats(0, 3), seed=st.integers(0, 1000))
def test_a_drawn_tenant_exists(num_tenants: int, zipf: float, seed: int) -> None:
    tenants, source = Tenants(Case("any", num_tenants, zipf)), random.Random(seed)
    assert all(0 <= tenants.draw(source) < num_tenants for _ in range(20))


def test_popularity_follows_zipfs_law() -> None:
    tenants, source = Tenants(Case("zipf", 60, zipf=1.0)), random.Random(1)
    drawn = Counter(tenants.draw(source) for _ in range(40_000))
    harmonic = sum(1 / rank for rank in range(1, 61))
    for rank in (1, 2, 10):
        assert drawn[rank - 1] / 40_000 == pytest.approx(1 / rank / harmonic, rel=0.1)


def test_without_zipf_all_are_alike() -> None:
    tenants, source = Tenants(Case("uniform", 10)), random.Random(1)
    drawn = Counter(tenants.draw(source) for _ in range(20_000))
    assert all(number == pytest.approx(2000, rel=0.1) for number in drawn.values())


def traces(dues: Sequence[float], takes_s: float, error: errors.HeadwaterError | None = None) -> list[Trace]:
    return [Trace(due_s=due, sent_s=due, ended_s=due + takes_s, error=error) for due in dues]


def test_a_cluster_keeps_up_if_it_ends_soon_after_the_last_arrival() -> None:
    dues = [index / 10 for index in range(51)]  # five seconds
    assert keeps_up(traces(dues, 0.5))
    assert not keeps_up(traces(dues, 1.0))
    assert not keeps_up(traces(dues, 0.1, errors.Overloaded("full")))
    assert not keeps_up(traces([0.0], 0.1))


def test_throughput_counts_what_completed() -> None:
    done, refused = traces([0.0, 1.0], 1.0), traces([0.5], 0.1, errors.Overloaded("full"))
    assert completed_per_s([*done, *refused]) == pytest.approx(1.0)
    assert completed_per_s(refused) == 0


@pytest.mark.parametrize(("capacity", "found"), [(100.0, 0.95), (70.0, 0.65), (120.0, 1.1), (10.0, STEPS[-1])])
async def test_the_saturation_is_the_highest_step_that_keeps_up(capacity: float, found: float) -> None:
    offered: list[float] = []

    async def offer(rate_per_s: float) -> Sequence[Trace]:
        offered.append(rate_per_s)
        return traces([0.0, 5.0], 0.1 if rate_per_s <= capacity else 5.0)

    assert await find_saturation(100.0, offer) == pytest.approx(found * 100)
    assert all(lower < higher for higher, lower in pairwise(offered))


def test_one_workers_cache_holds_the_share_of_the_contexts_it_should() -> None:
    pages = routing.num_pages(60, 0.5, routing.LENGTHS)
    assert pages * routing.PAGE_SIZE == pytest.approx(0.5 * 60 * routing.LENGTHS.context, rel=0.01)
    fitting = routing.make_cases(60, 0.5)["fits-everywhere"].num_tenants
    assert fitting * routing.LENGTHS.context < 0.7 * pages * routing.PAGE_SIZE


def test_loads_are_clients_and_multiples_of_the_saturation() -> None:
    levels: dict[routing.CaseName, routing.Level] = {"uniform": routing.Level((1, 8), (0.5, 2))}
    made = routing.make_workloads(routing.make_cases(60, 0.5), levels, {"uniform": 12.0}, seconds=3.0)
    assert [workload.name for workload in made] == [
        "uniform, 1 clients",
        "uniform, 8 clients",
        "uniform, 0.5x = 6.0/s",
        "uniform, 2x = 24.0/s",
    ]
    assert [(load.num_clients, load.rate_per_s) for load in (w.params for w in made)] == [
        (1, 0),
        (8, 0),
        (0, 6),
        (0, 24),
    ]


def test_the_baseline_is_always_measured() -> None:
    parse = routing.parser().parse_args
    assert parse([]).policies == ("prefix", "least_loaded")
    assert parse(["--policies", "random,again"]).policies == ("random", "again", "least_loaded")
    assert set(parse(["--policies", "all"]).policies) == set(routing.POLICIES)


@pytest.mark.parametrize("arguments", [["--policies", "best"], ["--cases", "x"], ["--factors", "0"]])
def test_a_bad_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        routing.parser().parse_args(arguments)
    assert arguments[0] in capsys.readouterr().err


def trial(arm: str, round_index: int, requests_per_s: float, ttft_p90_ms: float) -> Trial:
    values = {"requests_per_s": requests_per_s, "ttft_p90_ms": ttft_p90_ms, "num_refused": 0.0}
    return Trial("uniform, 1x", arm, round_index, Measured(values))


def test_the_table_has_ratios_taken_round_by_round() -> None:
    trials = [
        *(trial("least_loaded", 0, 10, 300), trial("prefix", 0, 20, 100)),
        *(trial("least_loaded", 1, 5, 800), trial("prefix", 1, 20, 100)),
        *(trial("least_loaded", 2, 8, 500), trial("prefix", 2, 24, 100)),
    ]
    base, prefix = lines(cells(trials, "least_loaded"))
    assert (base.policy, base.requests_per_s, base.requests_ratio, base.ttft_times_lower) == ("least_loaded", 8, 1, 1)
    assert (prefix.requests_per_s, prefix.requests_ratio, prefix.ttft_times_lower) == (20, 3, pytest.approx(5))
    assert prefix.cached_percent is None


def test_people_read_the_same_table() -> None:
    found = cells([trial("least_loaded", 0, 10, 300), trial("prefix", 0, 20, 100)], "least_loaded")
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(table(found, box.MARKDOWN))
    last = [text.strip() for text in captured.get().strip().splitlines()[-1].split("|")[1:-1]]
    assert dict(zip(COLUMNS, last, strict=False)) | {"ratio": "2.00"} == {
        "load": "uniform, 1x",
        "policy": "prefix",
        "requests/s": "20.0",
        "ratio": "2.00",
        "output tokens/s": "-",
        "TTFT p50, ms": "-",
        "p90, ms": "100",
        "baseline's p90 / its": "3.00",
        "cached, %": "-",
        "refused": "0",
        "client CPU, %": "-",
    }


def test_the_address_is_read_from_what_serve_prints() -> None:
    assert printed_address("Starting Ray …\nReady\n") is None
    printed = "\nHeadwater serves target\n\n  gRPC       127.0.0.1:4321\n  metrics    http://127.0.0.1:1/metrics\n"
    assert printed_address(printed) == "127.0.0.1:4321"
