"""`headwater topology`, `explain`, `drain` and `pin`: what a cluster does, why, and a hand on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.call import (
    DEFAULT_TARGET,
    Access,
    ApiKeyFile,
    Json,
    Model,
    Target,
    Timeout,
    TlsCa,
    TlsCert,
    TlsKey,
    call,
    read_prompt,
)
from cluster.commands.printer import print_json

if TYPE_CHECKING:
    from protos.client import Client, PinnedPrefix, RouteExplanation, Topology


def topology(
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key_file: ApiKeyFile = None,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """The workers and the queue, as each router sees them. For admins."""

    async def ask(client: Client) -> None:
        for view in await client.topology():
            if json:
                print_json(dataclasses.asdict(view))
            else:
                print(*topology_lines(view), sep="\n")

    call(Access(target, tls_ca, tls_cert, tls_key, api_key_file), ask, timeout_s=timeout)


def explain(
    prompt: Annotated[str, typer.Argument(help="The text; - reads it from the standard input.")],
    max_tokens: Annotated[int | None, typer.Option(min=0, help="Tokens that the answer would have.")] = None,
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key_file: ApiKeyFile = None,
    model: Model = "",
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Where a prompt would run now, and why: what it would cost each worker, in tokens of work."""

    async def ask(client: Client) -> None:
        explanation = await client.explain_route(read_prompt(prompt), model=model, max_tokens=max_tokens)
        if json:
            print_json(dataclasses.asdict(explanation))
        else:
            print(*explanation_lines(explanation), sep="\n")

    call(Access(target, tls_ca, tls_cert, tls_key, api_key_file), ask, timeout_s=timeout)


def drain(
    worker: Annotated[str, typer.Argument(help="The worker's id, as `headwater topology` has it.")],
    resume: Annotated[bool, typer.Option("--resume", help="Give it new work again.")] = False,
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key_file: ApiKeyFile = None,
    timeout: Timeout = None,
) -> None:
    """Give a worker no new work; what it runs goes on. For admins."""

    async def ask(client: Client) -> None:
        num_live = await client.drain(worker, resume=resume)
        print(f"{worker} gets {'work again' if resume else 'no new work'}; it runs {num_live} requests")

    call(Access(target, tls_ca, tls_cert, tls_key, api_key_file), ask, timeout_s=timeout)


def pin(
    prefix: Annotated[str | None, typer.Argument(help="The text; - reads it from the standard input.")] = None,
    shows: Annotated[bool, typer.Option("--list", help="Show what is pinned.")] = False,
    remove: Annotated[str | None, typer.Option(metavar="ID", help="Let a prefix go.")] = None,
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key_file: ApiKeyFile = None,
    model: Model = "",
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Have every worker compute the beginning of prompts and keep it."""
    if (prefix is not None) + shows + (remove is not None) != 1:
        raise typer.BadParameter("give a prefix, --list, or --remove ID")

    async def ask(client: Client) -> None:
        if remove is not None:
            if not await client.unpin_prefix(remove):
                raise typer.BadParameter(f"there is no pin {remove!r}; see --list", param_hint="--remove")
            return
        pins = await client.pins() if prefix is None else [await client.pin_prefix(read_prompt(prefix), model=model)]
        for pinned in pins:
            if json:
                print_json(dataclasses.asdict(pinned))
            else:
                print(pin_line(pinned))

    call(Access(target, tls_ca, tls_cert, tls_key, api_key_file), ask, timeout_s=timeout)


def topology_lines(view: Topology) -> list[str]:
    """One router, for people."""
    head = f"router {view.router_id}: {view.model or 'no model yet'}, policy {view.policy}, "
    workers = [
        (
            worker.worker_id,
            worker.state,
            f"{worker.num_running}",
            f"{worker.num_waiting}",
            f"{worker.reserved_outputs}",
            f"{worker.kv_used_tokens}/{worker.kv_capacity_tokens}",
            f"{worker.known_cached_tokens}",
        )
        for worker in view.workers
    ]
    tenants = [(tenant.tenant, f"{tenant.num_waiting}", f"{tenant.num_running}") for tenant in view.tenants]
    return [
        f"{head}{view.num_waiting} requests wait ({view.num_waiting_tokens} prompt tokens)",
        *table(("worker", "state", "running", "waiting", "from here", "KV tokens", "cached tokens"), workers),
        *(table(("tenant", "waiting", "running"), tenants) if tenants else ()),
    ]


def explanation_lines(explanation: RouteExplanation) -> list[str]:
    """A decision, for people: the best candidate first."""
    if not explanation.worker_id:
        return [f"no worker is ready for the {explanation.prompt_tokens} prompt tokens"]
    rows = [
        (
            candidate.worker_id,
            f"{candidate.cost:.0f}",
            f"{candidate.cached_tokens}",
            f"{candidate.live_tokens}",
            f"{candidate.fetchable_tokens}",
            f"{candidate.load_tokens}",
            _room(candidate.has_room),
        )
        for candidate in explanation.candidates
    ]
    return [
        f"{explanation.worker_id}: {explanation.reason}, of {explanation.prompt_tokens} prompt tokens",
        *table(("worker", "cost", "cached", "live", "to fetch", "ahead", "room"), rows),
    ]


def pin_line(pinned: PinnedPrefix) -> str:
    """A pin, for people."""
    return f"{pinned.pin_id}  {pinned.num_tokens} tokens, on {pinned.num_workers} workers"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need; the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in (heads, *rows)
    ]


def _room(has_room: bool) -> str:
    return "yes" if has_room else "no"
