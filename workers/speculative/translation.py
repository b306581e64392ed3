"""A drafter that thinks in another vocabulary: the sequence put into its tokens, its drafts put into the target's.

Between the speculator and a drafter whose tokenizer is not the target's. After OmniDraft (Ramakrishnan et al.,
"OmniDraft: A Cross-vocabulary, Online Adaptive Drafter for On-device Speculative Decoding", arXiv 2507.02659): a cache
that grows as it is used maps sequences of draft tokens (n-grams) to target tokens, and a target token is as probable as
all the draft tokens together that it covers. Here the target's tokenizer says what goes into the cache: it is at hand.

Both sides meet in bytes, for tokens of byte-level tokenizers need not be whole characters.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from protos.errors import ConfigError, ModelError
from workers.speculative.protocol import Context, Drafter, Key, Verified
from workers.speculative.tree import MAX_NODES, ROOT, DraftTree

NUM_OPEN = 2  # pieces at the end of the text that what follows may still change
MAX_TAIL = 32  # bytes; a longer piece is settled in parts, which may not be as the tokenizer would cut the whole
MAX_NGRAMS = 32768  # of the cache
MAX_NGRAM_TOKENS = 8  # of one entry: a longer sequence hardly comes again

_SHOWN = (*range(ord("!"), 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = tuple(byte for byte in range(256) if byte not in _SHOWN)
_CHARS = {byte: chr(byte) for byte in _SHOWN} | {byte: chr(256 + place) for place, byte in enumerate(_HIDDEN)}
_BYTES = {char: byte for byte, char in _CHARS.items()}  # GPT-2's byte alphabet, which all byte-level tokenizers share
_RUNS = re.compile("[\udc80-\udcff]+|[^\udc80-\udcff]+")  # bytes that are no text, as surrogateescape shows them; text

_BLANK = frozenset(b" \t\n\r\v\f")
_WORD = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_AFTER_WORD = frozenset(range(0x80)) - _WORD - frozenset(b"'")  # an apostrophe may begin the end of a word: 's


def same_tokenizer(target_dir: Path, drafter_dir: Path) -> bool:
    """Whether a token means the same to both. Raises ModelError if one cannot be read."""
    return _contents(target_dir / "tokenizer.json") == _contents(drafter_dir / "tokenizer.json")


def translating(inner: Drafter, target_dir: Path, drafter_dir: Path) -> Drafter:
    """A Drafter for the target's tokens: `inner` itself if both directories have the same tokenizer.json.

    Raises ModelError if one cannot be read or its tokens are not bytes, ConfigError if inner wants top ids.
    """
    if same_tokenizer(target_dir, drafter_dir):
        return inner
    target, drafter = (_tokenizer(_contents(at / "tokenizer.json"), at) for at in (target_dir, drafter_dir))
    return Translating(inner, target=target, drafter=drafter)


class Translating:
    """A Drafter that asks another one, whose vocabulary is another.

    Exact: the text. What the inner drafter reads is byte for byte the text of the target's tokens. A sequence with a
    byte that the drafter's vocabulary lacks gets no draft from there on, nor does one of a word or two. Added tokens
    (eos, chat marks) are no text: one becomes the other vocabulary's token of the same content; without such, the
    drafter does not get to read it, and drafts nothing right behind it or past it. Each target token that is proposed
    is covered by drafted text as a whole.

    A guess, as every draft: where the drafted text is cut into the target's tokens. It is cut as the target's tokenizer
    cuts each word (a draft's last word may be half of one), and a model may cut differently. A wrong cut costs the
    token's place in a step; the target verifies every token, so no text depends on it.

    The inner drafter is told as settled what more text cannot change; the last pieces, which are cut anew at each
    draft, and all that the target has not confirmed are `num_guessed` for it. It is taught nothing: the next context
    says what was right. The cache holds what the tokenizers say and nothing of who asked, so all salts share it.
    """

    num_top_ids = 0  # the target's ids mean nothing to the inner drafter

    def __init__(self, inner: Drafter, *, target: Tokenizer, drafter: Tokenizer) -> None:
        """The tokenizers are copied. Raises ModelError if their tokens are not bytes, ConfigError as translating()."""
        if inner.num_top_ids:
            raise ConfigError(
                f"the drafter {inner.name!r} learns from the target's {inner.num_top_ids} most probable tokens, which "
                "mean nothing in another vocabulary; use it with the target's own tokenizer only"
            )
        self.name = inner.name
        self._inner = inner
        self._target, self._drafter = _Vocabulary(target, "target"), _Vocabulary(drafter, "drafter")
        self._direct = _equal_tokens(self._drafter, self._target)
        self._symbols = _equal_symbols(self._target, self._drafter)
        self._ngrams = _Ngrams()
        self._readings: dict[Key, _Reading] = {}

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        """See Drafter. The inner drafter is asked for as much text as max_nodes of the target's tokens have."""
        proposed = [DraftTree()] * len(contexts)
        read = [(number, found) for number, one in enumerate(contexts) if (found := self._read(one)) is not None]
        if not read:
            return proposed
        inner = [found for _, found in read]
        asked = _num_asked([contexts[number] for number, _ in read], inner, max_nodes)
        for (number, _), tree in zip(read, self._inner.propose(inner, asked), strict=True):
            proposed[number] = self._draft(tree).cut(min(max_nodes, MAX_NODES))
        return proposed

    def learn(self, verified: Sequence[Verified]) -> None:
        """Nothing: the next context says what was right."""

    def forget(self, key: Key) -> None:
        self._readings.pop(key, None)
        self._inner.forget(key)

    def _read(self, context: Context) -> Context | None:
        """The sequence as the inner drafter is to see it; None if it cannot be said in its vocabulary."""
        reading = self._follow(context)
        tokens = context.tokens
        if reading.is_lost:
            self._inner.forget(context.key)
            return None
        if not self._target.text(tokens[-1]) and tokens[-1] not in self._symbols:
            return None
        try:
            ahead, tail = self._advance(reading.tail, tokens[len(tokens) - context.num_guessed :])
            ahead += _flat(self._drafter.encode(tail))
        except _Inexpressible:
            return None
        reading.show(ahead)
        if not reading.num_settled:  # a drafter needs a token that it can keep
            return None
        return Context(
            context.key, context.salt, reading.tokens, min(reading.num_prompt, len(reading.tokens)), len(ahead)
        )

    def _follow(self, context: Context) -> _Reading:
        """What has been read of the sequence, brought up to all that the target has confirmed."""
        tokens, num_known = context.tokens, len(context.tokens) - context.num_guessed
        reading = self._readings.get(context.key)
        if reading is not None and not reading.continues(tokens, num_known):
            self.forget(context.key)
            reading = None
        if reading is None:
            reading = self._readings[context.key] = _Reading()
            self._settle(reading, tokens[: min(context.num_prompt, num_known)])
            reading.num_prompt = len(reading.tokens)
        self._settle(reading, tokens[reading.num_read : num_known])
        return reading

    def _settle(self, reading: _Reading, tokens: Sequence[int]) -> None:
        """Read confirmed tokens of the target, and settle what no further text can change."""
        if not tokens:
            return
        reading.num_read += len(tokens)
        reading.last_read = tokens[-1]
        if reading.is_lost:
            return
        try:
            settled, tail = self._advance(reading.tail, tokens)
            pieces = self._drafter.encode(tail)
        except _Inexpressible:
            reading.lose()
            return
        settled += _flat(pieces[:-NUM_OPEN])
        still_open = _flat(pieces[-NUM_OPEN:])
        size, num_old = len(self._drafter.join(still_open)), 0
        while size > MAX_TAIL:
            size -= len(self._drafter.text(still_open[num_old]))
            num_old += 1
        reading.settle(settled + still_open[:num_old], tail[len(tail) - size :])
        reading.show(still_open[num_old:])

    def _advance(self, tail: bytes, tokens: Sequence[int]) -> tuple[list[int], bytes]:
        """The drafter's tokens up to the last added token, and the text after it. Raises _Inexpressible."""
        ids: list[int] = []
        for is_text, run in groupby(tokens, key=lambda token_id: self._target.text(token_id) != b""):
            if is_text:
                tail += self._target.join(run)
                continue
            ids += _flat(self._drafter.encode(tail))
            ids += [self._symbols[token_id] for token_id in run if token_id in self._symbols]
            tail = b""
        return ids, tail

    def _draft(self, tree: DraftTree) -> DraftTree:
        """The inner drafter's tree in the target's tokens."""
        growing = _Growing(tree.path_probabilities)
        for path in _leaf_paths(tree):
            at = ROOT
            for token_id, node in self._crossings([tree.tokens[node] for node in path], path):
                at = growing.add(at, token_id, node)
        return growing.tree()

    def _crossings(self, tokens: Sequence[int], nodes: Sequence[int]) -> Iterator[tuple[int, int]]:
        """The target's tokens along a path, each with the node that drafted the last of its text."""
        start = 0
        for ngram in self._words(tokens):
            found = self._lookup(ngram)
            if found is None:
                return
            drafted = _ends([self._drafter.text(token_id) for token_id in ngram])
            place = 0
            for token_id, end in zip(found, _ends([self._target.text(token_id) for token_id in found]), strict=True):
                while drafted[place] < end:
                    place += 1
                yield token_id, nodes[start + place]
            start += len(ngram)

    def _words(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """A path in parts that the target's tokenizer does not join; added tokens are parts of their own."""
        word: list[int] = []
        before = b""
        for token_id in tokens:
            text = self._drafter.text(token_id)
            if word and (not before or not text or _is_apart(before, text)):
                yield tuple(word)
                word = []
            word.append(token_id)
            before = text
        if word:
            yield tuple(word)

    def _lookup(self, ngram: tuple[int, ...]) -> tuple[int, ...] | None:
        """The target's tokens for a part of a draft; None if there are none."""
        if len(ngram) == 1 and (direct := self._direct.get(ngram[0])) is not None:
            return (direct,)
        found = self._ngrams.get(ngram)
        if found is None:
            try:
                found = tuple(_flat(self._target.encode(self._drafter.join(ngram))))
            except _Inexpressible:
                return None
            self._ngrams.learn(ngram, found)
        return found or None  # none: an added token


class _Inexpressible(Exception):
    """A vocabulary has no tokens for a text."""


class _Vocabulary:
    """A tokenizer's tokens as bytes, and text of any bytes as its tokens. Never changes."""

    def __init__(self, tokenizer: Tokenizer, role: str) -> None:
        """Raises ModelError, which names the role, if the tokens are not bytes."""
        made = json.loads(tokenizer.to_str())
        kind = (made["decoder"] or {}).get("type")
        if kind != "ByteLevel":
            raise ModelError(
                f"the {role}'s tokenizer is not byte-level (its decoder: {kind}); drafts cannot be translated; "
                "use a draft model with the target's tokenizer"
            )
        self.symbols = {number: added.content for number, added in tokenizer.get_added_tokens_decoder().items()}
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        self.texts = [b""] * (1 + max(vocabulary.values(), default=-1))  # by id
        for token, token_id in vocabulary.items():
            if token_id not in self.symbols and all(char in _BYTES for char in token):
                self.texts[token_id] = bytes([_BYTES[char] for char in token])
        self._tokenizer = Tokenizer.from_str(json.dumps(_for_parts(made)))

    def text(self, token_id: int) -> bytes:
        """Empty for added tokens and for ids that the vocabulary does not have."""
        return self.texts[token_id] if token_id < len(self.texts) else b""

    def join(self, ids: Iterable[int]) -> bytes:
        return b"".join([self.text(token_id) for token_id in ids])

    def encode(self, text: bytes) -> list[list[int]]:
        """Tokens whose bytes are the text's, in the pieces that the tokenizer cuts text into before it looks at bytes.

        Raises _Inexpressible.
        """
        pieces: list[list[int]] = []
        for run in _RUNS.findall(text.decode("utf-8", "surrogateescape")):
            pieces += [self._of_bytes(run)] if "\udc80" <= run[0] <= "\udcff" else self._of_text(run)
        if self.join(_flat(pieces)) != text:
            raise _Inexpressible
        return pieces

    def _of_text(self, text: str) -> list[list[int]]:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        pairs = zip(encoded.word_ids, encoded.ids, strict=True)
        return [[token_id for _, token_id in piece] for _, piece in groupby(pairs, key=lambda pair: pair[0])]

    def _of_bytes(self, escaped: str) -> list[int]:
        """Of a part of a character, which is no text that a tokenizer takes."""
        shown = "".join([_CHARS[byte] for byte in escaped.encode("utf-8", "surrogateescape")])
        return [token.id for token in self._tokenizer.model.tokenize(shown)]


@dataclass(slots=True)
class _Reading:
    """A sequence in the drafter's tokens. Mutated only by Translating.

    Tokens [0, num_settled) stay; those after them stand for `tail` and for guesses, as of the last draft.
    """

    tokens: list[int] = field(default_factory=list)
    num_settled: int = 0
    tail: bytes = b""  # confirmed text that is not settled
    num_read: int = 0  # tokens of the target, all confirmed
    last_read: int = -1
    num_prompt: int = 0  # tokens of it, give or take the one in which the output begins
    is_lost: bool = False  # the drafter's vocabulary cannot say it

    def continues(self, tokens: Sequence[int], num_known: int) -> bool:
        """Whether these can be what has been read, and perhaps more: until it is forgotten, a sequence only grows."""
        return not self.num_read or (self.num_read <= num_known and tokens[self.num_read - 1] == self.last_read)

    def settle(self, ids: Sequence[int], tail: bytes) -> None:
        self.tokens[self.num_settled :] = ids
        self.num_settled = len(self.tokens)
        self.tail = tail

    def show(self, ahead: Sequence[int]) -> None:
        self.tokens[self.num_settled :] = ahead

    def lose(self) -> None:
        """There will be no drafts of it any more."""
        self.is_lost = True
        self.tokens, self.num_settled, self.tail = [], 0, b""


class _Ngrams:
    """The target's tokens for sequences of draft tokens, those used last. Mutated only by Translating."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[int, ...], tuple[int, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, ngram: tuple[int, ...]) -> tuple[int, ...] | None:
        found = self._found.get(ngram)
        if found is not None:
            self._found.move_to_end(ngram)
        return found

    def learn(self, ngram: tuple[int, ...], found: tuple[int, ...]) -> None:
        if len(ngram) > MAX_NGRAM_TOKENS:
            return
        self._found[ngram] = found
        if len(self._found) > MAX_NGRAMS:
            self._found.popitem(last=False)


class _Growing:
    """A tree of the target's tokens while it grows. Lives within one draft.

    A path is as probable as the draft paths that say its text. Those part before the text ends, so they exclude each
    other and their probabilities add up.
    """

    def __init__(self, path_probabilities: Sequence[float]) -> None:
        """`path_probabilities`: of the drafter's tree."""
        self._drafted = path_probabilities
        self._nodes: dict[tuple[int, int], int] = {}
        self._covered_by: list[set[int]] = []  # by node, the draft nodes with which its text is complete

    def add(self, parent: int, token_id: int, drafted: int) -> int:
        """The node of this token after that one, a new one unless there is one already."""
        node = self._nodes.setdefault((parent, token_id), len(self._nodes))
        if node == len(self._covered_by):
            self._covered_by.append(set())
        self._covered_by[node].add(drafted)
        return node

    def tree(self) -> DraftTree:
        paths = [min(1.0, math.fsum([self._drafted[node] for node in nodes])) for nodes in self._covered_by]
        parents = tuple([parent for parent, _ in self._nodes])
        before = [1.0 if parent == ROOT else paths[parent] for parent in parents]
        probabilities = [min(1.0, path / whole) if whole else 0.0 for path, whole in zip(paths, before, strict=True)]
        return DraftTree(
            tuple([token_id for _, token_id in self._nodes]), parents, tuple(probabilities), (1,) * len(parents)
        )


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); both models need a tokenizer") from error


def _tokenizer(contents: bytes, directory: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(contents)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"the tokenizer.json of {directory} is not readable ({error}); download it again") from error


def _for_parts(made: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer, as JSON, that encodes a part of a text as it would stand there: nothing added, nothing rewritten."""
    steps = made["pre_tokenizer"] or {}
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") == "ByteLevel":
            step["add_prefix_space"] = False
    model = made["model"] | ({"dropout": None} if "dropout" in made["model"] else {})
    bare = dict.fromkeys(("normalizer", "post_processor", "truncation", "padding"))
    return made | bare | {"added_tokens": [], "model": model}


def _equal_tokens(source: _Vocabulary, into: _Vocabulary) -> dict[int, int]:
    """By token of one vocabulary, the other's with the same text, or the same content if they are added tokens."""
    found = {text: token_id for token_id, text in enumerate(into.texts) if text}
    equal = {number: found[text] for number, text in enumerate(source.texts) if text in found}
    return equal | _equal_symbols(source, into)


def _equal_symbols(source: _Vocabulary, into: _Vocabulary) -> dict[int, int]:
    found = {content: token_id for token_id, content in into.symbols.items()}
    return {token_id: found[content] for token_id, content in source.symbols.items() if content in found}


def _num_asked(contexts: Sequence[Context], inner: Sequence[Context], max_nodes: int) -> int:
    """As many of the drafter's tokens as these sequences need for max_nodes of the target's."""
    ratio = sum([len(one.tokens) for one in inner]) / sum([len(one.tokens) for one in contexts])
    return max(1, min(math.ceil(max_nodes * ratio), MAX_NODES))


def _leaf_paths(tree: DraftTree) -> list[list[int]]:
    """The nodes from the root to each that has no children."""
    paths: list[list[int]] = []
    for node, parent in enumerate(tree.parents):
        paths.append([node] if parent == ROOT else [*paths[parent], node])
    inner = set(tree.parents)
    return [path for node, path in enumerate(paths) if node not in inner]


def _ends(texts: Iterable[bytes]) -> list[int]:
    """Where each text ends in all of them together; an added token counts as one byte."""
    ends: list[int] = []
    for text in texts:
        ends.append((ends[-1] if ends else 0) + (len(text) or 1))
    return ends


def _is_apart(before: bytes, after: bytes) -> bool:
    """Whether no tokenizer is likely to join these: a word has ended, or a space begins one.

    The patterns that byte-level tokenizers cut text by agree on that, whatever else they differ in.
    """
    last, first = before[-1], after[0]
    return (last in _WORD and first in _AFTER_WORD) or (first == ord(" ") and last not in _BLANK)


def _flat(pieces: Iterable[Sequence[int]]) -> list[int]:
    return [token_id for piece in pieces for token_id in piece]
