"""`headwater top`: once for a pipe, live in a terminal, of one router and of several."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.commands.top import sparkline, view
from protos import errors
from protos.convert import overview_to_proto
from protos.messages import EngineTotals
from protos.overview import Latency, Overview, WorkerOverview
from protos.v1 import cluster_pb2 as pb
from protos.v1 import cluster_pb2_grpc as pb_grpc

TOTALS = EngineTotals(
    seconds=5.0,
    num_steps=10,
    num_step_outputs=42,
    prompt_tokens=10_000,
    generation_tokens=6_200,
    prefix_queries_tokens=100,
    prefix_hit_tokens=80,
    attention_keys=310,
    attention_read_keys=100,
    drafted_tokens=50,
    accepted_tokens=2,
)
WORKER = WorkerOverview("worker-a", "ready", 12, 3, 250, 1000, TOTALS, TOTALS)
OVERVIEW = Overview(
    ("r0",),
    "tiny",
    window_s=60.0,
    num_live=20,
    num_waiting=4,
    outcomes={"stop": 7, "Overloaded": 2},
    time_to_first_token=Latency((0.1, 0.2), (0, 10, 0)),
    inter_token=Latency((0.01, 0.02), (100, 0, 0)),
    generation_history=(0.0, 7.0, 14.0),
    prompt_history=(1.0,),
    workers=(WORKER, WorkerOverview("worker-b", "connecting")),
)


class Router(pb_grpc.ClusterServicer):
    """Tells one overview, or fails."""

    def __init__(self, overview: Overview) -> None:
        self.overview = overview
        self.error: errors.HeadwaterError | None = None
        self.num_asked = 0

    def GetOverview(self, request: Any, context: Any) -> pb.GetOverviewResponse:  # noqa: N802
        self.num_asked += 1
        if self.error is not None:
            context.set_trailing_metadata(errors.trailers(self.error))
            context.abort(self.error.status, self.error.message)
        return overview_to_proto(self.overview)


Serve = Callable[[Router], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts routers; gives their addresses."""
    servers: list[grpc.Server] = []

    def start(router: Router) -> str:
        server = grpc.server(futures.ThreadPoolExecutor(2))
        pb_grpc.add_ClusterServicer_to_server(router, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None).wait()


def top(target: str, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["top", "--target", target, *arguments])


def shown(overview: Overview, width: int, trouble: str = "") -> list[str]:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(view(overview.figures(), width, trouble))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_a_pipe_gets_one_look(serve: Serve) -> None:
    router = Router(OVERVIEW)
    done = top(serve(router))
    assert (done.exit_code, router.num_asked) == (0, 1)
    assert [line.rstrip() for line in done.stdout.splitlines()] == [
        "tiny  1 of 2 workers ready, router r0",
        "generation   1,240 tokens/s     ▁▅█",
        "prompt       2,000 tokens/s     █",
        "requests     20 live            4 queued",
        "                                9 ended in the last minute, failed: Overloaded 2",
        "first token  p50 150 ms         p95 195 ms",
        "next tokens  p50 ≤ 10 ms        p95 ≤ 10 ms",
        "cache hits 80%   sharing 3.10x   steps filled -   drafts accepted 4.0%",
        "",
        "worker    state       tokens/s  run  wait  memory  batch  hits  sharing  drafts",
        "worker-a  ready          1,240   12     3     25%    4.2   80%    3.10x    4.0%",
        "worker-b  connecting         0    0     0       -      -     -        -       -",
    ]


def test_json_is_the_document_of_the_page(serve: Serve) -> None:
    [line] = top(serve(Router(OVERVIEW)), "--json").stdout.splitlines()
    assert json.loads(line) == json.loads(json.dumps(OVERVIEW.figures()))


def test_several_routers_are_one_cluster(serve: Serve) -> None:
    other = Overview(("r1",), "tiny", num_live=5, outcomes={"WorkerLost": 1}, workers=(WORKER,))
    targets = f"{serve(Router(OVERVIEW))},{serve(Router(other))}"
    figures = json.loads(top(targets, "--json").stdout)
    assert figures["routers"] == ["r0", "r1"]
    assert figures["requests"]["live"] == 25
    assert figures["requests"]["errors"] == {"Overloaded": 2, "WorkerLost": 1}
    assert figures["generation_tokens_per_s"] == 1240  # one worker is one worker


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    overview = Overview(
        ("r0",),
        "tiny",
        generation_history=tuple(map(float, range(60))),
        workers=tuple(WorkerOverview(f"worker-{i}", "ready", recent=TOTALS, window=TOTALS) for i in range(3)),
    )
    lines = shown(overview, width)
    assert all(len(line) <= width for line in lines)
    assert sum("worker-" in line or "ready" in line for line in lines) >= 3
    assert any("1,240" in line for line in lines)
    assert any("drafts  " in f"{line}  " for line in lines if line.startswith("worker ")) == (width >= 88)


def test_words_of_others_are_shown_and_not_obeyed() -> None:
    evil = WorkerOverview("[red]\x1b[2J\x07", "ready")
    text = "\n".join(shown(Overview(("r0",), "a[bold]b\x1b]0;x", workers=(evil,)), 100, "no answer: \x1b[2J"))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]?[2J?" in text
    assert "a[bold]b?]0;x" in text


def test_a_cluster_without_workers() -> None:
    lines = shown(Overview(("r0",), ""), 80)
    assert lines[0] == "no model yet  0 of 0 workers ready, router r0"
    assert lines[-1] == "no worker is known"


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ((), 5, ""),
        ((0.0, 0.0), 5, "▁▁"),
        ((0.0, 1.0, 2.0, 7.0), 5, "▁▂▃█"),
        ((7.0, 0.0, 3.5), 2, "▁█"),
        ((1.0,), 0, ""),
        ((1.0,), -9, ""),
    ],
)
def test_sparklines(values: tuple[float, ...], width: int, line: str) -> None:
    assert sparkline(values, width) == line


def test_errors_are_typed(serve: Serve) -> None:
    router = Router(OVERVIEW)
    router.error = errors.PermissionDenied("acme may not do this")
    assert isinstance(top(serve(router)).exception, errors.PermissionDenied)
    assert isinstance(top("127.0.0.1:1", "--timeout", "1").exception, errors.NoWorker)
    assert top("127.0.0.1:1", "--interval", "0").exit_code == 2


class Terminal:
    """`headwater top` in a terminal of its own."""

    def __init__(self, target: str) -> None:
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "cluster.cli", "top", "--target", target, "--interval", "0.1"]
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str, timeout_s: float = 30.0) -> None:
        """Until the terminal has been sent it, from what was sent since the last time."""
        until = time.monotonic() + timeout_s
        while text not in self.seen:
            assert time.monotonic() < until, self.seen
            if select.select([self._ours], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self._ours, 1 << 16).decode(errors="replace")
                except OSError:  # it has ended
                    assert text in self.seen, self.seen
        self.seen = self.seen.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(serve: Serve) -> Iterator[tuple[Terminal, Router]]:
    router = Router(OVERVIEW)
    opened = Terminal(serve(router))
    yield opened, router
    opened.close()


def test_a_terminal_follows_until_ctrl_c(terminal: tuple[Terminal, Router]) -> None:
    opened, router = terminal
    opened.wait_for("\x1b[?1049h")  # the other screen
    opened.wait_for("1,240 tokens/s")
    router.overview = Overview(("r0",), "tiny", workers=(WorkerOverview("the-next", "warming"),))
    opened.wait_for("the-next")
    opened.process.send_signal(signal.SIGINT)
    opened.wait_for("\x1b[?1049l")
    assert opened.process.wait(20) == 130
    assert "Traceback" not in opened.seen


def test_a_terminal_waits_for_a_cluster_that_is_away(terminal: tuple[Terminal, Router]) -> None:
    opened, router = terminal
    opened.wait_for("1,240 tokens/s")
    router.error = errors.NoWorker("nobody is there")
    opened.wait_for("no answer since")
    opened.wait_for("1,240 tokens/s")  # the old figures stay
    router.error = None
    router.overview = Overview(("r0",), "tiny", workers=(WorkerOverview("the-next", "warming"),))
    opened.wait_for("the-next")
    router.error = errors.PermissionDenied("acme may not do this")
    opened.wait_for("PermissionDenied")
    assert opened.process.wait(20) == 1
