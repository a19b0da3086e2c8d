"""A benchmark that is stopped keeps what it has measured, and the same command continues it."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smolstack.bench.studies import budget
from smolstack.bench.studies.kept import Kept
from smolstack.bench.workload import Workload
from smolstack.family import Preset

# smolstack bench, which kills itself (SIGKILL) instead of measuring once more.
PROGRAM = """
import os, pickle, signal, sys
from smolstack.bench import machine, timing, unfinished
from smolstack.cli.app import main
from smolstack.family import PRESETS
PRESETS["tiny"] = pickle.load(open(sys.argv.pop(1), "rb"))
machine.ROUNDS, unfinished.SECONDS = 1, 0.0
left, once = int(sys.argv.pop(1)), timing._once
def counted(case, run):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return once(case, run)
timing._once = counted
main()
"""
OURS = [f"smolstack {dtype}" for dtype in ("float32", "int8")]


@pytest.fixture
def preset_file(tiny_preset: Preset, tmp_path: Path) -> Path:
    path = tmp_path / "preset"
    path.write_bytes(pickle.dumps(tiny_preset))
    return path


def bench(preset: Path, *arguments: object, runs: int = 1000) -> subprocess.CompletedProcess[str]:
    command = [preset, runs, "bench", "--preset", "tiny", "--dtype", "float32,int8", *arguments]
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *(str(argument) for argument in command)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def measured(path: Path) -> list[tuple[str, str, int]]:
    data = json.loads(path.read_text())
    return [(r["case"], r["contender"], r["rounds"]) for r in data["results"]]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize(
    ("part", "options", "cases", "rounds", "killed", "kept"),
    [
        (
            "train",
            ["--match", "connector"],
            [f"train connector, {w}" for w in ("first epoch", "later epochs", "peak memory")],
            1,
            1,
            [1, 0],
        ),
        ("prefill", ["--match", "94", "--rounds", "3"], ["prefill, 94 tokens"], 3, 3, [2, 1]),
    ],
)
def test_a_killed_run_keeps_its_results_and_is_continued(
    preset_file: Path,
    tmp_path: Path,
    part: str,
    options: list[str],
    cases: list[str],
    rounds: int,
    killed: int,
    kept: list[int],
) -> None:
    saved = tmp_path / "run.json"
    arguments = [part, *options, "--only", "smolstack", "--save", saved]
    stopped = bench(preset_file, *arguments, runs=killed)
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    assert f"Measuring {part}" in stopped.stderr
    expected = [(c, o, n) for c in cases for o, n in zip(OURS, kept, strict=True) if n]
    assert measured(saved) == expected
    first = json.loads(saved.read_text())

    other = bench(preset_file, *arguments, "--seconds", "900")
    assert other.returncode == 2
    assert "run.json holds an unfinished run with seconds None, found 900.0" in other.stderr
    assert measured(saved) == expected

    # Exactly as many runs as are left.
    whole = bench(preset_file, *arguments, runs=2 * rounds - killed)
    assert whole.returncode == 0, whole.stderr
    assert f"continuing the run in {saved}, which has {len(expected)} results" in whole.stderr
    assert measured(saved) == [(case, ours, rounds) for case in cases for ours in OURS]
    last = json.loads(saved.read_text())
    assert set(first) - set(last) == {"unfinished"}
    assert set(last) == {"preset", "machine", "limits", "results", "studies"}
    again = {(r["case"], r["contender"]): r for r in last["results"]}
    for result in first["results"]:
        found = again[result["case"], result["contender"]]
        assert set(result) == set(found)
        assert found["values"][: len(result["values"])] == result["values"]


def test_an_interrupted_study_goes_on_after_its_rows(
    tiny: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "IMAGES", 1)
    tables: list[dict[str, list[Any]]] = []
    whole = budget.study(
        tiny, Kept(after=lambda found: tables.append({t: list(r) for t, r in found.items()}))
    )
    rows = whole[budget.TITLE]
    assert [len(table[budget.TITLE]) for table in tables] == list(range(1, len(rows) + 1))

    added: list[dict[str, Any]] = []
    kept = Kept(tables[-2], lambda found: added.append(found[budget.TITLE][-1]))
    continued = budget.study(tiny, kept)[budget.TITLE]
    assert [row["max_image_tokens"] for row in added] == [rows[-1]["max_image_tokens"]]
    assert [set(row) for row in continued] == [set(row) for row in rows]
    assert continued[:-1] == rows[:-1]
