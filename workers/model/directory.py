"""The check of a model directory that runs before anything is started. Reads no weights; imports no torch."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from protos.errors import ModelError
from workers.model.checkpoint import open_checkpoint
from workers.model.config import ModelConfig


def check_directory(path: Path) -> ModelConfig:
    """The directory's config, when model and tokenizer can be loaded from it.

    Raises ModelError, which names the file and the key or tensor, and the remedy.
    """
    config = ModelConfig.from_directory(path)
    _check_tokenizer(path / "tokenizer.json", config)
    open_checkpoint(path, config)
    return config


def _check_tokenizer(path: Path, config: ModelConfig) -> None:
    if not path.is_file():
        raise ModelError(f"{path}: is missing; save the tokenizer in the fast format (tokenizer.json)")
    tokenizer = _parse_tokenizer(path)
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= config.vocab_size:
        raise ModelError(
            f"{path}: has token id {highest}, config.json's vocab_size is {config.vocab_size}; "
            "take tokenizer and weights of the same model"
        )


def _parse_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower class
        raise ModelError(f"{path}: not a tokenizer ({error}); copy the file again") from error
