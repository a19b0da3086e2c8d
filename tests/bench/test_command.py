"""smolstack bench as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from smolstack.bench.cases import PARTS
from smolstack.bench.studies import STUDIES
from smolstack.cli.app import app
from smolstack.cli.bench import What
from smolstack.family import PRESETS, Preset


@pytest.fixture(autouse=True)
def _tiny_is_a_preset(tiny_preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", tiny_preset)
    monkeypatch.delenv("SMOLSTACK_DEBUG", raising=False)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["bench", *(str(argument) for argument in arguments)])


def test_every_part_and_study_has_its_word() -> None:
    assert {what.value for what in What} == {*PARTS, *STUDIES}


def test_results_are_shown_kept_and_drawn(tmp_path: Path) -> None:
    saved, plot = tmp_path / "run.json", tmp_path / "run.png"
    arguments = ("--preset", "tiny", "--dtype", "float32", "--rounds", 1, "--only", "smolstack")
    result = run("prefill", "--match", "94", *arguments, "--save", saved, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "prefill, 94 tokens" in result.stdout
    assert "GFLOP/s" in result.stdout
    data = json.loads(saved.read_text())
    assert [entry["case"] for entry in data["results"]] == ["prefill, 94 tokens"]
    assert data["results"][0]["rounds"] == 1
    assert plot.exists()
    assert f"wrote {plot}" in result.stderr

    again = run("--add", saved, "--json")
    assert json.loads(again.stdout)["results"] == data["results"]
    text = run("--add", saved, "--markdown").stdout
    assert text.startswith("**prefill, 94 tokens**\n\n| contender |")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "nothing to measure, expected some of"),
        (("vision", "--dtype", "int3"), "dtype is 'int3', expected some of"),
        (("vision", "--preset", "gpt-2"), "no preset 'gpt-2'"),
    ],
)
def test_bad_input_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {sentence}")
