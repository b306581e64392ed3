"""Looks at the cluster once a second and keeps a minute of it: what the page and `headwater top` show.

Stands beside the requests' path and touches none of it: workers tell their totals of their own accord, and what the
router has counted is read from its metrics.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from protos.overview import Latency, Overview, WorkerOverview, ratio
from router.calls import GENERATING
from router.fleet import Fleet
from router.metrics import ITL_BUCKETS, TTFT_BUCKETS, RouterCounts, RouterMetrics
from router.session import Session
from router.window import WINDOW_TICKS, BucketWindow, CounterWindow, EngineWindow

TICK_S = 1.0
RECENT_TICKS = 5  # what is shown as the rate of now
POINT_TICKS = 2  # of one point of a history: a worker's totals may come just before or just after a tick


class Watch:
    """Owner of the last minute's window. Owned by RouterServer; runs on the event loop."""

    def __init__(
        self,
        metrics: RouterMetrics,
        fleet: Fleet,
        *,
        router_id: str,
        num_live: Callable[[], int],
        num_waiting: Callable[[], int],
    ) -> None:
        """`num_live`, `num_waiting`: requests that have not ended, and of those, without a worker."""
        self._metrics = metrics
        self._fleet = fleet
        self._num_live = num_live
        self._num_waiting = num_waiting
        self._engines: dict[str, EngineWindow] = {}  # by member
        self._first_tokens = BucketWindow(len(TTFT_BUCKETS) + 1)
        self._next_tokens = BucketWindow(len(ITL_BUCKETS) + 1)
        self._outcomes = CounterWindow()
        self._ticks = deque([time.monotonic()], maxlen=WINDOW_TICKS + 1)
        self._generation = deque[float](maxlen=WINDOW_TICKS)
        self._prompt = deque[float](maxlen=WINDOW_TICKS)
        self._overview = Overview((router_id,), "")

    @property
    def overview(self) -> Overview:
        """As of the last tick. Safe from any thread."""
        return self._overview

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick(await asyncio.to_thread(self._metrics.counts, GENERATING))

    def tick(self, counts: RouterCounts) -> None:
        """A second has passed, and the router has counted this since it started."""
        self._ticks.append(time.monotonic())
        self._first_tokens.tick(counts.first_tokens)
        self._next_tokens.tick(counts.next_tokens)
        self._outcomes.tick(counts.outcomes)
        sessions = sorted(self._fleet.sessions, key=lambda session: session.worker_id)
        self._engines = {s.worker_id: self._engines.get(s.worker_id) or EngineWindow() for s in sessions}
        for session in sessions:
            self._engines[session.worker_id].tick(session.totals)
        self._add_points()
        self._overview = self._look(sessions)

    def _add_points(self) -> None:
        points = [engine.last(POINT_TICKS) for engine in self._engines.values()]
        self._generation.append(sum(ratio(point.generation_tokens, point.seconds) or 0.0 for point in points))
        self._prompt.append(sum(ratio(point.prompt_tokens, point.seconds) or 0.0 for point in points))

    def _look(self, sessions: Sequence[Session]) -> Overview:
        model = self._fleet.model
        return Overview(
            router_ids=self._overview.router_ids,
            model="" if model is None else model.name,
            window_s=self._ticks[-1] - self._ticks[0],
            num_live=self._num_live(),
            num_waiting=self._num_waiting(),
            outcomes=self._outcomes.last(),
            time_to_first_token=Latency(TTFT_BUCKETS, self._first_tokens.last()),
            inter_token=Latency(ITL_BUCKETS, self._next_tokens.last()),
            generation_history=tuple(self._generation),
            prompt_history=tuple(self._prompt),
            workers=tuple(map(self._worker, sessions)),
        )

    def _worker(self, session: Session) -> WorkerOverview:
        load, engine = session.load, self._engines[session.worker_id]
        return WorkerOverview(
            worker_id=session.worker_id,
            state=session.state,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_used_tokens=load.kv_used_tokens,
            kv_capacity_tokens=load.kv_capacity_tokens,
            recent=engine.last(RECENT_TICKS),
            window=engine.last(),
        )
