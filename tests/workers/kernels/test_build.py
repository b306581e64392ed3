"""Compiling the kernels: once, by one process, and with an error that says what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from protos.errors import SetupError
from workers.kernels import build as building
from workers.kernels.build import build, default_directory, main
from workers.kernels.library import Library
from workers.kernels.variants import AVX2, GENERIC

VERSION_AND_COUNT = """\
#!/bin/sh
PATH={path}
if [ "$1" = --version ]; then echo example 1.0; exit; fi
echo "$@" >> {calls}
for output; do :; done
"""


@dataclass
class FakeCompiler:
    """A script in place of the compiler, the only program on the PATH. It keeps what it was called with."""

    folder: Path

    def behaves(self, script: str = 'echo a library > "$output"') -> None:
        head = VERSION_AND_COUNT.format(path=os.defpath, calls=self.folder / "calls")
        self.program.write_text(head + script + "\n")
        self.program.chmod(0o755)

    @property
    def program(self) -> Path:
        return self.folder / "c++"

    @property
    def calls(self) -> list[str]:
        """The arguments of every compilation."""
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler(tmp_path / "bin")
    fake.folder.mkdir()
    fake.behaves()
    monkeypatch.setenv("PATH", str(fake.folder))
    return fake


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library in place of the kernels."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "library.cpp").write_text('#include "answer.h"\nextern "C" int answer() { return kAnswer; }\n')
    (folder / "answer.h").write_text("constexpr int kAnswer = 42;\n")
    monkeypatch.setattr(building, "SOURCES", folder)
    monkeypatch.setattr(building, "ENTRY", folder / "library.cpp")
    return folder


def test_a_variant_is_compiled_once_and_then_found(compiler: FakeCompiler, tmp_path: Path) -> None:
    path = build(GENERIC, tmp_path / "kept")
    assert path.read_text() == "a library\n"
    assert build(GENERIC, tmp_path / "kept") == path
    assert len(compiler.calls) == 1
    assert {file.name for file in path.parent.iterdir()} == {path.name, "lock"}


def test_the_variants_flags_reach_the_compiler(compiler: FakeCompiler, tmp_path: Path) -> None:
    build(AVX2, tmp_path)
    assert set(AVX2.flags) <= set(compiler.calls[0].split())


def test_what_changes_the_result_changes_the_file(compiler: FakeCompiler, sources: Path, tmp_path: Path) -> None:
    paths = [build(GENERIC, tmp_path)]
    paths.append(build(replace(GENERIC, flags=("-DANOTHER",)), tmp_path))
    (sources / "answer.h").write_text("constexpr int kAnswer = 43;\n")
    paths.append(build(GENERIC, tmp_path))
    assert len(set(paths)) == len(compiler.calls) == 3


def test_a_variant_that_is_there_needs_no_folder_to_write_to(compiler: FakeCompiler, tmp_path: Path) -> None:
    path = build(GENERIC, tmp_path / "kept")
    (tmp_path / "kept" / "lock").unlink()
    assert build(GENERIC, tmp_path / "kept") == path
    assert not (tmp_path / "kept" / "lock").exists()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match=r"no C\+\+ compiler is on the PATH .*; install one"):
        build(GENERIC, tmp_path)


def test_a_library_built_elsewhere_needs_no_compiler(
    compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = build(GENERIC, tmp_path / "kept")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build(GENERIC, tmp_path / "kept") == path


def test_a_compiler_that_cannot_be_run(compiler: FakeCompiler, tmp_path: Path) -> None:
    compiler.program.write_bytes(b"\x7fno program")
    with pytest.raises(SetupError, match=r"c\+\+ does not run .*; repair it"):
        build(GENERIC, tmp_path)


def test_the_compilers_complaint_is_passed_on(compiler: FakeCompiler, tmp_path: Path) -> None:
    compiler.behaves('echo "In file x:" >&2; echo "x.h:7: error: no tiles" >&2; echo half > "$output"; exit 1')
    with pytest.raises(SetupError, match=r"c\+\+ cannot build the generic kernels: x\.h:7: error: no tiles$"):
        build(GENERIC, tmp_path / "kept")
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["lock"]
    compiler.behaves("exit 1")
    with pytest.raises(SetupError, match="it said nothing"):
        build(GENERIC, tmp_path / "kept")


def test_a_compiler_that_does_not_end(compiler: FakeCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.behaves("exec sleep 30")
    monkeypatch.setattr(building, "TIMEOUT_S", 0.5)
    with pytest.raises(SetupError, match="took longer"):
        build(GENERIC, tmp_path / "kept")
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["lock"]


def test_a_folder_that_cannot_be_made(compiler: FakeCompiler, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "kernels"):
        with pytest.raises(SetupError, match=rf"{folder}: .*set engine\.kernels\.directory"):
            build(GENERIC, folder)


def test_two_processes_at_once_compile_once(compiler: FakeCompiler, tmp_path: Path, root: Path) -> None:
    compiler.behaves('sleep 1; echo a library > "$output"')
    command = [sys.executable, "-m", "workers.kernels.build", "generic", "--directory", str(tmp_path / "kept")]
    both = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1]
    assert len(compiler.calls) == 1


def test_the_library_runs_and_others_may_read_it(sources: Path, tmp_path: Path) -> None:
    """An image is built by one user and run by another."""
    if not any(map(shutil.which, building.COMPILERS)):
        pytest.skip("no C++ compiler is on the PATH")
    before = os.umask(0o022)
    try:
        path = build(GENERIC, tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o755
    code = f"import ctypes; print(ctypes.CDLL({str(path)!r}).answer())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "42\n"


def test_the_command_line(directory: Path, root: Path) -> None:
    command = [sys.executable, "-m", "workers.kernels.build", "generic", "--directory", str(directory)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert path == build(GENERIC, directory)
    assert Library(path, GENERIC).variant is GENERIC


def test_the_command_line_refuses_an_unknown_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["sse9", "--directory", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "'sse9'" in err
    assert "avx512_bf16" in err


def test_the_command_line_builds_all(
    compiler: FakeCompiler, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--directory", str(tmp_path)]) == 0
    names = [Path(line).name.rpartition("-")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["amx", "avx512_bf16", "avx512", "avx2", "generic"]


def test_the_default_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_directory() == tmp_path / ".cache" / "headwater" / "kernels"
