"""One line of a check-up: what was looked at, what was found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `remedy` is empty where all is well, or where `found` says what to do."""

    check: str
    status: Status
    found: str
    remedy: str = ""

    @classmethod
    def ok(cls, check: str, found: str) -> Self:
        return cls(check, "ok", found)

    @classmethod
    def warning(cls, check: str, found: str, remedy: str) -> Self:
        """It will run, but not as well as it could, or untested."""
        return cls(check, "warning", found, remedy)

    @classmethod
    def failed(cls, check: str, found: str, remedy: str = "") -> Self:
        """It will not run."""
        return cls(check, "failed", found, remedy)

    @property
    def text(self) -> str:
        """For people: what was found, then the remedy."""
        return f"{self.found}; {self.remedy}" if self.remedy else self.found
