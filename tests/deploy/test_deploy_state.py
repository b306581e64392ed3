"""`headwater deploy status` and `wait`: one reason, the nearest to the cause, whatever else is wrong too."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from protos.errors import KubernetesError
from tests.deploy.api_server import ApiServer
from tests.deploy.conftest import Deploy
from tests.deploy.rays import add_event, add_pod, pod_status, ray_service, service_status, waiting

UNSCHEDULABLE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes: 3 Insufficient gpu",
        }
    ],
}
OOM = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
CRASH = {"terminated": {"reason": "Error", "exitCode": 2, "message": "no such\nmodel"}}


def started(kube: ApiServer, **status: Any) -> None:
    """A RayService whose controller has set this status."""
    kube.add(ray_service())
    kube.set_status("RayService", "demo", service_status(**status))


def reason(deploy: Deploy) -> str:
    [found] = deploy.json("status")
    assert not found["is_ready"]
    return str(found["reason"])


def test_ready_is_exit_0_and_shows_serve_and_the_pods(kube: ApiServer, deploy: Deploy) -> None:
    started(kube, Router="HEALTHY", Worker="HEALTHY")
    add_pod(kube, "demo-1-head", pod_status(is_ready=True), **{"app.kubernetes.io/component": "head"})
    add_pod(kube, "another", waiting("ImagePullBackOff"), cluster="of-another")
    done = deploy.run("status")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "default/demo: ready",
        "deployment   status",
        "Router      HEALTHY",
        "Worker      HEALTHY",
        "pod          component  state  restarts",
        "demo-1-head       head  ready         0",
    ]


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (
            waiting("ImagePullBackOff", "headwater:1 not found"),
            "pod w, container ray: ImagePullBackOff: headwater:1 not found",
        ),
        (
            waiting("CreateContainerConfigError", 'secret "token" not found'),
            'pod w, container ray: CreateContainerConfigError: secret "token" not found',
        ),
        (
            waiting("CrashLoopBackOff", lastState=OOM, restartCount=3),
            "pod w, container ray: OOMKilled, its memory limit is 2Gi; raise it",
        ),
        (
            waiting("CrashLoopBackOff", lastState=CRASH, restartCount=3),
            "pod w, container ray: crashes, exit code 2 after 3 restarts: Error".replace("Error", "no such model"),
        ),
        (UNSCHEDULABLE, "pod w cannot be scheduled: 0/3 nodes: 3 Insufficient gpu"),
        (pod_status(), "RayService demo: Ready is False"),
    ],
)
def test_the_reason_is_what_ails_a_pod(kube: ApiServer, deploy: Deploy, status: dict[str, Any], says: str) -> None:
    started(kube, is_ready=False)
    add_pod(kube, "well", pod_status(is_ready=True))
    add_pod(kube, "w", status)
    done = deploy.run("status")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[0] == f"default/demo: not ready: {says}"


def test_the_nearest_to_the_cause_wins(kube: ApiServer, deploy: Deploy) -> None:
    started(kube, is_ready=False, application="DEPLOYING", Router="UPDATING")
    assert reason(deploy) == "Serve application headwater is DEPLOYING: waiting for Router"
    add_event(kube, ("Pod", "w1"), "Unhealthy", "Readiness probe failed: HTTP 503")
    add_pod(kube, "w1", pod_status())
    assert reason(deploy) == "pod w1: Readiness probe failed: HTTP 503"
    kube.set_status(
        "RayService", "demo", service_status(is_ready=False, application="DEPLOY_FAILED", Worker="DEPLOY_FAILED")
    )
    assert reason(deploy) == "Serve deployment Worker is DEPLOY_FAILED: Worker says so"
    add_event(kube, ("Pod", "w2"), "FailedMount", "secret tls not found")
    add_pod(kube, "w2", pod_status(phase="Pending"))
    assert reason(deploy) == "pod w2: secret tls not found"
    add_pod(kube, "w3", UNSCHEDULABLE)
    assert reason(deploy).startswith("pod w3 cannot be scheduled")
    add_pod(kube, "w4", waiting("CrashLoopBackOff", lastState=OOM))
    assert "OOMKilled" in reason(deploy)
    add_pod(kube, "w5", waiting("ErrImagePull", "denied"))
    assert reason(deploy) == "pod w5, container ray: ErrImagePull: denied"
    others = [line for line in deploy.run("status").stdout.splitlines() if line.startswith("! ")]
    assert len(others) == 4


def test_events_of_what_is_over_are_no_reason(kube: ApiServer, deploy: Deploy) -> None:
    started(kube, is_ready=False)
    for name in ("w1", "w2"):
        add_event(kube, ("Pod", name), "FailedScheduling", "0/3 nodes are free")
        add_event(kube, ("Pod", name), "FailedMount", "secret tls not found")
    running = waiting("")["containerStatuses"][0] | {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}
    add_pod(kube, "w1", pod_status(containerStatuses=[running]))
    assert reason(deploy) == "RayService demo: Ready is False"
    add_pod(kube, "w2", pod_status(phase="Pending"), node="")
    assert reason(deploy) == "pod w2 cannot be scheduled: 0/3 nodes are free"


def test_before_there_are_pods(kube: ApiServer, deploy: Deploy) -> None:
    kube.add(ray_service())
    assert reason(deploy) == "KubeRay's operator has not taken up RayService demo; is it running?"
    add_event(kube, ("RayService", "demo"), "InvalidRayServiceSpec", "no head group")
    add_event(kube, ("RayService", "demo"), "Created", "all is well", kind="Normal")
    assert reason(deploy) == "RayService demo: InvalidRayServiceSpec: no head group"


@pytest.mark.parametrize(
    "status",
    [
        service_status(upgrading=True),
        service_status(generation=0),
        service_status(application="UNHEALTHY"),
        service_status() | {"activeServiceStatus": {"rayClusterName": "demo-1"}},
    ],
)
def test_an_old_spec_or_half_an_application_is_not_ready(
    kube: ApiServer, deploy: Deploy, status: dict[str, Any]
) -> None:
    kube.add(ray_service())
    kube.set_status("RayService", "demo", status)
    assert reason(deploy)


def test_there_must_be_one(kube: ApiServer, deploy: Deploy) -> None:
    for arguments in (("status",), ("status", "nobody"), ("wait", "nobody")):
        error = deploy.run(*arguments).exception
        assert isinstance(error, KubernetesError)
        assert "there is no RayService" in error.message


@contextmanager
def when_asked(kube: ApiServer, num_times: int, then: Any) -> Iterator[None]:
    """Call `then` once the RayServices have been listed so often."""

    def work() -> None:
        with kube.store.changed:
            while sum("/rayservices?" in line for line in kube.asked) < num_times:
                kube.store.changed.wait(0.02)
        then()

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def test_wait_prints_each_reason_once_and_ends_when_ready(kube: ApiServer, deploy: Deploy) -> None:
    started(kube, is_ready=False)
    add_pod(kube, "w", UNSCHEDULABLE)

    with when_asked(kube, 2, lambda: kube.set_status("RayService", "demo", service_status())):
        done = deploy.run("wait", "--timeout", "60")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "demo: pod w cannot be scheduled: 0/3 nodes: 3 Insufficient gpu",
        "demo: ready",
    ]


def test_wait_gives_up_in_time(kube: ApiServer, deploy: Deploy) -> None:
    started(kube, is_ready=False)
    done = deploy.run("wait", "demo", "--timeout", "0.1")
    assert done.exit_code == 1
    assert "not ready after 0.1 s" in done.stderr
    assert done.stdout.splitlines() == ["demo: RayService demo: Ready is False"]


def test_wait_outlives_an_api_server_that_is_away(kube: ApiServer, deploy: Deploy) -> None:
    started(kube, is_ready=False)
    kube.forbidden.add(("list", "events"))
    assert isinstance(deploy.run("wait", "--timeout", "0").exception, KubernetesError)
    kube.forbidden.clear()

    def stumble() -> None:
        kube.forbidden.add(("list", "pods"))
        with when_asked(kube, 3, recover):
            pass

    def recover() -> None:
        kube.forbidden.clear()
        kube.set_status("RayService", "demo", service_status())

    with when_asked(kube, 2, stumble):
        done = deploy.run("wait", "--timeout", "60")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "demo: ready"
