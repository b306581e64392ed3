"""`headwater deploy diff`, `apply` and `uninstall`: what changes, whose it is, and that nothing changes by halves."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes.manifests import MARK, load
from protos.errors import KubernetesError, ManifestError
from tests.deploy.api_server import ApiServer
from tests.deploy.conftest import Deploy
from tests.deploy.rays import ray_service


def config_map(name: str = "settings", **data: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def secret(**values: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": values}


def test_apply_creates_then_changes_then_leaves_alone(kube: ApiServer, deploy: Deploy) -> None:
    service = ray_service()
    file = deploy.file(service, config_map(a="1"))
    assert deploy.run("apply", "-f", file).stdout.splitlines() == [
        "created   ConfigMap default/settings",
        "created   RayService default/demo",
    ]
    assert kube.get("RayService", "demo")["metadata"]["labels"] == {MARK: "default"}
    assert {line.split()[0] for line in deploy.run("apply", "-f", file).stdout.splitlines()} == {"unchanged"}
    service["spec"]["rayClusterConfig"]["rayVersion"] = "2.61.0"
    outcomes = deploy.json("apply", "-f", deploy.file(service, config_map(b="2")))
    assert [one["outcome"] for one in outcomes] == ["changed", "changed"]
    assert kube.get("ConfigMap", "settings")["data"] == {"b": "2"}
    assert kube.get("RayService", "demo")["spec"]["rayClusterConfig"]["rayVersion"] == "2.61.0"


def test_fields_of_others_stay(kube: ApiServer, deploy: Deploy) -> None:
    kube.add(config_map(theirs="1"), manager="kubectl")
    assert deploy.run("apply", "-f", deploy.file(config_map(ours="2"))).exit_code == 0
    assert kube.get("ConfigMap", "settings")["data"] == {"theirs": "1", "ours": "2"}


def test_a_conflict_names_the_manager_and_the_field_and_changes_nothing(kube: ApiServer, deploy: Deploy) -> None:
    kube.add(config_map(level="1"), manager="kubectl-edit")
    file = deploy.file(config_map("another", x="1"), config_map(level="2"))
    done = deploy.run("apply", "-f", file)
    assert done.exit_code == 1
    assert "ConfigMap default/settings: .data.level is set by 'kubectl-edit'" in done.stderr
    assert "--force-conflicts" in done.stderr
    assert not kube.has("ConfigMap", "another")
    assert deploy.run("apply", "-f", file, "--force-conflicts").exit_code == 0
    assert kube.get("ConfigMap", "settings")["data"] == {"level": "2"}
    assert deploy.run("apply", "-f", file).exit_code == 0


def test_an_object_that_is_refused_keeps_the_others_from_being_applied(kube: ApiServer, deploy: Deploy) -> None:
    wrong = ray_service()
    wrong["spec"]["rayClusterConfig"]["rayVersoin"] = "1"
    done = deploy.run("apply", "-f", deploy.file(config_map(a="1"), wrong))
    assert isinstance(done.exception, KubernetesError)
    assert "RayService default/demo" in done.exception.message
    assert "rayVersoin" in done.exception.message
    assert "manifests.yaml, document 2" in done.exception.message
    assert not kube.has("ConfigMap", "settings")


def test_a_namespace_that_is_missing_is_to_be_made(deploy: Deploy) -> None:
    done = deploy.run("apply", "-n", "llm", "-f", deploy.file(config_map(a="1")))
    assert isinstance(done.exception, KubernetesError)
    assert done.exception.message.endswith('namespaces "llm" not found; kubectl create namespace llm')


def test_a_namespace_of_the_manifests_is_made_first(kube: ApiServer, deploy: Deploy) -> None:
    made = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "llm"}}
    inside = config_map(a="1")
    inside["metadata"]["namespace"] = "llm"
    file = deploy.file(inside, made)
    assert len(deploy.run("diff", "-f", file).stdout.splitlines()) > 4
    assert [one["object"] for one in deploy.json("apply", "-f", file)] == ["Namespace llm", "ConfigMap llm/settings"]
    assert kube.has("ConfigMap", "settings", "llm")
    assert deploy.run("diff", "-f", file).exit_code == 0


def test_a_kind_of_the_manifests_is_known_when_it_is_applied(kube: ApiServer, deploy: Deploy) -> None:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "springs.example.com"},
        "spec": {
            "group": "example.com",
            "scope": "Namespaced",
            "names": {"kind": "Spring", "plural": "springs"},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
        },
    }
    spring = {"apiVersion": "example.com/v1", "kind": "Spring", "metadata": {"name": "s"}, "spec": {"a": 1}}
    assert deploy.run("apply", "-f", deploy.file(spring, definition)).exit_code == 0
    assert kube.get("Spring", "s")["spec"] == {"a": 1}


def test_diff_shows_what_differs_and_changes_nothing(kube: ApiServer, deploy: Deploy) -> None:
    deploy.run("apply", "-f", deploy.file(config_map(a="1"), ray_service()))
    version = kube.store.version
    same = deploy.run("diff", "-f", deploy.file(config_map(a="1"), ray_service()))
    assert (same.exit_code, same.stdout) == (0, "")
    done = deploy.run("diff", "-f", deploy.file(config_map(a="2"), ray_service(num_workers=3)))
    assert done.exit_code == 1
    assert "--- live ConfigMap default/settings" in done.stdout
    assert "\n-  a: '1'\n+  a: '2'\n" in done.stdout
    assert "-      replicas: 2\n+      replicas: 3\n" in done.stdout
    assert kube.store.version == version


def test_diff_never_shows_a_secret(deploy: Deploy) -> None:
    deploy.run("apply", "-f", deploy.file(secret(key="swordfish", kept="x")))
    done = deploy.run("diff", "-f", deploy.file(secret(key="trout", kept="x")))
    assert done.exit_code == 1
    assert "-  key: '*** (before)'\n+  key: '*** (after)'" in done.stdout
    assert "swordfish" not in done.stdout
    assert "c3dvcmRmaXNo" not in done.stdout
    assert "***" in deploy.run("diff", "-f", deploy.file(secret(other="x"))).stdout


def test_uninstall_takes_what_was_applied_and_nothing_else(kube: ApiServer, deploy: Deploy) -> None:
    kube.add(config_map("theirs", a="1"))
    labelled = config_map("copied", a="1")
    labelled["metadata"]["labels"] = {MARK: "default"}
    kube.add(labelled)
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    data = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "cache"}, "spec": claim}
    deploy.run("apply", "-f", deploy.file(config_map(a="1"), ray_service(), data))
    done = deploy.run("uninstall", "--yes")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "kept     PersistentVolumeClaim default/cache (--with-data removes it)",
        "to go    RayService default/demo",
        "to go    ConfigMap default/settings",
        "all gone",
    ]
    assert kube.has("ConfigMap", "theirs")
    assert kube.has("ConfigMap", "copied")
    assert deploy.run("uninstall", "--yes", "--with-data").exit_code == 0
    assert not kube.has("PersistentVolumeClaim", "cache")
    assert "nothing to remove" in deploy.run("uninstall", "--yes").stdout


def test_uninstall_asks_and_can_be_told_what(kube: ApiServer, deploy: Deploy) -> None:
    deploy.run("apply", "-f", deploy.file(config_map(a="1"), ray_service()))
    assert deploy.run("uninstall", stdin="n\n").exit_code == 1
    assert kube.has("RayService", "demo")
    only = deploy.file(config_map(), name="only.yaml")
    assert deploy.run("uninstall", "-f", only, stdin="y\n").exit_code == 0
    assert (kube.has("ConfigMap", "settings"), kube.has("RayService", "demo")) == (False, True)


def test_uninstall_finds_what_the_manifests_put_elsewhere(kube: ApiServer, deploy: Deploy) -> None:
    made = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "llm"}}
    inside = config_map(a="1")
    inside["metadata"]["namespace"] = "llm"
    deploy.run("apply", "-f", deploy.file(made, inside))
    assert kube.get("ConfigMap", "settings", "llm")["metadata"]["labels"] == {MARK: "llm"}
    assert "nothing to remove" in deploy.run("uninstall", "--yes").stdout
    kube.forbidden.add(("list", "secrets"))
    assert "to go    ConfigMap llm/settings" in deploy.run("uninstall", "--yes", "-n", "llm").stdout
    assert not kube.has("ConfigMap", "settings", "llm")
    assert kube.has("Namespace", "llm", "")


def test_uninstall_waits_until_all_is_gone(kube: ApiServer, deploy: Deploy) -> None:
    service = ray_service()
    service["metadata"]["finalizers"] = ["ray.io/cleanup"]
    deploy.run("apply", "-f", deploy.file(service))
    stuck = deploy.run("uninstall", "--yes", "--timeout", "0.2")
    assert stuck.exit_code == 1
    assert "still there after 0.2 s: RayService default/demo" in stuck.stderr

    def end() -> None:
        while len([line for line in kube.asked if line.startswith('"DELETE')]) < 2:
            time.sleep(0.01)
        kube.release("RayService", "demo")

    ending = threading.Thread(target=end)
    ending.start()
    done = deploy.run("uninstall", "--yes", "--timeout", "30")
    ending.join()
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "all gone"


def test_forbidden_and_unreachable_and_no_kubeconfig_say_so(kube: ApiServer, deploy: Deploy, tmp_path: Path) -> None:
    file = deploy.file(config_map(a="1"))
    kube.forbidden.add(("patch", "configmaps"))
    refused = deploy.run("apply", "-f", file).exception
    assert isinstance(refused, KubernetesError)
    assert refused.message.startswith("forbidden: ")
    assert "preflight" in refused.message
    gone = tmp_path / "gone"
    gone.write_text(deploy.kubeconfig.read_text().replace(kube.url, "http://127.0.0.1:1"))
    absent = Deploy(gone, tmp_path).run("status").exception
    assert isinstance(absent, KubernetesError)
    assert absent.message.startswith("the API server http://127.0.0.1:1 cannot be reached (Failed to establish")
    assert "Connection refused" in absent.message
    none = Deploy(tmp_path / "none", tmp_path).run("status").exception
    assert isinstance(none, KubernetesError)
    assert "no usable kubeconfig" in none.message
    other = deploy.run("status", "--context", "other").exception
    assert isinstance(other, KubernetesError)
    assert "other" in other.message
    (tmp_path / "torn").write_text("clusters: [")
    torn = Deploy(tmp_path / "torn", tmp_path).run("status").exception
    assert isinstance(torn, KubernetesError)
    assert "kubeconfig" in torn.message


def test_a_context_has_its_namespace_even_without_a_current_one(
    kube: ApiServer, deploy: Deploy, tmp_path: Path
) -> None:
    kube.add({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "llm"}})
    path = kube.kubeconfig(tmp_path / "several", namespace="llm")
    path.write_text(path.read_text().replace("current-context: fake\n", ""))
    several = Deploy(path, tmp_path)
    assert isinstance(several.run("status").exception, KubernetesError)
    done = several.run("apply", "--context", "fake", "-f", deploy.file(config_map(a="1")))
    assert done.stdout == "created   ConfigMap llm/settings\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\n---\nb: [", "document 2: not YAML"),
        ("kind: Pod\n", "document 1: apiVersion is missing"),
        ("[]", "document 1: a list"),
        ("apiVersion: v1\nkind: Pod\n", "document 1: Pod has no metadata.name"),
        ("# nothing\n", "there is no object"),
    ],
)
def test_bad_manifests_name_the_file_and_the_document(deploy: Deploy, tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace("a: 1", "apiVersion: v1\nkind: Pod\nmetadata: {name: p}"))
    done = deploy.run("apply", "-f", str(path))
    assert isinstance(done.exception, ManifestError)
    assert str(path) in done.exception.message
    assert says in done.exception.message


def test_manifests_come_from_folders_and_the_standard_input(kube: ApiServer, deploy: Deploy, tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "b.yaml").write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": [config_map(a="1")]}))
    test_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "t", "annotations": {"helm.sh/hook": "test"}}}
    (folder / "a.yml").write_text(yaml.safe_dump(test_pod))
    (folder / "notes.txt").write_text("not: [yaml")
    assert [one.title for one in load([str(folder)])] == ["ConfigMap settings"]
    done = deploy.run("apply", "-f", "-", stdin=yaml.safe_dump(config_map("piped", a="1")))
    assert done.exit_code == 0, done.output
    assert kube.has("ConfigMap", "piped")
    twice = deploy.file(config_map(), config_map())
    with pytest.raises(ManifestError, match=r"is in .* already"):
        load([twice])


def test_a_namespace_that_contradicts_the_manifest_is_refused(deploy: Deploy) -> None:
    inside = config_map(a="1")
    inside["metadata"]["namespace"] = "llm"
    done = deploy.run("apply", "-f", deploy.file(inside), "--namespace", "other")
    assert isinstance(done.exception, ManifestError)
    assert "namespace llm" in done.exception.message
