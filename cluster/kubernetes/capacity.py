"""What a cluster has free, node by node, and whether pods would find a place there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from cluster.kubernetes.needs import GPU, PodGroup, Resources, quantity, requests

_DONE: Final = ("Succeeded", "Failed")
_BLOCKING: Final = ("NoSchedule", "NoExecute")


@dataclass(frozen=True, slots=True)
class Node:
    """One machine: what it offers to pods, less what they have reserved."""

    name: str
    labels: Mapping[str, str]
    taints: Sequence[Mapping[str, Any]]
    free: Resources

    def takes(self, spec: Mapping[str, Any]) -> bool:
        """Whether a pod may run here at all: its node selector and its tolerations. Affinities are not looked at."""
        wanted = spec.get("nodeSelector") or {}
        if any(self.labels.get(name) != value for name, value in wanted.items()):
            return False
        return all(_is_tolerated(taint, spec.get("tolerations") or ()) for taint in self.taints)


def nodes(listed: Iterable[Mapping[str, Any]], pods: Iterable[Mapping[str, Any]]) -> list[Node]:
    """Those that take new pods. Both as the API server has them."""
    reserved: dict[str, list[Resources]] = {}
    for pod in pods:
        if (pod.get("status") or {}).get("phase") not in _DONE:
            reserved.setdefault(pod["spec"].get("nodeName") or "", []).append(requests(pod["spec"]))
    return [
        _node(node, reserved.get(node["metadata"]["name"], ()))
        for node in listed
        if not (node.get("spec") or {}).get("unschedulable")
    ]


def _node(node: Mapping[str, Any], reserved: Sequence[Resources]) -> Node:
    free = {name: quantity(amount) for name, amount in ((node.get("status") or {}).get("allocatable") or {}).items()}
    for amounts in reserved:
        for name, amount in amounts.items():
            free[name] = free.get(name, Decimal()) - amount
    taints = [taint for taint in (node.get("spec") or {}).get("taints") or () if taint.get("effect") in _BLOCKING]
    return Node(node["metadata"]["name"], node["metadata"].get("labels") or {}, taints, free)


def _is_tolerated(taint: Mapping[str, Any], tolerations: Sequence[Mapping[str, Any]]) -> bool:
    for toleration in tolerations:
        if toleration.get("effect") not in (None, "", taint["effect"]):
            continue
        if toleration.get("operator") == "Exists" and toleration.get("key") in (None, "", taint["key"]):
            return True
        if toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", ""):
            return True
    return False


def total(groups: Iterable[tuple[PodGroup, int]], name: str) -> Decimal:
    """What so many pods of each group reserve."""
    return sum((group.requests.get(name, Decimal()) * num for group, num in groups), Decimal())


def available(found: Iterable[Node], name: str) -> Decimal:
    """Free on all nodes together; an overfull one counts as nothing."""
    return sum((max(node.free.get(name, Decimal()), Decimal()) for node in found), Decimal())


def unplaced(found: Sequence[Node], groups: Sequence[tuple[PodGroup, int]]) -> dict[str, int]:
    """How many pods of each group find no node: the greediest first, each where the least is left over."""
    left = [dict(node.free) for node in found]
    lacking: dict[str, int] = {}
    for group, num in sorted(groups, key=lambda pair: _greed(pair[0]), reverse=True):
        wanted = {name: amount for name, amount in group.requests.items() if amount}
        for _ in range(num):
            fitting = [
                index
                for index, node in enumerate(found)
                if node.takes(group.spec) and all(left[index].get(name, 0) >= amount for name, amount in wanted.items())
            ]
            if not fitting:
                lacking[group.name] = lacking.get(group.name, 0) + 1
                continue
            best = min(fitting, key=lambda index: (left[index].get(GPU, 0), left[index].get("memory", 0)))
            for name, amount in wanted.items():
                left[best][name] -= amount
    return lacking


def _greed(group: PodGroup) -> tuple[Decimal, Decimal, Decimal]:
    wanted = group.requests
    return (wanted.get(GPU, Decimal()), wanted.get("memory", Decimal()), wanted.get("cpu", Decimal()))
