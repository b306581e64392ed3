"""Block files: whole or not there, shared while they are mapped, and whatever happens to their names meanwhile."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.workers.kv.blocks import LABEL, OTHER_LABELS, PAYLOAD, packed
from workers.kv import block_file
from workers.kv.block import PAYLOAD_ALIGNMENT, BadBlock, BlockLabel
from workers.kv.block_file import BlockFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    block_file.write(tmp_path / "block", packed())
    return tmp_path / "block"


def test_what_is_written_is_mapped(path: Path) -> None:
    with BlockFile.open(path, LABEL) as file:
        assert file.label == LABEL
        assert file.payload == PAYLOAD
        assert file.payload.readonly
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(("field", "label"), OTHER_LABELS)
def test_a_file_of_another_label(path: Path, field: str, label: BlockLabel) -> None:
    with pytest.raises(BadBlock, match=f"another {field}"):
        BlockFile.open(path, label)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, PAYLOAD_ALIGNMENT + len(PAYLOAD) - 1), flipped=st.integers(1, 255))
def test_a_file_with_a_changed_byte(path: Path, place: int, flipped: int) -> None:
    data = bytearray(packed())
    data[place] ^= flipped
    path.write_bytes(data)
    with pytest.raises(BadBlock):
        BlockFile.open(path, LABEL)


@pytest.mark.parametrize("length", [0, 100, PAYLOAD_ALIGNMENT, PAYLOAD_ALIGNMENT + len(PAYLOAD) - 1])
def test_a_truncated_file(path: Path, length: int) -> None:
    os.truncate(path, length)
    with pytest.raises(BadBlock):
        BlockFile.open(path, LABEL)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadBlock, match="cannot be mapped"):
        BlockFile.open(tmp_path / "block", LABEL)


def test_a_file_stays_while_it_is_mapped(path: Path) -> None:
    """Replaced by another, and unlinked."""
    _, label = OTHER_LABELS[0]
    with BlockFile.open(path, LABEL) as old:
        block_file.write(path, packed(label, b"others"))
        with BlockFile.open(path, label) as new:
            path.unlink()
            assert old.payload == PAYLOAD
            assert new.payload == b"others"


MAP_AND_WAIT = """
import sys
from pathlib import Path
from tests.workers.kv.blocks import LABEL, PAYLOAD
from workers.kv.block_file import BlockFile
file = BlockFile.open(Path(sys.argv[1]), LABEL)
print("mapped", flush=True)
sys.stdin.readline()
print(file.payload == PAYLOAD, flush=True)
"""


def test_another_process_keeps_what_its_writer_has_unlinked(path: Path) -> None:
    command = [sys.executable, "-c", MAP_AND_WAIT, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        path.unlink()
        assert process.communicate("go on\n")[0] == "True\n"


def test_memory_is_shared_not_copied(path: Path) -> None:
    """Both mappings show what a third one, which is allowed to, writes."""
    with BlockFile.open(path, LABEL) as first, BlockFile.open(path, LABEL) as second, path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0) as memory:
            memory[-1] ^= 0xFF
        assert first.payload[-1] == second.payload[-1] == PAYLOAD[-1] ^ 0xFF


def test_a_file_in_use_cannot_be_closed(path: Path) -> None:
    file = BlockFile.open(path, LABEL)
    whole, part = memoryview(file.payload), file.payload[:10]
    for view in (whole, part):
        with pytest.raises(BufferError):
            file.close()
        assert view == PAYLOAD[: len(view)]
        view.release()
    file.close()
    file.close()


def test_a_write_that_fails_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        block_file.write(path, packed(payload=b"others"))
    assert [*path.parent.iterdir()] == [path]
    with BlockFile.open(path, LABEL) as file:
        assert file.payload == PAYLOAD


def test_a_file_appears_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then it has another name, that of a partial one."""
    found: list[list[str]] = []
    replace = os.replace

    def noted(source: str, target: Path) -> None:
        found.append([path.suffix for path in tmp_path.iterdir()])
        assert Path(source).stat().st_size == PAYLOAD_ALIGNMENT + len(PAYLOAD)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    block_file.write(tmp_path / "block", packed())
    assert found == [[block_file.PARTIAL_SUFFIX]]
    assert (tmp_path / "block").exists()
