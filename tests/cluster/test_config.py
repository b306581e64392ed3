"""The configuration tree: what it accepts, and how it says no."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from cluster.config import PACKAGE_ROOT, HeadwaterConfig, key_paths, load
from protos.errors import ConfigError


def refusal(tmp_path: Path, text: str = "", *overrides: str) -> str:
    """The message of the error that a file and overrides give."""
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    return caught.value.message


def leaves(section: type[BaseModel]) -> Iterator[tuple[str, str | None]]:
    """Every key that holds a value, with its description."""
    for name, field in section.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        below = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not below:
            yield f"{section.__name__}.{name}", field.description
        for kind in below:
            yield from leaves(kind)


def test_no_file_means_all_defaults() -> None:
    config = load(None)
    assert config.cluster.num_workers == 2
    assert config.cluster.ray.is_local


def test_file_and_overrides_are_one_tree(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("cluster:\n  num_workers: 3\n  num_routers: 1\n")
    config = load(file, ["cluster.num_workers=5", "worker.engine.kv.prefix_cache=false", "worker.model.name=tide"])
    assert config.cluster.num_workers == 5
    assert config.worker.engine.kv.prefix_cache is False
    assert config.worker.model.served_name == "tide"


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("cluster: {num_workerz: 3}", "cluster.num_workerz", "cluster.num_workers"),
        ("router: {grpc: {prot: 1}}", "router.grpc.prot", "router.grpc.port"),
        ("cluster: {num_pages: 3}", "cluster.num_pages", "worker.engine.kv.num_pages"),
        ("workers: {}", "workers", "worker"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_real_one(tmp_path: Path, text: str, key: str, suggestion: str) -> None:
    message = refusal(tmp_path, text)
    assert f"no key `{key}`" in message
    assert f"did you mean `{suggestion}`" in message
    assert "cluster.yaml" in message


def test_unknown_override_is_named_as_typed(tmp_path: Path) -> None:
    assert "--set cluster.num_worker=3" in refusal(tmp_path, "", "cluster.num_worker=3")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("cluster.num_workers=many", "cluster.num_workers"),
        ("cluster.num_workers=0", "cluster.num_workers"),
        ("cluster.ready_timeout_s=.inf", "cluster.ready_timeout_s"),
        ("worker.engine.kind=vroom", "worker.engine.kind"),
        ("cluster=5", "cluster"),
        ("worker.engine.scheduler.step_tokens=1", "worker.engine.scheduler"),
    ],
)
def test_wrong_value_is_named_by_its_key_and_source(tmp_path: Path, override: str, key: str) -> None:
    message = refusal(tmp_path, "", override)
    assert f"`{key}`" in message
    assert f"--set {override}" in message


def test_error_of_the_file_is_not_blamed_on_an_override(tmp_path: Path) -> None:
    message = refusal(tmp_path, "cluster: {num_workers: x}", "router.grpc.port=1")
    assert message.startswith(str(tmp_path / "cluster.yaml"))


def test_every_mistake_is_reported(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, "cluster: {num_workers: x, num_routers: y}").splitlines()) == 2


def test_duplicate_key_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "cluster:\n  num_workers: 1\n  num_workers: 2\n")
    assert "lines 2 and 3" in message
    assert "`num_workers`" in message


@pytest.mark.parametrize("text", ["- a", "just words", "a: [", "a: \x07"])
def test_file_that_is_no_tree_is_refused(tmp_path: Path, text: str) -> None:
    assert "cluster.yaml" in refusal(tmp_path, text)


@pytest.mark.parametrize("override", ["novalue", "=1", "a..b=1", "cluster.num_workers=[", ""])
def test_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    assert f"--set {override}" in refusal(tmp_path, "", override)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read"):
        load(tmp_path / "missing.yaml")


SHIPPED = sorted({*(PACKAGE_ROOT / "deploy/config").glob("*.yaml")} - {*PACKAGE_ROOT.glob("deploy/config/tenants*")})


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_every_shipped_file_loads(file: Path) -> None:
    assert load(file).cluster.num_workers >= 1


def test_every_key_is_described() -> None:
    assert [name for name, description in leaves(HeadwaterConfig) if not description] == []


def test_dump_loads_again(tmp_path: Path) -> None:
    file = tmp_path / "dump.yaml"
    config = load(None, ["cluster.num_workers=7"])
    file.write_text(config.dump())
    assert load(file) == config


def test_secrets_are_named_by_file_never_held() -> None:
    suspects = ("token", "password", "secret", "api_key")
    assert [path for path in key_paths(HeadwaterConfig) if path.endswith(suspects)] == []


def test_a_pool_that_nobody_is_in_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "", "worker.engine.speculation.drafters=[copy, pool]")
    assert "worker.engine.speculation.drafters" in message
    assert "cluster.num_drafters" in message


@pytest.mark.parametrize("drafters", ["[]", "[copy]"])
def test_drafters_that_nobody_asks_are_refused(tmp_path: Path, drafters: str) -> None:
    overrides = ("cluster.num_drafters=2", f"worker.engine.speculation.drafters={drafters}")
    message = refusal(tmp_path, "", *overrides)
    assert "worker.engine.speculation.drafters" in message
    assert "cluster.num_drafters is 2" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("drafter.drafters=[pool]", "drafter.drafters"),
        ("drafter.drafters=[]", "drafter.drafters"),
        ("drafter.drafters=[copy, copy]", "copy, copy"),
        ("drafter.draft_model=null", "draft_model"),
        ("cluster.num_drafters=-1", "cluster.num_drafters"),
        ("cluster.drafter_gpus=-1", "cluster.drafter_gpus"),
        ("cluster.drafter_labels=small", "cluster.drafter_labels"),
        ("cluster.worker_labels={gpu: 1}", "cluster.worker_labels"),
    ],
)
def test_a_drafter_that_cannot_be_is_refused(tmp_path: Path, override: str, words: str) -> None:
    message = refusal(tmp_path, "", override)
    assert words in message
    assert override in message


def test_drafters_keep_their_metrics_port_whatever_else_is_set() -> None:
    config = load(None, ["drafter.metrics.host=0.0.0.0", "worker.metrics.host=0.0.0.0"])
    assert config.drafter.metrics.port == load(None).drafter.metrics.port == 9131
    assert config.worker.metrics.port == 9101


def test_draft_models_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = "worker.engine.speculation.draft_model=models/drafter"
    config = load(None, [own])
    assert config.drafter.draft_model == PACKAGE_ROOT / "models/drafter"
    assert config.worker.engine.speculation.draft_model == PACKAGE_ROOT / "models/drafter"
    (tmp_path / "models/drafter").mkdir(parents=True)
    assert load(None).drafter.draft_model == tmp_path / "models/drafter"
    assert load(None, [own]).worker.engine.speculation.draft_model == tmp_path / "models/drafter"


def test_model_path_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(None).worker.model.path == PACKAGE_ROOT / "models/target"
    (tmp_path / "models/target").mkdir(parents=True)
    assert load(None).worker.model.path == tmp_path / "models/target"
    assert load(None, ["worker.model.path=nowhere/at/all"]).worker.model.path == Path("nowhere/at/all")


@pytest.mark.parametrize("text", ["off", "on", "yes", "no"])
def test_words_are_no_truth_values(text: str) -> None:
    assert load(None, [f"worker.model.name={text}"]).worker.model.name == text


def test_true_and_false_are() -> None:
    config = load(None, ["worker.engine.kv.prefix_cache=false", "cluster.ray.dashboard=True"])
    assert not config.worker.engine.kv.prefix_cache
    assert config.cluster.ray.dashboard
    assert load(None, ["worker.engine.kernels.variant=off"]).worker.engine.kernels.variant == "off"
