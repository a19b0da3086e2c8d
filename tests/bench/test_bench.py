"""Benchmarks measure the same work for every contender. (How long it takes is no test.)"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from smolstack.bench import machine, report
from smolstack.bench.cases import Bench
from smolstack.bench.timing import OURS, Case, Contender, measure
from smolstack.family import Preset


@pytest.fixture(scope="module")
def bench(tiny_preset: Preset) -> Bench:
    return Bench(tiny_preset, torch.float32)


def test_contenders_run_in_turn_after_a_warm_up() -> None:
    order: list[str] = []

    def runner(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    case = Case("x", [Contender(OURS, runner("a")), Contender("peer", runner("b"))], units=2)
    results = measure(case, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert [r.contender for r in results] == [OURS, "peer"]
    assert results[0].ratio == 1
    assert all(r.fastest <= r.median <= r.slowest and r.rounds == 3 for r in results)


@pytest.mark.parametrize("part", ["connector", "vision", "prefill", "images"])
def test_both_do_the_same_work(bench: Bench, part: str) -> None:
    for case in getattr(bench, part)():
        with torch.inference_mode():
            ours, theirs = (_tensor(contender.run()) for contender in case.contenders)
        torch.testing.assert_close(ours, theirs.view_as(ours), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["decode", "ask", "load"])
def test_the_long_parts_run_for_both(
    bench: Bench, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolstack.bench.cases.CONTEXTS", (20,))
    monkeypatch.setattr("smolstack.bench.cases.NEW_TOKENS", 3)
    for case in getattr(bench, part)():
        results = measure(case, rounds=1, warmup=1)
        assert [r.contender for r in results] == [OURS, "transformers"]
        assert all(r.median > 0 for r in results)


def test_a_report_can_be_read_by_people_and_programs(bench: Bench) -> None:
    results = measure(next(bench.vision()), rounds=1)
    limits = {"matmul_gflops": 100.0, "read_gigabytes": 10.0}
    data = json.loads(json.dumps(report.to_dict(results, machine.describe(), limits)))
    assert data["results"][0]["case"] == "vision, one tile, float32"
    assert {"torch", "transformers", "smolstack"} <= set(data["machine"]["versions"])
    assert report.table(results, limits).row_count == 2
    assert "× as fast" in report.markdown(results)
    assert [report.duration(s) for s in (0.00123456, 0.5, 12.3)] == ["1.23 ms", "500 ms", "12.3 s"]


def _tensor(result: Any) -> torch.Tensor:
    """The tensor that a contender computed, in whatever it came wrapped."""
    if isinstance(result, torch.Tensor):
        return result
    for name in ("last_hidden_state", "logits"):
        if getattr(result, name, None) is not None:
            found: torch.Tensor = getattr(result, name)
            return found
    pixels: torch.Tensor = result["pixel_values"]
    return pixels
