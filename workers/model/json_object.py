"""A JSON object of a model directory, read key by key with the key's type. Imports nothing heavy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from protos.errors import ModelError


@dataclass(frozen=True, slots=True)
class JsonObject:
    """A JSON object and where it stands; every reader raises ModelError with the file, the key and the remedy.

    A key whose value is null counts as absent.
    """

    path: Path
    values: dict[str, object]
    prefix: str = ""  # the keys that lead to this object, each with a dot

    @classmethod
    def read(cls, path: Path) -> JsonObject:
        """The object a file holds; raises ModelError if the file is absent, not JSON, or not an object."""
        try:
            return cls.parse(path, path.read_bytes())
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); copy the whole model directory") from error

    @classmethod
    def parse(cls, path: Path, data: bytes) -> JsonObject:
        """The object in `data`, a part of the file at `path`; raises ModelError if it is not one."""
        try:
            values = json.loads(data)
        except ValueError as error:
            raise ModelError(f"{path}: not JSON ({error}); copy the file again") from error
        if not isinstance(values, dict):
            raise ModelError(f"{path}: holds {type(values).__name__}, not an object; copy the file again")
        return cls(path, values)

    def error(self, key: str, problem: str) -> ModelError:
        """The error that names the file, the key and the problem."""
        return ModelError(f"{self.path}: {self.prefix}{key}: {problem}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, *, default: int | None = None, minimum: int = 1) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(key, f"is {value!r}; set an integer of at least {minimum}")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """A number above zero."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.error(key, f"is {value!r}; set a number above 0")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}; set true or false")
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is {value!r}; set a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._value(key, None)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, f"is {value!r}; set a list of strings")
        return tuple(cast(list[str], value))

    def integers(self, key: str) -> tuple[int, ...]:
        """An integer or a list of integers, none below zero."""
        value = self._value(key, None)
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items):
            raise self.error(key, f"is {value!r}; set an integer of at least 0, or a list of them")
        return tuple(cast(list[int], items))

    def child(self, key: str) -> JsonObject:
        value = self._value(key, None)
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}; set an object")
        return JsonObject(self.path, value, f"{self.prefix}{key}.")

    def _value(self, key: str, default: object) -> object:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing; add it, or copy the file again")
        return value
