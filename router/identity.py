"""What a call says about who makes it: an API key in its metadata, the names in its client certificate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc

SUBJECT_PROPERTIES = ("x509_subject_alternative_name", "x509_common_name")


def credentials(context: grpc.aio.ServicerContext[Any, Any]) -> tuple[str | None, tuple[str, ...]]:
    """The API key, if one was sent, and the certificate's names: alternative names first, then the common name.

    The names can be trusted: gRPC asks for a certificate only where an authority is set, and has checked it.
    """
    return _api_key(_metadata(context)), _subjects(context.auth_context())


def _metadata(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    """Text values by key; of a key sent twice, the first."""
    found: dict[str, str] = {}
    for key, value in context.invocation_metadata() or ():
        if isinstance(value, str):
            found.setdefault(key.lower(), value)
    return found


def _api_key(metadata: Mapping[str, str]) -> str | None:
    """`x-api-key` counts first: it can only be meant for us, while a proxy may have an `authorization` of its own."""
    if key := metadata.get("x-api-key", "").strip():
        return key
    scheme, _, token = metadata.get("authorization", "").strip().partition(" ")
    return (token.strip() or None) if scheme.lower() == "bearer" else None


def _subjects(properties: Mapping[str, Any]) -> tuple[str, ...]:
    names = (name for key in SUBJECT_PROPERTIES for name in properties.get(key, ()))
    return tuple(dict.fromkeys(name.decode("utf-8", "replace") for name in names))
