"""What holds for all manifests, nodes and values: on the side of `headwater deploy`, and of the fake API server."""

from __future__ import annotations

import base64
from decimal import Decimal
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kubernetes.capacity import Node, available, total, unplaced
from cluster.kubernetes.changes import Change
from cluster.kubernetes.manifests import Manifest
from cluster.kubernetes.needs import GPU, PodGroup
from tests.deploy.api_fields import MISSING, found, from_v1, leaves, merged, to_v1, without
from tests.deploy.api_schemas import built_in_kinds

AMOUNTS = st.integers(0, 8)
NODES = st.lists(st.tuples(AMOUNTS, AMOUNTS), max_size=5)
GROUPS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 5)), max_size=4)
TEXT = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=12, max_size=20)
PORTS = st.lists(st.integers(1, 5), unique=True, max_size=3)
POD = next(kind for kind in built_in_kinds() if kind.kind == "Pod").root


def group(index: int, gpus: int, cpus: int) -> PodGroup:
    container = {"name": "c", "resources": {"requests": {GPU: gpus, "cpu": cpus}}}
    return PodGroup(f"g{index}", {"spec": {"containers": [container]}}, 1, 1)


@settings(deadline=None)
@given(NODES, GROUPS)
def test_what_is_placed_fits(free: list[tuple[int, int]], wanted: list[tuple[int, int, int]]) -> None:
    nodes = [Node(f"n{i}", {}, (), {GPU: Decimal(gpus), "cpu": Decimal(cpus)}) for i, (gpus, cpus) in enumerate(free)]
    groups = [(group(i, gpus, cpus), num) for i, (gpus, cpus, num) in enumerate(wanted)]
    lacking = unplaced(nodes, groups)
    placed = [(one, num - lacking.get(one.name, 0)) for one, num in groups]
    assert all(total(placed, name) <= available(nodes, name) for name in (GPU, "cpu"))
    assert all(0 <= lacking.get(one.name, 0) <= num for one, num in groups)


@settings(deadline=None)
@given(NODES, st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9)))
def test_of_pods_that_are_alike_as_many_are_placed_as_can_be(
    free: list[tuple[int, int]], wanted: tuple[int, int, int]
) -> None:
    gpus, cpus, num = wanted
    nodes = [Node(f"n{i}", {}, (), {GPU: Decimal(g), "cpu": Decimal(c)}) for i, (g, c) in enumerate(free)]
    room = sum(min(g // gpus, c // cpus) for g, c in free)
    assert unplaced(nodes, [(group(0, gpus, cpus), num)]).get("g0", 0) == max(0, num - room)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), TEXT), st.dictionaries(st.sampled_from("abc"), TEXT))
def test_no_value_of_a_secret_is_in_a_diff(before: dict[str, str], after: dict[str, str]) -> None:
    def secret(values: dict[str, str]) -> dict[str, Any]:
        data = {name: base64.b64encode(value.encode()).decode() for name, value in values.items()}
        return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": data}

    change = Change(Manifest(secret(after), "here"), "default", secret(before), secret(after))
    lines = "\n".join(change.diff())
    assert (lines == "") == (before == after)
    for value in (*before.values(), *after.values()):
        assert value not in lines
        assert base64.b64encode(value.encode()).decode() not in lines


@st.composite
def pods(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from("abc"), unique=True, min_size=1))
    containers = [
        {
            "name": name,
            "image": draw(st.sampled_from("xyz")),
            "ports": [{"containerPort": port} for port in draw(PORTS)],
        }
        for name in names
    ]
    labels = draw(st.dictionaries(st.sampled_from("abc"), st.sampled_from("xyz")))
    return {"metadata": {"labels": labels}, "spec": {"containers": containers}}


@settings(deadline=None)
@given(pods(), pods())
def test_what_is_applied_is_there_and_owned_field_by_field(live: dict[str, Any], applied: dict[str, Any]) -> None:
    value = merged(live, applied, POD)
    paths = leaves(applied, POD)
    assert set(from_v1(to_v1(paths))) == paths
    assert merged(value, applied, POD) == value
    for path in paths:
        wanted = found(applied, path, POD)
        assert path[-1].startswith("k:") or wanted in ({}, []) or found(value, path, POD) == wanted
    for path in sorted(paths, key=len, reverse=True):
        value = without(value, path, POD)
        assert found(value, path, POD) is MISSING
