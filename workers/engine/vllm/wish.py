"""What a request asks of vLLM's cache: it travels beside the request, from the engine to the connector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from workers.engine.vllm.handover import Ticket

SECTION: Final = "headwater"  # of a request's transfer parameters
TRANSFER: Final = "kv_transfer_params"  # of SamplingParams.extra_args: vLLM's name


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks of the cache."""

    kind: Literal["export", "import", "pin", "unpin"]
    num_pages: int = 0  # of its prefix
    ticket: Ticket | None = None  # export and import
    pins: tuple[str, ...] = ()  # pin: one

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Wish:
        """Raises KeyError, TypeError or ValueError."""
        match found["kind"]:
            case "export" | "import" as kind:
                return cls(kind, _positive(found["num_pages"]), Ticket.read(found["ticket"]))
            case "pin":
                return cls("pin", _positive(found["num_pages"]), pins=(str(found["pin"]),))
            case "unpin":
                return cls("unpin", pins=tuple(map(str, found["pins"])))
            case kind:
                raise ValueError(f"{kind!r} is not known")

    def to_params(self) -> dict[str, Any]:
        """For TRANSFER."""
        wish: dict[str, Any] = {"kind": self.kind, "num_pages": self.num_pages}
        match self.kind:
            case "pin":
                wish["pin"] = self.pins[0]
            case "unpin":
                wish["pins"] = list(self.pins)
            case _:
                assert self.ticket is not None
                wish["ticket"] = self.ticket.to_dict()
        return {SECTION: wish}


def _positive(found: object) -> int:
    if not isinstance(found, int) or found <= 0:
        raise ValueError(f"{found!r} pages")
    return found
