"""Which drafters a configuration means."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import assert_never

import torch

from protos.errors import ModelError
from protos.tls import Certificates, PeerTLS
from protos.tracing import Tracer
from protos.v1 import drafting_pb2 as pb
from workers.attention.planner import Planner
from workers.config import DrafterConfig, EngineSection, HostedKind, KVSection, ModelSection, WorkerConfig
from workers.engine.models import load_model
from workers.kv.cache import KVCache
from workers.model.batch import BatchBuilder
from workers.model.config import ModelConfig
from workers.speculative.copying import Copying
from workers.speculative.draft_model import DraftModel
from workers.speculative.pool.channel import Channel
from workers.speculative.pool.client import Pool
from workers.speculative.pool.lane import Lane
from workers.speculative.pool.members import PoolAccess
from workers.speculative.pool.server import DraftServer
from workers.speculative.protocol import Drafter
from workers.speculative.recycling import Recycling
from workers.speculative.speculator import Speculator
from workers.speculative.translation import same_tokenizer, translating

THREADS = 1  # of a draft model beside its target: more would take the target's cores


def make_speculator(config: WorkerConfig, *, device: torch.device, access: PoolAccess | None) -> Speculator | None:
    """None where no drafters are wanted. Raises ModelError for a draft model that does not fit the target.

    `access`: the way to the pool; None: there is none, and nothing comes of it.
    """
    section = config.engine.speculation
    if not section.drafters:
        return None
    drafters: list[Drafter] = []
    pool = None
    for kind in section.drafters:
        if kind != "pool":
            own = config.model_copy(update={"model": config.model.model_copy(update={"path": section.draft_model})})
            num_candidates = section.num_candidates if section.verification == "rejection" else 0
            drafters.append(
                _drafter(
                    kind,
                    own,
                    target=config.model.path,
                    threads=THREADS,
                    device=device,
                    num_candidates=num_candidates,
                )
            )
        elif access is not None:
            certificates = Certificates.of_peer(access.tls) if access.tls else None
            pool = Pool(
                access.members,
                target_hello(config.model.path, access.token),
                deadline_s=section.deadline_s,
                make_lane=partial(Lane, connect=partial(Channel.connect, certificates=certificates)),
            )
            drafters.append(pool)
    return Speculator(drafters, max_nodes=section.max_nodes, pool=pool)


def make_draft_server(
    config: DrafterConfig, *, target: Path, token: str, tls: PeerTLS | None = None, tracer: Tracer | None = None
) -> DraftServer:
    """The pool's side: drafters for the model in `target`. Raises SetupError. Takes seconds: not on an event loop."""
    certificates = Certificates.of_peer(tls) if tls else None
    torch.set_num_threads(1)  # the kernels have threads of their own
    own = WorkerConfig(
        model=ModelSection(path=config.draft_model or target, dtype=config.dtype),
        engine=EngineSection(kv=KVSection(**config.kv.model_dump()), kernels=config.kernels),
    )
    device = torch.device("cpu")
    drafters = [_drafter(kind, own, target=target, threads=config.threads, device=device) for kind in config.drafters]
    hello = target_hello(target, token)
    return DraftServer(
        drafters,
        token=token,
        vocabulary=hello.vocabulary,
        vocab_size=hello.vocab_size,
        max_sequences=config.max_sequences,
        certificates=certificates,
        tracer=tracer,
    )


def target_hello(target: Path, token: str) -> pb.TargetHello:
    """What a worker that serves the model in `target` says of itself. Raises ModelError."""
    file = target / "tokenizer.json"
    try:
        vocabulary = hashlib.sha256(file.read_bytes()).digest()
    except OSError as error:
        raise ModelError(f"{file}: {error.strerror}; the model directory needs a tokenizer.json") from error
    size = ModelConfig.from_directory(target).vocab_size
    return pb.TargetHello(token=token, vocabulary=vocabulary, vocab_size=size)


def make_draft_model(
    own: WorkerConfig, *, target: Path, threads: int, device: torch.device, num_candidates: int = 0
) -> DraftModel:
    """The small model that `own` describes, for the one in `target`; its tokens may be others. Raises ModelError."""
    directory = own.model.path
    vocab_size, model = ModelConfig.from_directory(target).vocab_size, ModelConfig.from_directory(directory)
    is_alike = same_tokenizer(target, directory)
    if is_alike and model.vocab_size != vocab_size:
        raise ModelError(
            f"{directory} has a vocabulary of {model.vocab_size}, its target one of {vocab_size}; "
            "a draft model with the tokenizer of its target must have its vocabulary, too"
        )
    if num_candidates and not is_alike:
        raise ModelError(
            f"{directory} has another tokenizer than {target}, so its probabilities are not of the target's tokens; "
            "set worker.engine.speculation.verification to walk"
        )
    kv = own.engine.kv
    max_context = model.max_position_embeddings
    loaded = load_model(own, model, max_context=max_context, threads=threads, device=device)
    cache = KVCache(num_pages=kv.num_pages, page_size=kv.page_size)
    planner = Planner(loaded.cost, kv.page_size, mode="never")
    builder = BatchBuilder(planner, loaded.cost, cache, page_size=kv.page_size, device=device)
    return DraftModel(loaded.model, builder, cache, max_context=max_context, num_candidates=num_candidates)


def _drafter(
    kind: HostedKind,
    own: WorkerConfig,
    *,
    target: Path,
    threads: int,
    device: torch.device,
    num_candidates: int = 0,
) -> Drafter:
    match kind:
        case "copy":
            return Copying()
        case "recycle":
            return Recycling()
        case "model":
            made = make_draft_model(own, target=target, threads=threads, device=device, num_candidates=num_candidates)
            return translating(made, target, own.model.path)
        case _:
            assert_never(kind)
