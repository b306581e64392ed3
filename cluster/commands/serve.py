"""`headwater serve`: a whole cluster until Ctrl-C."""

from __future__ import annotations

import logging
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from cluster.config import ClusterSection, HeadwaterConfig
    from cluster.lifecycle import Cluster

LOG_BYTES = 5 << 20
NUM_OLD_LOGS = 2


def serve(
    config: Annotated[Path | None, typer.Option(help="The configuration, YAML; without one, all defaults.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as cluster.num_workers=4."),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every key with its value, and stop.")
    ] = False,
) -> None:
    """Run a cluster until Ctrl-C: routers, workers and the Ray below them."""
    from cluster import preflight
    from cluster.config import load

    tree = load(config, set_ or [])
    if print_config:
        typer.echo(tree.dump(), nl=False)
        return
    preflight.check(tree)
    log_file = _log_to(tree.cluster.log_dir)
    logging.getLogger("cluster").info("configuration:\n%s", tree.dump())
    _run(tree, log_file)


def _run(config: HeadwaterConfig, log_file: Path) -> None:
    from cluster.lifecycle import Cluster, Interrupted

    screen = Console(highlight=False, soft_wrap=True)
    screen.print("Starting Ray …", style="dim")
    cluster = Cluster(config, on_progress=lambda stage: screen.print(stage, style="dim"), handle_signals=True)
    try:
        cluster.start()
    except Interrupted:
        raise typer.Exit(130) from None
    try:
        _welcome(screen, config, cluster, log_file)
        cluster.wait()
        screen.print("Stopping; live streams end first (Ctrl-C again: at once) …", style="dim")
    finally:
        cluster.stop()
    screen.print("Stopped", style="dim")


def _welcome(screen: Console, config: HeadwaterConfig, cluster: Cluster, log_file: Path) -> None:
    target = cluster.endpoints[0].grpc
    at = "" if target == "127.0.0.1:9000" else f" --target {target}"
    parts = [_workers(config.cluster), _count(config.cluster.num_drafters, "drafter")]
    screen.print(
        f"\n[bold]Headwater[/] serves {config.worker.model.served_name} with {' and '.join(filter(None, parts))}\n"
    )
    for router in cluster.endpoints:
        screen.print(f"  gRPC       {router.grpc}")
        if config.router.metrics.page:
            screen.print(f"  page       http://{router.metrics}/")
        screen.print(f"  metrics    http://{router.metrics}/metrics  (router)")
    for metrics in cluster.worker_metrics():
        screen.print(f"             http://{metrics}/metrics  (worker)")
    for metrics in cluster.drafter_metrics():
        screen.print(f"             http://{metrics}/metrics  (drafter)")
    screen.print(f"  log        {log_file}\n")
    screen.print(f'Try it:  {sys.argv[0]} generate "def fibonacci(n):"{at}')
    screen.print("Stop it: Ctrl-C", end="\n\n")


def _workers(cluster: ClusterSection) -> str:
    """Such as "2 workers" or "1 to 4 workers"."""
    least, most = cluster.min_workers, cluster.max_workers
    return _count(most, "worker") if least == most else f"{least} to {_count(most, 'worker')}"


def _count(number: int, noun: str) -> str:
    """Such as "2 workers"; empty for none."""
    return f"{number} {noun}{'' if number == 1 else 's'}" if number else ""


def _log_to(folder: Path) -> Path:
    """Send the driver's log to a file that never grows past a few megabytes."""
    from protos.errors import ConfigError

    path = folder / "headwater.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=NUM_OLD_LOGS, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"`cluster.log_dir`: {folder} cannot be written ({error.strerror})") from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("cluster").setLevel(logging.INFO)
    logging.getLogger("cluster").addHandler(handler)
    return path
