"""The router benchmark: its requests, its figures, and its rig of real processes in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import harness, router_overhead
from benchmarks.options import Options
from benchmarks.router_overhead import CHECKPOINTS, NUM_PARTS, Load, Size, failures, growth, make_asks, parts
from benchmarks.traffic import Trace
from protos import errors


def test_no_two_prompts_are_alike() -> None:
    load = Load(num_streams=4, num_requests=50, prompt_tokens=16, max_tokens=3)
    asks = make_asks(load, seed=1)
    assert len({ask.prompt for ask in asks}) == 50
    assert {(len(ask.prompt), ask.max_tokens) for ask in asks} == {(16, 3)}
    assert asks == make_asks(load, seed=1)


@given(st.integers(1, 10_000_000))
def test_the_parts_of_a_memory_run_are_all_of_it(num_requests: int) -> None:
    sizes = parts(num_requests)
    assert (len(sizes), sum(sizes)) == (NUM_PARTS, num_requests)
    assert max(sizes) - min(sizes) <= 1


def test_growth_is_from_the_first_checkpoint_to_the_last() -> None:
    sizes = {10: Size(1000, 50), 50: Size(1500, 52), 100: Size(2800, 53)}
    assert tuple(sizes) == CHECKPOINTS
    values = growth(sizes, num_requests=100)
    assert (values["growth_bytes"], values["growth_per_request_bytes"], values["num_allocations_grown"]) == (
        1800,
        20,
        3,
    )
    assert values["rss_after_50_percent_bytes"] == 1500


def test_a_refusal_is_a_failure_here() -> None:
    error = errors.Overloaded("full")
    done, refused = (Trace(due_s=0, sent_s=0, ended_s=1, error=each) for each in (None, error))
    assert failures([done, refused, refused]) == {"Overloaded": 2}


async def run(path: Path, *arguments: str) -> dict[str, float]:
    """The benchmark as the command line would run it, one round; its metrics. No process is left."""
    args = router_overhead.parser().parse_args(["--streams", "4", "--step-ms", "0", *arguments])
    options = Options(rounds=1, warmup_rounds=0, pause_s=0, json_path=path)
    before = set(psutil.Process().children(recursive=True))
    assert await harness.execute(router_overhead.make_benchmark(args), options) == 0
    assert set(psutil.Process().children(recursive=True)) <= before
    return metrics(path)


def metrics(path: Path) -> dict[str, float]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["metric"]: row["value"] for row in rows if "metric" in row}


async def test_streams_pass_through_a_real_router(tmp_path: Path) -> None:
    found = await run(tmp_path / "rows", "--requests", "24", "--tokens", "40", "--workers", "2")
    assert (found["num_requests"], found["num_refused"]) == (24, 0)
    assert found["router_cpu_per_token_us"] >= 0
    assert found["mean_message_tokens"] >= 1
    assert found["router_rss_bytes"] > 1 << 20


async def test_a_memory_run_ends_with_nothing_held(tmp_path: Path) -> None:
    found = await run(tmp_path / "rows", "--memory", "--requests", "200")
    assert (found["num_live_at_end"], found["num_waiting_at_end"], found["num_index_blocks_at_end"]) == (0, 0, 0)
    assert {f"rss_after_{percent}_percent_bytes" for percent in CHECKPOINTS} <= found.keys()


def test_a_bad_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--streams", "0"], ["--step-ms", "-1"]):
        with pytest.raises(SystemExit):
            router_overhead.parser().parse_args(arguments)
        assert arguments[0] in capsys.readouterr().err
