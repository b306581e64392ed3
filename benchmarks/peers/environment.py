"""The environments that engines run in: one for each, made once in the cache folder, with every version pinned.

The requirements are complete lists, so nothing is resolved and nothing unwanted drawn in. torch goes first and alone,
with what it needs itself, so that pip may take the CPU build where its configuration offers one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from benchmarks.conditions import ROOT

REQUIREMENTS = Path(__file__).parent / "requirements"
STAMP = ".requirements"  # in a complete environment: the digest of what it was made from
INHERITED = ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "SSL_CERT_DIR", "SSL_CERT_FILE", "TMPDIR")
TAIL_LINES = 5


class SetupFailedError(Exception):
    """An environment or a conversion could not be made."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment, made from `requirements/<name>.txt`."""

    name: str
    cache: Path
    build: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # variables while it is installed

    @property
    def folder(self) -> Path:
        return self.cache / "environments" / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def log(self) -> Path:
        return self.cache / "logs" / f"set-up-{self.name}.log"

    def is_ready(self) -> bool:
        """Whether it is complete and made from the requirements of now."""
        stamp = self.folder / STAMP
        return stamp.exists() and stamp.read_text() == self._digest()

    def prepare(self, say: Callable[[str], None]) -> None:
        """Make it unless it is ready. Takes minutes. Raises SetupFailedError."""
        if self.is_ready():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        say(f"{self.name}: making the environment (output in {self.log})")
        self._call(sys.executable, "-m", "venv", str(self.folder))
        requirements = self._requirements()
        torch = [line for line in requirements.splitlines() if line.startswith("torch==")]
        pip = (str(self.python), "-m", "pip", "install", "--disable-pip-version-check")
        for pinned in torch:
            say(f"{self.name}: installing {pinned}")
            self._call(*pip, pinned)
        say(f"{self.name}: installing all else" + (", compiling for minutes" if self.build else ""))
        self._call(*pip, "--no-deps", "-r", str(self._requirements_path))
        (self.folder / STAMP).write_text(self._digest())
        say(f"{self.name}: ready")

    def run(self, *arguments: str, label: str) -> None:
        """Run a program of this repository in the environment, to its end. Raises SetupFailedError."""
        try:
            self._call(str(self.python), *arguments)
        except SetupFailedError as error:
            raise SetupFailedError(f"{label}: {error}") from error

    @property
    def _requirements_path(self) -> Path:
        return REQUIREMENTS / f"{self.name}.txt"

    def _requirements(self) -> str:
        return self._requirements_path.read_text()

    def _digest(self) -> str:
        text = f"{self._requirements()}\n{sorted(self.build.items())}\n{sys.version}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _call(self, *command: str) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, **self.build, "PYTHONPATH": ""}
        with self.log.open("a") as log:
            status = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, env=variables, check=False).returncode
        if status:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-TAIL_LINES:]
            raise SetupFailedError(f"exit status {status}, see {self.log}: {' | '.join(tail)}")


def base_variables() -> dict[str, str]:
    """What every engine's process inherits: enough to run, nothing that tunes it."""
    return {name: os.environ[name] for name in INHERITED if name in os.environ}
