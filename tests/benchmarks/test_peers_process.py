"""The line protocol between two real processes: answers, reasons, and everything that can go wrong."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.conditions import ROOT
from benchmarks.peers.process import Command, PeerError, PeerProcess, PeerSkipped

SETTINGS = {"model": "m", "threads": 1, "max_batch": 4, "max_context": 64, "kv_tokens": 64, "options": {"mark": 7}}

ENGINE = """
import os, subprocess, sys, time
from benchmarks.peers.line import Skip, main

print("a library greets on import")

class Fake:
    def __init__(self, settings):
        self.mark = settings.options["mark"]
        self.warmed = []
        subprocess.run([sys.executable, "-c", "print('a child prints'); import sys; sys.stdin.read()"], check=True)

    def facts(self):
        return {"mark": self.mark}

    def warm(self, prefixes):
        self.warmed = prefixes

    def run(self, prompts, max_tokens):
        print("noise")
        os.write(1, b"noise below Python\\n")
        what = prompts[0][0]
        if what == 1: raise ValueError("no such token")
        if what == 2: raise Skip("too slow")
        if what == 3: os._exit(9)
        if what == 4: time.sleep(60)
        if what == 5: return [[]]
        return [[len(prompt), len(self.warmed), self.mark][:max_tokens] for prompt in prompts]

main(Fake)
"""


@asynccontextmanager
async def peer(
    folder: Path, program: str = ENGINE, *, start_s: float = 30.0, answer_s: float = 30.0
) -> AsyncIterator[PeerProcess]:
    script, variables = folder / "peer.py", {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    script.write_text(program)
    arguments = [sys.executable, str(script), json.dumps(SETTINGS)]
    process = PeerProcess(Command(arguments, variables, folder / "log", start_s=start_s, answer_s=answer_s))
    try:
        yield process
    finally:
        await process.close()


async def test_an_engine_is_asked_and_what_it_prints_goes_to_its_log(tmp_path: Path) -> None:
    async with peer(tmp_path) as process:
        assert await process.start() == {"mark": 7}
        await process.warm([[8, 8], [9]])
        answer = await process.run([[10, 11], [12]], 3)
    assert answer.outputs == ((2, 2, 7), (1, 2, 7))
    assert answer.wall_s > 0
    printed = (tmp_path / "log").read_text()
    assert all(text in printed for text in ("greets", "a child prints", "noise", "noise below Python"))


async def test_an_engine_that_tells_of_an_error_stays(tmp_path: Path) -> None:
    async with peer(tmp_path) as process:
        await process.start()
        with pytest.raises(PeerError, match="ValueError: no such token"):
            await process.run([[1]], 1)
        with pytest.raises(PeerSkipped, match="too slow"):
            await process.run([[2]], 1)
        assert (await process.run([[6]], 1)).outputs == ((1,),)


async def test_an_engine_that_dies_is_told_with_its_status_and_can_be_started_again(tmp_path: Path) -> None:
    async with peer(tmp_path) as process:
        await process.start()
        with pytest.raises(PeerError, match=r"exit status 9; it printed: .*noise"):
            await process.run([[3]], 1)
        assert not process.is_running
        with pytest.raises(PeerError, match="has ended"):
            await process.run([[6]], 1)
        await process.start()
        assert (await process.run([[6]], 1)).outputs == ((1,),)


async def test_an_engine_that_hangs_is_killed(tmp_path: Path) -> None:
    async with peer(tmp_path, answer_s=0.5) as process:
        await process.start()
        with pytest.raises(PeerError, match=r"no answer within 0\.5 s"):
            await process.run([[4]], 1)
        assert not process.is_running


async def test_too_few_tokens_are_an_error(tmp_path: Path) -> None:
    async with peer(tmp_path) as process:
        await process.start()
        with pytest.raises(PeerError, match=r"asked for 2 tokens of each of 1 prompts, got \[0\]"):
            await process.run([[5]], 2)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print('Loading...')", "printed what is not JSON: b'Loading"),
        ("print('[1]')", "answered what is not an object"),
        ("print('{\"ok\": {}}')", "answered without 'ready'"),
        ("raise SystemExit('no such library')", "exit status 1; it printed: no such library"),
        (ENGINE.replace('settings.options["mark"]', "1 / 0"), "ZeroDivisionError: division by zero"),
    ],
)
async def test_an_engine_that_does_not_start_says_why(tmp_path: Path, program: str, reason: str) -> None:
    async with peer(tmp_path, program) as process:
        with pytest.raises(PeerError, match=reason.replace("[", r"\[")):
            await process.start()


async def test_an_engine_that_never_gets_ready_is_killed(tmp_path: Path) -> None:
    async with peer(tmp_path, "import time; time.sleep(60)", start_s=0.3) as process:
        with pytest.raises(PeerError, match=r"no answer within 0\.3 s"):
            await process.start()
        assert not process.is_running


async def test_closing_ends_the_children_too(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    )
    program += 'print(\'{"ready": {"child": %d}}\' % child.pid, flush=True)\nsys.stdin.readline()'
    async with peer(tmp_path, program) as process:
        child = int((await process.start())["child"])
        assert _exists(child)
    assert _gone(child)


def _exists(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "Z (zombie)" not in status.read_text()


def _gone(pid: int) -> bool:
    """Killed processes end soon, not at once."""
    deadline_s = time.monotonic() + 10
    while _exists(pid) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return not _exists(pid)
