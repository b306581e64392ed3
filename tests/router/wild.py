"""Protos that nobody sane would send: every field absent or with any value of its type, the extremes more often."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

M = TypeVar("M", bound=Message)
Field = FieldDescriptor
SIGNED_32 = {Field.TYPE_INT32, Field.TYPE_SINT32, Field.TYPE_SFIXED32, Field.TYPE_ENUM}
SIGNED_64 = {Field.TYPE_INT64, Field.TYPE_SINT64, Field.TYPE_SFIXED64}
UNSIGNED_32 = {Field.TYPE_UINT32, Field.TYPE_FIXED32}
UNSIGNED_64 = {Field.TYPE_UINT64, Field.TYPE_FIXED64}


def wild(kind: type[M], ids: st.SearchStrategy[str] | None = None) -> st.SearchStrategy[M]:
    """Any message of a type; `ids` are what its fields `request_id` may be."""
    ids = st.text(max_size=4) if ids is None else ids
    return _message(kind.DESCRIPTOR, ids, depth=4).map(lambda tree: _build(kind, tree))


def _message(descriptor: Descriptor, ids: st.SearchStrategy[str], *, depth: int) -> st.SearchStrategy[dict[str, Any]]:
    fields = {
        field.name: _field(field, ids, depth=depth)
        for field in descriptor.fields
        if depth or field.type != Field.TYPE_MESSAGE
    }
    return st.fixed_dictionaries({}, optional=fields)


def _field(field: FieldDescriptor, ids: st.SearchStrategy[str], *, depth: int) -> st.SearchStrategy[Any]:
    if field.type == Field.TYPE_MESSAGE and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        return st.dictionaries(_scalar(entry["key"], ids), _scalar(entry["value"], ids), max_size=2)
    if field.type == Field.TYPE_MESSAGE:
        one = _message(field.message_type, ids, depth=depth - 1)
    else:
        one = _scalar(field, ids)
    return st.lists(one, max_size=3) if field.is_repeated else one


def _scalar(field: FieldDescriptor, ids: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    if field.name == "request_id":
        return ids
    match field.type:
        case Field.TYPE_DOUBLE | Field.TYPE_FLOAT:
            return st.floats(width=32)
        case Field.TYPE_BOOL:
            return st.booleans()
        case Field.TYPE_STRING:
            return st.text(max_size=4)
        case Field.TYPE_BYTES:
            return st.binary(max_size=6)
    low, high = _range(field.type)
    return st.sampled_from([low, high]) | st.integers(0, 5) | st.integers(low, high)


def _range(kind: int) -> tuple[int, int]:
    bits = 64 if kind in SIGNED_64 | UNSIGNED_64 else 32
    if kind in UNSIGNED_32 | UNSIGNED_64:
        return 0, (1 << bits) - 1
    assert kind in SIGNED_32 | SIGNED_64, kind
    return -(1 << bits - 1), (1 << bits - 1) - 1


def _build(kind: type[M], tree: dict[str, Any]) -> M:
    """Of a oneof, the last field given stays."""
    return kind(**tree)
