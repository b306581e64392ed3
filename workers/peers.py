"""How a worker calls other workers: one channel to each, kept open, with the session's token and certificates."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import grpc

from protos.tls import Certificates, PeerTLS, channel_credentials, channel_options
from protos.v1 import session_pb2 as pb
from protos.v1 import session_pb2_grpc as rpc

TOKEN_KEY = "headwater-session-token"
MAX_CHANNELS: Final = 256  # those not used for the longest are closed


class Peers:
    """Owns the channels. Lives on one event loop."""

    def __init__(self, token: str, tls: PeerTLS | None) -> None:
        """Raises SetupError for certificates that cannot be used."""
        self._metadata = ((TOKEN_KEY, token),)
        self._certificates = None if tls is None else Certificates.of_peer(tls)
        self._channels: OrderedDict[str, grpc.aio.Channel] = OrderedDict()

    async def export_prefix(
        self, address: str, request: pb.ExportPrefixRequest, *, timeout_s: float
    ) -> pb.ExportPrefixResponse:
        """Ask a worker for a prefix. Raises grpc.RpcError, and TimeoutError."""
        stub = rpc.WorkerSessionStub(await self._channel(address))
        try:
            response: pb.ExportPrefixResponse = await stub.ExportPrefix(
                request, metadata=self._metadata, timeout=timeout_s
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise TimeoutError from error
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                await self._close(address)  # the next call reads the certificates again
            raise
        return response

    async def close(self) -> None:
        """Close all channels. Idempotent."""
        for address in list(self._channels):
            await self._close(address)

    async def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = self._open(address)
        self._channels.move_to_end(address)
        if len(self._channels) > MAX_CHANNELS:
            await self._close(next(iter(self._channels)))
        return self._channels[address]

    def _open(self, address: str) -> grpc.aio.Channel:
        own = [("grpc.use_local_subchannel_pool", 1)]  # a new attempt does not inherit the last one's backoff
        if self._certificates is None:
            return grpc.aio.insecure_channel(address, options=own)
        options = [*own, *channel_options(self._certificates)]
        return grpc.aio.secure_channel(address, channel_credentials(self._certificates), options=options)

    async def _close(self, address: str) -> None:
        if channel := self._channels.pop(address, None):
            await channel.close()
