"""Prefixes beyond requests, of vLLM: those that leave the engine, those that come in, and those that stay.

Stands in the engine's process. What is to be done in vLLM's is asked for by requests of the engine's own, which carry a
wish for the connector there; their prompt is the prefix and one token more, and what they generate is of no interest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, Protocol

from protos.messages import Pin
from workers.engine.protocol import Adoption
from workers.engine.vllm.handover import Handover, Outcome
from workers.engine.vllm.wish import Wish
from workers.kv.block import BlockFormat, HeldBlock

log = logging.getLogger(__name__)

EXPORT_TIMEOUT_S: Final = 1.0  # vLLM may be in a long step; whoever wants the prefix computes it then
ADOPT_WAIT_S: Final = 0.25  # after that a prefix comes in by itself, before what is submitted later
POLL_S: Final = 0.001

_ANY_TOKEN: Final = 0

_Prefix = tuple[str, tuple[int, ...]]  # salt, tokens of whole pages


class Core(Protocol):
    """vLLM, as far as prefixes need it."""

    @property
    def num_blocks(self) -> int:
        """That requests may use."""

    @property
    def block_size(self) -> int:
        """Tokens."""

    def run(self, token_ids: Sequence[int], salt: str, transfer: Mapping[str, Any]) -> Future[None]:
        """Generate one token, ahead of all requests that wait; done when the request has ended, however.

        Salt, adapter and all else that vLLM's names of blocks depend on are as in other requests. `transfer` becomes
        the request's transfer parameters. To cancel the future drops the request.
        """


def block_format(layouts: Sequence[Mapping[str, Any] | None], model: str) -> BlockFormat | None:
    """Of an engine whose worker processes describe their caches so (connector.describe); None: it exchanges nothing.

    `model`: a fingerprint of the weights, with all that changes them.
    """
    layout = layouts[0] if len(layouts) == 1 else None
    return None if layout is None else BlockFormat(layout["layout"], model, layout["page_size"], layout["page_bytes"])


@dataclass(slots=True)
class _Pinned:
    """A prefix that is pinned. Mutated only by Prefixes."""

    num_pages: int
    key: str  # the connector's name for it
    computing: Future[None] | None
    pin_ids: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Import:
    """A prefix on its way into the cache."""

    num_pages: int
    handover: Handover
    request: Future[None]


class Prefixes:
    """Pins and handovers of one engine. Mutated only by VllmEngine, between steps."""

    def __init__(self, core: Core, block_format: BlockFormat | None, *, max_pinned_pages: int) -> None:
        """Without a format, nothing leaves and nothing comes in."""
        self._core = core
        self._format = block_format
        self._max_pinned = max_pinned_pages
        self._pinned: dict[_Prefix, _Pinned] = {}
        self._prefix_of: dict[str, _Prefix] = {}  # by pin
        self._imports: list[_Import] = []
        self._endings: list[Future[None]] = []  # of pins
        self._numbers = count()

    @property
    def block_format(self) -> BlockFormat | None:
        return self._format

    @property
    def num_pinned_pages(self) -> int:
        """Of all pins, also of those that are being computed."""
        return sum(pinned.num_pages for pinned in self._pinned.values())

    @property
    def is_computing(self) -> bool:
        """Whether any prefix is being computed to be pinned."""
        return any(pinned.computing is not None for pinned in self._pinned.values())

    @property
    def has_work(self) -> bool:
        """Whether anything is under way that holds memory until `settle` knows of its end."""
        return self.is_computing or bool(self._imports)

    def settle(self) -> None:
        """Take note of what has ended since the last step."""
        for done in [one for one in self._imports if one.request.done()]:
            self._imports.remove(done)
            self._finish(done)
        for ended in [one for one in self._endings if one.done()]:
            self._endings.remove(ended)
            _failed(ended, "an unpin")
        for pinned in [one for one in self._pinned.values() if one.computing is not None and one.computing.done()]:
            assert pinned.computing is not None
            if _failed(pinned.computing, "a pin"):
                self._end([*pinned.pin_ids])
            else:
                pinned.computing = None

    def close(self) -> None:
        """Give up what is under way, and give its memory back. Idempotent."""
        for one in self._imports:
            one.handover.close()
        self._imports.clear()

    # Out and in

    def export(self, salt: str, token_ids: Sequence[int], payload: memoryview) -> bool:
        """See Engine.export_prefix. Also False if vLLM does not come to it in time."""
        if self._format is None or not token_ids or len(token_ids) % self._core.block_size:
            return False
        with Handover(payload.nbytes) as handover:
            wish = Wish("export", len(token_ids) // self._core.block_size, handover.ticket)
            request = self._run(salt, token_ids, wish)
            outcome = _awaited(handover, request, EXPORT_TIMEOUT_S)
            request.cancel()
            if outcome is not Outcome.COPIED:
                return False
            with handover.payload as pages:
                payload[:] = pages
        return True

    def adopt(self, salt: str, token_ids: Sequence[int], block: HeldBlock) -> Adoption:
        """See Engine.adopt_prefix. Where vLLM does not come to it at once, the prefix counts as copied all the same:
        it will be, before anything that is submitted from now on."""
        num_pages = block.label.num_pages
        assert num_pages * self._core.block_size == len(token_ids), "a block of another prefix"
        self.settle()
        if self._format is None or not self._has_room(num_pages):
            block.close()
            return Adoption(0, "unused")
        one = self._import(salt, token_ids, block)
        if not self._imports:  # else vLLM has a long way to go
            wait([one.request], ADOPT_WAIT_S)
        if not one.request.done():
            self._imports.append(one)
            return Adoption(len(token_ids), "copied")
        return self._finish(one)

    def _import(self, salt: str, token_ids: Sequence[int], block: HeldBlock) -> _Import:
        """Takes the block over. Raises RuntimeError where there is no memory to hand it over in."""
        num_pages = block.label.num_pages
        handover = _copied(block)
        try:
            wish = Wish("import", num_pages, handover.ticket)
            return _Import(num_pages, handover, self._run(salt, token_ids, wish))
        except BaseException:
            handover.close()
            raise

    def _finish(self, done: _Import) -> Adoption:
        outcome = done.handover.outcome
        done.handover.close()
        _failed(done.request, "an import")
        num_tokens = done.num_pages * self._core.block_size
        if outcome is Outcome.COPIED:
            return Adoption(num_tokens, "copied")
        log.info("a block of %d pages was not needed, or could not be used", done.num_pages)
        return Adoption(num_tokens if outcome is Outcome.PRESENT else 0, "unused")

    def _has_room(self, num_pages: int) -> bool:
        """Beside pins; and not more waits to come in than there is memory for."""
        num_waiting = sum(one.num_pages for one in self._imports)
        return max(num_waiting, self.num_pinned_pages) + num_pages < self._core.num_blocks

    # Pins

    def pin(self, pin: Pin, *, largest_need: int) -> None:
        """See Engine.pin. `largest_need`: pages that a live output may come to hold; they are left to it."""
        num_pages = len(pin.token_ids) // self._core.block_size
        prefix = pin.cache_salt, tuple(pin.token_ids[: num_pages * self._core.block_size])
        if pin.pin_id in self._prefix_of or num_pages == 0:
            return
        if prefix not in self._pinned:
            if not self._may_pin(num_pages, largest_need):
                return
            self._pinned[prefix] = self._start(prefix, num_pages)
        self._pinned[prefix].pin_ids.add(pin.pin_id)
        self._prefix_of[pin.pin_id] = prefix

    def unpin(self, pin_id: str) -> None:
        """See Engine.unpin."""
        self._end([pin_id])

    def unpin_for(self, num_pages: int) -> None:
        """End all pins if a request of so many pages has no room beside them."""
        if self._pinned and num_pages + self.num_pinned_pages > self._core.num_blocks:
            log.warning("pins of %d pages end: a request needs %d", self.num_pinned_pages, num_pages)
            self._end(list(self._prefix_of))

    def _start(self, prefix: _Prefix, num_pages: int) -> _Pinned:
        salt, tokens = prefix
        key = f"pin/{next(self._numbers)}"
        return _Pinned(num_pages, key, self._run(salt, tokens, Wish("pin", num_pages, pins=(key,))))

    def _end(self, pin_ids: Sequence[str]) -> None:
        """The prefixes that no pin holds any more go, all at once."""
        prefixes = [prefix for pin_id in pin_ids if (prefix := self._unlink(pin_id)) is not None]
        if not prefixes:
            return
        ended = [self._pinned.pop(prefix) for prefix in prefixes]
        for pinned in ended:
            if pinned.computing is not None:
                pinned.computing.cancel()
        wish = Wish("unpin", pins=tuple([pinned.key for pinned in ended]))
        self._endings.append(self._run("", (), wish))

    def _unlink(self, pin_id: str) -> _Prefix | None:
        """End a pin; its prefix, if that was the last one."""
        prefix = self._prefix_of.pop(pin_id, None)
        if prefix is None:
            return None
        self._pinned[prefix].pin_ids.remove(pin_id)
        return None if self._pinned[prefix].pin_ids else prefix

    def _may_pin(self, num_pages: int, largest_need: int) -> bool:
        num_pinned = self.num_pinned_pages + num_pages
        if num_pinned <= self._max_pinned and num_pinned + largest_need <= self._core.num_blocks:
            return True
        log.warning(
            "a prefix of %d pages is not pinned: with it they would be %d, %d may be, and a request needs %d of %d; "
            "raise engine.kv.max_pinned or num_pages",
            *(num_pages, num_pinned, self._max_pinned, largest_need, self._core.num_blocks),
        )
        return False

    def _run(self, salt: str, token_ids: Sequence[int], wish: Wish) -> Future[None]:
        """Ask vLLM: for a prefix and one token more, whichever."""
        return self._core.run([*token_ids, _ANY_TOKEN], salt, wish.to_params())


def _copied(block: HeldBlock) -> Handover:
    """The pages of a block, which is closed."""
    try:
        handover = Handover(block.payload.nbytes)
        with handover.payload as pages:
            pages[:] = block.payload
    except OSError as error:
        raise RuntimeError(f"{block.payload.nbytes} bytes cannot be handed to vLLM: {error}") from error
    finally:
        block.close()
    return handover


def _awaited(handover: Handover, request: Future[None], timeout_s: float) -> Outcome:
    """What becomes of it: known before the request ends, which may have to wait for its turn."""
    deadline = time.monotonic() + timeout_s
    while handover.outcome is Outcome.OPEN and not request.done() and time.monotonic() < deadline:
        wait([request], POLL_S)
    return handover.outcome


def _failed(request: Future[None], what: str) -> bool:
    """Whether a request that has ended did not come to its end; then it is logged."""
    try:
        error = request.exception()
    except CancelledError as cancelled:
        error = cancelled
    if error is not None:
        log.warning("%s failed: %s", what, error or type(error).__name__)
    return error is not None
