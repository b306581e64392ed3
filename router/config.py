"""The router's part of the configuration tree. Imports nothing heavy: it is read before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the tree: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TLSSection(Section):
    """Certificates of the client-facing server, PEM files; replaced ones are used from the next connection on."""

    cert_file: Path = Field(description="The server's certificate chain.")
    key_file: Path = Field(description="The server's private key.")
    client_ca_file: Path | None = Field(default=None, description="Clients must show a certificate of this authority.")


class GrpcSection(Section):
    """The server that clients connect to."""

    host: str = Field(default="127.0.0.1", description="Address to bind.")
    port: int = Field(default=9000, ge=0, le=65535, description="Port to bind; 0: any free one.")
    max_message_bytes: int = Field(default=4 << 20, ge=1024, description="Largest message a client may send.")
    max_concurrent_calls: int = Field(default=4096, ge=1, description="Calls open at once; more are refused by gRPC.")
    tls: TLSSection | None = Field(default=None, description="Certificates; empty: plain text.")


class MetricsSection(Section):
    """The HTTP port: the Prometheus endpoint and the live page."""

    host: str = Field(default="127.0.0.1", description="Address to bind.")
    port: int = Field(default=9100, ge=0, le=65535, description="Port to bind; 0: any free one.")
    page: bool = Field(default=True, description="Show whoever reaches the port a live page of the cluster's load.")


class LimitsSection(Section):
    """What one request may ask for, and how much may wait."""

    max_queued_requests: int = Field(
        default=1024, ge=1, description="Requests that wait for a worker; more are refused."
    )
    max_queued_tokens: int = Field(default=1 << 20, ge=1, description="Prompt tokens that wait for a worker, in all.")
    no_worker_grace_s: float = Field(
        default=5.0, ge=0, description="How long requests may wait while no worker at all is connected."
    )
    max_request_s: float = Field(
        default=3600.0, gt=0, description="Longest life of a request; deadlines are cut to it."
    )
    max_request_id_chars: int = Field(default=128, ge=1, description="Longest request id a client may choose.")
    max_n: int = Field(default=16, ge=1, description="Outputs per prompt.")
    max_stop_strings: int = Field(default=16, ge=0, description="Stop strings per request.")
    max_stop_chars: int = Field(default=256, ge=1, description="Longest stop string, characters.")
    max_stop_token_ids: int = Field(default=64, ge=0, description="Stop token ids per request.")
    max_logprobs: int = Field(default=20, ge=0, description="Alternatives reported per position.")
    max_logit_bias: int = Field(default=300, ge=0, description="Tokens with a logit bias per request.")
    max_pinned_tokens: int = Field(default=1 << 16, ge=0, description="Prompt tokens that one tenant may have pinned.")
    max_continuations: int = Field(default=128, ge=1, description="Continuations per Score call.")
    max_score_tokens: int = Field(
        default=1 << 20,
        ge=1,
        description="Tokens of one Score call: context and continuation, summed over continuations.",
    )


class SessionsSection(Section):
    """The sessions with workers."""

    watchdog_s: float = Field(default=1.5, gt=0, description="A worker silent for this long is lost.")
    connect_timeout_s: float = Field(default=5.0, gt=0, description="A worker must greet within this time.")
    reconnect_first_s: float = Field(default=0.05, gt=0, description="Wait before the first new attempt; it doubles.")
    reconnect_max_s: float = Field(default=2.0, gt=0, description="Longest wait between attempts.")
    max_in_flight: int = Field(default=256, ge=1, description="Requests one worker holds for this router.")
    max_frame_bytes: int = Field(default=16 << 20, ge=1 << 20, description="Frames to workers are split above this.")
    warm_up_s: float = Field(
        default=10.0, ge=0, description="Longest that a new worker waits for work while it fetches pinned prefixes."
    )
    packing_window_s: float = Field(
        default=0.004,
        ge=0,
        le=1,
        description="Longest that a prompt waits for others to travel with, to a worker that is computing prompts.",
    )


class DispatchSection(Section):
    """How much work workers are given ahead; the rest waits at the router, where its order can still change."""

    ahead: float = Field(default=0.125, ge=0, description="Outputs given beyond those a worker runs at once, a share.")
    prefill_window_steps: float = Field(
        default=0.5, ge=0, description="Prompt tokens given ahead, in steps of the worker; 0: any number."
    )
    max_affinity_wait_s: float = Field(
        default=0.5, ge=0, description="Longest wait for a full worker that has the prompt's prefix."
    )
    min_source_tokens: int = Field(
        default=256,
        ge=1,
        description="Tokens of a prompt that another worker must have more of, to be named as their source.",
    )
    tenant_headroom: float = Field(
        default=0.125, ge=0, lt=1, description="Share of all outputs at once that no tenant takes from those to come."
    )


class RecoverySection(Section):
    """How often a request goes on elsewhere after its worker was lost."""

    max_losses: int = Field(default=8, ge=0, description="Workers that a request may lose; then it ends in WorkerLost.")
    max_strikes: int = Field(
        default=2, ge=1, description="Of those, without a single answer to it: then it is taken for the cause."
    )


class StreamingSection(Section):
    """How tokens are put together into messages. An output's first tokens and its end never wait."""

    messages_per_s: float = Field(
        default=1000.0, gt=0, description="Messages of all streams together; beyond, tokens share messages."
    )
    max_interval_s: float = Field(default=0.1, ge=0, description="Longest that a token waits for others, seconds.")


class TenantsSection(Section):
    """Who may call, and who shares cached prefixes."""

    file: Path | None = Field(
        default=None, description="The tenants with their keys and limits, YAML; empty: everybody, without limits."
    )
    reload_s: float = Field(default=1.0, ge=0, description="A change of the file counts after this long at most.")
    allow_anonymous: bool = Field(
        default=False, description="With a file: callers without credentials are the tenant `anonymous`."
    )
    isolation: Literal["tenant", "none"] = Field(
        default="tenant", description="Who shares cached prefixes: one tenant's requests, or everybody's."
    )


class RoutingSection(Section):
    """How a worker is chosen."""

    policy: Literal["prefix", "least_loaded", "round_robin", "random", "consistent_hash"] = Field(
        default="prefix",
        description="prefix: the least cost, cached prompts and load together; the rest are baselines.",
    )
    max_index_blocks: int = Field(
        default=1 << 20, ge=1, description="Block names kept of what workers cache; about 200 bytes each."
    )
    load_weight: float = Field(
        default=0.25, gt=0, description="A token of work ahead against one to compute; larger copies prefixes sooner."
    )
    crowd_tokens: int = Field(
        default=1024, ge=1, description="Work ahead at which computing counts twice; larger copies prefixes sooner."
    )
    seed: int = Field(default=0, description="Decides what the policy random chooses.")


class RouterConfig(Section):
    """One router: the client-facing server, its limits, and its sessions with workers."""

    grpc: GrpcSection = Field(default=GrpcSection(), description="The server that clients connect to.")
    metrics: MetricsSection = Field(default=MetricsSection(), description="The Prometheus endpoint.")
    limits: LimitsSection = Field(default=LimitsSection(), description="What requests may ask for.")
    sessions: SessionsSection = Field(default=SessionsSection(), description="The sessions with workers.")
    routing: RoutingSection = Field(default=RoutingSection(), description="How a worker is chosen.")
    dispatch: DispatchSection = Field(default=DispatchSection(), description="What workers are given ahead.")
    recovery: RecoverySection = Field(default=RecoverySection(), description="What happens when workers are lost.")
    streaming: StreamingSection = Field(default=StreamingSection(), description="How tokens become messages.")
    tenants: TenantsSection = Field(default=TenantsSection(), description="Who may call.")

    @model_validator(mode="after")
    def _a_worker_holds_the_largest_group(self) -> RouterConfig:
        if self.limits.max_continuations > self.sessions.max_in_flight:
            raise ValueError(
                f"limits.max_continuations {self.limits.max_continuations} is above sessions.max_in_flight "
                f"{self.sessions.max_in_flight}: one Score call runs on one worker; lower the first or raise the second"
            )
        return self
