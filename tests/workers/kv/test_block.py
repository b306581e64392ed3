"""Blocks: what is packed is parsed, and whatever is not as it was packed is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.kv.blocks import LABEL, OTHER_LABELS, PAYLOAD, packed
from workers.kv.block import PAYLOAD_ALIGNMENT, BadBlock, Block, BlockLabel, pack, read_label


def test_a_block_is_parsed_where_it_lies() -> None:
    data = np.frombuffer(packed(), dtype=np.uint8)  # as a store of objects hands it out
    block = Block.parse(memoryview(data), LABEL)
    assert block.label == LABEL
    assert block.payload == PAYLOAD
    assert block.payload.readonly
    assert np.frombuffer(block.payload, dtype=np.uint8).ctypes.data == data.ctypes.data + PAYLOAD_ALIGNMENT


@settings(deadline=None)
@given(
    layout=st.text(max_size=50),
    model=st.text(max_size=50),
    name=st.integers(0, 2**64 - 1),
    num_tokens=st.integers(0, 3000),
    num_pages=st.integers(0, 2**40),
    payload=st.binary(max_size=100),
)
def test_any_label_and_payload_come_back(
    layout: str, model: str, name: int, num_tokens: int, num_pages: int, payload: bytes
) -> None:
    tokens = bytes(index % 256 for index in range(4 * num_tokens))
    label = BlockLabel(layout, model, name, tokens, num_pages)
    data = packed(label, payload)
    assert read_label(data) == label
    assert (len(data) - len(payload)) % PAYLOAD_ALIGNMENT == 0
    assert Block.parse(data, label).payload == payload


def test_the_tokens_are_counted() -> None:
    assert LABEL.num_tokens == 64


def test_the_payload_is_filled_in_place() -> None:
    seen: list[memoryview] = []
    data = pack(LABEL, 10, seen.append)
    assert seen[0].nbytes == 10
    assert not seen[0].readonly
    assert Block.parse(data, LABEL).payload == bytes(10)


@pytest.mark.parametrize(("field", "label"), OTHER_LABELS)
def test_a_block_of_another_label(field: str, label: BlockLabel) -> None:
    with pytest.raises(BadBlock, match=f"another {field}"):
        Block.parse(packed(), label)
    assert Block.parse(packed(label), label).label == label


@settings(deadline=None)
@given(place=st.integers(0, PAYLOAD_ALIGNMENT + len(PAYLOAD) - 1), flipped=st.integers(1, 255))
def test_a_changed_byte_anywhere(place: int, flipped: int) -> None:
    data = bytearray(packed())
    data[place] ^= flipped
    with pytest.raises(BadBlock):
        Block.parse(memoryview(data), LABEL)


@pytest.mark.parametrize("length", [0, 1, 19, 20, 50, 500, 4095, 4096, 4097, 4096 + len(PAYLOAD) - 1])
def test_a_truncated_block(length: int) -> None:
    with pytest.raises(BadBlock, match=r"truncated|bytes of payload"):
        Block.parse(packed()[:length], LABEL)


def test_a_block_with_something_behind_it() -> None:
    with pytest.raises(BadBlock, match="5001 bytes of payload; its head says 5000"):
        Block.parse(memoryview(bytes(packed()) + b"x"), LABEL)


def test_something_else() -> None:
    with pytest.raises(BadBlock, match="not a block"):
        Block.parse(memoryview(b"safetensors" * 1000), LABEL)


@pytest.mark.parametrize(
    ("place", "number", "complaint"), [(8, 2, "version 2"), (12, 0, "truncated"), (12, 9, "trunc")]
)
def test_numbers_at_the_begin_that_cannot_be(place: int, number: int, complaint: str) -> None:
    data = bytearray(packed())
    struct.pack_into("=I", data, place, number)
    with pytest.raises(BadBlock, match=complaint):
        Block.parse(memoryview(data), LABEL)


def test_a_label_is_read_without_the_payload() -> None:
    data = bytearray(packed())
    data[-1] ^= 1
    assert read_label(memoryview(data)) == LABEL
    data[100] ^= 1
    with pytest.raises(BadBlock, match="head does not have its checksum"):
        read_label(memoryview(data))
