"""What a request may ask for: proto fields to complete, checked values, or a typed error at once.

Stands between ingress and admission. Every message gives the value, the limit and the remedy.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from protos.errors import EmptyPrompt, InvalidParameter, InvalidText, PromptTooLong, TokenOutOfRange, UnknownModel
from protos.messages import ModelInfo, ResumePoint, Sampling
from protos.v1 import inference_pb2 as pb
from router.config import LimitsSection

DEFAULT_MAX_TOKENS = 256
SEED_BITS = 63  # chosen seeds also fit a signed 64-bit integer


@dataclass(frozen=True, slots=True)
class Rules:
    """The limits that hold for requests to one served model."""

    limits: LimitsSection
    model_name: str

    def check_model(self, name: str) -> None:
        """Raises UnknownModel unless the name is empty or the served model's."""
        if name not in ("", self.model_name):
            raise UnknownModel(f"model {name!r} is not served here; ask for {self.model_name!r} or leave model empty")

    def check_request_id(self, request_id: str) -> None:
        """Raises InvalidParameter if the id is too long."""
        limit = self.limits.max_request_id_chars
        if len(request_id) > limit:
            raise InvalidParameter(
                f"request_id has {len(request_id)} characters, the limit is {limit}; choose a shorter id"
            )

    def check_num_continuations(self, num_continuations: int) -> None:
        """Raises InvalidParameter unless there is at least one continuation and not too many."""
        limit = self.limits.max_continuations
        if not 1 <= num_continuations <= limit:
            raise InvalidParameter(
                f"{num_continuations} continuations were given, the limits are 1 and {limit}; split the call"
            )

    def check_score_tokens(self, num_tokens: int) -> None:
        """Raises InvalidParameter if contexts and continuations together are too many tokens."""
        limit = self.limits.max_score_tokens
        if num_tokens > limit:
            raise InvalidParameter(
                f"context and continuation over all continuations are {num_tokens} tokens, the limit is {limit}; "
                "give fewer continuations per call"
            )

    def resolve(self, params: pb.SamplingParams, *, num_prompt_tokens: int, model: ModelInfo) -> Sampling:
        """Sampling with every default filled in. Raises InvalidParameter, TokenOutOfRange or PromptTooLong."""
        sampling = Sampling(
            seed=params.seed if params.HasField("seed") else secrets.randbits(SEED_BITS),
            max_tokens=_max_tokens(params, num_prompt_tokens, model),
            n=params.n if params.HasField("n") else 1,
            temperature=params.temperature if params.HasField("temperature") else 1.0,
            top_k=params.top_k,
            top_p=params.top_p if params.HasField("top_p") else 1.0,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=MappingProxyType(dict(params.logit_bias)),
            stop=tuple(params.stop),
            stop_token_ids=tuple(params.stop_token_ids),
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
            logprobs=params.logprobs if params.HasField("logprobs") else None,
            prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
        )
        self._check_ranges(sampling, model)
        self._check_lengths(sampling)
        self._check_stops(sampling, model)
        self._check_logit_bias(sampling, model)
        return sampling

    def _check_ranges(self, sampling: Sampling, model: ModelInfo) -> None:
        limits = self.limits
        _between("n", sampling.n, 1, limits.max_n)
        if not 0 <= sampling.temperature < float("inf"):
            raise InvalidParameter(f"temperature is {sampling.temperature}; give a finite number from 0 (greedy) up")
        _between("top_k", sampling.top_k, 0, model.vocab_size, note=" (0 keeps all)")
        _between("top_p", sampling.top_p, 0, 1, above_low=True)
        _between("min_p", sampling.min_p, 0, 1)
        _between("repetition_penalty", sampling.repetition_penalty, 0, 2, above_low=True)
        _between("presence_penalty", sampling.presence_penalty, -2, 2)
        _between("frequency_penalty", sampling.frequency_penalty, -2, 2)
        _between("logprobs", sampling.logprobs or 0, 0, limits.max_logprobs)
        _between("prompt_logprobs", sampling.prompt_logprobs or 0, 0, limits.max_logprobs)

    def _check_lengths(self, sampling: Sampling) -> None:
        if sampling.max_tokens == 0 and sampling.prompt_logprobs is None:
            raise InvalidParameter(
                "max_tokens is 0 and nothing else is asked for; give at least 1, or set prompt_logprobs"
            )
        if sampling.min_tokens > sampling.max_tokens:
            raise InvalidParameter(
                f"min_tokens {sampling.min_tokens} is above max_tokens {sampling.max_tokens}; lower it"
            )

    def _check_stops(self, sampling: Sampling, model: ModelInfo) -> None:
        limits = self.limits
        _at_most("stop strings", len(sampling.stop), limits.max_stop_strings)
        _at_most("stop_token_ids", len(sampling.stop_token_ids), limits.max_stop_token_ids)
        for position, stop in enumerate(sampling.stop):
            if not 1 <= len(stop) <= limits.max_stop_chars:
                raise InvalidParameter(
                    f"stop string {position} has {len(stop)} characters; give 1 to {limits.max_stop_chars}"
                )
        check_token_ids("stop_token_ids", sampling.stop_token_ids, model.vocab_size)

    def _check_logit_bias(self, sampling: Sampling, model: ModelInfo) -> None:
        _at_most("logit_bias entries", len(sampling.logit_bias), self.limits.max_logit_bias)
        check_token_ids("logit_bias", tuple(sampling.logit_bias), model.vocab_size)
        for token_id, bias in sampling.logit_bias.items():
            _between(f"logit_bias of token {token_id}", bias, -100, 100)


def decode_text(name: str, text: bytes) -> str:
    """Bytes as text. Raises InvalidText if they are not UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InvalidText(
            f"{name} is not UTF-8: {error.reason} at byte {error.start}; encode the text as UTF-8"
        ) from None


def check_token_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises TokenOutOfRange if an id is not in the vocabulary."""
    if token_ids and max(token_ids) >= vocab_size:
        position, worst = next((i, token_id) for i, token_id in enumerate(token_ids) if token_id >= vocab_size)
        raise TokenOutOfRange(
            f"{name} has token id {worst} at position {position}, the vocabulary ends at {vocab_size - 1}; "
            "tokenize with this model's tokenizer"
        )


def check_prompt(name: str, token_ids: Sequence[int], model: ModelInfo) -> None:
    """Raises EmptyPrompt, TokenOutOfRange or PromptTooLong."""
    if not token_ids:
        raise EmptyPrompt(f"{name} has no tokens; give at least one character of text or one token id")
    if len(token_ids) > model.max_context:
        raise PromptTooLong(
            f"{name} has {len(token_ids)} tokens, the context of {model.name} is {model.max_context} tokens; shorten it"
        )
    check_token_ids(name, token_ids, model.vocab_size)


def check_received(
    received: Sequence[pb.ReceivedOutput], sampling: Sampling, *, has_seed: bool, model: ModelInfo
) -> tuple[ResumePoint, ...]:
    """Where the outputs stand that a client has in part. Raises InvalidParameter or TokenOutOfRange."""
    if received and not has_seed:
        raise InvalidParameter(
            "received is given without a seed; set sampling.seed to the one that the earlier call reported first"
        )
    indexes = [output.index for output in received]
    for index in indexes:
        if index >= sampling.n:
            raise InvalidParameter(f"received has output {index}, the last is {sampling.n - 1}; give indexes below n")
        if indexes.count(index) > 1:
            raise InvalidParameter(f"received has output {index} more than once; give each output's tokens together")
    if sum(output.finished for output in received) == sampling.n:
        raise InvalidParameter(
            f"received has the finish of all {sampling.n} outputs; the answer is complete without a call"
        )
    return tuple(_resume_point(output, sampling, model) for output in received)


def _resume_point(output: pb.ReceivedOutput, sampling: Sampling, model: ModelInfo) -> ResumePoint:
    if len(output.token_ids) > sampling.max_tokens:
        raise InvalidParameter(
            f"received has {len(output.token_ids)} tokens of output {output.index}, max_tokens is "
            f"{sampling.max_tokens}; give the parameters of the call that sent them"
        )
    check_token_ids(f"received of output {output.index}", output.token_ids, model.vocab_size)
    return ResumePoint(output.index, tuple(output.token_ids), finished=output.finished)


def _max_tokens(params: pb.SamplingParams, num_prompt_tokens: int, model: ModelInfo) -> int:
    room = model.max_context - num_prompt_tokens
    if not params.HasField("max_tokens"):
        if room < 1:
            raise PromptTooLong(
                f"the prompt of {num_prompt_tokens} tokens leaves no room for output in the context of "
                f"{model.max_context} tokens; shorten the prompt"
            )
        return min(DEFAULT_MAX_TOKENS, room)
    if params.max_tokens > room:
        raise PromptTooLong(
            f"the prompt of {num_prompt_tokens} tokens and max_tokens {params.max_tokens} exceed the context of "
            f"{model.max_context} tokens; shorten the prompt or set max_tokens to at most {room}"
        )
    return params.max_tokens


def _between(name: str, value: float, low: float, high: float, *, above_low: bool = False, note: str = "") -> None:
    """NaN fails every comparison, so it is refused too."""
    if not (low <= value <= high) or (above_low and value == low):
        bracket = "(" if above_low else "["
        raise InvalidParameter(f"{name} is {value}; give a value in {bracket}{low}, {high}]{note}")


def _at_most(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidParameter(f"{count} {name} were given, the limit is {limit}; give fewer")
