"""Text from tokens: whole characters, nothing of a stop string, the same however it is cut."""

import itertools
import random

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream, Metaspace
from tokenizers.models import WordLevel

from protos.messages import Finish, Sampling, TokenDelta
from workers.text import MAX_PENDING, OutputText, TokenTexts, to_delta

TEXTS = ["naïve café 中文 😀👨‍👩‍👧 done", "def f(x):\n    return '�é'\n", "  \t\n\n  x"]


def output(tokenizer: Tokenizer, *stop: str, min_tokens: int = 0) -> OutputText:
    return OutputText(TokenTexts(tokenizer), Sampling(seed=0, max_tokens=99, stop=stop, min_tokens=min_tokens))


def test_text_is_exact_and_never_half_a_character(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        stream = output(tokenizer)
        pieces = [stream.feed([token]).text for token in tokenizer.encode(text).ids]
        assert "".join(pieces) + stream.flush() == text
        assert all("�" not in piece for piece in pieces) or "�" in text


def test_an_unfinished_character_is_replaced_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀").ids
    stream = output(tokenizer)
    assert stream.feed(ids[:-1]).text == "a"
    assert stream.flush() == "�"


def test_bytes_that_are_no_text_do_not_wait_forever(tokenizer: Tokenizer) -> None:
    continuation = tokenizer.encode("😀").ids[-1]
    stream = output(tokenizer)
    text = "".join(stream.feed([continuation]).text for _ in range(3 * MAX_PENDING))
    assert text.count("�") == 3 * MAX_PENDING
    assert stream.feed(tokenizer.encode("ok").ids).text == "ok"


def test_a_stop_string_across_tokens_never_leaks(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("alpha beta\n\nclass Gamma: pass").ids
    stream = output(tokenizer, "\n\nclass")
    seen = ""
    for token in ids:
        piece = stream.feed([token])
        seen += piece.text
        assert "\n" not in seen
        if piece.stop:
            break
    assert (seen, piece.stop) == ("alpha beta", "\n\nclass")


def test_text_that_only_looked_like_a_stop_is_released(tokenizer: Tokenizer) -> None:
    stream = output(tokenizer, "</end>")
    assert stream.feed(tokenizer.encode("a </e").ids).text == "a "
    assert stream.feed(tokenizer.encode("lse").ids).text == "</else"
    stream.feed(tokenizer.encode(" <").ids)
    assert stream.flush().endswith("<")


def test_stops_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x x x x").ids
    stream = output(tokenizer, "x", min_tokens=len(ids))
    piece = stream.feed(ids)
    assert piece.stop == "x"
    assert piece.num_tokens == len(ids)


@given(
    text=st.text(alphabet="ab<>é😀 \n", max_size=30),
    stops=st.lists(st.text(alphabet="ab<>é ", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=40),
)
@example(text="<" * 13 + "é" * 4 + "😀" * 5, stops=[], cuts=[1])  # more tokens than cuts
@settings(max_examples=300, deadline=None)
def test_any_cutting_gives_the_same_text(tokenizer: Tokenizer, text: str, stops: list[str], cuts: list[int]) -> None:
    ids = tokenizer.encode(text).ids
    stream, seen, at = output(tokenizer, *stops), "", 0
    stopped = False
    for cut in itertools.cycle(cuts):
        if at >= len(ids):
            break
        piece = stream.feed(ids[at : at + cut])
        seen += piece.text
        at += cut
        if stopped := piece.stop is not None:
            break
    seen += "" if stopped else stream.flush()
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert seen == text[: min(found)[1] if found else len(text)]  # the stop string that is complete first


def test_the_stop_string_that_is_complete_first_counts_however_tokens_are_cut(tokenizer: Tokenizer) -> None:
    whole = [tokenizer.encode("))").ids, tokenizer.encode(")").ids * 2]
    assert len(whole[0]) == 1  # both stop strings in one token
    for ids in whole:
        piece = output(tokenizer, "x))", ")").feed([*tokenizer.encode("x").ids, *ids])
        assert (piece.text, piece.stop) == ("x", ")")


@given(text=st.text(alphabet="ab<>é😀", max_size=20), cut=st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_a_resumed_output_knows_what_was_emitted(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text).ids
    before = output(tokenizer, "<>")
    first = before.feed(ids[:cut])
    if first.stop:
        return
    resumed = output(tokenizer, "<>")
    resumed.feed(ids[:cut])
    assert resumed.feed(ids[cut:]) == before.feed(ids[cut:])
    assert resumed.flush() == before.flush()


def test_single_tokens_give_the_text_of_many(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        stream = output(tokenizer)
        deltas = [to_delta(TokenDelta("engine", 0, (token,)), stream, request_id="caller") for token in ids[:-1]]
        last = to_delta(TokenDelta("engine", 0, (ids[-1],), finish=Finish("length")), stream, request_id="caller")
        assert "".join(delta.text for delta in [*deltas, last]) == text
        assert [delta.token_ids for delta in deltas] == [(token,) for token in ids[:-1]]
        assert {delta.request_id for delta in [*deltas, last]} == {"caller"}
        assert last.finish == Finish("length")


def test_a_stop_token_is_not_part_of_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two").ids
    delta = TokenDelta("r", 0, tuple(ids), finish=Finish("stop", stop_token_id=ids[-1]))
    made = to_delta(delta, output(tokenizer), request_id="r")
    assert made.text == tokenizer.decode(ids[:-1])
    assert made.token_ids == tuple(ids)


def test_a_stop_string_cuts_tokens_and_ends_the_output(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three").ids
    made = to_delta(TokenDelta("r", 0, tuple(ids)), output(tokenizer, "two"), request_id="r")
    assert made.text == "one "
    assert made.finish == Finish("stop", stop="two")
    assert len(made.token_ids) < len(ids)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_known_texts_of_tokens_change_nothing(tokenizer: Tokenizer, seed: int) -> None:
    pick = random.Random(seed)
    bytes_alone = [tokenizer.token_to_id(char) for char in "ÃâðĺĢ©"]  # parts of characters, in the byte alphabet
    some = [token_id for token_id in bytes_alone if token_id is not None]
    ids = [pick.choice([*some, pick.randrange(tokenizer.get_vocab_size() + 3)]) for _ in range(MAX_PENDING - 1)]
    stream, plain = output(tokenizer), DecodeStream(skip_special_tokens=True)
    assert [stream.feed([token_id]).text for token_id in ids] == [plain.step(tokenizer, i) or "" for i in ids]


def test_tokens_that_depend_on_their_neighbours_have_no_text_of_their_own() -> None:
    words = Tokenizer(WordLevel({"▁one": 0, "▁two": 1}, unk_token="▁one"))
    words.decoder = Metaspace()  # type: ignore[assignment]
    assert TokenTexts(words).get(0) is None
    assert output(words).feed([0, 1, 1]).text == "one two two"
