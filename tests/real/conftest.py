"""Models with trained weights that are not in the repository. Tests that need one are skipped
where it has not been built.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import smolstack

CACHE = Path(__file__).parent.parent.parent / ".cache"

Loaded = Callable[[str], smolstack.VLM]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolVLM-256M's shape with SmolLM2-135M-Instruct as its text tower."""
    return _built(CACHE / "smollm2", "make .cache/smollm2/config.json")


@pytest.fixture(scope="session")
def bridged() -> Path:
    """The bundled reader's vision tower bridged to SmolLM2-135M-Instruct and trained."""
    return _built(CACHE / "real" / "lora" / "model", "make real")


@pytest.fixture(scope="session")
def in_dtype(smollm2: Path) -> Loaded:
    """Load it in a precision, once for all tests of a process."""
    return cache(lambda dtype: smolstack.load(smollm2, dtype=dtype))


def _built(folder: Path, command: str) -> Path:
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} has not been built; {command}")
    return folder
