"""Verification by rejection: drafted tokens are taken more often than by the sampled walk, and the law is the target's.

An option beside `verifier.walk` for sampled requests. The drafter must have drawn its candidates at random, and say
what from (q); what leaves a node then has exactly the target's distribution (p), but which token it is depends on the
draft. One rule serves both cases:

- a chain, one candidate per node: token rejection sampling (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et
  al., arXiv 2302.01318, algorithm 2);
- a tree whose siblings were drawn without replacement: recursive rejection sampling (Jeon et al., arXiv 2402.14160),
  which is the former at every sibling in the order drawn, with what the refused ones left of p and q.

What keeps the law, and what would break it:

- q is the very distribution that was drawn from: after the drafter's own temperature and filters, and after any
  rounding on its way here. A drafter that misreports q changes the text's law; no drafter of the sampled walk can.
- Whether a candidate is offered may depend on its depth or on its place in the order drawn, not on what token it, one
  of its siblings or one below them turned out to be. Dropping those drawn that are improbable (`DraftTree.cut`) gives
  their share to others. So admission goes by depth here, or by count; to leave out improbable tokens, cut q before
  drawing from it.
- The draws here are independent of the token's and of the drafter's, see `draws.Purpose`. They are keyed by position,
  so a request that is resumed elsewhere with the same drafts makes the same choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from workers.model.draws import Purpose, draw_key, uniforms
from workers.scheduler.step import Walk
from workers.speculative.tree import ROOT, DraftTree

Probabilities = NDArray[np.float64]  # [vocab], sums to 1
Target = Callable[[int, Sequence[int]], Probabilities]


class Trial(NamedTuple):
    """What may happen to one candidate after those before it were refused."""

    acceptance: float  # the probability that it is taken
    residual: Probabilities  # what the token is drawn from if it is not, and was the last


def trials(p: Probabilities, candidates: Sequence[int], q: Probabilities) -> Iterator[Trial]:
    """The whole rule at one node: candidates in the order in which they were drawn from q without replacement.

    With probability min(1, p(x)/q(x)) candidate x is taken; else p becomes norm(max(p - q, 0)), and q what it is
    without x. A candidate that q could not give is refused and changes nothing, so it costs no law either.
    """
    for token in candidates:
        if not q[token] > 0.0:
            yield Trial(0.0, p)
            continue
        acceptance = 1.0 if p[token] >= q[token] else float(p[token] / q[token])
        p, q = _residual(p, q), _without(q, token)
        yield Trial(acceptance, p)


def accept(
    p: Probabilities, candidates: Sequence[int], q: Probabilities, draws: NDArray[np.float64]
) -> tuple[int | None, int]:
    """One node's token, and which candidate it is if one was taken.

    `draws` [1 + candidates] are uniform: the first chooses the token if no candidate is taken, the others decide on one
    candidate each.
    """
    residual = p
    for number, (trial, uniform) in enumerate(zip(trials(p, candidates, q), draws[1:], strict=True)):
        if uniform < trial.acceptance:
            return number, candidates[number]
        residual = trial.residual
    return None, draw(residual, draws[0])


def walk_with_rejection(
    draft: DraftTree, drawn_from: Mapping[int, Probabilities], target: Target, *, seed: int, index: int, position: int
) -> Walk:
    """The target's tokens along a draft, and the nodes that had guessed them.

    `drawn_from` gives by parent (or ROOT) the q that its children were drawn from, in the order of their numbers;
    children of a parent that it lacks are met by the sampled walk. `target(row, token_ids)` gives p after a row of the
    draft (0: the sequence's last token, i + 1: node i), with the tokens taken so far. `position` is the first token's
    in the output `index` of the request.
    """
    siblings = _siblings(draft)
    token_ids: list[int] = []
    nodes: list[int] = []
    node: int | None = ROOT
    while node is not None:
        q = drawn_from.get(node)
        candidates = [] if q is None else siblings.get(node, [])
        p = target(node + 1, token_ids)
        draws = uniforms(draw_key(seed, index, position + len(nodes)), Purpose.VERIFY, 1 + len(candidates))
        _, token_id = accept(p, candidates, p if q is None else q, draws)
        token_ids.append(token_id)
        node = draft.children.get((node, token_id))
        if node is not None:
            nodes.append(node)
    return Walk(tuple(token_ids), tuple(nodes))


def draw_without_replacement(q: Probabilities, draws: NDArray[np.float64]) -> list[int]:
    """Different tokens in the order drawn, one per uniform draw; fewer if q has no more. The drafter's side."""
    tokens: list[int] = []
    for uniform in draws[: np.count_nonzero(q)]:
        tokens.append(draw(q, uniform))
        q = _without(q, tokens[-1])
    return tokens


def draw(p: Probabilities, uniform: float) -> int:
    """The token at which the cumulative probability passes the uniform draw; never one of probability 0."""
    cumulative = p.cumsum()
    last = cumulative.searchsorted(cumulative[-1])  # of positive probability: rounding must not lead beyond it
    return int(min(cumulative.searchsorted(uniform * cumulative[-1], side="right"), last))


def _residual(p: Probabilities, q: Probabilities) -> Probabilities:
    """norm(max(p - q, 0)); p itself if nothing remains, which is when nothing is refused but for rounding."""
    left = np.maximum(p - q, 0.0)
    total = left.sum()
    return left / total if total > 0.0 else p


def _without(q: Probabilities, token: int) -> Probabilities:
    """q of the other tokens; all 0 if there are none. Summed anew, as 1 - q(token) would cancel."""
    rest = q.copy()
    rest[token] = 0.0
    total = rest.sum()
    return rest / total if total > 0.0 else rest


def _siblings(draft: DraftTree) -> dict[int, list[int]]:
    """The tokens after each parent, in the order of their nodes."""
    siblings: dict[int, list[int]] = {}
    for parent, token in zip(draft.parents, draft.tokens, strict=True):
        siblings.setdefault(parent, []).append(token)
    return siblings
