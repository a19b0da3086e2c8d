"""smolstack new: checkpoints of published shapes with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import smolstack
from smolstack.family import PRESETS, Preset

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _tiny_is_a_preset(tiny_preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published shapes take seconds and megabytes; the tiny one takes neither."""
    monkeypatch.setitem(PRESETS, "tiny", tiny_preset)


def test_the_list_names_every_preset(run: Run) -> None:
    result = run("new", "--list")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in PRESETS)
    assert "ibm-granite/granite-docling-258M" in result.stdout


def test_what_it_writes_answers_and_verifies(run: Run, tmp_path: Path, sign: Path) -> None:
    folder = tmp_path / "deep" / "model"
    result = run("new", "tiny", folder, "--vision-layers", 1, "--text-layers", 3)
    assert result.exit_code == 0, result.stderr
    assert str(folder) in result.stdout
    config = smolstack.load(folder).config
    assert (config.vision.num_layers, config.text.num_layers) == (1, 3)
    assert run("verify", folder).exit_code == 0
    assert run("ask", sign, "Hi", "--model", folder, "--max-new-tokens", 2).exit_code == 0


def test_a_seed_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        run("new", "tiny", tmp_path / name, "--seed", seed, "--dtype", "bfloat16")
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_that_exists_is_kept(run: Run, refuses: Run, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert "(--overwrite) replaces it" in refuses("new", "tiny", tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"
    assert run("new", "tiny", tmp_path, "--overwrite").exit_code == 0
    assert not (tmp_path / "note.txt").exists()


def test_an_unknown_preset_is_told_the_known_ones(refuses: Run, tmp_path: Path) -> None:
    told = refuses("new", "smolvlm-9000b", tmp_path / "model")
    assert "smolvlm-256m" in told
    assert not (tmp_path / "model").exists()


def test_preset_and_folder_are_both_needed(refuses: Run) -> None:
    assert "--list" in refuses("new")
    assert "--list" in refuses("new", "tiny")


def test_what_memory_cannot_hold_is_refused_before_it_is_made(
    refuses: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    told = refuses("new", "tiny", tmp_path / "model")
    assert "of memory" in told
    assert not (tmp_path / "model").exists()
