"""No kernel reads or writes where it must not, whatever the shape of a layer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from smolstack.native import compiling

HERE, NATIVE = Path(__file__).parent, Path(compiling.__file__).parent
HOW = ("gcc", "-O1", "-std=gnu11", "-march=native", "-fopenmp", f"-I{NATIVE}")
WATCHED = (*HOW, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The kernels, compiled with sanitizers."""
    folder = tmp_path_factory.mktemp("kernels")
    files = [str(NATIVE / name) for name in compiling.SOURCES]
    subprocess.run([*WATCHED, "-c", *files], check=True, cwd=folder)
    return list(folder.glob("*.o"))


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
@pytest.mark.parametrize("driver", ["driver.c", "model_driver.c"])
def test_odd_shapes_pass_the_address_and_undefined_behaviour_sanitizers(
    driver: str, watched: list[Path], tmp_path: Path
) -> None:
    made = subprocess.run(
        [*WATCHED, str(HERE / driver), *map(str, watched), "-o", str(tmp_path / "driver"), "-lm"],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode and "san" in made.stderr:
        pytest.skip("this gcc has no sanitizers")
    assert made.returncode == 0, made.stderr
    ran = subprocess.run(
        [tmp_path / "driver"],
        env={"ASAN_OPTIONS": "detect_leaks=0"},  # OpenMP's own threads
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
