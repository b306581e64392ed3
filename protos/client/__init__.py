"""A typed asyncio client of `headwater.v1.Inference` and `headwater.v1.Cluster` that outlives the routers it talks to.

Imports gRPC and the protos only.

    async with Client("router-0:9000,router-1:9000") as client:
        async for event in client.generate("Once upon a time", max_tokens=32):
            print("".join(output.text for output in event.outputs), end="")

The target is one router, or several: their addresses with commas between them, or a sequence. Calls go to them in turn.
A router that cannot be reached or shuts down rests for a while that grows from failure to failure, and a call that it
failed goes to another one at once; after every router that is up has failed it, the call waits as `RetryPolicy` says.

A stream that breaks is resumed: the client sends the same request with the tokens it has and the seed in force, and the
events go on where they stood. What comes before and after a break is, joined, the answer of a stream that never broke:
text, tokens, log-probabilities, one finish per output, one `PromptInfo` and one `Usage`. Two facts are those of the
last call alone: `Usage.cached_tokens`, and which worker runs the request, of which nothing is said again. A stream is
resumed after WorkerLost, NoWorker, Draining, Overloaded and a broken connection, and if its router closes it before its
usage; not after other errors. It keeps the ids of the tokens received until their output ends. `Client(resume=False)`
repeats a stream only before its first event.

Errors are those of `protos.errors`. Attempts are bounded: `RetryPolicy.max_attempts` in a row without a new token.
"""

from protos.client.client import Client
from protos.client.endpoints import ClientTLS
from protos.client.retry import RetryPolicy
from protos.client.types import (
    Completion,
    ContinuationScore,
    GenerateEvent,
    Output,
    OutputDelta,
    PinnedPrefix,
    Prompt,
    PromptInfo,
    RouteCandidate,
    RouteExplanation,
    SamplingOptions,
    Scores,
    ServedModel,
    TenantQueue,
    Topology,
    Usage,
    WorkerView,
)
from protos.overview import Latency, Overview, WorkerOverview

__all__ = [
    "Client",
    "ClientTLS",
    "Completion",
    "ContinuationScore",
    "GenerateEvent",
    "Latency",
    "Output",
    "OutputDelta",
    "Overview",
    "PinnedPrefix",
    "Prompt",
    "PromptInfo",
    "RetryPolicy",
    "RouteCandidate",
    "RouteExplanation",
    "SamplingOptions",
    "Scores",
    "ServedModel",
    "TenantQueue",
    "Topology",
    "Usage",
    "WorkerOverview",
    "WorkerView",
]
