"""`headwater`: run a cluster, and talk to one. Starts fast: each command imports what it needs when it runs."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from cluster.commands.bench import ITS_OWN_OPTIONS, bench
from cluster.commands.deploy import deploy
from cluster.commands.doctor import doctor
from cluster.commands.generate import generate
from cluster.commands.inspect import models, score, tokenize
from cluster.commands.key import api_key
from cluster.commands.operate import drain, explain, pin, topology
from cluster.commands.serve import serve
from cluster.commands.top import top
from protos.errors import HeadwaterError, SetupError

app = typer.Typer(
    name="headwater",
    help="Distributed LLM serving: shared prefixes stored once and computed once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve, doctor, generate, score, tokenize, models, top, topology, explain, drain, pin, api_key):
    app.command()(command)
app.command(context_settings=ITS_OWN_OPTIONS)(bench)
app.add_typer(deploy)


def main() -> None:
    """The console script. Exits 0 when done, 1 on a request's error, 2 on a wrong set-up or usage, 130 on Ctrl-C."""
    try:
        app()
    except HeadwaterError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/] {type(error).__name__}: ", end="")
        print(error.message, file=sys.stderr)
        sys.exit(2 if isinstance(error, SetupError) else 1)


if __name__ == "__main__":
    main()
