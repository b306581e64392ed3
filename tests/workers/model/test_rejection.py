"""Rejection: the target's law exactly, by enumeration at one node and by counting along whole walks."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch

from protos.messages import Sampling
from workers.model import race
from workers.model.draws import Purpose, draw_key, uniforms
from workers.model.rejection import Probabilities, accept, draw, draw_without_replacement, trials, walk_with_rejection
from workers.model.sampler import Row, probabilities, sample
from workers.speculative.tree import ROOT, DraftTree

EXACT = 1e-9
VOCAB = 6
CHI_SQUARE = {5: 20.515, 11: 31.264, 30: 59.703, 35: 66.619}  # by degrees of freedom: exceeded once in 1,000 (tables)

Offer = Callable[[tuple[int, ...]], Sequence[int]]  # of the candidates drawn, those that are put to the target
Pair = tuple[Probabilities, Probabilities]


def distribution(*weights: float) -> Probabilities:
    return np.array(weights, dtype=np.float64) / sum(weights)


def softmax(scores: Probabilities) -> Probabilities:
    return distribution(*np.exp(scores - scores.max()))


def related(rng: np.random.Generator, size: int = 5) -> Pair:
    """A target and a drafter that agree about as well as real ones."""
    scores = 1.5 * rng.normal(size=size)
    return softmax(scores), softmax(scores + 0.9 * rng.normal(size=size))


def with_zeros(rng: np.random.Generator) -> Probabilities:
    weights = rng.random(5) * (rng.random(5) < 0.6)
    return distribution(*weights) if weights.any() else with_zeros(rng)


def some_pairs() -> Iterator[Pair]:
    rng = np.random.default_rng(0)
    for size in (2, 3, 4, 5):
        for _ in range(25):
            yield related(rng, size)
    for _ in range(60):
        yield with_zeros(rng), with_zeros(rng)
    for _ in range(10):
        p, _ = related(rng)
        yield p, p.copy()
        yield p, p + 1e-16  # as good as equal
        yield p, with_zeros(rng)
    one_hots = np.eye(4)
    yield from ((p, q) for p in one_hots for q in one_hots)
    yield from ((one_hots[0], related(rng, 4)[1]) for _ in range(10))
    yield from ((related(rng, 4)[0], one_hots[0]) for _ in range(10))
    yield distribution(1, 2, 0, 0), distribution(0, 0, 3, 1)  # nothing in common
    yield distribution(1, 1e-300, 1e-310), distribution(1e-310, 1, 1e-300)


PAIRS = list(some_pairs())


def orders(q: Probabilities, count: int) -> Iterator[tuple[tuple[int, ...], float]]:
    """Everything that so many draws without replacement may give, with its probability."""
    support = np.flatnonzero(q).tolist()
    for order in permutations(support, min(count, len(support))):
        probability, left = 1.0, set(support)
        for token in order:
            probability *= q[token] / sum(q[other] for other in left)
            left.remove(token)
        yield order, probability


def outcome(p: Probabilities, candidates: Sequence[int], q: Probabilities) -> tuple[Probabilities, float]:
    """The law of the token that leaves a node, and the probability that a candidate was taken."""
    law, refused, residual = np.zeros_like(p), 1.0, p
    for token, trial in zip(candidates, trials(p, candidates, q), strict=True):
        law[token] += refused * trial.acceptance
        refused *= 1.0 - trial.acceptance
        residual = trial.residual
    return law + refused * residual, 1.0 - refused


def integrate(p: Probabilities, q: Probabilities, count: int, offer: Offer = list) -> tuple[Probabilities, float]:
    """The same over all that the drafter may draw."""
    law, taken = np.zeros_like(p), 0.0
    for order, probability in orders(q, count):
        after, acceptance = outcome(p, offer(order), q)
        law += probability * after
        taken += probability * acceptance
    return law, taken


def assert_follows(counts: Probabilities, law: Probabilities, freedom: int) -> None:
    """Pearson's test; the cells that can happen are given by the degrees of freedom."""
    expected = law * counts.sum()
    assert expected[law > 0].min() >= 5
    assert counts[law == 0].sum() == 0
    assert ((counts - expected)[law > 0] ** 2 / expected[law > 0]).sum() < CHI_SQUARE[freedom]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_node_leaves_with_the_targets_law(count: int) -> None:
    assert len(PAIRS) > 200
    for p, q in PAIRS:
        law, _ = integrate(p, q, count)
        assert np.abs(law - p).max() < EXACT, (p, q)


def test_one_candidate_is_token_rejection_sampling() -> None:
    for p, q in PAIRS:
        assert integrate(p, q, 1)[1] == pytest.approx(np.minimum(p, q).sum(), abs=EXACT)
        for token in np.flatnonzero(q).tolist():
            [trial] = trials(p, [token], q)
            assert trial.acceptance == (1.0 if p[token] >= q[token] else p[token] / q[token])
            assert trial.residual.sum() == pytest.approx(1.0)


def test_more_candidates_are_taken_more_often() -> None:
    for p, q in PAIRS:
        taken = [integrate(p, q, count)[1] for count in (1, 2, 4)]
        assert taken[0] <= taken[1] + EXACT
        assert taken[1] <= taken[2] + EXACT


def test_mean_acceptance_where_the_sampled_walk_takes_less() -> None:
    """Of one, two and four candidates: the most probable ones for the walk, drawn ones for rejection."""
    rng = np.random.default_rng(1)
    targets = [rng.dirichlet([0.5] * VOCAB) for _ in range(200)]
    pairs = [(p, 0.6 * p + 0.4 * rng.dirichlet([0.5] * VOCAB)) for p in targets]
    walked = [np.mean([p[np.argsort(-q)[:count]].sum() for p, q in pairs]) for count in (1, 2, 4)]
    taken = [np.mean([integrate(p, q, count)[1] for p, q in pairs]) for count in (1, 2, 4)]
    assert walked == pytest.approx([0.47, 0.69, 0.93], abs=0.03)
    assert taken == pytest.approx([0.76, 0.925, 0.99], abs=0.03)


@pytest.mark.parametrize("offered", [0, 1, 2, 3])
def test_cutting_by_count_keeps_the_law(offered: int) -> None:
    for p, q in PAIRS:
        law, _ = integrate(p, q, 3, lambda order: order[:offered])
        assert np.abs(law - p).max() < EXACT


def test_cutting_by_value_would_break_the_law() -> None:
    """Why drafts are not cut by their nodes' probabilities here: the likely tokens would be given too often."""
    p = q = distribution(7, 2, 1)
    law, _ = integrate(p, q, 1, lambda order: [token for token in order if q[token] > 0.15])
    assert law == pytest.approx([0.7 + 0.1 * 0.7, 0.2 + 0.1 * 0.2, 0.1 * 0.1])
    law, _ = integrate(p, q, 2, lambda order: sorted(order, key=lambda token: -q[token])[:1])  # the best of two
    assert np.abs(law - p).max() > 0.05


def test_cutting_before_drawing_keeps_the_law() -> None:
    p = distribution(7, 2, 1)
    law, _ = integrate(p, distribution(7, 2, 0), 2)
    assert np.abs(law - p).max() < EXACT


def _between(others: list[int], order: tuple[int, ...]) -> list[int]:
    return [*others, *order, *others]


def test_candidates_that_could_not_be_drawn_cost_no_law() -> None:
    for p, q in PAIRS:
        missing = np.flatnonzero(q == 0).tolist()
        law, _ = integrate(p, q, 2, partial(_between, missing))
        assert np.abs(law - p).max() < EXACT


def test_equal_distributions_are_never_refused() -> None:
    for p, q in PAIRS:
        if np.array_equal(p, q):
            assert all(
                trial.acceptance == 1.0 for token in np.flatnonzero(q).tolist() for trial in trials(p, [token], q)
            )


def test_decisions_are_those_of_the_trials() -> None:
    p, q = distribution(1, 2, 3, 4), distribution(4, 3, 2, 1)
    grid = (np.arange(200) + 0.5) / 200
    expected, _ = outcome(p, [0, 1], q)
    counts = np.zeros(4)
    for first in grid:
        for second in grid:
            number, token = accept(p, [0, 1], q, np.array([(first * 7 + second * 3) % 1, first, second]))
            assert number is None or [0, 1][number] == token
            counts[token] += 1
    assert counts / counts.sum() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("edge", [0.0, 2.0**-53, 1.0 - 2.0**-53])
def test_the_edges_of_a_draw_give_possible_tokens(edge: float) -> None:
    for p, q in PAIRS:
        assert p[draw(p, edge)] > 0
        order = draw_without_replacement(q, np.full(4, edge))
        assert len(set(order)) == len(order) == min(4, np.count_nonzero(q))
        assert (q[order] > 0).all()
        number, token = accept(p, order, q, np.full(1 + len(order), edge))
        assert p[token] > 0 or number is not None


def test_draws_without_replacement_follow_their_law() -> None:
    q = distribution(4, 3, 2, 1)
    laws = dict(orders(q, 2))
    counts = dict.fromkeys(laws, 0)
    for seed in range(3000):
        draws = uniforms(draw_key(seed, 0, 0), Purpose.PROPOSE, 2)
        counts[tuple(draw_without_replacement(q, draws))] += 1
    assert_follows(np.array(list(counts.values()), dtype=np.float64), np.array(list(laws.values())), len(laws) - 1)


def test_purposes_and_positions_have_draws_of_their_own() -> None:
    drawn = [uniforms(draw_key(1, 0, position), purpose, 50) for position in range(50) for purpose in Purpose]
    values = np.concatenate(drawn)
    assert len(np.unique(values)) == len(values)
    assert 0 < values.min() < values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.02)
    key = draw_key(1, 0, 0)
    assert np.array_equal(uniforms(key, Purpose.VERIFY, 5)[:2], uniforms(key, Purpose.VERIFY, 2))


def _look_up(rows: Probabilities, row: int, taken: Sequence[int]) -> Probabilities:
    found: Probabilities = rows[row]
    return found


class Pairing:
    """A target and a drafter whose distributions depend on the last token, and the walks of one request's output."""

    def __init__(self, counts: Sequence[int]) -> None:
        rng = np.random.default_rng(5)
        self.p = np.array([softmax(0.8 * rng.normal(size=VOCAB)) for _ in range(VOCAB)])
        self.q = np.array([softmax(np.log(row) + rng.normal(size=VOCAB)) for row in self.p])
        self._counts = counts  # of candidates, by depth
        self.taken: dict[int, int] = {}  # walks by the node of a draft

    def draft(self, last: int, seed: int, position: int) -> tuple[DraftTree, dict[int, Probabilities]]:
        tokens: list[int] = []
        parents: list[int] = []
        drawn_from = {}
        level = [ROOT]
        for depth, count in enumerate(self._counts):
            draws = uniforms(draw_key(seed, 0, position + depth), Purpose.PROPOSE, count)
            first = len(tokens)
            for parent in level:
                drawn_from[parent] = self.q[last if parent == ROOT else tokens[parent]]
                drawn = draw_without_replacement(drawn_from[parent], draws)
                tokens += drawn
                parents += [parent] * len(drawn)
            level = list(range(first, len(tokens)))
        return DraftTree(tuple(tokens), tuple(parents), (0.5,) * len(tokens), (1,) * len(tokens)), drawn_from

    def output(self, seed: int, start: int, num_tokens: int) -> list[int]:
        """So many tokens after token 0, from a position of the output on."""
        tokens = [0]
        while len(tokens) <= num_tokens:
            position = start + len(tokens) - 1
            draft, drawn_from = self.draft(tokens[-1], seed, position)
            after = self.p[[tokens[-1], *draft.tokens]]  # by row
            target = partial(_look_up, after)
            walk = walk_with_rejection(draft, drawn_from, target, seed=seed, index=0, position=position)
            assert walk.token_ids[:-1] == tuple(draft.tokens[node] for node in walk.nodes)
            for node in walk.nodes:
                self.taken[node] = self.taken.get(node, 0) + 1
            tokens += walk.token_ids
        return tokens[1 : 1 + num_tokens]


def test_walks_follow_the_targets_joint_law() -> None:
    pairing = Pairing([2, 2])
    counts = np.zeros((VOCAB, VOCAB))
    for seed in range(1500):
        for start in (0, 1, 2, 3000):
            first, second = pairing.output(seed, start, 2)
            counts[first, second] += 1
    assert_follows(counts, pairing.p[0][:, None] * pairing.p, VOCAB**2 - 1)
    assert set(pairing.taken) == set(range(6))  # every node of the tree was right now and then


def test_one_requests_positions_are_independent() -> None:
    pairing = Pairing([1, 1, 1])
    tokens = pairing.output(7, 0, 6000)
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    expected = counts.sum(axis=1, keepdims=True) * pairing.p
    assert expected.min() >= 5
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE[VOCAB * (VOCAB - 1)]
    assert set(pairing.taken) == {0, 1, 2}


def test_the_same_drafts_make_the_same_choices() -> None:
    tokens = Pairing([2, 2]).output(3, 0, 40)
    assert Pairing([2, 2]).output(3, 0, 40) == tokens
    assert Pairing([2, 2]).output(4, 0, 40) != tokens


def test_a_greedy_target_walks_its_own_path() -> None:
    """Whatever was drafted, with q or without."""
    tokens, parents = (4, 1, 2, 5, 3), (ROOT, ROOT, 1, 1, 3)
    draft = DraftTree(tokens, parents, (0.5,) * 5, (1,) * 5)
    certain = {0: 1, 2: 5, 4: 3, 5: 0}  # by row
    q = distribution(1, 1, 1, 1, 1, 1)
    for drawn_from in ({}, {ROOT: q}, {ROOT: q, 1: q, 3: q}):
        for seed in range(20):
            walk = walk_with_rejection(
                draft, drawn_from, lambda row, taken: np.eye(VOCAB)[certain[row]], seed=seed, index=0, position=9
            )
            assert walk == ((1, 5, 3, 0), (1, 3, 4), ())


def test_the_target_is_told_the_tokens_taken() -> None:
    seen: list[tuple[int, list[int]]] = []

    def target(row: int, taken: Sequence[int]) -> Probabilities:
        seen.append((row, list(taken)))
        return distribution(*np.eye(VOCAB)[row + 1])

    walk_with_rejection(DraftTree.chain([1, 2], [0.5, 0.5]), {}, target, seed=0, index=0, position=0)
    assert seen == [(0, []), (1, [1]), (2, [1, 2])]


def test_nodes_without_q_are_met_by_the_sampled_walk() -> None:
    p = distribution(1, 2, 3, 4, 5, 6)
    draft = DraftTree((5, 3), (ROOT, ROOT), (0.5,) * 2, (1,) * 2)
    counts = np.zeros(VOCAB)
    for seed in range(2000):
        walk = walk_with_rejection(draft, {}, lambda row, taken: p, seed=seed, index=0, position=0)
        counts[walk.token_ids[0]] += 1
        assert walk.nodes == {5: (0,), 3: (1,)}.get(walk.token_ids[0], ())
    assert_follows(counts, p, VOCAB - 1)


def row(seed: int = 0, tokens: tuple[int, ...] = (1,), **fields: Any) -> Row:
    banned = fields.pop("banned_ids", ())
    return Row(Sampling(seed=seed, max_tokens=9, **fields), 0, tokens, 1, banned)


FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.3},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.05},
    {"tokens": (1, 2, 2), "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    {"logit_bias": {3: 2.0}, "banned_ids": (0, 4)},
]


@pytest.mark.parametrize("fields", FIELDS)
def test_probabilities_are_what_the_sampler_draws_from(fields: dict[str, Any]) -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4))
    [p] = probabilities(logits, [row(**fields)]).numpy()
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    chosen = sample(logits.expand(3000, -1), [row(seed, **fields) for seed in range(3000)])
    counts = np.bincount(chosen, minlength=VOCAB).astype(np.float64)
    kept = p > 0
    assert counts[~kept].sum() == 0
    expected = p[kept] * 3000
    assert ((counts[kept] - expected) ** 2 / expected).sum() < CHI_SQUARE[5]


def test_probabilities_keep_what_the_race_keeps() -> None:
    logits = torch.randn(40, 3000, generator=torch.Generator().manual_seed(2)) * 3
    fields: dict[str, Any] = {"temperature": 0.8, "top_k": 400, "top_p": 0.93, "min_p": 0.001}
    rows = [row(**fields)] * 40
    for scores, p in zip(logits.numpy() / np.float32(0.8), probabilities(logits, rows).numpy(), strict=True):
        ids = race.survivors(scores, rows[0].sampling)
        assert np.array_equal(np.flatnonzero(p), ids)
        assert p[ids] == pytest.approx(softmax(scores[ids].astype(np.float64)))


def test_certain_rows_have_all_probability_on_one_token() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3))
    logits[1] = torch.nan
    logits[2, 3] = torch.inf
    before = logits.clone()
    rows = [row(temperature=0.0, top_p=0.5), row(top_p=0.5), row(top_k=2), row(top_k=1)]
    found = probabilities(logits, rows).numpy()
    assert np.array_equal(found, np.eye(VOCAB)[sample(logits, rows)])
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
