"""No kernel reads or writes where it must not, whatever the shape of a layer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from smolstack.native import compiling

HERE, NATIVE = Path(__file__).parent, Path(compiling.__file__).parent
SOURCES = ("stored", "rounding", "panels", "layers", "activations", "floats", "attend")


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_odd_shapes_pass_the_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    watched = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    files = [HERE / "driver.c", *(NATIVE / f"{name}.c" for name in SOURCES)]
    how = ["gcc", "-O1", "-std=gnu11", "-march=native", "-fopenmp", *watched, f"-I{NATIVE}"]
    made = subprocess.run(
        [*how, *map(str, files), "-o", str(tmp_path / "driver"), "-lm"],
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
