"""What the engines are asked: the same token ids for all, and nothing cached that should not be."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from benchmarks.peers.models import SHIPPED, ModelName
from benchmarks.prompts import Code, RandomTokens, Source, TokenIds, lengths

FIRST_ID = 1  # 0 ends a text
SHIPPED_IDS = 4096  # random ids stay in the shipped tokenizer's vocabulary: each has a text
CHARS_PER_TOKEN_AT_MOST = 6


@dataclass(frozen=True, slots=True)
class Work:
    """One batch. Prompts begin with one path through `shared` and end with tokens of their own."""

    batch: int
    shortest_tokens: int  # of a prompt's own part
    longest_tokens: int
    shared: tuple[tuple[int, int], ...] = ()  # a level of a tree each: how many nodes, of how many tokens
    max_tokens: int = 64

    @property
    def prefix_tokens(self) -> int:
        """What every prompt has in common with some other, tokens."""
        return sum(tokens for _, tokens in self.shared)

    @property
    def distinct_prefix_tokens(self) -> int:
        """Tokens of all nodes of the tree."""
        return sum(number * tokens for number, tokens in self.shared)

    @property
    def context_tokens(self) -> int:
        """Of the longest prompt and its output."""
        return self.prefix_tokens + self.longest_tokens + self.max_tokens

    def quick(self) -> Work:
        """The same, small."""
        return replace(
            self,
            batch=min(self.batch, 8),
            longest_tokens=min(self.longest_tokens, 64),
            shortest_tokens=min(self.shortest_tokens, 64),
            shared=tuple((number, max(tokens // 8, 64)) for number, tokens in self.shared),
            max_tokens=16,
        )


WORKS = {
    "distinct-1": Work(1, 256, 256),
    "distinct-8": Work(8, 256, 256),
    "distinct-32": Work(32, 16, 512),
    "shared-1k": Work(32, 16, 64, ((1, 1024),)),
    "shared-4k": Work(32, 16, 64, ((1, 4096),)),
    "shared-16k": Work(32, 16, 64, ((1, 16384),)),
    "tree": Work(32, 64, 64, ((1, 1024), (4, 512))),
}
LARGE_WORKS = {
    "distinct-1": WORKS["distinct-1"],
    "shared-4k-16": replace(WORKS["shared-4k"], batch=16),
}


def works(model: ModelName) -> dict[str, Work]:
    """What a model is asked: of the large one little, for it is slow on everything."""
    return LARGE_WORKS if model == "half-billion" else WORKS


class CodeTokens:
    """Excerpts of held-out Python as the shipped tokenizer has them, exact in length: its model can follow them."""

    def __init__(self) -> None:
        self._code = Code.heldout()
        self._tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))

    def piece(self, rng: random.Random, num_tokens: int) -> TokenIds:
        text = self._code.piece(rng, num_tokens * CHARS_PER_TOKEN_AT_MOST)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) < num_tokens:
            raise ValueError(f"{len(text)} characters made {len(ids)} tokens, {num_tokens} were wanted")
        return tuple(ids[:num_tokens])


def source(model: ModelName) -> Source[TokenIds]:
    """Code for the trained model; for the others any ids."""
    return CodeTokens() if model == "target" else RandomTokens(SHIPPED_IDS, first_id=FIRST_ID)


def prefixes(work: Work, seed: int, pieces: Source[TokenIds]) -> list[TokenIds]:
    """Every path from the root of the shared tree to its deepest nodes; empty if nothing is shared."""
    rng = random.Random(seed)
    paths: list[TokenIds] = [()] if work.shared else []
    for number, num_tokens in work.shared:
        paths = [paths[index % len(paths)] + pieces.piece(rng, num_tokens) for index in range(number)]
    return paths


def prompts(work: Work, shared: Sequence[TokenIds], seed: int, pieces: Source[TokenIds]) -> list[TokenIds]:
    """The batch: every path as often as the next, in random order, each with an end that no other prompt has."""
    rng = random.Random(seed)
    sizes = lengths(work.batch, work.shortest_tokens, work.longest_tokens, rng)
    starts = [shared[index % len(shared)] if shared else () for index in range(work.batch)]
    rng.shuffle(starts)
    return [start + pieces.piece(rng, size) for start, size in zip(starts, sizes, strict=True)]


def seed_of(*parts: object) -> int:
    """A seed for these parts, another one for any others."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")
