"""Text from tokens, one output at a time: whole characters only, and nothing of a stop string.

Stands between the engine, which knows tokens, and the session, which sends text. What has been emitted is a function of
the tokens alone, so another worker that is given the same tokens knows what the client has already seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, DecodeStream

from protos.messages import Delta, Finish, Sampling, TokenDelta

MAX_PENDING = 16  # tokens without a whole character; no encoding needs as many, so the bytes are not text


@dataclass(frozen=True, slots=True)
class Piece:
    """What some tokens added to the text, and whether a stop string ended it."""

    text: str
    num_tokens: int  # of those fed, up to and including the one that completed a stop string
    stop: str | None = None


class TokenTexts:
    """By token id: its text, if that is the same wherever whole characters stand before it; else None.

    Only of tokenizers whose tokens are bytes: with others, a token's text depends on its neighbours. Never changes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        size = tokenizer.get_vocab_size() if isinstance(tokenizer.decoder, ByteLevel) else 0
        texts = tokenizer.decode_batch([[token_id] for token_id in range(size)], skip_special_tokens=True)
        self._texts = [None if text.endswith("\ufffd") else text for text in texts]  # it may lack bytes

    def get(self, token_id: int) -> str | None:
        return self._texts[token_id] if token_id < len(self._texts) else None


class OutputText:
    """The text of one output. Mutated only by EngineLoop."""

    __slots__ = ("_held", "_min_tokens", "_num_tokens", "_pending", "_stops", "_stream", "_texts", "_tokenizer")

    def __init__(self, texts: TokenTexts, sampling: Sampling) -> None:
        self._texts = texts
        self._tokenizer = texts.tokenizer
        self._stops = sampling.stop
        self._min_tokens = sampling.min_tokens
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []  # fed, but not yet a whole character
        self._held = ""  # could be the beginning of a stop string
        self._num_tokens = 0

    def add(self, token_id: int) -> str | None:
        """The text one more token makes certain; None, and nothing is fed, if stop strings have to be looked for."""
        return None if self._stops else self._decode(token_id)

    def feed(self, token_ids: Sequence[int]) -> Piece:
        """Add tokens; returns the text that is now certain."""
        certain: list[str] = []
        for count, token_id in enumerate(token_ids, start=1):
            self._num_tokens += 1
            text, stop = self._release(self._decode(token_id))
            certain.append(text)
            if stop is not None:
                return Piece("".join(certain), count, stop)
        return Piece("".join(certain), len(token_ids))

    def flush(self) -> str:
        """The text held back, when nothing follows. An unfinished character becomes U+FFFD."""
        rest = self._held + self._undecoded()
        self._held = ""
        return rest

    def _decode(self, token_id: int) -> str:
        if not self._pending and (text := self._texts.get(token_id)) is not None:
            return text
        text = self._stream.step(self._tokenizer, token_id)
        if text is not None:
            if self._pending:
                self._pending.clear()
            return text
        self._pending.append(token_id)
        if len(self._pending) < MAX_PENDING:
            return ""
        text = self._undecoded()
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending.clear()
        return text

    def _undecoded(self) -> str:
        return self._tokenizer.decode(self._pending, skip_special_tokens=True) if self._pending else ""

    def _release(self, text: str) -> tuple[str, str | None]:
        """Split new text into what is certain and what is held; or cut it at the first stop string."""
        if self._num_tokens < self._min_tokens or not self._stops:
            return text, None
        text = self._held + text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda match: (match[0] + len(match[1]), match[0]))  # complete first
            self._held = ""
            return text[:at], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None


def to_delta(delta: TokenDelta, output: OutputText, *, request_id: str) -> Delta:
    """Add the text, under the caller's request id. A stop string in it ends the output, whatever the engine thought."""
    finish = delta.finish
    token_ids = delta.token_ids
    if finish is None and len(token_ids) == 1 and (certain := output.add(token_ids[0])) is not None:
        cached_tokens, prompt_logprobs = delta.cached_tokens, delta.prompt_logprobs
        return Delta(request_id, delta.index, certain, token_ids, delta.logprobs, None, cached_tokens, prompt_logprobs)
    silent = finish is not None and finish.stop_token_id is not None  # a stop token is not part of the text
    piece = output.feed(token_ids[:-1] if silent else token_ids)
    text = piece.text
    if piece.stop is not None:
        finish, token_ids = Finish("stop", stop=piece.stop), token_ids[: piece.num_tokens]
    elif finish is not None:
        text += output.flush()
    return Delta(
        request_id=request_id,
        index=delta.index,
        text=text,
        token_ids=token_ids,
        logprobs=delta.logprobs[: len(token_ids)],
        finish=finish,
        cached_tokens=delta.cached_tokens,
        prompt_logprobs=delta.prompt_logprobs,
    )


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
