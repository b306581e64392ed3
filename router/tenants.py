"""Who may call, and how much: the tenants, read from a file that may change while the router runs.

First on a request's path: a call's credentials become the frozen `Tenant` that quotas, queue and caches go by.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from protos.errors import ConfigError, Unauthenticated
from router.api_key import HASH_PREFIX, key_hash
from router.config import TenantsSection
from router.yaml_loader import StrictLoader

ANONYMOUS = "anonymous"
LARGEST_PRIORITY = (1 << 31) - 1

logger = logging.getLogger(__name__)

_Mark: TypeAlias = tuple[int, ...] | None
_Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
_KeyHash = Annotated[str, StringConstraints(pattern=rf"^{HASH_PREFIX}[0-9a-f]{{64}}$")]
_Subject = Annotated[str, StringConstraints(min_length=1)]


@dataclass(frozen=True, slots=True)
class Tenant:
    """One who calls, and its limits, which each router keeps by itself; None: no limit."""

    name: str
    weight: float = 1.0  # its share of a busy cluster, beside the weights of others that wait
    max_running: int | None = None  # requests on workers at once
    max_queued: int | None = None  # requests that wait at once
    requests_per_s: float | None = None
    tokens_per_s: float | None = None  # prompt tokens and max_tokens
    max_priority: int = 0  # the highest that it may ask for
    is_admin: bool = False  # may use the cluster service


EVERYBODY = Tenant("default", max_priority=LARGEST_PRIORITY, is_admin=True)


class Tenants:
    """Finds the tenant behind a call. Owned by RouterServer; touched on the event loop only.

    The file is small and local, so it is looked at in passing: no task waits for it to change.
    """

    def __init__(self, config: TenantsSection, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError if the file is missing or wrong."""
        self._config = config
        self._clock = clock
        self._looked = clock()
        self._mark = _mark(config.file)
        self._roster = None if config.file is None else _read(config.file)

    def identify(self, api_key: str | None, subjects: Sequence[str]) -> Tenant:
        """The tenant of the key, else of the certificate's subjects. Raises Unauthenticated, never echoing the key.

        A key that is not listed is refused whatever else comes with it: its owner must not become somebody else.
        """
        roster = self._current()
        if roster is None:
            return EVERYBODY
        if api_key is not None:
            return roster.by_key(api_key)
        tenant = roster.by_subjects(subjects)
        if tenant is None and self._config.allow_anonymous:
            return roster.anonymous
        if tenant is None:
            raise Unauthenticated(_missing(subjects))
        return tenant

    @property
    def has_many(self) -> bool:
        """Whether there may be several to share the cluster."""
        return self._roster is not None and self._roster.num_named + self._config.allow_anonymous > 1

    def cache_salt(self, tenant: Tenant) -> str:
        """What the tenant's cache keys begin with: two tenants share cached prefixes only if isolation is `none`."""
        return tenant.name if self._config.isolation == "tenant" else ""

    def _current(self) -> _Roster | None:
        file, now = self._config.file, self._clock()
        if file is not None and now >= self._looked + self._config.reload_s:
            self._looked = now
            self._reload(file)
        return self._roster

    def _reload(self, file: Path) -> None:
        """A broken file changes nothing and is told once."""
        mark = _mark(file)
        if mark == self._mark:
            return
        self._mark = mark
        try:
            self._roster = _read(file)
        except ConfigError as error:
            logger.error("the tenants stay as they were: %s", error.message)
        else:
            logger.info("the tenants are those of the changed %s", file)


@dataclass(frozen=True, slots=True)
class _Roster:
    """What one version of the file says."""

    num_named: int  # tenants, without the anonymous one
    hashes: Mapping[str, Tenant]
    subjects: Mapping[str, Tenant]
    anonymous: Tenant

    def by_key(self, api_key: str) -> Tenant:
        """Raises Unauthenticated if no tenant has the key."""
        tenant = self.hashes.get(key_hash(api_key))
        if tenant is None:
            raise Unauthenticated("the API key is not known here; check that all of it was sent, or ask for a new one")
        return tenant

    def by_subjects(self, subjects: Iterable[str]) -> Tenant | None:
        """The tenant that one of them names. Raises Unauthenticated if they name two."""
        found = {tenant.name: tenant for subject in subjects if (tenant := self.subjects.get(subject)) is not None}
        if len(found) > 1:
            raise Unauthenticated(
                f"the client certificate names {len(found)} tenants ({', '.join(sorted(found))}); "
                "send an API key, or ask for a certificate that names one"
            )
        return next(iter(found.values()), None)


def _missing(subjects: Sequence[str]) -> str:
    how = "send an API key as `authorization: Bearer KEY` or `x-api-key: KEY`"
    if subjects:
        return f"no tenant has the client certificate's subjects ({', '.join(subjects)}) and there is no API key; {how}"
    return f"the call has neither an API key nor a client certificate; {how}"


# --- the file ---


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _Entry(_Strict):
    """One tenant, as the file has it."""

    keys: list[_KeyHash] = []
    subjects: list[_Subject] = []
    weight: float = Field(default=1.0, ge=0.001, le=1000)
    max_running: int | None = Field(default=None, ge=1)
    max_queued: int | None = Field(default=None, ge=0)
    requests_per_s: float | None = Field(default=None, gt=0)
    tokens_per_s: float | None = Field(default=None, gt=0)
    max_priority: int = Field(default=0, ge=-LARGEST_PRIORITY, le=LARGEST_PRIORITY)
    is_admin: bool = False

    def tenant(self, name: str) -> Tenant:
        return Tenant(name, **self.model_dump(exclude={"keys", "subjects"}))


class _File(_Strict):
    tenants: dict[_Name, _Entry]


def _mark(file: Path | None) -> _Mark:
    """Differs when the file does. Taken before reading: a change meanwhile is then found at the next look.

    `stat` follows links, as a Secret that Kubernetes mounts needs: it changes by a link that points elsewhere.
    """
    try:
        stat = None if file is None else os.stat(file)
    except OSError:
        return None
    return stat and (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _read(file: Path) -> _Roster:
    """Raises ConfigError that names file, key and remedy, and no contents: there may be a key among them."""
    try:
        entries = _File.model_validate(_tree(file)).tenants
        return _roster(entries)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{file}: {_explain(item)}" for item in error.errors())) from None
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.message}") from None


def _tree(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror}); give router.tenants.file an existing file, or nothing"
        ) from None
    except yaml.MarkedYAMLError as error:
        at = f" near line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"not valid YAML{at}; correct it there") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError("not valid YAML; write it as UTF-8 text") from None


def _roster(entries: Mapping[str, _Entry]) -> _Roster:
    tenants = {name: entry.tenant(name) for name, entry in entries.items()}
    for name, entry in entries.items():
        _check_reachable(name, entry)
    return _Roster(
        num_named=len(tenants.keys() - {ANONYMOUS}),
        hashes=_index(tenants, "keys", {name: entry.keys for name, entry in entries.items()}),
        subjects=_index(tenants, "subjects", {name: entry.subjects for name, entry in entries.items()}),
        anonymous=tenants.get(ANONYMOUS, Tenant(ANONYMOUS)),
    )


def _check_reachable(name: str, entry: _Entry) -> None:
    has_credentials = bool(entry.keys or entry.subjects)
    if name == ANONYMOUS and has_credentials:
        raise ConfigError(
            f"`tenants.{name}`: is who has no credentials; move its keys and subjects to a tenant of another name"
        )
    if name != ANONYMOUS and not has_credentials:
        raise ConfigError(f"`tenants.{name}`: has neither keys nor subjects; give it one, or remove it")


def _index(tenants: Mapping[str, Tenant], field: str, values: Mapping[str, Sequence[str]]) -> dict[str, Tenant]:
    index: dict[str, Tenant] = {}
    for name, of_tenant in values.items():
        for position, value in enumerate(of_tenant):
            other = index.setdefault(value, tenants[name])
            if other.name != name:
                raise ConfigError(f"`tenants.{name}.{field}.{position}`: tenant {other.name} has it too; keep one")
    return index


def _explain(item: Any) -> str:
    """One finding, without the value if that could be a key."""
    at = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        fields = _Entry.model_fields if item["loc"][0] == "tenants" else _File.model_fields
        return f"there is no key `{at}`; valid keys there: {', '.join(fields)}"
    if item["loc"][2:3] == ("keys",):
        return f"`{at}`: must be a list of hashes such as {HASH_PREFIX}…, which `headwater api-key` prints"
    value = item["input"]
    got = repr(value) if isinstance(value, bool | int | float) else f"a {type(value).__name__}"
    return f"`{at}`: {item['msg']}, got {got}" if at else f"the top must be `tenants:`, got {got}"
