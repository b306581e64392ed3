"""Channels: every frame arrives whole and in order, or the channel closes; nothing waits."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from tests.workers.speculative.pool.ends import until
from workers.speculative.pool import channel as module
from workers.speculative.pool.channel import LENGTH, MAX_FRAME_BYTES, MAX_UNSENT_BYTES, Channel, wait_for_any


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        channel = Channel.connect(f"127.0.0.1:{listener.getsockname()[1]}")
        raw, _ = listener.accept()
    raw.settimeout(10)
    with raw, contextlib.closing(channel):
        yield channel, raw


def framed(*frames: bytes) -> bytes:
    return b"".join(LENGTH.pack(len(frame)) + frame for frame in frames)


def receive(channel: Channel, count: int) -> list[bytes]:
    frames: list[bytes] = []

    def has_all() -> bool:
        frames.extend(channel.receive())
        return len(frames) >= count

    until(has_all, f"{count} frames")
    return frames


def await_end(channel: Channel) -> list[bytes]:
    frames: list[bytes] = []

    def is_closed() -> bool:
        frames.extend(channel.receive())
        return not channel.is_open

    until(is_closed, "the channel's end")
    return frames


def exactly(raw: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += raw.recv(count - len(data))
    return data


def test_a_frame_arrives_whole(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    raw.sendall(framed(b"one frame"))
    assert receive(channel, 1) == [b"one frame"]
    assert channel.receive() == []
    channel.send(b"an answer")
    assert exactly(raw, 13) == framed(b"an answer")
    assert channel.is_open
    assert not channel.has_unsent


def test_a_frame_in_pieces_is_kept_until_it_is_whole(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    frames = [b"a", b"", b"longer than the others"]
    received: list[bytes] = []
    for byte in framed(*frames):
        raw.sendall(bytes([byte]))
        received += channel.receive()
    received += receive(channel, 3 - len(received))
    assert received == frames


def test_many_frames_at_once_come_in_order(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    frames = [bytes([number % 256]) * (number % 50) for number in range(2000)]
    raw.sendall(framed(*frames))
    assert receive(channel, len(frames)) == frames


def test_what_the_other_side_does_not_take_at_once_is_sent_later(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    largest = bytes(range(256)) * (MAX_FRAME_BYTES // 256)
    assert len(largest) == MAX_FRAME_BYTES
    channel.send(largest)
    assert channel.is_open
    assert channel.has_unsent
    raw.setblocking(False)
    got = bytearray()

    def has_all() -> bool:
        channel.flush()
        with contextlib.suppress(BlockingIOError):
            got.extend(raw.recv(1 << 20))
        return len(got) == LENGTH.size + len(largest)

    until(has_all, "the largest frame")
    assert not channel.has_unsent
    assert got == framed(largest)


def test_the_largest_frame_is_received(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    data = memoryview(framed(b"x" * MAX_FRAME_BYTES, b"next"))
    raw.setblocking(False)
    frames: list[bytes] = []
    at = 0

    def has_all() -> bool:
        nonlocal at
        with contextlib.suppress(BlockingIOError):
            at += raw.send(data[at : at + (1 << 20)]) if at < len(data) else 0
        frames.extend(channel.receive())
        return len(frames) == 2

    until(has_all, "two frames")
    assert [len(frame) for frame in frames] == [MAX_FRAME_BYTES, 4]
    assert channel.is_open


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_length_that_is_too_large_closes(ends: tuple[Channel, socket.socket], length: int) -> None:
    """Frames before it count."""
    channel, raw = ends
    raw.sendall(framed(b"good") + struct.pack("<I", length) + b"whatever")
    assert await_end(channel) == [b"good"]
    assert channel.receive() == []
    channel.send(b"never sent")
    channel.flush()
    assert raw.recv(100) == b""


def test_a_frame_that_is_too_large_is_not_sent(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    channel.send(bytes(MAX_FRAME_BYTES + 1))
    assert not channel.is_open
    assert raw.recv(100) == b""


def test_the_last_frames_come_before_the_end(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    raw.sendall(framed(b"last words", b"") + LENGTH.pack(5) + b"half")
    raw.close()
    assert await_end(channel) == [b"last words", b""]
    channel.close()
    channel.close()


def test_a_reset_closes(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()
    assert await_end(channel) == []


def test_sending_to_who_has_gone_closes(ends: tuple[Channel, socket.socket]) -> None:
    channel, raw = ends
    raw.close()

    def is_closed() -> bool:
        channel.send(b"anybody there?")
        return not channel.is_open

    until(is_closed, "the channel's end")


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    try:
        channel = Channel.connect(address)
    except OSError:
        return  # told at once
    channel.send(b"kept until it answers")
    assert await_end(channel) == []


def test_a_connection_that_fails_at_once_leaves_no_socket_open() -> None:
    """Broadcast addresses are refused without asking anybody."""
    with pytest.raises(OSError, match=r".+"):
        Channel.connect("255.255.255.255:9")


@pytest.mark.parametrize("address", ["no.name.is.looked.up:80", "127.0.0.1:http", "127.0.0.1"])
def test_only_numbers_are_addresses(address: str) -> None:
    with pytest.raises((OSError, ValueError)):
        Channel.connect(address)


def test_an_address_may_be_of_ipv6() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        channel = Channel.connect(f"[::1]:{listener.getsockname()[1]}")
        raw, _ = listener.accept()
    channel.send(b"six")
    assert exactly(raw, 7) == framed(b"six")
    channel.close()
    raw.close()


def test_who_never_reads_is_given_up_at_the_bound(ends: tuple[Channel, socket.socket]) -> None:
    channel, _ = ends
    began, num_sent = time.monotonic(), 0
    while channel.is_open:
        channel.send(bytes(1 << 20))
        num_sent += 1 << 20
        assert num_sent < 3 * MAX_UNSENT_BYTES
    assert num_sent > MAX_UNSENT_BYTES
    assert time.monotonic() - began < 10  # it blocked for none of it


def test_who_never_stops_sending_is_read_bit_by_bit(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, raw = ends
    monkeypatch.setattr(module, "MAX_FRAME_BYTES", 1000)
    monkeypatch.setattr(module, "READ_BYTES", 100)
    frames = [bytes([number]) * 96 for number in range(100)]
    raw.sendall(framed(*frames))
    until(lambda: len(channel._socket.recv(1 << 20, socket.MSG_PEEK)) == 10_000, "what was sent")
    assert channel.receive() == frames[:11]  # more than the largest frame, by less than one read
    assert receive(channel, 89) == frames[11:]


def test_a_wait_works_with_descriptors_beyond_what_select_knows(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_many(*_: object) -> None:
        raise ValueError("filedescriptor out of range in select()")

    channel, raw = ends
    monkeypatch.setattr(module.select, "select", too_many)
    wait_for_any([channel], 0.001)
    assert channel.receive() == []
    raw.sendall(framed(b"now"))
    wait_for_any([channel], 30)
    assert channel.receive() == [b"now"]
