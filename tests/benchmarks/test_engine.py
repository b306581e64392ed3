"""The engine benchmark from its command line to its rows, on engines that compute nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine
from benchmarks.conditions import ROOT
from benchmarks.peers import contenders
from benchmarks.peers.contenders import OURS, PEERS, Contender, Race
from benchmarks.peers.environment import SetupFailedError
from benchmarks.peers.floor import Floor
from benchmarks.peers.models import Model
from benchmarks.peers.process import Command

FAKE = """
import json, os, sys, time
from benchmarks.peers.line import Skip, main

class Fake:
    def __init__(self, settings):
        self.options, self.warmed, self.asked = settings.options, [], open(settings.options["asked"], "a")

    def facts(self):
        return {"arm": self.options["arm"]}

    def warm(self, prefixes):
        self.warmed = prefixes

    def run(self, prompts, max_tokens):
        self.asked.write(json.dumps([self.warmed, prompts, max_tokens]) + "\\n")
        self.asked.flush()
        if self.warmed and self.options["arm"] == "vllm": raise Skip("no prefixes here")
        if self.warmed and self.options["arm"] == "openvino": os._exit(3)
        time.sleep(0.002 * max_tokens)
        return [[index] * max_tokens for index in range(len(prompts))]

main(Fake)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every engine is the fake one; what it is asked goes to `<arm>.asked`."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def command(contender: Contender, race: Race) -> Command:
        asked = str(tmp_path / f"{contender.name}.asked")
        settings = {"model": "m", "threads": 1, "max_batch": race.max_batch, "max_context": race.max_context}
        settings |= {"kv_tokens": 1, "options": {"arm": contender.name, "asked": asked}}
        variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        return Command([sys.executable, str(script), json.dumps(settings)], variables, tmp_path / "log")

    monkeypatch.setattr(contenders, "command", command)
    monkeypatch.setattr(contenders, "prepare", lambda contender, model, say: None)
    monkeypatch.setattr(engine, "measure_floor", lambda threads: Floor({1: 1e9}, 1e12))
    return tmp_path


def bench(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    out = folder / "rows"
    common = ["--quick", "--pause", "0", "--models", "random", "--cache", str(folder), "--json", str(out)]
    code = engine.main([*common, *arguments])
    return code, [json.loads(line) for line in out.read_text().splitlines()]


def asked(folder: Path, arm: str) -> list[tuple[list[list[int]], list[list[int]], int]]:
    return [tuple(json.loads(line)) for line in (folder / f"{arm}.asked").read_text().splitlines()]


def test_every_engine_is_asked_the_same_and_never_the_same_twice(folder: Path) -> None:
    code, rows = bench(folder, "--only", "ours,llamacpp", "--workloads", "distinct-8,tree", "--warmup-rounds", "0")
    assert code == 0
    assert asked(folder, "ours") == asked(folder, "llamacpp")
    runs = asked(folder, "ours")
    assert [(len(warmed), len(prompts), tokens) for warmed, prompts, tokens in runs] == [
        (0, 8, 1),
        (0, 8, 16),
        (4, 8, 1),
        (4, 8, 16),
    ]
    assert runs[2][0] == runs[3][0]
    prefix = len(runs[2][0][0])
    own = [tuple(prompt[prefix * bool(warmed) :][:8]) for warmed, prompts, _ in runs for prompt in prompts]
    assert len(set(own)) == 32
    assert all(prompt[:prefix] in runs[2][0] for prompt in runs[2][1] + runs[3][1])
    metrics = {row["metric"] for row in rows if row.get("arm") == "ours" and "metric" in row}
    assert metrics > {"e2e_tokens_per_s", "decode_tokens_per_s", "first_token_ms", "floor_percent"}
    assert not any("floor" in row.get("metric", "") for row in rows if row.get("arm") == "llamacpp")


def test_leads_agreement_and_the_engines_own_facts_are_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, rows = bench(folder, "--only", "ours,llamacpp", "--workloads", "distinct-1")
    found = [row["lead"] for row in rows if "lead" in row]
    assert {(lead["workload"], lead["peer"]) for lead in found} == {("random, distinct-1", "llamacpp")}
    assert [row["agreement"]["first_percent"] for row in rows if "agreement" in row] == [100.0]
    assert rows[0]["conditions"]["config"]["engine llamacpp"] == {"arm": "llamacpp"}
    printed = capsys.readouterr().out
    assert "ours against the best peer" in printed
    assert "tokens equal to ours" in printed


def test_an_engine_that_declines_is_told_and_one_that_dies_costs_only_its_workload(folder: Path) -> None:
    chosen = ["--only", "ours,vllm,openvino", "--workloads", "shared-1k,distinct-1", "--rounds", "2"]
    code, rows = bench(folder, *chosen)
    assert code == 1
    declined = [row for row in rows if "refusals" in row]
    assert declined == [
        {"workload": "random, shared-1k", "arm": "vllm", "refusals": "no prefixes here", "number": 3},
    ]
    failed = [row for row in rows if "failed" in row]
    assert {(row["workload"], row["arm"]) for row in failed} == {("random, shared-1k", "openvino")}
    assert "exit status 3" in failed[0]["failed"]
    assert [row["failed"].startswith("PeerError: not tried again") for row in failed] == [False, True, True]
    measured = {(row["workload"], row["arm"]) for row in rows if "metric" in row}
    assert measured == {
        *(("random, distinct-1", arm) for arm in ("ours", "vllm", "openvino")),
        ("random, shared-1k", "ours"),
    }


def test_an_engine_that_cannot_be_set_up_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(contender: Contender, model: Model, say: object) -> None:
        if contender.name == "vllm":
            raise SetupFailedError("no such distribution")

    monkeypatch.setattr(contenders, "prepare", prepare)
    code, rows = bench(folder, "--only", "ours,vllm", "--workloads", "distinct-1")
    assert code == 1
    assert [row["failed"] for row in rows if "failed" in row] == ["SetupFailedError: no such distribution"]
    assert any(row.get("arm") == "ours" and "metric" in row for row in rows)


def test_a_variant_of_ours_is_an_arm_with_its_own_configuration() -> None:
    args = engine.parser().parse_args(['--variant=ours-padded={"engine": {"kind": "torch"}}', "--ours", "{}"])
    found = engine.contenders(args)
    assert [contender.name for contender in found] == ["ours", "ours-padded", *(peer.name for peer in PEERS)]
    assert (found[1].options, found[1].program, found[1].is_ours) == ({"engine": {"kind": "torch"}}, "ours", True)


def test_set_up_goes_on_after_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def prepare(contender: Contender, model: Model, say: object) -> None:
        if contender == PEERS[0]:
            raise SetupFailedError("no compiler")
        made.append(contender.name)

    monkeypatch.setattr(engine, "prepare", prepare)
    assert engine.set_up([Model("random", folder)], [OURS, *PEERS]) == 1
    assert made == ["ours", *(peer.name for peer in PEERS[1:])]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--models", "huge"], "--models names huge"),
        (["--workloads", "shared-9k"], "--workloads names shared-9k"),
        (["--only", "ours,mine"], "--only names mine"),
        (["--ours", "[]"], "not a JSON object"),
        (["--variant", "x"], "invalid"),
    ],
)
def test_a_bad_option_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        engine.main(arguments)
    assert said in capsys.readouterr().err
