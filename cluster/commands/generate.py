"""`headwater generate`: one prompt, its continuation printed as it is made."""

from __future__ import annotations

import sys
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands import sampling as flags
from cluster.commands.call import (
    DEFAULT_TARGET,
    Access,
    ApiKeyFile,
    Json,
    Model,
    Target,
    Timeout,
    TlsCa,
    TlsCert,
    TlsKey,
    call,
    prompt_tokens,
    read_prompt,
)
from cluster.commands.printer import JsonPrinter, Printer, TerminalPrinter, TextPrinter
from protos.messages import Speculation

if TYPE_CHECKING:
    from protos.client import Client


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from the standard input.")],
    n: flags.N = None,
    temperature: flags.Temperature = None,
    top_k: flags.TopK = None,
    top_p: flags.TopP = None,
    min_p: flags.MinP = None,
    repetition_penalty: flags.RepetitionPenalty = None,
    presence_penalty: flags.PresencePenalty = None,
    frequency_penalty: flags.FrequencyPenalty = None,
    logit_bias: flags.LogitBias = None,
    stop: flags.Stop = None,
    stop_token_id: flags.StopTokenId = None,
    max_tokens: flags.MaxTokens = None,
    min_tokens: flags.MinTokens = None,
    ignore_eos: flags.IgnoreEos = None,
    seed: flags.Seed = None,
    logprobs: flags.Logprobs = None,
    prompt_logprobs: flags.PromptLogprobs = None,
    speculation: Annotated[
        Speculation, typer.Option(help="Whether tokens are drafted ahead: where it pays, or never.")
    ] = "auto",
    token_ids: Annotated[bool, typer.Option("--token-ids", help="PROMPT is token ids, such as 1,2,3.")] = False,
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key_file: ApiKeyFile = None,
    model: Model = "",
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Continue a prompt, streaming the text."""
    sampling = _given(
        n=n,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=dict(map(_bias, logit_bias or [])),
        stop=stop,
        stop_token_ids=stop_token_id,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
        seed=seed,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    text = read_prompt(prompt)
    content = prompt_tokens(text) if token_ids else text
    printer = _printer(text, num_outputs=n or 1, as_json=json)
    access = Access(target, tls_ca, tls_cert, tls_key, api_key_file)
    call(access, lambda client: _stream(client, content, model, speculation, sampling, printer), timeout_s=timeout)


async def _stream(
    client: Client,
    prompt: bytes | list[int],
    model: str,
    speculation: Speculation,
    sampling: dict[str, Any],
    printer: Printer,
) -> None:
    async with aclosing(client.generate(prompt, model=model, speculation=speculation, **sampling)) as events:
        async for event in events:
            printer.show(event)
    printer.end()


def _given(**sampling: Any) -> dict[str, Any]:
    """The options that were given; the router knows the defaults of the others."""
    return {name: value for name, value in sampling.items() if value is not None and value != {} and value != []}


def _printer(prompt: bytes, *, num_outputs: int, as_json: bool) -> Printer:
    if as_json:
        return JsonPrinter()
    if sys.stdout.isatty():
        return TerminalPrinter(prompt=prompt.decode("utf-8", "replace"), num_outputs=num_outputs)
    return TextPrinter(num_outputs=num_outputs)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not ID=BIAS, such as 42=-1.5", param_hint="--logit-bias") from None
