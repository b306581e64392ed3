"""`headwater top`: how a cluster does, live in a terminal, or once for a pipe."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.commands.call import (
    DEFAULT_TARGET,
    Access,
    ApiKeyFile,
    Json,
    Target,
    Timeout,
    TlsCa,
    TlsCert,
    TlsKey,
    call,
)
from cluster.commands.printer import print_json

if TYPE_CHECKING:
    from protos.client import Client, Overview

BLOCKS = "▁▂▃▄▅▆▇█"
DASH = "-"  # nothing happened that could tell
PIPE_WIDTH = 120  # columns, where there is no terminal
WIDE, MIDDLE = 88, 56  # columns from which the table of workers has all of its own, and most of them
STYLES = {"ready": "green", "connecting": "red", "unknown": "red"}  # of states; the others are yellow


def top(
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, as in a pipe and with --json.")] = False,
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key_file: ApiKeyFile = None,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Throughput, latencies, queue and workers of a cluster, live. For admins."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)

    async def ask(client: Client) -> None:
        if json:
            print_json((await look(client)).figures())
        elif once or not console.is_terminal:
            console.print(view((await look(client)).figures(), console.width))
        else:
            await watch(client, console, interval)

    call(Access(target, tls_ca, tls_cert, tls_key, api_key_file), ask, timeout_s=timeout)


async def look(client: Client) -> Overview:
    """What all routers tell, as one."""
    from protos.overview import merged

    return merged(await client.overview())


async def watch(client: Client, console: Console, interval_s: float) -> None:
    """Look again and again, until cancelled. A cluster that cannot be reached for a while is waited for."""
    from protos.errors import HeadwaterError

    figures, heard, trouble = (await look(client)).figures(), time.time(), ""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(view(figures, console.width, trouble), refresh=True)
            await asyncio.sleep(interval_s)
            try:
                figures, heard, trouble = (await look(client)).figures(), time.time(), ""
            except HeadwaterError as error:
                if not error.retryable:
                    raise
                trouble = f"no answer since {time.strftime('%H:%M:%S', time.localtime(heard))}: {error.message}"


def view(figures: dict[str, Any], width: int, trouble: str = "") -> RenderableType:
    """What `Overview.figures` says, for people. `trouble`: why it is old."""
    parts: list[RenderableType] = [_head(figures)]
    if trouble:
        parts.append(Text(printable(trouble), style="bold red"))
    parts += [_throughput(figures, width), _latencies(figures), _shares(figures), Text(), _workers(figures, width)]
    return Group(*parts)


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values, a character each; the highest is a full block."""
    shown = values[-width:] if width > 0 else ()
    peak = max(shown, default=0.0)
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * value / peak)] if peak else BLOCKS[0] for value in shown)


def printable(text: str) -> str:
    """With nothing in it that a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _head(figures: dict[str, Any]) -> Text:
    workers = figures["workers"]
    num_ready = sum(worker["state"] == "ready" for worker in workers)
    routers = printable(", ".join(figures["routers"]))
    head = Text(printable(figures["model"]) or "no model yet", style="bold")
    return head.append(f"  {num_ready} of {len(workers)} workers ready, router {routers}", style="dim not bold")


def _throughput(figures: dict[str, Any], width: int) -> Table:
    lines = _lines()
    room = min(width - 34, 60)
    for kind, style in (("generation", "cyan"), ("prompt", "bright_black")):
        name = f"{kind}_tokens_per_s"
        curve = Text(sparkline(figures["history"][name], room), style=style)
        lines.add_row(kind, Text(f"{rate(figures[name])} tokens/s", style="bold"), curve)
    return lines


def _latencies(figures: dict[str, Any]) -> Table:
    lines, requests = _lines(), figures["requests"]
    failed = ", ".join(f"{printable(name)} {count}" for name, count in sorted(requests["errors"].items()))
    last_minute = Text(f"{requests['ended']} ended in the last minute, ").append(
        f"failed: {failed}" if failed else "none failed", style="bold red" if failed else ""
    )
    lines.add_row("requests", Text(f"{requests['live']} live", style="bold"), f"{requests['waiting']} queued")
    lines.add_row("", "", last_minute)
    for title, name in (("first token", "time_to_first_token"), ("next tokens", "inter_token")):
        latency = figures[name]
        median, high = (duration(latency[key], latency["floor_s"]) for key in ("p50_s", "p95_s"))
        lines.add_row(title, Text(f"p50 {median}", style="bold"), f"p95 {high}")
    return lines


def _shares(figures: dict[str, Any]) -> Text:
    shown = {
        "cache hits": percent(figures["prefix_hit_rate"]),
        "sharing": factor(figures["sharing_factor"]),
        "steps filled": percent(figures["step_fill"]),
        "drafts accepted": percent(figures["draft_acceptance"]),
    }
    line = Text()
    for name, value in shown.items():
        line.append(f"{name} ", style="dim").append(f"{value}   ", style="bold")
    return line


def _lines() -> Table:
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", width=11)
    lines.add_column(no_wrap=True, min_width=17)
    lines.add_column(overflow="fold")
    return lines


Cell = Callable[[dict[str, Any]], RenderableType]
TINY: dict[str, Cell] = {
    "worker": lambda worker: printable(worker["worker_id"]),
    "state": lambda worker: Text(printable(worker["state"]), style=STYLES.get(worker["state"], "yellow")),
    "tokens/s": lambda worker: rate(worker["generation_tokens_per_s"]),
    "run": lambda worker: f"{worker['running']}",
}
NARROW: dict[str, Cell] = {
    **TINY,
    "wait": lambda worker: f"{worker['waiting']}",
    "memory": lambda worker: percent(worker["kv_usage"]),
}
FULL: dict[str, Cell] = {
    **NARROW,
    "batch": lambda worker: DASH if worker["batch"] is None else f"{worker['batch']:.1f}",
    "hits": lambda worker: percent(worker["prefix_hit_rate"]),
    "sharing": lambda worker: factor(worker["sharing_factor"]),
    "drafts": lambda worker: percent(worker["draft_acceptance"]),
}


def _workers(figures: dict[str, Any], width: int) -> RenderableType:
    if not figures["workers"]:
        return Text("no worker is known", style="yellow")
    columns = FULL if width >= WIDE else NARROW if width >= MIDDLE else TINY
    shown = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for at, name in enumerate(columns):
        shown.add_column(name, justify="left" if at < 2 else "right", no_wrap=True, overflow="ellipsis")
    for worker in figures["workers"]:
        shown.add_row(*(_plain(cell(worker)) for cell in columns.values()))
    return shown


def _plain(cell: RenderableType) -> RenderableType:
    """Words of others are no markup."""
    return Text(cell) if isinstance(cell, str) else cell


def rate(value: float) -> str:
    """Of tokens a second."""
    return f"{value:.1f}" if 0 < value < 10 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """A dash of nothing."""
    return DASH if share is None else f"{share:.0%}" if share >= 0.1 or not share else f"{share:.1%}"


def factor(value: float | None) -> str:
    """How many times."""
    return DASH if value is None else f"{value:.2f}x"


def duration(seconds: float | None, floor_s: float | None) -> str:
    """In the unit that suits it; at most the floor where it is that."""
    if seconds is None:
        return DASH
    shown = f"{seconds:.2f} s"
    if seconds < 1:
        shown = f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"
    return f"≤ {shown}" if floor_s is not None and seconds <= floor_s else shown
