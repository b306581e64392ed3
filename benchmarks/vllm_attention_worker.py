"""vLLM's worker with nothing of ours but shared attention; vLLM makes it by name, in a process of its own."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from workers.engine.vllm import attention
from workers.engine.vllm.settings import SECTION


class AttentionWorker(CPUWorker):  # type: ignore[misc]
    """Takes the backend that additional_config names."""

    def init_device(self) -> None:
        if self.vllm_config.additional_config[SECTION]["attention"] == "shared":
            attention.register()
        super().init_device()

    def attention_counts(self) -> dict[str, int] | None:
        return attention.counts(self.model_runner)
