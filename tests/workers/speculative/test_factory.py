"""From configuration to drafters: a draft model may have another tokenizer, and is as good as its guesses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from protos.errors import ModelError
from tests.workers.engine.drive import request, run, torch_engine
from tests.workers.speculative.oracle import Always
from tests.workers.speculative.test_law import counted, expect
from workers.config import DrafterConfig, EngineSection, ModelSection, SpeculationSection, WorkerConfig
from workers.engine.torch_engine import TorchEngine
from workers.speculative.factory import make_draft_server
from workers.speculative.translation import Translating

CODE = "def add(first, second):\n    return first + second\n\n\ndef multiply(first, second):\n    return"


@pytest.fixture(scope="module")
def renumbered(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped drafter with its tokens in another order: the same model to whoever reads its text."""
    source, directory = root / "models" / "drafter", tmp_path_factory.mktemp("renumbered")
    for file in source.iterdir():
        shutil.copy(file, directory)
    size = 4096
    number = [0, *(torch.randperm(size - 1, generator=torch.Generator().manual_seed(5)) + 1).tolist()]
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: number[token_id] for token, token_id in tokenizer["model"]["vocab"].items()}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    weights = load_file(source / "model.safetensors")
    rows = torch.empty_like(weights["model.embed_tokens.weight"])
    rows[number] = weights["model.embed_tokens.weight"]
    save_file(weights | {"model.embed_tokens.weight": rows}, directory / "model.safetensors", {"format": "pt"})
    return directory


def drafted(root: Path, draft_model: Path) -> TorchEngine:
    speculation = SpeculationSection(drafters=("model",), draft_model=draft_model, max_nodes=6)
    config = WorkerConfig(
        model=ModelSection(path=root / "models" / "target"), engine=EngineSection(speculation=speculation)
    )
    engine = TorchEngine(config)
    assert engine._speculator is not None
    engine._speculator._panel._controller = Always(1, max_nodes=6)
    return engine


def test_a_draft_model_with_another_tokenizer_drafts_as_well(root: Path, tokenizer: object, renumbered: Path) -> None:
    prompt = tokenizer.encode(CODE).ids  # type: ignore[attr-defined]
    requests = [request(f"{i}", prompt, max_tokens=60, ignore_eos=True, temperature=i % 2, seed=i) for i in range(4)]
    expected = run(torch_engine(root / "models" / "target"), *requests)
    accepted = []
    for draft_model in (root / "models" / "drafter", renumbered):
        engine = drafted(root, draft_model)
        expect(run(engine, *requests), expected)
        accepted.append(counted(engine).accepted_tokens)
    native, translated = accepted
    assert translated > 0.5 * native  # sampled outputs are not drafted with the target's draws
    assert isinstance(engine._speculator._panel._drafters[0], Translating)  # type: ignore[union-attr]


def test_the_pool_can_have_one_too(root: Path, renumbered: Path) -> None:
    config = DrafterConfig(draft_model=renumbered)
    server = make_draft_server(config, target=root / "models" / "target", token="")
    assert isinstance(server._drafters[0], Translating)


def test_a_draft_model_whose_tokens_are_not_bytes_is_refused(root: Path, renumbered: Path, tmp_path: Path) -> None:
    shutil.copytree(renumbered, tmp_path, dirs_exist_ok=True)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["decoder"] = tokenizer["pre_tokenizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="byte"):
        drafted(root, tmp_path)
