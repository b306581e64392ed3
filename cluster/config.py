"""The one configuration tree: read and checked before anything starts, for a laptop and for a cluster alike.

Imports nothing heavy. A file and any number of `a.b=c` overrides become one frozen HeadwaterConfig, or one ConfigError
that names the source, the key and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from protos.errors import ConfigError
from protos.tls import DEFAULT_SERVER_NAME, PeerTLS
from protos.tracing import Tracing
from router.config import RouterConfig, Section
from router.yaml_loader import StrictLoader
from workers.config import DrafterConfig, WorkerConfig

Tree: TypeAlias = dict[str, Any]

PACKAGE_ROOT = Path(__file__).resolve().parent.parent


class RaySection(Section):
    """The Ray cluster that everything runs on."""

    address: str = Field(default="", description="A running Ray cluster to join; empty: start one on this machine.")
    num_cpus: int | None = Field(default=None, ge=1, description="CPUs of a local Ray; empty: every core.")
    temp_dir: Path | None = Field(default=None, description="Parent of a local Ray's files; empty: the system's.")
    object_store_bytes: int = Field(default=100 << 20, ge=75 << 20, description="A local Ray's shared memory, bytes.")
    dashboard: bool = Field(default=False, description="Start a local Ray's dashboard.")

    @property
    def is_local(self) -> bool:
        return not self.address


class PeerTLSSection(Section):
    """Certificates of the cluster's members: routers, workers and drafters. PEM files, at the same place on each node.

    Whoever has a certificate of this authority is a member: it must sign nothing else.
    """

    cert_file: Path = Field(description="A member's certificate chain, for servers and for clients.")
    key_file: Path = Field(description="Its private key.")
    ca_file: Path = Field(description="The authority that signs the certificates of all members.")
    server_name: str = Field(
        default=DEFAULT_SERVER_NAME, min_length=1, description="The DNS name in every member's certificate."
    )

    @property
    def peer_tls(self) -> PeerTLS:
        """For the processes, which may run in another directory."""
        cert_file, key_file, ca_file = (path.absolute() for path in (self.cert_file, self.key_file, self.ca_file))
        return PeerTLS(cert_file, key_file, ca_file, self.server_name)


class TracingSection(Section):
    """Traces of requests, one each across router, worker and drafter, sent by OTLP over gRPC: docs/tracing.md."""

    endpoint: str = Field(min_length=1, description="The collector, host:port; 4317 is the usual port.")
    sample_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of requests that are traced, of those that come without a trace; callers decide for theirs.",
    )
    tls: bool = Field(default=False, description="Encrypt the way to the collector.")
    ca_file: Path | None = Field(default=None, description="The authority of its certificate; empty: the system's.")

    @property
    def tracing(self) -> Tracing:
        """For the processes, which may run in another directory."""
        ca_file = self.ca_file and self.ca_file.absolute()
        return Tracing(self.endpoint, self.sample_ratio, is_tls=self.tls, ca_file=ca_file)


class AutoscalingSection(Section):
    """As many workers as there is work for: docs/autoscaling.md."""

    min_workers: int = Field(default=1, ge=0, description="Fewest workers; 0: none until a request waits for one.")
    max_workers: int = Field(ge=1, description="Most workers.")
    target_queued_tokens: int = Field(
        default=1 << 14, ge=1, description="Tokens of waiting work per worker; beyond, one more is wanted."
    )
    target_kv_use: float = Field(
        default=0.85, gt=0, le=1, description="Share of a worker's keys and values held by live outputs, likewise."
    )
    target_first_token_s: float | None = Field(
        default=None, gt=0, description="Mean time to first token at the workers, seconds, likewise; empty: any."
    )
    upscale_delay_s: float = Field(default=5.0, ge=0, description="More must be wanted for this long, seconds.")
    downscale_delay_s: float = Field(default=120.0, ge=0, description="Fewer for this long, before one goes, seconds.")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> AutoscalingSection:
        if self.max_workers < self.min_workers:
            raise ValueError(
                f"max_workers {self.max_workers} is below min_workers {self.min_workers}; raise the first or lower the "
                "second"
            )
        return self


class ClusterSection(Section):
    """How many of what, where, and how long to wait for them."""

    num_workers: int = Field(default=2, ge=1, description="Workers: engines. Autoscaling goes by its own bounds.")
    autoscaling: AutoscalingSection | None = Field(
        default=None, description="Between how many workers there are, by load; empty: always num_workers."
    )
    num_drafters: int = Field(default=0, ge=0, description="Processes that draft for the workers (drafter).")
    num_routers: int = Field(default=1, ge=1, description="Routers: ingresses; across nodes one per node at most.")
    worker_cpus: float = Field(default=0.1, ge=0, description="CPUs of Ray's count that one worker reserves.")
    router_cpus: float = Field(default=0.1, ge=0, description="CPUs of Ray's count that one router reserves.")
    drafter_cpus: float = Field(default=0.1, ge=0, description="CPUs of Ray's count that one drafter reserves.")
    worker_gpus: float = Field(default=0, ge=0, description="GPUs of Ray's count that one worker reserves.")
    drafter_gpus: float = Field(default=0, ge=0, description="GPUs of Ray's count that one drafter reserves.")
    router_labels: dict[str, str] = Field(
        default={}, description="Labels of the nodes that may have routers, as Ray's label selectors; empty: any."
    )
    worker_labels: dict[str, str] = Field(default={}, description="The same for workers.")
    drafter_labels: dict[str, str] = Field(
        default={}, description="The same for drafters: other nodes than the workers', where there are any."
    )
    ready_timeout_s: float = Field(default=120.0, gt=0, description="Longest wait for everything to be up, seconds.")
    drain_timeout_s: float = Field(default=20.0, ge=0, description="Longest wait for live streams on stop, seconds.")
    health_check_period_s: float = Field(default=0.5, gt=0, description="Between two checks of one process, seconds.")
    health_check_timeout_s: float = Field(default=5.0, gt=0, description="Silence that fails a check, seconds.")
    session_token_file: Path | None = Field(
        default=None, description="Holds the secret that routers show to workers; empty: a new one for each run."
    )
    tls: PeerTLSSection | None = Field(
        default=None, description="Certificates of routers, workers and drafters; empty: plain text between them."
    )
    tracing: TracingSection | None = Field(default=None, description="Traces of requests; empty: none.")
    log_dir: Path = Field(default=Path(".headwater/logs"), description="Where the driver's log goes.")
    ray: RaySection = RaySection()

    @property
    def min_workers(self) -> int:
        return self.num_workers if self.autoscaling is None else self.autoscaling.min_workers

    @property
    def max_workers(self) -> int:
        return self.num_workers if self.autoscaling is None else self.autoscaling.max_workers


class HeadwaterConfig(Section):
    """Everything that can be set. `worker.model` is the model that the whole cluster serves."""

    router: RouterConfig = RouterConfig()
    worker: WorkerConfig = WorkerConfig()
    drafter: DrafterConfig = DrafterConfig()
    cluster: ClusterSection = ClusterSection()

    @model_validator(mode="after")
    def _pool_is_used(self) -> HeadwaterConfig:
        asks, num_drafters = "pool" in self.worker.engine.speculation.drafters, self.cluster.num_drafters
        if asks and not num_drafters:
            raise ValueError(
                "worker.engine.speculation.drafters has pool, but cluster.num_drafters is 0; "
                "set it to 1 or more, or leave pool out"
            )
        if num_drafters and not asks:
            raise ValueError(
                f"cluster.num_drafters is {num_drafters}, but worker.engine.speculation.drafters lacks pool, so nobody "
                "would ask them; add pool there"
            )
        return self

    @model_validator(mode="after")
    def _requests_wait_for_the_first_worker(self) -> HeadwaterConfig:
        grace_s, ready_s = self.router.limits.no_worker_grace_s, self.cluster.ready_timeout_s
        if not self.cluster.min_workers and grace_s < ready_s:
            raise ValueError(
                "cluster.autoscaling.min_workers is 0, so that a request may wait for a worker to start, which may "
                f"take cluster.ready_timeout_s = {ready_s:g} s, but router.limits.no_worker_grace_s is {grace_s:g}; "
                f"set that to {ready_s:g} or more, or min_workers to 1"
            )
        return self

    def dump(self) -> str:
        """The resolved tree as YAML, secrets masked."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load(path: Path | None, overrides: Sequence[str] = ()) -> HeadwaterConfig:
    """The tree in `path` (none: all defaults) with each `a.b=c` applied. Raises ConfigError."""
    tree = _read(path) if path else {}
    origin = {key: _override(tree, text, key, value) for text in overrides for key, value in [_split(text)]}
    return from_tree(tree, source=str(path) if path else "the defaults", origin=origin)


def from_tree(tree: Mapping[str, Any], *, source: str, origin: Mapping[str, str] | None = None) -> HeadwaterConfig:
    """A checked tree. `origin` says which override set a key; `source` stands for the others. Raises ConfigError."""
    try:
        config = HeadwaterConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, source, origin or {}) for item in error.errors())) from None
    return _with_files_found(config)


def key_paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a section and of those below it, dotted."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for kind in get_args(field.annotation) or (field.annotation,):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from key_paths(kind, f"{prefix}{name}.")


def _read(path: Path) -> Tree:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give an existing file with --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: the top must be keys and values such as `cluster:`, not a {type(tree).__name__}")
    return tree or {}


def _split(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError(f"--set {text}: write it as key.path=value, for example cluster.num_workers=2")
    try:
        return key.strip(), yaml.load(value, StrictLoader)
    except (yaml.YAMLError, ConfigError) as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML: {' '.join(str(error).split())}") from None


def _override(tree: Tree, text: str, key: str, value: Any) -> str:
    """Put `value` at `key`; the source to name should it be wrong."""
    *parents, leaf = key.split(".")
    for name in parents:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[leaf] = value
    return f"--set {text}"


def _explain(item: Any, source: str, origin: Mapping[str, str]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    where = next((text for set_key, text in origin.items() if _overlap(key, set_key)), source)
    if item["type"] == "extra_forbidden":
        return f"{where}: there is no key `{key}`{_suggestion(key)}"
    message = item["msg"].removeprefix("Value error, ")
    at = f"`{key}`: " if key else ""
    return (
        f"{where}: {at}{message}, got {item['input']!r}" if item["type"] != "value_error" else f"{where}: {at}{message}"
    )


def _overlap(key: str, other: str) -> bool:
    """Whether one key is the other or lies below it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _suggestion(key: str) -> str:
    """The nearest real key: the same name elsewhere, else a sibling with a like name, else the likeliest whole path."""
    paths = list(key_paths(HeadwaterConfig))
    parent, _, name = key.rpartition(".")
    siblings = {path.rpartition(".")[2]: path for path in paths if path.rpartition(".")[0] == parent}
    if same := [path for path in paths if path.rpartition(".")[2] == name]:
        return f"; did you mean `{same[0]}`?"
    if near := difflib.get_close_matches(name, siblings, n=1):
        return f"; did you mean `{siblings[near[0]]}`?"
    if likely := difflib.get_close_matches(key, paths, n=1):
        return f"; did you mean `{likely[0]}`?"
    return f"; valid keys there: {', '.join(siblings)}" if siblings else ""


def _with_files_found(config: HeadwaterConfig) -> HeadwaterConfig:
    """Relative paths made absolute, for processes start elsewhere; models may also lie beside the packages."""
    worker, drafter = config.worker, config.drafter
    tenants = config.router.tenants
    tenants = tenants.model_copy(update={"file": tenants.file and tenants.file.absolute()})
    model = worker.model.model_copy(update={"path": _found(worker.model.path)})
    speculation = worker.engine.speculation
    speculation = speculation.model_copy(update={"draft_model": _found(speculation.draft_model)})
    vllm = worker.engine.vllm
    vllm = vllm.model_copy(update={"lora": vllm.lora and vllm.lora.absolute()})
    engine = worker.engine.model_copy(update={"speculation": speculation, "vllm": vllm})
    return config.model_copy(
        update={
            "router": config.router.model_copy(update={"tenants": tenants}),
            "worker": worker.model_copy(update={"model": model, "engine": engine}),
            "drafter": drafter.model_copy(update={"draft_model": _found(drafter.draft_model)}),
        }
    )


def _found(path: Path | None) -> Path | None:
    return path and next((base / path for base in (Path.cwd(), PACKAGE_ROOT) if (base / path).is_dir()), path)
