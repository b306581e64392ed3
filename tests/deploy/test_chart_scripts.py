"""The shell scripts inside the chart, run: downloads end in a marker, once, and a pod's end waits for its process."""

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy import chart

STUB = '#!/bin/sh\necho "$(basename "$0") $@ TOKEN=$HF_TOKEN" >> "$CALLS"\nexit ${FAIL:-0}\n'


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder for the PATH, with programs that only say how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("hf", "aws", "ray"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    return folder


def run(script: str, stubs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    whole = {"PATH": f"{stubs}:/usr/bin:/bin", "CALLS": str(stubs / "calls")} | environment
    return subprocess.run(
        ["/bin/sh", "-euc", script], env=whole, capture_output=True, text=True, timeout=60, check=False
    )


def calls(stubs: Path) -> list[str]:
    return (stubs / "calls").read_text().splitlines() if (stubs / "calls").exists() else []


def fetcher(group: str, source: str, *, secret: str = "") -> tuple[str, dict[str, str]]:
    """The script of a group's first container, and its environment."""
    found = chart.groups(chart.objects({"model": {"source": source, "authSecret": secret}}))
    container = found[group]["template"]["spec"]["initContainers"][0]
    return container["args"][0], {one["name"]: one["value"] for one in container["env"]}


def test_a_download_is_marked_and_made_once(stubs: Path, tmp_path: Path) -> None:
    script, environment = fetcher("worker-default", "hf://Qwen/Qwen3-8B@v1")
    environment["FOLDER"] = str(tmp_path / "models" / "qwen")
    for _ in range(2):
        assert run(script, stubs, **environment).returncode == 0
    (call,) = calls(stubs)
    assert call.startswith(
        f"hf download Qwen/Qwen3-8B --revision v1 --local-dir {environment['FOLDER']} --exclude *.bin"
    )
    assert (tmp_path / "models" / "qwen" / ".complete").exists()


def test_a_download_that_fails_is_tried_again(stubs: Path, tmp_path: Path) -> None:
    script, environment = fetcher("worker-default", "hf://Qwen/Qwen3-8B")
    environment["FOLDER"] = str(tmp_path / "model")
    assert run(script, stubs, FAIL="1", **environment).returncode == 1
    assert not (tmp_path / "model" / ".complete").exists()
    assert run(script, stubs, **environment).returncode == 0
    assert len(calls(stubs)) == 2
    assert "--revision" not in calls(stubs)[0]


def test_credentials_come_from_files(stubs: Path, tmp_path: Path) -> None:
    script, environment = fetcher("worker-default", "hf://Qwen/Qwen3-8B", secret="hub")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "HF_TOKEN").write_text("a secret\n")
    environment["FOLDER"] = str(tmp_path / "model")
    assert run(script.replace("/etc/headwater/download", str(secret)), stubs, **environment).returncode == 0
    assert calls(stubs)[0].endswith("TOKEN=a secret")


def test_an_object_store_is_copied(stubs: Path, tmp_path: Path) -> None:
    script, environment = fetcher("router", "s3://bucket/models/qwen")
    environment["FOLDER"] = str(tmp_path / "model")
    assert run(script, stubs, **environment).returncode == 0
    (call,) = calls(stubs)
    assert call.startswith("aws s3 sync --only-show-errors --exclude *.safetensors s3://bucket/models/qwen ")


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def pre_stop(port: int) -> str:
    container = chart.ray_container(chart.groups(chart.objects())["worker-default"])
    script = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    return re.sub(r'\("127.0.0.1", \d+\)', f'("127.0.0.1", {port})', script)


def test_a_pod_ends_when_its_process_has(stubs: Path, server: socket.socket) -> None:
    script, done = pre_stop(server.getsockname()[1]), threading.Event()
    thread = threading.Thread(target=lambda: (run(script, stubs), done.set()))
    thread.start()
    server.accept()[0].close()  # it has looked once, so Ray was asked before
    assert calls(stubs)[0].startswith("ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION")
    assert not done.is_set()
    server.close()
    thread.join(timeout=30)
    assert done.is_set()


def test_a_pod_that_ray_does_not_know_ends_at_once(stubs: Path, server: socket.socket) -> None:
    assert run(pre_stop(server.getsockname()[1]), stubs, FAIL="1").returncode == 0
    server.setblocking(False)
    with pytest.raises(BlockingIOError):  # nobody waited for the process
        server.accept()
