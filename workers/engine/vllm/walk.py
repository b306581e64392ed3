"""Verification of chains by the sampled walk, in the place of vLLM's rejection sampler.

Each row's token is the one that the target chooses there without drafts, greedy or drawn; as long as it is the one that
was drafted, the next row counts. So speculation changes no token and needs nothing of the drafters' probabilities.
Nor are vLLM's kernels needed, of which the one that gives each row its request's temperature leaves it uninitialised
on a CPU without Triton: sampled drafts would be verified by noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

Place: TypeAlias = tuple[int, tuple[int, ...]]  # a row's request, by its place in the batch, and the drafts before it
Choose: TypeAlias = Callable[[Tensor, Sequence[Place]], list[int]]  # logits [rows, vocab]


class Walk:
    """Called as vLLM calls its rejection sampler. Keeps nothing."""

    def __init__(self, choose: Choose) -> None:
        """`choose`: the target's token after a request's own tokens and the drafts of each place."""
        self._choose = choose

    def __call__(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: Tensor | None,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """The drafts that were right and then the target's own token, for each request.

        logits [drafts + requests, vocab]: of each request, the rows after its last token and after each of its drafts.
        """
        drafts = _split(metadata.draft_token_ids.tolist(), metadata.num_draft_tokens)
        walked = self._by_depth(drafts, logits) if logits.device.type == "cpu" else self._at_once(drafts, logits)
        sampled = _padded(walked, metadata.max_spec_len + 1, logits.device)
        num_logprobs, logprobs = sampling_metadata.max_num_logprobs, None
        if num_logprobs is not None:
            logprobs = _logprobs(logits, walked, _starts(drafts), sampled, num_logprobs)
        return SamplerOutput(sampled_token_ids=sampled, logprobs_tensors=logprobs)

    def _by_depth(self, drafts: Sequence[tuple[int, ...]], logits: Tensor) -> list[list[int]]:
        """Only the rows that count: on a host, each draw costs."""
        starts, walked = _starts(drafts), [list[int]() for _ in drafts]
        going = list(range(len(drafts)))
        while going:
            rows = [starts[at] + len(walked[at]) for at in going]
            wanted = logits if len(rows) == len(logits) else logits[rows]
            chosen = self._choose(wanted, [(at, drafts[at][: len(walked[at])]) for at in going])
            for at, token_id in zip(going, chosen, strict=True):
                walked[at].append(token_id)
            going = [at for at in going if _goes_on(walked[at], drafts[at])]
        return walked

    def _at_once(self, drafts: Sequence[tuple[int, ...]], logits: Tensor) -> list[list[int]]:
        """All rows: elsewhere, each further round costs more than the rows behind a mismatch."""
        places = [(at, chain[:depth]) for at, chain in enumerate(drafts) for depth in range(len(chain) + 1)]
        chosen = self._choose(logits, places)
        walked = []
        for start, chain in zip(_starts(drafts), drafts, strict=True):
            length = 1
            while _goes_on(chosen[start : start + length], chain):
                length += 1
            walked.append(chosen[start : start + length])
        return walked


def _goes_on(walked: Sequence[int], drafted: tuple[int, ...]) -> bool:
    """Whether the last token of a walk was drafted, if those before it were."""
    return len(walked) <= len(drafted) and walked[-1] == drafted[len(walked) - 1]


def _split(token_ids: Sequence[int], counts: Sequence[int]) -> list[tuple[int, ...]]:
    """By request, its drafts."""
    drafts, at = [], 0
    for count in counts:
        drafts.append(tuple(token_ids[at : at + count]))
        at += count
    return drafts


def _starts(drafts: Sequence[tuple[int, ...]]) -> list[int]:
    """By request, its first row."""
    starts, at = [], 0
    for chain in drafts:
        starts.append(at)
        at += len(chain) + 1
    return starts


def _padded(walked: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    """As vLLM's rejection sampler has them. [requests, width] int32"""
    rows = [[*tokens, *[PLACEHOLDER_TOKEN_ID] * (width - len(tokens))] for tokens in walked]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def _logprobs(
    logits: Tensor, walked: Sequence[Sequence[int]], starts: Sequence[int], sampled: Tensor, num_logprobs: int
) -> LogprobsTensors:
    """Of the walked tokens, from unchanged logits; zeros at placeholders, which vLLM leaves out. [requests x width]"""
    rows = [start + step for start, tokens in zip(starts, walked, strict=True) for step in range(len(tokens))]
    places = (sampled.flatten() != PLACEHOLDER_TOKEN_ID).nonzero()[:, 0]
    told = Sampler.gather_logprobs(
        Sampler.compute_logprobs(logits[rows]), num_logprobs, sampled.flatten()[places].to(torch.int64)
    )
    size = sampled.numel()
    return LogprobsTensors(*[part.new_zeros(size, *part.shape[1:]).index_copy_(0, places, part) for part in told[:3]])
