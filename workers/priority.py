"""Who goes first on shared cores: threads that answer, before threads that compute."""

from __future__ import annotations

import os
import sys
import threading


def give_way(by: int) -> None:
    """Make this thread, and those that it starts from now on, less important by so many degrees of nice(1).

    A thread that answers works for microseconds and then waits; behind threads that compute for milliseconds on
    end, each of its turns would begin late. Elsewhere than on Linux threads have no priority of their own, and nothing
    is done.
    """
    if by and sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + by, 19))
