"""What every drafter promises, and how copying and recycling find what they propose."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from tests.workers.speculative.play import Play, Ranked, context, successors, told, verify
from tests.workers.speculative.trees import paths
from workers.speculative import recycling
from workers.speculative.copying import MAX_PLACES, SURE_MATCH, Copying
from workers.speculative.protocol import Context, Drafter
from workers.speculative.recycling import MAX_SALTS, NUM_RANKS, RESHAPE_AFTER, Recycling
from workers.speculative.tree import ROOT, DraftTree

Make = Callable[[], Drafter]


@pytest.fixture(params=[Copying, Recycling], ids=["copy", "recycle"])
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


def several(salts: Sequence[str] = ("",)) -> list[Context]:
    """Sequences of different lengths, one token and two among them."""
    return [
        context([(3 + number * step) % 100 for step in range(number + 1)], name=str(number), salt=salt)
        for number, salt in enumerate([*salts] * 6)
    ]


# The contract


@pytest.mark.parametrize("max_nodes", [1, 2, 3, 5, 24, 63])
def test_drafts_are_valid_trees_of_at_most_max_nodes(make: Make, max_nodes: int) -> None:
    play = Play(make(), successors(), max_nodes)
    play.run(several(), 60)
    sizes = {len(draft) for _, draft in play.proposed}
    assert max(sizes) > max_nodes // 2
    assert play.num_accepted > 0


def test_the_number_of_nodes_may_change_from_step_to_step(make: Make) -> None:
    play, contexts = Play(make(), successors()), several()
    for step in range(60):
        play.max_nodes = 1 + step * 17 % 63
        contexts = play.step(contexts)
    assert play.num_accepted > 0


def test_nothing_is_asked_and_nothing_comes(make: Make) -> None:
    drafter = make()
    assert drafter.propose([], 8) == []
    drafter.learn([])


@pytest.mark.parametrize("tokens", [[5], [5, 6], [5, 5]])
def test_a_short_sequence_gets_an_empty_draft_of_a_new_drafter(make: Make, tokens: list[int]) -> None:
    assert make().propose([context(tokens)], 8) == [DraftTree()]


def test_forgetting_an_unknown_key_does_nothing(make: Make) -> None:
    drafter = make()
    drafter.forget(("never seen", 3))
    drafter.propose([context([1, 2, 3])], 8)
    drafter.forget(("a", 0))
    drafter.forget(("a", 0))


def test_a_key_may_come_back_with_other_tokens(make: Make) -> None:
    play = Play(make(), successors())
    play.run([context(range(60))], 20)
    play.drafter.forget(("a", 0))
    play.run([context([9, 8, 7])], 20)
    assert play.num_accepted > 0


def test_sequences_without_a_draft_are_learnt_from_too(make: Make) -> None:
    drafter, ranked = make(), successors()
    contexts = several()
    for _ in range(60):
        drafter.propose(contexts, 8)  # whatever was proposed, nothing was admitted
        verified = [verify(drafter, before, DraftTree(), ranked) for before in contexts]
        drafter.learn(verified)
        contexts = [one.context for one in verified]
    assert any(map(len, drafter.propose(contexts, 8)))


def test_a_sequence_may_end_within_its_draft(make: Make) -> None:
    """A stop token cuts what is kept: fewer new tokens than the draft had right ones."""
    play, ranked = Play(make(), successors()), successors()
    [before] = play.run([context([1, 2, 3])], 80)
    [draft] = play.drafter.propose([before], 8)
    assert len(draft)
    whole = verify(play.drafter, before, draft, ranked)
    assert whole.nodes
    new = whole.context.tokens[len(before.tokens) :][: len(whole.nodes)]
    play.drafter.learn([told(play.drafter, before, draft, ranked, new, whole.nodes[: len(new)])])
    play.drafter.forget(before.key)
    play.run([context([1, 2, 3], name="next")], 5)


def test_two_drafters_that_see_the_same_propose_the_same(make: Make) -> None:
    plays = [Play(make(), successors()) for _ in range(2)]
    for play in plays:
        play.run(several(["x", "y"]), 40)
    assert plays[0].proposed == plays[1].proposed
    assert plays[0].num_accepted > 0


def split(tokens: Sequence[int]) -> list[int]:
    """A target whose tokens stay in the hundred of the sequence's last."""
    return successors(tokens[-1] // 100 * 100)(tokens)


def test_nothing_learnt_under_one_salt_is_proposed_under_another(make: Make) -> None:
    play = Play(make(), split)
    mine = [context([1, 2, 3], name="1", salt="mine"), context([7], name="2", salt="mine")]
    others = [context([101, 102, 103], name="3", salt="yours"), context([107], name="4", salt="")]
    play.run([*mine, *others], 60)
    proposed = {"mine": set[int](), "yours": set[int](), "": set[int]()}
    for asked, draft in play.proposed:
        proposed[asked.salt].update(draft.tokens)
    assert proposed["mine"] <= set(range(100))
    assert proposed["yours"] | proposed[""] <= set(range(100, 200))
    assert proposed["mine"]
    assert proposed["yours"]


def test_another_salt_knows_nothing_of_what_followed_the_same_tokens(make: Make) -> None:
    play = Play(make(), split)
    [known] = play.run([context([1, 2, 3], salt="mine")], 60)
    strangers = [
        context(known.tokens[-count:], name=f"{salt}{count}", salt=salt) for salt in ("", "yours") for count in (1, 2)
    ]
    assert play.drafter.propose(strangers, 24) == [DraftTree()] * 4
    assert len(play.drafter.propose([known], 24)[0])


def test_nothing_is_kept_of_guesses(make: Make) -> None:
    """A drafter that is asked to go on from guesses, right and wrong, is none the wiser."""
    source, plays = random.Random(1), [Play(make(), successors()) for _ in range(2)]
    contexts = several(["x", "y"])
    for _ in range(60):
        guessing = [source.choices(range(100), k=source.randrange(1, 6)) for _ in contexts]
        plays[0].drafter.propose(
            [
                one._replace(tokens=[*one.tokens, *guess], num_guessed=len(guess))
                for one, guess in zip(contexts, guessing, strict=True)
            ],
            12,
        )
        after = [play.step(contexts) for play in plays]
        assert after[0] == after[1]
        contexts = after[0]
    assert plays[0].proposed == plays[1].proposed
    assert plays[0].num_accepted > 0


def test_drafts_go_on_from_guesses(make: Make) -> None:
    play = Play(make(), successors())
    [known] = play.run([context([1, 2, 3])], 120)
    play.step([known])
    num_right = 0
    for num_guessed in range(1, 6):
        tokens = list(known.tokens)
        for _ in range(num_guessed):
            tokens.append(successors()(tokens)[0])
        [draft] = play.drafter.propose([known._replace(tokens=tokens, num_guessed=num_guessed)], 12)
        draft.check()
        num_right += (successors()(tokens)[0],) in paths(draft)
    assert num_right >= 4


# Copying


def copied(tokens: Sequence[int], max_nodes: int = 8) -> DraftTree:
    [draft] = Copying().propose([context(tokens)], max_nodes)
    draft.check()
    return draft


def test_copying_finds_what_followed_the_same_tokens() -> None:
    draft = copied([9, 1, 2, 3, 4, 5, 6, 7, 8, 50, 1, 2], max_nodes=4)
    assert draft.tokens == (3, 4, 5, 6)
    assert draft.is_chain


def test_copying_finds_nothing_where_nothing_is_repeated() -> None:
    assert copied(range(50)) == DraftTree()
    assert copied([1, 2, 3, 4, 5]) == DraftTree()


def test_copying_guesses_from_one_token_where_two_are_new() -> None:
    draft, sure = copied([1, 2, 3, 4, 2], max_nodes=3), copied([1, 2, 3, 4, 1, 2], max_nodes=3)
    assert draft.tokens == (3, 4, 2)
    assert draft.probabilities[0] < sure.probabilities[0]


SOURCE = list(range(10, 40))


@pytest.mark.parametrize(
    ("said", "likeliest", "other"),
    [
        pytest.param([10, 11, 12, 90], 14, 13, id="replaced one, or inserted it"),
        pytest.param([10, 11, 12, 90, 91], 15, 13, id="replaced two"),
        pytest.param([10, 11, 12, 16], 17, 14, id="left three out"),
    ],
)
def test_copying_resumes_where_the_target_has_left_its_source(said: list[int], likeliest: int, other: int) -> None:
    drafter = Copying()
    for length in range(2, len(said) + 1):
        [draft] = drafter.propose([context([*SOURCE, *said[:length]])], 8)
    draft.check()
    firsts = [token_id for token_id, parent in zip(draft.tokens, draft.parents, strict=True) if parent == ROOT]
    assert firsts == [likeliest, other]
    assert (likeliest, likeliest + 1, likeliest + 2) in paths(draft)


def test_copying_gives_a_source_up_that_the_target_does_not_come_back_to() -> None:
    drafter, said = Copying(), [10, 11, 12, 90, 91, 92, 93, 94]
    drafts = [drafter.propose([context([*SOURCE, *said[:length]])], 8)[0] for length in range(2, len(said) + 1)]
    assert all(len(draft) for draft in drafts[:-1])
    assert drafts[-1] == DraftTree()


def test_copying_follows_a_sequence_as_it_grows() -> None:
    drafter, text = Copying(), [5, 6, 7, 8, 9, 4]
    for length in range(1, 18):
        tokens = (text * 3)[:length]
        [draft] = drafter.propose([context(tokens)], 3)
        assert draft.tokens == (tuple((text * 4)[length : length + 3]) if length >= 7 else ())


def test_copying_knows_when_it_is_sure() -> None:
    """As long as what was copied before goes on; one token that differs ends it, and it takes some to begin again."""
    drafter, said = Copying(), [*SOURCE[:10], 99, *SOURCE[11:20]]
    sure = [drafter.is_sure([context([*SOURCE, 98, *said[:length]])]) for length in range(len(said) + 1)]
    begins = [number for number, (before, now) in enumerate(pairwise(sure), start=1) if now and not before]
    assert begins == [SURE_MATCH, 11 + SURE_MATCH]
    assert not sure[11]
    assert not drafter.is_sure([])


def test_copying_finds_the_same_matches_whether_it_is_asked_at_every_token_or_not() -> None:
    draw = random.Random(7)
    tokens = [draw.randrange(4) for _ in range(400)]
    often, seldom = Copying(), Copying()
    for length in range(3, len(tokens) + 1):
        one, new = [context(tokens[:length])], Copying()
        often.propose(one, 6)
        if draw.random() < 0.1:
            for drafter in (seldom, new):
                drafter.propose(one, 6)
                assert drafter._indexes["a", 0].matches == often._indexes["a", 0].matches
    assert max(often._indexes["a", 0].matches.values()) > 2


def test_copying_prefers_the_longer_match() -> None:
    longer, later = [1, 2, 3, 4, 50, 51, 52], [9, 3, 4, 60, 61, 62]
    assert copied([*longer, *later, 1, 2, 3, 4], max_nodes=2).tokens == (50, 51)


def test_copying_prefers_the_later_of_equal_matches() -> None:
    assert copied([1, 2, 50, 0, 1, 2, 60, 9, 1, 2], max_nodes=1).tokens == (60,)


def test_copying_goes_round_in_a_periodic_sequence() -> None:
    assert copied([8, 1, 2, 3, 1, 2, 3, 1, 2], max_nodes=10).tokens == (3, 1, 2, 3, 1, 2, 3, 1, 2, 3)
    assert copied([8, 7, 7, 7], max_nodes=5).tokens == (7, 7, 7, 7, 7)


def test_copying_proposes_a_second_continuation_with_a_quarter_of_the_nodes() -> None:
    draft = copied([1, 2, 3, 4, 50, 51, 52, 9, 3, 4, 60, 61, 62, 1, 2, 3, 4], max_nodes=8)
    assert {path[0] for path in paths(draft)} == {50, 60}
    assert (60, 61) in paths(draft)
    assert (60, 61, 62) not in paths(draft)
    assert (50, 51, 52, 9, 3) in paths(draft)


def test_copying_believes_a_longer_match_more() -> None:
    short, long = copied([3, 4, 5, 9, 3, 4]), copied([*range(20), 50, *range(20)])
    assert long.probabilities[0] > short.probabilities[0]


def test_copying_finds_what_followed_guesses_and_never_a_guess() -> None:
    drafter, known = Copying(), [1, 2, 3, 4, 5, 6, 7, 8, 20]
    guessed = context([*known, 1, 2, 30, 31, 1, 2])._replace(num_guessed=6)
    assert drafter.propose([guessed], 3)[0].tokens == (3, 4, 5)  # not 30, which was guessed after 1 and 2
    assert drafter.propose([context([*known, 9, 30, 31])], 3) == [DraftTree()]
    assert drafter.propose([context([*known, 9, 30, 31, 1, 2])], 1)[0].tokens == (3,)


def test_copying_remembers_a_bounded_number_of_places() -> None:
    drafter = Copying()
    tokens = [token for turn in range(300) for token in (1, 2, turn % 3)]
    drafter.propose([context(tokens)], 8)
    [index] = drafter._indexes.values()
    assert max(map(len, index.places.values())) == MAX_PLACES
    assert max(index.places[1, 2]) == len(tokens) - 1  # the latest


def test_copying_keeps_nothing_of_what_has_ended() -> None:
    drafter = Copying()
    drafter.propose(several(), 8)
    for one in several():
        drafter.forget(one.key)
    assert not drafter._indexes


# Recycling


def taught(lessons: dict[tuple[int, int], list[int]], drafter: Recycling | None = None, salt: str = "") -> Recycling:
    """What follows each pair, learnt from steps without drafts."""
    drafter = drafter or Recycling()
    for (before, last), candidates in lessons.items():
        lesson = context([0, before, last], salt=salt)
        ranked: Ranked = lambda _, found=candidates: found  # type: ignore[misc]  # noqa: E731
        drafter.learn([verify(drafter, lesson, DraftTree(), ranked)])
    return drafter


def drafted(drafter: Recycling, tokens: Sequence[int], max_nodes: int = 12, salt: str = "") -> list[tuple[int, ...]]:
    [draft] = drafter.propose([context(tokens, salt=salt)], max_nodes)
    draft.check()
    return paths(draft)


def test_recycling_asks_for_the_tokens_that_it_ranks() -> None:
    assert Recycling().num_top_ids == NUM_RANKS


def test_recycling_proposes_candidates_that_were_not_chosen() -> None:
    found = drafted(taught({(1, 2): [10, 11, 12]}), [7, 1, 2])
    assert {(10,), (11,), (12,)} <= set(found)
    assert found[0] == (10,)  # best first


def test_recycling_goes_on_from_its_own_candidates() -> None:
    found = drafted(taught({(1, 2): [10, 11], (2, 10): [20], (10, 20): [30]}), [1, 2])
    assert (10, 20, 30) in found


def test_recycling_learns_from_rejected_nodes() -> None:
    """What the target said after a wrong guess is kept for when that token really comes."""
    drafter = Recycling()
    draft = DraftTree((10, 11, 40), (-1, -1, 1), (0.5, 0.5, 0.5), (1, 1, 1))
    after = {2: [10, 11], 10: [20], 11: [40, 41], 40: [50]}
    one = verify(drafter, context([1, 2]), draft, lambda tokens: after[tokens[-1]])
    assert one.nodes == (0,)
    drafter.learn([one])
    assert {(40,), (41,), (40, 50)} <= set(drafted(drafter, [2, 11]))
    assert (50,) in drafted(drafter, [11, 40])


def test_recycling_looks_two_tokens_up_before_one() -> None:
    drafter = taught({(1, 5): [10], (2, 5): [20]})
    assert drafted(drafter, [1, 5])[0] == (10,)
    assert drafted(drafter, [2, 5])[0] == (20,)
    assert drafted(drafter, [3, 5])[0] == (20,)  # the pair is unknown: what followed the token last
    assert drafted(drafter, [5])[0] == (20,)


def test_recycling_believes_what_it_heard_last() -> None:
    drafter = taught({(1, 5): [11]}, taught({(1, 5): [10]}))
    assert drafted(drafter, [1, 5])[0] == (11,)
    assert (10,) not in drafted(drafter, [1, 5])


def test_recycling_forgets_the_oldest_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycling, "MAX_PAIRS", 32)
    drafter = taught({(before, 5): [1000 + before] for before in range(40)})
    [table] = drafter._tables.values()
    assert 16 < len(table.by_pair) <= 32
    assert drafted(drafter, [39, 5])[0] == (1039,)
    assert drafted(drafter, [30, 5])[0] == (1030,)
    assert drafted(drafter, [0, 5])[0] == (1039,)  # forgotten: what followed the token last


def test_recycling_keeps_the_salts_used_last() -> None:
    drafter = Recycling()
    for number in range(3 * MAX_SALTS):
        taught({(1, 2): [number]}, drafter, salt=f"salt {number}")
        assert drafted(drafter, [1, 2], salt="salt 0") == [(0,)]  # used again and again
    assert len(drafter._tables) <= MAX_SALTS
    last = 3 * MAX_SALTS - 1
    assert drafted(drafter, [1, 2], salt=f"salt {last}") == [(last,)]
    assert drafted(drafter, [1, 2], salt="salt 1") == []
    assert len(drafter._tables) <= MAX_SALTS


def cycle(tokens: Sequence[int]) -> list[int]:
    """The first candidate is right, and seven are not."""
    return [(tokens[-1] + 1) % 50, *(100 + tokens[-1] * 10 + rank for rank in range(7))]


def test_recycling_grows_deep_chains_where_the_first_rank_is_always_right() -> None:
    play = Play(Recycling(), cycle, 24)
    [grown] = play.run([context([0, 1])], 60)
    [early] = play.drafter.propose([grown], 24)
    play.run([grown], RESHAPE_AFTER)
    [late] = play.drafter.propose([grown], 24)
    assert max(early.depths) < max(late.depths)
    assert max(late.depths) > 20


def test_recycling_grows_wide_where_the_first_rank_is_often_wrong() -> None:
    def shuffled(tokens: Sequence[int]) -> list[int]:
        """The candidates stay, in an order that no two tokens foretell: each rank is right equally often."""
        return random.Random(len(tokens)).sample(range(100, 108), 8)

    play = Play(Recycling(), shuffled, 24)
    [grown] = play.run([context([100, 101])], 4 * RESHAPE_AFTER)
    [draft] = play.drafter.propose([grown], 24)
    assert draft.depths.count(1) == NUM_RANKS
    assert max(draft.depths) <= 3
