"""The page in a real browser, of a real cluster under load: what it shows is what Prometheus would be told."""

from __future__ import annotations

import re
import shutil
import struct
import tempfile
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.deploy.watched import IMAGES, Outcome
from tests.e2e.script import run

pytestmark = [
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium"),
    pytest.mark.timeout(300),
]
GENERATED, PROMPT = "vllm:generation_tokens_total", "vllm:prompt_tokens_total"
TELLING_S = 3.0  # a total is up to a second old when it is told, and again when it is shown; and then some
RECENT_S = 5.0  # what rates are of
WAIT_S = 4.0  # more than a slow machine adds to the second between two looks of the router


class Texts(HTMLParser):
    """The text of every element that has an id, without that of others in it, and the rows of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.by_id: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self._open: list[tuple[str, str]] = []  # tag and id of the elements around

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("meta", "link"):
            return
        name = dict(attrs).get("id") or ""
        self._open.append((tag, name))
        self.by_id[name] = ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        self.by_id[self._open[-1][1]] += data
        if any(tag in ("th", "td") for tag, _ in self._open):
            self.rows[-1][-1] += data


@dataclass(frozen=True)
class Seen:
    """What the script saw, and the pictures that it took."""

    outcome: Outcome
    images: Path


@pytest.fixture(scope="module")
def seen(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    images = tmp_path_factory.mktemp("images")
    with tempfile.TemporaryDirectory(prefix="hwp-") as folder:  # short: sockets live there
        _, outcome = run("tests.deploy.watched", folder, str(images), "4", root=root, directory=images, timeout_s=280)
    return Seen(Outcome(**outcome), images)


@pytest.fixture(scope="module")
def page(seen: Seen) -> Texts:
    texts = Texts()
    texts.feed(seen.outcome.page_at_last)
    return texts


def number(text: str) -> int:
    """The first one in it."""
    found = re.search(r"[\d,]+", text)
    assert found is not None, text
    return int(found.group().replace(",", ""))


def grown(outcome: Outcome, name: str) -> float:
    return outcome.at_last[name] - outcome.at_first.get(name, 0.0)


def test_when_the_load_has_stopped_all_totals_are_those_of_the_metrics(seen: Seen) -> None:
    outcome, shown = seen.outcome, seen.outcome.overview_at_last
    assert shown["window"] == {
        "generation_tokens": grown(outcome, GENERATED),
        "prompt_tokens": grown(outcome, PROMPT),
    }
    assert shown["requests"]["ended"] == grown(outcome, "headwater_requests_total") > 0
    assert shown["time_to_first_token"]["count"] == grown(outcome, "headwater_time_to_first_token_seconds_count")
    assert shown["inter_token"]["count"] == grown(outcome, "headwater_inter_token_latency_seconds_count")
    hits, queries = (grown(outcome, f"vllm:prefix_cache_{name}_total") for name in ("hits", "queries"))
    assert shown["prefix_hit_rate"] == pytest.approx(hits / queries)
    keys, read = (grown(outcome, f"headwater_attention_{name}_total") for name in ("keys", "read_keys"))
    assert shown["sharing_factor"] == pytest.approx(keys / read)
    assert shown["sharing_factor"] > 1.2, "the load shares prefixes"
    drafted = grown(outcome, "vllm:spec_decode_num_draft_tokens_total")
    accepted = grown(outcome, "vllm:spec_decode_num_accepted_tokens_total")
    assert shown["draft_acceptance"] == (pytest.approx(accepted / drafted) if drafted else None)


def test_every_worker_has_its_own_figures(seen: Seen) -> None:
    workers = seen.outcome.overview_at_last["workers"]
    assert len(workers) == 2
    for worker in workers:
        metrics = seen.outcome.by_worker[worker["worker_id"]]
        assert worker["state"] == "ready"
        assert (worker["running"], worker["waiting"]) == (0, 0)
        assert worker["kv_usage"] == pytest.approx(metrics["vllm:kv_cache_usage_perc"])
        hits, queries = (metrics[f"vllm:prefix_cache_{name}_total"] for name in ("hits", "queries"))
        assert worker["prefix_hit_rate"] == pytest.approx(hits / queries)
        keys, read = (metrics[f"headwater_attention_{name}_total"] for name in ("keys", "read_keys"))
        assert worker["sharing_factor"] == pytest.approx(keys / read)


def test_rates_under_load_are_those_of_the_counters(seen: Seen) -> None:
    """What is shown of the last seconds was counted within them: no less than well inside, no more than well around."""
    outcome = seen.outcome
    shown, at = outcome.overview, outcome.looked_at

    def count(name: str, when: float, *, late: bool) -> float:
        before = [values[name] for clock, values in outcome.under_load if clock <= when]
        after = [values[name] for clock, values in outcome.under_load if clock >= when]
        return after[0] if late else before[-1]

    for name, rate in ((GENERATED, "generation_tokens_per_s"), (PROMPT, "prompt_tokens_per_s")):
        around = count(name, at, late=True) - count(name, at - RECENT_S - WAIT_S, late=False)
        inside = count(name, at - TELLING_S, late=False) - count(name, at - RECENT_S + 1.0, late=True)
        assert inside / (RECENT_S + WAIT_S) <= shown[rate] <= around / (RECENT_S - TELLING_S / 2), rate
    assert shown["requests"]["live"] > 0
    assert sum(worker["running"] for worker in shown["workers"]) > 0


def test_a_browser_shows_what_the_data_say(seen: Seen, page: Texts) -> None:
    shown = seen.outcome.overview_at_last
    assert page.by_id["link"] == "live"
    assert page.by_id["model"] == "target"
    assert (page.by_id["live"], page.by_id["queued"]) == ("0", "0")
    assert number(page.by_id["ended"]) == grown(seen.outcome, "headwater_requests_total")
    assert page.by_id["failed"] == "none failed"
    assert number(page.by_id["ttft-count"]) == shown["time_to_first_token"]["count"]
    assert page.by_id["hit-rate"] == f"{shown['prefix_hit_rate']:.0%}".replace("%", " %")
    assert page.by_id["sharing"] == f"{shown['sharing_factor']:.2f} ×"  # noqa: RUF001
    assert page.by_id["workers-title"] == "Workers: 2 of 2 ready"
    head, *rows = page.rows
    assert head[:2] == ["worker", "state"]
    assert [row[:2] for row in rows] == [[worker["worker_id"], "ready"] for worker in shown["workers"]]


def test_top_says_the_same(seen: Seen) -> None:
    shown, told = seen.outcome.overview_at_last, seen.outcome.top
    moving = {"window_s", "history", "generation_tokens_per_s", "prompt_tokens_per_s", "workers"}
    assert {name: told[name] for name in told.keys() - moving} == {name: shown[name] for name in shown.keys() - moving}
    assert [worker["worker_id"] for worker in told["workers"]] == sorted(seen.outcome.by_worker)


@pytest.mark.parametrize("name", IMAGES)
def test_the_page_can_be_photographed(seen: Seen, name: str) -> None:
    width, height = map(int, IMAGES[name][0].split(","))
    picture = (seen.images / name).read_bytes()
    assert struct.unpack(">II", picture[16:24]) == (width, height)
    assert len(picture) > 20_000, "it is all but blank"
