"""vLLM engines for tests. Each is a process of its own and takes long to start: tests share them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workers.config import (
    EngineSection,
    KVSection,
    ModelSection,
    SchedulerSection,
    SpeculationSection,
    VllmSection,
    WorkerConfig,
)
from workers.engine.vllm.engine import VllmEngine
from workers.speculative.pool.members import PoolAccess


def vllm_config(
    directory: Path,
    *,
    num_pages: int = 512,
    max_running: int = 16,
    dtype: str = "float32",
    exchange: dict[str, Any] | None = None,
    speculation: dict[str, Any] | None = None,
    kv: dict[str, Any] | None = None,
    **vllm: Any,
) -> WorkerConfig:
    """Small and not compiled, unless told otherwise."""
    return WorkerConfig(
        model=ModelSection(path=directory, dtype=dtype),  # type: ignore[arg-type]
        engine=EngineSection(
            kind="vllm",
            vllm=VllmSection(**{"enforce_eager": True, **vllm}),
            kv=KVSection(num_pages=num_pages, exchange=exchange or {}, **(kv or {})),  # type: ignore[arg-type]
            scheduler=SchedulerSection(step_tokens=512, max_running=max_running),
            speculation=SpeculationSection(**(speculation or {})),
        ),
    )


def vllm_engine(directory: Path, *, pool: PoolAccess | None = None, **options: Any) -> VllmEngine:
    """A started engine; close it."""
    return VllmEngine(vllm_config(directory, **options), threads=1, pool=pool)
