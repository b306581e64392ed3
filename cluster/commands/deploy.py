"""`headwater deploy`: manifests on a Kubernetes cluster: what it lacks, what would change, applying, and how it stands.

Exit codes of every command: 0 all is well; 1 findings, differences, conflicts, not ready, or not gone in time;
2 wrong usage, unreadable manifests, or an API server that cannot be reached or refuses.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cluster.commands.call import Json
from cluster.commands.printer import print_json

if TYPE_CHECKING:
    from cluster.kubernetes.api import Api
    from cluster.kubernetes.manifests import Manifest
    from cluster.kubernetes.removal import Target
    from cluster.kubernetes.state import State

CHECK_WIDTH: Final = 21
POLL_S: Final = 2.0

deploy = typer.Typer(
    name="deploy",
    help="Deploy on Kubernetes: check, compare, apply, watch, reach, remove. Exits 0 when all is well, "
    "1 on findings, differences, conflicts or what is not ready, 2 on wrong usage or an unreachable API server.",
    no_args_is_help=True,
)

Files = Annotated[
    list[str],
    typer.Option("--file", "-f", metavar="FILE|DIR|-", help="Manifests, YAML; - reads the standard input. Repeatable."),
]
AnyFiles = Annotated[
    list[str] | None,
    typer.Option("--file", "-f", metavar="FILE|DIR|-", help="Only what these manifests name. Repeatable."),
]
Kubeconfig = Annotated[
    str | None, typer.Option(metavar="FILE", help="Instead of $KUBECONFIG or ~/.kube/config.", show_default=False)
]
Context = Annotated[str | None, typer.Option(metavar="NAME", help="Of the kubeconfig; without one, its current.")]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", metavar="NAME", help="Without one, the manifests', else the context's."),
]
Force = Annotated[bool, typer.Option("--force-conflicts", help="Take fields that other managers have set.")]
Name = Annotated[str | None, typer.Argument(help="The RayService; without one, all in the namespace.")]


@deploy.command()
def preflight(
    file: Files,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
    json: Json = False,
) -> None:
    """Check what the manifests need of the cluster. Changes nothing. Exits 1 if it cannot run there."""
    from cluster.kubernetes.preflight import examine

    has_failed = False
    with _read(file, kubeconfig, context, namespace) as (api, manifests):
        for finding in examine(api, manifests):
            has_failed |= finding.status == "failed"
            if json:
                print_json(dataclasses.asdict(finding))
            else:
                print(f"{finding.status:8} {finding.check:{CHECK_WIDTH}} {finding.text}", flush=True)
    if has_failed:
        raise typer.Exit(1)


@deploy.command()
def diff(
    file: Files,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """What applying would change, as the API server sees it. Changes nothing. Exits 1 if there is a difference."""
    from cluster.kubernetes.changes import changes

    with _read(file, kubeconfig, context, namespace) as (api, manifests):
        lines = [line for change in changes(api, manifests, forces=True) for line in change.diff()]
    print(*lines, sep="\n", end="\n" if lines else "")
    if lines:
        raise typer.Exit(1)


@deploy.command()
def apply(
    file: Files,
    force_conflicts: Force = False,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
    json: Json = False,
) -> None:
    """Apply the manifests, server-side. All are tried first: a conflict or a refusal changes nothing."""
    from cluster.kubernetes import changes

    with _read(file, kubeconfig, context, namespace) as (api, manifests):
        try:
            for change in changes.apply(api, manifests, forces=force_conflicts):
                if json:
                    print_json({"object": change.title, "outcome": change.outcome})
                else:
                    print(f"{change.outcome:9} {change.title}", flush=True)
        except changes.Conflicts as conflicts:
            print(f"error: Conflicts: {conflicts.message}", file=sys.stderr)
            raise typer.Exit(1) from None


@deploy.command()
def status(
    name: Name = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
    json: Json = False,
) -> None:
    """How the deployment stands, and the one reason why it is not ready. Exits 1 if it is not."""
    from cluster.kubernetes.state import states

    with _connected(kubeconfig, context, namespace) as api:
        found = states(api, name)
    for one in found:
        if json:
            print_json(dataclasses.asdict(one))
        else:
            print(*_state_lines(one), sep="\n")
    if not all(one.is_ready for one in found):
        raise typer.Exit(1)


@deploy.command()
def wait(
    name: Name = None,
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Give up after this long.")] = 1800.0,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
    json: Json = False,
) -> None:
    """Wait until the deployment is ready; prints the reason whenever it changes. Exits 1 if it is not in time."""
    with _connected(kubeconfig, context, namespace) as api:
        last: dict[str, str] = {}
        deadline = time.monotonic() + timeout
        for found in _polled(api, name, deadline):
            for one in found:
                text = "ready" if one.is_ready else one.reason
                if last.get(one.name) != text:
                    last[one.name] = text
                    if json:
                        print_json(dataclasses.asdict(one))
                    else:
                        print(f"{one.name}: {text}", flush=True)
            if all(one.is_ready for one in found):
                return
    print(f"not ready after {timeout:g} s", file=sys.stderr)
    raise typer.Exit(1)


@deploy.command()
def port_forward(
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of this machine, to the router's gRPC; 0: any.")
    ] = 9000,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of this machine, to its page and metrics; 0: any.")
    ] = 9100,
    instance: Annotated[str | None, typer.Option(help="The release, where several are in the namespace.")] = None,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Lead ports of this machine to a router in the cluster, until Ctrl-C."""
    from cluster.kubernetes.forward import Forwarder, ready_router

    def on_error(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    with _connected(kubeconfig, context, namespace) as api:
        router = ready_router(api, instance)
        forwarders = [
            Forwarder(api, name, local_port=local_port, instance=instance, on_error=on_error)
            for name, local_port in (("grpc", grpc_port), ("metrics", http_port))
        ]
        grpc, http = (f"127.0.0.1:{forwarder.local_port}" for forwarder in forwarders)
        print(
            f"gRPC  {grpc}", f"HTTP  http://{http}", f"Leads to pod {router.pod}; Ctrl-C ends it", sep="\n", flush=True
        )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            for forwarder in forwarders:
                forwarder.close()


@deploy.command()
def uninstall(
    file: AnyFiles = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    with_data: Annotated[
        bool, typer.Option("--with-data", help="Volume claims, namespaces and custom kinds too, with all in them.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Wait this long until all is gone.")] = 300.0,
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
) -> None:
    """Remove what `apply` made in this namespace, and wait until it is gone. Exits 1 if something stays."""
    from cluster.kubernetes import removal

    with (
        _read(file, kubeconfig, context, namespace) if file else _marked(kubeconfig, context, namespace) as (
            api,
            wanted,
        )
    ):
        found = removal.applied(api, wanted)
        targets = [target for target in found if with_data or not target.is_data]
        for kept in found:
            if kept not in targets:
                print(f"kept     {kept.title} (--with-data removes it)")
        if not targets:
            print(f"nothing to remove in namespace {api.namespace}")
            return
        print(*(f"to go    {target.title}" for target in targets), sep="\n")
        if not yes:
            typer.confirm(f"Remove these {len(targets)} objects from {api.url}?", abort=True)
        left = removal.remove(api, targets, timeout_s=timeout, on_change=_show_left)
    if left:
        print(f"still there after {timeout:g} s: {', '.join(one.title for one in left)}", file=sys.stderr)
        raise typer.Exit(1)


def _show_left(left: Sequence[Target]) -> None:
    print(f"waiting for {', '.join(target.title for target in left)}" if left else "all gone", flush=True)


@contextmanager
def _connected(kubeconfig: str | None, context: str | None, namespace: str | None) -> Iterator[Api]:
    """The cluster, once it has answered. Raises KubernetesError."""
    from cluster.kubernetes.api import connect

    api = connect(kubeconfig=kubeconfig, context=context, namespace=namespace)
    try:
        yield api
    finally:
        api.close()


@contextmanager
def _read(
    files: Sequence[str], kubeconfig: str | None, context: str | None, namespace: str | None
) -> Iterator[tuple[Api, list[Manifest]]]:
    """The cluster and the manifests. Raises ManifestError and KubernetesError."""
    from cluster.kubernetes.manifests import load
    from protos.errors import ManifestError

    manifests = load(files)
    for manifest in manifests:
        if namespace and manifest.namespace not in ("", namespace):
            raise ManifestError(
                f"{manifest.source}: {manifest.title} is of namespace {manifest.namespace}, "
                f"but --namespace is {namespace}; drop one of them"
            )
    named = {manifest.namespace for manifest in manifests} - {""}
    with _connected(kubeconfig, context, namespace or (named.pop() if len(named) == 1 else None)) as api:
        yield api, manifests


@contextmanager
def _marked(kubeconfig: str | None, context: str | None, namespace: str | None) -> Iterator[tuple[Api, list[Manifest]]]:
    """The cluster, and no manifests: what was applied is found by its mark."""
    with _connected(kubeconfig, context, namespace) as api:
        yield api, []


def _polled(api: Api, name: str | None, deadline: float) -> Iterator[list[State]]:
    """The states, again and again; at least once. An API server that is away for a while is waited for."""
    from cluster.kubernetes.state import states
    from protos.errors import KubernetesError

    yield states(api, name)
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(POLL_S, left))
        try:
            found = states(api, name)
        except KubernetesError as error:
            print(f"warning: {error.message}", file=sys.stderr, flush=True)
        else:
            yield found


def _state_lines(one: State) -> list[str]:
    """One deployment, for people."""
    from cluster.commands.operate import table

    pods = [
        (pod.name, pod.component or "-", "ready" if pod.is_ready else pod.phase, f"{pod.num_restarts}")
        for pod in one.pods
    ]
    served = [(deployment.name, deployment.status) for deployment in one.deployments]
    return [
        f"{one.namespace}/{one.name}: {'ready' if one.is_ready else f'not ready: {one.reason}'}",
        *(table(("deployment", "status"), served) if served else ()),
        *(table(("pod", "component", "state", "restarts"), pods) if pods else ()),
        *(f"! {pod.trouble}" for pod in one.pods if pod.trouble and pod.trouble != one.reason),
    ]
