"""What a fresh interpreter takes to import a module."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
from importlib import import_module
from time import perf_counter
began = perf_counter()
import_module({module!r})
print(perf_counter() - began)
"""


def import_seconds(module: str) -> float:
    """Seconds of ``import module`` in a fresh interpreter, its own start not counted."""
    program = _PROGRAM.format(module=module)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(result.stdout.splitlines()[-1])
