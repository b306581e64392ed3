"""How a stream of responses is shown: plain text for a pipe, text with its figures for a terminal, or JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

if TYPE_CHECKING:
    from protos.client import GenerateEvent, PromptInfo, Usage
    from protos.messages import Finish


class Printer(Protocol):
    """Shows one generation."""

    def show(self, event: GenerateEvent) -> None:
        """What is new."""

    def end(self) -> None:
        """The stream is complete."""


class JsonPrinter:
    """One object a line: each delta, then one with the finishes, by index, and the usage."""

    def __init__(self) -> None:
        self._finishes: dict[int, Finish] = {}
        self._last: dict[str, Any] = {}

    def show(self, event: GenerateEvent) -> None:
        for output in event.outputs:
            if output.finish is not None:
                self._finishes[output.index] = output.finish
            delta = dataclasses.replace(output, finish=None)
            print_json({"index": output.index, "text": output.text, **_present(delta)})
        self._last |= {name: value for name, value in _present(event).items() if name != "outputs"}

    def end(self) -> None:
        finishes = [_present(self._finishes[index]) for index in sorted(self._finishes)]
        print_json({"finish": finishes, **self._last})


class TextPrinter:
    """The text as it is made; several outputs one after another, each when it and those before it have ended."""

    def __init__(self, *, num_outputs: int) -> None:
        self._streams = num_outputs == 1
        self._texts: dict[int, list[str]] = {}
        self._ended: set[int] = set()
        self._next = 0
        self._last_char = "\n"

    def show(self, event: GenerateEvent) -> None:
        for output in event.outputs:
            if self._streams:
                self._write(output.text)
                continue
            self._texts.setdefault(output.index, []).append(output.text)
            if output.finish is not None:
                self._ended.add(output.index)
        while self._next in self._ended:
            self._write(f"[{self._next}] {''.join(self._texts.pop(self._next))}")
            self._end_line()
            self._next += 1

    def end(self) -> None:
        self._end_line()

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._last_char = text[-1]

    def _end_line(self) -> None:
        if self._last_char != "\n":
            self._write("\n")


class TerminalPrinter:
    """The prompt dimmed, the text after it, and a line of figures on the standard error at the end."""

    def __init__(self, *, prompt: str, num_outputs: int) -> None:
        self._text = TextPrinter(num_outputs=num_outputs)
        self._sent = time.monotonic()
        self._first: float | None = None  # when the first token came
        self._prompt: PromptInfo | None = None
        self._usage: Usage | None = None
        console = Console(highlight=False, soft_wrap=True)
        console.print(prompt, style="dim", markup=False, end="" if num_outputs == 1 else "\n")

    def show(self, event: GenerateEvent) -> None:
        if self._first is None and event.outputs:
            self._first = time.monotonic()
        self._text.show(event)
        self._prompt = event.prompt or self._prompt
        self._usage = event.usage or self._usage

    def end(self) -> None:
        self._text.end()
        Console(stderr=True, highlight=False, soft_wrap=True).print(" · ".join(self._figures()), style="dim")

    def _figures(self) -> list[str]:
        figures = []
        if self._usage is not None:
            figures.append(f"{self._usage.prompt_tokens} prompt tokens ({self._usage.cached_tokens} cached)")
            figures.append(f"{self._usage.completion_tokens} new")
        if self._first is not None:
            figures.append(f"first after {(self._first - self._sent) * 1000:.0f} ms")
        if self._usage is not None:
            figures.append(f"{self._usage.completion_tokens / (time.monotonic() - self._sent):.0f} tokens/s")
        if self._prompt is not None:
            figures.append(f"seed {self._prompt.seed}")
        return figures


def print_json(fields: Any) -> None:
    """One line of JSON, at once."""
    sys.stdout.write(json.dumps(fields, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _present(message: Any) -> dict[str, Any]:
    """A message's fields, without those that are absent or empty."""
    return {name: value for name, value in dataclasses.asdict(message).items() if value not in (None, (), "")}
