"""Every command and snippet of the README works as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
ADDRESS = "127.0.0.1:9000"  # what the README says; the test's cluster listens elsewhere


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Shell lines that end by themselves; `serve` has a test of its own, and `make` is what runs this one."""
    lines = [line.partition("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith(".venv/bin/headwater") and " serve " not in line]


def test_the_readme_has_what_this_file_runs() -> None:
    assert len(commands()) >= 4
    assert len(blocks("python")) == 1
    assert "make serve" in blocks("sh")[0]
    assert "make test" in blocks("sh")[0]


@pytest.mark.parametrize("command", commands())
def test_commands(command: str, target: str, root: Path) -> None:
    command = command.replace(".venv/bin/headwater", str(Path(sys.executable).with_name("headwater")))
    environment = {**os.environ, "HEADWATER_TARGET": target}
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=root, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_python_snippet(target: str, root: Path) -> None:
    [snippet] = blocks("python")
    assert ADDRESS in snippet
    result = subprocess.run(
        [sys.executable, "-c", snippet.replace(ADDRESS, target)], capture_output=True, text=True, timeout=120, cwd=root
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
