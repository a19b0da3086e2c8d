"""Features of this processor and operating system, named as in Linux's /proc/cpuinfo."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path

# Features of the oldest Apple silicon Mac.
_APPLE = {"asimd", "asimdhp", "asimddp", "asimdrdm", "atomics"}


def features(probe: Path | None = None) -> set[str]:
    """Detect the features used in instruction_sets.txt, and others.

    Args:
        probe: compiled cpu_features.c; without it Linux's /proc/cpuinfo is read, which omits what
            the system does not support. Other systems report little without it.
    """
    if probe is not None:
        return set(_told(probe))
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return set(_APPLE)
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return set()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    said = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return {word for line in said for word in line.split()}


def _told(probe: Path) -> list[str]:
    feature = ctypes.CDLL(str(probe)).feature
    feature.argtypes, feature.restype = [ctypes.c_int], ctypes.c_char_p
    found: list[str] = []
    at = 0
    while (name := feature(at)) is not None:
        found += [name.decode()] * bool(name)
        at += 1
    return found
