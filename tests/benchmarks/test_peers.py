"""Leads, agreement, the floor's arithmetic, plots' lines, environments: all that surrounds a measurement."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.benchmark import Measured
from benchmarks.peers import environment, models, plots
from benchmarks.peers.answers import Answers
from benchmarks.peers.contenders import PEERS, cpu_list, speeds
from benchmarks.peers.environment import Environment, SetupFailedError
from benchmarks.peers.floor import Floor, step_cost
from benchmarks.peers.leads import Lead, leads
from benchmarks.peers.models import Model, Shape
from benchmarks.peers.ours import merged
from benchmarks.peers.workloads import Work
from benchmarks.results import cells
from benchmarks.trial import Trial
from workers.model.directory import check_directory

SHAPE = Shape(100, 8, 2, 4, 2, 16, 32, 64, True)


def trials(metric: str, **values: list[float]) -> list[Trial]:
    return [
        Trial("w", arm, index, Measured({metric: value}))
        for arm, numbers in values.items()
        for index, value in enumerate(numbers)
    ]


def test_the_lead_is_over_the_best_peer_and_taken_within_rounds() -> None:
    found = trials("e2e_tokens_per_s", ours=[10, 40, 90], a=[5, 20, 30], b=[1, 1, 1])
    assert leads(found, "ours", ["a", "b"]) == [Lead("w", "e2e_tokens_per_s", "a", 2.0)]


def test_of_times_the_shorter_one_leads() -> None:
    found = trials("first_token_ms", ours=[10.0], a=[40.0], b=[20.0])
    assert leads(found, "ours", ["a", "b"]) == [Lead("w", "first_token_ms", "b", 2.0)]


def test_without_a_peer_or_without_ours_there_is_no_lead() -> None:
    assert leads(trials("e2e_tokens_per_s", ours=[1.0]), "ours", ["a"]) == []
    assert leads(trials("e2e_tokens_per_s", a=[1.0]), "ours", ["a"]) == []


def test_speeds_of_two_runs() -> None:
    found = speeds(Work(2, 5, 5, max_tokens=11), 10, first_s=0.5, full_s=1.0)
    assert found == {
        "e2e_tokens_per_s": 22,
        "first_token_ms": 500,
        "prefill_tokens_per_s": 20,
        "decode_tokens_per_s": 40,
    }
    assert "decode_tokens_per_s" not in speeds(Work(2, 5, 5), 10, first_s=1.0, full_s=1.0)


def test_agreement_counts_up_to_the_first_token_that_differs() -> None:
    answers = Answers()
    answers.note("w", 1, 3, "ours", [[1, 2, 3], [4, 5, 6]])
    answers.note("w", 1, 3, "a", [[1, 2, 9], [4, 5, 6]])
    answers.note("w", 2, 3, "ours", [[7, 7, 7], [7, 7, 7]])
    answers.note("w", 2, 3, "a", [[8, 7, 7], [7, 7, 7]])
    answers.note("v", 1, 3, "b", [[1]])
    (found,) = answers.agreement("ours")
    assert (found.arm, found.num_outputs, found.first_percent) == ("a", 4, 75.0)
    assert found.all_percent == pytest.approx(100 * (2 + 3 + 0 + 3) / (3 + 3 + 1 + 3))


def test_the_cost_of_a_step_counts_a_shared_prefix_once_in_bytes_and_for_all_in_products() -> None:
    layers = 2 * (8 * 64 + 8 * 32 + 8 * 32 + 64 * 8 + 3 * 8 * 32)
    assert (SHAPE.layer_parameters, SHAPE.head_parameters, SHAPE.kv_bytes_per_token) == (layers, 800, 256)
    cost = step_cost(SHAPE, Work(3, 5, 5, ((1, 100),), max_tokens=10), own_tokens=15)
    assert cost.num_bytes == 2 * (layers + 800) + (100 + 15 + 15) * 256
    assert cost.flops == 2 * 3 * (layers + 800) + 4 * 2 * 4 * 16 * (300 + 15 + 15)


def test_shares_of_the_floor() -> None:
    floor = Floor({10**6: 2e9, 10**8: 1e9}, flops_per_s=1e12)
    assert [floor.bandwidth(size) for size in (1, 9e6, 2e7, 1e9)] == [2e9, 2e9, 1e9, 1e9]
    cost = step_cost(SHAPE, Work(1, 5, 5), 5)
    shares = cost.shares(floor, step_s=cost.num_bytes / 1e9)
    assert shares["floor_percent"] == shares["floor_bandwidth_percent"] == pytest.approx(50)


def test_plots_take_what_lies_on_their_axis() -> None:
    works = {"d": Work(8, 1, 1), "s": Work(32, 1, 1, ((1, 1024),)), "t": Work(32, 1, 1, ((1, 9), (2, 9)))}
    found = [Trial(name, "ours", 0, Measured({plots.METRIC: 5.0, "other": 1.0})) for name in works]
    assert plots.lines(cells(found, "ours"), works, shared=True) == {"ours": [(1024, 5.0)]}
    assert plots.lines(cells(found, "ours"), works, shared=False) == {"ours": [(8, 5.0)]}


def test_cores_are_listed_as_linux_does() -> None:
    assert (cpu_list([1, 0]), cpu_list([0, 2]), cpu_list([3])) == ("0-1", "0,2", "3-3")


def test_settings_are_merged_by_section() -> None:
    base = {"engine": {"kv": {"num_pages": 1, "page_size": 2}, "kind": "torch"}}
    over = {"engine": {"kv": {"num_pages": 9}}, "model": {"name": "x"}}
    both = {"engine": {"kv": {"num_pages": 9, "page_size": 2}, "kind": "torch"}, "model": {"name": "x"}}
    assert merged(base, over) == both


def test_every_peer_has_pinned_requirements() -> None:
    for name in {name for peer in PEERS for name in (peer.environment, peer.converter) if name}:
        lines = (environment.REQUIREMENTS / f"{name}.txt").read_text().splitlines()
        pinned = [line for line in lines if not line.startswith("#")]
        assert pinned
        assert all("==" in line for line in pinned)


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """An environment without requirements, so that nothing is downloaded."""
    monkeypatch.setattr(environment, "REQUIREMENTS", tmp_path)
    (tmp_path / "plain.txt").write_text("# nothing\n")
    return Environment("plain", tmp_path / "cache")


def test_an_environment_is_made_once_and_again_when_its_requirements_change(plain: Environment) -> None:
    said: list[str] = []
    plain.prepare(said.append)
    assert said[-1] == "plain: ready"
    plain.run("-c", f"import sys; assert sys.prefix == {str(plain.folder)!r}", label="check")
    said.clear()
    plain.prepare(said.append)
    assert said == []
    (environment.REQUIREMENTS / "plain.txt").write_text("# still nothing\n")
    assert not plain.is_ready()


def test_what_fails_in_an_environment_is_told_with_its_last_words(tmp_path: Path) -> None:
    made = Environment("x", tmp_path)
    made.python.parent.mkdir(parents=True)
    made.python.symlink_to(sys.executable)
    with pytest.raises(SetupFailedError, match=r"convert it: exit status 3, see .*: out of tea"):
        made.run("-c", "import sys; print('out of tea'); sys.exit(3)", label="convert it")


def test_a_random_model_is_made_once_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(4200, 16, 1, 2, 1, 8, 16, 64, True)
    monkeypatch.setattr(models.Shape, "of", lambda name: shape)
    model = Model("random", tmp_path)
    directory = model.prepare("directory", None)
    assert check_directory(directory).vocab_size == 4200
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    assert sorted(tokenizer["model"]["vocab"].values())[-1] == 4199
    weights = directory / "model.safetensors"
    before = weights.stat().st_mtime_ns
    model.prepare("directory", None)
    assert weights.stat().st_mtime_ns == before
    content = weights.read_bytes()
    (directory / models.COMPLETE).unlink()
    model.prepare("directory", None)
    assert weights.read_bytes() == content


def test_a_form_that_nothing_makes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.Shape, "of", lambda name: SHAPE)
    with pytest.raises(SetupFailedError, match="nothing converts to gguf"):
        Model("random", tmp_path).prepare("gguf", None)
