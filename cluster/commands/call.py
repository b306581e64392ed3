"""What the commands that talk to a cluster share: where it is, and how one call begins and ends."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from protos.client import Client

DEFAULT_TARGET = "127.0.0.1:9000"

Target = Annotated[str, typer.Option(envvar="HEADWATER_TARGET", metavar="HOST:PORT", help="Where a router listens.")]
Model = Annotated[str, typer.Option(help="The model's name; without one, the only model served.")]
Timeout = Annotated[float | None, typer.Option(min=0.001, metavar="SECONDS", help="Give up after this long.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


def call(target: str, work: Callable[[Client], Coroutine[Any, Any, None]], *, timeout_s: float | None = None) -> None:
    """Run `work` with a client of `target`. Ctrl-C cancels it and exits 130; a closed pipe ends it quietly."""
    from protos.errors import NoWorker

    host, port = _split(target)
    try:
        asyncio.run(_with_client(target, work, timeout_s=timeout_s))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more can be said there
        raise typer.Exit(0) from None
    except NoWorker:
        if _answers(host, port):
            raise
        raise NoWorker(
            f"nothing answers at {target}; start a cluster with `headwater serve`, or name another with --target"
        ) from None


async def _with_client(
    target: str, work: Callable[[Client], Coroutine[Any, Any, None]], *, timeout_s: float | None
) -> None:
    from protos.client import Client

    async with Client(target, timeout_s=timeout_s) as client:
        await work(client)


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _split(target: str) -> tuple[str, int]:
    host, _, port = target.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise typer.BadParameter(f"{target!r} is not HOST:PORT, such as {DEFAULT_TARGET}", param_hint="--target")
    return host.strip("[]"), int(port)


def prompt_tokens(text: bytes) -> list[int]:
    """Token ids written with spaces or commas between them. Raises BadParameter."""
    try:
        return [int(part) for part in text.replace(b",", b" ").split()]
    except ValueError:
        raise typer.BadParameter(f"{text.decode(errors='replace')!r} is not a list of ids, such as 1,2,3") from None


def read_prompt(prompt: str) -> bytes:
    """The prompt as bytes, `-` meaning the standard input."""
    return sys.stdin.buffer.read() if prompt == "-" else prompt.encode("utf-8", "surrogateescape")
