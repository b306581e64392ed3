"""The progress bar: on stderr, and only where a person watches."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows which trial runs. Redrawn once a second, so that it takes nothing from what is measured."""

    def __init__(self, num_steps: int) -> None:
        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            refresh_per_second=1,
            transient=True,
        )
        self._task = self._bar.add_task("set-up", total=num_steps, completed=-1)

    def step(self, description: str) -> None:
        """The next trial begins."""
        self._bar.update(self._task, description=description, advance=1)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
