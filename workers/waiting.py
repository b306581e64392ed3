"""Work of one session that waits for something before the engine may have it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

Key = tuple[Literal["request", "pin"], str]  # and its id


class Waiting:
    """Owns a task for each piece of work that waits. Lives on one event loop."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], Key] = {}

    def after(self, wait: Callable[[], Awaitable[None]], do: Callable[[], None], key: Key) -> None:
        """Do this when that is over, unless it is cancelled before."""
        task = asyncio.create_task(_then(wait, do))
        self._tasks[task] = key
        task.add_done_callback(self._tasks.pop)

    def cancel(self, key: Key) -> None:
        """Do not do what waits under this key. It may be that nothing does."""
        for task in [task for task, found in self._tasks.items() if found == key]:
            task.cancel()

    async def close(self) -> None:
        """Do nothing of what still waits."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _then(wait: Callable[[], Awaitable[None]], do: Callable[[], None]) -> None:
    await wait()
    do()
