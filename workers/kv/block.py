"""A prefix as a block of bytes: the keys and values of its pages, under a label that says whose they are.

A block is immutable and stands for itself, in a file or in any other memory that processes share:

    head     magic, version, length of the head, checksum of the head; the label; zeros up to a multiple of 4096 bytes
    payload  the pages as the store of the label's layout gives them away

Numbers are in native byte order: blocks pass between processes that share memory or run the same build.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Final, Protocol

from protos.blocks import TOKEN_BYTES, block_hashes

PAYLOAD_ALIGNMENT: Final = 4096  # bytes: a page of memory, so that a mapped block is used where it lies

_MAGIC: Final = b"headwatr"
_VERSION: Final = 1
_START: Final = struct.Struct("=8sIII")  # magic, version, bytes of the head, checksum of the rest of the head
_LABEL: Final = struct.Struct("=QQQQIHH")  # name, tokens, pages, bytes and checksum of the payload, bytes of two texts


class BadBlock(Exception):
    """A block cannot be used; whoever wanted it computes the prefix. Never shown to a user."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class BlockLabel:
    """Whose keys and values a block holds. Blocks of equal labels hold the same."""

    layout: str  # PageLayout.fingerprint
    model: str  # weights_fingerprint
    name: int  # of the prefix's last page, as protos/blocks.py names it: it follows from all tokens and from the salt
    tokens: bytes  # of the whole prefix: C ints, one after another
    num_pages: int

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    def check_equal(self, found: BlockLabel) -> None:
        """Raises BadBlock, which names what differs, unless this is what was found."""
        for field in fields(self):
            wanted, actual = getattr(self, field.name), getattr(found, field.name)
            if wanted != actual:
                told = "" if field.name == "tokens" else f": {actual!r} in place of {wanted!r}"
                raise BadBlock(f"the block has another {field.name}{told}")


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """What the blocks of one engine have in common: who agrees in it may exchange them."""

    layout: str  # PageLayout.fingerprint
    model: str  # weights_fingerprint
    page_size: int  # tokens
    page_bytes: int

    def label(self, salt: str, token_ids: Sequence[int]) -> BlockLabel:
        """Of the block that holds a prefix of whole pages, at least one."""
        names = block_hashes(salt, token_ids, self.page_size)
        assert names, "a block without a page"
        assert len(names) * self.page_size == len(token_ids), f"{len(token_ids)} tokens are not whole pages"
        return BlockLabel(self.layout, self.model, names[-1], array("i", token_ids).tobytes(), len(names))


@dataclass(frozen=True, slots=True)
class Block:
    """A block whose every byte has been checked."""

    label: BlockLabel
    payload: memoryview  # of bytes, begins at a multiple of PAYLOAD_ALIGNMENT from the block's begin

    @classmethod
    def parse(cls, data: memoryview, expected: BlockLabel) -> Block:
        """The block that is all of `data`, of any memory; the payload is a view of it.

        Raises BadBlock if it is damaged, of another version, or not what is expected. Reads everything once, for the
        checksum: with a zlib that uses the processor's carry-less products, 7 GB/s.
        """
        head = _Head.read(data)
        expected.check_equal(head.label)
        payload = data[head.num_bytes :]
        if payload.nbytes != head.payload_bytes:
            raise BadBlock(f"the block has {payload.nbytes} bytes of payload; its head says {head.payload_bytes}")
        if zlib.crc32(payload) != head.checksum:
            raise BadBlock("the payload does not have its checksum")
        return cls(head.label, payload)


class HeldBlock(Protocol):
    """A checked block in memory that stays until its owner closes it."""

    @property
    def label(self) -> BlockLabel:
        """What it holds."""

    @property
    def payload(self) -> memoryview:
        """The pages; to be read only."""

    def close(self) -> None:
        """Let the memory go. Raises BufferError while the payload is in use somewhere."""


class BlockMemory:
    """A HeldBlock in memory that somebody has handed over, such as an array."""

    def __init__(self, data: memoryview, expected: BlockLabel) -> None:
        """Checks all of it. Raises BadBlock."""
        self._block = Block.parse(data, expected)

    @property
    def label(self) -> BlockLabel:
        return self._block.label

    @property
    def payload(self) -> memoryview:
        return self._block.payload

    def close(self) -> None:
        self._block.payload.release()


class Packing:
    """A new block that is being made: its payload is written piece by piece where it is to lie, then it is sealed."""

    def __init__(self, label: BlockLabel, payload_bytes: int) -> None:
        self.label = label
        self._content = _Head.content_of(label)
        self._num_bytes = _round_up(_START.size + len(self._content) + _LABEL.size)
        self._data = memoryview(bytearray(self._num_bytes + payload_bytes))

    @property
    def payload(self) -> memoryview:
        """To be written (see Model.export_pages)."""
        return self._data[self._num_bytes :]

    def seal(self) -> memoryview:
        """The packed block. Reads all of the payload once, for the checksum."""
        payload = self.payload
        head = _Head(self.label, self._num_bytes, payload.nbytes, zlib.crc32(payload))
        head.write(self._data, self._content)
        return self._data.toreadonly()


def pack(label: BlockLabel, payload_bytes: int, fill: Callable[[memoryview], None]) -> memoryview:
    """A new block; `fill` writes its payload where it is to lie (see Model.export_pages)."""
    packing = Packing(label, payload_bytes)
    fill(packing.payload)
    return packing.seal()


def read_label(data: memoryview) -> BlockLabel:
    """What a block says it holds, if its head is whole; the payload is not looked at. Raises BadBlock."""
    return _Head.read(data).label


@dataclass(frozen=True, slots=True)
class _Head:
    """All that stands before the payload."""

    label: BlockLabel
    num_bytes: int
    payload_bytes: int
    checksum: int  # of the payload

    @classmethod
    def read(cls, data: memoryview) -> _Head:
        num_bytes = _checked_length(data)
        name, num_tokens, num_pages, payload_bytes, checksum, layout_bytes, model_bytes = _LABEL.unpack_from(
            data, _START.size
        )
        start = _START.size + _LABEL.size
        layout, start = bytes(data[start : start + layout_bytes]), start + layout_bytes
        model, start = bytes(data[start : start + model_bytes]), start + model_bytes
        tokens = bytes(data[start : start + num_tokens * TOKEN_BYTES])
        label = BlockLabel(layout.decode(), model.decode(), name, tokens, num_pages)
        return cls(label, num_bytes, payload_bytes, checksum)

    @staticmethod
    def content_of(label: BlockLabel) -> bytes:
        """The label's parts of no fixed length."""
        return label.layout.encode() + label.model.encode() + label.tokens

    def write(self, data: memoryview, content: bytes) -> None:
        label = self.label
        texts = (len(label.layout.encode()), len(label.model.encode()))
        numbers = (label.name, label.num_tokens, label.num_pages, self.payload_bytes, self.checksum, *texts)
        _LABEL.pack_into(data, _START.size, *numbers)
        start = _START.size + _LABEL.size
        data[start : start + len(content)] = content
        checksum = zlib.crc32(data[_START.size : self.num_bytes])
        _START.pack_into(data, 0, _MAGIC, _VERSION, self.num_bytes, checksum)


def _checked_length(data: memoryview) -> int:
    """The bytes of a head that is as it was written."""
    if data.nbytes < _START.size + _LABEL.size:
        raise BadBlock(f"the block is truncated: {data.nbytes} bytes")
    magic, version, num_bytes, checksum = _START.unpack_from(data)
    if magic != _MAGIC:
        raise BadBlock(f"not a block: it begins with {magic!r}")
    if version != _VERSION:
        raise BadBlock(f"the block is of version {version}; this program knows {_VERSION}")
    if not 0 < num_bytes <= data.nbytes or num_bytes % PAYLOAD_ALIGNMENT:
        raise BadBlock(f"the block is truncated: {data.nbytes} bytes; its head alone has {num_bytes}")
    if zlib.crc32(data[_START.size : num_bytes]) != checksum:
        raise BadBlock("the head does not have its checksum")
    return int(num_bytes)


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // PAYLOAD_ALIGNMENT) * PAYLOAD_ALIGNMENT
