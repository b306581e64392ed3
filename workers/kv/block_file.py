"""A block in a file: one worker writes it, the others on its machine map it and use the same memory.

A file never changes: it is written under another name, and appears under its own when it is whole. So it needs no
locks: whoever has opened it may use it for as long as it likes, also after somebody has replaced or unlinked it. The
system frees its memory when the last one that has it mapped is gone, killed ones included. A file must never be
truncated or written to in place: a process that reads pages which are gone is killed by the system (SIGBUS).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from workers.kv.block import BadBlock, Block, BlockLabel

PARTIAL_SUFFIX: Final = ".partial"  # of a file being written; after a crash it may stay, and is nobody's


def write(path: Path, packed: memoryview) -> None:
    """Make `path` the file of a packed block, at once and as a whole; one that is there already is replaced.

    Raises OSError, for example where the disk is full, and leaves nothing behind. The file is not forced to the disk:
    after a power cut it may be damaged, which whoever opens it finds out.
    """
    handle, partial = tempfile.mkstemp(PARTIAL_SUFFIX, f".{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(packed)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


class BlockFile:
    """A block file that is mapped, to be read only. Closed by its owner."""

    def __init__(self, memory: mmap.mmap, block: Block) -> None:
        self._memory = memory
        self._block = block

    @classmethod
    def open(cls, path: Path, expected: BlockLabel) -> Self:
        """Map a file and check all of it. Raises BadBlock if it is missing, damaged, or not what is expected."""
        memory = _map(path)
        return cls(memory, Block.parse(memoryview(memory), expected))

    @property
    def label(self) -> BlockLabel:
        return self._block.label

    @property
    def payload(self) -> memoryview:
        """The pages, in memory that all who have the file mapped share."""
        return self._block.payload

    def close(self) -> None:
        """Unmap the file. Raises BufferError while its payload is in use somewhere, for example mapped into a model."""
        self._block.payload.release()
        self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise BadBlock(f"{path} cannot be mapped: {error}") from error
