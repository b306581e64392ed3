"""The check of a model directory that runs before anything is started. Reads no weights; imports no torch."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from protos.errors import ModelError
from workers.model.checkpoint import open_checkpoint
from workers.model.config import ModelConfig
from workers.model.json_object import JsonObject


def check_directory(path: Path) -> ModelConfig:
    """The directory's config, when model and tokenizer can be loaded from it.

    Raises ModelError, which names the file and the key or tensor, and the remedy.
    """
    config = ModelConfig.from_directory(path)
    _check_tokenizer(path / "tokenizer.json", config)
    open_checkpoint(path, config)
    return config


def check_foreign_directory(path: Path) -> None:
    """Return if tokenizer and config.json can be read: all else is for vLLM to judge, which knows other models.

    Raises ModelError.
    """
    if not path.is_dir():
        raise ModelError(f"{path}: no such directory; set worker.model.path to a Hugging Face model directory")
    JsonObject.read(path / "config.json")
    _read_tokenizer(path / "tokenizer.json")


def _check_tokenizer(path: Path, config: ModelConfig) -> None:
    tokenizer = _read_tokenizer(path)
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= config.vocab_size:
        raise ModelError(
            f"{path}: has token id {highest}, config.json's vocab_size is {config.vocab_size}; "
            "take tokenizer and weights of the same model"
        )


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ModelError(f"{path}: is missing; save the tokenizer in the fast format (tokenizer.json)")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower class
        raise ModelError(f"{path}: not a tokenizer ({error}); copy the file again") from error
