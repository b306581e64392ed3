"""Memory that goes from process to process: found by its ticket, and by nothing else."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from workers.engine.vllm.handover import HEAD_BYTES, BadHandover, Handover, Outcome, Ticket
from workers.engine.vllm.wish import SECTION, Wish

NUM_BYTES = 3 * 4096

OTHER = """
import json, sys
from workers.engine.vllm.handover import Outcome, Ticket
sheet = Ticket.read(json.loads(sys.argv[1])).open()
sheet.payload[:] = bytes(reversed(sheet.payload))
sheet.outcome = Outcome.COPIED
"""


def test_another_process_reads_and_writes_it() -> None:
    with Handover(NUM_BYTES) as handover:
        content = os.urandom(NUM_BYTES)
        with handover.payload as payload:
            payload[:] = content
        assert handover.outcome is Outcome.OPEN
        subprocess.run([sys.executable, "-c", OTHER, json.dumps(handover.ticket.to_dict())], check=True, timeout=60)
        assert handover.outcome is Outcome.COPIED
        with handover.payload as payload:
            assert bytes(payload) == content[::-1]


def test_what_is_not_it_is_not_opened() -> None:
    with Handover(NUM_BYTES) as handover, Handover(NUM_BYTES) as other:
        ticket = handover.ticket
        wrong = [
            replace(ticket, path=other.ticket.path),
            replace(ticket, path="/nowhere"),
            replace(ticket, num_bytes=NUM_BYTES + 4096),
            replace(ticket, num_bytes=-HEAD_BYTES),
        ]
        for one in wrong:
            with pytest.raises(BadHandover):
                one.open()


def test_a_closed_one_is_gone_also_when_its_number_is_used_again() -> None:
    first = Handover(NUM_BYTES)
    first.close()
    first.close()
    with pytest.raises(BadHandover):
        first.ticket.open()
    with Handover(NUM_BYTES) as second:
        assert second.ticket.path == first.ticket.path
        with pytest.raises(BadHandover):
            first.ticket.open()
        assert second.outcome is Outcome.OPEN


def test_who_has_it_open_keeps_it() -> None:
    handover = Handover(NUM_BYTES)
    sheet = handover.ticket.open()
    handover.close()
    sheet.payload[-1] = 7
    assert sheet.payload[-1] == 7


def test_without_memory_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "there is no memory")

    monkeypatch.setattr(os, "posix_fallocate", full)
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="there is no memory"):
        Handover(NUM_BYTES)
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize(
    "wish",
    [
        Wish("export", 3, Ticket("/x", "ab" * 16, 12)),
        Wish("import", 1, Ticket("/x", "cd" * 16, 12)),
        Wish("pin", 5, pins=("pin/1",)),
        Wish("unpin", pins=("pin/1", "pin/2")),
    ],
    ids=lambda wish: wish.kind,
)
def test_a_wish_arrives_as_it_left(wish: Wish) -> None:
    assert Wish.read(wish.to_params()[SECTION]) == wish


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"kind": "swim"},
        {"kind": "pin", "num_pages": 0, "pin": "x"},
        {"kind": "pin", "num_pages": 1},
        {"kind": "unpin", "pins": None},
        {"kind": "export", "num_pages": 1, "ticket": None},
        {"kind": "export", "num_pages": 1, "ticket": {"path": "/x", "secret": "ab", "num_bytes": 1}},
        {"kind": "export", "num_pages": 1, "ticket": {"path": "/x", "secret": "no", "num_bytes": 1}},
        {"kind": "export", "num_pages": 1, "ticket": {"path": 1, "secret": "ab" * 16, "num_bytes": 1}},
        {"kind": "export", "num_pages": "1", "ticket": {"path": "/x", "secret": "ab" * 16, "num_bytes": 1}},
    ],
)
def test_other_wishes_are_none(found: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Wish.read(found)
