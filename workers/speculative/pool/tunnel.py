"""TLS of one channel, apart from its socket: bytes in, bytes out, and nothing ever waits.

The socket's side never sees a record in halves, and nothing that has been decrypted stays in here: who waits for the
socket alone misses nothing.
"""

from __future__ import annotations

import ssl

from protos.tls import Certificates, ssl_reason

RECORD_BYTES = 1 << 14  # the largest record of TLS


class Tunnel:
    """One end. Mutated only by its Channel."""

    def __init__(self, certificates: Certificates, *, is_server: bool) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        begin = certificates.accept if is_server else certificates.connect
        self._tls = begin(self._incoming, self._outgoing)
        self._waiting = bytearray()  # to be sealed when the handshake is over
        self.is_open = False  # the handshake is over
        self.is_over = False  # nothing will come any more
        self.trouble = ""  # why, if trust is the matter

    @property
    def num_waiting_bytes(self) -> int:
        return len(self._waiting)

    def seal(self, data: bytes) -> bytes:
        """What must be sent now for this to arrive; what cannot be said yet is kept."""
        self._waiting += data
        self._advance()
        return self._outgoing.read()

    def unseal(self, data: bytes) -> tuple[bytes, bytes]:
        """What these bytes say, and what must be sent now because of them. Look at `is_over` afterwards."""
        self._incoming.write(data)
        self._advance()
        opened = self._opened() if self.is_open else b""
        return opened, self._outgoing.read()

    def end(self) -> None:
        """The other side has closed the connection."""
        if not self.is_open and not self.is_over:
            self.trouble = "hung up during the TLS handshake; perhaps it lacks cluster.tls"
        self.is_over = True

    def _advance(self) -> None:
        """Go on with the handshake; once it is over, seal what waits."""
        if self.is_over:
            return
        try:
            if not self.is_open:
                self._tls.do_handshake()
                self.is_open = True
            while self._waiting:
                del self._waiting[: self._tls.write(self._waiting)]
        except ssl.SSLWantReadError:
            pass  # until more has come
        except ssl.SSLError as error:
            self._fail(error)

    def _opened(self) -> bytes:
        opened = bytearray()
        try:
            while read := self._tls.read(RECORD_BYTES):
                opened += read
            self.is_over = True  # it said so
        except ssl.SSLWantReadError:
            pass  # that was all
        except ssl.SSLError as error:
            self._fail(error)
        return bytes(opened)

    def _fail(self, error: ssl.SSLError) -> None:
        """An alert is the other side's verdict, anything else is ours."""
        reason, self.is_over = ssl_reason(error), True
        self.trouble = f"{'refuses this side' if 'alert' in reason else 'cannot be trusted'} ({reason})"
