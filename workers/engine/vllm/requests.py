"""A request as vLLM is asked for it, one request of vLLM's for each output, and its answers as deltas.

vLLM is told to decode greedily and knows nothing of the request's sampling: that travels beside it, to the sampler in
its worker process (sampling.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Final

from vllm import CompletionOutput, RequestOutput, SamplingParams
from vllm.inputs import TokensInput, tokens_input
from vllm.logprobs import Logprob
from vllm.sampling_params import RequestOutputKind

from protos.messages import Finish, PositionLogprobs, Request, ResumePoint, Sampling, TokenDelta

EXTRA: Final = "headwater"  # of SamplingParams.extra_args: what our code in vLLM's processes must know of an output
SALT: Final = "salt:"  # begins vLLM's cache salt, so that an event's salt can be told from its other keys
NOT_TOLD: Final = frozenset({"stop", "n", "max_tokens", "logprobs", "prompt_logprobs"})  # nothing that samples uses it


@dataclass(slots=True)
class Output:
    """One output that vLLM is making. Mutated only by VllmEngine."""

    request: Request
    index: int
    stop_token_ids: frozenset[int]
    prompt: tuple[int, ...]  # of vLLM: with what others have answered
    transfer: Mapping[str, object] | None = None  # what the connector is to do (connector.py)
    is_started: bool = False
    num_new: int = 0  # tokens made here
    num_cached: int = 0

    @classmethod
    def all_of(cls, request: Request, eos_token_ids: frozenset[int]) -> list[Output]:
        """Those of a request that have not ended."""
        stops = frozenset(request.sampling.stop_token_ids)
        stops |= frozenset() if request.sampling.ignore_eos else eos_token_ids
        points = {point.index: point for point in request.resume}
        nothing = ResumePoint(-1, ())
        return [
            cls(request, index, stops, request.token_ids + points.get(index, nothing).token_ids)
            for index in range(request.sampling.n)
            if not points.get(index, nothing).finished
        ]

    @property
    def request_id(self) -> str:
        """vLLM's."""
        return f"{self.request.request_id}/{self.index}"

    @property
    def num_given(self) -> int:
        """Tokens of the output that others have made."""
        return len(self.prompt) - len(self.request.token_ids)

    @property
    def scores_prompt(self) -> bool:
        """One output does for all: they share the prompt."""
        return self.request.sampling.prompt_logprobs is not None and self.index == 0

    def to_prompt(self) -> TokensInput:
        return tokens_input(list(self.prompt), cache_salt=SALT + self.request.cache_salt)

    def to_params(self) -> SamplingParams:
        sampling = self.request.sampling
        num_wanted = max(sampling.max_tokens - self.num_given, 1)
        return SamplingParams(
            temperature=0.0,
            max_tokens=num_wanted,
            min_tokens=min(max(sampling.min_tokens - self.num_given, 0), num_wanted),
            stop_token_ids=sorted(self.stop_token_ids),
            ignore_eos=True,  # those of the model are among the stop tokens
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs if self.scores_prompt else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=self._extra(),
        )

    def to_delta(self, answer: RequestOutput) -> TokenDelta:
        """What vLLM says next of this output."""
        made, is_first = answer.outputs[0], self.num_new == 0
        self.num_new += len(made.token_ids)
        if is_first:
            self.num_cached = max(answer.num_cached_tokens or 0, 0)
        wants_tokens = self.request.sampling.max_tokens > 0
        return TokenDelta(
            self.request.request_id,
            self.index,
            tuple(made.token_ids) if wants_tokens else (),
            logprobs=_positions(made, self.request.sampling.logprobs) if wants_tokens else (),
            finish=self._finish(made) if wants_tokens else Finish("length") if made.finish_reason else None,
            cached_tokens=min(self.num_cached, len(self.request.token_ids)) if is_first else None,
            prompt_logprobs=self._prompt_positions(answer.prompt_logprobs) if is_first else (),
        )

    def _finish(self, made: CompletionOutput) -> Finish | None:
        if made.finish_reason is None:
            return None
        last = made.token_ids[-1] if made.token_ids else None
        if made.finish_reason == "stop" and last in self.stop_token_ids:
            return Finish("stop", stop_token_id=last)
        return Finish("length" if made.finish_reason == "length" else "abort")

    def _prompt_positions(self, found: Sequence[Mapping[int, Logprob] | None] | None) -> tuple[PositionLogprobs, ...]:
        """Of the request's own prompt, from where it asks for them; the first token has none."""
        if not found or not self.scores_prompt:
            return ()
        tokens, num_top = self.request.token_ids, self.request.sampling.prompt_logprobs or 0
        first = max(1, self.request.prompt_logprobs_from)
        return tuple([_position(tokens[at], found[at] or {}, num_top) for at in range(first, len(tokens))])

    def _extra(self) -> dict[str, Any]:
        told = {
            "index": self.index,
            "num_prompt": len(self.request.token_ids),
            "salt": self.request.cache_salt,
            "speculation": self.request.speculation,
            "traceparent": self.request.traceparent,
            "stops": sorted(self.stop_token_ids),
            "sampling": _told(self.request.sampling),
        }
        return {EXTRA: told} if self.transfer is None else {EXTRA: told, "kv_transfer_params": dict(self.transfer)}


def sampling_of(extra: Mapping[str, Any]) -> Sampling:
    """How an output's tokens are chosen, from what travelled beside it. What only ends it is left out."""
    told = dict(extra["sampling"])
    told["stop_token_ids"] = tuple(told.get("stop_token_ids", ()))
    told["logit_bias"] = MappingProxyType({int(token): bias for token, bias in told.get("logit_bias", {}).items()})
    return Sampling(max_tokens=1, **told)


def _told(sampling: Sampling) -> dict[str, Any]:
    told = {field.name: getattr(sampling, field.name) for field in fields(Sampling) if field.name not in NOT_TOLD}
    told["stop_token_ids"] = list(sampling.stop_token_ids)
    told["logit_bias"] = dict(sampling.logit_bias)
    return told


def _positions(made: CompletionOutput, num_top: int | None) -> tuple[PositionLogprobs, ...]:
    if made.logprobs is None or num_top is None:
        return ()
    return tuple([_position(token, found, num_top) for token, found in zip(made.token_ids, made.logprobs, strict=True)])


def _position(token_id: int, found: Mapping[int, Logprob], num_top: int) -> PositionLogprobs:
    """The token's own, which vLLM tells beside the best, and those of the best, by rank."""
    ranked = sorted([(entry.rank or 0, token, float(entry.logprob)) for token, entry in found.items()])
    top = [(token, logprob) for rank, token, logprob in ranked if rank <= num_top]
    return PositionLogprobs(token_id, float(found[token_id].logprob), tuple(top))
