"""The sampler in vLLM's worker process: every token by a draw that is keyed by request, output and position.

It takes the place of vLLM's own sampler, which draws from a running generator: so a token does not depend on who runs
beside it, on preemption, on drafts or on the worker, as in the torch engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from protos.messages import Sampling
from workers.engine.vllm.requests import EXTRA, sampling_of
from workers.model.greedy import is_plain
from workers.model.sampler import Row, sample

RowOf = tuple[int, tuple[int, ...]]  # a request's place in the batch, and the drafts before the row


@dataclass(frozen=True, slots=True)
class _Known:
    """What is worked out of an output's settings once."""

    sampling: Sampling
    index: int
    num_prompt: int
    banned_ids: tuple[int, ...]  # before min_tokens
    is_plain: bool

    @classmethod
    def of(cls, extra: dict[str, Any]) -> _Known:
        sampling = sampling_of(extra)
        return cls(sampling, extra["index"], extra["num_prompt"], tuple(extra["stops"]), is_plain(sampling))


class _Tokens(Sequence[int]):
    """Lists one after another, not copied: they are read only where penalties want them."""

    def __init__(self, *parts: Sequence[int]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum([len(part) for part in self._parts])

    def __iter__(self) -> Iterator[int]:
        return chain(*self._parts)

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> list[int]: ...
    def __getitem__(self, at: int | slice) -> int | list[int]:
        return list(self)[at]


class KeyedSampler(Sampler):  # type: ignore[misc]  # untyped
    """vLLM's sampler, with our draws. Mutated only by the model runner that it serves."""

    def __init__(self, runner: Any) -> None:
        super().__init__(logprobs_mode=runner.sampler.logprobs_mode)
        self._runner = runner
        self._known: dict[str, _Known] = {}  # by request of vLLM's, those of the batch

    def forward(
        self,
        logits: Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override: str | None = None,
    ) -> SamplerOutput:
        """One token for each request of the batch. logits [requests, vocab]"""
        token_ids = torch.tensor(self.choose(logits, [(at, ()) for at in range(len(logits))]), device=logits.device)
        num_logprobs, logprobs = sampling_metadata.max_num_logprobs, None
        if num_logprobs is not None:
            logprobs = self.gather_logprobs(self.compute_logprobs(logits), num_logprobs, token_ids=token_ids)
        return SamplerOutput(sampled_token_ids=token_ids.to(torch.int32).unsqueeze(-1), logprobs_tensors=logprobs)

    def choose(self, logits: Tensor, rows: Sequence[RowOf]) -> list[int]:
        """The token of each row. logits [rows, vocab]"""
        return sample(logits.float(), self._rows(rows))

    def _rows(self, rows: Sequence[RowOf]) -> list[Row | None]:
        request_ids = self._runner.input_batch.req_ids
        self._known = {request_id: self._look_up(request_id) for request_id in request_ids}
        return [self._row(request_ids[at], drafts) if at < len(request_ids) else None for at, drafts in rows]

    def _look_up(self, request_id: str) -> _Known:
        if (known := self._known.get(request_id)) is not None:
            return known
        return _Known.of(self._runner.requests[request_id].sampling_params.extra_args[EXTRA])

    def _row(self, request_id: str, drafts: tuple[int, ...]) -> Row | None:
        known = self._known[request_id]
        if known.is_plain:
            return None
        state = self._runner.requests[request_id]
        tokens = _Tokens(state.prompt_token_ids, state.output_token_ids, drafts)
        too_early = len(tokens) - known.num_prompt < known.sampling.min_tokens
        return Row(known.sampling, known.index, tokens, known.num_prompt, known.banned_ids if too_early else ())
