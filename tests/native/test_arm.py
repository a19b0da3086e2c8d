"""The kernels for ARM compute the bits that those for x86-64 compute."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from smolstack.native import compiling
from smolstack.native.instruction_sets import SETS, InstructionSet, supported_sets
from smolstack.native.processor import features

HERE, NATIVE = Path(__file__).parent, Path(compiling.__file__).parent
SOURCES = ("stored", "rounding", "panels", "layers", "activations", "floats", "attend")
ARM = [one for one in SETS if one.architecture == "aarch64"]
CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"


def digest(compiler: str, flags: str, runner: list[str], made: Path) -> str:
    """Of integers and products of odd shapes (driver.c), which it compares with exact sums too."""
    files = [HERE / "driver.c", *(NATIVE / f"{name}.c" for name in SOURCES)]
    how = ["-O2", "-std=gnu11", "-ffp-contract=off", "-fopenmp", f"-I{NATIVE}", *flags.split()]
    subprocess.run(
        [compiler, *how, *map(str, files), "-o", str(made), "-lm"], check=True, capture_output=True
    )
    ran = subprocess.run([*runner, str(made)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    return ran.stdout


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64's kernels")
@pytest.mark.skipif(
    None in map(shutil.which, ("gcc", CROSS, EMULATOR)), reason=f"needs gcc, {CROSS} and {EMULATOR}"
)
@pytest.mark.skipif("fma" not in features(), reason="without FMA scales are rounded twice")
@pytest.mark.parametrize("one", ARM, ids=lambda one: one.cap)
def test_arm_s_kernels_give_the_bits_of_x86_s(one: InstructionSet, tmp_path: Path) -> None:
    here = digest("gcc", "-march=haswell", [], tmp_path / "x86")
    there = digest(CROSS, " ".join((*one.flags, "-static")), [EMULATOR], tmp_path / "arm")
    assert here == there


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64's kernels")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_every_instruction_set_with_fma_gives_the_same_bits(tmp_path: Path) -> None:
    usable = [one for one in supported_sets() if one.needs and one.needs <= features()]
    if not usable:
        pytest.skip("this processor has no FMA")
    found = {
        one.library: digest("gcc", " ".join(one.flags), [], tmp_path / one.library)
        for one in usable
    }
    assert len(set(found.values())) == 1, found
