"""The names of models: other weights, or another rotation, another name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from protos.errors import ModelError
from tests.workers.model.tiny import save_tiny
from workers.model import fingerprint
from workers.model.fingerprint import weights_fingerprint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_tiny(directory, "llama")
    return directory


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def name(directory: Path, max_context: int = 128) -> str:
    return weights_fingerprint(directory, max_context=max_context)


def change_byte(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_copy_has_the_same_name(saved: Path, model: Path) -> None:
    assert name(model) == name(saved)
    assert len(name(model)) == 32


def test_only_the_tokenizer_may_differ(saved: Path, model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    assert name(model) == name(saved)


@pytest.mark.parametrize("place", [0.5, 0.9, 1.0])
def test_other_weights(saved: Path, model: Path, place: float) -> None:
    weights = model / "model.safetensors"
    change_byte(weights, int((weights.stat().st_size - 1) * place))
    assert name(model) != name(saved)


def test_another_config(saved: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert name(model) != name(saved)


def test_the_context_counts_where_the_rotation_depends_on_it(saved: Path, model: Path) -> None:
    assert name(saved, 64) == name(saved, 128)
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (model / "config.json").write_text(json.dumps(config))
    assert name(model, 64) != name(model, 128)


def test_of_large_files_the_begin_and_the_end_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = model / "model.safetensors"
    size = weights.stat().st_size
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", size - 1)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 8192)
    before = name(model)
    change_byte(weights, size // 2)
    assert name(model) == before
    for place in (size - 1, size - 8192):
        change_byte(weights, place)
        assert name(model) != before
        change_byte(weights, place)
    assert name(model) == before


def test_weights_that_cannot_be_read(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.unlink()
    with pytest.raises(ModelError, match="is missing"):
        name(model)
    os.mkdir(weights)
    with pytest.raises(ModelError, match="cannot be read"):
        name(model)
