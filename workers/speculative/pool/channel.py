"""A persistent channel between a worker and a drafter: frames with their length in front, over TCP.

Nothing here ever waits: the engine's thread sends and receives between two steps. What the other side is too slow to
take is kept up to a limit; beyond it, the channel counts as broken. With certificates, all of it goes through TLS.
(Why not a messaging library: ADR 9.)
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Sequence

from protos.tls import Certificates
from workers.speculative.pool.tunnel import Tunnel

LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 16 << 20
MAX_UNSENT_BYTES = 32 << 20
READ_BYTES = 1 << 18


class Channel:
    """One end. Used from one thread."""

    def __init__(self, connection: socket.socket, tunnel: Tunnel | None = None) -> None:
        """Takes over a connected socket, or one that is connecting. `tunnel`: TLS; None: plain text."""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = connection
        self._tunnel = tunnel
        self._unsent = bytearray(tunnel.seal(b"") if tunnel is not None else b"")  # a client's first words
        self._received = bytearray()
        self.is_open = True

    @classmethod
    def connect(cls, address: str, certificates: Certificates | None = None) -> Channel:
        """A channel to host:port, which need not answer yet: what is sent is kept until it does."""
        host, _, port = address.rpartition(":")
        family, kind, protocol, _, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )[0]
        connection = socket.socket(family, kind, protocol)
        connection.setblocking(False)
        try:
            with contextlib.suppress(BlockingIOError):
                connection.connect(place)
        except OSError:
            connection.close()
            raise
        return cls(connection, Tunnel(certificates, is_server=False) if certificates else None)

    @classmethod
    def accepted(cls, connection: socket.socket, certificates: Certificates | None = None) -> Channel:
        """A channel to who has just connected."""
        return cls(connection, Tunnel(certificates, is_server=True) if certificates else None)

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        return bool(self._num_unsent_bytes)

    @property
    def trouble(self) -> str:
        """Why the other side is not trusted or does not trust this one; empty if that is not why it closed."""
        return self._tunnel.trouble if self._tunnel is not None else ""

    def send(self, frame: bytes) -> None:
        """Send a frame, now or when the other side takes it."""
        if not self.is_open:
            return
        if len(frame) > MAX_FRAME_BYTES or self._num_unsent_bytes + len(frame) > MAX_UNSENT_BYTES:
            self.close()
            return
        data = LENGTH.pack(len(frame)) + frame
        self._unsent += data if self._tunnel is None else self._tunnel.seal(data)
        self.flush()

    def flush(self) -> None:
        """Send what could not be sent before."""
        try:
            while self._unsent and self.is_open:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def receive(self) -> list[bytes]:
        """The frames that have come, up to about the largest frame's size; at the channel's end, the last ones."""
        try:
            while self.is_open and len(self._received) < LENGTH.size + MAX_FRAME_BYTES:
                read = self._socket.recv(READ_BYTES)
                self._take(read)
                if not read:
                    self.close()
                if len(read) < READ_BYTES:
                    break
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self._take(b"")
            self.close()
        except OSError:
            self.close()
        return self._frames()

    def close(self) -> None:
        """Idempotent."""
        self.is_open = False
        self._socket.close()

    @property
    def _num_unsent_bytes(self) -> int:
        return len(self._unsent) + (self._tunnel.num_waiting_bytes if self._tunnel is not None else 0)

    def _take(self, data: bytes) -> None:
        """Keep what has come; none: the other side has closed."""
        if self._tunnel is None:
            self._received += data
            return
        if not data:
            self._tunnel.end()
            return
        opened, answer = self._tunnel.unseal(data)
        self._received += opened
        self._unsent += answer
        self.flush()
        if self._tunnel.is_over:
            self.close()

    def _frames(self) -> list[bytes]:
        frames, at, received = [], 0, self._received
        while len(received) >= at + LENGTH.size:
            [length] = LENGTH.unpack_from(received, at)
            if length > MAX_FRAME_BYTES:
                self.close()
                break
            stop = at + LENGTH.size + length
            if len(received) < stop:
                break
            frames.append(bytes(received[at + LENGTH.size : stop]))
            at = stop
        del received[:at]
        return frames


def wait_for_any(channels: Sequence[Channel], timeout_s: float) -> None:
    """Return when one of them can be read, or after so long. Precise to microseconds, which poll is not."""
    try:
        select.select(channels, [], [], timeout_s)
    except ValueError:  # a descriptor beyond what select knows, in a process that has very many
        poller = select.poll()
        for channel in channels:
            poller.register(channel, select.POLLIN)
        poller.poll(timeout_s * 1000)
