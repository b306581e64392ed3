"""vLLM's worker process: where our sampler, drafters and attention take their places in its model runner."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
from collections.abc import Mapping
from typing import Any, Final

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from workers.engine.vllm.connector import describe
from workers.engine.vllm.sampling import KeyedSampler
from workers.engine.vllm.settings import SECTION
from workers.engine.vllm.walk import Walk

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Base
else:
    from vllm.v1.worker.gpu_worker import Worker as _Base

SCHEDULER_GRACE_S: Final = 2.0

log = logging.getLogger(__name__)


class HeadwaterWorker(_Base):  # type: ignore[misc]  # untyped
    """vLLM's worker for this platform, with our parts. Its methods are called by name, from the engine."""

    vllm_config: VllmConfig
    model_runner: Any

    def init_device(self) -> None:
        settings: Mapping[str, Any] = self.vllm_config.additional_config[SECTION]
        end_with(settings["owner"])
        self._shares_attention = settings["attention"] == "shared"
        if self._shares_attention:
            from workers.engine.vllm import attention

            attention.register()
        super().init_device()
        sampler = KeyedSampler(self.model_runner)
        self.model_runner.sampler = sampler
        if self.vllm_config.speculative_config is not None:
            self.model_runner.rejection_sampler = Walk(sampler.choose)
            self.model_runner.drafter.bind(self.model_runner)

    def execute_model(self, scheduler_output: Any) -> Any:
        """vLLM's step, be it only to be told of what has ended."""
        output = super().execute_model(scheduler_output)
        if self.vllm_config.speculative_config is not None:
            self.model_runner.drafter.sweep()
        return output

    def set_pool(self, addresses: dict[str, str], token: str, tls: dict[str, str] | None) -> None:
        """There are these drafters now."""
        self.model_runner.drafter.set_pool(addresses, token, tls)

    def counts(self) -> dict[str, Any]:
        """Running totals of drafts and of attention; empty for what is vLLM's own."""
        counts: dict[str, Any] = {}
        if self.vllm_config.speculative_config is not None:
            counts["speculation"] = self.model_runner.drafter.stats()
        if self._shares_attention:
            from workers.engine.vllm import attention

            counts["attention"] = attention.counts(self.model_runner)
        return counts

    def kv_layout(self) -> dict[str, Any] | None:
        """How this worker keeps keys and values; None if they cannot be exchanged."""
        return describe()


def end_with(owner: int) -> None:
    """End vLLM's processes when that one, which started them, has ended: it may have had no time to do so."""
    threading.Thread(target=_watch, args=(owner,), name="owner watch", daemon=True).start()


def _watch(owner: int) -> None:
    scheduler = os.getppid()
    try:
        process = os.pidfd_open(owner)
    except ProcessLookupError:
        log.debug("process %d had ended already", owner)
    else:
        select.select([process], [], [])
    if os.getppid() == scheduler != owner:
        os.kill(scheduler, signal.SIGTERM)
        threading.Event().wait(SCHEDULER_GRACE_S)
    if os.getppid() == scheduler != owner:
        os.kill(scheduler, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
