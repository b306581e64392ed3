"""A small block, and other labels than its own."""

from __future__ import annotations

from array import array
from dataclasses import replace

from workers.kv.block import BlockLabel, pack

LABEL = BlockLabel("store float32 3 2 16 32 12288", "0123abcd", 2**64 - 2, array("i", range(64)).tobytes(), 2)
PAYLOAD = bytes(index * 7 % 251 for index in range(5000))
OTHER_LABELS = [  # the field that differs, and the label
    ("layout", replace(LABEL, layout=LABEL.layout.replace("float32", "bfloat16"))),
    ("model", replace(LABEL, model="0123abce")),
    ("name", replace(LABEL, name=LABEL.name + 1)),
    ("tokens", replace(LABEL, tokens=array("i", [*range(63), 64]).tobytes())),
    ("tokens", replace(LABEL, tokens=LABEL.tokens[:-4])),
    ("num_pages", replace(LABEL, num_pages=3)),
]


def packed(label: BlockLabel = LABEL, payload: bytes = PAYLOAD) -> memoryview:
    def fill(out: memoryview) -> None:
        out[:] = payload

    return pack(label, len(payload), fill)
