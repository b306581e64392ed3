"""The arena: a folder in shared memory where the workers of a machine leave blocks for each other.

Every worker has a folder of its own in it, holds its lock for as long as it lives, and alone writes there; the others
open what is in it. The system lets the lock of a killed worker go, so whoever comes next finds and removes its folder:
the memory of blocks does not outlive their workers for long.

The arena has an id, made once. Workers that read the same id see the same files, whatever the folder is called in the
container of each.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import stat
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from workers.kv import block_file

log = logging.getLogger(__name__)

_ID: Final = "id"
_GATE: Final = "gate"  # locked by whoever makes or removes folders
_LOCK: Final = "lock"  # of each folder
_FOLDER_PREFIX: Final = "worker-"
_FOLDER_MODE: Final = 0o700
_FILE_MODE: Final = 0o600


class ArenaUnusable(Exception):
    """There can be no arena here; its worker goes on without. Never shown to a user."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Arena:
    """One worker's folder in the arena, and its blocks by name, the least recently used first. Safe from any thread."""

    def __init__(self, directory: Path, folder: Path, lock: int, *, arena_id: str, max_bytes: int) -> None:
        self.arena_id = arena_id
        self._directory = directory
        self._folder = folder
        self._lock = lock  # descriptor
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._num_bytes = 0
        self._mutex = threading.Lock()

    @classmethod
    def open(cls, directory: Path, *, max_bytes: int) -> Self:
        """A new folder in the arena, which is made if need be; folders of the dead go. Raises ArenaUnusable."""
        try:
            _check_directory(directory)
            arena_id = _read_id(directory)
            with _locked(directory / _GATE):
                _remove_dead(directory)
                _check_room(directory, max_bytes)
                folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=directory))
                lock = _open(folder / _LOCK)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArenaUnusable(f"{directory} cannot be used: {error}") from error
        return cls(directory, folder, lock, arena_id=arena_id, max_bytes=max_bytes)

    @property
    def num_bytes(self) -> int:
        """Of all blocks in this worker's folder."""
        return self._num_bytes

    def find(self, name: str) -> str | None:
        """Where in the arena this worker's block of that name is; it is used now."""
        with self._mutex:
            if name not in self._sizes:
                return None
            self._sizes.move_to_end(name)
            return f"{self._folder.name}/{name}"

    def publish(self, name: str, packed: memoryview) -> str | None:
        """Leave a block for the others; returns where in the arena it is, None if there is no room for it.

        Blocks that have not been used for the longest go first. Who has one mapped keeps it.
        """
        if not self._reserve(packed.nbytes):
            return None
        try:
            _check_room(self._directory, packed.nbytes)
            block_file.write(self._folder / name, packed)
        except (OSError, ArenaUnusable) as error:
            log.info("a block of %d bytes stays out of the arena: %s", packed.nbytes, error)
            with self._mutex:
                self._num_bytes -= packed.nbytes
            return None
        with self._mutex:
            self._num_bytes -= self._sizes.pop(name, 0)  # it has been replaced
            self._sizes[name] = packed.nbytes
        return f"{self._folder.name}/{name}"

    def resolve(self, path: str) -> Path | None:
        """The file that another worker says is in the arena; None for what would be outside."""
        folder, _, name = path.partition("/")
        if not folder.startswith(_FOLDER_PREFIX) or not name or "/" in name or name.startswith("."):
            return None
        return self._directory / folder / name

    def close(self) -> None:
        """Remove this worker's folder. Idempotent."""
        with self._mutex:
            if self._lock < 0:
                return
            with contextlib.suppress(FileNotFoundError), _locked(self._directory / _GATE):  # unless all of it is gone
                shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
            self._lock, self._num_bytes = -1, 0
            self._sizes.clear()

    def _reserve(self, num_bytes: int) -> bool:
        """Count a block that is about to be written, at the expense of others."""
        with self._mutex:
            while self._num_bytes + num_bytes > self._max_bytes:
                if not self._sizes or num_bytes > self._max_bytes:
                    return False
                name, size = self._sizes.popitem(last=False)
                self._num_bytes -= size
                (self._folder / name).unlink(missing_ok=True)
            self._num_bytes += num_bytes
            return True


def _check_directory(directory: Path) -> None:
    """Make the folder, for nobody else; raises ArenaUnusable for one that somebody else has prepared."""
    directory.mkdir(_FOLDER_MODE, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise ArenaUnusable(f"{directory} is not this user's folder")
    if stat.S_IMODE(found.st_mode) != _FOLDER_MODE:
        directory.chmod(_FOLDER_MODE)


def _check_room(directory: Path, num_bytes: int) -> None:
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if free < num_bytes:
        raise ArenaUnusable(f"{directory} has {free} bytes free, fewer than {num_bytes}")


def _read_id(directory: Path) -> str:
    """The arena's id. Whoever comes first makes it, as a whole: a link appears at once, and only one can."""
    path = directory / _ID
    if not path.exists():
        handle, partial = tempfile.mkstemp(block_file.PARTIAL_SUFFIX, ".", directory)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(16))
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
        os.unlink(partial)
    return path.read_text(encoding="ascii")


def _remove_dead(directory: Path) -> None:
    """Remove the folders that nobody holds. The gate is locked: no folder is being made."""
    for folder in directory.glob(f"{_FOLDER_PREFIX}*"):
        lock = _open(folder / _LOCK)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            log.info("%s is of a worker that is gone; removed", folder)
            shutil.rmtree(folder)
        finally:
            os.close(lock)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = _open(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, _FILE_MODE)
