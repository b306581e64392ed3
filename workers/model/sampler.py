"""From logits to tokens: penalties, filters, and one draw per row that depends on nothing but the row.

A token is chosen as argmax(log p - log E) with one exponential draw E per candidate (the Gumbel-max trick), which
samples p exactly and lets a drafter that knows the seed make the same draws. All rows are sampled in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from protos.messages import PositionLogprobs, Sampling
from workers.model.draws import draw_key, exponential

GREEDY_TEMPERATURE = 1e-5  # at or below it, dividing logits would overflow


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


def sample(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """One token id per row. logits [rows, vocab] float32, left as it is."""
    shaped = _shape(logits, rows)
    chosen = shaped.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not row.is_greedy]
    if drawn:
        scores = shaped if len(drawn) == len(rows) else shaped[drawn]
        chosen[drawn] = _draw(scores, [rows[i] for i in drawn])
    return [int(token) for token in chosen.tolist()]


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


def _shape(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits after penalties, bias and bans; the input itself if no row has any."""
    touched = [i for i, row in enumerate(rows) if _reshapes(row)]
    if not touched:
        return logits
    shaped = logits.clone()
    for i in touched:
        _penalize(shaped[i], rows[i])
    return shaped


def _reshapes(row: Row) -> bool:
    s = row.sampling
    neutral = s.repetition_penalty == 1.0 and s.presence_penalty == 0.0 and s.frequency_penalty == 0.0
    return bool(row.banned_ids or s.logit_bias) or not neutral


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


def _draw(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Sampled token ids of rows that are not greedy. [rows]"""
    scores = logits / _column([row.sampling.temperature for row in rows], logits)
    scores = _filter(scores, rows)
    keys = [draw_key(row.sampling.seed, row.index, row.num_output) for row in rows]
    race = exponential(keys, logits.shape[1], logits.device)
    return (scores - race.log()).argmax(dim=-1)


def _filter(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """Scores with everything outside top-k, then top-p, then min-p at minus infinity. [rows, vocab]"""
    if not any(row.sampling.top_k or row.sampling.top_p < 1.0 or row.sampling.min_p for row in rows):
        return scores
    vocab_size = scores.shape[1]
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab_size, device=scores.device)
    ordered = ordered.masked_fill(rank >= _column([row.sampling.top_k or vocab_size for row in rows], rank), -torch.inf)
    probs = ordered.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs
    cut = (before >= _column([row.sampling.top_p for row in rows], scores)) & (rank > 0)
    cut |= probs < _column([row.sampling.min_p for row in rows], scores) * probs[:, :1]
    return torch.empty_like(scores).scatter_(1, order, ordered.masked_fill(cut, -torch.inf))


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
