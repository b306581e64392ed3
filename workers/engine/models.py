"""Which model computes the torch engine's steps: the native kernels where they can be had, else torch operations."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import assert_never

import torch

from protos.errors import SetupError
from workers.attention.cost import DEFAULT_COST, Corrected
from workers.attention.protocol import KVShape
from workers.attention.torch_backend import TorchAttention
from workers.config import WorkerConfig
from workers.kernels.calibration import calibrated_cost
from workers.kernels.decoder import NativeDecoder
from workers.kernels.library import Library, check_shape, load
from workers.model.config import ModelConfig
from workers.model.loader import load_decoder
from workers.model.scores import Model
from workers.model.torch_model import TorchModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, what attention costs it, and the name of what computes it."""

    model: Model
    cost: Corrected
    kernels: str


def load_model(
    config: WorkerConfig, model: ModelConfig, *, max_context: int, threads: int, device: torch.device
) -> LoadedModel:
    """Load the weights into the fastest model that runs here.

    Raises ModelError, and SetupError if kernels were asked for by name and cannot be had.
    """
    dtype = torch_dtype(config)
    kv = config.engine.kv
    shape = KVShape(model.num_layers, kv.num_pages, kv.page_size, model.num_kv_heads, model.head_dim)
    decoder = load_decoder(config.model.path, dtype=dtype, device=device, max_context=max_context)
    library = _library(config, shape) if device.type == "cpu" else None
    if library is None:
        plain = TorchModel(decoder, TorchAttention(shape, dtype=dtype, device=device), page_size=kv.page_size)
        return LoadedModel(plain, Corrected(DEFAULT_COST), "torch")
    native = NativeDecoder(library, decoder, shape, max_context=max_context, threads=threads)
    is_planned = config.engine.sharing.mode == "planned" and not config.engine.sharing.deterministic
    cost = calibrated_cost(native, shape) if is_planned else DEFAULT_COST
    return LoadedModel(native, Corrected(cost), library.variant.name)


def torch_dtype(config: WorkerConfig) -> torch.dtype:
    match config.model.dtype:
        case "float32":
            return torch.float32
        case "bfloat16":
            return torch.bfloat16
        case dtype:
            assert_never(dtype)


def _library(config: WorkerConfig, shape: KVShape) -> Library | None:
    """The kernels of the configured variant; None, said once, where "auto" finds that none can be had."""
    kernels = config.engine.kernels
    if kernels.variant == "off":
        return None
    try:
        check_shape(shape)
        return load(kernels.variant, kernels.directory)
    except SetupError as error:
        if kernels.variant != "auto":
            raise
        log.warning("the plain torch path runs, several times slower: %s", error.message)
        return None
