"""The RayService is what the values say: configuration, places, ports, models, certificates, life and death."""

import re
from pathlib import Path

import pytest
from ray.serve.schema import ServeDeploySchema

from tests.deploy import chart

LARGE = "many-nodes-drafters"


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_serve_takes_its_configuration(example: str) -> None:
    schema = ServeDeploySchema.model_validate(chart.serve(chart.of_example(example)))
    assert [application.import_path for application in schema.applications] == ["cluster.app:build_app"]


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_the_program_takes_its_configuration(example: str) -> None:
    found = chart.config(chart.of_example(example))
    assert found.router.grpc.host == found.router.metrics.host == found.worker.metrics.host == "0.0.0.0"
    assert not found.worker.session.host  # the node's own
    assert found.cluster.worker_labels == {"headwater/role": "worker"}


def test_a_tree_of_ones_own_is_kept_and_completed() -> None:
    own = {"router": {"limits": {"max_n": 3}, "metrics": {}}, "worker": {"engine": {"kv": {"num_pages": 7}}}}
    del own["router"]["metrics"]
    found = chart.config(chart.objects({"config": own}))
    assert found.router.limits.max_n == 3
    assert found.worker.engine.kv.num_pages == 7
    assert found.router.grpc.port == 9000


def test_large_numbers_stay_whole() -> None:
    text = "config: {worker: {engine: {kv: {exchange: {max_bytes: 123456789}}}}}"
    (application,) = chart.serve(chart.objects(text=text))["applications"]
    assert application["args"]["worker"]["engine"]["kv"]["exchange"]["max_bytes"] == 123456789


def test_each_process_has_its_pod() -> None:
    found = chart.of_example(LARGE)
    tree, groups = chart.config(found).cluster, chart.groups(found)
    assert groups["head"]["rayStartParams"]["num-cpus"] == "0"
    assert groups["router"]["rayStartParams"]["num-cpus"] == f"{tree.router_cpus:g}"
    assert groups["worker-spot"]["rayStartParams"]["num-cpus"] == f"{tree.worker_cpus:g}"
    assert groups["worker-spot"]["rayStartParams"]["num-gpus"] == f"{tree.worker_gpus:g}"
    assert groups["drafter"]["rayStartParams"]["num-gpus"] == f"{tree.drafter_gpus:g}"
    for name, labels in (
        ("router", tree.router_labels),
        ("worker-spot", tree.worker_labels),
        ("drafter", tree.drafter_labels),
    ):
        assert groups[name]["labels"] == labels


def test_replicas_are_told_to_serve_so_that_a_change_restarts_nothing() -> None:
    two, five = (
        chart.objects({"router": {"replicas": number}, "workers": {"groups": [{"name": "a", "replicas": number}]}})
        for number in (2, 5)
    )
    assert chart.deployments(two) == {"Router": 2, "Worker": 2}
    assert chart.deployments(five) == {"Router": 5, "Worker": 5}
    assert chart.serve(two)["applications"][0]["args"] == chart.serve(five)["applications"][0]["args"]
    assert chart.groups(two)["head"] == chart.groups(five)["head"]


def test_another_configuration_is_another_cluster() -> None:
    """Otherwise KubeRay would restart the processes that serve."""
    heads = [chart.groups(chart.objects({"config": {"cluster": {"drain_timeout_s": s}}}))["head"] for s in (30, 31)]
    first, second = (head["template"]["metadata"]["annotations"]["headwater/config"] for head in heads)
    assert first != second


def test_autoscaling_leaves_the_number_of_workers_to_serve() -> None:
    found = chart.of_example(LARGE)
    assert chart.deployments(found) == {"Router": 3, "Drafter": 2}
    scaling = chart.config(found).cluster.autoscaling
    assert scaling is not None
    assert (scaling.min_workers, scaling.max_workers, scaling.target_first_token_s) == (2, 8, 2)
    assert chart.ray_cluster(found)["enableInTreeAutoscaling"]
    assert (chart.groups(found)["worker-spot"]["minReplicas"], chart.groups(found)["worker-spot"]["maxReplicas"]) == (
        0,
        4,
    )


def test_only_the_autoscaler_may_speak_to_kubernetes() -> None:
    for example in chart.EXAMPLES:
        for name, pod in chart.pods(chart.of_example(example)):
            expected = name == "head" and example == LARGE
            assert pod["spec"]["automountServiceAccountToken"] is expected, (example, name)


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_every_mount_has_its_volume_and_is_used(example: str) -> None:
    for name, pod in chart.pods(chart.of_example(example)):
        volumes = [volume["name"] for volume in pod["spec"]["volumes"]]
        containers = pod["spec"]["containers"] + pod["spec"].get("initContainers", [])
        mounts = {mount["name"] for container in containers for mount in container["volumeMounts"]}
        assert len(volumes) == len(set(volumes)), name
        assert mounts == set(volumes), name


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_files_of_the_configuration_are_mounted_where_it_looks(example: str) -> None:
    found = chart.of_example(example)
    tree, groups = chart.config(found), chart.groups(found)
    router, worker = mount_paths(groups["router"]), mount_paths(next(g for n, g in groups.items() if "worker" in n))
    tls, members = tree.router.grpc.tls, tree.cluster.tls
    for file in (
        tls and tls.cert_file,
        tls and tls.client_ca_file,
        tree.router.tenants.file,
        members and members.key_file,
    ):
        assert file is None or str(file.parent) in router
    for file in (members and members.cert_file, tree.cluster.session_token_file):
        assert file is None or str(file.parent) in worker
    if tree.cluster.session_token_file:  # whoever builds the application reads it
        assert all(str(tree.cluster.session_token_file.parent) in mount_paths(group) for group in groups.values())


def mount_paths(group: chart.Object) -> set[str]:
    return {mount["mountPath"] for mount in chart.ray_container(group)["volumeMounts"]}


def test_volumes_of_ones_own_are_mounted_in_every_pod() -> None:
    volume, mount = {"name": "ca", "secret": {"secretName": "ca"}}, {"name": "ca", "mountPath": "/etc/ca"}
    found = chart.groups(chart.objects({"ray": {"extraVolumes": [volume], "extraVolumeMounts": [mount]}}))
    for group in found.values():
        assert volume in group["template"]["spec"]["volumes"]
        assert mount in chart.ray_container(group)["volumeMounts"]


def test_secrets_are_folders_so_that_replaced_files_arrive() -> None:
    for _, pod in chart.pods(chart.of_example(LARGE)):
        assert not [m for c in pod["spec"]["containers"] for m in c["volumeMounts"] if "subPath" in m]


@pytest.mark.parametrize(
    ("source", "path", "name"),
    [
        ("image", "/opt/model", "model"),
        ("pvc://claim/qwen/8b", "/volumes/target/qwen/8b", "8b"),
        ("pvc://claim", "/volumes/target", "target"),
        ("hf://Qwen/Qwen3-8B", r"/models/qwen3-8b-\w{10}", "Qwen3-8B"),
        ("hf://Qwen/Qwen3-8B@main", r"/models/qwen3-8b-\w{10}", "Qwen3-8B"),
        ("s3://bucket/models/mistral-7b", r"/models/mistral-7b-\w{10}", "mistral-7b"),
    ],
)
def test_a_model_lies_where_the_program_looks(source: str, path: str, name: str) -> None:
    model = chart.config(chart.objects({"model": {"source": source, "path": "/opt/model"}})).worker.model
    assert re.fullmatch(path, str(model.path))
    assert model.served_name == name


def test_another_revision_is_another_folder() -> None:
    paths = {
        chart.config(chart.objects({"model": {"source": f"hf://a/b@{revision}"}})).worker.model.path
        for revision in ("one", "two")
    }
    assert len(paths) == 2


def test_without_a_volume_every_pod_downloads_and_routers_leave_the_weights() -> None:
    found = chart.groups(chart.objects({"model": {"source": "hf://Qwen/Qwen3-8B@v1"}}))
    (router,), (worker,) = (found[name]["template"]["spec"]["initContainers"] for name in ("router", "worker-default"))
    assert "--exclude '*.safetensors'" in router["args"][0]
    assert "--exclude '*.safetensors'" not in worker["args"][0]
    assert {"name": "REVISION", "value": "v1"} in worker["env"]
    assert "initContainers" not in found["head"]["template"]["spec"]


def test_with_a_volume_one_job_downloads_and_pods_wait() -> None:
    found = chart.of_example(LARGE)
    (job,), (claim,) = chart.kind(found, "Job"), chart.kind(found, "PersistentVolumeClaim")
    assert [container["name"] for container in job["spec"]["template"]["spec"]["containers"]] == [
        "fetch-target",
        "fetch-draft",
    ]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    for name, group in chart.groups(found).items():
        waiting = [one["name"] for one in group["template"]["spec"].get("initContainers", [])]
        assert waiting == ([] if name == "head" else ["await-target", "await-draft"])


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_a_pod_outlives_the_drain_of_its_process(example: str) -> None:
    found = chart.of_example(example)
    drain_s = chart.config(found).cluster.drain_timeout_s
    for name, group in chart.groups(found).items():
        if name != "head":
            script = chart.ray_container(group)["lifecycle"]["preStop"]["exec"]["command"][-1]
            (deadline_s,), (wait_s,) = (
                re.findall(r"seconds (\d+)", script),
                re.findall(r"monotonic\(\) \+ (\d+)", script),
            )
            assert drain_s < int(deadline_s) < int(wait_s) < group["template"]["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_no_probe_kills_a_pod_that_loads_a_model(example: str) -> None:
    """Liveness asks Ray alone, which is up before any model is loaded."""
    for name, group in chart.groups(chart.of_example(example)).items():
        container = chart.ray_container(group)
        assert "healthz" in container["livenessProbe"]["httpGet"]["path"], name
        assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] >= 600


def test_a_router_is_ready_when_it_serves() -> None:
    plain, encrypted = (chart.groups(chart.of_example(name))["router"] for name in ("one-cpu-node", LARGE))
    assert chart.ray_container(plain)["readinessProbe"]["grpc"] == {"port": 9000}
    assert chart.ray_container(encrypted)["readinessProbe"]["tcpSocket"] == {"port": "grpc"}  # kubelets speak no TLS


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_shared_memory_holds_what_is_put_there(example: str) -> None:
    found = chart.of_example(example)
    exchange = chart.config(found).worker.engine.kv.exchange
    for name, group in chart.groups(found).items():
        (volume,) = [one for one in group["template"]["spec"]["volumes"] if one["name"] == "shared-mem"]
        needed = int(group["rayStartParams"]["object-store-memory"])
        if name.startswith("worker") and exchange.mode != "off":
            needed += exchange.max_bytes
        assert int(volume["emptyDir"]["sizeLimit"]) >= needed, name
        assert volume["emptyDir"]["medium"] == "Memory"


def test_budgets_are_whole_numbers_that_let_nodes_be_drained() -> None:
    found = chart.of_example(LARGE)
    budgets = {one["metadata"]["name"]: one["spec"]["minAvailable"] for one in chart.kind(found, "PodDisruptionBudget")}
    assert budgets == {
        "llm-headwater-router": 1,
        "llm-headwater-worker-reserved": 1,
    }  # none for a group that may be empty
    assert not chart.kind(chart.objects({"pdb": {"enabled": False}}), "PodDisruptionBudget")


def test_clients_reach_routers_and_nobody_else() -> None:
    found = chart.of_example(LARGE)
    routers = chart.groups(found)["router"]["template"]["metadata"]["labels"]
    others = [g["template"]["metadata"]["labels"] for n, g in chart.groups(found).items() if n != "router"]
    services = {service["metadata"]["name"]: service["spec"] for service in chart.kind(found, "Service")}
    assert set(services) == {"llm-headwater", "llm-headwater-routers"}
    assert services["llm-headwater-routers"]["clusterIP"] == "None"
    for spec in services.values():
        assert spec["selector"].items() <= routers.items()
        assert not [labels for labels in others if spec["selector"].items() <= labels.items()]
        assert spec["ports"][0]["name"] == "grpc"
        assert spec["ports"][0]["port"] == 9000


@pytest.mark.parametrize(
    ("version", "auth", "found"), [("1.5", False, None), ("1.5.1", True, "token"), ("1.7", False, "disabled")]
)
def test_ray_is_told_whether_it_asks_for_a_token(version: str, auth: bool, found: str | None) -> None:
    rendered = chart.objects({"kuberay": {"version": version}, "ray": {"auth": {"enabled": auth}}})
    assert chart.ray_cluster(rendered).get("authOptions", {}).get("mode") == found
    for group in chart.groups(rendered).values():
        modes = [one["value"] for one in chart.ray_container(group)["env"] if one["name"] == "RAY_AUTH_MODE"]
        assert modes == ([] if auth else ["disabled"])


def test_workers_of_a_group_spread_over_nodes() -> None:
    for name, group in chart.groups(chart.of_example(LARGE)).items():
        rules = group["template"]["spec"].get("topologySpreadConstraints", [])
        assert [rule["topologyKey"] for rule in rules] == ([] if name == "head" else ["kubernetes.io/hostname"])


def test_the_shipped_models_are_where_the_defaults_look() -> None:
    model = chart.config(chart.objects()).worker.model
    assert model.path == Path("models/target").absolute()
