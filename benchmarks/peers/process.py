"""The host's side of the line protocol: an engine in a process of its own, started, asked, ended whatever it does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.conditions import ROOT

QUIT_S = 15.0  # for an engine to end by itself
LINE_BYTES = 64 * 2**20
TAIL_LINES = 3

Tokens = Sequence[int]


class PeerError(Exception):
    """The engine failed, hung, died, or said what is not of the protocol."""


class PeerSkipped(Exception):
    """The engine declines this workload; the message says why."""


@dataclass(frozen=True)
class Command:
    """How an engine's process is started."""

    arguments: Sequence[str]
    environment: Mapping[str, str]  # all of it
    log: Path  # takes all that the engine prints
    start_s: float = 300.0  # loading and compiling take minutes on some
    answer_s: float = 300.0


@dataclass(frozen=True)
class Answer:
    """What one run gave."""

    wall_s: float  # of the engine's own call
    outputs: tuple[tuple[int, ...], ...]  # in the order of the prompts


class PeerProcess:
    """One engine's process, resident between asks. Owned by one Contender; asked by one task at a time.

    After a PeerError the process is ended, so that nothing of it takes time from others; `start` begins another.
    """

    def __init__(self, command: Command) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> Mapping[str, Any]:
        """Start the process and wait until it is ready; its facts. Raises PeerError."""
        command = self._command
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with command.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command.arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=dict(command.environment),
                start_new_session=True,  # so that its children end with it
                limit=LINE_BYTES,
            )
        return await self._ended_on_error(None, "ready", command.start_s)

    async def warm(self, prefixes: Sequence[Tokens]) -> None:
        """Have prefixes computed. Raises PeerError, PeerSkipped."""
        await self._ask({"op": "warm", "prefixes": prefixes})

    async def run(self, prompts: Sequence[Tokens], max_tokens: int) -> Answer:
        """Run prompts to `max_tokens` each. Raises PeerError, PeerSkipped."""
        value = await self._ask({"op": "run", "prompts": prompts, "max_tokens": max_tokens})
        try:
            answer = Answer(float(value["wall_s"]), tuple(tuple(output) for output in value["outputs"]))
        except (KeyError, TypeError, ValueError) as error:
            raise PeerError(f"answered what is not an answer: {error!r}") from error
        lengths = [len(output) for output in answer.outputs]
        if lengths != [max_tokens] * len(prompts):
            raise PeerError(f"asked for {max_tokens} tokens of each of {len(prompts)} prompts, got {lengths}")
        return answer

    async def close(self) -> None:
        """End the process: asked first, then its whole group killed. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if process.stdin is not None and process.returncode is None:
                process.stdin.write(b'{"op": "quit"}\n')
                process.stdin.close()
            await asyncio.wait_for(process.wait(), QUIT_S)
        except (TimeoutError, OSError):
            pass  # it is killed below, as is whatever it has left behind
        finally:
            _kill_group(process.pid)
            await process.wait()

    async def _ask(self, message: Mapping[str, object]) -> Mapping[str, Any]:
        if not self.is_running:
            raise PeerError("the process has ended")
        return await self._ended_on_error(message, "ok", self._command.answer_s)

    async def _ended_on_error(
        self, message: Mapping[str, object] | None, key: str, timeout_s: float
    ) -> Mapping[str, Any]:
        """Send, and wait for the answer under `key`; on any failure but one that the engine told of, kill it."""
        assert self._process is not None, "not started"
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._exchange(self._process, message)
        except TimeoutError as error:
            await self._kill()
            raise PeerError(f"no answer within {timeout_s:g} s; killed{self._last_words()}") from error
        except (OSError, ValueError) as error:
            await self._kill()
            raise PeerError(f"{error}{self._last_words()}") from error
        if "skip" in answer:
            raise PeerSkipped(str(answer["skip"]))
        if "error" in answer:
            raise PeerError(str(answer["error"]))
        value = answer.get(key)
        if not isinstance(value, dict):
            await self._kill()
            raise PeerError(f"answered without {key!r}: {str(answer)[:200]}")
        return value

    async def _exchange(
        self, process: asyncio.subprocess.Process, message: Mapping[str, object] | None
    ) -> Mapping[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        if message is not None:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            await process.stdin.drain()
        line = await process.stdout.readline()
        if not line:
            raise ConnectionError(f"the process ended with exit status {await process.wait()}")
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise ValueError(f"printed what is not JSON: {line[:200]!r}") from error
        if not isinstance(answer, dict):
            raise ValueError(f"answered what is not an object: {line[:200]!r}")
        return answer

    async def _kill(self) -> None:
        assert self._process is not None, "not started"
        _kill_group(self._process.pid)
        await self._process.wait()

    def _last_words(self) -> str:
        lines = self._command.log.read_text(errors="replace").strip().splitlines()[-TAIL_LINES:]
        return f"; it printed: {' | '.join(lines)}" if lines else ""


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # the leader and all its children have ended
