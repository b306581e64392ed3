"""The engine's side of the line protocol: one JSON object a line, on what were standard input and output.

Host to engine: `{"op": "warm", "prefixes": [[ids]]}`, `{"op": "run", "prompts": [[ids]], "max_tokens": n}`, `{"op":
"quit"}`. Engine to host, one line for each, and one before all: `{"ready": {facts}}`, `{"ok": {...}}`, `{"skip":
reason}` or `{"error": reason}`. Times are taken here, around the engine's own call: neither pipe nor JSON is in them.

An engine's program runs in an environment of its own, so this file and the programs import the standard library and
their engine, nothing of Headwater; `ours.py` is the exception.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

Tokens = list[int]


class Skip(Exception):
    """This workload is not for this engine; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What an engine is started with. Every program's docstring says what it makes of `options`."""

    model: Path  # a directory, or the file a conversion made
    threads: int
    max_batch: int  # sequences at once
    max_context: int  # prompt and output, tokens
    kv_tokens: int  # room for keys and values
    options: Mapping[str, Any]  # the arm's own


class Engine(Protocol):
    """One engine with its model loaded."""

    def facts(self) -> Mapping[str, object]:
        """Versions and settings that a reader of the results should know."""

    def warm(self, prefixes: Sequence[Tokens]) -> None:
        """Have these prefixes computed, so that prompts which begin with one compute only what follows."""

    def run(self, prompts: Sequence[Tokens], max_tokens: int) -> list[Tokens]:
        """All prompts at once, greedy, exactly `max_tokens` each whatever the tokens are. Raises Skip."""


def main(make: Callable[[Settings], Engine]) -> None:
    """Serve the engine that the first argument (Settings as JSON) describes, until told to quit or the input ends."""
    asks, answers = _take_over_standard_streams()
    try:
        engine = make(_settings(sys.argv[1]))
        _say(answers, {"ready": dict(engine.facts())})
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is told to the host
        _say(answers, {"error": _described(error)})
        return
    for line in asks:
        ask = json.loads(line)
        if ask["op"] == "quit":
            return
        _say(answers, _answer(engine, ask))


def _take_over_standard_streams() -> tuple[TextIO, TextIO]:
    """The pipes to the host. What the engine prints goes to standard error, and it and its children read nothing."""
    asks, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return asks, answers


def _settings(text: str) -> Settings:
    values = json.loads(text)
    return Settings(**{**values, "model": Path(values["model"])})


def _answer(engine: Engine, ask: Mapping[str, Any]) -> dict[str, object]:
    try:
        begin_s = time.perf_counter()
        outputs = _perform(engine, ask)
        return {"ok": {"wall_s": time.perf_counter() - begin_s, "outputs": outputs}}
    except Skip as reason:
        return {"skip": str(reason)}
    except Exception as error:  # noqa: BLE001 - whatever an engine raises is told to the host
        return {"error": _described(error)}


def _perform(engine: Engine, ask: Mapping[str, Any]) -> list[Tokens]:
    if ask["op"] == "warm":
        engine.warm(ask["prefixes"])
        return []
    return engine.run(ask["prompts"], ask["max_tokens"])


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _say(answers: TextIO, message: Mapping[str, object]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
