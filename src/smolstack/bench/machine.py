"""What ran where: versions, processor, threads, and limits measured on the spot."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from smolstack import __version__

PACKAGES = ("torch", "transformers", "numpy", "pillow", "tokenizers", "safetensors")


def describe() -> dict[str, Any]:
    """Processor, threads and versions, as plain data."""
    versions = {"smolstack": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "versions": versions,
    }


def limits(dtype: torch.dtype) -> dict[str, float]:
    """The fastest matrix product and memory read seen here: GFLOP/s in ``dtype``, GB/s."""
    side = 1536
    left, right = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    product = _seconds(lambda: left @ right, 7)
    vector = torch.ones(2**26)  # 256 MiB, beyond any cache
    read = _seconds(vector.sum, 7)
    return {
        "matmul_gflops": 2 * side**3 / product / 1e9,
        "read_gigabytes": vector.numel() * 4 / read / 1e9,
    }


def _seconds(work: Any, rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        began = perf_counter()
        work()
        taken.append(perf_counter() - began)
    return median(taken)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
