"""Which variant runs: what the processor has, what was asked for, what the compiler can do."""

from __future__ import annotations

from pathlib import Path

import pytest

from protos.errors import SetupError
from workers.kernels import library as loading
from workers.kernels.build import build
from workers.kernels.library import Library, load
from workers.kernels.variants import AMX, AVX2, AVX512_BF16, GENERIC, VARIANTS, Variant, cpu_features, named

CPUINFO = """\
processor\t: 0
model name\t: Example 9000
flags\t\t: fpu avx2 fma avx512f
vmx flags\t: vnmi

processor\t: 1
flags\t\t: fpu
"""


def test_features_of_a_processor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    assert cpu_features(tmp_path / "cpuinfo") == {"fpu", "avx2", "fma", "avx512f"}


def test_no_features_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert cpu_features(tmp_path / "cpuinfo") == frozenset()
    (tmp_path / "cpuinfo").write_text("Features\t: fp asimd\n")
    assert cpu_features(tmp_path / "cpuinfo") == frozenset()


def test_every_processor_runs_the_last_variant() -> None:
    assert VARIANTS[-1] is GENERIC
    assert GENERIC.runs_on(frozenset())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_runs_where_all_it_needs_is_there(variant: Variant) -> None:
    assert named(variant.name) is variant
    assert variant.runs_on(variant.needs | {"another"})
    assert not any(variant.runs_on(variant.needs - {feature}) for feature in variant.needs)


def test_auto_takes_the_fastest_that_runs(directory: Path) -> None:
    assert load("auto", directory).variant == next(v for v in VARIANTS if v.runs_on(cpu_features()))


def test_auto_goes_on_where_the_compiler_fails(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    def without_avx2(variant: Variant, directory: Path | None) -> Path:
        if variant is AVX2:
            raise SetupError("the compiler does not know -mavx2")
        return build(variant, directory)

    monkeypatch.setattr(loading, "cpu_features", lambda: AVX2.needs)
    monkeypatch.setattr(loading, "build", without_avx2)
    assert load("auto", directory).variant is GENERIC


def test_auto_says_why_not_even_the_fastest_could_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(variant: Variant, directory: Path | None) -> Path:
        raise SetupError(f"no {variant.name}")

    monkeypatch.setattr(loading, "cpu_features", lambda: AVX512_BF16.needs | AVX2.needs)
    monkeypatch.setattr(loading, "build", failing)
    with pytest.raises(SetupError, match="no avx512_bf16"):
        load("auto")


def test_an_unknown_name() -> None:
    with pytest.raises(SetupError, match=r"'sse9'.* amx, avx512_bf16, avx512, avx2, generic"):
        load("sse9")


def test_a_name_that_this_processor_cannot_run(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setattr(loading, "cpu_features", lambda: frozenset({"avx2", "avx512f"}))
    with pytest.raises(SetupError, match=r"avx512_bf16 .*lacks avx512_bf16, avx512bw, avx512dq, avx512vl, fma"):
        load("avx512_bf16", directory)
    with pytest.raises(SetupError, match=r"avx2 .*lacks fma; choose auto"):
        load("avx2", directory)


def test_a_forced_variant_is_the_one_that_loads(library: Library, directory: Path) -> None:
    if library.variant in VARIANTS:
        assert load(library.variant.name, directory).variant is library.variant
    assert list(directory.glob(f"{library.variant.name}-????????????????.so"))


def test_a_library_that_the_system_refuses(tmp_path: Path) -> None:
    broken = tmp_path / "generic.so"
    broken.write_text("not a library")
    with pytest.raises(SetupError, match=rf"generic kernels cannot be loaded.*delete {broken}"):
        Library(broken, GENERIC)


def test_a_system_that_refuses_the_tiles(directory: Path) -> None:
    """A processor may have them where the operating system, or a sandbox, does not hand them out."""
    if AMX.runs_on(cpu_features()):
        pytest.skip("this processor has the tiles")
    with pytest.raises(SetupError, match="amx kernels do not run here: the operating system refuses AMX tiles"):
        Library(build(AMX, directory), AMX)
