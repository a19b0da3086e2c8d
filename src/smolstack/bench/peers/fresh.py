"""Time to import a module in a new interpreter."""

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
    """Return the seconds of ``import module`` in a new interpreter, without its own start."""
    program = _PROGRAM.format(module=module)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return float(result.stdout.splitlines()[-1])
