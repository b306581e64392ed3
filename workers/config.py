"""The worker's part of the configuration tree. Imports nothing heavy: it is read before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

HostedKind = Literal["copy", "recycle", "model"]  # drafters that can run in a process of their own, too
DrafterKind = Literal["copy", "recycle", "model", "pool"]
VLLM_DRAFTERS: Final = ("copy", "pool")


class Section(BaseModel):
    """A part of the tree: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """Which model is served."""

    path: Path = Field(default=Path("models/target"), description="A Hugging Face directory of a Llama-family model.")
    name: str = Field(default="", description="The name clients ask for; empty: the directory's name.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of weights, activations and KV.")
    max_context: int | None = Field(default=None, ge=1, description="Prompt and output, tokens; empty: the model's.")

    @property
    def served_name(self) -> str:
        return self.name or self.path.name


class ExchangeSection(Section):
    """Prefixes that one worker has computed and another needs: moved where that is faster than computing them again."""

    mode: Literal["auto", "node", "off"] = Field(
        default="auto", description="auto: through shared memory on a machine, else over the network; node: never that."
    )
    directory: Path = Field(default=Path("/dev/shm/headwater"), description="The folder in shared memory.")
    max_bytes: int = Field(default=256 << 20, ge=1, description="Of shared memory that a worker fills, bytes.")
    max_mapped: float = Field(
        default=1.0, ge=0, description="Pages of other workers that are used in place, as a share of num_pages."
    )
    min_tokens: int = Field(default=256, ge=1, description="Fewer are always computed.")
    timeout_s: float = Field(default=1.0, gt=0, description="After so long a prefix is computed after all, seconds.")


class StoreSection(Section):
    """The store of keys and values."""

    num_pages: int = Field(default=2048, ge=1, description="Pages in the store.")
    page_size: int = Field(default=32, ge=1, description="Tokens per page.")
    prefix_cache: bool = Field(default=True, description="Keep and share the keys and values of finished prompts.")

    @property
    def capacity_tokens(self) -> int:
        return self.num_pages * self.page_size


class KVSection(StoreSection):
    """The store of keys and values of a worker, which knows others."""

    max_pinned: float = Field(default=0.25, ge=0, le=1, description="Pages that routers may pin, as a share of all.")
    exchange: ExchangeSection = ExchangeSection()


class SchedulerSection(Section):
    """How much one step does, and how much may wait."""

    step_tokens: int = Field(default=2048, ge=1, description="Token budget of one step.")
    max_running: int = Field(default=64, ge=1, description="Outputs that run at once.")
    max_waiting: int = Field(default=1024, ge=1, description="Outputs that wait; more are refused.")

    @model_validator(mode="after")
    def _budget_holds_every_running_output(self) -> SchedulerSection:
        if self.step_tokens < self.max_running:
            raise ValueError(
                f"step_tokens {self.step_tokens} is below max_running {self.max_running}: "
                "each running output needs one token a step; raise step_tokens or lower max_running"
            )
        return self


class KernelsSection(Section):
    """The native kernels of the torch engine on CPUs."""

    variant: Literal["auto", "off", "amx", "avx512_bf16", "avx512", "avx2", "generic"] = Field(
        default="auto", description="Instruction set; auto: the best here, or torch without a compiler; off: torch."
    )
    directory: Path | None = Field(default=None, description="Where they are kept; empty: ~/.cache/headwater/kernels.")


class SharingSection(Section):
    """Attention computed together for sequences whose prompts begin alike."""

    mode: Literal["planned", "never", "root", "all"] = Field(
        default="planned", description="planned: where it pays; never; root: the first level only; all: every level."
    )
    deterministic: bool = Field(
        default=False, description="The same bits whatever runs beside a request (native kernels); never shares."
    )

    @model_validator(mode="after")
    def _deterministic_never_shares(self) -> SharingSection:
        if self.deterministic and self.mode in ("root", "all"):
            raise ValueError(
                f"deterministic excludes mode {self.mode}: results would depend on who shares; leave mode out"
            )
        return self


def _check_drafters(drafters: Sequence[DrafterKind], draft_model: Path | None) -> None:
    if len(set(drafters)) < len(drafters):
        raise ValueError(f"drafters names one twice: {', '.join(drafters)}; name each once")
    if "model" in drafters and draft_model is None:
        raise ValueError("drafters has model, but draft_model is empty; give the small model's directory")


class SpeculationSection(Section):
    """Several tokens a step: drafters guess them, the model checks all guesses at once. Never changes the text."""

    drafters: tuple[DrafterKind, ...] = Field(
        default=(),
        description="copy: what followed before; recycle: what the model nearly chose; model: a small model; "
        "pool: processes of their own (cluster.num_drafters). Several are fused. Empty: none.",
    )
    draft_model: Path | None = Field(default=None, description="The small model's directory; same tokenizer.")
    max_nodes: int = Field(default=24, ge=1, le=63, description="Guessed tokens of one output in one step, at most.")
    verification: Literal["walk", "rejection"] = Field(
        default="walk",
        description="Of sampled outputs. walk: the text is that without drafts; rejection: only its distribution is, "
        "but more is accepted. For drafters: [model].",
    )
    num_candidates: int = Field(
        default=1, ge=1, le=8, description="With rejection, tokens drawn at each place: 1 is a chain, more a tree."
    )
    deadline_s: float = Field(default=0.002, gt=0, description="Longest wait of a step for the pool, seconds.")

    @model_validator(mode="after")
    def _is_complete(self) -> SpeculationSection:
        _check_drafters(self.drafters, self.draft_model)
        if self.verification == "rejection" and self.drafters != ("model",):
            raise ValueError(
                f"verification is rejection, but drafters is [{', '.join(self.drafters)}]; only a model in the worker "
                "can say what its guesses were drawn from: set drafters to [model], or verification to walk"
            )
        return self


class VllmSection(Section):
    """The vLLM engine (kind: vllm), with what only it can do: docs/engines.md."""

    tensor_parallel: int = Field(default=1, ge=1, description="GPUs that one worker's model is split over.")
    enforce_eager: bool = Field(default=False, description="Do not compile the model: starts sooner, computes slower.")
    quantization: str | None = Field(default=None, description="How weights are quantised; empty: as the model says.")
    lora: Path | None = Field(default=None, description="The directory of a LoRA adapter that every request uses.")
    attention: Literal["vllm", "shared"] = Field(
        default="vllm", description="shared: attention to shared prefixes is computed once for all (CPU)."
    )
    start_timeout_s: float = Field(default=600.0, gt=0, description="Longest wait for vLLM to be ready, seconds.")
    args: dict[str, Any] = Field(
        default={}, description="More of vLLM's engine arguments, by its names; not those that Headwater sets."
    )


class EngineSection(Section):
    """What computes the tokens."""

    kind: Literal["torch", "vllm", "fake"] = Field(
        default="torch", description="vllm: any model vLLM knows (docs/engines.md); fake computes nothing: for tests."
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; empty: this worker's share of the cores.")
    niceness: int = Field(
        default=10,
        ge=0,
        le=19,
        description="By how much computing gives way to receiving and sending on shared cores; as of nice(1).",
    )
    stall_s: float = Field(default=120.0, gt=0, description="A step longer than this means a hung engine, seconds.")
    kernels: KernelsSection = KernelsSection()
    sharing: SharingSection = SharingSection()
    speculation: SpeculationSection = SpeculationSection()
    kv: KVSection = KVSection()
    scheduler: SchedulerSection = SchedulerSection()
    vllm: VllmSection = VllmSection()

    @model_validator(mode="after")
    def _vllm_can_draft(self) -> EngineSection:
        unfit = [kind for kind in self.speculation.drafters if kind not in VLLM_DRAFTERS]
        if self.kind == "vllm" and unfit:
            raise ValueError(
                f"speculation.drafters has {', '.join(unfit)}, which cannot draft for kind vllm; "
                f"choose from {', '.join(VLLM_DRAFTERS)}"
            )
        return self


class SessionSection(Section):
    """The server that routers connect to."""

    host: str = Field(default="127.0.0.1", description="Address to bind and to announce; empty: the node's address.")
    heartbeat_s: float = Field(default=0.25, gt=0, description="Silence after which a heartbeat is sent, seconds.")
    max_queued_frames: int = Field(default=1024, ge=1, description="Frames a slow router may leave unread.")


class MetricsSection(Section):
    """The Prometheus endpoint."""

    host: str = Field(default="127.0.0.1", description="Address to bind.")
    port: int = Field(default=9101, ge=0, le=65535, description="First port tried, then the next; 0: any free.")


class DrafterMetricsSection(MetricsSection):
    """The Prometheus endpoint of a drafter: other ports than the workers'."""

    port: int = Field(default=9131, ge=0, le=65535, description="First port tried, then the next; 0: any free.")


class DrafterConfig(Section):
    """One process of the pool: drafters for the model that the workers serve. Never changes the text."""

    drafters: tuple[HostedKind, ...] = Field(
        default=("model",), min_length=1, description="As in worker.engine.speculation. Several are fused."
    )
    draft_model: Path | None = Field(default=Path("models/drafter"), description="The small model's directory.")
    dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="Of the small model.")
    threads: int = Field(default=1, ge=1, description="CPU threads.")
    max_sequences: int = Field(default=1024, ge=1, description="Outputs that it keeps; the oldest gives way.")
    host: str = Field(default="127.0.0.1", description="Address to bind and to announce; empty: the node's address.")
    kernels: KernelsSection = KernelsSection()
    kv: StoreSection = StoreSection()
    metrics: DrafterMetricsSection = DrafterMetricsSection()

    @model_validator(mode="after")
    def _is_complete(self) -> DrafterConfig:
        _check_drafters(self.drafters, self.draft_model)
        return self


class WorkerConfig(Section):
    """One worker: an engine behind a session server."""

    model: ModelSection = ModelSection()
    engine: EngineSection = EngineSection()
    session: SessionSection = SessionSection()
    metrics: MetricsSection = MetricsSection()
