"""A workload of the tiny preset: every implementation loads one small checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from smolstack.bench.peers import implementations
from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.workload import Workload, workload_of
from smolstack.family import Preset

DTYPES = ("float32", "int8")


@pytest.fixture(autouse=True)
def _limits_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolstack.bench.machine.ROUNDS", 1)


@pytest.fixture(scope="module")
def tiny(tiny_preset: Preset) -> Iterator[Workload]:
    with workload_of(tiny_preset, DTYPES) as made:
        made.new_tokens = 3
        yield made


@pytest.fixture(scope="module")
def everyone(tiny: Workload) -> Iterator[list[Implementation]]:
    made = implementations(tiny)
    yield made
    for implementation in made:
        implementation.close()
