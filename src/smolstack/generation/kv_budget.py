"""How much memory KV caches may take, where nobody says it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

_LEAST = 2**28  # where the machine does not tell


def default_kv_bytes(device: torch.device) -> int:
    """Half of the memory that is free now where the model is."""
    return max(_LEAST, _free_bytes(device) // 2)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    found = [size for size in (_available(), _left_to_the_container()) if size is not None]
    return min(found, default=0)


def _available() -> int | None:
    """Memory that can be had without swapping, as Linux says; elsewhere, half of all there is."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return None


def _left_to_the_container() -> int | None:
    """What a control group leaves, where one limits this process."""
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max": no number
        return max(0, limit - int((group / "memory.current").read_text(encoding="ascii")))
    return None
