"""Describes the machine: versions, processor, threads, and measured limits."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from smolstack import __version__
from smolstack.backends.cpu.linear import multiply_rows
from smolstack.native import library as native

PACKAGES = (
    "torch",
    "transformers",
    "onnxruntime",
    "openvino",
    "llama-cpp-python",
    "numpy",
    "pillow",
    "tokenizers",
    "safetensors",
)
ROUNDS = 15  # per limit, of which the fastest counts
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")


def describe() -> dict[str, Any]:
    """Return processor, instruction sets, threads and versions as plain data."""
    versions = {"smolstack": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instructions": instructions(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": _kernels(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "versions": versions,
    }


def _kernels() -> str:
    """Return the instruction set of the compiled kernels, or why there are none."""
    kernels = native.library()
    return f"none ({native.reason()})" if kernels is None else kernels.instructions


def limits() -> dict[str, float]:
    """Measure the fastest matrix products and memory reads with the threads in use.

    Returns:
        "float32", "bfloat16", "int8": 10⁹ operations per second in matrix products of about the
            towers' shapes (0 if torch has none), in float32 torch's or the kernels', whichever
            is faster: torch's library takes twice as long on some processors; "read": 10⁹ bytes
            per second.
    """
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        left, right = (torch.randn(1024, 3072).to(dtype) for _ in range(2))
        found[name] = 2 * 1024 * 1024 * 3072 / _fastest(lambda: left @ right.t()) / 1e9  # noqa: B023
    found["float32"] = max(found["float32"], _kernel_rate())
    found["int8"] = _int8_rate()
    vector = torch.ones(2**26)  # 256 MiB, larger than any cache
    seconds = min(_fastest(vector.sum), _fastest(vector.amax), _fastest(lambda: vector @ vector))
    found["read"] = vector.numel() * 4 / seconds / 1e9
    return found


def _kernel_rate() -> float:
    """Return the rate of the compiled kernels in float32; 0 without them."""
    kernels = native.library()
    if kernels is None:
        return 0.0
    left, right = (torch.randn(1024, 3072) for _ in range(2))
    linear = native.Linear(native.FLOAT32, 3072, 1024, weight=right.data_ptr())
    seconds = _fastest(lambda: multiply_rows(kernels, linear, left))
    return 2 * 1024 * 1024 * 3072 / seconds / 1e9


def _int8_rate() -> float:
    left = torch.ones(1024, 3072, dtype=torch.int8)
    right = torch.ones(1024, 3072, dtype=torch.int8)
    try:
        seconds = _fastest(lambda: torch._int_mm(left, right.t()))
    except (RuntimeError, NotImplementedError):
        return 0.0
    return 2 * 1024 * 1024 * 3072 / seconds / 1e9


def _fastest(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several runs, the least disturbed one."""
    taken = []
    for _ in range(ROUNDS):
        began = perf_counter()
        work()
        taken.append(perf_counter() - began)
    return min(taken)


def instructions() -> list[str]:
    """The processor's vector instructions, of those that matter here."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return [flag for flag in _FLAGS if flag in flags]


def _cpuinfo(name: str) -> str | None:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None
