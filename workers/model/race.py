"""The race of exponentials on the host: the sampler's draw, row by row, at a fraction of the arithmetic.

A row's token is argmax(score - log E) over the candidates its filters leave. Most of them are out of the race before a
logarithm is taken: E = -log(1 - u) is at least u, so the winner's u / w is at most E / w of any one candidate, w being
exp(score - largest score). One pass of integers and one of float32 leaves a handful, and only those are raced exactly,
with the arithmetic of `draws.exponential`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protos.messages import Sampling
from workers.model.draws import MANTISSA_BITS, counters, exponential_of, mix

Floats = NDArray[np.float32]
Ids = NDArray[np.intp]

DEPTH = np.float32(40.0)  # scores further below the largest are taken for that far: no overflow, and none left out
SLACK = 1.001  # on the bound; float32 rounds the compared ratios by less than a hundredth of it
FEW = 256  # candidates that are raced exactly without being thinned out first


def draw(logits: Floats, samplings: Sequence[Sampling], keys: NDArray[np.uint64]) -> list[int]:
    """The token each row draws. logits [rows, vocab], one key per row; `samplings` have a temperature above zero."""
    steps = counters(logits.shape[1])
    scores: list[Floats] = []
    runners: list[Ids] = []
    states: list[NDArray[np.uint64]] = []
    for row, sampling, key in zip(logits, samplings, keys, strict=True):
        tempered = row / np.float32(sampling.temperature)
        ids = _runners(tempered, sampling, steps, key)
        scores.append(tempered[ids])
        states.append(steps[ids] + key)
        runners.append(ids)
    return _race(scores, runners, states)


def _runners(scores: Floats, sampling: Sampling, steps: NDArray[np.uint64], key: np.uint64) -> Ids:
    """The candidates of one row that are worth racing exactly, ascending."""
    top = scores.max()
    if not math.isfinite(top):
        return np.array([scores.argmax()])  # not a number: there is nothing to race
    if not filters(sampling):
        return _contenders(scores, top, steps + key)
    ids = survivors(scores, sampling)
    return ids if len(ids) <= FEW else ids[_contenders(scores[ids], top, steps[ids] + key)]


def filters(sampling: Sampling) -> bool:
    """Whether top-k, top-p or min-p leave anything out."""
    return bool(sampling.top_k or sampling.top_p < 1.0 or sampling.min_p)


def survivors(scores: Floats, sampling: Sampling) -> Ids:
    """The token ids that top-k, then top-p, then min-p leave, ascending and never none. scores [vocab]"""
    cut = len(scores) - sampling.top_k if sampling.top_k else 0
    ids = _largest(scores, np.partition(scores, cut)[cut], sampling.top_k) if cut > 0 else None
    kept = scores if ids is None else scores[ids]
    weights = np.exp(kept - kept.max())
    inside = _nucleus(weights, sampling.top_p) if sampling.top_p < 1.0 else np.arange(len(kept))
    if sampling.min_p:
        inside = inside[weights[inside] >= sampling.min_p]
    return inside if ids is None else ids[inside]


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """Places of the largest weights that have less than `top_p` of the mass before them, ascending.

    Those below (1 - top_p) of the mean hold less than 1 - top_p of it together, so they need not be sorted.
    """
    total = weights.sum(dtype=np.float64)
    descending = np.sort(weights[weights >= (1.0 - top_p) * total / len(weights)])[::-1]
    count = 1 + int(descending.cumsum(dtype=np.float64).searchsorted(top_p * total))
    return _largest(weights, descending[min(count, len(descending)) - 1], count)


def _largest(values: Floats, floor: np.float32, count: int) -> Ids:
    """Places of the `count` largest, of which `floor` is the last, ascending; the earlier ones of equals."""
    places = np.flatnonzero(values >= floor)
    if len(places) > count:
        places = np.sort(places[np.argsort(-values[places], kind="stable")[:count]])
    return places


def _contenders(scores: Floats, top: np.float32, states: NDArray[np.uint64]) -> Ids:
    """Places that may win the race: one or a few of many. `top` is the largest score; the states are used up."""
    bits = (mix(states) >> np.uint64(64 - MANTISSA_BITS)).view(np.int64)
    ratio = bits.astype(np.float32)
    ratio += np.float32(0.5)  # u in units of 2**-52
    depth = top - scores
    ratio *= np.exp(np.minimum(depth, DEPTH, out=depth), out=depth)
    best = int(ratio.argmin())
    uniform = (int(bits[best]) + 0.5) * 2.0**-MANTISSA_BITS
    bound = float(ratio[best]) * -math.log1p(-uniform) / uniform
    return np.flatnonzero(ratio <= bound * SLACK)


def _race(scores: Sequence[Floats], runners: Sequence[Ids], states: Sequence[NDArray[np.uint64]]) -> list[int]:
    """The winner of each row among its runners, all rows at once."""
    if all(len(ids) == 1 for ids in runners):
        return [int(ids[0]) for ids in runners]
    times = exponential_of(np.concatenate(states)).log().numpy()
    lead = np.concatenate(scores) - times
    ends = np.cumsum([len(ids) for ids in runners]).tolist()
    starts = [0, *ends[:-1]]
    return [int(ids[lead[a:b].argmax()]) for ids, a, b in zip(runners, starts, ends, strict=True)]
