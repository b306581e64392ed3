"""The serve benchmark against a small server in the test: counts, kinds of error, bounds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from benchmarks import harness, serve
from benchmarks.benchmark import Benchmark
from benchmarks.options import Options, read_options
from benchmarks.prompts import Code
from benchmarks.target import Access, NoServerError, Target
from benchmarks.traffic import Ask, Trace, closed_loop, open_loop, poisson
from protos import errors
from protos.v1 import inference_pb2 as pb
from protos.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

CODE = Code(["def f(x):\n    return x + 1\n"])


@dataclass
class Server(InferenceServicer):
    """Answers with as many tokens as asked for, two a message; `fault` may refuse the n-th request."""

    fault: Callable[[int], errors.HeadwaterError | None] = lambda _: None
    finishes: bool = True
    seen: list[pb.GenerateRequest] = field(default_factory=list)

    async def Generate(  # noqa: N802 - the name in the proto
        self, request: pb.GenerateRequest, context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.seen.append(request)
        error = self.fault(len(self.seen))
        if error is not None:
            await context.abort(error.status, error.message, errors.trailers(error))
        yield pb.GenerateResponse(prompt=pb.PromptInfo(num_tokens=10))
        left = request.sampling.max_tokens
        while left > 0:
            yield pb.GenerateResponse(outputs=[pb.OutputDelta(token_ids=[1] * min(left, 2))])
            left -= 2
        if self.finishes:
            finish = pb.Finish(reason=pb.FINISH_REASON_LENGTH)
            usage = pb.Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=request.sampling.max_tokens)
            yield pb.GenerateResponse(outputs=[pb.OutputDelta(finish=finish)], usage=usage)

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:  # noqa: N802
        return pb.ListModelsResponse(models=[pb.Model(name="tiny", max_context=4096, vocab_size=100)])


@asynccontextmanager
async def running(servicer: Server, status: int = health_pb2.HealthCheckResponse.SERVING) -> AsyncIterator[str]:
    server = grpc.aio.server()
    add_InferenceServicer_to_server(servicer, server)
    checks = health.aio.HealthServicer()
    await checks.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def bench(address: str, *arguments: str) -> list[dict[str, Any]]:
    """Run the benchmark as its command line would; the JSON rows, and the exit code in a last one."""
    args = serve.parser().parse_args(["--target", f"it={address}", "--pause", "0", "--wait", "5", *arguments])
    benchmark = Benchmark("serve", serve.workloads(args), serve.arms(args, CODE))
    code = await harness.execute(benchmark, read_options(args))
    return [*map(json.loads, args.json.read_text().splitlines()), {"code": code}]


def metrics(rows: list[dict[str, Any]], workload: str) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in rows if row.get("workload") == workload and "metric" in row}


async def test_every_workload_and_level_is_measured(tmp_path: Path) -> None:
    servicer, out = Server(), str(tmp_path / "rows")
    async with running(servicer) as address:
        rows = await bench(
            address, "--quick", "--requests", "6", "--concurrency", "1,4", "--rate", "500", "--json", out
        )
    assert rows[-1] == {"code": 0}
    names = {row["workload"] for row in rows if "metric" in row}
    levels = ["concurrency 1", "concurrency 4", "500 requests/s"]
    assert names == {f"{kind}, {level}" for kind in ("mixed", "shared-prefix") for level in levels}
    assert len(servicer.seen) == 2 * 6 * 6  # a warm-up and a counted round, 6 workloads, 6 requests
    found = metrics(rows, "mixed, concurrency 4")
    assert found["num_completed"] == found["num_requests"] == 6
    assert found["output_tokens"] == 4 + 5 + 7 + 9 + 12 + 16  # evenly spread on a logarithmic scale
    assert (found["prompt_tokens"], found["cached_tokens"]) == (60, 24)
    assert {"ttft_p50_ms", "itl_p99_ms", "e2e_p90_ms", "client_cpu_percent"} <= found.keys()


async def test_no_two_requests_have_the_same_prompt(tmp_path: Path) -> None:
    servicer = Server()
    async with running(servicer) as address:
        await bench(address, "--quick", "--concurrency", "2", "--prompts", "tokens", "--json", str(tmp_path / "rows"))
    texts = [tuple(request.tokens.ids) for request in servicer.seen]
    assert len(set(texts)) == len(texts)
    assert all(0 <= token < 100 for text in texts for token in text)


async def test_refusals_and_errors_are_counted_by_kind_and_none_is_sent_again(tmp_path: Path) -> None:
    def fault(number: int) -> errors.HeadwaterError | None:
        refused: dict[int, errors.HeadwaterError] = {
            1: errors.Overloaded("full", retry_after_s=0.001),
            2: errors.Overloaded("full"),
            3: errors.WorkerLost("gone"),
        }
        return refused.get(number)

    servicer, out = Server(fault), str(tmp_path / "rows")
    options = ["--quick", "--requests", "8", "--warmup-rounds", "0", "--workloads", "mixed", "--concurrency", "2"]
    async with running(servicer) as address:
        rows = await bench(address, *options, "--json", out)
    assert len(servicer.seen) == 8
    assert [row for row in rows if "refusals" in row or "errors" in row] == [
        {"workload": "mixed, concurrency 2", "arm": "it", "errors": "WorkerLost", "number": 1},
        {"workload": "mixed, concurrency 2", "arm": "it", "refusals": "Overloaded", "number": 2},
    ]
    assert metrics(rows, "mixed, concurrency 2")["num_completed"] == 5
    assert rows[-1] == {"code": 1}


async def test_a_stream_that_just_stops_is_an_error(tmp_path: Path) -> None:
    options = ["--quick", "--requests", "2", "--concurrency", "1", "--workloads", "mixed"]
    async with running(Server(finishes=False)) as address:
        rows = await bench(address, *options, "--json", str(tmp_path / "rows"))
    failed = [row["failed"] for row in rows if "failed" in row]
    assert failed == ["NothingCompletedError: none of 2 requests completed: {'WorkerLost': 2}"] * 2
    assert rows[-1] == {"code": 1}


async def test_no_server_is_said_with_the_remedy(tmp_path: Path) -> None:
    async with running(Server()) as address:
        pass
    rows = await bench(address, "--quick", "--wait", "0", "--json", str(tmp_path / "rows"))
    (failed,) = [row["failed"] for row in rows if "failed" in row]
    assert f"no healthy server at {address}" in failed
    assert "headwater serve" in failed
    assert rows[-1] == {"code": 1}


async def test_a_server_that_is_not_ready_is_waited_for_and_then_given_up() -> None:
    async with running(Server(), health_pb2.HealthCheckResponse.NOT_SERVING) as address:
        target = Target(Access(address, wait_s=0.3, timeout_s=5))
        with pytest.raises(NoServerError, match="NOT_SERVING"):
            await target.connect()


@dataclass
class Fake:
    """Takes a moment for each request, and notes how many are under way at once."""

    takes_s: float = 0.001
    under_way: int = 0
    most: int = 0

    async def send(self, ask: Ask, due_s: float) -> Trace:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(self.takes_s)
        self.under_way -= 1
        return Trace(due_s=due_s, sent_s=due_s, ended_s=due_s + 1)


ASKS = [Ask("x", max_tokens=1, seed=index) for index in range(20)]


async def test_a_closed_loop_keeps_its_concurrency() -> None:
    fake = Fake()
    traces = await closed_loop(ASKS, fake.send, concurrency=4, duration_s=60)
    assert (len(traces), fake.most) == (20, 4)


async def test_no_request_begins_after_the_duration() -> None:
    fake = Fake()
    assert await closed_loop(ASKS, fake.send, concurrency=4, duration_s=0) == []
    traces = await open_loop(ASKS, fake.send, due_s=[0.0, 0.001, *[100.0] * 18], duration_s=1)
    assert len(traces) == 2


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    fake = Fake(takes_s=0.05)
    await open_loop(ASKS, fake.send, due_s=[0.0] * 20, duration_s=60)
    assert fake.most == 20


def test_poisson_arrivals_have_their_rate_and_seed() -> None:
    times = poisson(4000, 10.0, seed=1)
    assert times == sorted(times) == poisson(4000, 10.0, seed=1)
    assert times[-1] == pytest.approx(400, rel=0.1)


def test_the_command_line_defaults_and_quick() -> None:
    args = serve.parser().parse_args([])
    assert [load.params.concurrency for load in serve.workloads(args)] == [1, 8, 32] * 2
    options = read_options(args)
    assert options == Options(rounds=3, seed=options.seed)
    assert read_options(serve.parser().parse_args(["--seed", "5"])).seed == 5
    assert read_options(serve.parser().parse_args(["--quick"])).rounds == 1


@pytest.mark.parametrize("arguments", [["--concurrency", "1,0"], ["--rounds", "0"], ["--rate", "x"]])
def test_a_bad_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.parser().parse_args(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_without_a_seed_every_run_has_another() -> None:
    args = serve.parser().parse_args([])
    assert read_options(args).seed != read_options(args).seed


def test_a_target_given_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        serve.main(["--target", "a:1", "--target", "a:1"])
    assert "two arms of one name" in capsys.readouterr().err
