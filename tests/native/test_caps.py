"""The kernels give torch's numbers under every cap on instructions that this processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smolstack.native import library as native
from smolstack.native.cpu_features import features
from smolstack.native.instruction_sets import CAP, supported_sets, usable

TESTS = Path(__file__).parent.parent
# What the kernels of each library say that they were compiled for.
NAMES = {
    "generic": "plain C",
    "avx2": "AVX2",
    "avx2_vnni": "AVX2 VNNI",
    "avx2_vnni_512vl": "AVX2 VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "neon": "NEON",
    "neon_dotprod": "NEON with dot products",
    "neon_i8mm": "NEON i8mm",
    "neon_i8mm_bf16": "NEON BF16",
}


@pytest.mark.parametrize("cap", dict.fromkeys(one.cap for one in supported_sets()))
def test_the_kernels_are_exact_under_a_cap(cap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here = any(one.cap == cap and one.needs <= features() for one in supported_sets())
    if native.library() is None or not here:
        pytest.skip(f"no {cap} here, or no compiler")
    monkeypatch.setenv(CAP, cap)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = "from smolstack.native import library as n; k = n.library(); print(k.instructions)"
    said = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == NAMES[usable(features())[0].library]
    tests = [str(TESTS / "model" / "test_quantized.py"), str(TESTS / "native" / "test_threads.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *tests],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_cap_that_is_none_leaves_torch_to_compute() -> None:
    environment = {**os.environ, CAP: "avx3"}
    program = "from smolstack.native import library as n; print(n.library(), n.reason())"
    said = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.startswith("None SMOLSTACK_MAX_ISA is 'avx3', expected one of")
    assert said.stderr.startswith("using torch instead of the compiled kernels: SMOLSTACK_MAX_ISA")
    assert said.stderr.count("\n") == 1
