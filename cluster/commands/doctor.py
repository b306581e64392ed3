"""`headwater doctor`: what is wrong with this environment, and what to do about it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.call import Json

if TYPE_CHECKING:
    from workers.finding import Finding

CHECK_WIDTH = 14


def doctor(
    config: Annotated[Path | None, typer.Option(help="The configuration, YAML; without one, all defaults.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as worker.engine.kind=vllm."),
    ] = None,
    json: Json = False,
) -> None:
    """Check versions, libraries, memory and the model for a configuration. Exits 2 if it cannot run here."""
    from cluster.commands.printer import print_json
    from cluster.config import load
    from cluster.doctor import examine
    from workers.versions import Installed

    has_failed = False
    for finding in examine(load(config, set_ or []), Installed()):
        has_failed |= finding.status == "failed"
        if json:
            print_json(dataclasses.asdict(finding))
        else:
            print(_line(finding), flush=True)
    if has_failed:
        raise typer.Exit(2)


def _line(finding: Finding) -> str:
    return f"{finding.status:8} {finding.check:{CHECK_WIDTH}} {finding.text}"
