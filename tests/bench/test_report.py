"""What a run says: tables, records that add up, plots, and targets that are met or not."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from smolstack.bench import machine, plots, report, targets
from smolstack.bench.record import Record
from smolstack.bench.running import Choice, run
from smolstack.bench.timing import OURS, Result, nothing
from smolstack.errors import ConfigError
from smolstack.family import Preset

LIMITS = {"float32": 100.0, "bfloat16": 200.0, "int8": 400.0, "read": 10.0}


def result(
    case: str, name: str, precision: str, seconds: float, form: str = "", **more: Any
) -> Result:
    label = " ".join(part for part in (name, precision, form) if part)
    values = {"flops": 0.0, "bytes_read": 0.0, "unit": "s", **more}
    return Result(
        case=case,
        contender=label,
        name=name,
        precision=precision,
        median=seconds,
        fastest=seconds,
        slowest=seconds,
        rounds=1,
        values=[seconds],
        ratios={"int8": 2.0} if name != OURS else {"int8": 1.0},
        **values,
    )


RESULTS = [
    result("vision, 1 tile", OURS, "int8", 0.4, flops=40e9, bytes_read=1e6),
    result("vision, 1 tile", "onnxruntime", "int8", 0.5, flops=40e9, bytes_read=1e6),
    result("vision, 1 tile", "transformers", "bfloat16", 0.9, "sdpa", flops=40e9, bytes_read=2e6),
    result("vision, 1 tile", "transformers", "bfloat16", 0.8, "eager", flops=40e9, bytes_read=2e6),
    result("decode, after 100 tokens", OURS, "int4", 0.02, flops=1e6, bytes_read=1e8),
    result("memory, 1 tile, 64 tokens", OURS, "int8", 2.0**30, unit="B"),
]


def test_a_record_can_be_read_by_people_and_programs(tmp_path: Path) -> None:
    record = Record("tiny", machine.describe(), LIMITS, RESULTS, {"growth": [{"count": 3}]})
    data = json.loads(json.dumps(record.to_dict()))
    assert set(data) == {"preset", "machine", "limits", "results", "studies"}
    assert {"torch", "transformers", "smolstack"} <= set(data["machine"]["versions"])
    assert report.from_dict(data) == RESULTS
    table = report.table(RESULTS, LIMITS)
    assert table.row_count == len(RESULTS)
    text = report.markdown(RESULTS, record.studies, LIMITS)
    assert "| smolstack int8 | 400 ms | 400 ms–400 ms | 100 GFLOP/s (25%) |  |" in text
    assert "| smolstack int4 | 20 ms | 20 ms–20 ms | 5.0 GB/s (50%) |  |" in text
    assert "| smolstack int8 | 1.00 GiB |" in text
    assert "int8 2.00×" in text


def test_amounts_have_three_figures() -> None:
    seconds = [report.amount(s, "s") for s in (0.0000123, 0.00123456, 0.5, 12.34)]
    assert seconds == ["12.3 µs", "1.23 ms", "500 ms", "12.3 s"]
    assert [report.amount(b, "B") for b in (2**20, 3 * 2**29)] == ["1 MiB", "1.50 GiB"]


def test_earlier_runs_are_added_and_measured_again_replaced(tmp_path: Path) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(Record("tiny", {}, LIMITS, RESULTS, {"a": [{"x": 1}]}).to_dict()))
    anew = result("vision, 1 tile", OURS, "int8", 0.3)
    record = Record("tiny", {}, {}, [anew])
    record.add(path)
    assert [r for r in record.results if r.case == "vision, 1 tile"] == [anew]
    assert len(record.results) == 3
    assert record.limits == LIMITS
    assert record.studies == {"a": [{"x": 1}]}


def test_what_is_no_record_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"x\.json .*bench --save"):
        Record("tiny", {}, {}).add(path)


def test_targets_compare_with_the_fastest_form_of_a_peer() -> None:
    found = {row["what"]: row for row in targets.reached(RESULTS, {})}
    against = "vision, 1 tile: smolstack int8 against transformers bfloat16"
    assert found[against] == {
        "what": against,
        "target": "≥ 2×",
        "measured": "2.00×",
        "met": True,
    }
    assert found["vision, 1 tile: smolstack int8 against onnxruntime int8"]["met"]
    # Nothing is said about what did not run.
    assert not any("openvino" in what or "decode" in what for what in found)


def test_targets_of_loading_of_quality_and_of_batches() -> None:
    results = [result("load", OURS, "bfloat16", 0.4), result("import", OURS, "", 0.1)]
    studies = {
        "quality of the bundled reader": [{"precision": "int8", "points lost": 0.75}],
        "growth": [
            {"over": "batch", "precision": "int8", "count": 1, "seconds": 1.0},
            {"over": "batch", "precision": "int8", "count": 16, "seconds": 2.0},
        ],
    }
    rows = targets.reached(results, studies)
    assert [(row["measured"], row["met"]) for row in rows] == [
        ("100 ms", True),
        ("400 ms", False),
        ("0.75 points", False),
        ("8.0×", True),
    ]
    precisions = [
        {"by": by, "precision": precision, "KL to float32": value}
        for by, precision, value in (
            (OURS, "int8", 0.004),
            (OURS, "int4", 0.4),
            ("llama.cpp", "int8", 9.0),
        )
    ]
    kept = targets.reached([], {"quality of text": precisions})
    assert [(row["what"], row["measured"], row["met"]) for row in kept] == [
        ("quality of text, int8: KL to float32", "0.004", True),
        ("quality of text, int4: KL to float32", "0.4", False),
    ]
    text = targets.markdown(rows)
    assert "| load bfloat16 | < 300 ms | 400 ms | **no** |" in text
    assert targets.markdown([]) == ""


def test_the_roofline_is_drawn_and_beside_it_what_was_studied(tmp_path: Path) -> None:
    rows = [
        {
            "precision": "int8",
            "work": "prefill",
            "over": "context",
            "count": n,
            "seconds": n,
            "expected seconds": n,
            "peak bytes": n,
            "expected bytes": n,
        }
        for n in (1, 2)
    ]
    files = plots.draw(RESULTS, {"growth": rows}, LIMITS, tmp_path / "run.png")
    assert [file.name for file in files] == ["run-roofline.png", "run-growth.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    with pytest.raises(ConfigError, match="nothing to plot"):
        plots.draw([], {}, LIMITS, tmp_path / "none.png")


def test_a_run_measures_the_chosen_cases_of_the_chosen_contenders(
    tiny_preset: Preset, tmp_path: Path
) -> None:
    choice = Choice(
        ("connector", "images"),
        ("float32", "bfloat16"),
        rounds=1,
        only=("smolstack float32", "transformers bfloat16"),
        match=("1 tile", "5 tiles"),
        folder=tmp_path,
    )
    steps: list[str] = []

    def progress(step: str) -> Any:
        steps.append(step)
        return nullcontext(nothing)

    record = run(tiny_preset, choice, progress)
    assert [(r.case, r.contender) for r in record.results] == [
        ("connector, 1 tile", "smolstack float32"),
        ("connector, 1 tile", "transformers bfloat16"),
        ("connector, 5 tiles", "smolstack float32"),
        ("connector, 5 tiles", "transformers bfloat16"),
    ]
    assert steps[0] == "Measuring the machine …"
    assert set(record.limits) == {"float32", "bfloat16", "int8", "read"}
    assert (tmp_path / "tiny" / "model" / "config.json").exists()  # kept for the next run
