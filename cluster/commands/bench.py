"""`headwater bench`: measure a running cluster."""

from __future__ import annotations

import typer

ITS_OWN_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(context: typer.Context) -> None:
    """Measure a running cluster: latencies, throughput, how drafts went. `headwater bench --help` tells how."""
    from benchmarks.serve import main  # brings the benchmark's libraries: only this command needs them

    raise typer.Exit(main(context.args, prog="headwater bench"))
