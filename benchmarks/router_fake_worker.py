"""The router benchmark's worker: a real WorkerServer whose engine only keeps time. See `router_pipe.py`."""

from __future__ import annotations

import asyncio
import json
import sys
from unittest.mock import patch

from benchmarks.router_pipe import Message, obey
from protos.messages import ModelInfo
from workers.config import WorkerConfig
from workers.engine.fake import FakeEngine
from workers.engine.protocol import EngineLimits
from workers.model.config import ModelConfig
from workers.server import WorkerServer


async def run(settings: Message) -> None:
    """Serve until the input ends."""
    config = WorkerConfig.model_validate(settings["worker"])
    server = WorkerServer(config, worker_id=settings["worker_id"], session_token=settings["token"])
    engine = make_engine(config, settings["step_s"])
    with patch("workers.server.make_engine", lambda *_, **__: engine):  # no user has a use for a slow fake
        address = await server.start()
    try:
        await obey({"session": address.session}, lambda _: {})
    finally:
        await server.stop()


def make_engine(config: WorkerConfig, step_s: float) -> FakeEngine:
    """A fake with the model's name and limits whose steps take this long."""
    model = ModelConfig.from_directory(config.model.path)
    scheduler = config.engine.scheduler
    return FakeEngine(
        ModelInfo(config.model.served_name, model.max_position_embeddings, model.vocab_size),
        limits=EngineLimits(scheduler.max_running, scheduler.step_tokens),
        step_s=step_s,
    )


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.argv[1])))
