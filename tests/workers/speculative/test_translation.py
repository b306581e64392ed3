"""Drafts across vocabularies: drafters read the target's text to the byte, the target gets tokens of drafted text."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.models import WordLevel

from protos.errors import ConfigError, ModelError
from tests.workers.speculative import test_drafters as contract
from tests.workers.speculative.play import Play, context, verify
from tests.workers.speculative.trees import paths, trees
from workers.speculative import translation
from workers.speculative.copying import Copying
from workers.speculative.protocol import Context, Drafter, Key, Verified
from workers.speculative.recycling import Recycling
from workers.speculative.translation import MAX_NGRAM_TOKENS, MAX_TAIL, Translating, translating
from workers.speculative.tree import ROOT, DraftTree

EOS, MARK = "<|endoftext|>", "<|mark|>"  # the shipped target has no such mark
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
START = "one two three four "  # enough text that some of it is settled


def toy(*merges: str, symbols: Sequence[str] = (), alphabet: Sequence[str] = ALPHABET) -> Tokenizer:
    """A byte-level tokenizer with these merges alone, each written `a b`."""
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges)]
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    made = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=pairs))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(symbols))
    return made


@pytest.fixture(scope="module")
def other() -> Tokenizer:
    """Another vocabulary than the target's, of 1,000 tokens."""
    made = toy()
    made.train_from_iterator(
        [inspect.getsource(module) for module in (argparse, logging)],
        trainers.BpeTrainer(
            vocab_size=1000, special_tokens=[MARK, EOS], initial_alphabet=ALPHABET, show_progress=False
        ),
    )
    return made


class Scripted:
    """A Drafter that proposes one and the same tree, and remembers what it was asked. Mutated only by its test."""

    name = "scripted"
    num_top_ids = 0

    def __init__(self, tree: DraftTree | None = None) -> None:
        self.tree = tree or DraftTree()
        self.asked: list[Context] = []
        self.max_nodes = 0
        self.num_learnt = 0
        self.forgotten: list[Key] = []

    def propose(self, contexts: Sequence[Context], max_nodes: int) -> list[DraftTree]:
        self.asked += [one._replace(tokens=list(one.tokens)) for one in contexts]
        self.max_nodes = max_nodes
        return [self.tree] * len(contexts)

    def learn(self, verified: Sequence[Verified]) -> None:
        self.num_learnt += len(verified)

    def forget(self, key: Key) -> None:
        self.forgotten.append(key)


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> bytes:
    """The bytes of tokens, by the byte alphabet; added tokens have none."""
    added = tokenizer.get_added_tokens_decoder()
    shown = "".join([tokenizer.id_to_token(token_id) or "" for token_id in ids if token_id not in added])
    return bytes([translation._BYTES[char] for char in shown])


def tokens_of(tokenizer: Tokenizer, *texts: str | bytes) -> list[int]:
    """For each text, the token that is just that."""
    found: list[int] = []
    for text in texts:
        shown = "".join([translation._CHARS[byte] for byte in (text.encode() if isinstance(text, str) else text)])
        token_id = tokenizer.token_to_id(text if text in (EOS, MARK) else shown)
        assert token_id is not None, text
        found.append(token_id)
    return found


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def drafted(
    target: Tokenizer, drafter: Tokenizer, tree: DraftTree, max_nodes: int = 24, text: str = START
) -> DraftTree:
    """What becomes of a drafter's tree behind a text."""
    [made] = Translating(Scripted(tree), target=target, drafter=drafter).propose(
        [context(encoded(target, text))], max_nodes
    )
    made.check()
    return made


def seen(target: Tokenizer, drafter: Tokenizer, tokens: Sequence[int], num_guessed: int = 0) -> Context | None:
    """What a drafter that is new to it sees of a sequence."""
    inner = Scripted()
    one = context(tokens)._replace(num_guessed=num_guessed)
    Translating(inner, target=target, drafter=drafter).propose([one], 8)
    return inner.asked[0] if inner.asked else None


def chain(tokenizer: Tokenizer, *texts: str | bytes, p: Sequence[float] = ()) -> DraftTree:
    return DraftTree.chain(tokens_of(tokenizer, *texts), p or [0.5] * len(texts))


# The contract of all drafters. The target's tokens are bytes here, so that any sequence of them is as its tokenizer
# would have cut it; the drafter's are not.


@pytest.fixture
def make(other: Tokenizer) -> Callable[[], Drafter]:
    target = toy()
    return lambda: Translating(Copying(), target=target, drafter=other)


test_drafts_are_valid_trees_of_at_most_max_nodes = contract.test_drafts_are_valid_trees_of_at_most_max_nodes
test_the_number_of_nodes_may_change_from_step_to_step = contract.test_the_number_of_nodes_may_change_from_step_to_step
test_nothing_is_asked_and_nothing_comes = contract.test_nothing_is_asked_and_nothing_comes
test_a_short_sequence_gets_an_empty_draft = contract.test_a_short_sequence_gets_an_empty_draft_of_a_new_drafter
test_forgetting_an_unknown_key_does_nothing = contract.test_forgetting_an_unknown_key_does_nothing
test_a_key_may_come_back_with_other_tokens = contract.test_a_key_may_come_back_with_other_tokens
test_sequences_without_a_draft = contract.test_sequences_without_a_draft_are_learnt_from_too
test_a_sequence_may_end_within_its_draft = contract.test_a_sequence_may_end_within_its_draft
test_two_drafters_that_see_the_same = contract.test_two_drafters_that_see_the_same_propose_the_same
test_nothing_learnt_under_one_salt = contract.test_nothing_learnt_under_one_salt_is_proposed_under_another
test_another_salt_knows_nothing = contract.test_another_salt_knows_nothing_of_what_followed_the_same_tokens


# What the drafter reads


def test_the_drafter_reads_its_own_tokens_of_the_text(tokenizer: Tokenizer, other: Tokenizer) -> None:
    text = inspect.getsource(textwrap)
    found = seen(tokenizer, other, encoded(tokenizer, text))
    assert found is not None
    assert found.tokens == encoded(other, text)
    assert found.num_prompt == len(found.tokens)


WORDS = st.sampled_from(
    [" ", "  ", "\n", "\n\n    ", "self", "return", "'s", "é", "日本", "\u3000", "🙂", "e\u0301", "12"]
)
TEXTS = st.lists(WORDS | st.text(max_size=8), max_size=40).map("".join)


@pytest.fixture(scope="module")
def wrappers(tokenizer: Tokenizer, other: Tokenizer) -> list[Translating]:
    """From either vocabulary into the other, and from bytes; the inner drafters are scripted."""
    pairs = ((tokenizer, other), (other, tokenizer), (toy(), other))
    return [Translating(Scripted(), target=target, drafter=drafter) for target, drafter in pairs]


def shown(wrapper: Translating, tokens: Sequence[int], num_guessed: int, name: str) -> tuple[list[int], int] | None:
    """What the inner drafter reads, and how much of it is settled; None if it is not asked."""
    assert isinstance(wrapper._inner, Scripted)
    asked = wrapper._inner.asked
    asked.clear()
    wrapper.propose([context(tokens, name=name, num_prompt=min(3, len(tokens)))._replace(num_guessed=num_guessed)], 8)
    return (list(asked[0].tokens), len(asked[0].tokens) - asked[0].num_guessed) if asked else None


def follow(wrapper: Translating, tokens: Sequence[int], known: Sequence[int]) -> int:
    """Ask for a draft at each length, with guesses that will not come true; how often the text was read (rightly)."""
    settled: list[int] = []
    num_read = 0
    for length in sorted(known):
        guessed = tokens[:-5:-1][: length % 5]
        at = [*tokens[:length], *guessed]
        found, fresh = (shown(wrapper, at, len(guessed), name) for name in ("grown", "fresh"))
        wrapper.forget(("fresh", 0))
        if found is not None:
            num_read += 1
            ids, num_settled = found
            assert wrapper._drafter.join(ids) == wrapper._target.join(at)
            assert ids[: len(settled)] == settled  # what a drafter may have kept stays
            settled = ids[:num_settled]
            assert settled
            assert wrapper._target.join(tokens[:length]).startswith(wrapper._drafter.join(settled))
        if fresh is not None and found is not None:
            assert wrapper._drafter.join(fresh[0]) == wrapper._drafter.join(found[0])
    wrapper.forget(("grown", 0))
    return num_read


CUTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=20)


def test_texts_of_tokens_are_what_the_tokenizer_decodes(wrappers: list[Translating], tokenizer: Tokenizer) -> None:
    tokens = encoded(tokenizer, START + "é 日本 🙂\n")
    assert wrappers[0]._target.join(tokens).decode() == tokenizer.decode(tokens)


@given(text=TEXTS, cuts=CUTS)
@settings(max_examples=60, deadline=None)
def test_the_drafter_reads_the_text_at_any_cut(wrappers: list[Translating], text: str, cuts: list[int]) -> None:
    for wrapper in wrappers:
        tokens = [token_id for piece in wrapper._target.encode((START + text).encode()) for token_id in piece]
        assert follow(wrapper, tokens, [len(tokens), *(1 + cut % len(tokens) for cut in cuts)])


@given(tokens=st.lists(st.integers(0, 5000), min_size=1, max_size=60), cuts=CUTS)
@settings(max_examples=60, deadline=None)
def test_tokens_that_are_no_text_are_read_to_the_byte_too(
    wrappers: list[Translating], tokens: list[int], cuts: list[int]
) -> None:
    for wrapper in wrappers:
        some = [token_id % len(wrapper._target.texts) for token_id in tokens]
        follow(wrapper, some, [1 + cut % len(tokens) for cut in cuts])


@given(text=TEXTS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_step_by_step_the_drafter_reads_what_its_tokenizer_would_say_of_the_whole(
    wrappers: list[Translating], tokenizer: Tokenizer, other: Tokenizer, text: str
) -> None:
    """Not promised for every text; it is what makes drafts good."""
    tokens = encoded(tokenizer, START + text)
    for length in range(1, len(tokens) + 1):
        found = shown(wrappers[0], tokens[:length], 0, "a")
    assert found is not None
    assert found[0] == encoded(other, START + text)
    wrappers[0].forget(("a", 0))


def test_a_character_in_two_tokens_is_read_as_its_bytes() -> None:
    target, drafter = toy("â Ĥ"), toy()
    first, last = tokens_of(target, "€".encode()[:2], "€".encode()[2:])
    start = encoded(target, START)
    found = seen(target, drafter, [*start, first])
    assert found is not None
    assert found.tokens[-2:] == tokens_of(drafter, b"\xe2", b"\x82")
    whole = seen(target, toy("â Ĥ", "âĤ ¬"), [*start, first, last])
    assert whole is not None
    assert whole.tokens[-1] == toy("â Ĥ", "âĤ ¬").token_to_id("âĤ¬")


def test_a_normalizer_does_not_rewrite_what_is_read(other: Tokenizer) -> None:
    target, drafter = toy(), Tokenizer.from_str(other.to_str())
    drafter.normalizer = normalizers.NFC()
    found = seen(target, drafter, encoded(target, START + "e\u0301 "))
    assert found is not None
    assert text_of(drafter, found.tokens) == (START + "e\u0301 ").encode()


def test_guesses_leave_nothing_behind(tokenizer: Tokenizer, other: Tokenizer) -> None:
    asked: list[list[int]] = []
    for guesses in ("", "wrong words that settle nothing "):
        inner = Scripted()
        wrapper = Translating(inner, target=tokenizer, drafter=other)
        guess = encoded(tokenizer, guesses)
        start = encoded(tokenizer, START)
        wrapper.propose([context([*start, *guess])._replace(num_guessed=len(guess))], 8)
        assert inner.asked[0].num_guessed >= len(encoded(other, guesses))
        wrapper.propose([context([*start, *encoded(tokenizer, "five six ")])], 8)
        asked.append(list(inner.asked[-1].tokens))
    assert asked[0] == asked[1] == encoded(other, START + "five six ")


def test_what_was_translated_is_not_translated_again(
    tokenizer: Tokenizer, other: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = Translating(Scripted(), target=tokenizer, drafter=other)
    tokens = encoded(tokenizer, inspect.getsource(textwrap))
    sizes: list[int] = []
    encode = wrapper._drafter.encode

    def counted(text: bytes) -> list[list[int]]:
        sizes.append(len(text))
        return encode(text)

    monkeypatch.setattr(wrapper._drafter, "encode", counted)
    for length in range(len(tokens) - 500, len(tokens)):
        wrapper.propose([context(tokens[:length])], 8)
    assert sizes[0] > 10_000
    assert max(sizes[1:]) <= 3 * MAX_TAIL


def test_a_word_without_end_is_settled_in_parts(other: Tokenizer) -> None:
    target, inner = toy(), Scripted()
    wrapper = Translating(inner, target=target, drafter=other)
    text = "".join([chr(ord("a") + place * 7 % 26) for place in range(2000)]) + "日本" * 200
    tokens = encoded(target, text)
    for length in range(1, len(tokens), 5):
        wrapper.propose([context(tokens[:length])], 8)
        [reading] = wrapper._readings.values()
        assert len(reading.tail) <= MAX_TAIL
    assert text_of(other, inner.asked[-1].tokens) == text_of(target, tokens[:length])


def test_added_tokens_are_read_as_those_of_the_same_content_or_not_at_all() -> None:
    target, drafter = toy(symbols=[EOS, MARK]), toy("t w", symbols=["<|x|>", EOS])
    eos, mark = tokens_of(target, EOS, MARK)
    found = seen(target, drafter, [*encoded(target, "one two"), mark, *encoded(target, " two"), eos])
    assert found is not None
    assert found.tokens == [*encoded(drafter, "one two two"), *tokens_of(drafter, EOS)]
    assert seen(target, drafter, [*encoded(target, START), mark]) is None
    assert seen(target, drafter, [*encoded(target, START), target.get_vocab_size() + 7]) is None  # no token at all


def test_text_that_looks_like_an_added_token_is_text() -> None:
    target, drafter = toy(), toy(symbols=[EOS])
    found = seen(target, drafter, encoded(target, START + EOS + " "))
    assert found is not None
    assert text_of(drafter, found.tokens) == (START + EOS + " ").encode()


def test_a_sequence_that_the_drafter_cannot_say_gets_no_draft_any_more() -> None:
    target, drafter = toy(), toy(alphabet=[char for char in ALPHABET if char != "z"])
    inner = Scripted()
    wrapper = Translating(inner, target=target, drafter=drafter)
    long = encoded(target, START * 50)
    for tokens in (long, [*long, *encoded(target, "z")], [*long, *encoded(target, "z and more ")]):
        wrapper.propose([context(tokens)], 8)
    assert len(inner.asked) == 1
    assert inner.forgotten == [("a", 0)] * 2
    [reading] = wrapper._readings.values()
    assert not reading.tokens
    assert not reading.tail
    guess = encoded(target, "z")
    wrapper.propose([context([*long, *guess], name="b")._replace(num_guessed=1)], 8)
    assert len(inner.asked) == 1
    wrapper.propose([context([*long, *encoded(target, "y")], name="b")], 8)
    assert len(inner.asked) == 2


def test_other_tokens_under_the_same_key_begin_anew(tokenizer: Tokenizer, other: Tokenizer) -> None:
    wrapper = Translating(inner := Scripted(), target=tokenizer, drafter=other)
    for text in (START * 3, "another text altogether", START * 5 + "!", START):
        wrapper.propose([context(encoded(tokenizer, text))], 8)
        assert text_of(other, inner.asked[-1].tokens) == text.encode()
    assert inner.forgotten == [("a", 0)] * 3


# What becomes of a draft


def test_several_draft_tokens_make_one_target_token() -> None:
    target, drafter = toy("f l", "a k", "ak e", "fl ake"), toy("l a", "k e")
    found = drafted(target, drafter, chain(drafter, "f", "la", "ke", p=[0.9, 0.8, 0.5]))
    assert found.tokens == tuple(tokens_of(target, "flake"))
    assert found.probabilities == pytest.approx([0.36])


def test_one_draft_token_makes_several_target_tokens() -> None:
    target, drafter = toy("f l"), toy("f l", "fl a")
    found = drafted(target, drafter, chain(drafter, "fla", p=[0.5]))
    assert found == DraftTree.chain(tokens_of(target, "fl", "a"), [0.5, 1.0])


def test_tokens_that_overlap_are_covered_by_all_that_they_need() -> None:
    target, drafter = toy("b c", "bc d"), toy("a b", "c d")
    found = drafted(target, drafter, chain(drafter, "ab", "cd", "ab", p=[0.5, 0.25, 0.75]))
    assert found.tokens == tuple(tokens_of(target, "a", "bcd", "a", "b"))
    assert found.probabilities == pytest.approx([0.5, 0.25, 0.75, 1.0])


def test_words_are_cut_each_by_itself() -> None:
    target, drafter = toy("Ġ a", "Ġa b"), toy("Ġ a")
    found = drafted(target, drafter, chain(drafter, " a", "b", " a", "b", " a", ".", p=[0.5] * 6))
    assert found.tokens == tuple(tokens_of(target, " ab", " ab", " a", "."))
    assert found.probabilities == pytest.approx([0.25, 0.25, 0.5, 0.5])


def test_a_character_is_put_together_and_taken_apart() -> None:
    euro, whole = "€".encode(), toy("â Ĥ", "âĤ ¬")
    parts = toy("Ĥ ¬")
    found = drafted(whole, parts, chain(parts, euro[:1], euro[1:], "a", p=[0.5, 0.5, 0.5]))
    assert found.tokens == tuple(tokens_of(whole, "€", "a"))
    assert found.probabilities == pytest.approx([0.25, 0.5])
    found = drafted(parts, whole, chain(whole, "€", "a", p=[0.5, 0.5]))
    assert found == DraftTree.chain(tokens_of(parts, euro[:1], euro[1:], "a"), [0.5, 1.0, 0.5])


def test_a_draft_may_begin_and_end_within_a_character() -> None:
    euro = "€".encode()
    target, drafter = toy("Ĥ ¬"), toy("â Ĥ")
    tokens = [*encoded(target, START), *tokens_of(target, euro[:1])]
    wrapper = Translating(Scripted(chain(drafter, euro[1:2], euro[2:], euro[:2])), target=target, drafter=drafter)
    [found] = wrapper.propose([context(tokens)], 8)
    assert found.tokens == tuple(tokens_of(target, euro[1:], euro[:1], euro[1:2]))


def test_an_added_token_is_drafted_as_the_one_of_the_same_content() -> None:
    target, drafter = toy(symbols=[EOS]), toy(symbols=["<|x|>", MARK, EOS])
    found = drafted(target, drafter, chain(drafter, "a", EOS, "b", p=[0.5, 0.25, 0.5]))
    assert found == DraftTree.chain(tokens_of(target, "a", EOS, "b"), [0.5, 0.25, 0.5])
    assert drafted(target, drafter, chain(drafter, "a", MARK, "b")).tokens == tuple(tokens_of(target, "a"))
    assert drafted(target, drafter, DraftTree.chain([10_000], [0.5])) == DraftTree()


def test_what_the_target_cannot_say_ends_the_draft() -> None:
    target, drafter = toy(alphabet=[char for char in ALPHABET if char != "z"]), toy()
    assert drafted(target, drafter, chain(drafter, "a", " ", "z", " ")).tokens == tuple(tokens_of(target, "a"))


def test_paths_that_say_the_same_become_one() -> None:
    """The drafter would say it in two ways: both count."""
    target, drafter = toy("a b"), toy("a b")
    a, b, ab, c = tokens_of(drafter, "a", "b", "ab", "c")
    tree = DraftTree((a, b, ab, c, c), (ROOT, 0, ROOT, 2, 1), (0.3, 0.5, 0.4, 0.5, 0.1), (1,) * 5)
    found = drafted(target, drafter, tree)
    assert paths(found) == [tuple(tokens_of(target, "ab")), tuple(tokens_of(target, "ab", "c"))]
    assert found.probabilities == pytest.approx([0.55, (0.3 * 0.5 * 0.1 + 0.4 * 0.5) / 0.55])


def test_paths_that_part_within_a_target_token_part_before_it() -> None:
    target, drafter = toy("h e", "he l", "hel p", "hel o"), toy()
    h, e, el, p, o = tokens_of(drafter, "h", "e", "l", "p", "o")
    found = drafted(
        target, drafter, DraftTree((h, e, el, p, o), (ROOT, 0, 1, 2, 2), (1.0, 0.5, 1.0, 0.5, 0.25), (1,) * 5)
    )
    assert paths(found) == [tuple(tokens_of(target, "help")), tuple(tokens_of(target, "helo"))]
    assert found.probabilities == pytest.approx([0.25, 0.125])


def test_the_nodes_of_least_probability_go_first() -> None:
    target, drafter = toy(), toy("a b")
    tree = DraftTree((*tokens_of(drafter, "ab", "c"),), (ROOT, ROOT), (0.5, 0.25), (1, 1))
    assert drafted(target, drafter, tree, max_nodes=2).tokens == tuple(tokens_of(target, "a", "b"))


def test_the_drafter_is_asked_for_as_much_text_as_the_target_has_use_for() -> None:
    few, many = toy("o n", "on e", "t w", "tw o", "t h", "th r", "thr e", "thre e"), toy()
    for target, drafter in ((few, many), (many, few)):
        wrapper = Translating(inner := Scripted(), target=target, drafter=drafter)
        tokens = encoded(target, START)
        wrapper.propose([context(tokens)], 8)
        assert inner.max_nodes == -(-8 * len(encoded(drafter, START)) // len(tokens))


@given(tree=trees(40), max_nodes=st.integers(1, 63))
@settings(max_examples=100, deadline=None)
def test_any_draft_becomes_a_draft_of_the_same_text(
    wrappers: list[Translating], tokenizer: Tokenizer, other: Tokenizer, tree: DraftTree, max_nodes: int
) -> None:
    wide = tuple(token_id * 7919 % 1100 for token_id in tree.tokens)
    tree = DraftTree(wide, tree.parents, tree.probabilities, tree.sources)
    inner = wrappers[0]._inner
    assert isinstance(inner, Scripted)
    inner.tree = tree
    [found] = wrappers[0].propose([context(encoded(tokenizer, START))], max_nodes)
    found.check()
    assert len(found) <= max_nodes
    texts = [text_of(other, path) for path in paths(tree)]
    for path in paths(found):
        assert any(text.startswith(text_of(tokenizer, path)) for text in texts)
    if tree.tokens and text_of(other, tree.tokens[:1]):
        assert found


# The cache


class Counted:
    """How often a text was tokenized for the target. Mutated only by its test."""

    def __init__(self, wrapper: Translating, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_calls = 0
        self._encode = wrapper._target.encode
        monkeypatch.setattr(wrapper._target, "encode", self)

    def __call__(self, text: bytes) -> list[list[int]]:
        self.num_calls += 1
        return self._encode(text)


def test_equal_tokens_are_looked_up_and_sequences_are_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = toy("f l", "a k", "ak e", "fl ake"), toy("l a", "k e", "k a")
    wrapper = Translating(inner := Scripted(chain(drafter, " ", ".")), target=target, drafter=drafter)
    counted = Counted(wrapper, monkeypatch)
    tokens = encoded(target, START)
    wrapper.propose([context(tokens)], 8)
    assert counted.num_calls == 1  # " ." may be one; a token alone is not tokenized
    inner.tree = chain(drafter, "f", "la", "ke")
    for _ in range(3):
        wrapper.propose([context(tokens)], 8)
    assert counted.num_calls == 2
    inner.tree = chain(drafter, "a")
    wrapper.propose([context(tokens)], 8)
    assert counted.num_calls == 2


def test_the_cache_keeps_what_was_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(translation, "MAX_NGRAMS", 8)
    target, drafter = toy(), toy()
    wrapper = Translating(inner := Scripted(), target=target, drafter=drafter)
    counted = Counted(wrapper, monkeypatch)
    for place in range(50):
        for text in ("aa", f"{chr(97 + place % 26)}{chr(98 + place // 26)}"):
            inner.tree = chain(drafter, *text)
            wrapper.propose([context(encoded(target, START))], 8)
            assert len(wrapper._ngrams) <= 8
    assert counted.num_calls == 51  # "aa" was there all the time


def test_long_sequences_are_not_kept() -> None:
    target, drafter = toy(), toy()
    word = "a" * (MAX_NGRAM_TOKENS + 1)
    wrapper = Translating(Scripted(chain(drafter, *word)), target=target, drafter=drafter)
    [found] = wrapper.propose([context(encoded(target, START))], 24)
    assert len(found) == len(word)
    assert not len(wrapper._ngrams)


# Keeping and forgetting


def test_nothing_is_kept_of_what_has_ended(tokenizer: Tokenizer, other: Tokenizer) -> None:
    inner = Copying()
    wrapper = Translating(inner, target=tokenizer, drafter=other)
    contexts = [context(encoded(tokenizer, START * 4), name=str(number)) for number in range(20)]
    wrapper.propose(contexts, 8)
    assert len(wrapper._readings) == len(inner._indexes) == 20
    for one in contexts:
        wrapper.forget(one.key)
    assert not wrapper._readings
    assert not inner._indexes


def test_the_inner_drafter_is_not_taught_in_another_vocabulary(tokenizer: Tokenizer, other: Tokenizer) -> None:
    wrapper = Translating(inner := Scripted(), target=tokenizer, drafter=other)
    before = context(encoded(tokenizer, START))
    wrapper.learn([verify(wrapper, before, DraftTree(), lambda tokens: [5])])
    assert inner.num_learnt == 0
    assert wrapper.num_top_ids == 0
    assert wrapper.name == "scripted"


# How good the drafts are


def continued(drafter: Drafter, prompt: Sequence[int], output: Sequence[int]) -> tuple[int, int]:
    """Steps that the true output took, and how many of its tokens were drafted right."""
    truth = [*prompt, *output]
    play = Play(drafter, lambda tokens: [truth[len(tokens)] if len(tokens) < len(truth) else 0])
    contexts = [context(prompt)]
    num_steps = 0
    while len(contexts[0].tokens) < len(truth):
        contexts = play.step(contexts)
        num_steps += 1
    return num_steps, play.num_accepted


@pytest.mark.parametrize("edit", [("", ""), ("width", "columns")])
def test_drafts_of_another_vocabulary_are_nearly_as_good(
    tokenizer: Tokenizer, other: Tokenizer, edit: tuple[str, str]
) -> None:
    text = inspect.getsource(textwrap)
    prompt, output = encoded(tokenizer, text), encoded(tokenizer, text.replace(*edit) if edit[0] else text)
    own_steps, own_accepted = continued(Copying(), prompt, output)
    wrapper = Translating(Copying(), target=tokenizer, drafter=other)
    num_steps, num_accepted = continued(wrapper, prompt, output)
    assert num_accepted > 0.8 * len(output)
    assert num_accepted > 0.9 * own_accepted
    assert num_steps < 1.5 * own_steps


# Set-up


def test_a_drafter_that_wants_top_ids_is_refused(tokenizer: Tokenizer, other: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="'recycle' learns from the target's 8 most probable tokens"):
        Translating(Recycling(), target=tokenizer, drafter=other)


def test_tokens_that_are_not_bytes_are_refused(tokenizer: Tokenizer) -> None:
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ModelError, match="the drafter's tokenizer is not byte-level"):
        Translating(Copying(), target=tokenizer, drafter=words)
    with pytest.raises(ModelError, match="the target's tokenizer is not byte-level"):
        Translating(Copying(), target=words, drafter=tokenizer)


@pytest.fixture
def drafter_dir(tmp_path: Path, other: Tokenizer) -> Path:
    other.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_the_same_tokenizer_needs_no_translation(target_dir: Path, drafter_dir: Path) -> None:
    inner = Copying()
    assert translating(inner, target_dir, target_dir) is inner
    made = translating(inner, target_dir, drafter_dir)
    assert isinstance(made, Translating)
    assert made.name == "copy"


def test_a_tokenizer_that_cannot_be_read_is_named(target_dir: Path, drafter_dir: Path) -> None:
    (drafter_dir / "tokenizer.json").write_text(json.dumps({"no": "tokenizer"}))
    with pytest.raises(ModelError, match="is not readable"):
        translating(Copying(), target_dir, drafter_dir)
    (drafter_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        translating(Copying(), target_dir, drafter_dir)
