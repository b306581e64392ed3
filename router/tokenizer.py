"""Text to token ids and back, once per request, at ingress."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from protos.errors import ModelError

INLINE_CHARS = 4096  # below this, encoding costs less than a hop to a thread


class Tokenizer:
    """A model's tokenizer. Immutable after loading, so threads may share it."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """The tokenizer of a model directory. Raises ModelError if tokenizer.json is missing or cannot be read."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{path} does not exist; give the router a Hugging Face model directory with a tokenizer.json"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} is not a readable tokenizer ({error}); download the model again") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    async def encode(self, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text. `special_tokens` adds what the tokenizer's post-processor says, such as a BOS.

        Long texts are encoded in a thread: the event loop never waits for one.
        """
        if len(text) <= INLINE_CHARS:
            return self._encode(text, special_tokens)
        return await asyncio.to_thread(self._encode, text, special_tokens)

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        if len(token_ids) <= INLINE_CHARS:
            return self._decode(token_ids)
        return await asyncio.to_thread(self._decode, token_ids)

    def _encode(self, text: str, special_tokens: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
