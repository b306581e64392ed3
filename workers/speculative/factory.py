"""Which drafters a configuration means."""

from __future__ import annotations

from pathlib import Path
from typing import assert_never

import torch

from protos.errors import ModelError
from workers.attention.planner import Planner
from workers.config import DrafterKind, WorkerConfig
from workers.engine.models import load_model
from workers.kv.cache import KVCache
from workers.model.batch import BatchBuilder
from workers.model.config import ModelConfig
from workers.speculative.copying import Copying
from workers.speculative.draft_model import DraftModel
from workers.speculative.protocol import Drafter
from workers.speculative.recycling import Recycling
from workers.speculative.speculator import Speculator

THREADS = 1  # of a draft model beside its target: more would take the target's cores


def make_speculator(config: WorkerConfig, *, device: torch.device) -> Speculator | None:
    """None where no drafters are wanted. Raises ModelError for a draft model that does not fit the target."""
    section = config.engine.speculation
    if not section.drafters:
        return None
    return Speculator([_drafter(kind, config, device) for kind in section.drafters], max_nodes=section.max_nodes)


def make_draft_model(config: WorkerConfig, directory: Path, *, threads: int, device: torch.device) -> DraftModel:
    """A small model beside the one that `config` serves. Raises ModelError if their tokens differ."""
    _check_tokenizers(config.model.path, directory)
    target, model = ModelConfig.from_directory(config.model.path), ModelConfig.from_directory(directory)
    if model.vocab_size != target.vocab_size:
        raise ModelError(
            f"{directory} has a vocabulary of {model.vocab_size}, its target one of {target.vocab_size}; "
            "a draft model must have the vocabulary of its target"
        )
    kv = config.engine.kv
    own = config.model_copy(update={"model": config.model.model_copy(update={"path": directory})})
    max_context = model.max_position_embeddings
    loaded = load_model(own, model, max_context=max_context, threads=threads, device=device)
    cache = KVCache(num_pages=kv.num_pages, page_size=kv.page_size)
    planner = Planner(loaded.cost, kv.page_size, mode="never")
    builder = BatchBuilder(planner, loaded.cost, cache, page_size=kv.page_size, device=device)
    return DraftModel(loaded.model, builder, cache, max_context=max_context)


def _drafter(kind: DrafterKind, config: WorkerConfig, device: torch.device) -> Drafter:
    match kind:
        case "copy":
            return Copying()
        case "recycle":
            return Recycling()
        case "model":
            assert config.engine.speculation.draft_model is not None, "the configuration has checked that"
            return make_draft_model(config, config.engine.speculation.draft_model, threads=THREADS, device=device)
        case _:
            assert_never(kind)


def _check_tokenizers(target: Path, drafter: Path) -> None:
    files = [directory / "tokenizer.json" for directory in (target, drafter)]
    try:
        contents = [file.read_bytes() for file in files]
    except OSError as error:
        raise ModelError(f"{error.filename} cannot be read ({error.strerror}); both models need a tokenizer") from error
    if contents[0] != contents[1]:
        raise ModelError(f"{files[1]} differs from {files[0]}; a draft model must have the tokenizer of its target")
