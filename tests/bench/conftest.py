"""A setting of the tiny preset: every side loads one small checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from smolstack.bench.peers import sides
from smolstack.bench.peers.side import Side
from smolstack.bench.workload import Setting, setting
from smolstack.family import Preset

DTYPES = ("float32", "int8")


@pytest.fixture(autouse=True)
def _limits_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolstack.bench.machine.ROUNDS", 1)


@pytest.fixture(scope="module")
def tiny(tiny_preset: Preset) -> Iterator[Setting]:
    with setting(tiny_preset, DTYPES) as made:
        made.new_tokens = 3
        yield made


@pytest.fixture(scope="module")
def everyone(tiny: Setting) -> Iterator[list[Side]]:
    made = sides(tiny)
    yield made
    for side in made:
        side.close()
