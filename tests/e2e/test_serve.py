"""`headwater serve` as a person runs it: ready, used, stopped, nothing left; and what it says when it cannot start."""

import json
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import HEADWATER

FREE_PORTS = ("router.grpc.port=0", "router.metrics.port=0", "worker.metrics.port=0", "worker.engine.threads=1")


def serve_command(root: Path, *settings: str) -> list[str]:
    overrides = [part for setting in (*FREE_PORTS, *settings) for part in ("--set", setting)]
    return [str(HEADWATER), "serve", "--config", str(root / "deploy" / "config" / "laptop.yaml"), *overrides]


@contextmanager
def serving(root: Path, log_dir: Path, *settings: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A cluster in a process of its own, and what it printed until it was ready."""
    command = serve_command(root, f"cluster.log_dir={log_dir}", "cluster.drain_timeout_s=2", *settings)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root)
    assert process.stdout is not None
    printed = ""
    try:
        while "Stop it" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        yield process, printed
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


ONE_OF_EACH = (
    "cluster.num_workers=1",
    "cluster.num_drafters=1",
    "worker.engine.speculation.drafters=[pool]",
    "drafter.metrics.port=0",
)


@pytest.mark.parametrize(
    ("number", "settings", "parts"),
    [(signal.SIGINT, (), "2 workers"), (signal.SIGTERM, ONE_OF_EACH, "1 worker and 1 drafter")],
    ids=["SIGINT", "SIGTERM"],
)
def test_serve_starts_serves_and_leaves_nothing(
    root: Path, tmp_path: Path, number: signal.Signals, settings: tuple[str, ...], parts: str
) -> None:
    with serving(root, tmp_path, *settings) as (process, printed):
        found = re.search(r"gRPC\s+(\S+)", printed)
        assert found
        assert printed.count("/metrics") == 3
        assert re.search(r"page +http://127\.0\.0\.1:\d+/$", printed, re.MULTILINE)
        assert f"with {parts}\n" in printed
        for part in parts.split(" and "):
            how_many, what = part.removesuffix("s").split()
            assert f"{what.capitalize()} {how_many}/{how_many} ready" in printed
            assert printed.count(f"/metrics  ({what})") == int(how_many)
        answer = subprocess.run(
            [HEADWATER, "generate", "import ", "--target", found[1], "--max-tokens", "8", "--json"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert json.loads(answer.stdout.splitlines()[-1])["usage"]["completion_tokens"] <= 8
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) > 4
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert not list(Path(tempfile.gettempdir()).glob(f"hw-{process.pid}-*"))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("worker.engin.threads=1", "worker.engin"),
        ("worker.model.path=no/such/model", "no/such/model"),
        ("router.grpc.port=99999", "router.grpc.port"),
        ("cluster.num_workers=none", "cluster.num_workers"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(root: Path, tmp_path: Path, setting: str, words: str) -> None:
    command = serve_command(root, f"cluster.log_dir={tmp_path}", setting)
    began = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert "Ray" not in result.stdout, f"Ray was started, after {time.monotonic() - began:.0f} s"


def test_a_port_in_use_is_named(root: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = serve_command(root, f"cluster.log_dir={tmp_path}", f"router.grpc.port={port}")
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root)
    assert result.returncode == 2
    assert str(port) in result.stderr


def test_a_worker_that_cannot_start_is_explained(root: Path, tmp_path: Path) -> None:
    """The replica's own words, not a wall of tracebacks; and nothing keeps running."""
    command = serve_command(root, f"cluster.log_dir={tmp_path}", "worker.session.host=203.0.113.1")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=root)
    assert result.returncode == 2
    assert "203.0.113.1" in result.stderr
    assert "Traceback" not in result.stderr
