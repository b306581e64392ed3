"""Wrong values are refused, with the value and the remedy."""

import re

import helm_python as helm
import pytest
import yaml

from cluster.config import HeadwaterConfig, key_paths
from cluster.kubernetes import examples
from cluster.kubernetes.values_schema import schema
from tests.deploy import chart

NAMED_MAPS = {  # passed through: Kubernetes, or vLLM, says what may stand there
    *("global", "commonLabels", "commonAnnotations", "labels", "annotations", "podLabels", "podAnnotations"),
    *("nodeSelector", "affinity", "env", "args", "router_labels", "worker_labels", "drafter_labels"),
}


def refusal(text: str) -> str:
    with pytest.raises(helm.HelmError) as caught:
        chart.objects(text=text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("routers: {}", "additional properties 'routers' not allowed"),
        ("router: {replica: 2}", "additional properties 'replica' not allowed"),
        ("router: {replicas: two}", "got string, want integer"),
        ("router: {replicas: 0}", "/router/replicas"),
        ("router: {grpc: {port: 80}}", "/router/grpc/port"),
        ("image: {tag: latest}", "/image/tag"),
        ("image: {tag: 'a:b'}", "/image/tag"),
        ("image: {digest: sha256:abc}", "/image/digest"),
        ("image: {repository: 'Headwater'}", "/image/repository"),
        ("model: {source: 'http://hub/model'}", "/model/source"),
        ("model: {download: {s3Image: {tag: latest}}}", "/model/download/s3Image/tag"),
        ("model: {cache: {kind: disk}}", "/model/cache/kind"),
        ("workers: {memory: 12GB}", "/workers/memory"),
        ("workers: {groups: []}", "/workers/groups"),
        ("workers: {groups: [{name: a}]}", "missing property 'replicas'"),
        ("workers: {groups: [{name: a, replicas: 1, gpus: 2}]}", "additional properties 'gpus' not allowed"),
        ("security: {sessionToken: {value: short}}", "/security/sessionToken/value"),
        ("security: {runAsUser: 0}", "/security/runAsUser"),
        ("ray: {upgradeStrategy: NewClusterWithIncrementalUpgrade}", "/ray/upgradeStrategy"),
        ("config: {worker: {engine: {kv: {pages: 3}}}}", "additional properties 'pages' not allowed"),
        ("config: {worker: {model: {dtype: float16}}}", "/config/worker/model/dtype"),
        ("config: {cluster: {drain_timeout_s: -1}}", "/config/cluster/drain_timeout_s"),
    ],
)
def test_the_schema_refuses(text: str, words: str) -> None:
    assert words in refusal(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"fullnameOverride: {'a' * 46}", "at most 45 small letters"),
        ("fullnameOverride: 7days", "a letter first"),
        ("kuberay: {version: '1.4'}", "kuberay.version is 1.4: node labels"),
        ("kuberay: {version: '1.5'}", "ray.auth.enabled needs KubeRay 1.5.1, and kuberay.version is 1.5"),
        ("{kuberay: {version: 1.5.1}, ray: {auth: {secretName: a}}}", "ray.auth.secretName needs KubeRay 1.6"),
        ("ray: {gcsFaultTolerance: {enabled: true}}", "set ray.gcsFaultTolerance.redisAddress to redis://HOST:6379"),
        ("drafters: {replicas: 2}", "drafters.replicas is 2, but nobody would ask them: add pool"),
        ("config: {worker: {engine: {speculation: {drafters: [pool]}}}}", "has pool, but drafters.replicas is 0"),
        ("workers: {groups: [{name: a, replicas: 1}, {name: a, replicas: 1}]}", 'workers.groups has "a" twice'),
        ("workers: {groups: [{name: a, replicas: 0}]}", "add up to 0: give one group 1 or more"),
        (
            "{autoscaling: {enabled: true}, workers: {groups: [{name: a, replicas: 0, min: 3, max: 2}]}}",
            '"a" has min 3 above max 2: raise max or lower min',
        ),
        (
            "{autoscaling: {enabled: true}, workers: {groups: [{name: a, replicas: 0, min: 0, max: 2}]}}",
            "no_worker_grace_s is 5 and config.cluster.ready_timeout_s 600: set the first to the second",
        ),
        (
            "{autoscaling: {enabled: true}, workers: {groups: [{name: a, replicas: 1}]}}",
            "max of all workers.groups adds up to 0",
        ),
        ("workers: {sharedMemoryBytes: 67108864}", "workers.sharedMemoryBytes is 67108864, but"),
        (
            "config: {worker: {engine: {kv: {exchange: {max_bytes: 4294967296}}}}}",
            "exchange.max_bytes need 4563402752: raise it",
        ),
        (
            "{workers: {gpu: 1}, config: {worker: {engine: {kind: vllm, vllm: {tensor_parallel: 2}}}}}",
            "tensor_parallel is 2, but workers.gpu is 1: make them equal",
        ),
        ("router: {tls: {clientCASecretName: ca}}", "set router.tls.secretName"),
        ("router: {http: {port: 9000}}", "must differ from each other"),
        (
            "config: {cluster: {num_workers: 3}}",
            "config.cluster.num_workers is set by the chart: leave it out and set w",
        ),
        ("config: {router: {grpc: {port: 9001}}}", "config.router.grpc.port is set by the chart"),
        ("config: {worker: {model: {path: /a}}}", "leave it out and set model.source and model.path"),
    ],
)
def test_what_the_schema_cannot_say_is_refused_too(text: str, words: str) -> None:
    assert words in refusal(text)


def test_no_workers_are_fine_where_requests_wait() -> None:
    text = """
    autoscaling: {enabled: true}
    workers: {groups: [{name: a, replicas: 0, min: 0, max: 2}]}
    config: {router: {limits: {no_worker_grace_s: 600}}}
    """
    assert chart.config(chart.objects(text=text)).cluster.min_workers == 0


def test_shared_memory_may_be_small_where_nothing_is_exchanged() -> None:
    text = """
    workers: {sharedMemoryBytes: 268435456}
    config: {worker: {engine: {kv: {exchange: {mode: "off"}}}}}
    """
    assert chart.config(chart.objects(text=text)).worker.engine.kv.exchange.mode == "off"


def test_a_draft_model_in_the_worker_is_found() -> None:
    text = """
    model: {draft: {source: pvc://drafts/small}}
    config: {worker: {engine: {speculation: {drafters: [model]}}}}
    """
    found = chart.objects(text=text)
    assert str(chart.config(found).worker.engine.speculation.draft_model) == "/volumes/draft/small"


def test_every_key_that_the_chart_owns_exists() -> None:
    """A key of validate.yaml that the program has lost would refuse nothing."""
    text = (examples.CHART / "templates/validate.yaml").read_text()
    owned = text.partition("{{- $owned := dict")[2].partition("-}}")[0]
    keys, known = re.findall(r'"([^"]*)"', owned)[::2], set(key_paths(HeadwaterConfig))
    assert keys
    assert not [key for key in keys if key not in known and not any(path.startswith(f"{key}.") for path in known)]


def test_every_default_is_in_values_yaml_and_nothing_else() -> None:
    defaults = yaml.safe_load((examples.CHART / "values.yaml").read_text())
    assert set(defaults) | {"global"} == set(schema()["properties"])


def test_the_schema_leaves_only_named_maps_open() -> None:
    tree = schema()
    found = {name for name, node in properties(tree) if is_open(node)}
    assert found <= NAMED_MAPS


def properties(node: object) -> list[tuple[str, dict[str, object]]]:
    """Every key of the schema, with what may stand there."""
    found: list[tuple[str, dict[str, object]]] = []
    if isinstance(node, dict):
        if isinstance(node.get("properties"), dict):
            found += node["properties"].items()
        for below in node.values():
            found += properties(below)
    return found


def is_open(node: dict[str, object]) -> bool:
    return node.get("type") == "object" and node.get("additionalProperties") is not False
