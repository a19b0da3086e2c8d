"""The tools that attack a server still work: the smallest run of each."""

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
    """The modules, which are scripts beside each other, and small images."""
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    attack, hostile, soak = map(importlib.import_module, ("attack", "hostile", "soak"))
    monkeypatch.setattr(hostile, "LARGE", (320, 200))
    monkeypatch.setattr(soak, "GOOD_IMAGES", 1)
    monkeypatch.setattr(soak, "AFTER", 0)
    return attack, soak


def test_an_attack_with_an_honest_client_beside_it(server: Process, tools: Any) -> None:
    attack, _ = tools
    options = argparse.Namespace(seconds=1.0, after=0)
    row = attack.measured("tiffs", server.url, server.process.pid, options, itertools.count(1000))
    assert (row["attack"], row["failures"]) == ("tiffs", [])
    assert row["asked"] >= 1
    assert row["worst"] > 0
    assert row["peak"] >= row["before"] > 0


def test_a_soak_loses_no_answer(server: Process, tools: Any) -> None:
    _, soak = tools
    random.seed(0)
    record = soak.Record(server.process.pid, None, 0)
    options = argparse.Namespace(minutes=1 / 120, honest=1, hostile=2)
    assert asyncio.run(soak.soak(server.url, record, options)) == 0
    assert record.bad == []
    assert record.count["good"] >= 1
    assert record.rows[-1]["rss_mib"] > 0
