"""Every rule, by the error's kind and status, over the wire; and the defaults."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from protos import errors
from protos.messages import ModelInfo, ResumePoint
from protos.v1 import inference_pb2 as pb
from protos.v1 import inference_pb2_grpc as pb_grpc
from router.config import LimitsSection
from router.validation import Rules, check_prompt, check_received, check_token_ids, decode_text
from tests.router.conftest import Cluster

MODEL = ModelInfo("tiny", max_context=64, vocab_size=100)
RULES = Rules(LimitsSection(), "tiny")
NAN, INF = float("nan"), float("inf")


def resolve(num_prompt_tokens: int = 4, **params: Any) -> Any:
    return RULES.resolve(pb.SamplingParams(**params), num_prompt_tokens=num_prompt_tokens, model=MODEL)


@pytest.mark.parametrize(
    ("params", "fragment"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 17}, "n is 17"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": INF}, "temperature"),
        ({"top_k": 101}, "top_k is 101"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": NAN}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": NAN}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": 2.1}, "repetition_penalty"),
        ({"repetition_penalty": NAN}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"presence_penalty": -INF}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": NAN}, "frequency_penalty"),
        ({"logit_bias": {3: 101.0}}, "token 3"),
        ({"logit_bias": {3: NAN}}, "token 3"),
        ({"stop": ["a"] * 17}, "17 stop strings"),
        ({"stop": ["a", ""]}, "stop string 1 has 0"),
        ({"stop": ["a" * 257]}, "257 characters"),
        ({"stop_token_ids": [1] * 65}, "65 stop_token_ids"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens 5 is above max_tokens 4"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21"),
    ],
)
def test_parameter_out_of_range(params: dict[str, Any], fragment: str) -> None:
    with pytest.raises(errors.InvalidParameter, match=fragment):
        resolve(**params)


def test_too_many_biases() -> None:
    model = ModelInfo("tiny", 64, 1000)
    params = pb.SamplingParams(logit_bias=dict.fromkeys(range(301), 0.0))
    with pytest.raises(errors.InvalidParameter, match="301 logit_bias"):
        RULES.resolve(params, num_prompt_tokens=1, model=model)


@pytest.mark.parametrize("params", [{"stop_token_ids": [100]}, {"logit_bias": {100: 0.0}}])
def test_parameter_with_unknown_token(params: dict[str, Any]) -> None:
    with pytest.raises(errors.TokenOutOfRange, match="token id 100"):
        resolve(**params)


def test_too_large_max_tokens_names_everything() -> None:
    with pytest.raises(errors.PromptTooLong, match=r"prompt of 4 tokens and max_tokens 61 .* 64 tokens; .* at most 60"):
        resolve(max_tokens=61)


def test_full_prompt_leaves_no_room_unless_nothing_is_generated() -> None:
    with pytest.raises(errors.PromptTooLong, match="leaves no room"):
        resolve(64)
    assert resolve(64, max_tokens=0, prompt_logprobs=0).max_tokens == 0


def test_defaults() -> None:
    sampling = resolve()
    assert (sampling.n, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1, 1.0, 0, 1.0, 0.0)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (sampling.logprobs, sampling.prompt_logprobs, sampling.ignore_eos) == (None, None, False)
    assert sampling.max_tokens == 60
    long_model = ModelInfo("tiny", 1000, 100)
    assert RULES.resolve(pb.SamplingParams(), num_prompt_tokens=4, model=long_model).max_tokens == 256


def test_given_zeros_are_kept() -> None:
    sampling = resolve(temperature=0.0, seed=0, logprobs=0)
    assert (sampling.temperature, sampling.seed, sampling.logprobs) == (0.0, 0, 0)
    assert resolve(seed=2**64 - 1).seed == 2**64 - 1


def test_prompts() -> None:
    check_prompt("the prompt", [99] * 64, MODEL)
    with pytest.raises(errors.EmptyPrompt):
        check_prompt("the prompt", [], MODEL)
    with pytest.raises(errors.PromptTooLong, match="65 tokens"):
        check_prompt("the prompt", [1] * 65, MODEL)
    with pytest.raises(errors.TokenOutOfRange, match="position 2"):
        check_token_ids("the prompt", [1, 2, 100], 100)
    with pytest.raises(errors.InvalidText, match="byte 1"):
        decode_text("prompt", b"a\xff")


RECEIVED = [pb.ReceivedOutput(index=2, token_ids=[7, 8]), pb.ReceivedOutput(index=0, finished=True)]


def test_received_outputs_become_resume_points() -> None:
    sampling = resolve(n=3, max_tokens=2, seed=0)
    points = check_received(RECEIVED, sampling, has_seed=True, model=MODEL)
    assert points == (ResumePoint(2, (7, 8)), ResumePoint(0, (), finished=True))
    assert check_received([], sampling, has_seed=False, model=MODEL) == ()


@pytest.mark.parametrize(
    ("received", "params", "kind", "fragment"),
    [
        (RECEIVED, {}, errors.InvalidParameter, "set sampling.seed"),
        ([pb.ReceivedOutput(index=3)], {"seed": 1}, errors.InvalidParameter, "output 3, the last is 2"),
        ([pb.ReceivedOutput(index=1)] * 2, {"seed": 1}, errors.InvalidParameter, "output 1 more than once"),
        ([pb.ReceivedOutput(token_ids=[5, 100])], {"seed": 1}, errors.TokenOutOfRange, "token id 100 at position 1"),
        ([pb.ReceivedOutput(token_ids=[5] * 5)], {"seed": 1}, errors.InvalidParameter, "5 tokens of output 0"),
        ([pb.ReceivedOutput(index=i, finished=True) for i in range(3)], {"seed": 1}, errors.InvalidParameter, "all 3"),
    ],
)
async def test_received_that_cannot_be_resumed(
    stub: pb_grpc.InferenceAsyncStub,
    cluster: Cluster,
    received: list[pb.ReceivedOutput],
    params: dict[str, Any],
    kind: type[errors.HeadwaterError],
    fragment: str,
) -> None:
    sampling = pb.SamplingParams(n=3, max_tokens=4, **params)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await send(stub, pb.GenerateRequest(tokens=TOKENS, sampling=sampling, received=received))
    error = errors.from_rpc_error(raised.value)
    assert type(error) is kind
    assert fragment in error.message
    assert ";" in error.message  # value and limit; remedy
    assert not cluster.workers["w0"].submitted


@pytest.fixture
async def stub(cluster: Cluster) -> AsyncIterator[pb_grpc.InferenceAsyncStub]:
    async with grpc.aio.insecure_channel(cluster.address.grpc) as channel:
        yield pb_grpc.InferenceStub(channel)


TOKENS = pb.TokenIds(ids=[5])
TEXT = pb.Continuation(text=b"w5")


async def send(stub: pb_grpc.InferenceAsyncStub, request: Any) -> None:
    match request:
        case pb.GenerateRequest():
            await stub.Generate(request).read()
        case pb.ScoreRequest():
            await stub.Score(request)
        case pb.TokenizeRequest():
            await stub.Tokenize(request)
        case pb.DetokenizeRequest():
            await stub.Detokenize(request)


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (pb.GenerateRequest(), errors.EmptyPrompt),
        (pb.GenerateRequest(text=b""), errors.EmptyPrompt),
        (pb.GenerateRequest(tokens=pb.TokenIds()), errors.EmptyPrompt),
        (pb.GenerateRequest(text=b"\xff"), errors.InvalidText),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[100])), errors.TokenOutOfRange),
        (pb.GenerateRequest(tokens=pb.TokenIds(ids=[5] * 65)), errors.PromptTooLong),
        (pb.GenerateRequest(tokens=TOKENS, model="other"), errors.UnknownModel),
        (pb.GenerateRequest(tokens=TOKENS, request_id="x" * 129), errors.InvalidParameter),
        (pb.GenerateRequest(tokens=TOKENS, sampling=pb.SamplingParams(n=0)), errors.InvalidParameter),
        (pb.ScoreRequest(text=b"w5"), errors.InvalidParameter),
        (pb.ScoreRequest(text=b"w5", continuations=[TEXT] * 5), errors.InvalidParameter),
        (pb.ScoreRequest(text=b"w5", continuations=[pb.Continuation()]), errors.EmptyPrompt),
        (pb.ScoreRequest(text=b"w5", continuations=[pb.Continuation(tokens=TOKENS)]), errors.InvalidParameter),
        (pb.ScoreRequest(tokens=TOKENS, continuations=[TEXT]), errors.InvalidParameter),
        (pb.ScoreRequest(continuations=[pb.Continuation(tokens=TOKENS)]), errors.EmptyPrompt),
        (pb.ScoreRequest(text=b"w5 " * 63, continuations=[TEXT]), errors.PromptTooLong),
        (pb.TokenizeRequest(text=b"\xff"), errors.InvalidText),
        (pb.TokenizeRequest(text=b"w5", model="other"), errors.UnknownModel),
        (pb.DetokenizeRequest(ids=[1000]), errors.TokenOutOfRange),
    ],
)
async def test_status_and_trailer(
    stub: pb_grpc.InferenceAsyncStub, cluster: Cluster, request_: Any, kind: type[errors.HeadwaterError]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await send(stub, request_)
    error = errors.from_rpc_error(raised.value)
    assert type(error) is kind, error
    assert raised.value.code() == kind.status
    assert ";" in error.message  # value and limit; remedy
    assert not cluster.workers["w0"].submitted


async def test_the_last_member_of_the_oneof_counts_on_the_wire(
    stub: pb_grpc.InferenceAsyncStub, cluster: Cluster
) -> None:
    wire = pb.GenerateRequest(text=b"w5").SerializeToString() + pb.GenerateRequest(tokens=TOKENS).SerializeToString()
    async for _ in stub.Generate(pb.GenerateRequest.FromString(wire)):
        pass
    assert cluster.workers["w0"].submitted[0].token_ids == (5,)
