"""The page in a real browser, with data made up for it: names that are markup, lost connections, nobody there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import prometheus_client as prometheus
import pytest

from protos.messages import EngineTotals
from protos.overview import Latency, Overview, WorkerOverview
from router.metrics import MetricsServer
from router.page.site import Site

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
EVIL = "<img id=evil src=x onerror=\"document.title='evil'\">&amp;"
Look = Callable[[], Overview]


class Elements(HTMLParser):
    """Every element with its attributes, and the text of each that has an id."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._id = ""
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._id = dict(attrs).get("id") or ""
        self.texts.setdefault(self._id, "")

    def handle_endtag(self, tag: str) -> None:
        self._id = ""

    def handle_data(self, data: str) -> None:
        if self._id:
            self.texts[self._id] += data


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., Elements]:
    """Serves a page with these data, and gives what a browser makes of it within some seconds of its own time."""

    def visit(look: Look, budget_ms: int = 1500) -> Elements:
        registry = prometheus.CollectorRegistry()
        server = MetricsServer(registry, host="127.0.0.1", port=0, site=Site(registry, look))
        try:
            return Elements(dump(server.port, tmp_path, budget_ms))
        finally:
            server._server.shutdown()
            server._server.server_close()
            server._thread.join()

    return visit


def dump(port: int, folder: Path, budget_ms: int) -> str:
    browser = shutil.which("chromium")
    assert browser is not None
    command: list[Any] = [
        *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
        *("--disable-dev-shm-usage", f"--user-data-dir={folder}", f"--virtual-time-budget={budget_ms}", "--dump-dom"),
        f"http://127.0.0.1:{port}/",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


def test_names_are_text_whatever_they_are(browse: Callable[..., Elements]) -> None:
    totals = EngineTotals(seconds=2.0, generation_tokens=2469)
    worker = WorkerOverview(EVIL, "ready", recent=totals, window=totals)
    page = browse(lambda: Overview((EVIL,), EVIL, outcomes={EVIL: 3}, workers=(worker,)))
    assert page.texts["model"] == page.texts["router"] == EVIL
    assert page.texts["failed"] == f"Failed: {EVIL} 3"
    assert page.texts["generation"] == "1,235"  # it is this document, and shown
    assert [attributes["title"] for _, attributes in page.found if "title" in attributes] == [EVIL]
    assert not [tag for tag, attributes in page.found if tag == "img" or attributes.get("id") == "evil"]


def test_nobody_and_nothing_is_said_so(browse: Callable[..., Elements]) -> None:
    page = browse(lambda: Overview(("r0",), ""))
    hidden = {attributes.get("id") for _, attributes in page.found if "hidden" in attributes}
    assert hidden == {"scroll"}
    assert (page.texts["generation"], page.texts["hit-rate"], page.texts["ttft-p50"]) == ("0", "–", "–")  # noqa: RUF001
    assert page.texts["ttft-count"] == "none in the last minute"


def test_times_at_the_finest_bucket_are_told_as_such(browse: Callable[..., Elements]) -> None:
    page = browse(lambda: Overview(("r0",), "", inter_token=Latency((0.01, 0.2, 3.0), (60, 0, 40, 0))))
    assert (page.texts["itl-p50"], page.texts["itl-p95"]) == ("≤ 10 ms", "2.65 s")


def test_a_lost_connection_is_told_and_comes_back(browse: Callable[..., Elements]) -> None:
    num_asked = 0

    def failing(until: int) -> Look:
        def look() -> Overview:
            nonlocal num_asked
            num_asked += 1
            if 1 < num_asked < until:
                raise RuntimeError("the router is gone")
            return Overview(("r0",), f"look {num_asked}")

        return look

    lost = browse(failing(10**6), 4000)
    assert lost.texts["link"].startswith("connection lost since ")
    assert lost.texts["model"] == "look 1"  # what was known stays
    assert [attributes["class"] for tag, attributes in lost.found if tag == "main"] == ["stale"]
    num_asked = 0
    found = browse(failing(3), 6000)
    assert num_asked > 3
    assert found.texts["link"] == "live"
    assert [attributes.get("class") for tag, attributes in found.found if tag == "main"] == [""]
