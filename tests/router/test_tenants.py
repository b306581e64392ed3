"""Who calls: the file, its refusals, its changes, and what a call's credentials say."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import from_tree
from protos.errors import ConfigError, Unauthenticated
from router.api_key import key_hash, new_key
from router.config import TenantsSection
from router.tenants import EVERYBODY, LARGEST_PRIORITY, Tenant, Tenants

KEY, OTHER_KEY = "hw-key-of-acme", "hw-key-of-globex"
EXAMPLE_KEY = "hw-example-key-that-nobody-should-use-000000000000"


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def two_tenants() -> dict[str, dict[str, Any]]:
    return {
        "acme": {"keys": [key_hash(KEY)], "subjects": ["client.acme.example"], "weight": 2},
        "globex": {"keys": [key_hash(OTHER_KEY)], "subjects": ["globex"]},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tenants.yaml"


@pytest.fixture
def write(file: Path) -> Callable[[Any], None]:
    """Puts a new file in the old one's place, by renaming."""

    def put(content: Any) -> None:
        text = content if isinstance(content, str) else yaml.safe_dump({"tenants": content})
        fresh = file.with_suffix(".new")
        fresh.write_text(text)
        fresh.rename(file)

    return put


def tenants(file: Path, clock: Clock | None = None, **options: Any) -> Tenants:
    return Tenants(TenantsSection(file=file, **options), clock or Clock())


def test_without_a_file_everybody_is_one_tenant_without_limits() -> None:
    everybody = Tenants(TenantsSection())
    assert everybody.identify(None, ()) == everybody.identify("any", ("name",)) == EVERYBODY
    assert Tenant("default", max_priority=LARGEST_PRIORITY, is_admin=True) == EVERYBODY
    assert not everybody.has_many


def test_keys_and_subjects_name_tenants(file: Path, write: Callable[[Any], None]) -> None:
    write(two_tenants())
    known = tenants(file)
    assert known.identify(KEY, ()) == known.identify(None, ("x", "client.acme.example")) == Tenant("acme", weight=2)
    assert known.identify(OTHER_KEY, ()).name == "globex"
    assert known.identify(OTHER_KEY, ("client.acme.example",)).name == "globex"  # a key decides
    assert known.has_many


def test_every_limit_is_read(file: Path, write: Callable[[Any], None]) -> None:
    limits = {
        "weight": 0.5,
        "max_running": 3,
        "max_queued": 0,
        "requests_per_s": 0.1,
        "tokens_per_s": 1000,
        "max_priority": -2,
        "is_admin": True,
    }
    write({"acme": {"keys": [key_hash(KEY)], **limits}})
    assert tenants(file).identify(KEY, ()) == Tenant("acme", **limits)


@pytest.mark.parametrize("allow_anonymous", [False, True])
def test_a_wrong_key_is_refused_whatever_else_there_is(
    file: Path, write: Callable[[Any], None], allow_anonymous: bool
) -> None:
    write(two_tenants())
    with pytest.raises(Unauthenticated) as caught:
        tenants(file, allow_anonymous=allow_anonymous).identify("hw-wrong", ("globex",))
    assert "hw-wrong" not in caught.value.message
    assert "API key is not known" in caught.value.message


@pytest.mark.parametrize(
    ("subjects", "told"),
    [
        ((), "neither an API key nor a client certificate"),
        (("stranger",), r"the client certificate's subjects \(stranger\)"),
        (("globex", "client.acme.example"), r"2 tenants \(acme, globex\)"),
    ],
)
def test_what_is_missing_is_told(
    file: Path, write: Callable[[Any], None], subjects: tuple[str, ...], told: str
) -> None:
    write(two_tenants())
    with pytest.raises(Unauthenticated, match=told):
        tenants(file).identify(None, subjects)


def test_anonymous_callers_have_the_limits_of_the_file(file: Path, write: Callable[[Any], None]) -> None:
    write(two_tenants())
    known = tenants(file, allow_anonymous=True)
    assert known.identify(None, ()) == known.identify(None, ("stranger",)) == Tenant("anonymous")
    assert known.identify(None, ("globex",)).name == "globex"
    write({**two_tenants(), "anonymous": {"max_running": 1}})
    assert tenants(file, allow_anonymous=True).identify(None, ()) == Tenant("anonymous", max_running=1)
    with pytest.raises(Unauthenticated):
        tenants(file).identify(None, ())


def test_one_tenant_alone_is_not_many(file: Path, write: Callable[[Any], None]) -> None:
    write({"acme": {"keys": [key_hash(KEY)]}, "anonymous": {}})
    assert not tenants(file).has_many
    assert tenants(file, allow_anonymous=True).has_many


def test_salts_keep_tenants_apart_unless_told_otherwise(file: Path, write: Callable[[Any], None]) -> None:
    write(two_tenants())
    apart, together = tenants(file), tenants(file, isolation="none")
    acme, globex = apart.identify(KEY, ()), apart.identify(OTHER_KEY, ())
    assert apart.cache_salt(acme) != apart.cache_salt(globex)
    assert together.cache_salt(acme) == together.cache_salt(globex) == ""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"acme": {"keys": ["hw-in-plain-text"]}}, r"`tenants\.acme\.keys\.0`: must be a list of hashes"),
        ({"acme": {"keys": "hw-in-plain-text"}}, r"`tenants\.acme\.keys`: must be a list of hashes"),
        ({"acme": ["hw-in-plain-text"]}, r"`tenants\.acme`: .* got a list"),
        ({"acme": {"keys": [key_hash(KEY)], "max_runing": 3}}, r"no key `tenants\.acme\.max_runing`.*max_running"),
        ({"acme": {"keys": [key_hash(KEY)], "weight": 0}}, r"`tenants\.acme\.weight`: .* got 0"),
        ({"acme": {"keys": [key_hash(KEY)], "weight": float("inf")}}, r"`tenants\.acme\.weight`"),
        ({"acme": {"keys": [key_hash(KEY)], "max_running": 0}}, r"`tenants\.acme\.max_running`: .* got 0"),
        ({"acme": {"keys": [key_hash(KEY)], "max_running": "64"}}, r"`tenants\.acme\.max_running`: .* got a str"),
        ({"acme": {"keys": [key_hash(KEY)], "is_admin": "yes"}}, r"`tenants\.acme\.is_admin`"),
        ({"a b": {"keys": [key_hash(KEY)]}}, r"`tenants\.a b"),
        ({"acme": {}}, r"`tenants\.acme`: has neither keys nor subjects"),
        ({"anonymous": {"subjects": ["a"]}}, r"`tenants\.anonymous`: is who has no credentials"),
        (
            {"acme": {"keys": [key_hash(KEY)]}, "globex": {"keys": [key_hash(OTHER_KEY), key_hash(KEY)]}},
            r"`tenants\.globex\.keys\.1`: tenant acme has it too",
        ),
        (
            {"acme": {"subjects": ["a"]}, "globex": {"subjects": ["a"]}},
            r"`tenants\.globex\.subjects\.0`: tenant acme has it too",
        ),
        ("tenants:\n  acme: {subjects: [a]}\n  acme: {subjects: [b]}\n", "lines 2 and 3 both give the key `acme`"),
        ("tenants:\n  acme: [hw-in-plain-text\n", "not valid YAML near line 3"),
        ("tenant: {}\n", "no key `tenant`; valid keys there: tenants"),
        ("", "the top must be `tenants:`"),
        ("\0", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_with_key_and_remedy(
    file: Path, write: Callable[[Any], None], content: Any, told: str
) -> None:
    write(content)
    with pytest.raises(ConfigError) as caught:
        tenants(file)
    assert str(file) in caught.value.message
    assert re.search(told, caught.value.message)
    assert "plain-text" not in caught.value.message


def test_a_missing_file_is_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=f"{file}: cannot be read"):
        tenants(file)


def test_a_change_counts_after_the_reload_time(file: Path, write: Callable[[Any], None]) -> None:
    write(two_tenants())
    clock = Clock()
    known = tenants(file, clock, reload_s=1.0)
    write({"initech": {"keys": [key_hash(KEY)]}})
    clock.now += 0.999
    assert known.identify(KEY, ()).name == "acme"
    clock.now += 0.001
    assert known.identify(KEY, ()).name == "initech"
    with pytest.raises(Unauthenticated):
        known.identify(OTHER_KEY, ())


def test_another_file_of_the_same_size_and_time_is_a_change(file: Path, write: Callable[[Any], None]) -> None:
    write({"acme": {"keys": [key_hash(KEY)]}})
    before, clock = file.stat(), Clock()
    known = tenants(file, clock)
    write({"emca": {"keys": [key_hash(KEY)]}})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    clock.now += 1
    assert known.identify(KEY, ()).name == "emca"


def test_a_link_that_points_elsewhere_is_a_change(tmp_path: Path) -> None:
    """As Kubernetes changes a mounted Secret: file → ..data/file, ..data → a directory by date."""
    for name, tenant in (("v1", "acme"), ("v2", "globex")):
        (tmp_path / name).mkdir()
        entry = {"tenants": {tenant: {"keys": [key_hash(KEY)]}}}
        (tmp_path / name / "tenants.yaml").write_text(yaml.safe_dump(entry))
    data, clock = tmp_path / "..data", Clock()
    data.symlink_to("v1")
    (tmp_path / "tenants.yaml").symlink_to("..data/tenants.yaml")
    known = tenants(tmp_path / "tenants.yaml", clock)
    assert known.identify(KEY, ()).name == "acme"
    (tmp_path / "..data_tmp").symlink_to("v2")
    (tmp_path / "..data_tmp").rename(data)
    clock.now += 1
    assert known.identify(KEY, ()).name == "globex"


@pytest.mark.parametrize("broken", ["tenants: [hw-in-plain-text]", "{", None])
def test_a_broken_change_keeps_the_old_file_in_force_and_is_told_once(
    file: Path, write: Callable[[Any], None], broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    write(two_tenants())
    clock = Clock()
    known = tenants(file, clock)
    if broken is None:
        file.unlink()
    else:
        write(broken)
    with caplog.at_level(logging.ERROR, "router.tenants"):
        for _ in range(3):
            clock.now += 1
            assert known.identify(KEY, ()).name == "acme"
    assert len(caplog.records) == 1
    assert str(file) in caplog.text
    assert "plain-text" not in caplog.text
    write({"initech": {"keys": [key_hash(KEY)]}})
    clock.now += 1
    assert known.identify(KEY, ()).name == "initech"


def test_keys_are_new_long_and_need_no_quoting() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"hw-[A-Za-z0-9_-]{43}", key) for key in keys)


def test_the_example_is_a_valid_file_of_which_the_key_is_known(root: Path) -> None:
    known = tenants(root / "deploy" / "config" / "tenants.example.yaml", allow_anonymous=True)
    acme = known.identify(EXAMPLE_KEY, ())
    assert replace(acme, name="") == Tenant("", 2, 64, 256, 20, 50000, 10)
    assert known.identify(None, ("spiffe://example.internal/operations",)).is_admin
    assert known.identify(None, ("batch.example.internal",)).max_priority == -1
    assert known.identify(None, ()) == Tenant("anonymous", max_running=2, requests_per_s=1)


def test_the_files_in_the_docs_are_valid(root: Path, file: Path) -> None:
    page = (root / "docs" / "tenants.md").read_text()
    cluster, listing = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert from_tree(yaml.safe_load(cluster), source="docs").router.tenants.file
    file.write_text(listing)
    assert tenants(file).identify(None, ("client.globex.example",)).tokens_per_s == 20000
    assert EXAMPLE_KEY in page


def test_the_table_in_the_docs_has_every_key(root: Path, file: Path, write: Callable[[Any], None]) -> None:
    write({"acme": {"nothing": 0}})
    with pytest.raises(ConfigError) as caught:
        tenants(file)
    valid = caught.value.message.split("valid keys there: ")[1].splitlines()[0].split(", ")
    rows = re.findall(r"^\| (`.*?) \|", (root / "docs" / "tenants.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(valid)
