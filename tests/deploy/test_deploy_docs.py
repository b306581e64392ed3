"""The commands that the docs show are commands that exist, with those options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from cluster.commands.deploy import deploy

DOCS = Path(__file__).parents[2] / "docs"
LINES = sorted(
    {
        line
        for page in DOCS.glob("deploy*.md")
        for line in re.findall(r"^ +headwater deploy (.+)$", page.read_text(), re.M)
    }
)


def test_every_command_is_shown() -> None:
    assert {line.split()[0] for line in LINES} == {*get_command(deploy).commands}  # type: ignore[attr-defined]


@pytest.mark.parametrize("line", LINES)
def test_each_is_understood(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)
    command = get_command(deploy).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)
