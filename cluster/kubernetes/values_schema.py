"""values.schema.json: what the chart may be told. Generated from here and from the program's own configuration.

`python -m cluster.kubernetes.values_schema` writes it. Helm refuses values that do not fit, unknown keys among them;
what a schema cannot say stands in the chart's templates/validate.yaml. values.yaml has defaults and explanations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from cluster.config import HeadwaterConfig

SCHEMA_FILE: Final = Path("deploy/helm/headwater/values.schema.json")
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

Anything = dict[str, Any]  # passed through as it is: Kubernetes says what it may be
Texts = dict[str, str]
Name = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?$")]  # of an object; empty: none
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
Port = Annotated[int, Field(ge=1024, le=65535)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Source = Annotated[
    str,
    Field(
        pattern=r"^(image"
        r"|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[A-Za-z0-9._-]+)*"
        r"|hf://[A-Za-z0-9._-]+/[A-Za-z0-9._-]+(@[A-Za-z0-9._/-]+)?"
        r"|s3://[a-z0-9.-]+(/[A-Za-z0-9._=-]+)*)$"
    ),
]
Tag = Annotated[
    str,
    Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$", json_schema_extra={"not": {"const": "latest"}}),
]
Repository = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*(:[0-9]+)?(/[a-z0-9._-]+)*$")]


class Section(BaseModel):
    """A part of the values. Camel case in YAML; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel)


class ImageValues(Section):
    repository: Repository
    tag: Tag
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")]
    pull_policy: Literal["Always", "IfNotPresent", "Never"]
    pull_secrets: list[Name]


class SpreadValues(Section):
    enabled: bool
    topology_key: str
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"]
    max_skew: Annotated[int, Field(ge=1)]


class PlacementValues(Section):
    """Where pods go, and what more they carry."""

    node_selector: Texts
    tolerations: list[Anything]
    affinity: Anything
    priority_class_name: Name
    pod_labels: Texts
    pod_annotations: Texts


class SecretKey(Section):
    name: Name
    key: str


class FaultToleranceValues(Section):
    enabled: bool
    redis_address: Annotated[str, Field(pattern=r"^(rediss?://.+)?$")]
    password_secret: SecretKey


class RayAuthValues(Section):
    enabled: bool
    secret_name: Name


class HeadValues(PlacementValues):
    cpu: Quantity
    memory: Quantity


class KubeRayValues(Section):
    version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+(\.[0-9]+)?$")]


class RayValues(Section):
    version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")]
    object_store_bytes: Annotated[int, Field(ge=75 << 20)]
    upgrade_strategy: Literal["NewCluster", "None"]
    cluster_deletion_delay_seconds: Count
    auth: RayAuthValues
    gcs_fault_tolerance: FaultToleranceValues
    env: Texts
    extra_volumes: list[Anything]
    extra_volume_mounts: list[Anything]
    head: HeadValues


class DraftModelValues(Section):
    source: Source
    path: Annotated[str, Field(min_length=1)]


class CacheValues(Section):
    kind: Literal["pod", "pvc"]
    size: Quantity
    existing_claim: Name
    storage_class_name: Name
    access_modes: list[Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]]


class DownloaderImage(Section):
    repository: Repository
    tag: Annotated[Tag, Field(min_length=1)]


class DownloadValues(Section):
    timeout_seconds: Annotated[int, Field(ge=1)]
    cpu: Quantity
    memory: Quantity
    s3_image: DownloaderImage = Field(alias="s3Image")
    endpoint: str


class ModelValues(DraftModelValues):
    name: str
    draft: DraftModelValues
    auth_secret: Name
    cache: CacheValues
    download: DownloadValues


class PortValues(Section):
    port: Port


class RouterTLSValues(Section):
    secret_name: Name
    client_ca_secret_name: Name = Field(alias="clientCASecretName")


class ServiceValues(Section):
    type: Literal["ClusterIP", "LoadBalancer", "NodePort"]
    annotations: Texts
    labels: Texts
    load_balancer_source_ranges: list[str]


class RouterValues(PlacementValues):
    replicas: Annotated[int, Field(ge=1)]
    grpc: PortValues
    http: PortValues
    cpu: Annotated[int, Field(ge=1)]
    memory: Quantity
    tls: RouterTLSValues
    service: ServiceValues
    spread: SpreadValues


class GroupValues(Section):
    """Workers on nodes of one kind."""

    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,22}[a-z0-9])?$")]
    replicas: Count
    min: Count = 0
    max: Count = 0
    memory: Quantity = ""
    node_selector: Texts = {}
    tolerations: list[Anything] = []
    affinity: Anything = {}
    runtime_class_name: Name = ""
    priority_class_name: Name = ""
    pod_labels: Texts = {}
    pod_annotations: Texts = {}
    spread: SpreadValues | None = None


class WorkersValues(Section):
    cpu: Annotated[int, Field(ge=1)]
    gpu: Count
    gpu_resource: Annotated[str, Field(pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")]
    memory: Quantity
    metrics_port: Port
    shared_memory_bytes: Count
    groups: Annotated[list[GroupValues], Field(min_length=1)]


class DraftersValues(PlacementValues):
    replicas: Count
    cpu: Annotated[int, Field(ge=1)]
    gpu: Count
    memory: Quantity
    metrics_port: Port
    shared_memory_bytes: Count
    runtime_class_name: Name
    spread: SpreadValues


class AutoscalingValues(Section):
    enabled: bool
    target_queued_tokens: Annotated[int, Field(ge=1)]
    target_kv_use: Annotated[float, Field(gt=0, le=1)]
    target_first_token_seconds: Annotated[float, Field(gt=0)] | None = None  # Helm drops null
    upscale_delay_seconds: Seconds
    downscale_delay_seconds: Seconds
    idle_timeout_seconds: Annotated[int, Field(ge=1)]
    cpu: Quantity
    memory: Quantity


class TenantsValues(Section):
    existing_secret: Name
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$")]


class SessionTokenValues(Section):
    existing_secret: Name
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$")]
    value: Annotated[str, Field(pattern=r"^(\S{32,})?$")]


class MemberTLSValues(Section):
    secret_name: Name
    server_name: Annotated[str, Field(min_length=1)]


class ServiceAccountValues(Section):
    create: bool
    name: Name
    annotations: Texts


class SecurityValues(Section):
    run_as_user: Annotated[int, Field(ge=1)]
    run_as_group: Annotated[int, Field(ge=1)]
    fs_group: Annotated[int, Field(ge=1)]
    session_token: SessionTokenValues
    member_tls: MemberTLSValues = Field(alias="memberTLS")
    service_account: ServiceAccountValues


class ProbeValues(Section):
    period_seconds: Annotated[int, Field(ge=1)]
    failure_threshold: Annotated[int, Field(ge=1)]
    timeout_seconds: Annotated[int, Field(ge=1)]


class ProbesValues(Section):
    startup: ProbeValues
    liveness: ProbeValues
    readiness: ProbeValues


class BudgetValues(Section):
    enabled: bool
    routers_min_available: Annotated[int, Field(ge=1)]
    workers_min_available: Annotated[int, Field(ge=1)]


class NetworkPolicyValues(Section):
    enabled: bool
    clients: list[Anything]
    monitoring: list[Anything]
    operator: list[Anything]
    dns: list[Anything]
    downloads: list[Anything]
    api_server: list[Anything]
    redis: list[Anything]
    extra_ingress: list[Anything]
    extra_egress: list[Anything]


class PodMonitorValues(Section):
    enabled: bool
    interval: Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m)$")]
    labels: Texts


class RuleValues(Section):
    enabled: bool
    labels: Texts


class DashboardValues(RuleValues):
    annotations: Texts


class MonitoringValues(Section):
    pod_monitor: PodMonitorValues
    prometheus_rule: RuleValues
    dashboards: DashboardValues


class TestValues(Section):
    ca_secret_name: Name
    client_certificate_secret_name: Name
    api_key_secret_name: Name
    server_name: str


class Values(Section):
    """Values of the chart deploy/helm/headwater."""

    fullname_override: Name
    common_labels: Texts
    common_annotations: Texts
    image: ImageValues
    kuberay: KubeRayValues
    ray: RayValues
    model: ModelValues
    router: RouterValues
    workers: WorkersValues
    drafters: DraftersValues
    autoscaling: AutoscalingValues
    tenants: TenantsValues
    security: SecurityValues
    probes: ProbesValues
    pdb: BudgetValues
    network_policy: NetworkPolicyValues
    monitoring: MonitoringValues
    test: TestValues
    extra_objects: list[Anything]
    config: HeadwaterConfig
    globals: Anything = Field(default={}, alias="global")  # Helm's own


def schema() -> dict[str, Any]:
    """The JSON schema of the values, with that of the configuration tree below `config`."""
    tree: dict[str, Any] = _without_titles(Values.model_json_schema(by_alias=True))
    return {"$schema": DIALECT, "title": "Values of the chart headwater"} | tree


def text() -> str:
    """The file's content."""
    return json.dumps(schema(), indent=1, sort_keys=True) + "\n"


def _without_titles(node: Any, *, named: bool = False) -> Any:
    """Titles only repeat the keys. `named`: the keys of this map are names of others' own, not words of the schema."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _without_titles(value, named=not named and key in ("properties", "$defs"))
        for key, value in node.items()
        if named or key != "title"
    }


if __name__ == "__main__":
    SCHEMA_FILE.write_text(text(), encoding="utf-8")
