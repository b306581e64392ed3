"""The router's HTTP port: metrics as ever, the page and its data, and what a browser is told of them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Callable
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import pytest

from router.config import MetricsSection
from router.page.site import PAGE, content_policy
from tests.router.conftest import Cluster, until

Start = Callable[..., Any]


def ask_now(address: str, path: str, method: str, headers: dict[str, str]) -> tuple[HTTPResponse, bytes]:
    connection = HTTPConnection(address, timeout=5)
    try:
        connection.request(method, path, headers=headers)
        reply = connection.getresponse()
        return reply, reply.read()
    finally:
        connection.close()


async def ask(
    cluster: Cluster, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[HTTPResponse, bytes]:
    return await asyncio.to_thread(ask_now, cluster.address.metrics, path, method, headers or {})


async def test_metrics_are_what_they_were(cluster: Cluster) -> None:
    """With the choice of formats and of names, and compression."""
    reply, body = await ask(cluster, "/metrics")
    assert reply.getheader("Content-Type", "").startswith("text/plain; version=")
    assert b"\nheadwater_requests_live 0.0\n" in body
    reply, body = await ask(cluster, "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert reply.getheader("Content-Type", "").startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")
    reply, body = await ask(cluster, "/metrics?name[]=headwater_requests_live", headers={"Accept-Encoding": "gzip"})
    assert reply.getheader("Content-Encoding") == "gzip"
    _, body = await ask(cluster, "/metrics?name[]=headwater_requests_live")
    assert b"headwater_requests_live" in body
    assert b"headwater_workers" not in body


async def test_the_data_is_json_of_the_overview(cluster: Cluster) -> None:
    assert cluster.server._running is not None
    watch = cluster.server._running._overview_watch
    await until(lambda: len(watch.overview.workers) == 1)
    reply, body = await ask(cluster, "/overview.json")
    assert (reply.status, reply.getheader("Content-Type")) == (200, "application/json")
    shown = json.loads(body)
    assert shown.keys() == watch.overview.figures().keys()
    assert [worker["worker_id"] for worker in shown["workers"]] == ["w0"]


async def test_a_browser_is_told_to_run_this_page_and_nothing_else(cluster: Cluster) -> None:
    reply, body = await ask(cluster, "/")
    assert (reply.status, reply.getheader("Content-Type")) == (200, "text/html; charset=utf-8")
    assert body == PAGE.read_bytes()
    assert reply.getheader("X-Content-Type-Options") == "nosniff"
    policy = dict(part.partition(" ")[::2] for part in reply.getheader("Content-Security-Policy", "").split("; "))
    [script] = re.findall(rb"<script>(.*?)</script>", body, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert policy["script-src"] == f"'sha256-{digest}'"
    assert (policy["default-src"], policy["connect-src"], policy["frame-ancestors"]) == ("'none'", "'self'", "'none'")
    assert "unsafe" not in str(policy)
    head, nothing = await ask(cluster, "/", "HEAD")
    assert (head.status, nothing, head.getheader("Content-Length")) == (200, b"", str(len(body)))


def test_the_page_needs_nothing_from_outside_and_makes_no_markup_of_data() -> None:
    page = PAGE.read_text()
    assert not re.search(r"\son\w+\s*=", page), "an inline event handler; the policy forbids it"
    assert not re.search(r"<[^>]+\sstyle=", page), "an inline style; the policy forbids it"
    assert not re.search(r"(src|href)=\"(?!data:|overview\.json|metrics)", page)
    addresses = {*re.findall(r"https?://[^\"' )]+", page)} - {"http://www.w3.org/2000/svg"}
    assert not addresses
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert way not in page, f"{way} would take a worker's name for markup"


def test_the_policy_follows_the_page() -> None:
    one, other = (content_policy(b"<style>a</style><script>%s</script>" % script) for script in (b"1", b"2"))
    assert one != other


@pytest.mark.parametrize("path", ["/nothing", "/overview", "/page.html", "/../etc/passwd", "/metrics/x"])
async def test_other_paths_are_not_found(cluster: Cluster, path: str) -> None:
    reply, body = await ask(cluster, path)
    assert (reply.status, body) == (404, b"404 Not Found\n")
    assert reply.getheader("X-Content-Type-Options") == "nosniff"


@pytest.mark.parametrize("path", ["/", "/overview.json"])
async def test_nothing_can_be_changed(cluster: Cluster, path: str) -> None:
    reply, _ = await ask(cluster, path, "POST")
    assert (reply.status, reply.getheader("Allow")) == (405, "GET, HEAD")


async def test_without_the_page_there_are_only_metrics(start_cluster: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.router.conftest.MetricsSection", lambda port: MetricsSection(port=port, page=False))
    cluster: Cluster = await start_cluster()
    for path in ("/", "/overview.json"):
        assert (await ask(cluster, path))[0].status == 404
    assert (await ask(cluster, "/metrics"))[0].status == 200
