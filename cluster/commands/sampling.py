"""The flags of SamplingParams, one per field of the message. Absent means the router's default."""

from __future__ import annotations

from typing import Annotated

import typer

_option = typer.Option

N = Annotated[int | None, _option("--n", min=1, help="Outputs for this prompt. Default 1.")]
Temperature = Annotated[float | None, _option(min=0, help="0 is greedy. Default 1.")]
TopK = Annotated[int | None, _option(min=0, help="Keep the k most probable tokens; 0 keeps all. Default 0.")]
TopP = Annotated[
    float | None, _option(max=1, help="Keep the smallest set of tokens that holds this mass, in (0, 1]. Default 1.")
]
MinP = Annotated[
    float | None,
    _option(min=0, max=1, help="Keep tokens at least this share of the most probable one's probability. Default 0."),
]
RepetitionPenalty = Annotated[
    float | None, _option(max=2, help="Divide the logits of tokens in prompt and output by this, in (0, 2]. Default 1.")
]
PresencePenalty = Annotated[
    float | None, _option(min=-2, max=2, help="Subtract from the logits of tokens in the output. Default 0.")
]
FrequencyPenalty = Annotated[
    float | None, _option(min=-2, max=2, help="Subtract per occurrence in the output. Default 0.")
]
LogitBias = Annotated[
    list[str] | None, _option(metavar="ID=BIAS", help="Add to one token's logit, in [-100, 100]; repeatable.")
]
Stop = Annotated[list[str] | None, _option(metavar="TEXT", help="Stop before this text; repeatable.")]
StopTokenId = Annotated[list[int] | None, _option(min=0, metavar="ID", help="Stop at this token; repeatable.")]
MaxTokens = Annotated[
    int | None, _option(min=1, help="At most this many new tokens per output. Default 256, or what the context leaves.")
]
MinTokens = Annotated[int | None, _option(min=0, help="No stop before this many new tokens. Default 0.")]
IgnoreEos = Annotated[bool | None, _option("--ignore-eos", help="Go on past the end of text.")]
Seed = Annotated[
    int | None, _option(min=0, max=2**64 - 1, help="The same seed gives the same text. Default: chosen and reported.")
]
Logprobs = Annotated[
    int | None, _option(min=0, help="Report this many alternatives per token; seen with --json. Default none.")
]
PromptLogprobs = Annotated[int | None, _option(min=0, help="The same for the prompt's tokens. Default none.")]
