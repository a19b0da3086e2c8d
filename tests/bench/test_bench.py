"""Benchmarks give every contender the same work, in turn. (How long it takes is no test.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from smolstack.bench.cases import PARTS, answers, components
from smolstack.bench.peers.implementation import Implementation
from smolstack.bench.timing import (
    OURS,
    Case,
    Contender,
    ReportedValue,
    ReportedValues,
    Result,
    later,
    measure,
    nothing,
)
from smolstack.bench.worker import Worker, WorkerError
from smolstack.bench.workload import Workload


def runner(order: list[str], name: str) -> Callable[[], None]:
    return lambda: order.append(name)


def test_contenders_run_in_turn_after_a_warm_up() -> None:
    order: list[str] = []
    case = Case(
        "x", [Contender(OURS, runner(order, "a")), Contender("peer", runner(order, "b"))], units=2
    )
    results = measure(case, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert [r.contender for r in results] == [OURS, "peer"]
    assert all(r.fastest <= r.median <= r.slowest and r.rounds == 3 for r in results)


def test_ratios_are_those_of_medians_in_each_of_our_precisions() -> None:
    def taking(*values: float) -> Callable[[], ReportedValue]:
        left = iter((values[0], *values))
        return lambda: ReportedValue(next(left))

    case = Case(
        "x",
        [
            Contender(OURS, taking(4, 2, 3), "float32", bytes_read=6e9),
            Contender(OURS, taking(1, 1, 1), "int8"),
            Contender("peer", taking(6, 7, 5), "bfloat16", "eager"),
        ],
        flops=12e9,
        units=2,
    )
    ours, _, peer = measure(case, rounds=3)
    assert (ours.median, ours.fastest, ours.slowest) == (1.5, 1, 2)
    assert (ours.gflops, ours.gigabytes) == (4, 2)
    assert peer.contender == "peer bfloat16 eager"
    assert peer.ratios == {"float32": 2, "int8": 6}


def test_no_round_begins_after_the_time_of_a_case_is_spent() -> None:
    order: list[str] = []
    measure(Case("x", [Contender(OURS, runner(order, "a"))]), rounds=9, warmup=0, seconds=0)
    assert order == ["a"]


def test_a_long_contender_may_warm_up_with_something_shorter() -> None:
    order: list[str] = []
    contender = Contender(OURS, runner(order, "long"), warm=runner(order, "short"))
    measure(Case("x", [contender]), rounds=2)
    assert order == ["short", "long", "long"]


def test_models_that_nobody_measures_are_not_loaded() -> None:
    loaded: list[str] = []

    def load() -> Callable[[], object]:
        loaded.append("model")
        return lambda: len(loaded)

    run = later(load)
    assert loaded == []
    assert [run(), run(), loaded] == [1, 1, ["model"]]


@pytest.mark.parametrize("part", ["connector", "vision", "prefill", "images"])
def test_transformers_does_the_same_work(
    tiny: Workload, everyone: list[Implementation], part: str
) -> None:
    torch_implementations = [
        implementation
        for implementation in everyone
        if implementation.name in (OURS, "transformers")
    ]
    for case in PARTS[part](tiny, torch_implementations):
        exact = [c for c in case.contenders if c.precision in ("", "float32")]
        assert {c.name for c in exact} == {OURS, "transformers"}
        with torch.inference_mode():
            ours, *theirs = (_tensor(contender.run()) for contender in exact)
        for other in theirs:
            torch.testing.assert_close(ours, other.view_as(ours), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("part", ["decode", "ask", "load", "memory", "import"])
def test_the_long_parts_run_for_all(
    tiny: Workload, everyone: list[Implementation], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "CONTEXTS", (20,))
    monkeypatch.setattr(components, "STEPS", 2)
    case = next(PARTS[part](tiny, everyone))
    if part == "memory":  # a process for each
        case = replace(case, contenders=case.contenders[-3::2])
    results = measure(case, rounds=1)
    assert {r.name for r in results} >= {OURS, "transformers"}
    assert _sane(results)
    if part == "memory":
        assert all(r.unit == "B" and r.median > 2**20 for r in results)


def test_training_is_timed_by_epoch_and_its_memory_by_process(
    tiny: Workload, everyone: list[Implementation]
) -> None:
    _, case = PARTS["train"](replace(tiny, train_steps=2), everyone)
    wanted = (f"{OURS} int8", "transformers float32")
    chosen = [c for c in case.contenders if c.label.startswith(wanted)]
    results = measure(replace(case, contenders=chosen))
    assert [(r.case, r.name) for r in results] == [
        (f"train lora, {what}", name)
        for what in ("first epoch", "later epochs", "peak memory")
        for name in (OURS, "transformers")
    ]
    assert _sane(results)
    assert all(r.median > 2**20 for r in results if r.unit == "B")


def test_training_in_bfloat16_is_measured_where_it_is_wanted(
    tiny: Workload, everyone: list[Implementation]
) -> None:
    def labels(workload: Workload) -> set[str]:
        implementations = [type(one)(workload) for one in everyone]
        (case, _) = PARTS["train"](workload, implementations)
        return {c.label for c in case.contenders}

    without = labels(replace(tiny, train_dtypes=("float32",)))
    both = labels(replace(tiny, train_dtypes=("float32", "bfloat16")))
    assert not any("bfloat16" in label or "autocast" in label for label in without - {OURS})
    assert "transformers bfloat16 autocast" in both


def test_the_rounds_of_an_interrupted_measurement_are_not_repeated() -> None:
    order: list[str] = []
    case = Case(
        "x", [Contender(OURS, runner(order, "a")), Contender("peer", runner(order, "b"))], units=2
    )
    kept: list[list[Result]] = []
    whole = measure(case, rounds=2, warmup=0, after=kept.append)
    assert [[(r.contender, r.rounds) for r in results] for results in kept] == [
        [(OURS, 1)],
        [(OURS, 1), ("peer", 1)],
        [(OURS, 2), ("peer", 1)],
        [(OURS, 2), ("peer", 2)],
    ]
    order.clear()
    continued = measure(case, rounds=2, warmup=0, earlier=kept[2])
    assert order == ["b"]
    assert continued[0].values == whole[0].values
    assert continued[1].values[0] == whole[1].values[0]
    assert continued[1].rounds == 2


def test_a_run_may_measure_several_quantities() -> None:
    runs = iter([{"s": 2.0, "b": 8.0}, {"s": 4.0, "b": 8.0}])
    case = Case(
        "x",
        [Contender(OURS, lambda: ReportedValues(next(runs)), "int8", warm=nothing)],
        quantities={"s": "s", "b": "B"},
        rounds=2,
    )
    seconds, memory = measure(case)
    assert (seconds.case, seconds.unit, seconds.values) == ("s", "s", [2, 4])
    assert (memory.case, memory.unit, memory.median) == ("b", "B", 8)


@pytest.mark.parametrize("part", ["structured", "questions", "reuse"])
def test_our_own_ways_are_compared_with_the_plain_ones(
    tiny: Workload, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "TOKENS", 3)
    for case in PARTS[part](tiny, []):
        if "float32" in case.name:
            results = measure(case, rounds=1)
            assert results[0].name == OURS
            assert len(results) > 1
            assert _sane(results)


def test_a_child_process_does_what_it_is_told_until_it_is_closed(
    tiny: Workload, tmp_path: Path
) -> None:
    scene = tiny.scenes[0]
    with Worker(
        "smolstack.bench.peers.ours:asking", 1, folder=str(tiny.folder), dtype="float32"
    ) as worker:
        told = worker.tell(path=str(scene.path), split=False, tokens=2)
        assert 0 < told["seconds"] < 600
        assert told["peak_bytes"] > 2**20
        with pytest.raises(WorkerError, match=r"missing\.jpg"):
            worker.tell(path=str(tmp_path / "missing.jpg"), split=False, tokens=2)
        assert worker.run(path=str(scene.path), split=False, tokens=2).value > 0


def _sane(results: list[Result]) -> bool:
    return all(0 < r.fastest <= r.median <= r.slowest and r.rounds == 1 for r in results)


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
