"""What the router's HTTP port serves: the metrics, and the page with its data.

Everything is read by threads of the HTTP server, from what is frozen; no request does work in the router.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import prometheus_client as prometheus

from protos.overview import Overview

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

PAGE = Path(__file__).with_name("page.html")
INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)
Headers = list[tuple[str, str]]


class Site:
    """A WSGI application: `/metrics`, `/` and `/overview.json`. Safe from any thread; it changes nothing."""

    def __init__(self, registry: prometheus.CollectorRegistry, overview: Callable[[], Overview] | None) -> None:
        """`overview`: what the page shows, from any thread; None: there is no page."""
        self._metrics: WSGIApplication = prometheus.make_wsgi_app(registry)
        self._overview = overview
        self._page = PAGE.read_bytes()
        self._policy = content_policy(self._page)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        path = environ.get("PATH_INFO") or "/"
        if path.rstrip("/") == "/metrics":
            return self._metrics(environ, start_response)
        if self._overview is None or path not in ("/", "/overview.json"):
            return _say(environ, start_response, "404 Not Found")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _say(environ, start_response, "405 Method Not Allowed", [("Allow", "GET, HEAD")])
        if path == "/":
            headers = [*_secure(self._policy), ("Content-Type", "text/html; charset=utf-8")]
            return _answer(environ, start_response, "200 OK", headers, self._page)
        headers = [*_secure("default-src 'none'"), ("Content-Type", "application/json")]
        body = json.dumps(self._overview().figures()).encode()
        return _answer(environ, start_response, "200 OK", headers, body)


def content_policy(page: bytes) -> str:
    """What a browser may do with the page: run its own script and style, ask its own server, and nothing else."""
    found = {kind.decode(): content for kind, content in INLINE.findall(page)}
    hashes = {kind: base64.b64encode(hashlib.sha256(content).digest()).decode() for kind, content in found.items()}
    parts = [
        "default-src 'none'",
        *(f"{kind}-src 'sha256-{digest}'" for kind, digest in hashes.items()),
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return "; ".join(parts)


def _secure(policy: str) -> Headers:
    return [
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Cache-Control", "no-store"),
    ]


def _say(
    environ: WSGIEnvironment, start_response: StartResponse, status: str, headers: Sequence[tuple[str, str]] = ()
) -> Iterable[bytes]:
    """A status in plain words."""
    plain = [*headers, *_secure("default-src 'none'"), ("Content-Type", "text/plain; charset=utf-8")]
    return _answer(environ, start_response, status, plain, f"{status}\n".encode())


def _answer(
    environ: WSGIEnvironment, start_response: StartResponse, status: str, headers: Headers, body: bytes
) -> Iterable[bytes]:
    start_response(status, [*headers, ("Content-Length", str(len(body)))])
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
