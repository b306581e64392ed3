"""The command line without a cluster: its help, its refusals, its lightness, and how it shows a stream."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.commands.printer import JsonPrinter, TextPrinter
from protos.client import GenerateEvent, OutputDelta, PromptInfo, Usage
from protos.messages import Finish
from protos.v1 import inference_pb2 as pb

FLAGS = {"stop_token_ids": "--stop-token-id"}  # given once per id, so in the singular


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def headwater(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def delta(index: int, text: str, *, end: bool = False) -> OutputDelta:
    return OutputDelta(index, text, (len(text),), finish=Finish("length") if end else None)


def event(*outputs: OutputDelta, usage: Usage | None = None, prompt: PromptInfo | None = None) -> GenerateEvent:
    return GenerateEvent(prompt, outputs, (), usage)


@pytest.mark.parametrize("field", [field.name for field in pb.SamplingParams.DESCRIPTOR.fields])
def test_every_sampling_parameter_has_a_flag(field: str) -> None:
    assert FLAGS.get(field, "--" + field.replace("_", "-")) in run("generate", "--help").output.split()


@pytest.mark.parametrize(
    "command",
    ["serve", "doctor", "generate", "score", "tokenize", "models", "topology", "explain", "drain", "pin", "api-key"],
)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("command", ["preflight", "diff", "apply", "status", "wait", "port-forward", "uninstall"])
def test_every_command_of_deploy_has_help(command: str) -> None:
    result = run("deploy", command, "--help")
    assert result.exit_code == 0
    assert "--kubeconfig" in result.output


def test_deploy_needs_manifests_and_a_cluster() -> None:
    assert headwater("deploy", "apply").returncode == 2
    missing = headwater("deploy", "apply", "-f", "nowhere.yaml")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: ManifestError: nowhere.yaml cannot be read: ")
    away = headwater("deploy", "status", "--kubeconfig", "nowhere")
    assert away.returncode == 2
    assert away.stderr.startswith("error: KubernetesError: no usable kubeconfig: ")
    assert len(away.stderr.splitlines()) == 1


def test_bench_has_the_options_of_the_benchmark_and_its_refusals() -> None:
    told = headwater("bench", "--help")
    assert told.returncode == 0
    assert "usage: headwater bench" in told.stdout
    assert "--metrics" in told.stdout
    wrong = headwater("bench", "--metrics", "127.0.0.1:1", "--target", "a=127.0.0.1:1", "--target", "b=127.0.0.1:2")
    assert wrong.returncode == 2
    assert "give one --target" in wrong.stderr
    absent = headwater("bench", "--target", "127.0.0.1:1", "--wait", "0.1", "--quick")
    assert absent.returncode == 1
    assert "start one with `headwater serve`" in absent.stdout + absent.stderr


def test_starting_up_imports_neither_ray_nor_torch_nor_kubernetes() -> None:
    code = "import sys, cluster.cli; print(sorted({'kubernetes', 'ray', 'torch', 'transformers'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_unreachable_target_says_how_to_start_one() -> None:
    done = headwater("generate", "hello", "--target", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: NoWorker: nothing answers at 127.0.0.1:1")
    assert "headwater serve" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_wrong_configuration_is_one_line_and_exit_code_2() -> None:
    done = headwater("serve", "--set", "cluster.num_workerz=3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ConfigError: ")
    assert len(done.stderr.splitlines()) == 1


def test_missing_model_is_one_line_and_exit_code_2() -> None:
    done = headwater("serve", "--set", "worker.model.path=nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ModelError: ")


def test_api_keys_are_printed_once_with_the_hash_for_the_tenants_file() -> None:
    first, second = (run("api-key").stdout.split() for _ in range(2))
    assert first != second
    key, hashed = first
    assert re.fullmatch(r"hw-[A-Za-z0-9_-]{43}", key)
    assert run("api-key", "--hash", stdin=f"{key}\n").stdout.split() == [hashed]


def test_a_key_that_could_be_guessed_is_not_hashed_and_not_echoed() -> None:
    done = run("api-key", "--hash", stdin="swordfish\n")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "a key of 9 characters" in done.stderr
    assert "swordfish" not in done.stderr


def test_print_config_prints_the_whole_tree() -> None:
    assert "num_workers: 9" in run("serve", "--print-config", "--set", "cluster.num_workers=9").output


@pytest.mark.parametrize(
    "arguments", [("--target", "nowhere"), ("--logit-bias", "a=b"), ("--token-ids",), ("--n", "0")]
)
def test_malformed_options_are_usage_errors(arguments: tuple[str, ...]) -> None:
    assert run("generate", "one two", *arguments).exit_code == 2


def test_one_output_streams_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    printer = TextPrinter(num_outputs=1)
    printer.show(event(delta(0, "Once")))
    assert capsys.readouterr().out == "Once"
    printer.show(event(delta(0, " more", end=True)))
    printer.end()
    assert capsys.readouterr().out == " more\n"


def test_several_outputs_are_labelled_and_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    printer = TextPrinter(num_outputs=2)
    printer.show(event(delta(1, "b"), delta(0, "a")))
    printer.show(event(delta(1, "B", end=True)))
    assert capsys.readouterr().out == ""
    printer.show(event(delta(0, "A", end=True)))
    printer.end()
    assert capsys.readouterr().out == "[0] aA\n[1] bB\n"


def test_json_is_one_object_a_line_and_ends_with_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    printer = JsonPrinter()
    printer.show(event(delta(0, "hé"), prompt=PromptInfo("r", "m", 3, 7, "w")))
    printer.show(event(delta(0, "", end=True), usage=Usage(3, 0, 2)))
    printer.end()
    first, second, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"index": 0, "text": "hé", "token_ids": [2]}
    assert second == {"index": 0, "text": "", "token_ids": [0]}
    assert last["finish"] == [{"reason": "length"}]
    assert last["usage"] == {"prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 2}
    assert last["prompt"]["seed"] == 7
