"""A request that others have answered in part: what is left, and ends that were not heard."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from protos.errors import InvalidParameter
from protos.messages import Delta, Finish, Request, ResumePoint, Sampling, TokenDelta
from workers.resumption import take_up
from workers.text import OutputText, TokenTexts, to_delta

EOS = 4000


def request(*points: ResumePoint, n: int = 1, max_tokens: int = 50, **sampling: object) -> Request:
    return Request("r", (1, 2), Sampling(seed=0, max_tokens=max_tokens, n=n, **sampling), resume=points)  # type: ignore[arg-type]


def ends(tokenizer: Tokenizer, asked: Request) -> tuple[Delta, ...]:
    return take_up(asked, TokenTexts(tokenizer), [EOS]).ends


def test_a_new_request_stays_as_it_is(tokenizer: Tokenizer) -> None:
    taken = take_up(request(n=3), TokenTexts(tokenizer), [EOS])
    assert taken.request == request(n=3)
    assert list(taken.outputs) == [0, 1, 2]
    assert taken.ends == ()


def test_only_what_has_not_ended_goes_on(tokenizer: Tokenizer) -> None:
    ids = tuple(tokenizer.encode("one two").ids)
    asked = request(ResumePoint(0, (), finished=True), ResumePoint(1, (*ids, EOS)), ResumePoint(3, ids), n=4)
    taken = take_up(asked, TokenTexts(tokenizer), [EOS])
    assert list(taken.outputs) == [2, 3]
    assert [(end.index, end.finish) for end in taken.ends] == [(1, Finish("stop", stop_token_id=EOS))]
    assert taken.request == replace(
        asked, resume=(asked.resume[0], replace(asked.resume[1], finished=True), asked.resume[2])
    )


def test_all_tokens_end_in_length_with_the_text_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a </e").ids
    (end,) = ends(tokenizer, request(ResumePoint(0, tuple(ids)), max_tokens=len(ids), stop=("</end>",)))
    assert (end.request_id, end.text, end.token_ids, end.finish) == ("r", "</e", (), Finish("length"))
    assert ends(tokenizer, request(ResumePoint(0, tuple(ids)), max_tokens=len(ids) + 1, stop=("</end>",))) == ()


def test_a_stop_token_ends_where_it_may(tokenizer: Tokenizer) -> None:
    ids = tuple(tokenizer.encode("one <").ids)
    stop = Finish("stop", stop_token_id=EOS)
    (end,) = ends(tokenizer, request(ResumePoint(0, (*ids, EOS)), stop=("<x",)))
    assert (end.text, end.finish) == ("<", stop)
    assert ends(tokenizer, request(ResumePoint(0, (*ids, EOS)), ignore_eos=True)) == ()
    assert ends(tokenizer, request(ResumePoint(0, (*ids, EOS)), min_tokens=9)) == ()
    (end,) = ends(tokenizer, request(ResumePoint(0, (*ids, EOS)), ignore_eos=True, stop_token_ids=(EOS,)))
    assert end.finish == stop


def test_a_complete_stop_string_ends(tokenizer: Tokenizer) -> None:
    ids = tuple(tokenizer.encode("one two").ids)
    (end,) = ends(tokenizer, request(ResumePoint(0, ids), stop=("two",)))
    assert (end.text, end.finish) == ("", Finish("stop", stop="two"))


@pytest.mark.parametrize(
    ("behind", "options", "fragment"),
    [
        ([7, 8], {"stop": ("two",)}, "(stop)"),
        ([EOS, 8], {}, "(stop)"),
        ([7, 8], {"max_tokens": 3}, "after 3 tokens (length)"),
    ],
)
def test_tokens_behind_an_end_are_refused(
    tokenizer: Tokenizer, behind: list[int], options: dict[str, object], fragment: str
) -> None:
    ids = tokenizer.encode("one two").ids
    with pytest.raises(InvalidParameter) as raised:
        ends(tokenizer, request(ResumePoint(0, (*ids, *behind)), **options))  # type: ignore[arg-type]
    assert fragment in raised.value.message


@given(
    text=st.text(alphabet="ab<>é😀 ", min_size=1, max_size=20),
    stops=st.lists(st.text(alphabet="ab<>é", min_size=1, max_size=3), max_size=2),
    min_tokens=st.integers(0, 6),
    max_tokens=st.integers(1, 12),
    eos_at=st.integers(0, 20),
)
@settings(max_examples=200, deadline=None)
def test_any_cut_of_any_output_ends_as_it_would_have(
    tokenizer: Tokenizer, text: str, stops: list[str], min_tokens: int, max_tokens: int, eos_at: int
) -> None:
    """What an output is sent token by token, and what is left of it behind each of them, are the same words."""
    ids = tokenizer.encode(text).ids
    ids.insert(min(eos_at, len(ids)), EOS)
    sampling = Sampling(seed=0, max_tokens=max_tokens, min_tokens=min(min_tokens, max_tokens), stop=tuple(stops))
    texts = TokenTexts(tokenizer)
    output, sent = OutputText(texts, sampling), list[Delta]()
    for token_id in ids:
        sent.append(to_delta(_generated(token_id, len(sent) + 1, sampling), output, request_id="r"))
        if sent[-1].finish:
            break
    for count in range(1, len(sent) + 1):
        taken = take_up(Request("r", (1,), sampling, resume=(ResumePoint(0, tuple(ids[:count])),)), texts, [EOS])
        if sent[count - 1].finish is None:
            assert taken.ends == ()
            rest = [
                to_delta(_generated(ids[at], at + 1, sampling), taken.outputs[0], request_id="r")
                for at in range(count, len(sent))
            ]
            assert rest == sent[count:]
        else:
            (end,) = taken.ends
            assert end.finish == sent[count - 1].finish
            assert sent[count - 1].text.endswith(end.text)


def _generated(token_id: int, count: int, sampling: Sampling) -> TokenDelta:
    """As the scheduler ends outputs."""
    if token_id == EOS and count >= max(1, sampling.min_tokens):
        return TokenDelta("e", 0, (token_id,), finish=Finish("stop", stop_token_id=token_id))
    return TokenDelta("e", 0, (token_id,), finish=Finish("length") if count >= sampling.max_tokens else None)
