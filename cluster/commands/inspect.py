"""`headwater score`, `tokenize` and `models`: one question, one answer."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

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
    read_prompt,
)
from cluster.commands.printer import print_json

if TYPE_CHECKING:
    from protos.client import Client


def score(
    context: Annotated[str, typer.Argument(help="The text before; - reads it from the standard input.")],
    continuations: Annotated[list[str], typer.Argument(help="What could follow it, each as one argument.")],
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key_file: ApiKeyFile = None,
    model: Model = "",
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Log-probabilities of continuations of one context, the most probable first."""

    async def ask(client: Client) -> None:
        answer = await client.score(read_prompt(context), continuations, model=model)
        ranked = sorted(zip(continuations, answer.scores, strict=True), key=lambda pair: -pair[1].logprob)
        for text, result in ranked:
            if json:
                print_json({"text": text, **dataclasses.asdict(result)})
            else:
                print(f"{result.logprob:10.4f}  {text}")

    call(Access(target, tls_ca, tls_cert, tls_key, api_key_file), ask, timeout_s=timeout)


def tokenize(
    text: Annotated[str, typer.Argument(help="The text; - reads it from the standard input.")],
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key_file: ApiKeyFile = None,
    model: Model = "",
    timeout: Timeout = None,
) -> None:
    """The token ids of a text, as a prompt is tokenized."""

    async def ask(client: Client) -> None:
        print(*await client.tokenize(read_prompt(text), model=model))

    call(Access(target, tls_ca, tls_cert, tls_key, api_key_file), ask, timeout_s=timeout)


def models(
    target: Target = DEFAULT_TARGET,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key_file: ApiKeyFile = None,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """The models a cluster serves, and their limits."""

    async def ask(client: Client) -> None:
        for model in await client.models():
            if json:
                print_json(dataclasses.asdict(model))
            else:
                print(f"{model.name}: {model.num_workers} workers, context {model.max_context} tokens")

    call(Access(target, tls_ca, tls_cert, tls_key, api_key_file), ask, timeout_s=timeout)
