"""Libraries that come built: which one is chosen, which are refused, what happens without any."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import smolstack.native
from smolstack.native import instruction_sets as sets
from smolstack.native import library as native
from smolstack.native.compiling import fingerprint_of_sources
from smolstack.native.cpu_features import features
from smolstack.native.instruction_sets import KernelError, usable

NATIVE = Path(smolstack.native.__file__).parent
NUMBER = Path(__file__).parents[2] / "examples" / "number.png"
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
needs_compiler = pytest.mark.skipif(
    COMPILER is None or sys.platform == "win32", reason="no compiler"
)

HASWELL = {"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"}
ALDER_LAKE = HASWELL | {"avx_vnni"}
CASCADE_LAKE = HASWELL | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"}
SAPPHIRE_RAPIDS = CASCADE_LAKE | {"avx_vnni", "avx512_bf16"}
NEOVERSE_N1 = {"asimd", "asimdhp", "asimddp", "asimdrdm", "atomics"}
NEOVERSE_V1 = NEOVERSE_N1 | {"i8mm", "bf16"}


@pytest.mark.parametrize(
    ("machine", "has", "cap", "chosen"),
    [
        ("x86_64", set[str](), "", "generic"),
        ("x86_64", HASWELL, "", "avx2"),
        ("AMD64", ALDER_LAKE, "", "avx2_vnni"),
        ("x86_64", CASCADE_LAKE, "", "avx512_vnni"),
        ("x86_64", SAPPHIRE_RAPIDS, "", "avx512_bf16"),
        ("x86_64", SAPPHIRE_RAPIDS, "avx512_vnni", "avx512_vnni"),
        ("x86_64", SAPPHIRE_RAPIDS, "avx2_vnni", "avx2_vnni"),
        ("x86_64", CASCADE_LAKE, "avx2_vnni", "avx2_vnni_512vl"),
        ("x86_64", CASCADE_LAKE, "avx2", "avx2"),
        ("x86_64", CASCADE_LAKE, "generic", "generic"),
        ("x86_64", HASWELL, "avx512_bf16", "avx2"),
        ("aarch64", {"asimd"}, "", "neon"),
        ("arm64", NEOVERSE_N1, "", "neon_dotprod"),
        ("arm64", NEOVERSE_N1, "neon", "neon"),
        ("aarch64", NEOVERSE_N1 | {"i8mm"}, "", "neon_i8mm"),
        ("aarch64", NEOVERSE_V1, "", "neon_i8mm_bf16"),
        ("arm64", NEOVERSE_V1, "neon_i8mm", "neon_i8mm_bf16"),
        ("aarch64", NEOVERSE_V1, "neon_dotprod", "neon_dotprod"),
    ],
)
def test_the_best_set_that_processor_and_cap_allow(
    machine: str, has: set[str], cap: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setenv(sets.CAP, cap)
    assert usable(has)[0].library == chosen


def test_a_cap_of_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setenv(sets.CAP, "avx2")
    with pytest.raises(
        KernelError,
        match=re.escape("expected one of ['neon', 'neon_dotprod', 'neon_i8mm']"),
    ):
        usable(NEOVERSE_N1)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64's sets")
def test_libraries_of_a_folder_come_best_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(sets.CAP, raising=False)
    monkeypatch.setattr(native, "features", lambda probe: CASCADE_LAKE)
    for name in ("generic", "avx2", "avx512_bf16"):
        (tmp_path / f"kernels_{name}.so").touch()
    names = [path.name for path in native.built(tmp_path)]
    assert names == ["kernels_avx2.so", "kernels_generic.so"]
    assert native.built(tmp_path / "nothing here") == []


def compiled(folder: Path, *arguments: str) -> Path:
    assert COMPILER is not None
    made = folder / "kernels_test.so"
    command = [COMPILER, "-shared", "-fPIC", "-std=gnu11", *arguments, "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made


@needs_compiler
def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    source = (NATIVE / "about.c").read_text(encoding="utf-8")
    older = tmp_path / "about.c"
    older.write_text(source.replace("return ABI_VERSION", "return 7"), encoding="utf-8")
    made = compiled(tmp_path, f"-I{NATIVE}", str(older))
    with pytest.raises(KernelError, match=r"kernels_test\.so .*version 7, expected 1"):
        native.Library(made)


@needs_compiler
def test_a_structure_of_another_size_is_refused(tmp_path: Path) -> None:
    source = (NATIVE / "about.c").read_text(encoding="utf-8")
    other = tmp_path / "about.c"
    other.write_text(source.replace("sizeof(CacheSlot)", "sizeof(CacheSlot) + 8"), encoding="utf-8")
    made = compiled(tmp_path, f"-I{NATIVE}", str(other))
    with pytest.raises(KernelError, match=r"CacheSlot .*32.* 24"):
        native.Library(made)


@needs_compiler
def test_a_library_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.c"
    other.write_text("int nothing(void) { return 0; }\n", encoding="utf-8")
    with pytest.raises(KernelError, match="is not a library of smolstack's kernels"):
        native.Library(compiled(tmp_path, str(other)))


@needs_compiler
@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="nothing to compare with")
def test_the_probe_says_what_linux_says(tmp_path: Path) -> None:
    told = features(compiled(tmp_path, str(NATIVE / "cpu_features.c")))
    wanted = frozenset[str]().union(*(one.needs for one in sets.supported_sets()))
    assert told & wanted == features() & wanted


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/no such folder")


def load() -> tuple[native.Library | None, str]:
    """As in a process that has not asked for kernels yet."""
    return native._load.__wrapped__()


@needs_compiler
def test_a_built_library_needs_no_compiler_and_stale_ones_are_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    sources = [str(path) for path in sorted(NATIVE.glob("*.c")) if path.name != "cpu_features.c"]
    said = f'-DSMOLSTACK_SOURCES="{fingerprint_of_sources()}"'
    made = compiled(tmp_path, "-O0", said, *sources, "-lm")
    monkeypatch.setattr(native, "built", lambda: [made])
    monkeypatch.delenv(native.SWITCH, raising=False)
    request.getfixturevalue("without_compiler")

    library, why = load()
    assert (library and library.path, why) == (made, "")
    assert caplog.messages == []

    monkeypatch.setenv(native.SWITCH, "jit")
    assert load() == (None, "found no C compiler (cc, gcc or clang)")
    monkeypatch.setenv(native.SWITCH, "0")
    assert load() == (None, "SMOLSTACK_NATIVE=0")

    caplog.clear()
    monkeypatch.delenv(native.SWITCH)
    monkeypatch.setattr(native, "fingerprint_of_sources", lambda: "another")
    expected = (
        "kernels_test.so was not compiled from the sources in its folder; "
        "found no C compiler (cc, gcc or clang)"
    )
    assert load() == (None, expected)
    assert caplog.messages == [f"using torch instead of the compiled kernels: {expected}"]


@pytest.mark.usefixtures("without_compiler")
def test_without_libraries_and_compiler_torch_answers_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(native.SWITCH, raising=False)
    monkeypatch.setattr(native, "built", list)
    none, why = load()
    monkeypatch.setattr(native, "library", lambda: none)
    monkeypatch.setattr(native, "reason", lambda: why)
    vlm = smolstack.load()
    assert vlm.ask(str(NUMBER), "What does it say?").text == "4711"
    assert vlm.precision == (
        "float32, torch (no compiled kernels: found no C compiler (cc, gcc or clang))"
    )


def test_a_switch_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "yes")
    assert load() == (None, "SMOLSTACK_NATIVE is 'yes', expected 0, 1 or jit")
