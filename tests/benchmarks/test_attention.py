"""The attention benchmark: what the arms compute is equal, and the work counted is what it should be. Never a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import attention
from benchmarks.attention import (
    FORESTS,
    PAGE_SIZE,
    SHARINGS,
    Decoding,
    Heads,
    Level,
    Load,
    Probe,
    Sharing,
    lay_out,
    make_backend,
)
from workers.attention.cost import FittedCost
from workers.attention.protocol import AttentionBackend, KVShape, Segment, StepBatch

FOREST = (Level(2, 128), Level(4, 64), Level(8, 32))
CHEAP_SEGMENTS = FittedCost(fixed_s=0.0, rows=(1, 256), per_key_s=(1e-6, 2e-6), merge_row_s=0.0)
DEAR_SEGMENTS = FittedCost(fixed_s=1.0, rows=(1, 256), per_key_s=(1e-6, 2e-6), merge_row_s=0.0)


def load(levels: tuple[Level, ...] = FOREST, num_steps: int = 2) -> Load:
    return Load(levels, Heads(2, 2, 16), "float32", num_layers=2, num_steps=num_steps)


def make(shape: KVShape) -> AttentionBackend:
    return make_backend("torch", shape, torch.float32, 1)


def decoding(sharing: Sharing, cost: FittedCost = CHEAP_SEGMENTS, num_steps: int = 2) -> Decoding:
    return Decoding(load(num_steps=num_steps), sharing, make, cost, seed=3)


def keys_read(sharing: Sharing, cost: FittedCost = CHEAP_SEGMENTS) -> int:
    return sum(segment.num_keys for segment in decoding(sharing, cost).step().segments)


def test_all_arms_compute_the_same() -> None:
    """Over the steps, and across the end of a page."""
    num_steps = PAGE_SIZE + 2
    expected = decoding("copies", num_steps=num_steps)
    others = [decoding(sharing, num_steps=num_steps) for sharing in SHARINGS if sharing != "no attention"]
    for _ in range(num_steps):
        output = expected.step().output
        assert output.count_nonzero() == output.numel()
        for other in others:
            torch.testing.assert_close(other.step().output, output, atol=1e-5, rtol=0)


def test_an_arm_without_attention_computes_nothing() -> None:
    step = decoding("no attention").step()
    assert step.segments == ()
    assert step.output.count_nonzero() == 0


def test_each_arm_reads_as_many_keys_as_its_sharing_leaves() -> None:
    own = 8 * (32 + 1)
    assert keys_read("copies") == keys_read("shared storage") == 8 * (128 + 64) + own
    assert keys_read("one level") == 2 * 128 + 8 * 64 + own
    assert keys_read("all levels") == 2 * 128 + 4 * 64 + own


def test_the_planner_goes_by_cost() -> None:
    assert keys_read("planned", CHEAP_SEGMENTS) == keys_read("all levels")
    assert keys_read("planned", DEAR_SEGMENTS) == keys_read("shared storage")


@pytest.mark.parametrize("sharing", [sharing for sharing in SHARINGS if sharing != "no attention"])
def test_every_row_attends_to_its_whole_context_once(sharing: Sharing) -> None:
    segments = decoding(sharing).step().segments
    spans: dict[int, list[tuple[int, int]]] = {}
    for segment in segments:
        for row in range(segment.row_start, segment.row_start + segment.num_rows):
            spans.setdefault(row, []).append((segment.key_start, segment.key_start + segment.num_keys))
    for row in range(8):
        seen = [position for start, stop in spans[row] for position in range(start, stop)]
        assert sorted(seen) == list(range(128 + 64 + 32 + 1))


def test_copies_share_no_page_and_others_share_what_they_have_in_common() -> None:
    copied, shared = lay_out(load(), copies=True), lay_out(load(), copies=False)
    assert len({page for table in copied.tables for page in table}) == copied.num_pages
    assert copied.num_pages == sum(len(table) for table in copied.tables) == 8 * (4 + 2 + 2)
    assert shared.num_pages == 2 * 4 + 4 * 2 + 8 * 2
    first, second, third = shared.tables[0], shared.tables[1], shared.tables[2]
    assert (first[:6], first[6:] == second[6:]) == (second[:6], False)
    assert (first[:4], first[4:6] == third[4:6]) == (third[:4], False)
    assert [shared.paths[index] == shared.paths[0] for index in range(8)] == [True, True, *[False] * 6]


def test_every_workload_has_whole_pages_and_even_levels() -> None:
    for levels in FORESTS.values():
        assert all(level.num_tokens % PAGE_SIZE == 0 for level in levels)
        assert all(levels[-1].num_nodes % level.num_nodes == 0 for level in levels)


class Recording:
    """A backend that notes what it is asked to compute. Mutated only by its test."""

    def __init__(self) -> None:
        self.steps: list[tuple[Segment, ...]] = []

    def begin(self, batch: StepBatch) -> None:
        self.steps.append(batch.segments)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None) -> Tensor:
        return query

    def copy_page(self, source: int, target: int) -> None:
        raise AssertionError("nothing to copy")


def test_the_probe_compares_steps_that_differ_in_one_thing() -> None:
    backend = Recording()
    probe = Probe(load(), lambda _: backend)
    probe.segment_s(4, 256)
    with_segment, without = backend.steps
    assert [(segment.num_rows, segment.num_keys) for segment in with_segment] == [(4, 256)]
    assert without == ()
    backend.steps.clear()
    probe.merge_s(8)
    together, apart = backend.steps
    assert [(s.num_rows, s.num_keys) for s in together] == [(s.num_rows, s.num_keys) for s in apart]
    assert len({segment.row_start for segment in together}) == 1
    assert len({segment.row_start for segment in apart}) == 2


def test_the_probe_fits_in_its_store() -> None:
    cost = Probe(load(), make).cost()
    assert cost.segment(4, 4096) >= cost.segment(4, 256) >= 0
    assert cost.merge(8) >= 0


def test_a_run_reports_every_arm_and_its_counted_work(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    options = ["--quick", "--pause", "0", "--warmup-rounds", "0", "--steps", "2", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        code = attention.main([*options, "--workloads", "tree", "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    assert code == 0
    rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    read = {row["arm"]: row["value"] for row in rows if row.get("metric") == "num_keys_read"}
    assert set(read) == set(SHARINGS)
    assert read["copies"] == 8 * (128 + 64 + 33)
    assert read["all levels"] == 128 + 2 * 64 + 8 * 33
    assert {row["metric"] for row in rows if row.get("arm") == "planned"} == {
        "step_us",
        "plan_us",
        "num_segments",
        "num_keys_read",
        "num_pairs",
    }


def test_a_workload_that_quick_runs_lack_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attention.main(["--quick", "--workloads", "two groups"])
    assert "needs a workload" in capsys.readouterr().err
