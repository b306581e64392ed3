"""deploy/kuberay: the chart's examples as plain manifests, for those who use no Helm.

`python -m cluster.kubernetes.examples` renders each of the chart's ci/*-values.yaml with Helm's own engine and writes
one file for each. It needs helm-python-sdk, which is installed with the `dev` extra.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

CHART: Final = Path("deploy/helm/headwater")
MANIFESTS: Final = Path("deploy/kuberay")
RELEASE: Final = "llm"
NAMESPACE: Final = "headwater"
HEADER: Final = """\
# Generated from {source} by `python -m cluster.kubernetes.examples`:
# change the chart, not this file. docs/deploy.md tells how to use it; rules for Prometheus and dashboards lie in
# deploy/prometheus and deploy/grafana.
"""
ORDER: Final = (
    "ServiceAccount",
    "Secret",
    "PersistentVolumeClaim",
    "NetworkPolicy",
    "Service",
    "PodDisruptionBudget",
    "PodMonitor",
    "Job",
    "RayService",
)
_KIND_ELSEWHERE: Final = re.compile(r"^kind: (ConfigMap|PrometheusRule)$", re.MULTILINE)  # copies of files of ours
_OF_HELM: Final = re.compile(r"^ *(helm\.sh/chart: .*|app\.kubernetes\.io/managed-by: Helm)\n", re.MULTILINE)


def examples() -> dict[str, Path]:
    """The values of each example, by its name."""
    return {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}


def render(values: Mapping[str, Any], *, chart: Path = CHART) -> dict[str, str]:
    """What Helm makes of the values, template to text. Raises HelmError with what is wrong with them."""
    import helm_python as helm  # for those who develop only

    with helm.Chart.load(chart) as loaded:
        rendered: dict[str, str] = loaded.render(dict(values), name=RELEASE, namespace=NAMESPACE)
        return rendered


def documents(rendered: Mapping[str, str]) -> list[str]:
    """The objects that are not for `helm test`, in the order in which a cluster wants them. Comments are kept."""
    texts = [text for path, text in sorted(rendered.items()) if path.endswith(".yaml") and "/tests/" not in path]
    found = [part.strip("\n") + "\n" for text in texts for part in re.split(r"^---$", text, flags=re.MULTILINE)]
    kinds = {part: (yaml.load(part, yaml.CSafeLoader) or {}).get("kind") for part in found}
    return sorted((part for part, kind in kinds.items() if kind), key=lambda part: _rank(kinds[part]))


def plain(values: Path) -> str:
    """One example as a file for kubectl."""
    rendered = render(yaml.safe_load(values.read_text(encoding="utf-8")))
    parts = [part for part in documents(rendered) if not _KIND_ELSEWHERE.search(part)]
    return HEADER.format(source=values) + "".join("---\n" + _OF_HELM.sub("", part) for part in parts)


def _rank(kind: str | None) -> int:
    return ORDER.index(kind) if kind in ORDER else len(ORDER)


if __name__ == "__main__":
    MANIFESTS.mkdir(exist_ok=True)
    for example, path in examples().items():
        (MANIFESTS / f"{example}.yaml").write_text(plain(path), encoding="utf-8")
