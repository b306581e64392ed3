"""Memory in which a prefix goes from the engine's process to vLLM's, or the other way.

It is no file of any folder: vLLM's processes open it through the engine's table of open files, nothing is left behind
when one of them is killed, and a container's limit on its shared folder does not count. The number of a file that has
been closed may be given to another one, so whoever opens it looks for a secret at its begin before using anything.

    head     secret; what became of it; zeros up to 4096 bytes
    payload  the pages, as in a block
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final, Self

HEAD_BYTES: Final = 4096
SECRET_BYTES: Final = 16


class Outcome(IntEnum):
    """What vLLM's processes say of a handover."""

    OPEN = 0  # nothing yet
    COPIED = 1
    ABSENT = 2  # to be exported, but not all of it is cached
    PRESENT = 3  # to be imported, but all of it is cached


class BadHandover(Exception):
    """There is no such handover, or not any more. Never shown to a user."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Ticket:
    """Where a handover is, and how to recognise it."""

    path: str
    secret: str  # hexadecimal
    num_bytes: int  # of the payload

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Self:
        """From what has travelled beside a request. Raises KeyError, TypeError or ValueError."""
        path, secret, num_bytes = found["path"], found["secret"], found["num_bytes"]
        if not isinstance(path, str) or not isinstance(num_bytes, int) or len(bytes.fromhex(secret)) != SECRET_BYTES:
            raise ValueError(f"{path!r} of {num_bytes!r} bytes is no handover")
        return cls(path, secret, num_bytes)

    def to_dict(self) -> dict[str, Any]:
        return {"path": self.path, "secret": self.secret, "num_bytes": self.num_bytes}

    def open(self) -> Sheet:
        """The handover; its memory goes when nothing refers to it any more. Raises BadHandover."""
        memory = _mapped(self.path, HEAD_BYTES + self.num_bytes)
        if memory[:SECRET_BYTES] != bytes.fromhex(self.secret):
            raise BadHandover(f"{self.path} is something else by now")
        return Sheet(memory)


class Sheet:
    """The memory of a handover, as one process has it mapped."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    @property
    def outcome(self) -> Outcome:
        return Outcome(self._memory[SECRET_BYTES])

    @outcome.setter
    def outcome(self, outcome: Outcome) -> None:
        self._memory[SECRET_BYTES] = outcome

    @property
    def payload(self) -> memoryview:
        """The pages."""
        return memoryview(self._memory)[HEAD_BYTES:]


class Handover(Sheet):
    """A handover that this process has begun, and closes."""

    def __init__(self, num_bytes: int) -> None:
        """Takes the memory at once, which is not bounded here. Raises OSError where the system has none to give."""
        self._file = os.memfd_create("headwater-prefix")
        try:
            os.posix_fallocate(self._file, 0, HEAD_BYTES + num_bytes)  # now: later it would end the process
            super().__init__(mmap.mmap(self._file, HEAD_BYTES + num_bytes))
        except BaseException:
            os.close(self._file)
            raise
        secret = secrets.token_bytes(SECRET_BYTES)
        self._memory[:SECRET_BYTES] = secret
        self.ticket = Ticket(f"/proc/{os.getpid()}/fd/{self._file}", secret.hex(), num_bytes)

    def close(self) -> None:
        """Give the memory back, of which nothing may be in use here. Idempotent."""
        if not self._memory.closed:
            self._memory.close()
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mapped(path: str, num_bytes: int) -> mmap.mmap:
    """All of a file that has just so many bytes: of a shorter one, looking at its end would end the process."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            found = os.fstat(file).st_size
            if found != num_bytes:
                raise BadHandover(f"{path} has {found} bytes in place of {num_bytes}")
            return mmap.mmap(file, num_bytes)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        raise BadHandover(f"{path} cannot be opened: {error}") from error
