"""The kernels of every instruction set, ARM's in an emulator, compute the same numbers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from smolstack.native import compiling
from smolstack.native.cpu_features import features
from smolstack.native.instruction_sets import SETS, InstructionSet, supported_sets

HERE, NATIVE = Path(__file__).parent, Path(compiling.__file__).parent
ARM = [one for one in SETS if one.architecture == "aarch64"]
CROSS, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
HASWELL = ("-march=haswell",)
# Integers and their products; layers and whole models in float32 (and, by distance, all others).
DRIVERS = ("driver.c", "model_driver.c")

needs_emulator = pytest.mark.skipif(
    None in map(shutil.which, ("gcc", CROSS, EMULATOR)), reason=f"needs gcc, {CROSS} and {EMULATOR}"
)
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64's kernels")
Digest = Callable[[str, tuple[str, ...]], str]


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> Digest:
    """The digest that a driver prints after comparing its results with exact sums, by driver and
    compiler flags (ARM's begin with -march=armv8)."""

    @lru_cache
    def kernels(compiler: str, flags: tuple[str, ...]) -> tuple[Path, ...]:
        folder = tmp_path_factory.mktemp("kernels")
        files = [str(NATIVE / name) for name in compiling.SOURCES]
        subprocess.run([compiler, *flags, "-c", *files], check=True, cwd=folder)
        return tuple(folder.glob("*.o"))

    def of(driver: str, flags: tuple[str, ...]) -> str:
        arm = flags[0].startswith("-march=armv8")
        compiler, runner = (CROSS, [EMULATOR]) if arm else ("gcc", [])
        flags = (*flags, "-O2", "-std=gnu11", "-ffp-contract=off", "-fopenmp", f"-I{NATIVE}")
        objects = kernels(compiler, flags)
        made = objects[0].parent / driver.removesuffix(".c")
        command = [compiler, *flags, *["-static"] * arm, str(HERE / driver), *map(str, objects)]
        subprocess.run([*command, "-o", str(made), "-lm"], check=True, capture_output=True)
        ran = subprocess.run([*runner, str(made)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout
        return ran.stdout

    return of


@x86_only
@needs_emulator
@pytest.mark.skipif("fma" not in features(), reason="without FMA scales are rounded twice")
@pytest.mark.parametrize("one", ARM, ids=lambda one: one.library)
@pytest.mark.parametrize("driver", DRIVERS)
def test_arm_s_kernels_give_the_bits_of_x86_s(
    driver: str, one: InstructionSet, digest: Digest
) -> None:
    assert digest(driver, one.flags) == digest(driver, HASWELL)


@x86_only
@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
@pytest.mark.parametrize("driver", DRIVERS)
def test_every_instruction_set_with_fma_gives_the_same_bits(driver: str, digest: Digest) -> None:
    usable = [one for one in supported_sets() if one.needs and one.needs <= features()]
    if not usable:
        pytest.skip("this processor has no FMA")
    found = {one.library: digest(driver, one.flags) for one in usable}
    assert len(set(found.values())) == 1, found


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
@pytest.mark.parametrize("driver", DRIVERS)
def test_the_plainest_kernels_compute_the_same_up_to_rounding(driver: str, digest: Digest) -> None:
    digest(driver, supported_sets()[0].flags)
