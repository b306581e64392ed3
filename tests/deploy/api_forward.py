"""The fake API server's side of a port-forward: a WebSocket whose channels 0 and 1 are a port's data and errors."""

from __future__ import annotations

import base64
import hashlib
import select
import socket
import struct
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from typing import IO

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_BINARY, _CLOSE = 2, 8


def forward(request: BaseHTTPRequestHandler, to: Callable[[int], int | None]) -> None:
    """Serve one until either side closes. `to`: the port of this machine that stands for a pod's."""
    request.close_connection = True
    port = int(request.query["ports"])  # type: ignore[attr-defined]
    key = request.headers["Sec-WebSocket-Key"].encode()
    request.send_response(101)
    for name, value in (
        ("Upgrade", "websocket"),
        ("Connection", "Upgrade"),
        ("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()),
        ("Sec-WebSocket-Protocol", request.headers["Sec-WebSocket-Protocol"].split(",")[-1].strip()),
    ):
        request.send_header(name, value)
    request.end_headers()
    for channel in (0, 1):
        _send(request.wfile, bytes([channel]) + struct.pack("<H", port))
    target = to(port)
    if target is None:
        _send(request.wfile, b"\x01" + f"nothing listens at {port} in the pod".encode())
        return
    with closing(socket.create_connection(("127.0.0.1", target))) as backend:
        _pump(request, backend)


def _pump(request: BaseHTTPRequestHandler, backend: socket.socket) -> None:
    while True:
        ready, _, _ = select.select([request.connection, backend], [], [])
        if backend in ready:
            data = backend.recv(65536)
            if not data:
                request.wfile.write(bytes([0x80 | _CLOSE, 0]))
                return
            _send(request.wfile, b"\x00" + data)
        if request.connection in ready:
            frame = _receive(request.connection)
            if frame is None:
                return
            backend.sendall(frame[1:])


def _send(to: IO[bytes], data: bytes) -> None:
    head = bytes([0x80 | _BINARY])
    head += (
        bytes([len(data)])
        if len(data) < 126
        else b"\x7e" + struct.pack(">H", len(data))
        if len(data) < 65536
        else (b"\x7f" + struct.pack(">Q", len(data)))
    )
    to.write(head + data)
    to.flush()


def _receive(source: socket.socket) -> bytes | None:
    """The next binary frame's data; None at the end. A client's frames are masked.

    Read from the socket itself: what lay in a buffer, `select` would not see.
    """
    head = _read(source, 2)
    if len(head) < 2 or head[0] & 0x0F == _CLOSE:
        return None
    length = head[1] & 0x7F
    if length == 126:
        (length,) = struct.unpack(">H", _read(source, 2))
    elif length == 127:
        (length,) = struct.unpack(">Q", _read(source, 8))
    mask = _read(source, 4)
    data = _read(source, length)
    return bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))


def _read(source: socket.socket, num_bytes: int) -> bytes:
    """As many, or fewer at the end."""
    data = b""
    while len(data) < num_bytes and (part := source.recv(num_bytes - len(data))):
        data += part
    return data
