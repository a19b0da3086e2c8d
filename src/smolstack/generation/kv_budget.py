"""The default memory limit of KV caches."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

_LEAST = 2**28  # if the available memory is unknown


def default_kv_bytes(device: torch.device) -> int:
    """Return half of the memory that is available on the model's device."""
    return max(_LEAST, _free_bytes(device) // 2)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    found = [size for size in (_available(), _left_to_the_container()) if size is not None]
    return min(found, default=0)


def _available() -> int | None:
    """Return the memory available without swapping, from Linux; elsewhere, half of all memory."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return None


def _left_to_the_container() -> int | None:
    """Return the memory that a control group leaves to this process, if one limits it."""
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max" is not a number
        return max(0, limit - int((group / "memory.current").read_text(encoding="ascii")))
    return None
