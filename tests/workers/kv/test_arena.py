"""The arena: bounded, private, known by its id, and empty when its workers are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.workers.kv.blocks import LABEL, PAYLOAD, packed
from workers.kv.arena import Arena, ArenaUnusable
from workers.kv.block_file import BlockFile

SIZE = packed().nbytes


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "shared" / "headwater"


@pytest.fixture
def arena(directory: Path) -> Iterator[Arena]:
    with_room = Arena.open(directory, max_bytes=3 * SIZE)
    yield with_room
    with_room.close()


def folders(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_dir())


def opened(arena: Arena, path: str | None) -> BlockFile:
    assert path is not None
    file = arena.resolve(path)
    assert file is not None
    return BlockFile.open(file, LABEL)


def test_what_one_leaves_another_opens(arena: Arena, directory: Path) -> None:
    other = Arena.open(directory, max_bytes=SIZE)
    path = arena.publish("a", packed())
    assert path == arena.find("a")
    assert other.find("a") is None
    with opened(other, path) as file:
        assert file.payload == PAYLOAD
    other.close()


def test_nobody_else_can_look_in(arena: Arena, directory: Path) -> None:
    arena.publish("a", packed())
    assert directory.stat().st_mode & 0o777 == 0o700
    for path in directory.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_the_least_recently_used_block_goes_first(arena: Arena, directory: Path) -> None:
    paths = {name: arena.publish(name, packed()) for name in "abc"}
    arena.find("a")
    with opened(arena, paths["b"]) as held:
        arena.publish("d", packed())
        assert [name for name in "abcd" if arena.find(name)] == ["a", "c", "d"]
        assert held.payload == PAYLOAD
    assert arena.num_bytes == 3 * SIZE
    files = [path for path in folders(directory)[0].iterdir() if path.name != "lock"]
    assert sum(path.stat().st_size for path in files) == 3 * SIZE


def test_a_block_that_is_replaced_counts_once(arena: Arena) -> None:
    arena.publish("a", packed())
    arena.publish("a", packed())
    assert arena.num_bytes == SIZE


def test_a_block_larger_than_all_changes_nothing(arena: Arena) -> None:
    arena.publish("a", packed())
    assert arena.publish("b", packed(payload=bytes(3 * SIZE))) is None
    assert arena.find("a")
    assert arena.num_bytes == SIZE


def test_a_block_that_cannot_be_written_counts_nothing(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert arena.publish("a", packed()) is None
    assert (arena.find("a"), arena.num_bytes) == (None, 0)


def test_many_threads_stay_within_the_bound(arena: Arena) -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda number: arena.publish(str(number % 7), packed()), range(60)))
    assert arena.num_bytes <= 3 * SIZE
    assert arena.num_bytes == SIZE * sum(arena.find(str(number)) is not None for number in range(7))


@pytest.mark.parametrize("path", ["", "id", "worker-x", "worker-x/", "../etc/passwd", "worker-x/../id", "worker-x/.a"])
def test_paths_lead_into_folders_of_workers_only(arena: Arena, path: str) -> None:
    assert arena.resolve(path) is None


def test_the_id_is_the_same_for_all_and_made_once(directory: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        arenas = list(threads.map(lambda _: Arena.open(directory, max_bytes=1), range(8)))
    other = Arena.open(tmp_path / "other", max_bytes=1)
    assert len({arena.arena_id for arena in arenas}) == 1
    assert other.arena_id != arenas[0].arena_id
    assert len(folders(directory)) == 8
    for arena in [*arenas, other]:
        arena.close()
    assert folders(directory) == []


def test_closing_removes_the_folder_and_can_be_done_twice(directory: Path) -> None:
    arena = Arena.open(directory, max_bytes=SIZE)
    arena.publish("a", packed())
    arena.close()
    arena.close()
    assert folders(directory) == []
    assert arena.publish("a", packed()) is None
    assert (arena.find("a"), arena.num_bytes) == (None, 0)


PUBLISH_AND_WAIT = """
import sys, time
from pathlib import Path
from tests.workers.kv.blocks import packed
from workers.kv.arena import Arena
arena = Arena.open(Path(sys.argv[1]), max_bytes=1 << 20)
print(arena.publish("a", packed()), flush=True)
time.sleep(600)
"""


def test_the_memory_of_a_killed_worker_is_freed_by_the_next(directory: Path) -> None:
    command = [sys.executable, "-c", PUBLISH_AND_WAIT, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        living = Arena.open(directory, max_bytes=SIZE)
        file = opened(living, path)  # the living one's folder stays
        process.send_signal(signal.SIGKILL)
    assert len(folders(directory)) == 2
    after = Arena.open(directory, max_bytes=SIZE)
    assert len(folders(directory)) == 2
    with pytest.raises(Exception, match="cannot be mapped"):
        opened(living, path)
    assert file.payload == PAYLOAD, "who has it mapped keeps it"
    file.close()
    living.close()
    after.close()


def test_a_folder_of_somebody_else_is_not_used(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Arena.open(directory, max_bytes=1).close()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ArenaUnusable, match="not this user's folder"):
        Arena.open(directory, max_bytes=1)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ArenaUnusable):
        Arena.open(tmp_path / "link", max_bytes=1)


def test_too_little_memory_is_found_at_once(directory: Path) -> None:
    with pytest.raises(ArenaUnusable, match="bytes free"):
        Arena.open(directory, max_bytes=1 << 60)
    assert folders(directory) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArenaUnusable, match="cannot be used"):
        Arena.open(tmp_path / "file" / "headwater", max_bytes=1)
