"""From logits to tokens: penalties, filters, and one draw per row that depends on nothing but the row.

A token is chosen as argmax(log p - log E) with one exponential draw E per candidate (the Gumbel-max trick), which
samples p exactly and lets a drafter that knows the seed make the same draws. Greedy rows are one argmax over the batch;
on a CPU the draws of the others are made by `race`, elsewhere in one batch where the logits are: the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protos.messages import PositionLogprobs, Sampling
from workers.model import race
from workers.model.draws import draw_keys, exponential
from workers.model.greedy import GREEDY_TEMPERATURE, weighs


@dataclass(frozen=True, slots=True)
class Row:
    """What the sampler must know of one row of logits."""

    sampling: Sampling
    index: int  # of the output
    tokens: Sequence[int]  # prompt, then output
    num_prompt: int
    banned_ids: tuple[int, ...] = ()  # may not be chosen yet (min_tokens)

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature <= GREEDY_TEMPERATURE

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt


@torch.inference_mode()
def sample(logits: Tensor, rows: Sequence[Row | None]) -> list[int]:
    """One token id per row; None: its sampling is plain. logits [rows, vocab] float32, left as it is."""
    picky = [i for i, row in enumerate(rows) if row is not None]
    chosen = largest(logits) if len(picky) < len(rows) else [0] * len(rows)
    if picky:
        asked = [row for row in rows if row is not None]
        shaped = _shape(logits if len(picky) == len(rows) else logits[picky], asked)
        for i, token_id in zip(picky, _choose(shaped, asked), strict=True):
            chosen[i] = token_id
    return chosen


@torch.inference_mode()
def probabilities(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """What each row's token is drawn from, after penalties, bias, bans, temperature and filters.

    All of it lies on one token if the row is greedy or its largest logit is not finite. [rows, vocab], float64
    """
    shaped = _shape(logits, rows)
    scores = shaped / _column([1.0 if row.is_greedy else row.sampling.temperature for row in rows], shaped)
    probs = _kept(scores, [row.sampling for row in rows]).double().softmax(dim=-1)
    is_certain = ~scores.amax(dim=-1).isfinite()
    is_certain |= torch.tensor([row.is_greedy for row in rows], device=scores.device)
    one_hot = torch.zeros_like(probs).scatter_(1, scores.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where(is_certain[:, None], one_hot, probs)


@torch.inference_mode()
def position_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[PositionLogprobs]:
    """Log-probabilities of the given tokens and of the most probable ones, from unchanged logits. [rows, vocab]"""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = logprobs.topk(max(num_top), dim=-1) if max(num_top) else (logprobs[:, :0], logprobs[:, :0])
    tops = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return [
        PositionLogprobs(token_id, logprob, tuple((int(i), float(v)) for i, v in top[:count]))
        for token_id, logprob, top, count in zip(token_ids, own, tops, num_top, strict=True)
    ]


def _choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """One token id per row of shaped logits."""
    drawn = [i for i, row in enumerate(rows) if not row.is_greedy]
    if len(drawn) == len(rows):
        return _draw(logits, rows)
    chosen = largest(logits)
    if drawn:
        for i, token_id in zip(drawn, _draw(logits[drawn], [rows[i] for i in drawn]), strict=True):
            chosen[i] = token_id
    return chosen


def largest(logits: Tensor) -> list[int]:
    """Greedy token ids. [rows, vocab]"""
    on_host = logits.device.type == "cpu"
    chosen: list[int] = (logits.numpy().argmax(axis=-1) if on_host else logits.argmax(dim=-1)).tolist()
    return chosen


def _shape(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits after penalties, bias and bans; the input itself if no row has any."""
    touched = [i for i, row in enumerate(rows) if row.banned_ids or weighs(row.sampling)]
    if not touched:
        return logits
    shaped = logits.clone()
    for i in touched:
        _penalize(shaped[i], rows[i])
    return shaped


def _penalize(logits: Tensor, row: Row) -> None:
    """Apply one row's penalties, bias and bans in place. [vocab]"""
    sampling, size = row.sampling, logits.shape[0]
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(row.tokens)), device=logits.device)
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if row.num_output and (sampling.presence_penalty or sampling.frequency_penalty):
        counts = torch.bincount(torch.tensor(row.tokens[row.num_prompt :], device=logits.device), minlength=size)
        logits -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=logits.dtype, device=logits.device)
    if row.banned_ids:
        logits[list(row.banned_ids)] = -torch.inf


def _draw(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Sampled token ids of rows that are not greedy, by shaped logits. [rows, vocab]"""
    samplings = [row.sampling for row in rows]
    seeds, indexes = [s.seed for s in samplings], [row.index for row in rows]
    keys = draw_keys(seeds, indexes, [row.num_output for row in rows])
    if logits.device.type == "cpu":
        return race.draw(logits.numpy(), samplings, keys)
    return draw_batch(logits, samplings, keys.tolist())


def draw_batch(logits: Tensor, samplings: Sequence[Sampling], keys: Sequence[int]) -> list[int]:
    """The token each row draws, by batched operations on the logits' device. [rows, vocab]"""
    scores = _filter(logits / _column([sampling.temperature for sampling in samplings], logits), samplings)
    times = exponential(keys, logits.shape[1], logits.device)
    chosen: list[int] = (scores - times.log()).argmax(dim=-1).tolist()
    return chosen


def _kept(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Scores with what the filters leave out at minus infinity, as the draws on that device see it. [rows, vocab]"""
    if scores.device.type != "cpu":
        return _filter(scores, samplings)
    kept = scores.clone()
    for row, sampling in zip(kept.numpy(), samplings, strict=True):
        if race.filters(sampling) and math.isfinite(row.max()):
            ids = race.survivors(row, sampling)
            survivors = row[ids]
            row.fill(-np.inf)
            row[ids] = survivors
    return kept


def _filter(scores: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Scores with everything outside top-k, then top-p, then min-p at minus infinity. [rows, vocab]"""
    if not any(race.filters(sampling) for sampling in samplings):
        return scores
    vocab_size = scores.shape[1]
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab_size, device=scores.device)
    ordered = ordered.masked_fill(rank >= _column([s.top_k or vocab_size for s in samplings], rank), -torch.inf)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    top_p = [s.top_p if s.top_p < 1.0 else torch.inf for s in samplings]
    cut = (before >= _column(top_p, scores)) & (rank > 0)
    cut |= probs < _column([s.min_p for s in samplings], scores) * probs[:, :1]
    return torch.empty_like(scores).scatter_(1, order, ordered.masked_fill(cut, -torch.inf))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
