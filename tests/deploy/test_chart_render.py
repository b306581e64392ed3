"""The chart renders, lints, packs, and the files that are generated from it are up to date."""

import json
from pathlib import Path

import helm_python as helm
import pytest

from cluster.kubernetes import examples, values_schema
from tests.deploy import chart

REFERENCED = ("headwater-hub", "headwater-session", "headwater-tenants")


def test_there_is_an_example_for_each_kind_of_cluster() -> None:
    assert tuple(examples.examples()) == chart.EXAMPLES


def test_the_schema_is_up_to_date() -> None:
    written = (examples.CHART / "values.schema.json").read_text()
    assert written == values_schema.text(), "run python -m cluster.kubernetes.values_schema"


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_plain_manifests_are_up_to_date(example: str) -> None:
    written = (examples.MANIFESTS / f"{example}.yaml").read_text()
    assert written == examples.plain(examples.examples()[example]), "run python -m cluster.kubernetes.examples"


def test_there_are_no_other_plain_manifests() -> None:
    assert {path.stem for path in examples.MANIFESTS.iterdir()} == set(chart.EXAMPLES)


@pytest.mark.parametrize("example", [None, *chart.EXAMPLES])
@pytest.mark.parametrize("version", ["v1.29.0", "v1.37.0"])
def test_lint_finds_nothing(example: str | None, version: str) -> None:
    tree = chart.values(example) if example else {}
    report = helm.lint(examples.CHART, tree, strict=True, kube_version=version)
    worse_than_info = [message for message in report["messages"] if message["severity"] > 1]
    assert not worse_than_info
    assert not report["errors"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(helm.package(examples.CHART, destination=tmp_path_factory.mktemp("package")))


@pytest.mark.parametrize("example", chart.EXAMPLES)
def test_a_package_renders_as_the_folder_does(package: Path, example: str) -> None:
    assert examples.render(chart.values(example), chart=package) == examples.render(chart.values(example))


def test_a_package_holds_schema_rules_and_dashboards(package: Path) -> None:
    with helm.Chart.load(package) as loaded:
        assert loaded.schema == json.loads(values_schema.text())
        names = {file["name"] for file in loaded.files}
    assert {f"rules/{path.name}" for path in Path("deploy/prometheus/rules").iterdir()} <= names
    assert {f"dashboards/{path.name}" for path in Path("deploy/grafana").glob("*.json")} <= names


def test_a_package_refuses_what_the_schema_refuses(package: Path) -> None:
    with pytest.raises(helm.HelmError, match="additional properties 'routers' not allowed"):
        examples.render({"routers": {}}, chart=package)


def test_rendering_is_repeatable() -> None:
    tree = chart.values("many-nodes-drafters")
    assert examples.render(tree) == examples.render(tree)


def test_defaults_make_no_secret_and_ask_for_none() -> None:
    assert not chart.kind(chart.objects(), "Secret")


def test_a_session_token_that_is_given_makes_a_secret() -> None:
    found = chart.objects({"security": {"sessionToken": {"value": "s" * 32}}})
    (secret,) = chart.kind(found, "Secret")
    assert secret["metadata"]["name"] == "llm-headwater-session"
    assert str(chart.config(found).cluster.session_token_file) == "/etc/headwater/session/token"


def test_an_existing_secret_counts_before_a_value() -> None:
    token = {"value": "s" * 32, "existingSecret": "mine", "key": "secret"}
    found = chart.objects({"security": {"sessionToken": token}})
    assert not chart.kind(found, "Secret")
    for name, group in chart.groups(found).items():
        (volume,) = [one for one in group["template"]["spec"]["volumes"] if one["name"] == "session"]
        assert volume["secret"]["secretName"] == "mine", name
        assert volume["secret"]["items"] == [{"key": "secret", "path": "token"}], name


def test_extra_objects_are_templates() -> None:
    extra = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-more"}}
    (found,) = chart.kind(chart.objects({"extraObjects": [extra]}), "ConfigMap")
    assert found["metadata"]["name"] == "llm-more"


def test_common_labels_reach_objects_and_pods() -> None:
    found = chart.objects({"commonLabels": {"team": "search"}, "commonAnnotations": {"cost": "7"}})
    assert all(one["metadata"]["labels"]["team"] == "search" for one in found)
    assert all(one["metadata"]["annotations"]["cost"] == "7" for one in found)
    assert all(group["template"]["metadata"]["labels"]["team"] == "search" for group in chart.groups(found).values())


@pytest.mark.parametrize("example", ["one-gpu-node"])
def test_plain_manifests_say_which_secrets_they_need(example: str) -> None:
    text = (examples.MANIFESTS / f"{example}.yaml").read_text()
    assert all(name in text for name in REFERENCED)


def test_dashboards_have_the_label_that_grafana_looks_for() -> None:
    found = chart.kind(chart.of_example("many-nodes-drafters"), "ConfigMap")
    assert len(found) == len(list(Path("deploy/grafana").glob("*.json")))
    for one in found:
        assert one["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert all(json.loads(text) for text in one["data"].values())
