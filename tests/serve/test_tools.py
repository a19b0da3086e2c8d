"""The attack and soak tools work: a minimal run of each."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import itertools
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.serve.conftest import Process

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the tools' modules, which are scripts, set up with small images."""
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    attack, hostile_client, soak = map(
        importlib.import_module, ("attack", "hostile_client", "soak")
    )
    monkeypatch.setattr(hostile_client, "LARGE", (320, 200))
    monkeypatch.setattr(soak, "VALID_IMAGES", 1)
    monkeypatch.setattr(soak, "SETTLE_SECONDS", 0)
    return attack, soak


def test_an_attack_next_to_a_regular_client(server: Process, tools: Any) -> None:
    attack, _ = tools
    options = argparse.Namespace(seconds=1.0, after=0)
    row = attack.measure("tiffs", server.url, server.process.pid, options, itertools.count(1000))
    assert (row["attack"], row["failures"]) == ("tiffs", [])
    assert row["requests"] >= 1
    assert row["worst"] > 0
    assert row["peak"] >= row["before"] > 0


def test_a_soak_loses_no_answer(server: Process, tools: Any) -> None:
    _, soak = tools
    random.seed(0)
    measurements = soak.Measurements(server.process.pid, None, 0)
    options = argparse.Namespace(minutes=1 / 120, valid=1, hostile=2)
    assert asyncio.run(soak.soak(server.url, measurements, options)) == 0
    assert measurements.failures == []
    assert measurements.count["correct"] >= 1
    assert measurements.rows[-1]["rss_mib"] > 0
