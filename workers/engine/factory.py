"""Which engine a configuration means. Engines are imported only when chosen: each brings its own heavy libraries."""

from __future__ import annotations

from typing import assert_never

from protos.messages import ModelInfo
from workers.config import WorkerConfig
from workers.engine.protocol import Engine, EngineLimits
from workers.model.config import ModelConfig
from workers.speculative.pool.members import PoolAccess
from workers.versions import require_vllm


def make_engine(config: WorkerConfig, *, threads: int, pool: PoolAccess | None = None) -> Engine:
    """Build the configured engine with its model loaded. Raises SetupError. Takes seconds: not on an event loop.

    `pool`: the way to drafters in other processes, where the configuration asks for them.
    """
    match config.engine.kind:
        case "torch":
            import torch

            from workers.engine.torch_engine import TorchEngine

            torch.set_num_threads(threads)
            engine = TorchEngine(config, threads=threads, pool=pool)
            if engine.kernels != "torch":
                torch.set_num_threads(1)  # the kernels have threads of their own; two pools would fight for the cores
            return engine
        case "vllm":
            require_vllm()
            from workers.engine.vllm.engine import VllmEngine

            return VllmEngine(config, threads=threads, pool=pool)
        case "fake":
            from workers.engine.fake import FakeEngine

            model = ModelConfig.from_directory(config.model.path)
            max_context = config.model.max_context or model.max_position_embeddings
            limits = EngineLimits(config.engine.scheduler.max_running, config.engine.scheduler.step_tokens)
            return FakeEngine(ModelInfo(config.model.served_name, max_context, model.vocab_size), limits=limits)
        case kind:
            assert_never(kind)
