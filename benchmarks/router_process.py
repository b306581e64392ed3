"""The router benchmark's router: a real RouterServer, alone in a process. See `router_pipe.py`."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from pathlib import Path

from benchmarks.router_pipe import Message, obey
from router.config import RouterConfig
from router.server import RouterServer


async def run(settings: Message) -> None:
    """Serve until the input ends."""
    server = RouterServer(
        RouterConfig.model_validate(settings["router"]),
        model_name=settings["model_name"],
        tokenizer_dir=Path(settings["model"]),
        session_token=settings["token"],
        router_id="router",
    )
    address = await server.start()

    def answer(question: Message) -> Message:
        if "workers" in question:
            server.set_workers(question["workers"])
        server.check()
        gc.collect()
        return {"num_allocations": sys.getallocatedblocks()}

    try:
        await obey({"grpc": address.grpc, "metrics": address.metrics}, answer)
    finally:
        await server.stop(grace_s=0)


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.argv[1])))
