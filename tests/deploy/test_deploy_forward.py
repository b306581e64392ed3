"""`headwater deploy port-forward`: several connections at once, to a router that is ready, through the API server."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.kubernetes.forward import Forwarder, ready_router
from protos.errors import KubernetesError
from tests.deploy.api_server import ApiServer
from tests.deploy.conftest import Deploy
from tests.deploy.rays import add_pod, pod_status

ROUTER = {"app.kubernetes.io/name": "headwater", "app.kubernetes.io/component": "router"}


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that says everything again, backwards."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with contextlib.closing(connection):
            while data := connection.recv(1 << 20):
                connection.sendall(data[::-1])

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@contextlib.contextmanager
def forwarded(deploy: Deploy, port: str = "grpc") -> Iterator[tuple[Forwarder, list[str]]]:
    errors: list[str] = []
    with contextlib.closing(deploy.connect()) as api:
        forwarder = Forwarder(api, port, local_port=0, instance=None, on_error=errors.append)
        try:
            yield forwarder, errors
        finally:
            forwarder.close()


def received(connection: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = connection.recv(1 << 20)
        assert part
        data += part
    return data


def test_several_connections_go_through_at_once(kube: ApiServer, deploy: Deploy, echo: int) -> None:
    add_pod(kube, "r", pod_status(is_ready=True), **ROUTER)
    kube.ports["r", 9000] = echo
    with forwarded(deploy) as (forwarder, errors), contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", forwarder.local_port))) for _ in range(3)
        ]
        for index, connection in enumerate(connections):
            connection.sendall(b"spring-%d" % index)
        for index, connection in reversed([*enumerate(connections)]):
            assert received(connection, 8) == b"%d-gnirps" % index
    assert errors == []


def test_long_messages_arrive_whole(kube: ApiServer, deploy: Deploy, echo: int) -> None:
    add_pod(kube, "r", pod_status(is_ready=True), **ROUTER)
    kube.ports["r", 9000] = echo
    sent = bytes(range(256)) * 2000
    with (
        forwarded(deploy) as (forwarder, _),
        socket.create_connection(("127.0.0.1", forwarder.local_port)) as connection,
    ):
        connection.sendall(sent)
        assert sorted(received(connection, len(sent))) == sorted(sent)


def test_grpc_goes_through_it(kube: ApiServer, deploy: Deploy) -> None:
    from concurrent import futures

    server = grpc.server(futures.ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    kube.ports["r", 9000] = server.add_insecure_port("127.0.0.1:0")
    server.start()
    add_pod(kube, "r", pod_status(is_ready=True), **ROUTER)
    with (
        forwarded(deploy) as (forwarder, _),
        grpc.insecure_channel(f"127.0.0.1:{forwarder.local_port}") as channel,
    ):
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    server.stop(None).wait()


def test_each_connection_goes_to_a_router_that_is_ready_then(kube: ApiServer, deploy: Deploy, echo: int) -> None:
    add_pod(kube, "a", pod_status(is_ready=True), **ROUTER)
    with forwarded(deploy) as (forwarder, errors):
        kube.delete("Pod", "a")
        with socket.create_connection(("127.0.0.1", forwarder.local_port)) as connection:
            assert connection.recv(1) == b""
        while not errors:
            time.sleep(0.01)
        assert "none of 0 router pods" in errors[0]
        add_pod(kube, "b", pod_status(is_ready=False), **ROUTER)
        add_pod(kube, "c", pod_status(is_ready=True), **ROUTER)
        kube.ports["c", 9000] = echo
        with socket.create_connection(("127.0.0.1", forwarder.local_port)) as connection:
            connection.sendall(b"ab")
            assert received(connection, 2) == b"ba"


def test_a_port_where_nothing_listens_is_told(kube: ApiServer, deploy: Deploy) -> None:
    add_pod(kube, "r", pod_status(is_ready=True), **ROUTER)
    with forwarded(deploy, "metrics") as (forwarder, errors):
        with socket.create_connection(("127.0.0.1", forwarder.local_port)) as connection:
            assert connection.recv(1) == b""
        while not errors:
            time.sleep(0.01)
        assert errors == ["port 9100: nothing listens at 9100 in the pod"]


def test_the_router_is_of_the_release_asked_for(kube: ApiServer, deploy: Deploy) -> None:
    for name in ("one", "two"):
        add_pod(kube, name, pod_status(is_ready=True), **ROUTER, **{"app.kubernetes.io/instance": name})
    with contextlib.closing(deploy.connect()) as api:
        assert ready_router(api, "two").pod == "two"
        with pytest.raises(KubernetesError, match="none of 0"):
            ready_router(api, "three")


def test_ports_are_found_by_their_names(kube: ApiServer, deploy: Deploy, echo: int) -> None:
    ports = [{"name": "grpc", "containerPort": 9443}, {"containerPort": 8080}]
    add_pod(kube, "r", pod_status(is_ready=True), ports=ports, **ROUTER)
    kube.ports["r", 9443] = echo
    with (
        forwarded(deploy) as (forwarder, _),
        socket.create_connection(("127.0.0.1", forwarder.local_port)) as connection,
    ):
        connection.sendall(b"ab")
        assert received(connection, 2) == b"ba"


def test_a_local_port_in_use_is_refused(kube: ApiServer, deploy: Deploy, echo: int) -> None:
    add_pod(kube, "r", pod_status(is_ready=True), **ROUTER)
    done = deploy.run("port-forward", "--grpc-port", str(echo), "--http-port", "0")
    assert isinstance(done.exception, KubernetesError)
    assert f"port {echo} of this machine cannot be used" in done.exception.message


def test_the_command_runs_until_ctrl_c(kube: ApiServer, deploy: Deploy, echo: int) -> None:
    add_pod(kube, "r", pod_status(is_ready=True), **ROUTER)
    kube.ports["r", 9000] = echo
    arguments = [
        "deploy",
        "port-forward",
        "--grpc-port",
        "0",
        "--http-port",
        "0",
        "--kubeconfig",
        str(deploy.kubeconfig),
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert "pod r" in lines[2]
        host, _, port = lines[0].split()[1].rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"ab")
            assert received(connection, 2) == b"ba"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
