"""The Dockerfile says what the rest of the project says; building it takes a registry, and is done by hand."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def dockerfile(root: Path) -> str:
    return (root / "deploy" / "docker" / "Dockerfile").read_text()


@pytest.fixture(scope="session")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_versions_are_those_of_the_project(dockerfile: str, project: dict[str, Any]) -> None:
    pinned = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["dev"]
    versions = dict(one.split("==") for one in pinned if "==" in one)
    found = re.findall(r"\b(torch|grpcio-tools)==([\w.]+)", dockerfile)
    assert len(found) == 4
    assert {name for name, version in found if versions[name] != version} == set()


def test_every_package_goes_in(root: Path, dockerfile: str, project: dict[str, Any]) -> None:
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    copied = set(re.findall(r"^COPY (\w+) \1$", dockerfile, re.MULTILINE))
    allowed = (root / "deploy" / "docker" / "Dockerfile.dockerignore").read_text()
    assert copied == packages
    assert {name for name in packages if f"!{name}\n" not in allowed} == set()


def test_the_last_stages_are_the_targets_that_are_told(dockerfile: str) -> None:
    told = re.findall(r"--target (\S+)", dockerfile)
    stages = re.findall(r"^FROM runtime AS (\S+)$", dockerfile, re.MULTILINE)
    assert sorted(stages) == sorted(told)
    assert re.findall(r"^USER (\d+):", dockerfile, re.MULTILINE) == ["10001"]
