"""What the commands that talk to a cluster share: where it is, what is shown there, how one call begins and ends."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from protos.client import Client, ClientTLS

DEFAULT_TARGET = "127.0.0.1:9000"

Target = Annotated[
    str,
    typer.Option(envvar="HEADWATER_TARGET", metavar="HOST:PORT", help="Where a router listens; several with commas."),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(envvar="HEADWATER_TLS_CA", exists=True, dir_okay=False, help="Speak TLS; who signed the router's."),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(envvar="HEADWATER_TLS_CERT", exists=True, dir_okay=False, help="Show this certificate, PEM."),
]
TlsKey = Annotated[
    Path | None,
    typer.Option(envvar="HEADWATER_TLS_KEY", exists=True, dir_okay=False, help="The certificate's key, PEM."),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(envvar="HEADWATER_API_KEY_FILE", exists=True, dir_okay=False, help="Holds the API key to show."),
]
Model = Annotated[str, typer.Option(help="The model's name; without one, the only model served.")]
Timeout = Annotated[float | None, typer.Option(min=0.001, metavar="SECONDS", help="Give up after this long.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


@dataclass(frozen=True, slots=True)
class Access:
    """Where a cluster is, and what is shown there: the options of every command that talks to one."""

    target: str
    tls_ca: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    api_key_file: Path | None

    @property
    def tls(self) -> ClientTLS | None:
        """None: plain text. Raises BadParameter."""
        from protos.client import ClientTLS

        if (self.tls_cert is None) != (self.tls_key is None):
            raise typer.BadParameter("give both --tls-cert and --tls-key, or neither", param_hint="--tls-cert")
        if self.tls_ca is None and self.tls_cert is None:
            return None
        return ClientTLS(self.tls_ca, self.tls_cert, self.tls_key)

    @property
    def api_key(self) -> str | None:
        """As the file has it, without space around it. Raises BadParameter."""
        if self.api_key_file is None:
            return None
        key = self.api_key_file.read_bytes().strip()
        if not key or not key.isascii() or not key.decode("ascii").isprintable():
            raise typer.BadParameter(f"{self.api_key_file} must hold one line of ASCII", param_hint="--api-key-file")
        return key.decode("ascii")


def call(
    access: Access, work: Callable[[Client], Coroutine[Any, Any, None]], *, timeout_s: float | None = None
) -> None:
    """Run `work` with a client of the cluster. Ctrl-C cancels it and exits 130; a closed pipe ends it quietly."""
    from protos.errors import NoWorker

    places = [_split(target) for target in access.target.split(",")]
    try:
        asyncio.run(_with_client(access, work, timeout_s=timeout_s))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more can be said there
        raise typer.Exit(0) from None
    except NoWorker as error:
        if any(_answers(host, port) for host, port in places):
            raise NoWorker(_explained(error.message, access)) from None
        raise NoWorker(
            f"nothing answers at {access.target}; start a cluster with `headwater serve`, or name another with --target"
        ) from None


def _explained(details: str, access: Access) -> str:
    """With what to do about it, where certificates are the matter."""
    from protos.tls import grpc_reason

    reason = grpc_reason(details)
    if reason == details:
        return details
    options = "give --tls-ca if its router has TLS" if access.tls is None else "see --tls-ca, --tls-cert and --tls-key"
    return f"no connection to {access.target}: {reason}; {options}"


async def _with_client(
    access: Access, work: Callable[[Client], Coroutine[Any, Any, None]], *, timeout_s: float | None
) -> None:
    from protos.client import Client

    async with Client(access.target, tls=access.tls, api_key=access.api_key, timeout_s=timeout_s) as client:
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
