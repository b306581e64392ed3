"""The chart as Helm renders it: objects, the Serve configuration inside, and the pods of each of Ray's groups."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cluster.config import HeadwaterConfig, from_tree
from cluster.kubernetes import examples

Object = dict[str, Any]

EXAMPLES = ("many-nodes-drafters", "one-cpu-node", "one-gpu-node", "vllm")


@functools.cache
def values(example: str) -> Object:
    """Those of an example. Shared: not to be changed."""
    tree: Object = yaml.safe_load(examples.examples()[example].read_text())
    return tree


@functools.cache
def of_example(example: str) -> tuple[Object, ...]:
    """Every object of an example, that of `helm test` too. Shared: not to be changed."""
    return objects(values(example))


def objects(tree: Mapping[str, Any] | None = None, *, text: str = "") -> tuple[Object, ...]:
    """What the chart makes of values, given as a tree or as YAML."""
    rendered = examples.render(tree or yaml.safe_load(text) or {})
    parts = [*examples.documents(rendered), *(text for path, text in rendered.items() if "/tests/" in path)]
    return tuple(yaml.load(part, yaml.CSafeLoader) for part in parts)


def kind(all_objects: tuple[Object, ...], name: str) -> list[Object]:
    """Those of one kind."""
    return [one for one in all_objects if one["kind"] == name]


def ray_cluster(all_objects: tuple[Object, ...]) -> Object:
    cluster: Object = kind(all_objects, "RayService")[0]["spec"]["rayClusterConfig"]
    return cluster


def groups(all_objects: tuple[Object, ...]) -> dict[str, Object]:
    """Ray's groups by name, the head's among them."""
    cluster = ray_cluster(all_objects)
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def serve(all_objects: tuple[Object, ...]) -> Object:
    """What Serve is told."""
    tree: Object = yaml.safe_load(kind(all_objects, "RayService")[0]["spec"]["serveConfigV2"])
    return tree


def config(all_objects: tuple[Object, ...]) -> HeadwaterConfig:
    """What the program makes of the application's args. Raises ConfigError."""
    (application,) = serve(all_objects)["applications"]
    return from_tree(application["args"], source="the chart")


def deployments(all_objects: tuple[Object, ...]) -> dict[str, int]:
    """The number of replicas that Serve is told, by deployment."""
    (application,) = serve(all_objects)["applications"]
    return {one["name"]: one["num_replicas"] for one in application["deployments"]}


def pods(all_objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """Every pod template with a name: Ray's groups, the Job's and the test's."""
    for name, group in groups(all_objects).items():
        yield name, group["template"]
    for job in kind(all_objects, "Job"):
        yield "download", job["spec"]["template"]
    for pod in kind(all_objects, "Pod"):
        yield "test", pod


def ray_container(group: Object) -> Object:
    (container,) = group["template"]["spec"]["containers"]
    return dict(container)
